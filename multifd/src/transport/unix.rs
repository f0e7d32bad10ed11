//! Connections over unix sockets, found by a path.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::{UnixDatagram, UnixListener},
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, Mode, flock},
    io::Errno,
    net::{
        self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType,
        sockopt::{self, Timeout},
    },
};

use super::{
    Connect, Pending, Stopper, Stream,
    socket::{BACKLOG, SocketListener, SocketStream, context},
    uri::Uri,
};
use crate::sync::Deadline;

/// Opens connections to the socket at one path.
#[derive(Clone, Debug)]
pub struct UnixConnector {
    path: PathBuf,
}

impl UnixConnector {
    /// Connects to the socket at `path`.
    pub fn new(path: impl Into<PathBuf>) -> UnixConnector {
        UnixConnector { path: path.into() }
    }
}

impl Connect for UnixConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(Box::new(PendingUnix { path: self.path.clone(), stopped: Arc::default() }))
    }
}

/// A connection that is to be opened.
struct PendingUnix {
    path: PathBuf,
    stopped: Arc<AtomicBool>,
}

impl PendingUnix {
    /// Waits for room in the queue of the listener: nothing tells when there is some.
    fn open(&self, deadline: Deadline) -> io::Result<OwnedFd> {
        let address = SocketAddrUnix::new(&self.path)?;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // A connect waits as long as a send would.
        sockopt::set_socket_timeout(&socket, Timeout::Send, Some(ROOM_PAUSE))?;
        loop {
            if self.stopped.load(SeqCst) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            match net::connect(&socket, &address) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if !deadline.is_over() => {}
                Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
        sockopt::set_socket_timeout(&socket, Timeout::Send, None)?;
        Ok(socket)
    }
}

impl Pending for PendingUnix {
    fn establish(self: Box<Self>, limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        let peer = self.peer();
        let socket = self.open(Deadline::after(limit)).map_err(context(&peer))?;
        Ok(Box::new(SocketStream::new(socket)?.with_peer(peer)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(Stopped(self.stopped.clone())))
    }

    fn peer(&self) -> String {
        Uri::Unix(self.path.clone()).to_string()
    }
}

struct Stopped(Arc<AtomicBool>);

impl Stopper for Stopped {
    fn stop(&self) {
        self.0.store(true, SeqCst);
    }
}

/// Listens at `path`. A socket that no process listens on any more is replaced; dropping the listener removes the path.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] where the path is something else or a process listens there; the kernel's.
pub fn listen(path: &Path) -> io::Result<SocketListener> {
    let uri = Uri::Unix(path.to_owned());
    let (listener, own) = bind(path, None).map_err(context(&uri))?;
    SocketListener::opened(listener, uri, Some(own))
}

/// Binds a socket to `path` which only this user may connect to, and listens. It has these rights from its first moment.
/// A socket that no process listens on any more is replaced.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] where the path is something else or a process listens there; the kernel's.
pub fn listen_privately(path: &Path) -> io::Result<(UnixListener, OwnPath)> {
    let (socket, own) = bind(path, Some(Mode::RUSR | Mode::WUSR))?;
    Ok((socket.into(), own))
}

/// A socket that listens at `path`, whose file has `mode` without what the umask takes away.
fn bind(path: &Path, mode: Option<Mode>) -> io::Result<(OwnedFd, OwnPath)> {
    let address = SocketAddrUnix::new(path)?;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    if let Some(mode) = mode {
        // Linux gives the file of a socket the mode of the socket itself.
        rustix::fs::fchmod(&socket, mode)?;
    }
    // Another process that finds our socket bound and not listening yet would take it for a stale one; and of two that
    // find one stale, the later must not remove the new socket of the other.
    let _alone = lock_directory_of(path)?;
    if is_stale(path)? {
        fs::remove_file(path)?;
    }
    net::bind(&socket, &address)?;
    let own = OwnPath::of(path)?;
    net::listen(&socket, BACKLOG)?;
    if let Some(mode) = mode {
        let found = Mode::from_raw_mode(fs::symlink_metadata(path)?.mode());
        if mode.complement().intersects(found) {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "others may connect to a socket made here"));
        }
    }
    Ok((socket, own))
}

/// Waits until no other process of ours makes a socket in the directory of `path`; released when dropped. `None` where the
/// directory can be written and not read, so that it cannot be locked.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] after two seconds; the kernel's.
fn lock_directory_of(path: &Path) -> io::Result<Option<File>> {
    let directory = match File::open(std::path::absolute(path)?.parent().unwrap_or(Path::new("/"))) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        other => other?,
    };
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(directory)),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "another process has locked its directory"));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether `path` is a socket that nobody listens on.
fn is_stale(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "the path exists and is not a socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    }
    // A datagram socket cannot connect to a stream socket, so whoever listens does not notice the question.
    match UnixDatagram::unbound()?.connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        Err(error) if error.raw_os_error() != Some(Errno::PROTOTYPE.raw_os_error()) => Err(error),
        _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
    }
}

/// The path of a socket of ours; removed when dropped, if it is still the same file.
///
/// To be dropped before the socket: the number of a file's inode is given out again once the socket is closed.
pub struct OwnPath {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl OwnPath {
    fn of(path: &Path) -> io::Result<OwnPath> {
        let metadata = fs::symlink_metadata(path)?;
        // Absolute, because the process may change its directory.
        Ok(OwnPath { path: std::path::absolute(path)?, device: metadata.dev(), inode: metadata.ino() })
    }
}

impl Drop for OwnPath {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == (self.device, self.inode));
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket is left behind");
        }
    }
}

/// How often a connect to a listener without room looks whether it is still wanted.
const ROOM_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{fs::PermissionsExt, net::UnixStream},
        thread,
    };

    use test_support::TempDir;

    use super::*;

    /// Between bind and chmod, others could connect.
    #[test]
    fn a_private_socket_has_its_rights_from_the_first_moment() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("s");
        let (socket, own) = bind(&path, Some(Mode::RUSR | Mode::WUSR)).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o177, 0, "as bind left it");
        drop((own, socket));
        let (listener, own) = listen_privately(&path).unwrap();
        assert_eq!(listen_privately(&path).err().unwrap().kind(), io::ErrorKind::AddrInUse);
        UnixStream::connect(&path).unwrap();
        drop((own, listener));
        assert!(!path.exists());
    }

    /// Each found the stale socket, and the later ones removed the new one.
    #[test]
    fn of_many_that_replace_a_stale_socket_one_listens_and_stays() {
        test_support::time_limit(Duration::from_secs(60), || {
            let dir = TempDir::new().unwrap();
            let path = dir.path().join("s");
            for _ in 0..50 {
                drop(UnixListener::bind(&path).unwrap());
                let start = std::sync::Barrier::new(4);
                let listeners: Vec<_> = thread::scope(|scope| {
                    let threads: Vec<_> = (0..4)
                        .map(|_| {
                            scope.spawn(|| {
                                start.wait();
                                listen_privately(&path)
                            })
                        })
                        .collect();
                    threads.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect()
                });
                assert_eq!(listeners.len(), 1);
                UnixStream::connect(&path).unwrap();
                listeners[0].0.accept().unwrap();
                let (listener, own) = listeners.into_iter().next().unwrap();
                drop(own);
                drop(listener);
                assert!(!path.exists());
            }
        });
    }

    #[test]
    fn a_stale_socket_is_replaced_and_the_path_removed_at_the_end() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the path behind");
        let listener = listen(&path).unwrap();
        UnixConnector::new(&path).connect().unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_in_use_and_other_files_are_left_alone() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("s");
        let mut first = listen(&path).unwrap();
        assert_eq!(listen(&path).err().unwrap().kind(), io::ErrorKind::AddrInUse);
        assert!(super::super::Listen::try_accept(&mut first).unwrap().is_none(), "the question was not noticed");
        UnixConnector::new(&path).connect().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "precious").unwrap();
        let error = listen(&file).err().unwrap();
        assert!(error.to_string().contains("not a socket"), "{error}");
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }

    #[test]
    fn a_path_that_somebody_else_took_over_is_left_alone() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("s");
        let first = listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = listen(&path).unwrap();
        drop(first);
        UnixConnector::new(&path).connect().unwrap();
    }
}

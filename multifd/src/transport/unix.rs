//! Connections over unix sockets, found by a path.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::{UnixDatagram, UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use super::{
    Connect, Stream,
    socket::{SocketListener, SocketStream, context},
    uri::Uri,
};

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
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let uri = Uri::Unix(self.path.clone());
        let stream = UnixStream::connect(&self.path).map_err(context(&uri))?;
        Ok(Box::new(SocketStream::new(stream.into())?.with_peer(uri.to_string())))
    }
}

/// Listens at `path`. A socket that nobody listens on any more is replaced; dropping the listener removes the path.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] where the path is something else or somebody listens there; the kernel's.
pub fn listen(path: &Path) -> io::Result<SocketListener> {
    let uri = Uri::Unix(path.to_owned());
    let bind = || {
        if is_stale(path)? {
            fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        Ok((listener, OwnPath::of(path)?))
    };
    let (listener, own) = bind().map_err(context(&uri))?;
    SocketListener::with_path(listener.into(), uri, Some(own))
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
pub(super) struct OwnPath {
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

#[cfg(test)]
mod tests {
    use test_support::TempDir;

    use super::*;

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

//! A monitor that fails: a proxy before a QEMU's, or a socket that only looks like one.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// What happens in place of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection is closed, and no other one taken.
    Close,
    /// The connection is closed once; the next one works.
    Hangup,
    /// Bytes that are not QMP.
    Garbage,
    /// A message without an end.
    Endless,
    /// Nothing.
    Silence,
}

/// Listens at [`path`](MonitorProxy::path) until dropped.
pub struct MonitorProxy {
    pub path: PathBuf,
    connected: Arc<AtomicBool>,
}

impl MonitorProxy {
    /// Fails with the first byte.
    pub fn alone(path: &Path, fault: Fault) -> MonitorProxy {
        MonitorProxy::listen(path, None, fault, 0)
    }

    /// Passes on to the monitor at `to` what comes before the command number `at`, counted from 1, which never gets there.
    pub fn before(path: &Path, to: &Path, fault: Fault, at: usize) -> MonitorProxy {
        MonitorProxy::listen(path, Some(to.to_owned()), fault, at)
    }

    fn listen(path: &Path, to: Option<PathBuf>, fault: Fault, at: usize) -> MonitorProxy {
        let listener = UnixListener::bind(path).unwrap();
        let connected = Arc::new(AtomicBool::new(false));
        let seen = connected.clone();
        let own = path.to_owned();
        thread::spawn(move || {
            let count = Arc::new(AtomicUsize::new(0));
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                if !own.exists() {
                    return;
                }
                seen.store(true, Ordering::Relaxed);
                let server = to.as_ref().map(|to| UnixStream::connect(to).unwrap());
                let (count, own) = (count.clone(), own.clone());
                if fault == Fault::Close && count.load(Ordering::Relaxed) >= at && at > 0 {
                    return;
                }
                thread::spawn(move || serve(client, server, fault, at, &count, &own));
            }
        });
        MonitorProxy { path: path.to_owned(), connected }
    }

    pub fn wait_connected(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.connected.load(Ordering::Relaxed) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        self.connected.load(Ordering::Relaxed)
    }
}

impl Drop for MonitorProxy {
    fn drop(&mut self) {
        // The thread that listens looks whether it is there.
        let gone = self.path.with_extension("gone");
        let _ = std::fs::rename(&self.path, &gone);
        let _ = UnixStream::connect(&gone);
        let _ = std::fs::remove_file(&gone);
    }
}

fn serve(client: UnixStream, server: Option<UnixStream>, fault: Fault, at: usize, count: &AtomicUsize, path: &Path) {
    let mut to_client = client.try_clone().unwrap();
    let Some(server) = server else { return fail(&mut to_client, fault, path) };
    let mut to_server = server.try_clone().unwrap();
    let answers = server.try_clone().unwrap();
    thread::spawn(move || {
        let mut to_client = client;
        let _ = std::io::copy(&mut &answers, &mut to_client);
        let _ = to_client.shutdown(std::net::Shutdown::Both);
    });
    for line in BufReader::new(to_client.try_clone().unwrap()).lines().map_while(Result::ok) {
        let number = count.fetch_add(1, Ordering::Relaxed) + 1;
        if number == at || (number > at && fault != Fault::Hangup) {
            fail(&mut to_client, fault, path);
            break;
        }
        if to_server.write_all(format!("{line}\n").as_bytes()).is_err() {
            break;
        }
    }
    // The next client of the QEMU's monitor gets in.
    let _ = server.shutdown(std::net::Shutdown::Both);
}

fn fail(to_client: &mut UnixStream, fault: Fault, path: &Path) {
    match fault {
        Fault::Close => {
            // No process listens there any more.
            let _ = std::fs::remove_file(path);
        }
        Fault::Hangup => {}
        Fault::Garbage => {
            let _ = to_client.write_all(b"QEMU monitor - type 'help' for more information\n(qemu) \n");
        }
        Fault::Endless => {
            let _ = to_client.write_all(b"{\"QMP\": \"");
            while to_client.write_all(&[b'x'; 4096]).is_ok() {}
        }
        Fault::Silence => {
            // Until the client has had enough.
            let mut byte = [0];
            while std::io::Read::read(to_client, &mut byte).is_ok_and(|count| count > 0) {}
        }
    }
    let _ = to_client.shutdown(std::net::Shutdown::Both);
}

/// A monitor whose answers are held back from a command on: QEMU runs that, and the client does not learn it.
pub struct HeldAnswers {
    pub path: PathBuf,
    state: Arc<(Mutex<Held>, Condvar)>,
}

#[derive(Default)]
struct Held {
    /// Lines that came from the client since the command, with it.
    lines: usize,
    released: bool,
}

impl HeldAnswers {
    /// Listens at `path` for one client, and passes on to the monitor at `to`. Answers are held from `command` on.
    pub fn of(path: &Path, to: &Path, command: &'static str) -> HeldAnswers {
        let listener = UnixListener::bind(path).unwrap();
        let server = UnixStream::connect(to).unwrap();
        let state = Arc::new((Mutex::new(Held::default()), Condvar::new()));
        let held = HeldAnswers { path: path.to_owned(), state: state.clone() };
        thread::spawn(move || {
            let (client, _) = listener.accept().unwrap();
            let (mut answers, mut to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            let gate = state.clone();
            thread::spawn(move || {
                let mut part = [0; 4096];
                while let Ok(len @ 1..) = std::io::Read::read(&mut answers, &mut part) {
                    let held = gate.0.lock().unwrap();
                    drop(gate.1.wait_while(held, |held| held.lines > 0 && !held.released).unwrap());
                    if to_client.write_all(&part[..len]).is_err() {
                        return;
                    }
                }
            });
            let mut to_server = server.try_clone().unwrap();
            for line in BufReader::new(client).lines().map_while(Result::ok) {
                let message: serde_json::Value = serde_json::from_str(&line).unwrap();
                let mut held = state.0.lock().unwrap();
                if held.lines > 0 || message["execute"] == command {
                    held.lines += 1;
                    state.1.notify_all();
                }
                drop(held);
                if to_server.write_all(format!("{line}\n").as_bytes()).is_err() {
                    break;
                }
            }
            let _ = server.shutdown(std::net::Shutdown::Both);
        });
        held
    }

    /// Waits until the client has sent `lines`, the first of which is the command.
    pub fn wait_lines(&self, lines: usize, limit: Duration) {
        let held = self.state.0.lock().unwrap();
        let (held, _) = self.state.1.wait_timeout_while(held, limit, |held| held.lines < lines).unwrap();
        assert!(held.lines >= lines, "{} of {lines} lines", held.lines);
    }

    /// Lets the answers through.
    pub fn release(&self) {
        self.state.0.lock().unwrap().released = true;
        self.state.1.notify_all();
    }
}

/// A monitor whose QEMU does not clear up its last migration, as far as `query-yank` tells.
pub struct Uncleared {
    pub path: PathBuf,
    questions: Arc<AtomicUsize>,
}

impl Uncleared {
    /// Listens at `path` for one client, and passes on to the monitor at `to`; the first `count` questions get a migration for
    /// an answer.
    pub fn of(path: &Path, to: &Path, count: usize) -> Uncleared {
        let listener = UnixListener::bind(path).unwrap();
        let server = UnixStream::connect(to).unwrap();
        let questions = Arc::new(AtomicUsize::new(0));
        let uncleared = Uncleared { path: path.to_owned(), questions: questions.clone() };
        thread::spawn(move || {
            let (client, _) = listener.accept().unwrap();
            let (mut answers, mut to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            let mut to_server = server.try_clone().unwrap();
            let mut own = client.try_clone().unwrap();
            thread::spawn(move || {
                let _ = std::io::copy(&mut answers, &mut to_client);
                let _ = to_client.shutdown(std::net::Shutdown::Both);
            });
            for line in BufReader::new(client).lines().map_while(Result::ok) {
                let message: serde_json::Value = serde_json::from_str(&line).unwrap();
                let is_asked = message["execute"] == "query-yank";
                let written = if is_asked && questions.fetch_add(1, Ordering::Relaxed) < count {
                    let answer = serde_json::json!({ "return": [{ "type": "migration" }], "id": message["id"] });
                    own.write_all(format!("{answer}\n").as_bytes())
                } else {
                    to_server.write_all(format!("{line}\n").as_bytes())
                };
                if written.is_err() {
                    break;
                }
            }
            let _ = server.shutdown(std::net::Shutdown::Both);
        });
        uncleared
    }

    /// How often it was asked.
    pub fn questions(&self) -> usize {
        self.questions.load(Ordering::Relaxed)
    }
}

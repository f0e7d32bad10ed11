//! A network that breaks when a test says so: a proxy on a unix socket that cuts all of its connections and takes new ones.

use std::{
    io,
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

/// Listens at [`uri`](Cutter::uri) until it is dropped.
pub struct Cutter {
    path: PathBuf,
    shared: Arc<Shared>,
    accepting: Option<thread::JoinHandle<()>>,
}

struct Shared {
    onward: PathBuf,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    /// Both ends of each connection since the last cut.
    streams: Vec<UnixStream>,
    /// How many connections were taken in all.
    taken: usize,
    ended: bool,
}

impl Cutter {
    /// Listens at `path`, and passes connections on to the socket that `onward` names (`unix:PATH`).
    pub fn start(path: &Path, onward: &str) -> Cutter {
        let listener = UnixListener::bind(path).unwrap();
        let onward = onward.strip_prefix("unix:").unwrap().into();
        let shared = Arc::new(Shared { onward, open: Mutex::default() });
        let accepting = {
            let shared = shared.clone();
            thread::spawn(move || {
                for source in listener.incoming().map_while(Result::ok) {
                    if shared.open.lock().unwrap().ended {
                        return;
                    }
                    // Its destination may not listen any more.
                    let _ = shared.pass_on(source);
                }
            })
        };
        Cutter { path: path.to_owned(), shared, accepting: Some(accepting) }
    }

    /// Where it listens.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// How many connections it has taken.
    pub fn taken(&self) -> usize {
        self.shared.open.lock().unwrap().taken
    }

    /// Breaks all connections. What was written on one end and not read on the other is lost.
    pub fn cut(&self) {
        self.shared.end_all();
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.shared.open.lock().unwrap().ended = true;
        self.shared.end_all();
        // Wakes the thread that accepts.
        let woken = UnixStream::connect(&self.path);
        if let (Ok(_), Some(accepting)) = (woken, self.accepting.take()) {
            let _ = accepting.join();
        }
    }
}

impl Shared {
    fn pass_on(self: &Arc<Shared>, source: UnixStream) -> io::Result<()> {
        let destination = UnixStream::connect(&self.onward)?;
        let mut open = self.open.lock().unwrap();
        open.streams.extend([source.try_clone()?, destination.try_clone()?]);
        open.taken += 1;
        drop(open);
        for (mut from, mut to) in
            [(source.try_clone()?, destination.try_clone()?), (destination.try_clone()?, source.try_clone()?)]
        {
            thread::spawn(move || {
                let copied = io::copy(&mut from, &mut to);
                let _ = to.shutdown(if copied.is_ok() { Shutdown::Write } else { Shutdown::Both });
            });
        }
        Ok(())
    }

    fn end_all(&self) {
        for stream in self.open.lock().unwrap().streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

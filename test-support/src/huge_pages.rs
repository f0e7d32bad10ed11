//! Huge pages of the host, for as long as a test runs.

use std::{
    fs,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    thread,
    time::{Duration, Instant},
};

/// Huge pages of 2 MiB that were added to the host's, and are taken away again when this is dropped.
///
/// One test at a time has some, of all processes: how many there are is one number, which is read and written.
pub struct HugePages {
    before: u64,
    /// A name that only one process has, and that goes away with it.
    _lock: UnixListener,
}

impl HugePages {
    /// Adds `pages`, once no other test has any. Nothing where this process may not, where the host has no room, or where another
    /// test does not end.
    pub fn reserve(pages: u64) -> Option<HugePages> {
        let lock = lock()?;
        let before = count(TOTAL)?;
        let added = HugePages { before, _lock: lock };
        fs::write(TOTAL, (before + pages).to_string()).ok()?;
        (count(FREE)? >= pages).then_some(added)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(TOTAL, self.before.to_string());
    }
}

fn lock() -> Option<UnixListener> {
    let name = SocketAddr::from_abstract_name("multifd-tests-huge-pages").ok()?;
    let begun = Instant::now();
    loop {
        match UnixListener::bind_addr(&name) {
            Ok(lock) => return Some(lock),
            Err(_) if begun.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(20)),
            Err(_) => return None,
        }
    }
}

fn count(file: &str) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

const TOTAL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
/// A test with huge pages takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);

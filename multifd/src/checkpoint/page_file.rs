//! The file that pages of a checkpoint go to, with a bound on what is left to be written to disk at its end.
//!
//! A file system keeps what was written in memory, and the disk has a cache of its own: an fsync at the end has all of that to write while
//! the guest is paused. So what is not on disk is bounded, by bytes and by time. Whenever a batch has come, which the disk takes in about
//! [`BATCH_TIME`], the channel that brought the last of it has it written out; the others go on until [`AHEAD`] batches wait. At the end of a
//! round all are on disk but for a few bytes.
//!
//! Nor do pages stay in the page cache, which other programs need: the kernel is told to forget what a sync has put on disk. (`RWF_DONTCACHE`,
//! with which it forgets by itself, and begins to write at once, had 0.8 of the speed.) To write past the page cache (O_DIRECT) is slower on some
//! disks, since each write waits for the disk, and for the file system to note that the place has content; so it is done only where it is asked for.
//!
//! Both ways may write the same page one after the other: the kernel writes cached pages to disk and forgets them before it
//! writes the same bytes directly.

use std::{
    fs::File,
    io::{self, IoSlice},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Advice, CWD, Mode, OFlags},
    io::Errno,
};

use crate::{
    sync::{Arc, Condvar, Mutex, MutexGuard, lock, wait},
    sys::writeback,
};

/// Whether the pages of a checkpoint stay out of the page cache. Either way they are written to disk as they come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirectWrites {
    /// Through it, and the kernel forgets them once they are on disk.
    #[default]
    Auto,
    /// Past it (O_DIRECT); an error where the file system refuses.
    On,
    /// Through it, where they stay while there is room.
    Off,
}

/// A file that all channels write pages to.
pub(crate) struct PageFile {
    file: Arc<File>,
    /// The same file, opened to be written past the page cache, as all of it has to be then.
    direct: Option<File>,
    /// `None` where nothing has to be on disk at any time.
    unsynced: Option<Unsynced>,
}

/// What was written and may not be on disk.
#[derive(Default)]
struct Unsynced {
    /// What is on disk is not to stay in the page cache.
    forgets: bool,
    state: Mutex<Written>,
    /// A sync has ended.
    ended: Condvar,
}

struct Written {
    /// Bytes written since the beginning.
    written: u64,
    /// How many of these are on disk.
    synced: u64,
    /// Bytes after which they are written out.
    batch: u64,
    /// Somebody has the file written out.
    is_under_way: bool,
    /// The number of the error that a sync ended with. It may not be told again.
    failed: Option<i32>,
}

impl Default for Written {
    fn default() -> Written {
        Written { written: 0, synced: 0, batch: FEW, is_under_way: false, failed: None }
    }
}

impl PageFile {
    /// `file`, of which nothing has to be on disk at any time.
    pub(crate) fn temporary(file: Arc<File>) -> PageFile {
        PageFile { file, direct: None, unsynced: None }
    }

    /// `file`, which is going to be put on disk.
    ///
    /// # Errors
    /// It is required to be written past the page cache, and cannot be.
    pub(crate) fn kept(file: Arc<File>, direct: DirectWrites) -> io::Result<PageFile> {
        let forgets = direct == DirectWrites::Auto;
        let direct = match direct {
            DirectWrites::On => Some(open_direct(&file).map_err(|error| refusal(&error.into()))?),
            DirectWrites::Auto | DirectWrites::Off => None,
        };
        let unsynced = Some(Unsynced { forgets, ..Unsynced::default() });
        Ok(PageFile { direct, unsynced, ..PageFile::temporary(file) })
    }

    /// The file, to be read and written through the page cache.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file `len` bytes long, so that what is written before its end does not move that. It may be refused, which
    /// costs speed.
    pub(crate) fn reserve(&self, len: u64) {
        if let Err(error) = self.file.set_len(len) {
            tracing::debug!(%error, "the file grows as it is written");
        }
    }

    /// Writes `parts`, whole pages, one after the other to `at`. It waits for the disk where too much of what was written is not there.
    ///
    /// # Errors
    /// The kernel's, also of what was written before.
    pub(crate) fn write(&self, mut parts: &mut [IoSlice<'_>], mut at: u64) -> io::Result<()> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        match self.direct.as_ref().filter(|_| is_aligned(parts)) {
            Some(direct) => {
                let written = write_all(direct, &mut parts, &mut at);
                let is_refusal = |error: &io::Error| error.raw_os_error() == Some(Errno::INVAL.raw_os_error());
                written.map_err(|error| if is_refusal(&error) { refusal(&error) } else { error })?;
            }
            None => write_all(&self.file, &mut parts, &mut at)?,
        }
        match &self.unsynced {
            Some(unsynced) => unsynced.wrote(&self.file, bytes as u64),
            None => Ok(()),
        }
    }

    /// Has the kernel begin to write to disk what is not there. If `all`, as at the end of a round, it is there on return, but for a
    /// few bytes.
    pub(crate) fn settle(&self, all: bool) {
        let Some(unsynced) = &self.unsynced else { return };
        if all {
            unsynced.sync_down_to_few(&self.file);
        }
        if unsynced.bytes() > 0
            && let Err(error) = writeback::begin(&self.file)
        {
            tracing::debug!(%error, "pages are written to disk at the end only");
        }
    }

    /// Whether nothing that was written is known to be lost.
    ///
    /// # Errors
    /// The disk's, of a write that seemed to have worked.
    pub(crate) fn check(&self) -> io::Result<()> {
        match self.unsynced.as_ref().and_then(|unsynced| lock(&unsynced.state).failed) {
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None => Ok(()),
        }
    }
}

impl Unsynced {
    /// `bytes` more were written to `file`.
    fn wrote(&self, file: &File, bytes: u64) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.written += bytes;
        loop {
            if let Some(error) = state.failed {
                return Err(io::Error::from_raw_os_error(error));
            }
            let left = state.written - state.synced;
            if left < state.batch || (state.is_under_way && left < AHEAD * state.batch) {
                return Ok(());
            }
            state = if state.is_under_way { wait(&self.ended, state) } else { self.sync(file, state) };
        }
    }

    /// Has `file` on disk, but for a few bytes. An error is told to all who write or ask.
    fn sync_down_to_few(&self, file: &File) {
        let mut state = lock(&self.state);
        while state.failed.is_none() && state.written - state.synced >= FEW {
            state = if state.is_under_way { wait(&self.ended, state) } else { self.sync(file, state) };
        }
    }

    /// Has all that was written so far on disk. Others write meanwhile.
    fn sync<'a>(&'a self, file: &File, mut state: MutexGuard<'a, Written>) -> MutexGuard<'a, Written> {
        state.is_under_way = true;
        let (written, bytes, begun) = (state.written, state.written - state.synced, Instant::now());
        drop(state);
        let synced = rustix::fs::fdatasync(file);
        let taken = begun.elapsed();
        if self.forgets
            && let Err(error) = rustix::fs::fadvise(file, 0, None, Advice::DontNeed)
        {
            tracing::debug!(%error, "a checkpoint stays in the page cache");
        }
        let mut state = lock(&self.state);
        state.is_under_way = false;
        match synced {
            Ok(()) => {
                state.synced = written;
                state.batch = next_batch(state.batch, bytes, taken);
            }
            Err(error) => state.failed = Some(error.raw_os_error()),
        }
        self.ended.notify_all();
        state
    }

    fn bytes(&self) -> u64 {
        let state = lock(&self.state);
        state.written - state.synced
    }
}

/// Bytes that the disk takes in [`BATCH_TIME`], which took `bytes` in `taken`; at most twice as many as in a `batch` so far.
fn next_batch(batch: u64, bytes: u64, taken: Duration) -> u64 {
    let fits = (bytes as f64 * BATCH_TIME.as_secs_f64() / taken.as_secs_f64().max(1e-6)) as u64;
    fits.min(2 * batch).clamp(LEAST_BATCH, MOST_BATCH)
}

fn is_aligned(parts: &[IoSlice<'_>]) -> bool {
    parts.iter().all(|part| part.as_ptr().addr().is_multiple_of(ALIGNMENT) && part.len().is_multiple_of(ALIGNMENT))
}

/// Opens `file` once more, to be written past the page cache.
fn open_direct(file: &File) -> Result<File, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?.into())
}

fn refusal(error: &io::Error) -> io::Error {
    let message =
        format!("the file system takes no writes past the page cache ({error}); expected direct writes auto or off");
    io::Error::new(io::ErrorKind::Unsupported, message)
}

/// Writes `parts` to `at` of `file`; on failure both say what is left.
fn write_all(file: &File, parts: &mut &mut [IoSlice<'_>], at: &mut u64) -> io::Result<()> {
    while !parts.is_empty() {
        match rustix::io::pwritev(file, parts, *at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                *at += n as u64;
                IoSlice::advance_slices(parts, n);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// What addresses, offsets and lengths of direct writes are multiples of: no disk has larger blocks that a file system with
/// pages of 4 KiB is on.
const ALIGNMENT: usize = 4096;
/// How long a sync is to take: a source that is held up for longer might take it for a stall, and a longer one gains no speed.
const BATCH_TIME: Duration = Duration::from_millis(250);
/// Batches that may have been written and not be on disk, besides one write of each channel.
const AHEAD: u64 = 4;
/// The shortest batch.
const LEAST_BATCH: u64 = 1 << 20;
/// The longest batch.
const MOST_BATCH: u64 = 32 << 20;
/// Bytes that are not worth a sync at the end of a round.
const FEW: u64 = 4 << 20;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{fs, os::unix::fs::FileExt, thread};

    use test_support::{TempDir, skip};

    use super::*;
    use crate::{destination::Scratch, sys::residency};

    const ROOM: usize = 64 << 10;

    fn file(dir: &TempDir) -> Arc<File> {
        Arc::new(File::options().create_new(true).read(true).write(true).open(dir.join("x")).unwrap())
    }

    fn write(pages: &PageFile, first: u64, bytes: &[u8]) {
        pages.write(&mut [IoSlice::new(bytes)], first * 4096).unwrap();
    }

    /// Long runs go past the page cache and short ones through it, over each other in any order.
    #[test]
    fn the_last_write_of_a_page_counts_whichever_way_it_went() {
        for direct in [DirectWrites::Auto, DirectWrites::On, DirectWrites::Off] {
            let dir = TempDir::new().unwrap();
            let Ok(pages) = PageFile::kept(file(&dir), direct) else { continue };
            pages.reserve(1000 * 4096);
            let mut expected = vec![0; 1000 * 4096];
            let mut scratch = Scratch::default();
            for (value, (first, count)) in
                [(0, 300), (17, 1), (10, 40), (290, 2), (280, 20), (291, 1)].into_iter().enumerate()
            {
                let bytes = scratch.room(count * 4096);
                bytes.fill(value as u8 + 1);
                write(&pages, first as u64, bytes);
                expected[first * 4096..][..count * 4096].fill(value as u8 + 1);
                let mut found = vec![0; count * 4096];
                pages.file().read_exact_at(&mut found, first as u64 * 4096).unwrap();
                assert!(found == bytes, "read back at once");
            }
            pages.settle(true);
            pages.file().sync_all().unwrap();
            assert!(fs::read(dir.join("x")).unwrap() == expected, "{direct:?}");
        }
    }

    /// All of it was left to the end, where the guest is paused.
    #[test]
    fn never_much_that_was_written_is_not_on_disk() {
        for direct in [DirectWrites::Auto, DirectWrites::On, DirectWrites::Off] {
            let dir = TempDir::new().unwrap();
            let Ok(pages) = PageFile::kept(file(&dir), direct) else { continue };
            let unsynced = pages.unsynced.as_ref().unwrap();
            let mut scratch = Scratch::default();
            let bytes = scratch.room(1 << 20);
            bytes.fill(7);
            for at in 0..100 {
                write(&pages, at * 256, bytes);
                assert!(unsynced.bytes() < MOST_BATCH, "{direct:?}: {}", unsynced.bytes());
            }
            assert!(lock(&unsynced.state).synced > 68 << 20, "{direct:?}");
            pages.settle(true);
            assert!(unsynced.bytes() < FEW, "{direct:?}: {}", unsynced.bytes());
            for at in 0..4 {
                write(&pages, at * 256, bytes);
            }
            pages.settle(true);
            assert!(unsynced.bytes() < FEW);
            let before = lock(&unsynced.state).synced;
            // A few bytes are not worth it.
            pages.settle(true);
            assert_eq!(lock(&unsynced.state).synced, before);
        }
        let memory = PageFile::temporary(file(&TempDir::new().unwrap()));
        write(&memory, 0, &[0; 4096]);
        assert!(memory.unsynced.is_none(), "nothing has to be on disk");
    }

    /// A source that is not read from for half a minute takes that for a stall.
    #[test]
    fn a_slow_disk_gets_short_batches() {
        let (second, mib) = (Duration::from_secs(1), 1 << 20);
        assert_eq!(next_batch(4 * mib, 4 * mib, second), LEAST_BATCH);
        assert_eq!(next_batch(MOST_BATCH, 128 * mib, 64 * second), LEAST_BATCH);
        assert_eq!(next_batch(MOST_BATCH, 40 * mib, second), 10 * mib);
        assert_eq!(next_batch(4 * mib, 4 * mib, Duration::ZERO), 8 * mib);
        assert_eq!(next_batch(MOST_BATCH, MOST_BATCH, second / 100), MOST_BATCH);
    }

    /// Others go on while one waits for the disk, up to a bound, and then wait, too.
    #[test]
    fn channels_wait_for_a_disk_that_is_slower_than_they_are() {
        let dir = TempDir::new().unwrap();
        let pages = PageFile::kept(file(&dir), DirectWrites::Off).unwrap();
        let unsynced = pages.unsynced.as_ref().unwrap();
        let bytes = vec![3; 1 << 20];
        lock(&unsynced.state).is_under_way = true;
        let most = AHEAD * FEW;
        for at in 0..(most >> 20) - 1 {
            write(&pages, at * 256, &bytes);
        }
        assert_eq!(unsynced.bytes(), most - (1 << 20));
        thread::scope(|scope| {
            let last = scope.spawn(|| write(&pages, 0, &bytes));
            while unsynced.bytes() < most {
                thread::yield_now();
            }
            assert!(!last.is_finished(), "nothing is on disk yet");
            let mut state = lock(&unsynced.state);
            (state.is_under_way, state.synced) = (false, most);
            drop(state);
            unsynced.ended.notify_all();
        });
        assert_eq!(unsynced.bytes(), 0);
    }

    /// The kernel tells an error once, perhaps to a channel that had others wait.
    #[test]
    fn what_a_sync_ended_with_is_told_to_all_and_at_the_end() {
        let dir = TempDir::new().unwrap();
        let pages = PageFile::kept(file(&dir), DirectWrites::Off).unwrap();
        pages.check().unwrap();
        // Not a file that can be synced.
        let (reader, _writer) = std::io::pipe().unwrap();
        let unsynced = pages.unsynced.as_ref().unwrap();
        let refusal = unsynced.wrote(&File::from(std::os::fd::OwnedFd::from(reader)), FEW).unwrap_err();
        assert_eq!(refusal.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
        assert_eq!(pages.check().unwrap_err().raw_os_error(), refusal.raw_os_error());
        assert!(pages.write(&mut [IoSlice::new(&[1; 4096])], 0).is_err());
        pages.settle(true);
        assert!(pages.check().is_err());
    }

    #[test]
    fn what_is_on_disk_does_not_stay_in_the_page_cache() {
        let dir = TempDir::new().unwrap();
        let pages = PageFile::kept(file(&dir), DirectWrites::Auto).unwrap();
        let bytes = vec![3; 1 << 20];
        for at in 0..FEW >> 20 {
            write(&pages, at * 256, &bytes);
        }
        assert_eq!(pages.unsynced.as_ref().unwrap().bytes(), 0);
        if rustix::fs::fstatfs(pages.file()).unwrap().f_type == libc::TMPFS_MAGIC {
            return skip("this file system has all of a file in memory");
        }
        // The kernel may keep a page that somebody looks at.
        let cached = residency::cached(pages.file(), FEW as usize);
        assert!(cached < FEW as usize / 4096 / 8, "{cached} pages");
        // Negative control.
        let dir = TempDir::new().unwrap();
        let pages = PageFile::kept(file(&dir), DirectWrites::Off).unwrap();
        write(&pages, 0, &[3; 1 << 20]);
        pages.settle(true);
        assert!(residency::cached(pages.file(), 1 << 20) > 0);
    }

    #[test]
    fn bytes_that_no_direct_write_can_take_go_through_the_page_cache() {
        let dir = TempDir::new().unwrap();
        let pages = PageFile::kept(file(&dir), DirectWrites::On);
        let Ok(pages) = pages else { return skip("this file system takes no direct writes") };
        let mut scratch = Scratch::default();
        let bytes = scratch.room(ROOM + 8);
        bytes.fill(7);
        write(&pages, 0, &bytes[8..]);
        assert_eq!(fs::read(dir.join("x")).unwrap(), vec![7; ROOM]);
    }

    /// A file in memory may have no way past the page cache.
    #[test]
    fn where_a_file_system_refuses_only_a_requirement_is_an_error() {
        let memory = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let memory = Arc::new(File::from(memory));
        let mut scratch = Scratch::default();
        let pages = PageFile::kept(memory.clone(), DirectWrites::Auto).unwrap();
        write(&pages, 1, scratch.room(ROOM));
        let mut found = vec![1; ROOM];
        memory.read_exact_at(&mut found, 4096).unwrap();
        assert_eq!(found, vec![0; ROOM]);
        if let Err(error) = PageFile::kept(memory, DirectWrites::On) {
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            assert!(error.to_string().ends_with("expected direct writes auto or off"), "{error}");
        }
    }
}

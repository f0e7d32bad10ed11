//! The file that pages of a checkpoint go to, with a bound on what is left to be written to disk at its end.
//!
//! A file system keeps what was written in memory, and an fsync at the end has all of that to write while the guest is
//! paused. So long runs of pages go past the page cache (O_DIRECT), where the file system permits it. Of all others the disk is
//! given what has come whenever it is [`WINDOW`] bytes; a disk whose queue is full has the channels wait.
//!
//! A disk has a cache of its own, which an fsync has it write out, too: it took 1.4 to 3.3 s at the end of 2 GiB that all had been written
//! directly. So it is told to whenever [`FLUSH`] bytes have come that way, by the channel that brought the last of them; the others go on.
//!
//! Both ways may write the same page one after the other: the kernel writes cached pages to disk and forgets them before it
//! writes the same bytes directly.

use std::{
    fs::File,
    io::{self, IoSlice},
    os::fd::AsRawFd,
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
};

use crate::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        lock,
    },
    sys::writeback,
};

/// Whether pages are written past the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirectWrites {
    /// Where the file system permits it, else through the page cache.
    #[default]
    Auto,
    /// Always; an error where the file system refuses.
    On,
    /// Never.
    Off,
}

/// A file that all channels write pages to.
pub(crate) struct PageFile {
    file: Arc<File>,
    /// The same file, opened to be written past the page cache.
    direct: Option<File>,
    /// A refusal is an error.
    required: bool,
    /// The file system has refused a direct write, and is not asked again.
    refused: AtomicBool,
    /// Bytes written through the page cache; `None` where none of them has to be on disk at any time.
    cached: Option<AtomicU64>,
    /// Held by the one thread that hands over to the disk: it may have to wait, and then all others do.
    hands_over: Mutex<()>,
    /// Bytes written past the page cache.
    directly: AtomicU64,
    /// How many of them there were when the disk was last told to write out its cache.
    flushed: AtomicU64,
    /// A channel waits for the disk.
    is_flushing: AtomicBool,
}

impl PageFile {
    /// `file`, of which nothing has to be on disk at any time.
    pub(crate) fn temporary(file: Arc<File>) -> PageFile {
        PageFile {
            file,
            direct: None,
            required: false,
            refused: AtomicBool::new(false),
            cached: None,
            hands_over: Mutex::new(()),
            directly: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            is_flushing: AtomicBool::new(false),
        }
    }

    /// `file`, which is going to be put on disk.
    ///
    /// # Errors
    /// It is required to be written past the page cache, and cannot be.
    pub(crate) fn kept(file: Arc<File>, direct: DirectWrites) -> io::Result<PageFile> {
        let required = direct == DirectWrites::On;
        let opened = match direct {
            DirectWrites::Off => None,
            DirectWrites::Auto | DirectWrites::On => match open_direct(&file) {
                Ok(file) => Some(file),
                Err(error) if required => return Err(refusal(&error.into())),
                Err(error) => {
                    tracing::debug!(%error, "pages are written through the page cache");
                    None
                }
            },
        };
        let cached = Some(AtomicU64::new(0));
        Ok(PageFile { direct: opened, required, cached, ..PageFile::temporary(file) })
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

    /// Writes `parts`, whole pages, one after the other to `at`.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn write(&self, mut parts: &mut [IoSlice<'_>], mut at: u64) -> io::Result<()> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        if let Some(direct) = self.direct_for(bytes, parts) {
            match write_all(direct, &mut parts, &mut at) {
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                    if self.required {
                        return Err(refusal(&error));
                    }
                    if !self.refused.swap(true, Relaxed) {
                        tracing::debug!(%error, "pages are written through the page cache");
                    }
                }
                written => {
                    written?;
                    return self.wrote_directly(direct, bytes as u64);
                }
            }
        }
        let left: usize = parts.iter().map(|part| part.len()).sum();
        write_all(&self.file, &mut parts, &mut at)?;
        self.wrote(left as u64);
        Ok(())
    }

    /// Has the kernel begin to write to disk what is in the page cache.
    pub(crate) fn begin_writeback(&self) {
        if self.cached.as_ref().is_some_and(|cached| cached.load(Relaxed) > 0)
            && let Err(error) = writeback::begin(&self.file)
        {
            tracing::debug!(%error, "pages are written to disk at the end only");
        }
    }

    /// The file to write `parts` of `bytes` to past the page cache, if that is how to do it.
    fn direct_for(&self, bytes: usize, parts: &[IoSlice<'_>]) -> Option<&File> {
        // Below, each of many small writes would wait for the disk by itself.
        let pays = self.required || bytes >= LEAST;
        let aligned = || {
            parts
                .iter()
                .all(|part| part.as_ptr().addr().is_multiple_of(ALIGNMENT) && part.len().is_multiple_of(ALIGNMENT))
        };
        self.direct.as_ref().filter(|_| pays && !self.refused.load(Relaxed) && aligned())
    }

    /// `bytes` went to the page cache: hands over to the disk what is there, once in a while.
    fn wrote(&self, bytes: u64) {
        let Some(cached) = &self.cached else { return };
        let before = cached.fetch_add(bytes, Relaxed);
        if before / WINDOW == (before + bytes) / WINDOW {
            return;
        }
        let _one = lock(&self.hands_over);
        self.begin_writeback();
    }

    /// `bytes` went to the disk: has it write out its cache once in a while, if no other channel waits for that.
    fn wrote_directly(&self, direct: &File, bytes: u64) -> io::Result<()> {
        let written = self.directly.fetch_add(bytes, Relaxed) + bytes;
        if written - self.flushed.load(Relaxed).min(written) < FLUSH || self.is_flushing.swap(true, Relaxed) {
            return Ok(());
        }
        self.flushed.store(written, Relaxed);
        let flushed = rustix::fs::fdatasync(direct);
        self.is_flushing.store(false, Relaxed);
        // What is told now may not be told again at the end.
        Ok(flushed?)
    }

    /// Whether long runs are written past the page cache.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(crate) fn is_direct(&self) -> bool {
        self.direct.is_some() && !self.refused.load(Relaxed)
    }
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
/// The shortest run of pages that is written directly where that is not required.
const LEAST: usize = 64 << 10;
/// Bytes that go to the page cache before they are handed over to the disk. (To wait for those before as well, to have at most
/// so many on their way, took three times as long.)
const WINDOW: u64 = 64 << 20;
/// Bytes that are written directly before the disk is told to write out its cache. On a disk of 0.4 GB/s what is left at the end takes
/// 0.05 s then (64 MiB: 0.09, 256 MiB: 0.4, never: 1.4 to 3.3), and the speed is the same within its spread.
const FLUSH: u64 = 32 << 20;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{fs, os::unix::fs::FileExt};

    use test_support::{TempDir, skip};

    use super::*;
    use crate::destination::Scratch;

    fn file(dir: &TempDir) -> Arc<File> {
        Arc::new(File::options().create_new(true).read(true).write(true).open(dir.join("x")).unwrap())
    }

    fn write(pages: &PageFile, first: u64, bytes: &[u8]) {
        pages.write(&mut [IoSlice::new(bytes)], first * 4096).unwrap();
    }

    /// Long runs go past the page cache and short ones through it, over each other in any order.
    #[test]
    fn the_last_write_of_a_page_counts_whichever_way_it_went() {
        for direct in [DirectWrites::Auto, DirectWrites::Off] {
            let dir = TempDir::new().unwrap();
            let pages = PageFile::kept(file(&dir), direct).unwrap();
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
            pages.begin_writeback();
            pages.file().sync_all().unwrap();
            assert!(fs::read(dir.join("x")).unwrap() == expected, "{direct:?}");
        }
    }

    /// All of it was left to the end, where the guest is paused.
    #[test]
    fn the_cache_of_the_disk_never_has_much_that_was_written_directly() {
        let dir = TempDir::new().unwrap();
        let pages = PageFile::kept(file(&dir), DirectWrites::Auto).unwrap();
        let mut scratch = Scratch::default();
        let bytes = scratch.room(1 << 20);
        bytes.fill(7);
        let (mut flushes, mut last) = (0, 0);
        for at in 0..100 {
            write(&pages, at * 256, bytes);
            let (written, flushed) = (pages.directly.load(Relaxed), pages.flushed.load(Relaxed));
            if !pages.is_direct() {
                return skip("this file system takes no direct writes");
            }
            assert_eq!(written, (at + 1) << 20);
            assert!(written - flushed < FLUSH, "{flushed} of {written}");
            flushes += u32::from(flushed != last);
            last = flushed;
        }
        assert_eq!(flushes, 3);
        // While another channel waits for the disk, nobody does.
        pages.is_flushing.store(true, Relaxed);
        for at in 0..64 {
            write(&pages, at * 256, bytes);
        }
        assert_eq!(pages.flushed.load(Relaxed), last);
    }

    #[test]
    fn bytes_that_no_direct_write_can_take_go_through_the_page_cache() {
        let dir = TempDir::new().unwrap();
        let pages = PageFile::kept(file(&dir), DirectWrites::On);
        let Ok(pages) = pages else { return skip("this file system takes no direct writes") };
        let mut scratch = Scratch::default();
        let bytes = scratch.room(LEAST + 8);
        bytes.fill(7);
        write(&pages, 0, &bytes[8..]);
        assert!(pages.is_direct());
        assert_eq!(fs::read(dir.join("x")).unwrap(), vec![7; LEAST]);
    }

    /// A file in memory may have no way past the page cache.
    #[test]
    fn where_a_file_system_refuses_only_a_requirement_is_an_error() {
        let memory = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let memory = Arc::new(File::from(memory));
        let mut scratch = Scratch::default();
        let pages = PageFile::kept(memory.clone(), DirectWrites::Auto).unwrap();
        write(&pages, 1, scratch.room(LEAST));
        let mut found = vec![1; LEAST];
        memory.read_exact_at(&mut found, 4096).unwrap();
        assert_eq!(found, vec![0; LEAST]);
        if let Err(error) = PageFile::kept(memory, DirectWrites::On) {
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            assert!(error.to_string().ends_with("expected direct writes auto or off"), "{error}");
        }
    }

    #[test]
    fn what_is_cached_is_handed_over_once_in_a_window() {
        let dir = TempDir::new().unwrap();
        let pages = PageFile::kept(file(&dir), DirectWrites::Off).unwrap();
        let bytes = vec![3; 1 << 20];
        for mib in 0..2 * (WINDOW >> 20) + 1 {
            write(&pages, mib * 256, &bytes);
        }
        assert_eq!(pages.cached.unwrap().load(Relaxed), 2 * WINDOW + (1 << 20));
        let memory = PageFile::temporary(file(&TempDir::new().unwrap()));
        write(&memory, 0, &bytes);
        assert!(memory.cached.is_none(), "nothing has to be on disk");
    }
}

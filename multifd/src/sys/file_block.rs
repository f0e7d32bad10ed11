//! RAM blocks whose contents are in a file.
//!
//! The file is read, and not mapped: reading a mapping behind the end of a file that became shorter ends the process
//! (SIGBUS), and a library must not handle signals.
//!
//! What the page cache does not have is read past it, where the file system permits it: each byte is needed once, and a cold
//! file would drive out what others have there.

use std::{
    fmt,
    fs::File,
    io,
    os::fd::AsRawFd,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use rustix::fs::{CWD, Mode, OFlags};

use multifd_proto::BlockName;

use super::mapping::Mapping;
use crate::{
    checkpoint::CheckpointError,
    error::Error,
    ram::{Backing, RamBlock},
    sync::Arc,
};

/// The `len` bytes from `offset` on of `file`, which is called `path`.
pub(crate) fn file_block(name: BlockName, file: FilePart, len: usize) -> io::Result<RamBlock> {
    let memory = Arc::new(Mapping::anonymous(len)?);
    let base = memory.base();
    // SAFETY: the mapping is that long and lives as long as its owner, which the block keeps. No reference to it exists.
    let block = unsafe { RamBlock::from_raw(name, base, len, Box::new(memory.clone())) };
    let path = format!("/proc/self/fd/{}", file.file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let direct = rustix::fs::openat(CWD, path, flags, Mode::empty()).ok().map(File::from);
    let refused = AtomicBool::new(false);
    Ok(block.read_only().backed_by(Backing::File(FileMemory { memory, len, file, direct, refused })))
}

/// Where a block lies in a file.
pub(crate) struct FilePart {
    pub(crate) file: File,
    /// What it is called in errors.
    pub(crate) path: PathBuf,
    pub(crate) offset: u64,
}

/// The memory of a RAM block, and the part of a file that its contents are in until they are needed.
pub struct FileMemory {
    memory: Arc<Mapping>,
    len: usize,
    file: FilePart,
    /// The file, opened to be read past the page cache.
    direct: Option<File>,
    /// The file system has refused such a read, and is not asked again.
    refused: AtomicBool,
}

impl FileMemory {
    /// The address of the `len` bytes from `offset` on.
    ///
    /// # Panics
    /// If they do not lie in the memory.
    fn at(&self, offset: u64, len: usize) -> *mut libc::c_void {
        let offset = usize::try_from(offset).expect("an offset in memory");
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{len} bytes at {offset} of {}", self.len);
        self.memory.base().as_ptr().wrapping_add(offset).cast()
    }
}

impl FileMemory {
    /// Puts the `len` bytes from `offset` on into memory. No other thread reads or loads these bytes meanwhile.
    ///
    /// # Errors
    /// They cannot be had. What the memory holds then is undefined.
    pub(crate) fn load(&self, offset: u64, len: usize) -> Result<(), Error> {
        let FilePart { path, offset: begin, .. } = &self.file;
        let to = self.at(offset, len);
        let failed = |source| CheckpointError::Io { path: path.clone(), doing: "reading it", source };
        let mut done = 0;
        while done < len {
            let from = libc::off_t::try_from(begin + offset + done as u64);
            let from = from.map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
            match self.read_some(to.wrapping_byte_add(done), len - done, from) {
                Ok(0) => return Err(CheckpointError::Changed { path: path.clone() }.into()),
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error).into()),
            }
        }
        Ok(())
    }

    /// Reads at least one of the `len` bytes from `from` of the file on to `to`, which [`at`](Self::at) gave: from the page
    /// cache, past it, or through it. Returns how many; 0 at the end of the file.
    fn read_some(&self, to: *mut libc::c_void, len: usize, from: libc::off_t) -> io::Result<usize> {
        let aligned =
            to.addr().is_multiple_of(ALIGNMENT) && len.is_multiple_of(ALIGNMENT) && from % ALIGNMENT as i64 == 0;
        if let Some(direct) = self.direct.as_ref().filter(|_| aligned && !self.refused.load(Relaxed)) {
            let part = libc::iovec { iov_base: to, iov_len: len };
            // SAFETY: these bytes are mapped, as `at` checked; the kernel writes them, and no reference to them exists.
            let cached =
                unsafe { libc::preadv2(self.file.file.as_raw_fd(), &raw const part, 1, from, libc::RWF_NOWAIT) };
            if let Ok(n @ 1..) = usize::try_from(cached) {
                return Ok(n);
            }
            // SAFETY: as above.
            let read = unsafe { libc::pread(direct.as_raw_fd(), to, len, from) };
            match usize::try_from(read) {
                Ok(n) => return Ok(n),
                Err(_) if io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) => {
                    self.refused.store(true, Relaxed);
                }
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
        // SAFETY: as above.
        let read = unsafe { libc::pread(self.file.file.as_raw_fd(), to, len, from) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// The memory of these bytes is no longer needed.
    pub(crate) fn release(&self, offset: u64, len: usize) {
        // SAFETY: `at` checked that these bytes are mapped, privately and without a file: they are zeros afterwards. What
        // the kernel still sends of them without a copy has references to the pages.
        let _ = unsafe { libc::madvise(self.at(offset, len), len, libc::MADV_DONTNEED) };
    }
}

impl fmt::Debug for FileMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} from {:#x} on", self.file.path, self.file.offset)
    }
}

/// What addresses, places and lengths of reads past the page cache are multiples of, on any disk.
const ALIGNMENT: usize = 4096;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::io::Write;

    use test_support::TempDir;

    use super::*;

    const PAGE: usize = 4096;

    /// A mapping of the file would have ended the process here.
    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let dir = TempDir::new().unwrap();
        let path = dir.join("x");
        let mut file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        for page in 0..5u8 {
            file.write_all(&[page; PAGE]).unwrap();
        }
        let part = FilePart { file: file.try_clone().unwrap(), path, offset: PAGE as u64 };
        let block = file_block(BlockName::new("ram").unwrap(), part, 4 * PAGE).unwrap();
        let first = |page: usize| {
            let mut bytes = [0xff; PAGE];
            block.range((page * PAGE) as u64, PAGE).unwrap().read(&mut bytes);
            bytes
        };
        block.load(&[0, 4096, 3 * 4096], PAGE).unwrap();
        assert_eq!([0, 1, 2, 3].map(|page| first(page)[7]), [1, 2, 0, 4], "only what was asked for");
        block.release(0, 4096, PAGE);
        assert_eq!([0, 1, 2, 3].map(|page| first(page)[7]), [0, 0, 0, 4]);
        file.set_len(2 * PAGE as u64 + 100).unwrap();
        block.load(&[0], PAGE).unwrap();
        assert_eq!(first(0), [1; PAGE]);
        let error = block.load(&[4096], PAGE).unwrap_err().to_string();
        assert!(error.ends_with("/x\" was changed while it was read"), "{error}");
    }

    /// Whatever the page cache has of it: nothing, the middle, or all.
    #[test]
    fn a_file_is_read_whatever_part_of_it_is_cached() {
        let dir = TempDir::new().unwrap();
        let path = dir.join("x");
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        let content: Vec<u8> = (0..300u32).flat_map(|page| (page + 1).to_le_bytes().repeat(PAGE / 4)).collect();
        (&file).write_all(&content).unwrap();
        file.sync_all().unwrap();
        let part = FilePart { file: file.try_clone().unwrap(), path, offset: 0 };
        let block = file_block(BlockName::new("ram").unwrap(), part, 300 * PAGE).unwrap();
        let offsets: Vec<u64> = (0..300).map(|page| page * PAGE as u64).collect();
        for cached in [0..0, 100..150, 0..300] {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            let mut some = vec![0; cached.len() * PAGE];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut some, (cached.start * PAGE) as u64).unwrap();
            block.load(&offsets, PAGE).unwrap();
            let mut found = vec![0; 300 * PAGE];
            block.range(0, 300 * PAGE).unwrap().read(&mut found);
            assert!(found == content, "{cached:?}");
            block.release(0, 299 * PAGE as u64, PAGE);
        }
    }
}

//! Pages on their way into a checkpoint file, each to its place.
//!
//! The file is written with positional writes from a buffer of the channel's own, one for each run of neighbouring pages.
//! (Into a mapping of the file each page costs a fault and a block of its own, which took eight times as long; and a full
//! disk would be a signal.)

use std::{
    io::{self, IoSlice},
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
};

use multifd_proto::mapped_ram;
use rustix::fs::FallocateFlags;

use super::{CheckpointError, page_file::PageFile};
use crate::{
    destination::{PageBits, PageSink, Scratch},
    layout::Layout,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    transport::Stream,
};

/// The pages of a checkpoint that is being written.
pub(crate) struct FilePages {
    file: PageFile,
    /// What the file is called in errors.
    path: PathBuf,
    layout: Layout,
    /// Where the first page of each block lies.
    first: Vec<u64>,
    /// Pages with content; all others are zeros.
    valid: PageBits,
    /// Pages that had content at some time: the file has blocks for them.
    written: PageBits,
    /// By block: a page of it came, whatever it was.
    named: Vec<AtomicBool>,
}

impl FilePages {
    /// Takes the pages of `layout` into `file`, which is called `path`. The pages of each block begin at `first`.
    ///
    /// # Errors
    /// There is no room for bitmaps of all pages in memory.
    pub(crate) fn new(
        file: PageFile,
        path: PathBuf,
        layout: Layout,
        first: Vec<u64>,
    ) -> Result<FilePages, CheckpointError> {
        let bits = || {
            let failed =
                |source| CheckpointError::Io { path: path.clone(), doing: "keeping account of its pages", source };
            PageBits::try_new(&layout).map_err(failed)
        };
        let (valid, written) = (bits()?, bits()?);
        let named = layout.blocks().iter().map(|_| AtomicBool::new(false)).collect();
        Ok(FilePages { file, path, layout, first, valid, written, named })
    }

    /// Whether any page of `block` came. To be asked once all channels have come to the end of the last round.
    pub(crate) fn is_named(&self, block: usize) -> bool {
        self.named[block].load(Relaxed)
    }

    /// Pages of `block` came.
    fn name(&self, block: usize) {
        // Read first: channels would take the cache line from one another.
        if !self.is_named(block) {
            self.named[block].store(true, Relaxed);
        }
    }

    /// Number of pages with content.
    pub(crate) fn valid_pages(&self) -> u64 {
        self.valid.count()
    }

    /// Whether no page is known to be lost.
    ///
    /// # Errors
    /// As [`PageFile::check`].
    pub(crate) fn check(&self) -> io::Result<()> {
        self.file.check()
    }

    /// Gives back the blocks of pages that had content and are zeros by now.
    pub(crate) fn punch_holes(&self) {
        let stale = |page: u64| self.written.contains(page) && !self.valid.contains(page);
        for (block, first) in self.layout.blocks().iter().zip(&self.first) {
            let pages = block.page_range();
            let mut page = pages.start;
            while page < pages.end {
                // Most of what a peer claims was never written: 64 pages of it at once.
                if page.is_multiple_of(64) && self.written.word(page / 64) & !self.valid.word(page / 64) == 0 {
                    page += 64;
                    continue;
                }
                let begin = page;
                while page < pages.end && stale(page) {
                    page += 1;
                }
                if page > begin {
                    let (from, page_size) = (first + block.offset_of(begin), self.layout.page_size() as u64);
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    let punched = rustix::fs::fallocate(self.file.file(), flags, from, (page - begin) * page_size);
                    if let Err(error) = punched {
                        // The pages are not valid either way; they only take space.
                        tracing::debug!(%error, "no holes in checkpoints here");
                        return;
                    }
                } else {
                    page += 1;
                }
            }
        }
    }

    /// Writes the bitmap of `block` to `at`.
    pub(crate) fn write_bitmap(&self, block: usize, at: u64) -> io::Result<()> {
        let block = &self.layout.blocks()[block];
        let (first, words) = (block.first_page() / 64, block.pages().div_ceil(64));
        let mut bytes = Vec::with_capacity(BITMAP_PART as usize * 8);
        for begin in (0..words).step_by(BITMAP_PART as usize) {
            bytes.clear();
            for word in begin..words.min(begin + BITMAP_PART) {
                bytes.extend_from_slice(&self.valid.word(first + word).to_le_bytes());
            }
            // A hole, where no page of it has content: a peer that claims terabytes does not take space with their bitmap.
            // More is written behind it, so the file is long enough.
            if bytes.iter().any(|byte| *byte != 0) {
                self.file.file().write_all_at(&bytes, at + begin * 8).map_err(|error| self.error(error))?;
            }
        }
        debug_assert_eq!(words * 8, mapped_ram::bitmap_len(block.bytes(), self.layout.page_size() as u64));
        Ok(())
    }

    /// Puts `bytes`, one page for each of `offsets`, into place.
    fn write(&self, block: usize, offsets: &[u64], bytes: &[u8]) -> io::Result<()> {
        self.name(block);
        let page_size = self.layout.page_size();
        let content = |index: usize| &bytes[index * page_size..][..page_size];
        let pages = &self.layout.blocks()[block];
        let mut order: Vec<(u64, usize)> = Vec::with_capacity(offsets.len());
        for (index, &offset) in offsets.iter().enumerate() {
            if is_zero(content(index)) {
                // A source may send zeros as content; they are a hole all the same.
                self.valid.clear(pages.page_at(offset));
            } else {
                order.push((offset, index));
            }
        }
        // Sources list pages in no particular order.
        order.sort_unstable();
        let mut parts = Vec::new();
        for run in order.chunk_by(|a, b| a.0 + page_size as u64 == b.0) {
            parts.clear();
            for part in run.chunk_by(|a, b| a.1 + 1 == b.1) {
                let begin = part[0].1 * page_size;
                parts.push(IoSlice::new(&bytes[begin..begin + part.len() * page_size]));
            }
            let at = self.first[block] + run[0].0;
            self.file.write(&mut parts, at).map_err(|error| self.error(error))?;
            for &(offset, _) in run {
                let page = pages.page_at(offset);
                self.written.set(page);
                self.valid.set(page);
            }
        }
        Ok(())
    }

    /// `error` with the name of the file: it would be taken for one of the connection otherwise.
    fn error(&self, error: io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("writing {:?}: {error}", self.path))
    }
}

impl PageSink for FilePages {
    fn receive(&self, stream: &mut dyn Stream, block: usize, offsets: &[u64], scratch: &mut Scratch) -> io::Result<()> {
        let bytes = scratch.room(offsets.len() * self.layout.page_size());
        stream.read_exact(bytes)?;
        self.write(block, offsets, bytes)
    }

    fn store(&self, block: usize, offsets: &[u64], bytes: &[u8]) -> io::Result<()> {
        self.write(block, offsets, bytes)
    }

    fn zero(&self, block: usize, offsets: &[u64]) -> io::Result<()> {
        self.name(block);
        let block = &self.layout.blocks()[block];
        for &offset in offsets {
            self.valid.clear(block.page_at(offset));
        }
        Ok(())
    }

    fn discard(&self, block: usize, range: Range<u64>) -> io::Result<()> {
        let (block, page_size) = (&self.layout.blocks()[block], self.layout.page_size() as u64);
        let first = block.first_page() + range.start / page_size;
        self.valid.clear_range(first..first + (range.end - range.start) / page_size);
        Ok(())
    }

    fn load(&self, block: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if !self.valid.contains(self.layout.blocks()[block].page_at(offset)) {
            into.fill(0);
            return Ok(());
        }
        self.file
            .file()
            .read_exact_at(into, self.first[block] + offset)
            .map_err(|error| io::Error::new(error.kind(), format!("reading {:?}: {error}", self.path)))
    }

    /// What a round has left in memory goes to disk while the next one is under way, and not at the end.
    fn settle(&self, round_over: bool) {
        self.file.settle(round_over);
    }
}

/// Whether every byte is zero.
fn is_zero(page: &[u8]) -> bool {
    // In pieces that are compared at once; a page with content is left early.
    page.chunks(256).all(|part| part.iter().fold(0, |any, byte| any | byte) == 0)
}

/// Words of a bitmap written at once: 1 MiB.
const BITMAP_PART: u64 = 1 << 17;

//! Where received pages go.
//!
//! Blocks are named by their position in the source's list. Callers have checked every offset against the block's length
//! there; what is behind this trait maps it to memory or to a file.

use std::{io, ops::Range};

use super::{
    clean::CleanMemory,
    first_touch::{Filler, FirstTouch, FreshMemory},
};
use crate::{
    dirty_bitmap::word_masks,
    error::Mismatch,
    layout::Layout,
    ram::{GuestRange, Ram, RamBlock},
    stop::StopHandle,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    sys::zeroed::zeroed_atomics,
    transport::Stream,
};

/// Takes the pages of all channels and of main, from all their threads. Pages that are never named are zeros: they have to
/// be from the start.
///
/// Within a round, several threads may bring the same page, as from QEMU 7.2; either copy may then remain. Copies differ
/// only if the page comes once more in a later round: docs/migration/multifd.rst, What can go wrong between two rounds.
pub(crate) trait PageSink: Send + Sync {
    /// Takes the contents of the pages at `offsets` of `block` from `stream`, in that order.
    fn receive(&self, stream: &mut dyn Stream, block: usize, offsets: &[u64], scratch: &mut Scratch) -> io::Result<()>;

    /// Puts `bytes`, one page for each of `offsets`, into place.
    fn store(&self, block: usize, offsets: &[u64], bytes: &[u8]) -> io::Result<()>;

    /// Makes the pages at `offsets` zero.
    fn zero(&self, block: usize, offsets: &[u64]) -> io::Result<()>;

    /// Makes the pages in the bytes `range` of `block`, which are whole pages, zero. They come again.
    fn discard(&self, block: usize, range: Range<u64>) -> io::Result<()>;

    /// Copies the page at `offset` out.
    fn load(&self, block: usize, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// A sync point has passed; if `round_over`, it was the end of a whole round, or of the last page. Pages of a later one may
    /// come already.
    fn settle(&self, round_over: bool) {
        let _ = round_over;
    }

    /// How memory that was never touched got its content, by block, where there was a choice.
    fn fresh_memory(&self) -> Vec<FreshMemory> {
        Vec::new()
    }
}

/// Private memory of one thread, for pages on their way.
#[derive(Default)]
pub(crate) struct Scratch {
    bytes: Vec<u8>,
}

impl Scratch {
    /// Room for `len` bytes, at an address that direct writes to a disk can have. What it holds is of no meaning.
    pub(crate) fn room(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() < len + ALIGNMENT {
            self.bytes.resize(len + ALIGNMENT, 0);
        }
        let begin = self.bytes.as_ptr().addr().next_multiple_of(ALIGNMENT) - self.bytes.as_ptr().addr();
        &mut self.bytes[begin..begin + len]
    }
}

/// The memory of a VM in this process.
pub(crate) struct MemorySink {
    ram: Ram,
    /// Our position of each of the source's blocks.
    order: Vec<usize>,
    /// One bit for each page that costs memory, so that it may hold something else than zeros. Set only when its content is in
    /// place, so that two threads that bring the same page both fill it.
    touched: PageBits,
    /// How pages that are not touched are filled.
    filler: Filler,
}

impl MemorySink {
    /// Takes pages into the memory of `clean`, of which the blocks that are not fresh are made zero, if they are not yet.
    ///
    /// # Errors
    /// [`Mismatch::BlockWithoutMemory`]
    pub(crate) fn new(
        mut clean: CleanMemory,
        order: Vec<usize>,
        first_touch: FirstTouch,
        stop: &StopHandle,
    ) -> Result<MemorySink, Mismatch> {
        let ram = clean.ram().clone();
        // From here on pages are written: the next migration into this memory finds nothing fresh.
        let fresh: Vec<bool> = ram.blocks().iter().map(RamBlock::take_fresh).collect();
        clean.clean(stop, |index, block| !fresh[index] && !block.is_lent())?;
        let touched = PageBits::new(ram.layout());
        for (index, layout) in ram.layout().blocks().iter().enumerate() {
            // No page comes to memory that is handed over, and there may be much of it.
            if fresh[index] || ram.blocks()[index].is_lent() {
                continue;
            }
            layout.page_range().filter(|&page| !clean.is_absent(page)).for_each(|page| touched.set(page));
        }
        let filler = if fresh.contains(&true) || clean.has_absent() {
            Filler::new(first_touch, &ram)
        } else {
            // Nothing to gain for memory that was touched before.
            Filler::Direct
        };
        Ok(MemorySink { ram, order, touched, filler })
    }

    /// The page at `offset` of the source's block `block`, with its number.
    fn page(&self, block: usize, offset: u64) -> io::Result<(u64, GuestRange<'_>)> {
        let layout = self.ram.layout();
        let index = self.order[block];
        let block = &self.ram.blocks()[index];
        if block.is_lent() {
            // It may be written by no one but the source.
            let text = format!("a page of RAM block {:?}, whose memory is handed over", block.name());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let range = block.range(offset, layout.page_size()).ok_or(io::ErrorKind::InvalidInput)?;
        let page = layout.blocks()[index].page_at(offset);
        Ok((page, range))
    }

    /// The pages at `offsets` as runs that follow each other in memory and are alike in whether they were touched: the
    /// first page's number, the run, whether it is touched.
    fn runs(&self, block: usize, offsets: &[u64]) -> io::Result<Vec<(u64, GuestRange<'_>, bool)>> {
        let mut runs: Vec<(u64, GuestRange<'_>, bool)> = Vec::new();
        for &offset in offsets {
            let (page, range) = self.page(block, offset)?;
            let touched = self.touched.contains(page);
            match runs.last_mut() {
                Some((_, run, same)) if *same == touched && run.is_followed_by(&range) => {
                    *run = run.joined(&range).expect("it follows");
                }
                _ => runs.push((page, range, touched)),
            }
        }
        Ok(runs)
    }

    /// Reads `runs` from `stream` to where they belong.
    fn receive_into_place(&self, stream: &mut dyn Stream, runs: &[(u64, GuestRange<'_>, bool)]) -> io::Result<()> {
        for (_, run, touched) in runs {
            if !touched {
                self.filler.prepare(*run);
            }
        }
        let ranges: Vec<GuestRange<'_>> = runs.iter().map(|(_, run, _)| *run).collect();
        let outcome = stream.read_pages(&ranges);
        // Also on failure: any part of it may have been written.
        self.touch(runs);
        outcome
    }

    fn receive_pages(
        &self,
        stream: &mut dyn Stream,
        block: usize,
        offsets: &[u64],
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        let runs = self.runs(block, offsets)?;
        let len = offsets.len() * self.ram.layout().page_size();
        let copies = runs.iter().any(|(_, run, touched)| !touched && self.filler.copies(*run));
        let all_fresh = runs.iter().all(|(_, _, touched)| !touched);
        let trial = runs.first().filter(|_| all_fresh).and_then(|(_, run, _)| self.filler.trial(*run, copies));
        if copies {
            let bytes = scratch.room(len);
            stream.read_exact(bytes)?;
            self.place(&runs, bytes)?;
        } else {
            self.receive_into_place(stream, &runs)?;
        }
        if let Some(trial) = trial {
            trial.ends(len as u64);
        }
        Ok(())
    }

    fn touch(&self, runs: &[(u64, GuestRange<'_>, bool)]) {
        for (first, run, touched) in runs {
            if !touched {
                let pages = (run.len() / self.ram.layout().page_size()) as u64;
                (*first..first + pages).for_each(|page| self.touched.set(page));
            }
        }
    }

    /// Puts `bytes` into `runs`, in order.
    fn place(&self, runs: &[(u64, GuestRange<'_>, bool)], mut bytes: &[u8]) -> io::Result<()> {
        for (_, run, touched) in runs {
            let (now, later) = bytes.split_at(run.len());
            if *touched {
                run.write(now);
            } else {
                self.filler.fill(*run, now, self.ram.layout().page_size())?;
            }
            bytes = later;
        }
        self.touch(runs);
        Ok(())
    }
}

impl PageSink for MemorySink {
    fn receive(&self, stream: &mut dyn Stream, block: usize, offsets: &[u64], scratch: &mut Scratch) -> io::Result<()> {
        self.receive_pages(stream, block, offsets, scratch).map_err(with_cause)
    }

    fn store(&self, block: usize, offsets: &[u64], bytes: &[u8]) -> io::Result<()> {
        self.place(&self.runs(block, offsets)?, bytes).map_err(with_cause)
    }

    fn zero(&self, block: usize, offsets: &[u64]) -> io::Result<()> {
        for &offset in offsets {
            let (page, range) = self.page(block, offset)?;
            // Fresh memory is zeros already, and writing to it would make it cost a page.
            if self.touched.contains(page) {
                range.clear();
            }
        }
        Ok(())
    }

    fn discard(&self, block: usize, range: Range<u64>) -> io::Result<()> {
        for offset in range.step_by(self.ram.layout().page_size()) {
            self.zero(block, &[offset])?;
        }
        Ok(())
    }

    fn load(&self, block: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.page(block, offset)?.1.read(into);
        Ok(())
    }

    fn settle(&self, round_over: bool) {
        self.filler.settle(round_over);
    }

    fn fresh_memory(&self) -> Vec<FreshMemory> {
        self.filler.account()
    }
}

/// Says what the kernel means where it cannot write to guest memory.
fn with_cause(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EFAULT | libc::ENOMEM) => {
            let text = "a page of guest memory cannot be had: its huge pages are used up, or the host or a file system is full";
            io::Error::new(error.kind(), format!("{text} ({error})"))
        }
        _ => error,
    }
}

/// What a page of the kernel is, and at most a block of a disk.
const ALIGNMENT: usize = 4096;

/// A set of pages that all threads change.
pub(crate) struct PageBits {
    words: Vec<AtomicU64>,
}

impl PageBits {
    /// An empty set for the pages of `layout`, which are mapped in this process.
    pub(crate) fn new(layout: &Layout) -> PageBits {
        PageBits::try_new(layout).expect("there is room for a bitmap of memory for which there is room")
    }

    /// An empty set for the pages of `layout`, which may be a claim of a peer.
    ///
    /// # Errors
    /// There is no room for it.
    pub(crate) fn try_new(layout: &Layout) -> io::Result<PageBits> {
        let words = usize::try_from(layout.bits() / 64).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(PageBits { words: zeroed_atomics(words)? })
    }

    /// Rounds are ordered by the barrier, and within one the order of two copies of a page does not matter, so relaxed
    /// is enough.
    pub(crate) fn set(&self, page: u64) {
        let (word, bit) = (&self.words[(page / 64) as usize], 1 << (page % 64));
        // Most pages come more than once; a load does not take the line from other threads.
        if word.load(Relaxed) & bit == 0 {
            word.fetch_or(bit, Relaxed);
        }
    }

    pub(crate) fn contains(&self, page: u64) -> bool {
        self.words[(page / 64) as usize].load(Relaxed) >> (page % 64) & 1 == 1
    }

    /// Takes `page` out of the set.
    pub(crate) fn clear(&self, page: u64) {
        let (word, bit) = (&self.words[(page / 64) as usize], 1 << (page % 64));
        if word.load(Relaxed) & bit != 0 {
            word.fetch_and(!bit, Relaxed);
        }
    }

    /// Takes all of `pages` out of the set.
    pub(crate) fn clear_range(&self, pages: Range<u64>) {
        for (word, mask) in word_masks(pages) {
            let word = &self.words[word];
            if word.load(Relaxed) & mask != 0 {
                word.fetch_and(!mask, Relaxed);
            }
        }
    }

    /// The pages `index * 64 + i` for each bit `i`.
    pub(crate) fn word(&self, index: u64) -> u64 {
        self.words[index as usize].load(Relaxed)
    }

    /// Number of pages in the set.
    pub(crate) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Relaxed).count_ones())).sum()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{
        fs::File,
        io::Write,
        os::{fd::OwnedFd, unix::net::UnixStream},
    };

    use super::*;
    use crate::{
        ram::{Backing, BlockName},
        transport::socket::SocketStream,
    };

    /// A file that is too short, as the file system that it is in may be full.
    #[test]
    fn a_page_that_cannot_be_had_is_an_error_and_says_so() {
        let block = RamBlock::memory_file(BlockName::new("ram").unwrap(), 8 * 4096).unwrap();
        let Backing::MemoryFile(memory) = block.backing() else { panic!("it was made so") };
        File::from(memory.descriptor().try_clone_to_owned().unwrap()).set_len(4 * 4096).unwrap();
        let ram = Ram::new(4096, vec![block]).unwrap();
        let clean = CleanMemory::new(&ram);
        let sink = MemorySink::new(clean, vec![0], FirstTouch::Direct, &StopHandle::new()).unwrap();
        sink.store(0, &[0, 3 * 4096], &[7; 8192]).unwrap();
        let stored = sink.store(0, &[5 * 4096], &[7; 4096]).unwrap_err();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[7; 4096]).unwrap();
        let mut stream = SocketStream::new(OwnedFd::from(ours)).unwrap();
        let received = sink.receive(&mut stream, 0, &[6 * 4096], &mut Scratch::default()).unwrap_err();
        for error in [stored, received] {
            assert!(error.to_string().contains("a page of guest memory cannot be had"), "{error}");
        }
    }
}

//! A dirty bitmap that devices mark from any thread while it is drained.
//!
//! **Write first, mark afterwards.** [`mark`](AtomicDirtyBitmap::mark) is called after the last byte was written and
//! before anybody is told that the request is done. That order is all that the tracking law needs:
//!
//! - `mark` sets its bits with *Release*, `drain` takes words out with *Acquire*. If a drain takes the mark, it also
//!   sees the bytes written before, so the page that is read after it holds them.
//! - If it does not take the mark, the bit is set in the word afterwards and a later drain takes it. The word has a
//!   single modification order, so there is no third case. Marks of other pages in the same word do not break the
//!   chain: each is a read-modify-write, which continues the release sequence.
//!
//! The reverse order loses writes: a drain between mark and write takes the mark, the page is read before the write,
//! and nobody reports it again. So does leaving out the mark when the bit is seen set already: the load may be
//! satisfied before the store to the page is visible, and the drain in between takes the bit of an older write. Both
//! variants are kept as tests that the model checker refutes. A device that writes a page over a long time marks at the
//! end; what it wrote half is not needed before the request is done, and after that the mark is there.

use std::io;

use crate::{
    dirty::DirtyLog,
    dirty_bitmap::{DirtyBitmap, word_masks},
    layout::Layout,
    ram::Ram,
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

/// Pages written by devices or by other host code, marked by those who write. All clones are the same bitmap.
///
/// Hand one clone to each device and keep one as the [`DirtyLog`]; drain through one of them only, since what a drain
/// reports it takes out for all. Marking costs one atomic instruction for up to 64 pages, so devices mark always,
/// whether somebody tracks or not.
#[derive(Clone, Debug)]
pub struct AtomicDirtyBitmap {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    layout: Layout,
    words: Box<[AtomicU64]>,
}

impl AtomicDirtyBitmap {
    /// A bitmap without marks for the pages of `layout`.
    pub fn new(layout: &Layout) -> AtomicDirtyBitmap {
        let words = (0..layout.bits() / 64).map(|_| AtomicU64::new(0)).collect();
        AtomicDirtyBitmap { inner: Arc::new(Inner { layout: layout.clone(), words }) }
    }

    /// Marks the pages that the `len` bytes from `offset` on in block `block` (its position in the layout) lie in.
    ///
    /// Call this after the bytes are written and before their reader is told.
    ///
    /// # Panics
    /// If the bytes do not lie within the block.
    pub fn mark(&self, block: usize, offset: u64, len: u64) {
        let block = &self.inner.layout.blocks()[block];
        let end = offset.checked_add(len).filter(|&end| end <= block.bytes());
        let end = end.unwrap_or_else(|| panic!("{len:#x} bytes at {offset:#x} lie outside {:?}", block.name()));
        if len == 0 {
            return;
        }
        for (word, bits) in word_masks(block.page_at(offset)..block.page_at(end - 1) + 1) {
            // Release pairs with the Acquire in `drain`. Always a read-modify-write, see the module's text.
            self.inner.words[word].fetch_or(bits, Release);
        }
    }

    /// Marks page number `page` of the layout; the same rules.
    ///
    /// # Panics
    /// If there is no such page number.
    pub fn mark_page(&self, page: u64) {
        self.inner.words[usize::try_from(page / 64).expect("a word of mapped memory's bitmap")]
            .fetch_or(1 << (page % 64), Release);
    }

    fn take(&self, mut each: impl FnMut(usize, u64)) {
        for (index, word) in self.inner.words.iter().enumerate() {
            // Relaxed: a mark that this load misses is one that this drain does not take; a later one does.
            if word.load(Relaxed) != 0 {
                each(index, word.swap(0, Acquire));
            }
        }
    }
}

impl DirtyLog for AtomicDirtyBitmap {
    fn name(&self) -> &'static str {
        "bitmap"
    }

    /// Forgets the marks of earlier writes.
    fn start(&mut self, ram: &Ram) -> io::Result<()> {
        if *ram.layout() != self.inner.layout {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the bitmap was made for other RAM blocks"));
        }
        self.take(|_, _| {});
        Ok(())
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        self.take(|word, bits| into.merge_word(word, bits));
        Ok(())
    }

    fn peek(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        for (index, word) in self.inner.words.iter().enumerate() {
            // Relaxed: nothing is read because of it.
            into.merge_word(index, word.load(Relaxed));
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::dirty::conformance::{Effort, Subject, Writer, conformance};

    struct Marked {
        ram: Ram,
        bitmap: AtomicDirtyBitmap,
    }

    struct MarkingWriter {
        ram: Ram,
        bitmap: AtomicDirtyBitmap,
    }

    impl Writer for MarkingWriter {
        fn write(&mut self, page: u64, value: u64) {
            self.ram.page(page).unwrap().slice(0, 8).unwrap().write(&value.to_ne_bytes());
            let block = self.ram.layout().block_of(page).unwrap();
            self.bitmap.mark(block, self.ram.layout().blocks()[block].offset_of(page) + 8, 1);
        }
    }

    impl Subject for Marked {
        fn ram(&self) -> &Ram {
            &self.ram
        }

        fn log(&mut self) -> &mut dyn DirtyLog {
            &mut self.bitmap
        }

        fn writer(&mut self) -> Box<dyn Writer> {
            Box::new(MarkingWriter { ram: self.ram.clone(), bitmap: self.bitmap.clone() })
        }
    }

    #[test]
    fn passes_the_conformance_suite() {
        for page_size in [4096, 1024] {
            let ram = Ram::for_test_with_pages(page_size, &[("a", 200), ("b", 1), ("c", 65)]);
            let bitmap = AtomicDirtyBitmap::new(ram.layout());
            let report = conformance(&mut Marked { ram, bitmap }, Effort::FULL).unwrap();
            assert_eq!(report.quiet_reported, report.quiet_written);
            assert_eq!(report.clean_reported, 0);
        }
    }

    #[test]
    fn a_mark_covers_each_page_it_touches() {
        let ram = Ram::for_test(&[("a", 3), ("b", 130)]);
        let mut bitmap = AtomicDirtyBitmap::new(ram.layout());
        let mut dirty = DirtyBitmap::new(ram.layout());
        bitmap.mark(1, 4095, 2);
        bitmap.mark(0, 2 * 4096, 0);
        bitmap.mark(1, 63 * 4096, 66 * 4096);
        bitmap.drain(&mut dirty).unwrap();
        assert!(dirty.iter().eq([64, 65].into_iter().chain(127..193)));
    }

    #[test]
    #[should_panic(expected = "lie outside")]
    fn a_mark_past_the_end_of_the_block_is_refused() {
        let ram = Ram::for_test(&[("a", 3)]);
        AtomicDirtyBitmap::new(ram.layout()).mark(0, 3 * 4096 - 1, 2);
    }

    #[test]
    fn other_ram_blocks_are_refused() {
        let mut bitmap = AtomicDirtyBitmap::new(Ram::for_test(&[("a", 3)]).layout());
        assert!(bitmap.start(&Ram::for_test(&[("a", 4)])).is_err());
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p multifd --lib --release dirty::bitmap`
#[cfg(all(test, loom))]
mod model {
    use loom::thread;
    use multifd_proto::BlockName;

    use super::*;

    fn one_word() -> AtomicDirtyBitmap {
        AtomicDirtyBitmap::new(&Layout::new(4096, [(BlockName::new("a").unwrap(), 3 * 4096)]).unwrap())
    }

    /// Writer `n` writes page `n` `writes[n]` times, and a reader drains while they run; `write(bitmap, page, cell,
    /// value)` is the order under test. Afterwards, with one more drain, the reader's copies must equal the pages.
    fn check<const N: usize>(writes: [u64; N], write: fn(&AtomicDirtyBitmap, u64, &AtomicU64, u64)) {
        loom::model(move || {
            let bitmap = one_word();
            let pages = Arc::new(writes.map(|_| AtomicU64::new(0)));
            let writers = std::array::from_fn::<_, N, _>(|page| {
                let (bitmap, pages) = (bitmap.clone(), Arc::clone(&pages));
                thread::spawn(move || {
                    for value in 1..=writes[page] {
                        write(&bitmap, page as u64, &pages[page], value);
                    }
                })
            });
            let round = {
                let (bitmap, pages) = (bitmap.clone(), Arc::clone(&pages));
                move |mut copies: [u64; N]| {
                    let mut dirty = DirtyBitmap::new(&bitmap.inner.layout);
                    bitmap.clone().drain(&mut dirty).unwrap();
                    for page in dirty.iter() {
                        copies[page as usize] = pages[page as usize].load(Relaxed);
                    }
                    copies
                }
            };
            // In a thread of its own: the model checker takes what the parent of a thread does for seen by that thread.
            let reader = thread::spawn({
                let round = round.clone();
                move || round([0; N])
            });
            for writer in writers {
                writer.join().unwrap();
            }
            let copies = round(reader.join().unwrap());
            assert_eq!(copies, writes, "a write was missed");
        });
    }

    #[test]
    fn write_then_mark_loses_nothing() {
        check([2], write_then_mark);
    }

    /// The marks of another page in the same word come between a mark and the drain that takes it.
    #[test]
    fn marks_of_two_writers_in_one_word_lose_nothing() {
        check([1, 1], write_then_mark);
    }

    fn write_then_mark(bitmap: &AtomicDirtyBitmap, page: u64, cell: &AtomicU64, value: u64) {
        cell.store(value, Relaxed);
        bitmap.mark(0, page * 4096, 8);
    }

    /// Negative control: what happens to a device that marks first.
    #[test]
    #[should_panic(expected = "a write was missed")]
    fn mark_then_write_loses_writes() {
        check([2], |bitmap, page, cell, value| {
            bitmap.mark(0, page * 4096, 8);
            cell.store(value, Relaxed);
        });
    }

    /// Negative control: the tempting shortcut for pages that are marked already.
    #[test]
    #[should_panic(expected = "a write was missed")]
    fn not_marking_a_marked_page_again_loses_writes() {
        check([2], |bitmap, page, cell, value| {
            cell.store(value, Relaxed);
            if bitmap.inner.words[0].load(Relaxed) >> page & 1 == 0 {
                bitmap.mark(0, page * 4096, 8);
            }
        });
    }

    /// Negative control: marks that do not publish the page.
    #[test]
    #[should_panic(expected = "a write was missed")]
    fn a_relaxed_mark_loses_writes() {
        check([2], |bitmap, page, cell, value| {
            cell.store(value, Relaxed);
            bitmap.inner.words[0].fetch_or(1 << page, Relaxed);
        });
    }
}

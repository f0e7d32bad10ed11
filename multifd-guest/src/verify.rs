//! Digests of every page, taken while the guest is paused: the source sends them, the destination compares.
//!
//! The guest's own check covers its working set, pass by pass; this covers every page of every block at one moment, also
//! those that are not written. Pages that were never touched are not read on either side, so a sparse guest stays sparse.

use std::{
    io::Read,
    time::{Duration, Instant},
};

use multifd::{dirty_bitmap::DirtyBitmap, layout::Layout, ram::Ram};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    body::{Body, BodyError, BodyWriter},
    pattern::{DIFFERENCES_KEPT, PAGE_SIZE},
};

/// The result of the comparison, on the destination.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// How many pages were compared: all of all blocks.
    pub pages_compared: u64,
    /// How many of them differ.
    pub pages_different: u64,
    /// The first of those by block and page within it, at most [`DIFFERENCES_KEPT`].
    pub differences: Vec<(String, u64)>,
    /// How long the source took for its digests, during which the guest was paused.
    pub source_time: Duration,
    /// How long the comparison took here, during which the guest was paused.
    pub destination_time: Duration,
}

/// Digests every page of `ram` that is not in `untouched`, as the body of a section.
pub fn to_body(ram: &Ram, untouched: &DirtyBitmap) -> Vec<u8> {
    let begin = Instant::now();
    let layout = ram.layout();
    let mut digests = Vec::new();
    let mut touched = vec![0u8; bitmap_bytes(layout)];
    for page in pages(layout).filter(|&page| !untouched.contains(page)) {
        touched[page as usize / 8] |= 1 << (page % 8);
        digests.extend(digest(ram, page).to_be_bytes());
    }
    let time = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
    BodyWriter::new(FORMAT).field(TOUCHED, &touched).field(DIGESTS, &digests).number(TIME, time).finish()
}

/// Reads such a body and compares it with `ram`, of which the pages in `untouched` are known to be zero.
///
/// # Errors
/// The body is not one for this memory.
pub fn compare(ram: &Ram, untouched: &DirtyBitmap, input: &mut dyn Read) -> Result<VerifyReport, BodyError> {
    let layout = ram.layout();
    let limit = bitmap_bytes(layout) + layout.pages() as usize * 8 + OVERHEAD;
    let mut body = Body::read(input, FORMAT, limit)?;
    let begin = Instant::now();
    let touched = body.take(TOUCHED)?;
    if touched.len() != bitmap_bytes(layout) {
        return Err(BodyError::Length { tag: TOUCHED, found: touched.len() });
    }
    let digests = body.take(DIGESTS)?;
    let mut theirs = digests.chunks_exact(8).map(|chunk| u64::from_be_bytes(chunk.try_into().expect("chunks of 8")));
    let mut report =
        VerifyReport { source_time: Duration::from_nanos(body.take_number(TIME)?), ..VerifyReport::default() };
    body.finish()?;
    let zero = xxh3_64(&[0; PAGE_SIZE]);
    for page in pages(layout) {
        let theirs = match touched[page as usize / 8] >> (page % 8) & 1 {
            0 => zero,
            _ => theirs.next().ok_or(BodyError::Length { tag: DIGESTS, found: digests.len() })?,
        };
        let ours = if untouched.contains(page) { zero } else { digest(ram, page) };
        report.pages_compared += 1;
        if ours != theirs {
            report.pages_different += 1;
            if report.differences.len() < DIFFERENCES_KEPT {
                let block = &layout.blocks()[layout.block_of(page).expect("`pages` yields pages of blocks")];
                report.differences.push((block.name().as_str().to_owned(), page - block.first_page()));
            }
        }
    }
    if theirs.next().is_some() || !digests.len().is_multiple_of(8) {
        return Err(BodyError::Length { tag: DIGESTS, found: digests.len() });
    }
    report.destination_time = begin.elapsed();
    Ok(report)
}

fn digest(ram: &Ram, page: u64) -> u64 {
    let mut bytes = [0; PAGE_SIZE];
    ram.page(page).expect("a page of the layout").read(&mut bytes);
    xxh3_64(&bytes)
}

fn pages(layout: &Layout) -> impl Iterator<Item = u64> + '_ {
    layout.blocks().iter().flat_map(|block| block.page_range())
}

fn bitmap_bytes(layout: &Layout) -> usize {
    usize::try_from(layout.bits() / 8).expect("a bitmap of mapped memory fits memory")
}

/// Name and version of the section.
pub(crate) const SECTION: &str = "multifd-guest/verify";
pub(crate) const VERSION: u32 = 1;
const FORMAT: u16 = 1;
const TOUCHED: u16 = 1;
const DIGESTS: u16 = 2;
const TIME: u16 = 3;
/// What is around the two long fields.
const OVERHEAD: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{self, Backing};

    fn ram() -> Ram {
        memory::allocate(100 * PAGE_SIZE as u64, Backing::Anonymous).unwrap().ram
    }

    fn untouched(ram: &Ram, pages: impl IntoIterator<Item = u64>) -> DirtyBitmap {
        let mut bitmap = DirtyBitmap::new(ram.layout());
        pages.into_iter().for_each(|page| bitmap.set(page));
        bitmap
    }

    #[test]
    fn only_the_page_that_differs_is_reported() {
        let (source, destination) = (ram(), ram());
        for page in 0..50 {
            let bytes = [page as u8 + 1; PAGE_SIZE];
            source.page(page).unwrap().write(&bytes);
            destination.page(page).unwrap().write(&bytes);
        }
        let body = to_body(&source, &untouched(&source, 50..100));
        let report = compare(&destination, &untouched(&destination, 60..100), &mut &body[..]).unwrap();
        assert_eq!((report.pages_compared, report.pages_different), (100 + 512, 0));

        // A page of each kind: with content, touched and zero, untouched on the source, and one of the other block.
        for (page, block, index) in [(7, "ram", 7), (55, "ram", 55), (70, "ram", 70), (128 + 3, "control", 3)] {
            let range = destination.page(page).unwrap();
            let mut before = [0; PAGE_SIZE];
            range.read(&mut before);
            range.slice(4088, 8).unwrap().write(&[0xff; 8]);
            let report = compare(&destination, &untouched(&destination, 80..100), &mut &body[..]).unwrap();
            assert_eq!(report.pages_different, 1);
            assert_eq!(report.differences, [(block.to_owned(), index)]);
            range.write(&before);
        }
    }

    proptest! {
        #[test]
        fn a_hostile_body_is_an_error(noise: Vec<u8>, cut in 0usize..2000, at in 0usize..2000, bit in 0u8..8) {
            let ram = ram();
            let none = untouched(&ram, []);
            prop_assert!(compare(&ram, &none, &mut &noise[..]).is_err());
            let mut body = to_body(&ram, &none);
            let whole = body.len();
            prop_assert!(compare(&ram, &none, &mut &body[..cut.min(whole - 1)]).is_err());
            body[at % whole] ^= 1 << bit;
            if let Ok(report) = compare(&ram, &none, &mut &body[..]) {
                prop_assert_eq!(report.pages_compared, 612);
            }
        }
    }
}

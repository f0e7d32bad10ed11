//! What every byte of a guest's memory is at any moment, as a formula: the proof that nothing was lost.
//!
//! The first pages of RAM are the working set. In pass `n` the guest writes page `p` with words computed from
//! `(n, p, seed)`, so at any pause the pages below its cursor hold pass `n` and the others pass `n - 1`, and every page
//! of the guest can be compared exactly. The formula can be solved for `n`, so a stale page also tells which pass it
//! is from.
//!
//! ```text
//! word k of page p in pass n:    seed + n * PASS_STEP + p * PAGE_STEP + k * WORD_STEP     (mod 2^64)
//! page p of pass n is all zeros: where the low bits of n + p are all ones ([`Pattern::zero_mask`])
//! ```
//!
//! The zero pages move by one page with every pass, so pages become zero after they had content and the other way
//! round. Pages outside of the working set keep what they were filled with, or were never touched.

use std::{fmt, ops::Range};

use multifd::{dirty_bitmap::DirtyBitmap, ram::Ram};

/// The formula with its parameters: the same on both sides of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// Makes two guests different.
    pub seed: u64,
    /// Pages of RAM.
    pub pages: u64,
    /// The first so many of them are the working set; `2 <= working_set <= pages`.
    pub working_set: u64,
    /// How much of a page the guest writes.
    pub writes: Writes,
    /// Of the pages outside of the working set, how many hold random-like bytes; the others were never touched.
    pub filled_percent: u8,
    /// In pass `n`, page `p` is zero where `(n + p) & zero_mask == zero_mask`. All ones: never.
    pub zero_mask: u64,
}

/// How much of each page the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// Eight words, the first and the last 8 bytes of the page among them: the most pages per second.
    Marks,
    /// Every byte: the most bytes per second.
    WholePages,
}

impl Writes {
    /// How many words of a page are written.
    pub fn words(self) -> u64 {
        match self {
            Writes::Marks => 8,
            Writes::WholePages => WORDS_PER_PAGE as u64,
        }
    }

    /// Bytes from one written word to the next.
    pub fn stride(self) -> u64 {
        match self {
            // 7 * 73 = 511: the last of eight words is the last of the page.
            Writes::Marks => 73 * 8,
            Writes::WholePages => 8,
        }
    }
}

impl Pattern {
    /// The bytes of `page` in pass `pass`; of a page outside of the working set, the ones it always has.
    pub fn fill(&self, page: u64, pass: u64, into: &mut PageWords) {
        match self.initial(page) {
            Initial::Untouched => into.fill(0),
            Initial::Filled => arithmetic(self.base(FILL_PASS, page), WORD_STEP, into.iter_mut()),
            Initial::WorkingSet => {
                if self.writes == Writes::Marks {
                    arithmetic(self.base(FILL_PASS, page), WORD_STEP, into.iter_mut());
                }
                let step = self.writes.stride() as usize / 8;
                let (first, word_step) = self.marks(page, pass);
                arithmetic(first, word_step, into.iter_mut().step_by(step));
            }
        }
    }

    /// The first word that is written to `page` in `pass`, and what is added from word to word.
    pub fn marks(&self, page: u64, pass: u64) -> (u64, u64) {
        if page.wrapping_add(pass) & self.zero_mask == self.zero_mask {
            (0, 0)
        } else {
            (self.base(pass, page), WORD_STEP)
        }
    }

    /// The formula for the first word, zero pages left aside.
    pub fn base(&self, pass: u64, page: u64) -> u64 {
        let pass = pass.wrapping_mul(PASS_STEP);
        self.seed.wrapping_add(pass).wrapping_add(page.wrapping_mul(PAGE_STEP))
    }

    /// The share of worker `index` of `workers` in the working set.
    pub fn share(&self, index: u64, workers: u64) -> Range<u64> {
        let begin = |index: u64| (u128::from(self.working_set) * u128::from(index) / u128::from(workers)) as u64;
        begin(index)..begin(index + 1)
    }

    /// What is in `page` before pass 1.
    pub fn initial(&self, page: u64) -> Initial {
        if page < self.working_set {
            return Initial::WorkingSet;
        }
        // Runs of 64 pages, so that touched and untouched memory alternate without being a chequerboard.
        let run = (page / 64).wrapping_mul(PAGE_STEP) >> 32;
        if run % 100 < u64::from(self.filled_percent) { Initial::Filled } else { Initial::Untouched }
    }

    /// Writes into `ram` what is there before pass 1. Memory that stays untouched is not touched.
    pub fn fill_all(&self, ram: &Ram) {
        let mut words = [0; WORDS_PER_PAGE];
        let mut bytes = [0; PAGE_SIZE];
        for page in 0..self.pages {
            if self.initial(page) != Initial::Untouched {
                self.fill(page, 0, &mut words);
                to_bytes(&words, &mut bytes);
                ram_page(ram, page).write(&bytes);
            }
        }
    }

    /// Compares every page of `ram` with what it has to be while the workers stand still at `positions`.
    ///
    /// Pages in `untouched` (by number in the layout of `ram`) are known to be zero without being read.
    pub fn check(&self, ram: &Ram, positions: &[Position], untouched: &DirtyBitmap) -> CheckReport {
        let mut report = CheckReport::default();
        let mut bytes = [0; PAGE_SIZE];
        let mut expected = [0; WORDS_PER_PAGE];
        for page in 0..self.pages {
            let expectation = self.expectation(page, positions);
            self.fill_expected(page, expectation, &mut expected);
            // RAM is the first block, so its page numbers are those of the layout.
            if untouched.contains(page) {
                bytes.fill(0);
            } else {
                ram_page(ram, page).read(&mut bytes);
            }
            let found = from_bytes(&bytes);
            report.pages_compared += 1;
            if found != expected {
                report.add(Difference { page, expected: expectation, found: self.found(page, &found, &expected) });
            }
        }
        report
    }

    fn expectation(&self, page: u64, positions: &[Position]) -> Expected {
        match self.initial(page) {
            Initial::Untouched => return Expected::Untouched,
            Initial::Filled => return Expected::Filled,
            Initial::WorkingSet => {}
        }
        let workers = positions.len() as u64;
        for (index, position) in (0..).zip(positions) {
            let share = self.share(index, workers);
            if share.contains(&page) {
                return position.expects(page - share.start, share.end - share.start);
            }
        }
        unreachable!("the shares of the workers cover the working set")
    }

    fn fill_expected(&self, page: u64, expected: Expected, into: &mut PageWords) {
        match expected {
            Expected::Untouched | Expected::Filled => self.fill(page, 0, into),
            Expected::Pass(pass) => self.fill(page, pass, into),
            Expected::Between { pass, words } => {
                self.fill(page, pass - 1, into);
                let (first, word_step) = self.marks(page, pass);
                let step = self.writes.stride() as usize / 8;
                arithmetic(first, word_step, into.iter_mut().step_by(step).take(words as usize));
            }
        }
    }

    /// Names the content of a page that is not what it should be.
    fn found(&self, page: u64, found: &PageWords, expected: &PageWords) -> Found {
        if found.iter().all(|&word| word == 0) {
            return Found::Zero;
        }
        let mut candidate = [0; WORDS_PER_PAGE];
        let pass = found[0].wrapping_sub(self.base(0, page)).wrapping_mul(PASS_STEP_INVERSE);
        if page < self.working_set && pass < PASS_LIMIT {
            self.fill(page, pass, &mut candidate);
            if candidate == *found {
                return Found::Pass(pass);
            }
        }
        let other = found[0].wrapping_sub(self.base(FILL_PASS, 0)).wrapping_mul(PAGE_STEP_INVERSE);
        if other < self.pages && self.initial(other) == Initial::Filled {
            self.fill(other, 0, &mut candidate);
            if candidate == *found {
                return Found::FillOf(other);
            }
        }
        let word = found.iter().zip(expected).position(|(found, expected)| found != expected).unwrap_or(0);
        Found::Other { offset: word * 8, value: found[word] }
    }
}

/// Where a worker stands in its share of the working set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Pages it finished since the guest was created, over all passes.
    pub pages_done: u64,
    /// Words it has already written into the next page.
    pub words_done: u64,
}

impl Position {
    /// The pass that it is in, counted from 1, if its share has `pages` pages.
    pub fn pass(self, pages: u64) -> u64 {
        self.pages_done / pages + 1
    }

    /// What page `page` of a share of `pages` pages holds now.
    fn expects(self, page: u64, pages: u64) -> Expected {
        let (pass, cursor) = (self.pass(pages), self.pages_done % pages);
        if page < cursor {
            Expected::Pass(pass)
        } else if page == cursor && self.words_done > 0 {
            Expected::Between { pass, words: self.words_done }
        } else {
            Expected::Pass(pass - 1)
        }
    }
}

/// The result of comparing every page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// How many pages were compared: all.
    pub pages_compared: u64,
    /// How many of them were not what they have to be.
    pub pages_different: u64,
    /// The first of those, at most [`DIFFERENCES_KEPT`].
    pub differences: Vec<Difference>,
}

impl CheckReport {
    fn add(&mut self, difference: Difference) {
        self.pages_different += 1;
        if self.differences.len() < DIFFERENCES_KEPT {
            self.differences.push(difference);
        }
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} pages are different", self.pages_different, self.pages_compared)?;
        self.differences.iter().try_for_each(|difference| write!(f, "; {difference}"))
    }
}

/// A page that is not what it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Counted from the start of RAM.
    pub page: u64,
    /// What it has to be.
    pub expected: Expected,
    /// What it is.
    pub found: Found,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x} is {} instead of {}", self.page, self.found, self.expected)
    }
}

/// What a page has to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Zeros, as it was never written.
    Untouched,
    /// What it was filled with in the beginning.
    Filled,
    /// The values of this pass.
    Pass(u64),
    /// The first `words` written words of this pass, the others of the one before: the guest stopped within the page.
    Between {
        /// The pass that was being written; at least 1.
        pass: u64,
        /// Words of it; at least 1.
        words: u64,
    },
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expected::Untouched => f.write_str("untouched"),
            Expected::Filled => f.write_str("its first content"),
            Expected::Pass(pass) => write!(f, "of pass {pass}"),
            Expected::Between { pass, words } => write!(f, "of pass {pass} up to word {words}"),
        }
    }
}

/// What a page that is not as expected holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing but zeros.
    Zero,
    /// All of it is of another pass: the page is stale.
    Pass(u64),
    /// The first content of that page, in the wrong place.
    FillOf(u64),
    /// Anything else.
    Other {
        /// The first wrong word, in bytes from the start of the page.
        offset: usize,
        /// What it holds.
        value: u64,
    },
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Zero => f.write_str("zero"),
            Found::Pass(pass) => write!(f, "of pass {pass}"),
            Found::FillOf(page) => write!(f, "the first content of page {page:#x}"),
            Found::Other { offset, value } => write!(f, "wrong ({value:#018x} at byte {offset})"),
        }
    }
}

/// What a page holds before pass 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// It is rewritten in every pass, and begins with the values of pass 0.
    WorkingSet,
    /// Random-like bytes that never change.
    Filled,
    /// Zeros, because nobody ever wrote to it.
    Untouched,
}

/// A page as words, in the byte order of the guest.
pub type PageWords = [u64; WORDS_PER_PAGE];

/// Writes `first`, `first + step`, … to `into`.
fn arithmetic<'a>(first: u64, step: u64, into: impl Iterator<Item = &'a mut u64>) {
    let mut value = first;
    for word in into {
        *word = value;
        value = value.wrapping_add(step);
    }
}

fn ram_page(ram: &Ram, page: u64) -> multifd::ram::GuestRange<'_> {
    ram.page(page).expect("the pattern has as many pages as the first RAM block")
}

fn to_bytes(words: &PageWords, bytes: &mut [u8; PAGE_SIZE]) {
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
}

fn from_bytes(bytes: &[u8; PAGE_SIZE]) -> PageWords {
    let mut words = [0; WORDS_PER_PAGE];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().expect("chunks of 8"));
    }
    words
}

/// The inverse of an odd number modulo 2^64, by Newton's iteration: each step doubles the number of right bits.
const fn inverse(odd: u64) -> u64 {
    let mut inverse = odd;
    let mut step = 0;
    while step < 5 {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(inverse)));
        step += 1;
    }
    inverse
}

/// Bytes in a page of every guest here.
pub const PAGE_SIZE: usize = 4096;
/// Words of 8 bytes in a page.
pub const WORDS_PER_PAGE: usize = PAGE_SIZE / 8;
/// How many differences a report names.
pub const DIFFERENCES_KEPT: usize = 8;

/// Added to a word from pass to pass. Odd, so that it has an inverse; otherwise without meaning.
pub const PASS_STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// Added to a word from page to page.
pub const PAGE_STEP: u64 = 0xd134_2543_de82_ef95;
/// Added from word to word within a page.
pub const WORD_STEP: u64 = 0xa076_1d64_78bd_642f;
const PASS_STEP_INVERSE: u64 = inverse(PASS_STEP);
const PAGE_STEP_INVERSE: u64 = inverse(PAGE_STEP);
/// The pass number whose values stand for the content of pages before the guest writes them.
const FILL_PASS: u64 = 1 << 62;
/// Above any pass that a guest reaches; what solves to more is not the content of a pass.
const PASS_LIMIT: u64 = 1 << 48;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, Backing};

    fn pattern(writes: Writes) -> Pattern {
        Pattern { seed: 7, pages: 512, working_set: 100, writes, filled_percent: 50, zero_mask: 15 }
    }

    /// Memory as a guest with two workers leaves it that stopped at these positions.
    fn stopped(pattern: &Pattern, positions: &[Position]) -> Ram {
        let ram = memory::allocate(pattern.pages * PAGE_SIZE as u64, Backing::Anonymous).unwrap().ram;
        pattern.fill_all(&ram);
        let mut words = [0; WORDS_PER_PAGE];
        let mut bytes = [0; PAGE_SIZE];
        for page in 0..pattern.working_set {
            pattern.fill_expected(page, pattern.expectation(page, positions), &mut words);
            to_bytes(&words, &mut bytes);
            ram.page(page).unwrap().write(&bytes);
        }
        ram
    }

    const POSITIONS: [Position; 2] =
        [Position { pages_done: 317, words_done: 3 }, Position { pages_done: 50, words_done: 0 }];

    fn check(pattern: &Pattern, ram: &Ram) -> CheckReport {
        pattern.check(ram, &POSITIONS, &DirtyBitmap::new(ram.layout()))
    }

    #[test]
    fn memory_as_it_has_to_be_has_no_difference() {
        for writes in [Writes::Marks, Writes::WholePages] {
            let pattern = pattern(writes);
            let report = check(&pattern, &stopped(&pattern, &POSITIONS));
            assert_eq!(report, CheckReport { pages_compared: 512, ..CheckReport::default() }, "{writes:?}");
        }
    }

    #[test]
    fn one_flipped_bit_in_any_page_is_reported_as_that_page() {
        for writes in [Writes::Marks, Writes::WholePages] {
            let pattern = pattern(writes);
            let ram = stopped(&pattern, &POSITIONS);
            for page in 0..pattern.pages {
                let offset = (page as usize * 1031) % PAGE_SIZE;
                let range = ram.page(page).unwrap();
                let mut before = [0; PAGE_SIZE];
                range.read(&mut before);
                let mut after = before;
                after[offset] ^= 0x10;
                range.write(&after);
                let report = check(&pattern, &ram);
                assert_eq!(report.pages_different, 1);
                assert_eq!(report.differences[0].page, page);
                match report.differences[0].found {
                    Found::Other { offset: word, .. } => assert_eq!(word, offset / 8 * 8),
                    found => panic!("page {page}: {found:?}"),
                }
                range.write(&before);
            }
        }
    }

    #[test]
    fn a_stale_page_is_reported_with_its_pass() {
        for writes in [Writes::Marks, Writes::WholePages] {
            let pattern = pattern(writes);
            let ram = stopped(&pattern, &POSITIONS);
            // Worker 0 is in pass 7 at page 17; page 5 has to hold pass 7, page 40 pass 6.
            let mut words = [0; WORDS_PER_PAGE];
            let mut bytes = [0; PAGE_SIZE];
            for (page, now, stale) in [(5, 7, 6), (40, 6, 5), (60, 1, 0)] {
                pattern.fill(page, stale, &mut words);
                to_bytes(&words, &mut bytes);
                ram.page(page).unwrap().write(&bytes);
                let report = check(&pattern, &ram);
                let difference = Difference { page, expected: Expected::Pass(now), found: Found::Pass(stale) };
                assert_eq!(report.differences, [difference]);
                pattern.fill(page, now, &mut words);
                to_bytes(&words, &mut bytes);
                ram.page(page).unwrap().write(&bytes);
            }
            assert_eq!(check(&pattern, &ram).pages_different, 0);
        }
    }

    #[test]
    fn a_page_that_lost_its_content_is_reported_as_zero() {
        let pattern = pattern(Writes::Marks);
        let ram = stopped(&pattern, &POSITIONS);
        ram.page(90).unwrap().clear();
        assert_eq!(check(&pattern, &ram).differences[0].found, Found::Zero);
    }

    #[test]
    fn a_page_in_the_wrong_place_is_named() {
        let pattern = pattern(Writes::WholePages);
        let ram = stopped(&pattern, &POSITIONS);
        let filled: Vec<u64> = (100..512).filter(|&page| pattern.initial(page) == Initial::Filled).take(2).collect();
        let mut bytes = [0; PAGE_SIZE];
        ram.page(filled[0]).unwrap().read(&mut bytes);
        ram.page(filled[1]).unwrap().write(&bytes);
        assert_eq!(check(&pattern, &ram).differences[0].found, Found::FillOf(filled[0]));
    }

    #[test]
    fn whole_pages_become_zero_and_get_content_again() {
        let pattern = pattern(Writes::WholePages);
        let mut words = [1; WORDS_PER_PAGE];
        let zero = |page, pass, words: &mut PageWords| {
            pattern.fill(page, pass, words);
            words.iter().all(|&word| word == 0)
        };
        assert!(!zero(10, 4, &mut words));
        assert!(zero(10, 5, &mut words));
        assert!(!zero(10, 6, &mut words));
    }

    #[test]
    fn shares_cover_the_working_set_without_overlap() {
        let pattern = pattern(Writes::Marks);
        let shares: Vec<_> = (0..3).map(|index| pattern.share(index, 3)).collect();
        assert_eq!(shares, [0..33, 33..66, 66..100]);
    }
}

//! A live guest of 512 bytes that rewrites its memory forever and proves it at each pass.
//!
//! The boot sector (`boot.s`, assembled to `boot.bin`) visits a region page by page. In pass *n* it checks that each
//! page still holds what it wrote in pass *n − 1*, counts what does not, and writes the values of pass *n*. A page that a
//! migration lost, delayed or mixed up is therefore seen by the guest one pass later, and printed after every pass
//! from then on. At any stop, pages below the guest's cursor hold pass *n* and the rest pass *n − 1*, so the host can
//! judge every page of the stopped guest as well: [`BootGuest::check_ram`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The guest's parameters: which pages it rewrites, and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootGuest {
    start: u32,
    pages: u32,
    delay: u32,
}

impl BootGuest {
    /// The page size of the guest.
    pub const PAGE: u32 = 4096;

    /// A guest that rewrites the pages of `region`, guest physical addresses above 1 MiB, as fast as it can.
    ///
    /// # Panics
    ///
    /// If the region is empty, not page aligned or reaches below 1 MiB, where the firmware and the guest's code are.
    pub fn new(region: Range<u32>) -> Self {
        assert!(region.start >= 0x10_0000 && region.start < region.end, "a region above 1 MiB");
        assert!(region.start.is_multiple_of(Self::PAGE) && region.end.is_multiple_of(Self::PAGE), "whole pages");
        Self { start: region.start, pages: (region.end - region.start) / Self::PAGE, delay: 0 }
    }

    /// A guest that rewrites all but the first and the last MiB of a VM with `mib` MiB of memory.
    pub fn filling(mib: u32) -> Self {
        Self::new(0x10_0000..(mib - 1) << 20)
    }

    /// Lets the guest count down from `delay` after each page. It lowers the rate at which pages get dirty.
    #[must_use]
    pub fn slowed(self, delay: u32) -> Self {
        Self { delay, ..self }
    }

    /// How many pages one pass writes.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// The guest physical address of page `page` of the region, which is also its offset in the block `pc.ram`.
    ///
    /// # Panics
    ///
    /// If the region has no such page.
    pub fn address(&self, page: u32) -> u64 {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        u64::from(self.start) + u64::from(page) * u64::from(Self::PAGE)
    }

    /// The boot disk.
    pub fn sector(&self) -> [u8; 512] {
        let mut sector = *SECTOR;
        for (index, value) in [self.start, self.pages, self.delay].into_iter().enumerate() {
            sector[PARAMETERS + 4 * index..][..4].copy_from_slice(&value.to_le_bytes());
        }
        sector
    }

    /// What pass `pass` writes at the start of page `page`; the last word of the page is its complement.
    pub fn value(pass: u32, page: u32) -> u32 {
        pass.wrapping_mul(PASS_STEP).wrapping_add(page.wrapping_mul(PAGE_STEP))
    }

    /// Judges the memory of a stopped guest; `word` reads the little-endian word at a guest physical address.
    ///
    /// # Errors
    ///
    /// [`RamFault::Page`] names the first page that is in neither of the two passes it may be in.
    pub fn check_ram(&self, mut word: impl FnMut(u64) -> io::Result<u32>) -> Result<Cursor, RamFault> {
        let first = word(self.address(0))?;
        // Undoes `value`: the steps are odd, so multiplication by one has an inverse modulo 2^32.
        let pass = first.wrapping_mul(inverse(PASS_STEP));
        let mut page = 0;
        let mut page_words = |page: u32| -> io::Result<(u32, u32)> {
            let address = self.address(page);
            Ok((word(address)?, !word(address + u64::from(Self::PAGE) - 4)?))
        };
        while page < self.pages && page_words(page)? == (Self::value(pass, page), Self::value(pass, page)) {
            page += 1;
        }
        let cursor = Cursor { pass, written: page };
        if pass <= 1 {
            // Before the first pass the memory holds what the firmware left.
            return if pass == 1 { Ok(cursor) } else { Err(RamFault::NotStarted) };
        }
        for page in page..self.pages {
            let (now, before) = (Self::value(pass, page), Self::value(pass - 1, page));
            let (first, last) = page_words(page)?;
            // The guest may have been stopped between the two words of the page at the cursor.
            let may_be_torn = page == cursor.written;
            if last != before || (first != before && !(may_be_torn && first == now)) {
                return Err(RamFault::Page { page, address: self.address(page), pass, first, last });
            }
        }
        Ok(cursor)
    }

    /// Judges the memory of a stopped guest in `ram`, a file that holds the block `pc.ram` from its start.
    pub fn check_ram_file(&self, ram: &Path) -> Result<Cursor, RamFault> {
        let file = File::open(ram)?;
        self.check_ram(|address| {
            let mut word = [0; 4];
            file.read_exact_at(&mut word, address)?;
            Ok(u32::from_le_bytes(word))
        })
    }

    /// Judges the memory of a stopped guest in `ram`, the contents of the block `pc.ram`.
    pub fn check_ram_bytes(&self, ram: &[u8]) -> Result<Cursor, RamFault> {
        self.check_ram(|address| {
            let bytes = usize::try_from(address).ok().and_then(|start| ram.get(start..)?.first_chunk());
            bytes.map(|bytes| u32::from_le_bytes(*bytes)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        })
    }
}

/// How far a stopped guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// The pass it is in, from 1.
    pub pass: u32,
    /// How many pages of the region that pass has written; a half-written one is not counted.
    pub written: u32,
}

/// What is wrong with a guest's memory.
#[derive(Debug, thiserror::Error)]
pub enum RamFault {
    /// The first page of the region was never written.
    #[error("the guest has not written its first page")]
    NotStarted,
    /// A page holds something else than what the guest wrote there.
    #[error(
        "page {page} at {address:#x} holds {first:#010x} and !{last:#010x} in pass {pass}: neither that pass nor the one before"
    )]
    Page {
        /// The page of the region.
        page: u32,
        /// Its guest physical address.
        address: u64,
        /// The pass the guest is in, judged by the first page.
        pass: u32,
        /// The first word of the page.
        first: u32,
        /// The complement of its last word.
        last: u32,
    },
    /// The memory cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a guest printed: one letter per pass, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Output {
    /// The letters, without counts of errors.
    pub letters: Vec<u8>,
    /// The last complete count of wrong pages; `None` if the guest never saw one.
    pub errors: Option<u32>,
}

impl Output {
    /// Reads what came out of the serial port, from any point in time to any other.
    ///
    /// # Errors
    ///
    /// If a letter is not the successor of the one before, or if something else was printed: the guest, or its serial
    /// port, is broken then. The message shows where.
    pub fn parse(serial: &[u8]) -> Result<Self, String> {
        // A count that was cut off at the start belongs to an output that was looked at earlier.
        let cut_off = serial.iter().take_while(|byte| is_digit(byte)).count();
        let mut output = Self::default();
        let mut rest = serial;
        if cut_off < 8 {
            rest = &rest[cut_off..];
        }
        while let Some((&byte, after)) = rest.split_first() {
            rest = after;
            match byte {
                b'a'..=b'z' => {
                    if let Some(&last) = output.letters.last()
                        && byte != successor(last)
                    {
                        return Err(format!("`{}` follows `{}`: a pass is missing", byte as char, last as char));
                    }
                    output.letters.push(byte);
                }
                b'X' => {
                    let digits = &rest[..rest.iter().take(8).take_while(|byte| is_digit(byte)).count()];
                    rest = &rest[digits.len()..];
                    let text = String::from_utf8_lossy(digits);
                    if digits.len() == 8 {
                        output.errors = Some(u32::from_str_radix(&text, 16).map_err(|error| error.to_string())?);
                    } else if rest.is_empty() {
                        // Cut off at the end: not complete, but an error for certain.
                        output.errors = output.errors.or(Some(1));
                    } else {
                        return Err(format!("`X{text}` is no count"));
                    }
                }
                other => {
                    let at = serial.len() - rest.len() - 1;
                    return Err(format!("byte {other:#04x} at {at} is not the guest's"));
                }
            }
        }
        Ok(output)
    }

    /// How many passes ended while this was printed.
    pub fn passes(&self) -> usize {
        self.letters.len()
    }

    /// The guest saw a page change behind its back.
    pub fn is_corrupted(&self) -> bool {
        self.errors.is_some()
    }

    /// `later`, printed on the other side of a migration, goes on where this ends. No pass was left out or repeated.
    pub fn is_continued_by(&self, later: &Self) -> bool {
        match (self.letters.last(), later.letters.first()) {
            (Some(&last), Some(&first)) => first == successor(last),
            _ => true,
        }
    }
}

fn is_digit(byte: &u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'A'..=b'F')
}

fn successor(letter: u8) -> u8 {
    if letter == b'z' { b'a' } else { letter + 1 }
}

/// The multiplicative inverse of an odd number modulo 2^32.
const fn inverse(odd: u32) -> u32 {
    // Newton's iteration doubles the number of right bits; an odd number is its own inverse modulo 8.
    let mut inverse = odd;
    let mut bits = 3;
    while bits < 32 {
        inverse = inverse.wrapping_mul(2u32.wrapping_sub(odd.wrapping_mul(inverse)));
        bits *= 2;
    }
    inverse
}

/// `boot.s`, assembled.
const SECTOR: &[u8; 512] = include_bytes!("boot.bin");
/// Where `boot.s` keeps start, pages and delay.
const PARAMETERS: usize = 0x1e0;
/// `PASS_STEP` of `boot.s`.
const PASS_STEP: u32 = 0x9e37_79b1;
/// `PAGE_STEP` of `boot.s`.
const PAGE_STEP: u32 = 0x85eb_ca6b;

#[cfg(test)]
mod tests {
    use std::process::Command;

    use test_support::{TempDir, skip};

    use super::*;

    const GUEST_PAGES: u32 = 8;

    fn guest() -> BootGuest {
        BootGuest::new(0x10_0000..0x10_0000 + GUEST_PAGES * BootGuest::PAGE)
    }

    /// The memory of a guest that was stopped in `pass` after it wrote `written` pages.
    fn ram(pass: u32, written: u32) -> Vec<u8> {
        let mut ram = vec![0; 0x10_0000 + (GUEST_PAGES * BootGuest::PAGE) as usize];
        for page in 0..GUEST_PAGES {
            let value = BootGuest::value(if page < written { pass } else { pass - 1 }, page);
            put(&mut ram, page, 0, value);
            put(&mut ram, page, 4092, !value);
        }
        ram
    }

    fn put(ram: &mut [u8], page: u32, offset: usize, value: u32) {
        let at = usize::try_from(guest().address(page)).unwrap() + offset;
        ram[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    #[test]
    fn the_committed_sector_is_its_source_assembled() {
        let dir = TempDir::new().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/boot.s");
        let (object, binary) = (dir.join("boot.o"), dir.join("boot.bin"));
        let steps = [
            Command::new("as").arg("--32").arg(&source).arg("-o").arg(&object).output(),
            Command::new("ld")
                .args(["-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"])
                .arg(&object)
                .arg("-o")
                .arg(&binary)
                .output(),
        ];
        for step in steps {
            match step {
                Ok(output) if output.status.success() => {}
                Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
                Err(error) => return skip(&format!("no GNU assembler or linker: {error}")),
            }
        }
        assert_eq!(std::fs::read(binary).unwrap(), SECTOR);
    }

    #[test]
    fn parameters_land_where_the_sector_reads_them() {
        let sector = BootGuest::new(0x20_0000..0x30_0000).slowed(7).sector();
        assert_eq!(sector[0x1e0..0x1e4], 0x20_0000u32.to_le_bytes());
        assert_eq!(sector[0x1e4..0x1e8], 256u32.to_le_bytes());
        assert_eq!(sector[0x1e8..0x1ec], 7u32.to_le_bytes());
        assert_eq!(sector[0x1fe..], [0x55, 0xaa]);
    }

    #[test]
    fn memory_of_a_stopped_guest_tells_pass_and_cursor() {
        for written in 1..=GUEST_PAGES {
            let cursor = guest().check_ram_bytes(&ram(500, written)).unwrap();
            assert_eq!(cursor, Cursor { pass: 500, written });
        }
    }

    #[test]
    fn a_page_of_an_older_pass_is_found_wherever_it_is() {
        for page in 1..GUEST_PAGES {
            let mut ram = ram(500, 4);
            let stale = BootGuest::value(498, page);
            put(&mut ram, page, 0, stale);
            put(&mut ram, page, 4092, !stale);
            let fault = guest().check_ram_bytes(&ram).unwrap_err();
            assert!(matches!(fault, RamFault::Page { page: at, .. } if at == page), "{fault}");
        }
    }

    #[test]
    fn a_stale_page_below_the_cursor_is_found_although_it_is_of_the_previous_pass() {
        let mut ram = ram(500, 4);
        let previous = BootGuest::value(499, 2);
        put(&mut ram, 2, 0, previous);
        put(&mut ram, 2, 4092, !previous);
        // It looks like the cursor, so the page behind it, already written, is the first that cannot be.
        assert!(matches!(guest().check_ram_bytes(&ram), Err(RamFault::Page { page: 3, .. })));
    }

    #[test]
    fn only_the_page_at_the_cursor_may_be_torn() {
        let mut torn = ram(500, 4);
        put(&mut torn, 4, 0, BootGuest::value(500, 4));
        assert_eq!(guest().check_ram_bytes(&torn).unwrap(), Cursor { pass: 500, written: 4 });
        let mut torn = ram(500, 4);
        put(&mut torn, 5, 0, BootGuest::value(500, 5));
        assert!(matches!(guest().check_ram_bytes(&torn), Err(RamFault::Page { page: 5, .. })));
        let mut torn_backwards = ram(500, 4);
        put(&mut torn_backwards, 4, 4092, !BootGuest::value(500, 4));
        assert!(matches!(guest().check_ram_bytes(&torn_backwards), Err(RamFault::Page { page: 4, .. })));
    }

    #[test]
    fn memory_that_no_guest_wrote_is_refused() {
        assert!(matches!(guest().check_ram_bytes(&vec![0; 0x20_0000]), Err(RamFault::NotStarted)));
        assert!(matches!(guest().check_ram_bytes(&[0; 64]), Err(RamFault::Io(_))));
    }

    #[test]
    fn letters_in_order_are_passes() {
        let output = Output::parse(b"yzab").unwrap();
        assert_eq!((output.passes(), output.is_corrupted()), (4, false));
        assert!(output.is_continued_by(&Output::parse(b"cd").unwrap()));
        assert!(!output.is_continued_by(&Output::parse(b"d").unwrap()));
        assert!(!output.is_continued_by(&Output::parse(b"b").unwrap()));
    }

    #[test]
    fn a_missing_letter_is_an_error() {
        assert!(Output::parse(b"abd").is_err());
        assert!(Output::parse(b"ab!").is_err());
    }

    #[test]
    fn a_count_of_errors_is_never_overlooked() {
        assert_eq!(Output::parse(b"abX0000000AcX0000001F").unwrap().errors, Some(0x1f));
        assert_eq!(Output::parse(b"abX00").unwrap().errors, Some(1));
        assert_eq!(Output::parse(b"0Abc").unwrap().passes(), 2);
        assert!(Output::parse(b"aX00b").is_err());
    }
}

//! How long the bodies of sections beside `ram` are, while they are received.
//!
//! Nothing on the wire says it. Device sections behind RAM are cut by the description at the very end ([`crate::vmdesc`]).
//! Those in front of the pages have to be told apart when they come:
//!
//! - A device whose state is needed before the pages sends it early: QEMU 10.0 between the START of `ram` and its first PART,
//!   QEMU 11.1 before the START. The one device that is known to do so is virtio-mem. Its body is
//!
//!   | offset | size | field                                                             |
//!   |-------:|-----:|-------------------------------------------------------------------|
//!   |      0 |    8 | address                                                           |
//!   |      8 |    8 | size of the region                                                |
//!   |     16 |    8 | size of a block                                                   |
//!   |     24 |    4 | node                                                              |
//!   |     28 |    8 | plugged size                                                      |
//!   |     36 |    … | one bit for each block of the region, in whole 64-bit words       |
//!
//!   so its length is known; what the guest does with its memory changes the bits and not the length. For the
//!   state of another device the footer is looked for, with the start of a possible next element behind it.
//! - The section `dirty-bitmap` (capability `dirty-bitmaps`) comes in parts, each of which is a list of chunks. A chunk begins
//!   with a byte of flags: `01` ends the list, `08` a name of a block node follows, `04` a name of a bitmap, `10` a bitmap
//!   begins (32-bit granularity, 8-bit flags), `20` it is complete, `40` bits follow (64-bit first sector, 32-bit number of
//!   sectors, then, unless `02` says that all are zeros, a 64-bit length and so many bytes). A source without any bitmap
//!   sends a START with an empty list and no END.

use crate::stream::{COMMAND, END, FOOTER, FULL, PART, START, Section, SectionKind};
use crate::violation::{DecodeError, Mismatch, ProtocolError};
use crate::wire::{Reader, Stop};

/// Finds the end of one section's body in a buffer that grows while it is received.
///
/// No byte is looked at twice, but for the few at the end of what was received.
#[derive(Debug, Clone)]
pub struct BodyScanner {
    rule: Rule,
    /// No end lies before it.
    scanned: usize,
}

#[derive(Debug, Clone)]
enum Rule {
    /// Chunks of a dirty bitmap, up to the end of their list.
    DirtyBitmap,
    /// The rest of a body whose length is known from its beginning.
    VirtioMem(Footer),
    /// No rule but the shape of the end.
    Shape(Footer),
}

impl BodyScanner {
    /// A scanner for the body of `section`; `ram_section` is the id of `ram` where that was started before.
    ///
    /// # Errors
    /// The section comes in parts, and is not one whose parts are understood.
    pub fn new(section: &Section, ram_section: Option<u32>) -> Result<Self, Mismatch> {
        let footer = || Footer::new(section.id, ram_section);
        let rule = match section.kind {
            SectionKind::Full if section.name.ends_with(VIRTIO_MEM_EARLY) && section.version == 1 => {
                Rule::VirtioMem(footer())
            }
            SectionKind::Full => Rule::Shape(footer()),
            _ if section.name == DIRTY_BITMAP && section.version == 1 => Rule::DirtyBitmap,
            _ => {
                let name = crate::ids::escape(section.name.as_bytes());
                let remedy = match section.name.as_str() {
                    "block" => "switch the capability block off and copy the disks in another way",
                    _ => "switch the capability off, or detach the device, that adds it",
                };
                return Err(Mismatch::SectionInParts { name, remedy });
            }
        };
        Ok(Self { rule, scanned: 0 })
    }

    /// The length of the body with which `buf` begins; nothing while its end was not received. The same `buf` with more
    /// behind it is to be passed next.
    ///
    /// # Errors
    /// A chunk that is not understood.
    pub fn scan(&mut self, buf: &[u8]) -> Result<Option<usize>, ProtocolError> {
        match &self.rule {
            Rule::Shape(footer) => Ok(footer.find(buf, &mut self.scanned)),
            Rule::VirtioMem(footer) => {
                match virtio_mem_len(buf) {
                    None => return Ok(None),
                    // The footer stands there, unless a newer device has more.
                    Some(len) => self.scanned = self.scanned.max(len),
                }
                Ok(footer.find(buf, &mut self.scanned))
            }
            Rule::DirtyBitmap => loop {
                let mut reader = Reader::new(buf.get(self.scanned..).unwrap_or_default());
                let ends = match chunk(&mut reader) {
                    Ok(ends) => ends,
                    Err(Stop::Short(_)) => return Ok(None),
                    Err(Stop::Refused(error)) => return Err(error),
                };
                self.scanned += reader.position();
                if ends {
                    return Ok(Some(self.scanned));
                }
            },
        }
    }
}

/// One chunk of a dirty bitmap; whether it ends the list.
fn chunk(reader: &mut Reader<'_>) -> Result<bool, Stop> {
    let flags = reader.u8()?;
    if flags == LIST_END {
        return Ok(true);
    }
    let kind = flags & !(NODE_NAME | BITMAP_NAME);
    if ![BEGINS, COMPLETE, BITS, BITS | ZEROS].contains(&kind) {
        return Err(DecodeError::UnknownChunk { flags }.into());
    }
    if flags & NODE_NAME != 0 {
        reader.pstr()?;
    }
    if flags & BITMAP_NAME != 0 {
        reader.pstr()?;
    }
    match kind {
        BEGINS => _ = (reader.u32()?, reader.u8()?),
        BITS | BITS_OF_ZEROS => {
            reader.u64()?;
            reader.u32()?;
            if kind == BITS {
                let len = reader.u64()?;
                reader.bytes(usize::try_from(len).unwrap_or(usize::MAX))?;
            }
        }
        _ => {}
    }
    Ok(false)
}

/// The length of virtio-mem's early state as its beginning tells it; nothing while that was not received.
///
/// Numbers that make no sense lead to the shortest length that there can be.
fn virtio_mem_len(buf: &[u8]) -> Option<usize> {
    let mut reader = Reader::new(buf);
    let (Ok(_), Ok(region), Ok(block)) = (reader.u64(), reader.u64(), reader.u64()) else { return None };
    let blocks = region.checked_div(block).unwrap_or(0);
    let words = usize::try_from(blocks.div_ceil(64)).unwrap_or(usize::MAX);
    Some(words.saturating_mul(8).saturating_add(VIRTIO_MEM_FIXED))
}

/// The end of a body by its shape: the section's footer, with the start of a possible next element behind it.
#[derive(Debug, Clone)]
struct Footer {
    bytes: [u8; FOOTER_LEN],
    ram_section: Option<[u8; 4]>,
}

impl Footer {
    fn new(section: u32, ram_section: Option<u32>) -> Self {
        let mut bytes = [FOOTER, 0, 0, 0, 0];
        bytes[1..].copy_from_slice(&section.to_be_bytes());
        Self { bytes, ram_section: ram_section.map(u32::to_be_bytes) }
    }

    fn find(&self, buf: &[u8], scanned: &mut usize) -> Option<usize> {
        while let Some(rest) = buf.get(*scanned..) {
            let Some(skip) = rest.iter().position(|byte| *byte == FOOTER) else {
                *scanned = buf.len();
                return None;
            };
            *scanned += skip;
            let Some(behind) = rest[skip..].strip_prefix(&self.bytes) else {
                if rest.len() - skip < FOOTER_LEN && self.bytes.starts_with(&rest[skip..]) {
                    // The rest of it may still come.
                    return None;
                }
                *scanned += 1;
                continue;
            };
            match self.goes_on(behind) {
                Some(true) => return Some(*scanned),
                Some(false) => *scanned += 1,
                None => return None,
            }
        }
        None
    }

    /// Whether an element may begin with `behind`; nothing if more of it is needed.
    fn goes_on(&self, behind: &[u8]) -> Option<bool> {
        match (behind, self.ram_section) {
            ([], _) => None,
            ([PART | END, id @ ..], Some(ram)) => match id.get(..ram.len()) {
                Some(id) => Some(id == ram),
                None if ram.starts_with(id) => None,
                None => Some(false),
            },
            // Ids are small.
            ([START | FULL, rest @ ..], _) => zeros(rest, 2),
            ([COMMAND, rest @ ..], _) => zeros(rest, 1),
            _ => Some(false),
        }
    }
}

/// Whether `bytes` begin with `count` zeros; nothing if too few were received.
fn zeros(bytes: &[u8], count: usize) -> Option<bool> {
    match bytes.iter().take(count).all(|byte| *byte == 0) {
        true if bytes.len() < count => None,
        all => Some(all),
    }
}

/// The section that the capability `dirty-bitmaps` adds.
pub const DIRTY_BITMAP: &str = "dirty-bitmap";
/// The body of a part of that section without any bitmap.
pub const NO_BITMAPS: &[u8] = &[LIST_END];

const LIST_END: u8 = 0x01;
const ZEROS: u8 = 0x02;
const BITMAP_NAME: u8 = 0x04;
const NODE_NAME: u8 = 0x08;
const BEGINS: u8 = 0x10;
const COMPLETE: u8 = 0x20;
const BITS: u8 = 0x40;
const BITS_OF_ZEROS: u8 = BITS | ZEROS;

/// How the name of virtio-mem's early section ends, behind the device's address.
const VIRTIO_MEM_EARLY: &str = "/virtio-mem-device-early";
/// Bytes of that section's body before the bits.
const VIRTIO_MEM_FIXED: usize = 36;
const FOOTER_LEN: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn section(kind: SectionKind, name: &str) -> Section {
        Section { kind, id: 8, name: name.to_owned(), instance: 0, version: 1 }
    }

    /// The length of a body, found as it arrives byte by byte.
    fn len(section: &Section, ram: Option<u32>, bytes: &[u8]) -> Option<usize> {
        let mut scanner = BodyScanner::new(section, ram).unwrap();
        let whole = BodyScanner::new(section, ram).unwrap().scan(bytes).unwrap();
        let found = (0..=bytes.len()).find_map(|received| scanner.scan(&bytes[..received]).unwrap());
        assert_eq!(found, whole);
        found
    }

    #[test]
    fn a_body_of_unknown_shape_ends_at_a_footer_with_something_possible_behind_it() {
        let footer = [0x7e, 0, 0, 0, 8];
        let body = [&b"body \x7e\0\0\0\x08 more"[..], &footer].concat();
        let early = section(SectionKind::Full, "early");
        let next = |ram, next: &[u8]| len(&early, ram, &[&body[..], next].concat());
        let end = Some(body.len() - 5);
        for ram in [Some(2), None] {
            assert_eq!(next(ram, b""), None);
            assert_eq!(next(ram, b"\x04\0\0"), end);
            assert_eq!(next(ram, b"\x01\0\0"), end);
            assert_eq!(next(ram, b"\x08\0"), end);
            assert_eq!(next(ram, b"\x01\0\x01"), None);
            assert_eq!(next(ram, b"\x02\0\0\0\x03"), None);
        }
        assert_eq!(next(Some(2), b"\x02\0\0"), None);
        assert_eq!(next(Some(2), b"\x02\0\0\0\x02"), end);
        assert_eq!(next(Some(2), b"\x03\0\0\0\x02rest"), end);
        assert_eq!(next(None, b"\x02\0\0\0\x02"), None);
    }

    /// The early state of virtio-mem with 129 blocks, as QEMU 11.1 sent it but for the bits.
    fn virtio_mem(bits: [u8; 24]) -> Vec<u8> {
        let (region, block) = (258u64 << 20, 2u64 << 20);
        let numbers = [0x1_0000_0000u64.to_be_bytes(), region.to_be_bytes(), block.to_be_bytes()].concat();
        [&numbers[..], &[0; 4], &0u64.to_be_bytes(), &bits].concat()
    }

    /// The guest decides which blocks are plugged, so it writes the bits.
    #[test]
    fn bits_that_look_like_the_end_of_the_section_do_not_end_it() {
        let early = section(SectionKind::Full, "0000:00:02.0/virtio-mem-device-early");
        let forged = *b"\x7e\0\0\0\x08\x02\0\0\0\x02\x7e\0\0\0\x08\x04\0\0\x7e\0\0\0\x08\x08";
        for bits in [[0; 24], [0xff; 24], forged] {
            let body = virtio_mem(bits);
            let bytes = [&body[..], b"\x7e\0\0\0\x08\x02\0\0\0\x02"].concat();
            assert_eq!(len(&early, Some(2), &bytes), Some(60));
        }
        // A device of a later version may have more.
        let bytes = [&virtio_mem(forged)[..], b"more\x7e\0\0\0\x08\x01\0\0\0\x02"].concat();
        assert_eq!(len(&early, None, &bytes), Some(64));
        // Numbers that make no sense are no reason to read on without end, or to panic.
        for (region, block) in [(0, 0), (u64::MAX, 1), (1, u64::MAX)] {
            let numbers = [0u64.to_be_bytes(), region.to_be_bytes(), block.to_be_bytes()].concat();
            let _ = len(&early, None, &[&numbers[..], &[0; 100]].concat());
        }
    }

    #[test]
    fn parts_of_a_dirty_bitmap_end_with_their_list() {
        let name = DIRTY_BITMAP;
        // As QEMU 7.2, 10.0 and 11.1 sent them.
        let two = b"\x1c\x02d0\x03bm1\0\0\x10\0\x01\x14\x03bm0\0\x01\0\0\x01\x01";
        let zeros = b"\x42\0\0\0\0\0\0\0\0\0\x02\0\0\x20\x01";
        let named = b"\x46\x03bm1\0\0\0\0\0\0\0\0\0\x01\0\0\x24\x03bm1\x24\x03bm0\x01";
        let mut bits = b"\x40\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x04\0".to_vec();
        bits.extend([0x7e; 1024]);
        bits.extend(b"\x20\x01");
        for (kind, body) in [
            (SectionKind::Start, &b"\x01"[..]),
            (SectionKind::Start, two),
            (SectionKind::End, zeros),
            (SectionKind::End, named),
            (SectionKind::Part, &bits),
        ] {
            let bytes = [body, b"\x7e\0\0\0\x08\x02"].concat();
            assert_eq!(len(&section(kind, name), Some(2), &bytes), Some(body.len()), "{body:02x?}");
            assert_eq!(len(&section(kind, name), Some(2), &body[..body.len() - 1]), None);
        }
        for flags in [0x00, 0x02, 0x03, 0x21, 0x30, 0x60, 0x80, 0xff] {
            let refused = BodyScanner::new(&section(SectionKind::End, name), Some(2)).unwrap().scan(&[flags]);
            assert_eq!(refused, Err(DecodeError::UnknownChunk { flags }.into()));
        }
        // A length beyond everything asks for more; the caller has a limit.
        let endless = [&b"\x40\0\0\0\0\0\0\0\0\0\x10\0\0"[..], &[0xff; 8], &[0; 64]].concat();
        assert_eq!(len(&section(SectionKind::End, name), Some(2), &endless), None);
    }

    #[test]
    fn other_sections_in_parts_are_refused_with_what_to_switch_off() {
        for (name, says) in [("block", "capability block"), ("0000:00:03.0/vfio", "detach the device")] {
            for kind in [SectionKind::Start, SectionKind::Part, SectionKind::End] {
                let error = BodyScanner::new(&section(kind, name), None).unwrap_err().to_string();
                assert!(error.contains(name) && error.contains(says), "{error}");
            }
        }
    }
}

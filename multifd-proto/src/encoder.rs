//! Writes the main channel.
//!
//! [`MainEncoder`] collects bytes; the caller sends them, interleaves payloads and device bodies, and clears it. It keeps the
//! one thing that an element depends on: the block of the previous page word, which CONTINUE refers to. The order of
//! elements is the caller's; [`crate::stream`] has the picture.

use crate::command::Command;
use crate::extension::{self, Offer};
use crate::ids::BlockName;
use crate::ram::{BlockEntry, RamWord};
use crate::stream::{self, RAM, RAM_VERSION, Section, SectionKind};
use crate::wire::Codec;
use crate::wire::Writer;
use crate::xbzrle;

/// Collects the bytes of main.
#[derive(Debug, Default)]
pub struct MainEncoder {
    /// What was written, which the caller may take, clear and add to.
    pub bytes: Vec<u8>,
    /// The block of the previous page word, across sections.
    last: Option<BlockName>,
}

impl MainEncoder {
    /// Magic and version.
    pub fn header(&mut self) -> &mut Self {
        self.write(|out| out.u32(stream::MAGIC).u32(stream::VERSION))
    }

    /// The configuration with the full name of the machine type.
    pub fn configuration(&mut self, machine: &str) -> &mut Self {
        self.write(|out| out.u8(stream::CONFIGURATION).u32(machine.len() as u32).bytes(machine.as_bytes()))
    }

    /// Subsection of the configuration: the page size as a power of two. x86 never has it.
    pub fn config_page_bits(&mut self, bits: u32) -> &mut Self {
        self.subsection("configuration/target-page-bits").write(|out| out.u32(bits))
    }

    /// Subsection of the configuration: capabilities that change the layout of the stream.
    pub fn config_capabilities<S: AsRef<str>>(&mut self, names: &[S]) -> &mut Self {
        self.subsection("configuration/capabilities").write(|out| out.u32(names.len() as u32));
        for name in names {
            self.write(|out| out.pstr(name.as_ref().as_bytes()));
        }
        self
    }

    /// Subsection of the configuration: the VM's uuid.
    pub fn config_uuid(&mut self, uuid: &[u8; 16]) -> &mut Self {
        self.subsection("configuration/uuid").write(|out| out.bytes(uuid))
    }

    /// Subsection of the configuration: what an end of this implementation offers to another.
    pub fn config_offer(&mut self, offer: &Offer) -> &mut Self {
        self.subsection(extension::SUBSECTION).write(|out| {
            offer.write(out);
            out
        })
    }

    /// A command.
    pub fn command(&mut self, command: &Command) -> &mut Self {
        self.bytes.push(stream::COMMAND);
        command.encode(&mut self.bytes);
        self
    }

    /// The START section of `ram` up to the block list. `total` is the sum of the lengths of all blocks, which follow with
    /// [`block`](Self::block), then the first sync point, [`eos`](Self::eos) and [`footer`](Self::footer).
    pub fn ram_start(&mut self, section_id: u32, total: u64) -> &mut Self {
        let head = Section {
            kind: SectionKind::Start,
            id: section_id,
            name: RAM.to_owned(),
            instance: 0,
            version: RAM_VERSION,
        };
        self.section(&head).word(RamWord::MemSize { total })
    }

    /// One entry of the block list.
    pub fn block(&mut self, entry: &BlockEntry) -> &mut Self {
        entry.encode(&mut self.bytes);
        self
    }

    /// The beginning of a PART or END section of `ram`.
    pub fn ram_part(&mut self, section_id: u32, end: bool) -> &mut Self {
        self.write(|out| out.u8(if end { stream::END } else { stream::PART }).u32(section_id))
    }

    /// A page of zeros.
    pub fn zero_page(&mut self, block: &BlockName, offset: u64) -> &mut Self {
        self.page_word(block, |cont| RamWord::Zero { offset, cont }).write(|out| out.u8(0))
    }

    /// A page, whose content follows.
    pub fn page(&mut self, block: &BlockName, offset: u64) -> &mut Self {
        self.page_word(block, |cont| RamWord::Page { offset, cont })
    }

    /// A page as a diff of `len` bytes, which follows.
    pub fn xbzrle(&mut self, block: &BlockName, offset: u64, len: u16) -> &mut Self {
        self.page_word(block, |cont| RamWord::Xbzrle { offset, cont }).write(|out| out.u8(xbzrle::HEADER).u16(len))
    }

    /// A page as a zlib stream of `len` bytes, which follows.
    pub fn compress_page(&mut self, block: &BlockName, offset: u64, len: u32) -> &mut Self {
        self.page_word(block, |cont| RamWord::CompressPage { offset, cont }).write(|out| out.u32(len))
    }

    /// Sync point of the per-round dialect.
    pub fn flush(&mut self) -> &mut Self {
        self.word(RamWord::Flush)
    }

    /// End of the body of a `ram` section; sync point of the per-section dialect.
    pub fn eos(&mut self) -> &mut Self {
        self.word(RamWord::Eos)
    }

    /// The head of a section, whose body follows. PART and END consist of their id.
    pub fn section(&mut self, section: &Section) -> &mut Self {
        let (byte, named) = match section.kind {
            SectionKind::Start => (stream::START, true),
            SectionKind::Part => (stream::PART, false),
            SectionKind::End => (stream::END, false),
            SectionKind::Full => (stream::FULL, true),
        };
        self.write(|out| out.u8(byte).u32(section.id));
        if named {
            self.write(|out| out.pstr(section.name.as_bytes()).u32(section.instance).u32(section.version));
        }
        self
    }

    /// Bytes that are encoded already, such as the body of a section.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.write(|out| out.bytes(bytes))
    }

    /// The footer of the section with this id.
    pub fn footer(&mut self, section_id: u32) -> &mut Self {
        self.write(|out| out.u8(stream::FOOTER).u32(section_id))
    }

    /// The end of the VM's state.
    pub fn eof(&mut self) -> &mut Self {
        self.write(|out| out.u8(stream::EOF))
    }

    /// The description of the devices with its text.
    pub fn vm_description(&mut self, json: &[u8]) -> &mut Self {
        self.write(|out| out.u8(stream::VMDESCRIPTION).u32(json.len() as u32).bytes(json))
    }

    fn subsection(&mut self, name: &str) -> &mut Self {
        self.write(|out| out.u8(stream::SUBSECTION).pstr(name.as_bytes()).u32(1))
    }

    fn word(&mut self, word: RamWord) -> &mut Self {
        self.write(|out| out.u64(word.encode()))
    }

    fn page_word(&mut self, block: &BlockName, word: impl FnOnce(bool) -> RamWord) -> &mut Self {
        let cont = self.last.as_ref() == Some(block);
        self.word(word(cont));
        if !cont {
            self.last = Some(block.clone());
            self.write(|out| out.pstr(block.as_str().as_bytes()));
        }
        self
    }

    fn write(&mut self, write: impl for<'a, 'b> FnOnce(&'a mut Writer<'b>) -> &'a mut Writer<'b>) -> &mut Self {
        write(&mut Writer::new(&mut self.bytes));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_named_once_until_another_one_comes() {
        let (ram, rom) = (BlockName::new("pc.ram").unwrap(), BlockName::new("pc.rom").unwrap());
        let mut encoder = MainEncoder::default();
        encoder.zero_page(&ram, 0x1000).zero_page(&ram, 0x2000);
        assert_eq!(encoder.bytes, b"\0\0\0\0\0\0\x10\x02\x06pc.ram\0\0\0\0\0\0\0\x20\x22\0");
        encoder.bytes.clear();
        encoder.page(&ram, 0).page(&rom, 0);
        assert_eq!(encoder.bytes, b"\0\0\0\0\0\0\0\x28\0\0\0\0\0\0\0\x08\x06pc.rom");
    }

    #[test]
    fn the_first_bytes_are_those_of_a_recorded_stream() {
        let mut encoder = MainEncoder::default();
        encoder.header().configuration("pc-i440fx-10.0").ram_start(1, 0x88_2000);
        encoder.block(&BlockEntry::new(BlockName::new("pc.ram").unwrap(), 8 << 20)).flush().eos().footer(1);
        let expected = [
            &b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0"[..],
            b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\x88\x20\x04\x06pc.ram\0\0\0\0\0\x80\0\0",
            b"\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01",
        ]
        .concat();
        assert_eq!(encoder.bytes, expected);
    }
}

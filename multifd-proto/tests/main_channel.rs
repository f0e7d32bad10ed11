//! The order and the rules of main: a stream with every element, cut off everywhere, and each rule broken once.

use multifd_proto::command::{BodyLength, Command, PostcopyAdvice};
use multifd_proto::encoder::MainEncoder;
use multifd_proto::extension::{Extension, Extensions, Offer};
use multifd_proto::machine::Dialect;
use multifd_proto::mapped_ram::BlockHeader;
use multifd_proto::ram::BlockEntry;
use multifd_proto::stream::{Item, MainDecoder, Section, SectionKind, StreamError};
use multifd_proto::{BlockName, Codec, Step};
use multifd_proto::{DecodeError, Mismatch, ProtocolError, Violation};

const PAGE: usize = 4096;
const RAM: u32 = 2;

/// The limits of the decoder.
const MAX_BLOCKS: usize = 4096;
const MAX_SECTIONS: usize = 256;
const MAX_VMDESC: u32 = 16 << 20;

fn name(text: &str) -> BlockName {
    BlockName::new(text).unwrap()
}

fn section(kind: SectionKind, id: u32, name: &str) -> Section {
    Section { kind, id, name: name.to_owned(), instance: 0, version: 1 }
}

/// What `write` writes.
fn bytes(write: impl FnOnce(&mut MainEncoder)) -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    write(&mut encoder);
    encoder.bytes.clone()
}

/// Header and configuration.
fn begin(out: &mut MainEncoder) {
    out.header().configuration("pc-i440fx-10.0");
}

/// The START section with two blocks of two pages, per-round.
fn start(out: &mut MainEncoder) {
    begin(out);
    out.ram_start(RAM, 0x4000);
    for block in ["pc.ram", "pc.rom"] {
        out.block(&BlockEntry::new(name(block), 0x2000));
    }
    out.flush().eos().footer(RAM);
}

/// Up to the first word of a PART.
fn part(out: &mut MainEncoder) {
    start(out);
    out.ram_part(RAM, false);
}

/// All of RAM, nothing behind it.
fn ram_done(out: &mut MainEncoder) {
    start(out);
    out.ram_part(RAM, true).eos().footer(RAM);
}

/// Decodes `bytes`; bodies of sections are one byte long. Returns the items, and the error that ends them or how many bytes
/// are missing.
fn decode(bytes: &[u8]) -> (Vec<Item>, Result<usize, StreamError>) {
    decode_with(MainDecoder::new(PAGE), bytes)
}

fn decode_with(mut decoder: MainDecoder, bytes: &[u8]) -> (Vec<Item>, Result<usize, StreamError>) {
    let (mut items, mut at) = (Vec::new(), 0);
    loop {
        let rest = &bytes[bytes.len().min(at)..];
        match decoder.step(rest) {
            Err(error) => return (items, Err(error)),
            Ok(Step::Need(total)) => {
                assert!(total > rest.len());
                return (items, Ok(total - rest.len()));
            }
            Ok(Step::Item { item, used }) => {
                assert!(used <= rest.len());
                at += used + item.payload_len() as usize;
                if matches!(item, Item::Section(_)) {
                    at += 1;
                    decoder.body_taken(1);
                }
                assert_eq!(decoder.position(), at as u64);
                items.push(item);
            }
        }
    }
}

/// Why the stream is refused whose end is the offending element `last`, and that the position is its beginning.
fn refusal(before: impl FnOnce(&mut MainEncoder), last: &[u8]) -> ProtocolError {
    let before = bytes(before);
    let (_, result) = decode(&[&before, last].concat());
    let error = result.expect_err("the stream should be refused");
    assert_eq!(error.offset, before.len() as u64, "{error}");
    error.source
}

fn unexpected(element: &'static str, place: &'static str) -> ProtocolError {
    Violation::UnexpectedElement { element, place }.into()
}

/// A stream with every element there is, and where its elements end.
fn everything() -> (Vec<u8>, Vec<Item>) {
    let advice = PostcopyAdvice { page_size_summary: 0x20_1000, page_size: 0x1000 };
    let block_device = |kind| section(kind, 7, "dirty-bitmap");
    let stream = bytes(|out| {
        out.header().configuration("pc-i440fx-10.0").config_page_bits(12).config_uuid(&[9; 16]);
        out.command(&Command::OpenReturnPath).command(&Command::Ping(1));
        out.command(&Command::PostcopyAdvise(Some(advice)));
        out.section(&block_device(SectionKind::Start)).eof().footer(7);
        out.ram_start(RAM, 0x20_2000);
        out.block(&BlockEntry { page_size: Some(0x20_0000), ..BlockEntry::new(name("huge"), 0x20_0000) });
        out.block(&BlockEntry::new(name("pc.rom"), 0x2000));
        out.flush().eos().footer(RAM);
        out.section(&section(SectionKind::Full, 8, "virtio-mem-early")).eof().footer(8);
        out.ram_part(RAM, false).zero_page(&name("huge"), 0x1000).zero_page(&name("huge"), 0);
        out.page(&name("pc.rom"), 0x1000);
    });
    let page = vec![0xee; PAGE];
    let more = bytes(|out| {
        // The same encoder state as above: the last block was pc.rom.
        out.page(&name("pc.rom"), 0);
        out.bytes.clear();
        out.xbzrle(&name("pc.rom"), 0x1000, 3);
    });
    let rest = bytes(|out| {
        out.compress_page(&name("huge"), 0, 5);
    });
    let end = bytes(|out| {
        out.flush().eos().footer(RAM);
        out.section(&block_device(SectionKind::Part)).eof().footer(7);
        out.command(&Command::SwitchoverStart);
        out.ram_part(RAM, true).flush().flush().eos().footer(RAM);
        out.section(&block_device(SectionKind::End)).eof().footer(7);
        out.section(&section(SectionKind::Full, 9, "timer")).eof().footer(9);
        out.eof().vm_description(b"{}");
    });
    let stream = [&stream[..], &page, &more, b"\x00\x01\x88", &rest, b"zzzzz", &end].concat();
    let (items, result) = decode(&stream);
    // After the last byte, the decoder is finished and refuses another one.
    assert_eq!(result, Ok(1), "{items:?}");
    (stream, items)
}

#[test]
fn a_stream_with_every_element_decodes() {
    let (_, items) = everything();
    let pages: Vec<_> = items
        .iter()
        .filter_map(|item| match item {
            Item::ZeroPage { block, offset }
            | Item::Page { block, offset, .. }
            | Item::Xbzrle { block, offset, .. }
            | Item::CompressPage { block, offset, .. } => Some((*block, *offset, item.payload_len())),
            _ => None,
        })
        .collect();
    assert_eq!(pages, [(0, 0x1000, 0), (0, 0, 0), (1, 0x1000, 4096), (1, 0x1000, 3), (0, 0, 5)]);
    let heads: Vec<_> = items
        .iter()
        .filter_map(|item| match item {
            Item::Section(section) => Some((section.kind, section.name.as_str())),
            _ => None,
        })
        .collect();
    let expected = [
        (SectionKind::Start, "dirty-bitmap"),
        (SectionKind::Full, "virtio-mem-early"),
        (SectionKind::Part, "dirty-bitmap"),
        (SectionKind::End, "dirty-bitmap"),
        (SectionKind::Full, "timer"),
    ];
    assert_eq!(heads, expected);
    assert_eq!(items.iter().filter(|item| matches!(item, Item::Flush)).count(), 4);
    assert_eq!(items.iter().filter(|item| matches!(item, Item::Eos)).count(), 3);
    assert_eq!(items.last(), Some(&Item::VmDescription { len: 2 }));
}

/// The capability `dirty-bitmaps` without any bitmap made each migration fail at its last byte.
#[test]
fn a_section_with_nothing_to_say_after_its_start_has_no_end() {
    let stream = bytes(|out| {
        ram_done(out);
        out.section(&section(SectionKind::Start, 7, "dirty-bitmap")).eof().footer(7);
        out.eof().vm_description(b"{}");
    });
    let (items, result) = decode(&stream);
    assert_eq!(result, Ok(1), "{items:?}");
}

#[test]
fn a_stream_that_is_cut_off_anywhere_asks_for_more() {
    let (stream, items) = everything();
    for len in 0..stream.len() {
        let (seen, result) = decode(&stream[..len]);
        let missing = result.unwrap_or_else(|error| panic!("cut at {len}: {error}"));
        assert!(missing > 0 && items.starts_with(&seen), "cut at {len}");
    }
}

#[test]
fn flipping_any_byte_never_panics() {
    let (stream, _) = everything();
    for at in 0..stream.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut broken = stream.clone();
            broken[at] ^= flip;
            let _ = decode(&broken);
        }
    }
}

#[test]
fn state_can_be_asked_for() {
    let mut decoder = MainDecoder::new(PAGE);
    let stream = bytes(ram_done);
    let mut at = 0;
    let mut dialects = Vec::new();
    assert_eq!((decoder.ram_section(), decoder.ram_ended()), (None, false));
    while let Ok(Step::Item { item, used }) = decoder.step(&stream[at..]) {
        at += used;
        dialects.push((item, decoder.dialect()));
    }
    assert_eq!((decoder.ram_section(), decoder.ram_ended()), (Some(RAM), true));
    assert_eq!(decoder.blocks().len(), 2);
    assert!(!decoder.return_path_open() && !decoder.finished() && !decoder.state_ended());
    // The dialect is known when the START section ends, not before.
    let known = dialects.iter().position(|(_, dialect)| dialect.is_some()).unwrap();
    assert_eq!(dialects[known], (Item::Eos, Some(Dialect::PerRound)));
    let per_section = bytes(|out| {
        begin(out);
        out.ram_start(1, 0x1000).block(&BlockEntry::new(name("a"), 0x1000)).eos();
    });
    let mut decoder = MainDecoder::new(PAGE);
    let mut at = 0;
    while let Ok(Step::Item { used, .. }) = decoder.step(&per_section[at..]) {
        at += used;
    }
    assert_eq!(decoder.dialect(), Some(Dialect::PerSection));
}

#[test]
fn the_position_of_an_error_is_part_of_its_message() {
    let (_, result) = decode(b"GET / HTTP/1.1\r\n");
    assert_eq!(result.unwrap_err().to_string(), "at byte 0 of main: magic 0x47455420 instead of 0x5145564d");
}

#[test]
fn header_rules() {
    let refused = DecodeError::BadVersion { what: "stream", expected: 3, found: 2 };
    assert_eq!(refusal(|_| (), b"QEVM\0\0\0\x02"), refused.into());
    let header = |out: &mut MainEncoder| {
        out.header();
    };
    // A command, or the first section.
    for byte in [1, 4, 8] {
        assert_eq!(refusal(header, &[byte]), Mismatch::NoConfiguration.into());
    }
    assert_eq!(refusal(header, b"\x7e"), unexpected("footer", "instead of the configuration"));
    assert_eq!(refusal(header, b"\x99"), DecodeError::UnknownElement { byte: 0x99 }.into());
    let what = "length of the machine type";
    let long = Violation::ConfigurationTooLong { what, len: 0xffff_ffff, limit: 255 };
    assert_eq!(refusal(header, b"\x07\xff\xff\xff\xff"), long.into());
    for (text, shown) in [(&b"\x07\0\0\0\x02\xffa"[..], "\\xffa"), (b"\x07\0\0\0\0", "")] {
        let refused = DecodeError::NameInvalid { what: "machine type", name: shown.into() };
        assert_eq!(refusal(header, text), refused.into());
    }
}

#[test]
fn configuration_rules() {
    let last = |write: fn(&mut MainEncoder)| bytes(write);
    let unknown = b"\x05\x07config/\0\0\0\x01";
    let refused = DecodeError::UnknownSubsection { name: "config/".into(), version: 1 };
    assert_eq!(refusal(begin, unknown), refused.into());
    let newer = b"\x05\x12configuration/uuid\0\0\0\x02";
    let refused = DecodeError::UnknownSubsection { name: "configuration/uuid".into(), version: 2 };
    assert_eq!(refusal(begin, newer), refused.into());
    let page_bits = last(|out| {
        out.config_page_bits(16);
    });
    assert_eq!(refusal(begin, &page_bits), Mismatch::PageSize { ours: 4096, theirs: 65536 }.into());
    let page_bits = last(|out| {
        out.config_page_bits(u32::MAX);
    });
    assert_eq!(refusal(begin, &page_bits), Mismatch::PageSize { ours: 4096, theirs: 0 }.into());
    let capability = last(|out| {
        out.config_capabilities(&["mapped-ram", "new"]);
    });
    assert_eq!(refusal(begin, &capability), Mismatch::Capability { name: "new".into() }.into());
    let many = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\xff\xff\xff\xff";
    let long = Violation::ConfigurationTooLong { what: "number of capabilities", len: 0xffff_ffff, limit: 16 };
    assert_eq!(refusal(begin, many), long.into());
    let uuid = last(|out| {
        out.config_uuid(&[0; 16]);
    });
    let with_uuid = |out: &mut MainEncoder| {
        begin(out);
        out.config_uuid(&[0; 16]);
    };
    assert_eq!(refusal(with_uuid, &uuid), unexpected("configuration subsection", "a second time"));
    let after_command = |out: &mut MainEncoder| {
        begin(out);
        out.command(&Command::OpenReturnPath);
    };
    assert_eq!(refusal(after_command, &uuid), unexpected("subsection", "between sections"));
}

#[test]
fn element_order_rules() {
    for (last, element) in
        [(&b"\x05"[..], "subsection"), (b"\x06", "VMDESCRIPTION"), (b"\x07", "configuration"), (b"\x7e", "footer")]
    {
        assert_eq!(refusal(start, last), unexpected(element, "between sections"));
    }
    assert_eq!(refusal(start, b"\x09"), DecodeError::UnknownElement { byte: 9 }.into());
    assert_eq!(refusal(start, b"\0"), unexpected("EOF", "before the END section of ram"));
    assert_eq!(refusal(begin, b"\0"), unexpected("EOF", "before the END section of ram"));
    let state_ended = |out: &mut MainEncoder| {
        ram_done(out);
        out.eof();
    };
    assert_eq!(refusal(state_ended, b"\x08"), unexpected("COMMAND", "after EOF"));
    assert_eq!(refusal(state_ended, b"\x04"), unexpected("SECTION_FULL", "after EOF"));
    let too_long = [&b"\x06"[..], &(MAX_VMDESC + 1).to_be_bytes()].concat();
    let refused = Violation::VmDescriptionTooLong { len: MAX_VMDESC as u64 + 1, limit: MAX_VMDESC as u64 };
    assert_eq!(refusal(state_ended, &too_long), refused.into());
    let finished = |out: &mut MainEncoder| {
        state_ended(out);
        out.vm_description(b"{}");
    };
    assert_eq!(refusal(finished, b"\0"), unexpected("EOF", "after the end of the stream"));
    assert_eq!(refusal(finished, b"\xff"), DecodeError::UnknownElement { byte: 0xff }.into());
}

#[test]
fn section_rules() {
    let head = |kind, id, name: &str| bytes(|out| _ = out.section(&section(kind, id, name)));
    assert_eq!(refusal(begin, b"\x02\0\0\0\x02"), Violation::UnknownSection { id: 2 }.into());
    assert_eq!(refusal(start, b"\x03\0\0\0\x09"), Violation::UnknownSection { id: 9 }.into());
    assert_eq!(refusal(ram_done, b"\x02\0\0\0\x02"), Violation::UnknownSection { id: 2 }.into());
    let second = Violation::SectionTwice { id: 3, name: "ram".into() };
    assert_eq!(refusal(start, &head(SectionKind::Start, 3, "ram")), second.into());
    let second = Violation::SectionTwice { id: RAM, name: "x".into() };
    assert_eq!(refusal(start, &head(SectionKind::Start, RAM, "x")), second.into());
    let refused = unexpected("FULL section", "for ram, which is transferred in parts");
    assert_eq!(refusal(begin, &head(SectionKind::Full, 1, "ram")), refused);
    let version = Mismatch::SectionVersion { name: "ram".into(), found: 1, supported: 4 };
    assert_eq!(refusal(begin, &head(SectionKind::Start, 1, "ram")), version.into());
    let instance = bytes(|out| {
        out.section(&Section { version: 4, instance: 1, ..section(SectionKind::Start, 1, "ram") });
    });
    assert_eq!(refusal(begin, &instance), unexpected("second instance", "of ram, which has one"));
    let bad_name = b"\x04\0\0\0\x01\x01\xff\0\0\0\0\0\0\0\x01";
    let refused = DecodeError::NameInvalid { what: "section name", name: "\\xff".into() };
    assert_eq!(refusal(begin, bad_name), refused.into());
    let many = |out: &mut MainEncoder| {
        begin(out);
        for id in 0..MAX_SECTIONS as u32 {
            out.section(&section(SectionKind::Start, 100 + id, "x")).eof().footer(100 + id);
        }
    };
    let refused = Violation::TooManySections { limit: MAX_SECTIONS };
    assert_eq!(refusal(many, &head(SectionKind::Start, 1, "x")), refused.into());
}

#[test]
fn footer_rules() {
    let body_read = |out: &mut MainEncoder| {
        ram_done(out);
        out.section(&section(SectionKind::Full, 9, "timer")).eof();
    };
    assert_eq!(refusal(body_read, b"\x7e\0\0\0\x08"), Violation::BadFooter { expected: 9, found: 8 }.into());
    assert_eq!(refusal(body_read, b"\x04"), Violation::FooterMissing { section: 9, found: 4 }.into());
    let eos = |out: &mut MainEncoder| {
        part(out);
        out.eos();
    };
    assert_eq!(refusal(eos, b"\x7e\0\0\0\x01"), Violation::BadFooter { expected: RAM, found: 1 }.into());
}

#[test]
fn command_rules() {
    let command = |command: Command| bytes(|out| _ = out.command(&command));
    assert_eq!(refusal(begin, b"\x08\0\x0c"), DecodeError::UnknownCommand { number: 12 }.into());
    let length = DecodeError::BadCommandLength { command: "PING", len: 5 };
    assert_eq!(refusal(begin, b"\x08\0\x02\0\x05"), length.into());
    let ping = unexpected("PING", "without an open return path");
    assert_eq!(refusal(begin, &command(Command::Ping(1))), ping);
    let open = |out: &mut MainEncoder| {
        begin(out);
        out.command(&Command::OpenReturnPath).command(&Command::PostcopyAdvise(None));
    };
    assert_eq!(refusal(open, &command(Command::OpenReturnPath)), unexpected("OPEN_RETURN_PATH", "a second time"));
    let advise = |page_size_summary, page_size| {
        command(Command::PostcopyAdvise(Some(PostcopyAdvice { page_size_summary, page_size })))
    };
    assert_eq!(refusal(open, &advise(4096, 4096)), unexpected("POSTCOPY_ADVISE", "a second time"));
    assert_eq!(refusal(start, &advise(4096, 4096)), unexpected("POSTCOPY_ADVISE", "after the START section of ram"));
    assert_eq!(refusal(begin, &advise(65536, 65536)), Mismatch::PageSize { ours: 4096, theirs: 65536 }.into());
    let shared = |out: &mut MainEncoder| {
        begin(out);
        out.config_capabilities(&["x-ignore-shared"]);
    };
    let what = "huge pages in a stream with x-ignore-shared or mapped-ram and postcopy";
    assert_eq!(refusal(shared, &advise(0x20_0000, 4096)), Violation::NotAllowed { what }.into());
    let outside = unexpected("POSTCOPY_LISTEN", "outside of a package");
    assert_eq!(refusal(start, &command(Command::PostcopyListen)), outside);
    let unannounced = unexpected("PACKAGED", "from a source that has not announced postcopy");
    assert_eq!(refusal(start, &command(Command::Packaged { len: 9 })), unannounced);
    let refused = Violation::RecoveryRefused { command: "POSTCOPY_RESUME" };
    assert_eq!(refusal(start, &command(Command::PostcopyResume)), refused.into());
    assert_eq!(refusal(start, &command(Command::EnableColo)), Violation::ColoRefused.into());
}

#[test]
fn a_description_comes_once_before_the_memory_and_only_where_it_was_offered() {
    let offered = |extensions: Extensions| {
        move |out: &mut MainEncoder| {
            begin(out);
            out.config_offer(&Offer { channels: 1, token: None, extensions: extensions.clone() });
        }
    };
    let command = |command: Command| bytes(|out| _ = out.command(&command));
    let describe = command(Command::Describe { len: 0 });
    let known = Extensions::known;
    let unoffered = unexpected("DESCRIBE", "from a source that has not offered it");
    assert_eq!(refusal(begin, &describe), unoffered);
    assert_eq!(refusal(offered(known().without(Extension::Prepare)), &describe), unoffered);
    assert_eq!(refusal(offered(known()), &describe), unexpected("DESCRIBE", "without an open return path"));
    let open = |out: &mut MainEncoder| {
        offered(known())(out);
        out.command(&Command::OpenReturnPath);
    };
    let twice = |out: &mut MainEncoder| {
        open(out);
        out.command(&Command::Describe { len: 0 });
    };
    assert_eq!(refusal(twice, &describe), unexpected("DESCRIBE", "a second time"));
    let late = |out: &mut MainEncoder| {
        open(out);
        out.ram_start(2, 4096).block(&BlockEntry::new(name("ram"), 4096)).eos().footer(2);
    };
    assert_eq!(refusal(late, &describe), unexpected("DESCRIBE", "after the START section of ram"));
    let too_long = Violation::DescriptionTooLong { what: "description of the VM", len: 1 << 21, limit: 1 << 20 };
    assert_eq!(refusal(open, &command(Command::Describe { len: 1 << 21 })), too_long.into());
}

#[test]
fn a_length_comes_directly_before_the_section_of_a_device_and_only_where_it_was_offered() {
    let offered = |extensions: Extensions| {
        move |out: &mut MainEncoder| {
            begin(out);
            out.config_offer(&Offer { channels: 1, token: None, extensions: extensions.clone() });
        }
    };
    let known = Extensions::known;
    let packets = bytes(|out| _ = out.command(&Command::SectionLength(BodyLength::Packets(Some(5)))));
    let unoffered = unexpected("SECTION_PACKETS", "from a source that has not offered it");
    assert_eq!(refusal(offered(known().without(Extension::StatePackets)), &packets), unoffered);
    assert_eq!(refusal(offered(known()), &packets), unexpected("SECTION_PACKETS", "before the END section of ram"));
    let length = bytes(|out| _ = out.command(&Command::SectionLength(BodyLength::Chunks)));
    let unoffered = unexpected("SECTION_LENGTH", "from a source that has not offered it");
    assert_eq!(refusal(begin, &length), unoffered);
    assert_eq!(refusal(offered(known().without(Extension::SectionLength)), &length), unoffered);
    let said = |out: &mut MainEncoder| {
        offered(known())(out);
        out.command(&Command::SectionLength(BodyLength::Bytes(1)));
    };
    let place = "between SECTION_LENGTH and its section";
    assert_eq!(refusal(said, &length), unexpected("COMMAND", place));
    let ram = bytes(|out| _ = out.ram_start(2, 4096));
    assert_eq!(refusal(said, &ram), unexpected("SECTION_START", place));
    assert_eq!(refusal(said, &bytes(|out| _ = out.eof())), unexpected("EOF", place));
    // The section ends what was said.
    let over = |out: &mut MainEncoder| {
        said(out);
        let (kind, name) = (SectionKind::Full, "cpu".to_owned());
        out.section(&Section { kind, id: 3, name, instance: 0, version: 1 }).eof().footer(3);
    };
    assert_eq!(refusal(over, &bytes(|out| _ = out.eof())), unexpected("EOF", "before the END section of ram"));
}

#[test]
fn memory_is_handed_over_once_before_the_description_and_only_where_it_was_offered() {
    let offered = |extensions: Extensions| {
        move |out: &mut MainEncoder| {
            begin(out);
            out.config_offer(&Offer { channels: 1, token: None, extensions: extensions.clone() });
        }
    };
    let known = Extensions::known;
    let shared = bytes(|out| _ = out.command(&Command::SharedMemory { len: 0 }));
    let unoffered = unexpected("SHARED_MEMORY", "from a source that has not offered it");
    assert_eq!(refusal(begin, &shared), unoffered);
    assert_eq!(refusal(offered(known().without(Extension::SharedMemory)), &shared), unoffered);
    assert_eq!(refusal(offered(known()), &shared), unexpected("SHARED_MEMORY", "without an open return path"));
    let open = |out: &mut MainEncoder| {
        offered(known())(out);
        out.command(&Command::OpenReturnPath);
    };
    for (before, place) in
        [(Command::SharedMemory { len: 0 }, "a second time"), (Command::Describe { len: 0 }, "after DESCRIBE")]
    {
        let begun = |out: &mut MainEncoder| {
            open(out);
            out.command(&before);
        };
        assert_eq!(refusal(begun, &shared), unexpected("SHARED_MEMORY", place));
    }
    let late = |out: &mut MainEncoder| {
        open(out);
        out.ram_start(2, 4096).block(&BlockEntry::new(name("ram"), 4096)).eos().footer(2);
    };
    assert_eq!(refusal(late, &shared), unexpected("SHARED_MEMORY", "after the START section of ram"));
}

#[test]
fn block_list_rules() {
    let entry = |name: &str, len| bytes(|out| _ = out.block(&BlockEntry::new(self::name(name), len)));
    let list = |out: &mut MainEncoder| {
        begin(out);
        out.ram_start(RAM, 0x4000).block(&BlockEntry::new(name("pc.ram"), 0x2000));
    };
    let twice = Violation::DuplicateBlock { name: name("pc.ram") };
    assert_eq!(refusal(list, &entry("pc.ram", 0x2000)), twice.into());
    let total = Violation::TotalMismatch { announced: 0x4000, listed: 0x5000 };
    assert_eq!(refusal(list, &entry("pc.rom", 0x3000)), total.into());
    let total = Violation::TotalMismatch { announced: 0x4000, listed: u64::MAX };
    assert_eq!(refusal(list, &entry("pc.rom", 0xffff_ffff_ffff_f000)), total.into());
    let length = Violation::BadBlockLength { name: name("pc.rom"), len: 0 };
    assert_eq!(refusal(list, &entry("pc.rom", 0)), length.into());
    let invalid = DecodeError::BlockNameInvalid { name: "\\xff".into() };
    assert_eq!(refusal(list, b"\x01\xff\0\0\0\0\0\0\x10\0"), invalid.into());
    let many = |out: &mut MainEncoder| {
        begin(out);
        out.ram_start(RAM, !0xfff);
        for i in 0..MAX_BLOCKS {
            out.block(&BlockEntry::new(name(&i.to_string()), 0x1000));
        }
    };
    assert_eq!(refusal(many, &entry("x", 0x1000)), Violation::TooManyBlocks { limit: MAX_BLOCKS }.into());
    let no_list = bytes(|out| {
        out.section(&Section { version: 4, ..section(SectionKind::Start, 1, "ram") }).eos();
    });
    assert_eq!(refusal(begin, &no_list), unexpected("RAM word", "instead of the block list"));
}

#[test]
fn word_rules() {
    let word = |word: u64, rest: &[u8]| [&word.to_be_bytes()[..], rest].concat();
    let bad = DecodeError::BadRamFlags { word: 0x1400, flags: 0x400 };
    assert_eq!(refusal(part, &word(0x1400, b"")), bad.into());
    assert_eq!(refusal(part, &word(0x80, b"")), Violation::RdmaRefused { word: 0x80 }.into());
    let first = Violation::FirstPageWithoutBlock { offset: 0x1000 };
    assert_eq!(refusal(part, &word(0x1028, b"")), first.into());
    let unknown = Violation::UnknownBlock { name: name("vga") };
    assert_eq!(refusal(part, &word(0x1008, b"\x03vga")), unknown.into());
    let invalid = DecodeError::BlockNameInvalid { name: String::new() };
    assert_eq!(refusal(part, &word(0x1008, b"\0")), invalid.into());
    let outside = Violation::PageOutsideBlock { block: name("pc.ram"), offset: 0x2000, len: 0x2000 };
    assert_eq!(refusal(part, &word(0x2008, b"\x06pc.ram")), outside.into());
    let fill = DecodeError::ZeroFillByte { offset: 0x1000, byte: 7 };
    assert_eq!(refusal(part, &word(0x1002, b"\x06pc.ram\x07")), fill.into());
    let header = DecodeError::XbzrleMalformed { what: "unknown header", at: 0 };
    assert_eq!(refusal(part, &word(0x1040, b"\x06pc.ram\x02")), header.into());
    let long = DecodeError::XbzrleMalformed { what: "longer than a page", at: 4097 };
    assert_eq!(refusal(part, &word(0x1040, b"\x06pc.ram\x01\x10\x01")), long.into());
    for len in [0, 8193, u32::MAX] {
        let last = [&word(0x1100, b"\x06pc.ram")[..], &len.to_be_bytes()].concat();
        assert_eq!(refusal(part, &last), Violation::CompressedPageLength { offset: 0x1000, len }.into());
    }
    let again = unexpected("block list", "after the first word of ram");
    assert_eq!(refusal(part, &word(0x1004, b"")), again);
    let setup = |out: &mut MainEncoder| {
        begin(out);
        out.ram_start(RAM, 0x1000).block(&BlockEntry::new(name("pc.ram"), 0x1000));
    };
    assert_eq!(refusal(setup, &word(0x8, b"\x06pc.ram")), Violation::PageBeforeFirstSync.into());
    let per_section = |out: &mut MainEncoder| {
        setup(out);
        out.eos().footer(RAM).ram_part(RAM, false);
    };
    let flush = unexpected("FLUSH", "in a stream without one in the START section of ram");
    assert_eq!(refusal(per_section, &word(0x200, b"")), flush);
}

#[test]
fn the_block_of_the_previous_page_is_remembered_across_sections() {
    let stream = bytes(|out| {
        part(out);
        out.zero_page(&name("pc.rom"), 0).eos().footer(RAM).ram_part(RAM, true).zero_page(&name("pc.rom"), 0x1000);
    });
    assert!(stream.ends_with(b"\0\0\0\0\0\0\x10\x22\0"), "without the block's name");
    let (items, result) = decode(&stream);
    assert_eq!(items.last(), Some(&Item::ZeroPage { block: 1, offset: 0x1000 }));
    assert!(result.is_ok());
}

#[test]
fn addresses_are_listed_with_x_ignore_shared() {
    let block = BlockEntry { gpa: Some(0xfffc_0000), ..BlockEntry::new(name("pc.bios"), 0x1000) };
    let stream = bytes(|out| {
        begin(out);
        out.config_capabilities(&["x-ignore-shared"]).ram_start(1, 0x1000).block(&block).eos().footer(1);
    });
    let (items, result) = decode(&stream);
    assert!(items.contains(&Item::Block(block)), "{items:?}");
    assert_eq!(result, Ok(1));
}

/// A mapped-ram file with two blocks, and its length.
fn mapped_ram(change: impl FnOnce(&mut BlockHeader)) -> Vec<u8> {
    let mut file = bytes(|out| {
        begin(out);
        out.config_capabilities(&["mapped-ram"]).ram_start(1, 0x3000);
    });
    let mut change = Some(change);
    for (block, len) in [("pc.ram", 0x2000), ("pc.rom", 0x1000)] {
        let header_end = (file.len() + 1 + block.len() + 8 + BlockHeader::LEN) as u64;
        let mut header = BlockHeader::place(header_end, len, PAGE as u64);
        let end = header.next_entry(len) as usize;
        if let Some(change) = change.take() {
            change(&mut header);
        }
        let entry = BlockEntry { mapped_ram: Some(header), ..BlockEntry::new(name(block), len) };
        file.extend(bytes(|out| _ = out.block(&entry)));
        file.resize(end, 0);
    }
    file.extend(bytes(|out| _ = out.eos().footer(1).ram_part(1, true)));
    file
}

#[test]
fn mapped_ram_files_skip_bitmap_and_pages_of_each_block() {
    let file = mapped_ram(|_| ());
    let (items, result) = decode_with(MainDecoder::within_file(PAGE, 0, file.len() as u64), &file);
    let blocks: Vec<_> = items.iter().filter(|item| matches!(item, Item::Block(_))).collect();
    assert_eq!(blocks.len(), 2);
    assert_eq!(items.last(), Some(&Item::RamPart { end: true }));
    assert_eq!(result, Ok(8));
    for (word, what) in [(0x200u64, "FLUSH in a mapped-ram file"), (8, "page in the stream of a mapped-ram file")] {
        let file = [&file[..], &word.to_be_bytes()].concat();
        let (_, result) = decode_with(MainDecoder::within_file(PAGE, 0, file.len() as u64), &file);
        assert_eq!(result.unwrap_err().source, Violation::NotAllowed { what }.into());
    }
}

#[test]
fn mapped_ram_headers_that_point_outside_the_file_are_refused() {
    let refused = |change: fn(&mut BlockHeader)| {
        let file = mapped_ram(change);
        let (_, result) = decode_with(MainDecoder::within_file(PAGE, 0, file.len() as u64), &file);
        match result.unwrap_err().source {
            ProtocolError::Violation(Violation::MappedRam { what, .. }) => what,
            other => panic!("{other}"),
        }
    };
    assert_eq!(refused(|header| header.pages_offset = 1 << 40), "pages end behind the end of the file");
    assert_eq!(refused(|header| header.pages_offset = u64::MAX << 12), "pages offset overflows");
    assert_eq!(refused(|header| header.bitmap_offset = 0), "bitmap does not begin where its header ends");
    // Without a known length, positions still cannot overflow.
    let (_, result) = decode(&mapped_ram(|header| header.pages_offset = (u64::MAX >> 1) & !0xfff));
    assert!(result.is_err());
}

/// A block list as QEMU 11.1 wrote it into a mapped-ram file, with `x-ignore-shared` on and `pc.ram` in a shared memory file.
#[test]
fn a_block_of_a_mapped_ram_file_whose_memory_is_elsewhere_has_no_place_in_it() {
    let header = *b"\0\0\0\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    assert_eq!(BlockHeader::decode(&header), Ok(Step::Item { item: BlockHeader::elsewhere(4096), used: header.len() }));
    let listed = |capabilities: &[&str], pages_offset| {
        let with_address = capabilities.len() > 1;
        let entry = |block, len, header| BlockEntry {
            gpa: with_address.then_some(0),
            mapped_ram: Some(header),
            ..BlockEntry::new(name(block), len)
        };
        let mut file = bytes(|out| {
            begin(out);
            out.config_capabilities(capabilities).ram_start(1, 0x200_1000);
            out.block(&entry("pc.ram", 0x200_0000, BlockHeader { pages_offset, ..BlockHeader::elsewhere(4096) }));
        });
        let header_end = (file.len() + 1 + 7 + 8 + 8 * usize::from(with_address) + BlockHeader::LEN) as u64;
        let bios = BlockHeader::place(header_end, 0x1000, 4096);
        file.extend(bytes(|out| _ = out.block(&entry("pc.bios", 0x1000, bios))));
        file.resize(bios.next_entry(0x1000) as usize, 0);
        file.extend(bytes(|out| _ = out.eos().footer(1).ram_part(1, true)));
        decode_with(MainDecoder::within_file(PAGE, 0, file.len() as u64), &file)
    };
    let (items, result) = listed(&["x-ignore-shared", "mapped-ram"], 0);
    assert_eq!(items.iter().filter(|item| matches!(item, Item::Block(_))).count(), 2);
    assert_eq!((items.last(), result), (Some(&Item::RamPart { end: true }), Ok(8)));
    // Without the capability, and with a place that is none, it is refused.
    for (capabilities, pages_offset) in [(&["mapped-ram"][..], 0), (&["x-ignore-shared", "mapped-ram"], 0x10_0000)] {
        let error = listed(capabilities, pages_offset).1.unwrap_err();
        assert!(error.to_string().contains("bitmap does not begin where its header ends"), "{error}");
    }
}

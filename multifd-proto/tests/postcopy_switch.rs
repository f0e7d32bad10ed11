//! The switch to postcopy on main: which elements may follow which.

use multifd_proto::BlockName;
use multifd_proto::Step;
use multifd_proto::command::{Command, PostcopyAdvice};
use multifd_proto::encoder::MainEncoder;
use multifd_proto::postcopy::{DiscardRange, Package};
use multifd_proto::ram::BlockEntry;
use multifd_proto::stream::{Item, MainDecoder, Section, SectionKind};
use proptest::prelude::*;

const PAGE: usize = 4096;
const RAM: u32 = 2;

/// What a stream is made of, behind the block list of a source that may switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    Full,
    Part,
    Flush,
    End,
    Discard,
    Ping,
    Package,
    Listen,
    Eof,
    Description,
}

/// Appends each of `pieces` and returns where it ends.
fn encode(pieces: &[Piece]) -> (Vec<u8>, Vec<usize>) {
    let block = BlockName::new("pc.ram").unwrap();
    let mut out = MainEncoder::default();
    out.header().configuration("pc-i440fx-10.0").command(&Command::OpenReturnPath);
    let advice = PostcopyAdvice { page_size_summary: PAGE as u64, page_size: PAGE as u64 };
    out.command(&Command::PostcopyAdvise(Some(advice)));
    out.ram_start(RAM, PAGE as u64).block(&BlockEntry::new(block.clone(), PAGE as u64)).flush().eos().footer(RAM);
    let mut ends = vec![out.bytes.len()];
    for piece in pieces {
        match piece {
            Piece::Full => {
                let kind = SectionKind::Full;
                out.section(&Section { kind, id: 7, name: "cpu".to_owned(), instance: 0, version: 1 });
                out.raw(&[9]).footer(7)
            }
            Piece::Part => out.ram_part(RAM, false).zero_page(&block, 0).eos().footer(RAM),
            Piece::Flush => out.ram_part(RAM, false).flush().eos().footer(RAM),
            Piece::End => out.ram_part(RAM, true).eos().footer(RAM),
            Piece::Discard => {
                let ranges = vec![DiscardRange { start: 0, len: PAGE as u64 }];
                out.command(&Command::PostcopyRamDiscard { block: block.clone(), ranges })
            }
            Piece::Ping => out.command(&Command::Ping(2)),
            Piece::Package => {
                let mut bytes = Vec::new();
                Package::encode(b"", &mut bytes);
                out.raw(&bytes)
            }
            Piece::Listen => out.command(&Command::PostcopyListen),
            Piece::Eof => out.eof(),
            Piece::Description => out.vm_description(b"{}"),
        };
        ends.push(out.bytes.len());
    }
    (out.bytes.clone(), ends)
}

/// How many of `pieces` are taken, and the decoder then.
fn decode(pieces: &[Piece]) -> (usize, MainDecoder) {
    let (bytes, ends) = encode(pieces);
    let (mut decoder, mut at) = (MainDecoder::new(PAGE), 0);
    loop {
        let Ok(Step::Item { item, used }) = decoder.step(&bytes[at..]) else {
            return (ends.iter().filter(|&&end| end <= at).count() - 1, decoder);
        };
        at += used + item.payload_len() as usize;
        if matches!(item, Item::Section(_)) {
            at += 1;
            decoder.body_taken(1);
        }
    }
}

/// The same by hand: how far a stream of `pieces` keeps the rules.
fn naive(pieces: &[Piece]) -> usize {
    let (mut discarded, mut packaged, mut ended, mut over, mut described) = (false, false, false, false, false);
    for (index, piece) in pieces.iter().enumerate() {
        let allowed = match piece {
            Piece::Ping => !over,
            Piece::Full => !over && !discarded && !packaged,
            Piece::Part => !over && !ended && (packaged || !discarded),
            Piece::Flush => !over && !ended && !discarded && !packaged,
            Piece::End => !over && !ended && (packaged || !discarded),
            Piece::Discard | Piece::Package => !over && !ended && !packaged,
            Piece::Listen => false,
            Piece::Eof => !over && ended,
            Piece::Description => over && !packaged && !described,
        };
        if !allowed {
            return index;
        }
        match piece {
            Piece::Discard => discarded = true,
            Piece::Package => packaged = true,
            Piece::End => ended = true,
            Piece::Eof => over = true,
            Piece::Description => described = true,
            _ => {}
        }
    }
    pieces.len()
}

#[test]
fn a_switch_as_every_source_makes_it_decodes() {
    use Piece::*;
    let pieces = [Part, Flush, Discard, Discard, Ping, Package, Ping, Part, Part, End, Eof];
    let (taken, decoder) = decode(&pieces);
    assert_eq!(taken, pieces.len());
    assert!(decoder.is_postcopy() && decoder.ram_ended() && decoder.finished());
}

#[test]
fn an_announced_switch_that_does_not_come_changes_nothing() {
    use Piece::*;
    let (taken, decoder) = decode(&[Part, End, Full, Eof, Description]);
    assert_eq!(taken, 5);
    assert!(!decoder.switches_to_postcopy() && decoder.finished());
}

/// What a decoder that goes on after a switch, which broke behind each of its last pieces, makes of `wire`: how many items it takes, and
/// what it says then.
fn resumed(wire: &MainEncoder) -> (usize, String, MainDecoder) {
    use Piece::*;
    let pieces = [Part, Discard, Package, Ping, Part, End];
    let mut outcomes: Vec<(usize, String, MainDecoder)> = (3..=pieces.len())
        .map(|len| {
            let mut decoder = decode(&pieces[..len]).1.resumed();
            let (mut items, mut at) = (0, 0);
            loop {
                match decoder.step(&wire.bytes[at..]) {
                    Ok(Step::Item { item, used }) => (items, at) = (items + 1, at + used + item.payload_len() as usize),
                    Ok(Step::Need(_)) => return (items, String::new(), decoder),
                    Err(error) => return (items, error.to_string(), decoder),
                }
            }
        })
        .collect();
    let last = outcomes.pop().unwrap();
    assert!(
        outcomes.iter().all(|(items, said, _)| (*items, said) == (last.0, &last.1)),
        "where it broke makes no difference"
    );
    last
}

/// A new connection has no header. The positions in it are its own, and its first page names its block.
#[test]
fn a_source_that_goes_on_asks_what_has_come_before_it_sends_the_rest() {
    let block = BlockName::new("pc.ram").unwrap();
    let asks = |out: &mut MainEncoder| _ = out.command(&Command::RecvBitmap { block: block.clone() });
    let mut whole = MainEncoder::default();
    asks(&mut whole);
    whole.command(&Command::PostcopyResume).ram_part(RAM, false).zero_page(&block, 0).eos().footer(RAM);
    whole.ram_part(RAM, true).eos().footer(RAM).eof();
    let (items, said, decoder) = resumed(&whole);
    assert_eq!((items, said.as_str()), (10, ""));
    assert!(decoder.is_postcopy() && !decoder.is_recovering() && decoder.ram_ended() && decoder.finished());
    assert_eq!(decoder.position(), whole.bytes.len() as u64);

    let refused = |build: &dyn Fn(&mut MainEncoder), message: &str| {
        let mut wire = MainEncoder::default();
        asks(&mut wire);
        build(&mut wire);
        let (_, said, decoder) = resumed(&wire);
        assert!(said.contains(message) && decoder.is_recovering(), "{said:?}, and not {message:?}");
    };
    refused(&asks, "RECV_BITMAP a second time for a block");
    let vga = BlockName::new("vga").unwrap();
    refused(&|out| _ = out.command(&Command::RecvBitmap { block: vga.clone() }), "block \"vga\" is unknown");
    refused(&|out| _ = out.ram_part(RAM, false), "SECTION_PART before POSTCOPY_RESUME");
    refused(&|out| _ = out.ram_part(RAM, true), "SECTION_END before POSTCOPY_RESUME");
    refused(&|out| _ = out.eof(), "EOF before POSTCOPY_RESUME");
    refused(&|out| _ = out.command(&Command::OpenReturnPath), "OPEN_RETURN_PATH before POSTCOPY_RESUME");
    refused(&|out| _ = out.command(&Command::Packaged { len: 5 }), "PACKAGED before POSTCOPY_RESUME");
    let mut again = MainEncoder::default();
    again.command(&Command::PostcopyResume).command(&Command::PostcopyResume);
    assert!(resumed(&again).1.contains("POSTCOPY_RESUME: an interrupted postcopy"), "{}", resumed(&again).1);
    let mut nameless = MainEncoder::default();
    nameless.command(&Command::PostcopyResume).ram_part(RAM, false).raw(&[0, 0, 0, 0, 0, 0, 0, 0x28]);
    assert!(resumed(&nameless).1.contains("no block was named before"), "{}", resumed(&nameless).1);
}

proptest! {
    #[test]
    fn elements_of_a_switch_follow_one_another_as_a_second_reading_of_the_rules_says(
        pieces in prop::collection::vec(
            prop_oneof![
                4 => Just(Piece::Part), 1 => Just(Piece::Full), 1 => Just(Piece::Flush), 2 => Just(Piece::End),
                3 => Just(Piece::Discard), 1 => Just(Piece::Ping), 3 => Just(Piece::Package), 1 => Just(Piece::Listen),
                2 => Just(Piece::Eof), 1 => Just(Piece::Description),
            ],
            0..10,
        ),
    ) {
        let (taken, decoder) = decode(&pieces);
        prop_assert_eq!(taken, naive(&pieces), "{:?}", pieces);
        prop_assert_eq!(decoder.is_postcopy(), pieces[..taken].contains(&Piece::Package));
    }
}

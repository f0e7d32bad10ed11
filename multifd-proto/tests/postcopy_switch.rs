//! The switch to postcopy on main: which elements may follow which.

use multifd_proto::BlockName;
use multifd_proto::command::{Command, PostcopyAdvice};
use multifd_proto::encoder::MainEncoder;
use multifd_proto::postcopy::{DiscardRange, package};
use multifd_proto::ram::BlockEntry;
use multifd_proto::stream::{Item, MainDecoder, Section, SectionKind, Step};
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
    let mut out = MainEncoder::new();
    out.header().configuration("pc-i440fx-10.0").command(&Command::OpenReturnPath);
    let advice = PostcopyAdvice { page_size_summary: PAGE as u64, page_size: PAGE as u64 };
    out.command(&Command::PostcopyAdvise(Some(advice)));
    out.ram_start(RAM, PAGE as u64).block(&BlockEntry::new(block.clone(), PAGE as u64)).flush().eos().footer(RAM);
    let mut ends = vec![out.as_bytes().len()];
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
                package::encode(b"", &mut bytes);
                out.raw(&bytes)
            }
            Piece::Listen => out.command(&Command::PostcopyListen),
            Piece::Eof => out.eof(),
            Piece::Description => out.vm_description(b"{}"),
        };
        ends.push(out.as_bytes().len());
    }
    (out.as_bytes().to_vec(), ends)
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
    assert!(!decoder.is_snapshot());
}

#[test]
fn an_announced_switch_that_does_not_come_changes_nothing() {
    use Piece::*;
    let (taken, decoder) = decode(&[Part, End, Full, Eof, Description]);
    assert_eq!(taken, 5);
    assert!(decoder.may_switch_to_postcopy() && !decoder.switches_to_postcopy() && decoder.finished());
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

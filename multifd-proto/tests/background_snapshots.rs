//! Streams without an END section of `ram`: which of them are background snapshots.

use multifd_proto::BlockName;
use multifd_proto::Step;
use multifd_proto::Violation;
use multifd_proto::command::{Command, PostcopyAdvice};
use multifd_proto::encoder::MainEncoder;
use multifd_proto::extension::{Extensions, Offer};
use multifd_proto::ram::BlockEntry;
use multifd_proto::stream::{Item, MainDecoder, Section, SectionKind};
use proptest::prelude::*;

const PAGE: usize = 4096;
const RAM: u32 = 2;

/// What a stream is made of, behind its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    OpenReturnPath,
    Advise,
    Start { flush: bool },
    Full,
    Part,
    End,
    Eof,
    Description,
}

fn encode(pieces: &[Piece]) -> Vec<u8> {
    let block = BlockName::new("pc.ram").unwrap();
    let mut out = MainEncoder::default();
    out.header().configuration("pc-i440fx-10.0");
    for piece in pieces {
        match piece {
            Piece::OpenReturnPath => out.command(&Command::OpenReturnPath),
            Piece::Advise => {
                let advice = PostcopyAdvice { page_size_summary: PAGE as u64, page_size: PAGE as u64 };
                out.command(&Command::PostcopyAdvise(Some(advice)))
            }
            Piece::Start { flush } => {
                out.ram_start(RAM, PAGE as u64).block(&BlockEntry::new(block.clone(), PAGE as u64));
                if *flush {
                    out.flush();
                }
                out.eos().footer(RAM)
            }
            Piece::Full => {
                let kind = SectionKind::Full;
                out.section(&Section { kind, id: 7, name: "cpu".to_owned(), instance: 0, version: 1 });
                out.raw(&[9]).footer(7)
            }
            Piece::Part => out.ram_part(RAM, false).zero_page(&block, 0).eos().footer(RAM),
            Piece::End => out.ram_part(RAM, true).eos().footer(RAM),
            Piece::Eof => out.eof(),
            Piece::Description => out.vm_description(b"{}"),
        };
    }
    out.bytes.clone()
}

/// Decodes all of `bytes`, whose devices have bodies of one byte, and returns the decoder.
fn decode(bytes: &[u8]) -> Result<MainDecoder, Violation> {
    let (mut decoder, mut at) = (MainDecoder::new(PAGE), 0);
    loop {
        let step = decoder.step(&bytes[at..]).map_err(|error| match error.source {
            multifd_proto::ProtocolError::Violation(violation) => violation,
            other => panic!("{other}"),
        })?;
        let Step::Item { item, used } = step else { return Ok(decoder) };
        at += used + item.payload_len() as usize;
        if matches!(item, Item::Section(_)) {
            at += 1;
            decoder.body_taken(1);
        }
    }
}

const START: Piece = Piece::Start { flush: false };

#[test]
fn devices_behind_the_last_part_and_the_end_of_state_are_a_snapshot() {
    for pieces in [
        &[START, Piece::Part, Piece::Full, Piece::Full, Piece::Eof, Piece::Description][..],
        &[START, Piece::Part, Piece::Part, Piece::Full, Piece::Eof],
        &[Piece::Full, START, Piece::Full, Piece::Part, Piece::Full, Piece::Eof, Piece::Description],
    ] {
        let decoder = decode(&encode(pieces)).unwrap();
        assert!(decoder.state_ended() && !decoder.ram_ended(), "{pieces:?}");
    }
}

#[test]
fn a_device_between_two_parts_was_needed_early() {
    let pieces = [START, Piece::Part, Piece::Full, Piece::Part, Piece::Full, Piece::End, Piece::Full, Piece::Eof];
    let decoder = decode(&encode(&pieces)).unwrap();
    assert!(decoder.ram_ended());
}

#[test]
fn the_end_of_state_without_end_of_ram_is_refused_where_it_cannot_be_a_snapshot() {
    let refused = Violation::UnexpectedElement { element: "EOF", place: "before the END section of ram" };
    for pieces in [
        // Nothing says that the pages are over.
        &[START, Piece::Part, Piece::Eof][..],
        &[START, Piece::Part, Piece::Full, Piece::Part, Piece::Eof],
        // No page came.
        &[START, Piece::Full, Piece::Eof],
        // Such a source waits for an answer, and ends otherwise.
        &[Piece::OpenReturnPath, START, Piece::Part, Piece::Full, Piece::Eof],
        &[Piece::Advise, START, Piece::Part, Piece::Full, Piece::Eof],
        // A source with channels.
        &[Piece::Start { flush: true }, Piece::Part, Piece::Full, Piece::Eof],
    ] {
        assert_eq!(decode(&encode(pieces)).map(drop), Err(refused.clone()), "{pieces:?}");
    }
}

#[test]
fn a_source_of_ours_sends_no_snapshot() {
    let mut bytes = encode(&[]);
    let offer = Offer { channels: 1, token: None, extensions: Extensions::known() };
    bytes.extend_from_slice(&MainEncoder::default().config_offer(&offer).bytes);
    let rest = encode(&[START, Piece::Part, Piece::Full, Piece::Eof]);
    bytes.extend_from_slice(&rest[encode(&[]).len()..]);
    let refused = Violation::UnexpectedElement { element: "EOF", place: "before the END section of ram" };
    assert_eq!(decode(&bytes).map(drop), Err(refused));
}

proptest! {
    /// Whatever comes, a stream is a snapshot only if no command came, no END, and a device behind the last PART.
    #[test]
    fn a_snapshot_has_its_last_device_behind_its_last_part(
        pieces in prop::collection::vec(
            prop_oneof![
                Just(Piece::OpenReturnPath), Just(START), Just(Piece::Full), Just(Piece::Part), Just(Piece::Part),
                Just(Piece::End), Just(Piece::Eof), Just(Piece::Description),
            ],
            0..10,
        ),
        start: bool,
    ) {
        let pieces = if start { [&[START], &pieces[..], &[Piece::Eof]].concat() } else { pieces };
        let Ok(decoder) = decode(&encode(&pieces)) else { return Ok(()) };
        let before_eof = pieces.split(|piece| *piece == Piece::Eof).next().unwrap();
        let last = |wanted| before_eof.iter().rposition(|piece| *piece == wanted);
        let has_eof = before_eof.len() < pieces.len();
        let shape = !before_eof.contains(&Piece::OpenReturnPath) && last(Piece::End).is_none();
        let behind = last(Piece::Part).is_some() && last(Piece::Full) > last(Piece::Part);
        prop_assert_eq!(decoder.state_ended() && !decoder.ram_ended(), has_eof && shape && behind, "{:?}", pieces);
    }
}

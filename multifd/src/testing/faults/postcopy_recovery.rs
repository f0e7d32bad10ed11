//! Sources of postcopy that lose their connections and go on over new ones: wherever that happens, each page is taken once.

use std::{thread, time::Duration};

use multifd_proto::{
    Codec, Step,
    command::Command,
    mapped_ram::{bitmap_len, is_set},
    postcopy::received,
    return_path::Message,
};

use super::{postcopy::*, script::*};
use crate::{
    destination::{Destination, Handle, Mode, Options, Report},
    error::Error,
    ram::Ram,
    stop::StopHandle,
    testing::{
        memory::{self, MemoryConnector},
        vm::TestDestination,
    },
    transport::{Connect, Stream},
};

/// A source of the VM in [`given_away`], whose pages have the content that [`DISCARDED`] says.
struct Scripted {
    connector: MemoryConnector,
    /// Of channels, for sources that have some.
    channel: Option<Wire>,
}

/// What a destination said about the pages of a block.
type Bitmap = (String, Vec<u8>);

impl Scripted {
    /// Says `wire` on a new main and waits for the answers to all PINGs.
    fn begins(&self, wire: &[u8]) -> Box<dyn Stream> {
        let mut main = self.connector.connect().unwrap();
        main.write(wire, &[]).unwrap();
        answers_until(&mut *main, |answer| *answer == Message::Pong(4));
        main
    }

    /// Asks over a new connection for what has come. `None` where the destination ends that without an answer.
    fn asks(&self) -> Option<(Box<dyn Stream>, Vec<Bitmap>)> {
        Self::asks_on(self.connector.connect().ok()?)
    }

    fn asks_on(mut main: Box<dyn Stream>) -> Option<(Box<dyn Stream>, Vec<Bitmap>)> {
        main.write(&asks(&["ram", "rom"]), &[]).ok()?;
        let bitmaps = bitmaps(&mut *main, &BLOCKS)?;
        Some((main, bitmaps))
    }

    /// Goes on over new connections until the destination has everything, or listens no more. Returns how many pages it told to have
    /// before each.
    fn goes_on(&self) -> Vec<usize> {
        let mut told = Vec::new();
        loop {
            let Ok(main) = self.connector.connect() else { return told };
            let Some((mut main, bitmaps)) = Self::asks_on(main) else { continue };
            told.push(here(&bitmaps).len());
            let rest = missing(&bitmaps);
            let wire = [resume(), part(&rest, false), end()].concat();
            if main.write(&wire, &[]).is_ok()
                && answers_until(&mut *main, |answer| matches!(answer, Message::Shut(_))).ends_with(&[Message::Shut(0)])
            {
                return told;
            }
        }
    }
}

fn asks(blocks: &[&str]) -> Vec<u8> {
    blocks.iter().flat_map(|name| encoded(|out| out.command(&Command::RecvBitmap { block: block(name) }))).collect()
}

fn resume() -> Vec<u8> {
    encoded(|out| out.command(&Command::PostcopyResume))
}

/// Pages as a preempt connection brings them.
fn words(pages: &[(&str, u64, u8)]) -> Vec<u8> {
    let bytes = part(pages, false);
    bytes[5..bytes.len() - 8 - 5].to_vec()
}

const LAST_WORD: &[u8] = b"\0\0\0\0\0\0\0\x10";

/// Reads answers up to one that is `last`, or to the end.
fn answers_until(main: &mut dyn Stream, last: impl Fn(&Message) -> bool) -> Vec<Message> {
    let (mut answers, mut bytes, mut part) = (Vec::new(), Vec::new(), [0; 1]);
    while !answers.last().is_some_and(&last) && main.read(&mut part).is_ok_and(|n| n > 0) {
        bytes.extend_from_slice(&part);
        if let Ok(Step::Item { item, .. }) = Message::decode(&bytes) {
            answers.push(item);
            bytes.clear();
        }
    }
    answers
}

/// Reads the answers to [`asks`] for `blocks`.
fn bitmaps(main: &mut dyn Stream, blocks: &[(&str, usize)]) -> Option<Vec<Bitmap>> {
    blocks
        .iter()
        .map(|(name, pages)| {
            let message = answers_until(main, |_| true).pop()?;
            assert_eq!(message, Message::RecvBitmap { block: block(name) });
            let mut bytes = vec![0; 8 + bitmap_len(*pages as u64, 1) as usize + 8];
            main.read_exact(&mut bytes).ok()?;
            let Ok(Step::Item { item, .. }) = received::decode(&bytes, *pages as u64) else { panic!("{bytes:?}") };
            Some(((*name).to_owned(), item.to_vec()))
        })
        .collect()
}

/// Which pages of [`DISCARDED`] are there.
fn here(bitmaps: &[Bitmap]) -> Vec<(&'static str, u64, u8)> {
    let is_here = |(name, page, _): &(&'static str, u64, u8)| {
        bitmaps.iter().any(|(block, bitmap)| block == name && is_set(bitmap, *page as usize))
    };
    // Those that came in the rounds and were not discarded.
    for page in [0, 1, 5] {
        assert!(is_here(&("ram", page, 0)), "page {page}");
    }
    DISCARDED.into_iter().filter(is_here).collect()
}

fn missing(bitmaps: &[Bitmap]) -> Vec<(&'static str, u64, u8)> {
    let here = here(bitmaps);
    DISCARDED.into_iter().filter(|page| !here.contains(page)).collect()
}

/// Waits for a source for as long as a test takes.
fn patient() -> Options {
    Options { recover_limit: Duration::from_secs(600), ..no_channels(true) }
}

/// Lets a destination receive from `source`, which runs in a thread of its own. Returns also what that returned.
fn received_from<T: Send + 'static>(
    options: Options,
    channel: Option<Wire>,
    source: impl FnOnce(Scripted, StopHandle) -> T + Send + 'static,
) -> (Result<Report, Error>, Vec<&'static str>, Ram, T) {
    steered(options, channel, |scripted, stop, _| source(scripted, stop))
}

/// The same for a `source` that steers the destination, too.
fn steered<T: Send + 'static>(
    options: Options,
    channel: Option<Wire>,
    source: impl FnOnce(Scripted, StopHandle, Handle) -> T + Send + 'static,
) -> (Result<Report, Error>, Vec<&'static str>, Ram, T) {
    test_support::time_limit(Duration::from_secs(120), || {
        let (listener, connector) = memory::listener(1 << 20);
        let destination = Destination::new(options);
        let (stop, handle) = (destination.stop_handle(), destination.handle());
        let source = thread::spawn(move || source(Scripted { connector, channel }, stop, handle));
        let ram = guarded_ram();
        let mut vm = TestDestination::new(ram.clone());
        let outcome = destination.run(&mut vm, Box::new(listener), &mut ());
        let calls = vm.calls();
        drop(vm);
        let said = source.join().unwrap();
        assert_eq!(ram.handles(), 1, "a thread still has the memory");
        (outcome, calls, ram, said)
    })
}

#[track_caller]
fn assert_whole(outcome: Result<Report, Error>, calls: &[&str], ram: &Ram) -> Report {
    let report = outcome.unwrap();
    assert_eq!((report.mode, calls), (Mode::Postcopy, &["prepare", "load", "start"][..]));
    let first_byte = |page: u64| ram.page_bytes(page)[PAGE - 1];
    assert_eq!((0..8).map(first_byte).collect::<Vec<_>>(), [0x10, 0x11, 0x72, 0, 0x74, 0x15, 0x76, 0]);
    let rom = ram.layout().blocks()[1].first_page();
    assert_eq!([first_byte(rom), first_byte(rom + 1)], [0x80, 0x81]);
    report
}

/// The migration failed with the connection, although its source waited to go on: the VM was in two halves, and had to be given back.
#[test]
fn a_source_that_goes_on_is_taken_wherever_its_connection_broke() {
    let whole = [given_away().bytes, part(&DISCARDED, false), end()].concat();
    let before = given_away().len() as usize;
    // Words, pages and the end are cut; the last byte is the end of the state.
    let cuts = (before..whole.len() - 1).step_by(701).chain(whole.len() - 20..whole.len());
    for cut in cuts {
        let wire = whole[..cut].to_vec();
        let (outcome, calls, ram, told) = received_from(patient(), None, move |source, _| {
            drop(source.begins(&wire));
            source.goes_on()
        });
        let report = assert_whole(outcome, &calls, &ram);
        // Each page of 4096 bytes and its word; two of the seven are words only.
        let content = |pages: usize| DISCARDED[..pages].iter().filter(|(.., fill)| *fill > 0).count();
        let at_least = (0..=7).rev().find(|&pages| content(pages) * (PAGE + 13) + pages * 14 + 5 <= cut - before);
        assert_eq!((told.len(), report.recoveries), (1, 1), "{cut}");
        assert!(told[0] >= at_least.unwrap_or(0), "{cut}: {} of {at_least:?} pages were kept", told[0]);
    }
}

#[test]
fn a_source_goes_on_any_number_of_times_and_no_page_comes_twice() {
    let (outcome, calls, ram, told) = received_from(patient(), None, |source, _| {
        drop(source.begins(&given_away().bytes));
        let mut told = Vec::new();
        for _ in 0..DISCARDED.len() - 1 {
            let (mut main, bitmaps) = source.asks().unwrap();
            told.push(here(&bitmaps).len());
            let rest = missing(&bitmaps);
            let one = [resume(), part(&rest[..1], false)].concat();
            // It ends in the middle of the next page.
            main.write(&[one, part(&rest[1..2], false)[..9].to_vec()].concat(), &[]).unwrap();
            answers_until(&mut *main, |answer| *answer == Message::ResumeAck(1));
        }
        told.extend(source.goes_on());
        told
    });
    let report = assert_whole(outcome, &calls, &ram);
    assert_eq!((told, report.recoveries), ((0..7).collect(), 7));
}

/// What `migrate-pause` is for: the network says nothing, and an operator knows that nothing will come.
#[test]
fn a_destination_gives_its_connections_up_when_it_is_told_to_and_only_where_the_source_can_go_on() {
    let (outcome, calls, ram, told) = steered(patient(), None, |source, _, handle| {
        assert!(!handle.pause(), "no source has come");
        let mut main = source.begins(&given_away().bytes);
        main.write(&part(&DISCARDED[..2], false), &[]).unwrap();
        assert!(handle.pause());
        // To its end.
        answers_until(&mut *main, |_| false);
        let told = source.goes_on();
        assert!(!handle.pause(), "every page is here");
        told
    });
    assert_eq!((told.len(), assert_whole(outcome, &calls, &ram).recoveries), (1, 1));
    let (outcome, calls, ram, ()) = steered(no_channels(true), None, |source, _, handle| {
        let mut main = source.begins(&given_away().bytes);
        assert!(!handle.pause(), "the source is not waited for");
        main.write(&[part(&DISCARDED, false), end()].concat(), &[]).unwrap();
        assert!(answers_until(&mut *main, |answer| matches!(answer, Message::Shut(_))).ends_with(&[Message::Shut(0)]));
    });
    assert_eq!(assert_whole(outcome, &calls, &ram).recoveries, 0);
}

/// A page that a thread of an old connection places after the source was told that it is missing would come twice.
#[test]
fn pages_of_old_and_new_preempt_connections_are_placed_once() {
    for cut in [0, 1, 3000] {
        let (outcome, calls, ram, ()) = received_from(patient(), None, move |source, _| {
            let main = source.begins(&given_away().bytes);
            let mut preempt = source.connector.connect().unwrap();
            let bytes = words(&DISCARDED[..4]);
            preempt.write(&bytes[..bytes.len() - cut], &[]).unwrap();
            drop((main, preempt));
            loop {
                let Some((mut main, bitmaps)) = source.asks() else { continue };
                let rest = missing(&bitmaps);
                let (urgent, others) = rest.split_at(rest.len() / 2);
                let mut preempt = source.connector.connect().unwrap();
                preempt.write(&[&words(urgent), LAST_WORD].concat(), &[]).unwrap();
                main.write(&[resume(), part(others, false), end()].concat(), &[]).unwrap();
                let answers = answers_until(&mut *main, |answer| matches!(answer, Message::Shut(_)));
                assert_eq!(answers, [Message::ResumeAck(1), Message::Shut(0)]);
                break;
            }
        });
        assert_eq!(assert_whole(outcome, &calls, &ram).recoveries, 1);
    }
}

/// Channels are open and silent from the switch on, and break with main.
#[test]
fn channels_that_break_with_main_end_nothing() {
    for more in [vec![], packet(&multifd_proto::packet::PacketHeader::sync_packet(0))[..100].to_vec()] {
        let channel = Wire::channel(0).sync().then(more);
        let options = Options { channels: Some(1), ..patient() };
        let (outcome, calls, ram, told) = received_from(options, Some(channel), |source, _| {
            let first: Vec<_> = (0..6).map(|page| ("ram", page, 0x10 + page as u8)).collect();
            let wire = announced(true).then(part(&first, false));
            let wire = wire.then(discard("ram", 2..5)).then(discard("ram", 6..8)).then(discard("rom", 0..2));
            let mut channel = source.connector.connect().unwrap();
            channel.write(&source.channel.as_ref().unwrap().bytes, &[]).unwrap();
            let main = source.begins(&wire.then(packaged()).then(part(&DISCARDED[..3], false)).bytes);
            drop(channel);
            drop(main);
            source.goes_on()
        });
        assert_eq!((told, assert_whole(outcome, &calls, &ram).recoveries), (vec![3], 1));
    }
}

/// The migration failed with the connection although nothing was missing, also where no source is waited for.
#[test]
fn a_preempt_connection_that_breaks_when_every_page_is_in_place_ends_nothing() {
    for options in [no_channels(true), patient()] {
        let (outcome, calls, ram, told) = received_from(options, None, |source, _| {
            let main = &mut *source.begins(&given_away().bytes);
            let mut preempt = source.connector.connect().unwrap();
            let first = words(&DISCARDED[..1]);
            preempt.write(&first, &[]).unwrap();
            main.write(&part(&DISCARDED[1..], false), &[]).unwrap();
            main.write(&encoded(|out| out.command(&Command::Ping(7))), &[]).unwrap();
            answers_until(main, |answer| *answer == Message::Pong(7));
            // Its page comes before this, and those of main are in place.
            preempt.write(&first[..3], &[]).unwrap();
            preempt.finish().unwrap();
            // To its end: what that meant has been decided.
            assert!(!preempt.read(&mut [0; 1]).is_ok_and(|n| n > 0));
            let _ = main.write(&end(), &[]);
            answers_until(main, |answer| matches!(answer, Message::Shut(_)))
        });
        assert_eq!(assert_whole(outcome, &calls, &ram).recoveries, 0);
        assert_eq!(told, [Message::Shut(0)]);
    }
}

/// What says that it goes on and does not is waited for no longer, and the one that does is taken then.
#[test]
fn a_connection_that_breaks_a_rule_before_it_goes_on_is_dropped() {
    let page = part(&[("ram", 2, 7)], false);
    for wrong in [
        asks(&["vga"]),
        asks(&["ram", "ram"]),
        [asks(&["ram"]), page].concat(),
        [asks(&["ram", "rom"]), b"\0".to_vec()].concat(),
        [asks(&["ram"]), packaged()].concat(),
        asks(&["ram"]),
    ] {
        let (outcome, calls, ram, told) = received_from(patient(), None, move |source, _| {
            drop(source.begins(&[given_away().bytes, part(&DISCARDED[..1], false)].concat()));
            let mut main = source.connector.connect().unwrap();
            main.write(&wrong, &[]).unwrap();
            main.finish().unwrap();
            // To its end.
            answers_until(&mut *main, |_| false);
            source.goes_on()
        });
        assert_eq!((told, assert_whole(outcome, &calls, &ram).recoveries), (vec![1], 1));
    }
}

/// The source may notice that its connections are gone before this end does.
#[test]
fn a_connection_that_comes_before_the_old_one_has_ended_waits() {
    let (outcome, calls, ram, ()) = received_from(patient(), None, |source, _| {
        let main = source.begins(&[given_away().bytes, part(&DISCARDED[..2], false)].concat());
        let mut next = source.connector.connect().unwrap();
        next.write(&asks(&["ram", "rom"]), &[]).unwrap();
        drop(main);
        let bitmaps = bitmaps(&mut *next, &BLOCKS);
        drop(next);
        assert!(bitmaps.is_none_or(|bitmaps| here(&bitmaps).len() == 2));
        source.goes_on();
    });
    assert_whole(outcome, &calls, &ram);
}

/// A network that is gone says nothing. The limit ended the migration, and with it the half of the VM that was here.
#[test]
fn a_source_that_is_silent_may_go_on_over_new_connections() {
    // Longer than the source takes to begin, on a busy machine, too.
    let options = Options { stall_limit: Some(Duration::from_secs(1)), ..patient() };
    let (outcome, calls, ram, ()) = received_from(options, None, |source, _| {
        let mut main = source.begins(&[given_away().bytes, part(&DISCARDED[..2], false)].concat());
        answers_until(&mut *main, |_| false);
        source.goes_on();
    });
    assert!(assert_whole(outcome, &calls, &ram).recoveries >= 1);
}

#[test]
fn a_source_that_does_not_go_on_is_waited_for_no_longer_than_the_limit() {
    let options = || Options { recover_limit: Duration::from_millis(100), ..no_channels(true) };
    let (outcome, calls, _, ()) = received_from(options(), None, |source, _| drop(source.begins(&given_away().bytes)));
    let error = outcome.unwrap_err();
    let Error::AfterRun { reason, .. } = &error else { panic!("{error}") };
    assert!(matches!(**reason, Error::NotContinued { .. }), "{error}");
    assert!(error.to_string().contains("; the source did not go on over new connections within 0.1 s; "), "{error}");
    assert_eq!(calls, ["prepare", "abandon"]);
    // One that comes again and again and brings no page prolongs nothing.
    let (outcome, ..) = received_from(options(), None, |source, _| {
        drop(source.begins(&given_away().bytes));
        while let Ok(mut main) = source.connector.connect() {
            let _ = main.write(&[asks(&["ram", "rom"]), resume()].concat(), &[]);
            answers_until(&mut *main, |answer| *answer == Message::RecvBitmap { block: block("ram") });
        }
    });
    assert!(matches!(outcome.unwrap_err(), Error::AfterRun { .. }));
}

#[test]
fn a_cancel_ends_the_wait_for_a_source_that_goes_on() {
    let (outcome, ..) = received_from(patient(), None, |source, stop| {
        drop(source.begins(&given_away().bytes));
        stop.cancel();
    });
    let error = outcome.unwrap_err();
    assert!(matches!(&error, Error::AfterRun { reason, .. } if matches!(**reason, Error::Cancelled)), "{error}");
}

/// A rule that is broken after the source went on is broken by the source: nothing of it is waited for.
#[test]
fn a_source_that_goes_on_and_breaks_a_rule_ends_the_migration() {
    for (wire, message) in [
        (part(&[("ram", 1, 7)], false), "is not one that was discarded and is missing"),
        ([part(&DISCARDED[1..], false), part(&DISCARDED[1..2], false)].concat(), "is not one that was discarded"),
        (asks(&["ram"]), "RECV_BITMAP"),
        (end(), "7 of the 7 pages that were discarded at the switch to postcopy are missing"),
    ] {
        let (outcome, calls, ..) = received_from(patient(), None, move |source, _| {
            drop(source.begins(&given_away().bytes));
            let (mut main, _) = source.asks().unwrap();
            let _ = main.write(&[resume(), wire].concat(), &[]);
            answers_until(&mut *main, |_| false);
        });
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains(message) && error.is_peers_fault(), "{error}");
        assert_eq!(calls, ["prepare", "abandon"]);
    }
}

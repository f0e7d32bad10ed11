//! Connections of strangers, of every kind and at every moment: none ends a migration or holds it up.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use multifd_proto::{
    encoder::MainEncoder,
    extension::{Extensions, Offer},
    packet::{HELLO_LEN, Hello},
};
use test_support::{TempDir, time_limit};

use super::script::*;
use crate::{
    destination::{Destination, Options},
    error::Error,
    source::{self, Source},
    testing::faulty::Faults,
    testing::memory,
    testing::vm::{TestDestination, TestSource},
    transport::{Connect, Stream, uri::Uri},
};

/// Every kind of stranger that knows no token, uuid or secret, with what it says. They stay open unless they end.
fn strangers() -> Vec<(&'static str, Wire)> {
    let other = Hello { uuid: [2; 16], ..told_hello(1, 2) };
    let mut version = Wire::channel(1);
    version.bytes[7] = 2;
    vec![
        ("comes and goes", Wire::default().ends()),
        ("is silent", Wire::default()),
        ("HTTP", Wire::raw(*b"GET / HTTP/1.1\r\n\r\n")),
        ("TLS", Wire::raw(*b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")),
        ("SSH", Wire::raw(*b"SSH-2.0-scanner\r\n")),
        ("noise", Wire::raw([0xff; 200])),
        ("one byte", Wire::raw(*b"Q").ends()),
        ("part of a main", Wire::raw(*b"QEV").ends()),
        ("part of a hello", Wire::raw(&Wire::channel(0).bytes[..63]).ends()),
        ("part of a hello, open", Wire::raw(&Wire::channel(0).bytes[..20])),
        ("hello of another version", version),
        ("hello and gone", Wire::channel(1).ends()),
        ("hello and a part of a packet", Wire::channel(1).then([0x11, 0x22, 0x33]).ends()),
        ("an id that does not exist", Wire::channel(200)),
        ("the same, with SYNC", Wire::channel(200).sync()),
        ("another VM", Wire::raw(other.encode()).sync()),
        ("another number of channels", Wire::raw(told_hello(1, 7).encode()).sync()),
    ]
}

/// A whole migration with two channels, of a source that says so.
fn migration() -> [Wire; 3] {
    let channel = |id| channel_of_two(told_hello(id, 2), 0x1000 * (1 + u64::from(id)));
    [Wire::main().then(&main_end().bytes), channel(0), channel(1)]
}

/// One of two channels of a source that says so, each of which sends one page.
fn channel_of_two(hello: Hello, page: u64) -> Wire {
    let id = u64::from(hello.channel.0);
    Wire::raw(hello.encode()).sync_number(id).then(pages(&[page])).sync_number(4 + id)
}

/// Whether the pages of [`migration`] are in place and no others.
fn arrived(ram: &crate::ram::Ram) -> bool {
    (0..8).all(|page| ram.page_bytes(page) == [if page == 1 || page == 2 { 0x5a } else { 0 }; PAGE])
}

/// How far a migration is when the stranger comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    BeforeMain,
    AfterMain,
    AfterTheFirstChannel,
}

/// Whether `kind` is known for a stranger only when a channel has joined: main says nothing about uuid and number of
/// channels, so the first channel decides. See docs/security.md.
fn needs_a_channel(kind: &str) -> bool {
    ["the same, with SYNC", "another VM", "another number of channels"].contains(&kind)
}

/// Whether the destination drops `kind` without waiting for anything.
fn is_dropped_at_once(kind: &str, moment: Moment) -> bool {
    !["is silent", "part of a hello, open", "an id that does not exist"].contains(&kind)
        || kind == "an id that does not exist" && moment == Moment::AfterTheFirstChannel
}

fn open(connector: &memory::MemoryConnector, wire: &Wire) -> Option<Box<dyn Stream>> {
    let mut stream = connector.connect().unwrap();
    // A stranger may be dropped while it speaks.
    let _ = stream.write(&wire.bytes, &[]);
    (!wire.ends).then_some(stream)
}

/// A migration beside which `stranger` connects at `moment`; it is seen to be dropped, if it is, before the next comes.
fn beside(kind: &str, stranger: &Wire, moment: Moment) -> Received {
    time_limit(Duration::from_secs(60), || {
        let (listener, connector) = memory::listener(1 << 24);
        let destination = Destination::new(Options::default());
        let progress = destination.progress();
        let ram = guarded_ram();
        let mut vm = TestDestination::new(ram.clone());
        let receiver = thread::spawn(move || {
            let outcome = destination.run(&mut vm, Box::new(listener), &mut ());
            (outcome, vm.calls())
        });
        let [main, first, second] = migration();
        let mut streams = Vec::new();
        let meet_stranger = |streams: &mut Vec<_>| {
            let Some(mut stream) = open(&connector, stranger) else { return };
            if is_dropped_at_once(kind, moment) {
                assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{kind}");
            }
            streams.push(Some(stream));
        };
        if moment == Moment::BeforeMain {
            meet_stranger(&mut streams);
        }
        streams.push(open(&connector, &main));
        if moment == Moment::AfterMain {
            meet_stranger(&mut streams);
        }
        streams.push(open(&connector, &first));
        if moment == Moment::AfterTheFirstChannel {
            while progress.channel_bytes(1)[0] == 0 {
                thread::yield_now();
            }
            meet_stranger(&mut streams);
        }
        streams.push(open(&connector, &second));
        while progress.channel_bytes(2)[1] == 0 && !receiver.is_finished() {
            thread::yield_now();
        }
        // The destination waits for the end of main.
        let main = streams.remove(usize::from(moment == Moment::BeforeMain && !stranger.ends));
        let answers = answers_on(main.expect("it stays open"));
        let (outcome, calls) = receiver.join().unwrap();
        Received { outcome, calls, ram, answers }
    })
}

#[test]
fn strangers_of_every_kind_do_not_disturb_a_migration() {
    let mut tried = 0;
    for (kind, stranger) in strangers() {
        for moment in [Moment::BeforeMain, Moment::AfterMain, Moment::AfterTheFirstChannel] {
            if needs_a_channel(kind) && moment != Moment::AfterTheFirstChannel {
                continue;
            }
            if moment == Moment::BeforeMain && kind.starts_with("hello and") {
                // Ends by itself.
                assert!(stranger.ends);
            }
            let received = beside(kind, &stranger, moment);
            let report = received.outcome.unwrap_or_else(|error| panic!("{kind}, {moment:?}: {error}"));
            assert_eq!(report.channels, 2, "{kind}, {moment:?}");
            assert!(arrived(&received.ram), "{kind}, {moment:?}");
            assert!(received.calls.contains(&"start"), "{kind}, {moment:?}");
            tried += 1;
        }
    }
    test_support::report("hostile bytes", &format!("strangers beside a migration: {tried}"));
}

/// A second source, and one more channel with an id that is here: both came beside a migration and ended it.
#[test]
fn a_second_source_and_a_taken_id_are_dropped() {
    for (kind, stranger) in [
        ("a second main", Wire::main()),
        ("a taken id", Wire::raw(told_hello(0, 2).encode()).sync()),
        ("a taken id with pages", Wire::raw(told_hello(0, 2).encode()).then(pages(&[0x3000]))),
    ] {
        let received = beside(kind, &stranger, Moment::AfterTheFirstChannel);
        let report = received.outcome.unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert_eq!(report.channels, 2, "{kind}");
        assert!(arrived(&received.ram), "{kind}");
    }
}

/// Without it any peer that knows the protocol could write pages.
#[test]
fn a_token_excludes_who_does_not_have_it() {
    let token = [0xa5; 16];
    let channel = |id: u8, token: [u8; 16]| {
        channel_of_two(Hello { uuid: token, ..told_hello(id, 2) }, 0x1000 * (1 + u64::from(id)))
    };
    let wrong = Wire::raw(Hello { uuid: [0xa4; 16], ..told_hello(0, 1) }.encode()).sync().then(pages(&[0x7000]));
    let none = Wire::channel(1).sync().then(pages(&[0x6000]));
    // Main of a second source, of one that makes no offer, and of one that falls silent in the middle.
    let other_main = offering(Some([0xa4; 16]));
    let no_offer = Wire::main().then(&main_end().bytes);
    let half = Wire::raw(&b"QEVM\0\0\0\x03\x07"[..]).ends();
    let wires = [half, other_main, no_offer, wrong, none, offering(Some(token)), channel(0, token), channel(1, token)];
    let received = receive_untold(&wires, Options { token: Some(token), ..Options::default() });
    assert_eq!(received.outcome.unwrap().channels, 2);
    assert!(arrived(&received.ram));
}

/// A proxy may deliver the channels of an attempt that was given up when the next one has begun. They had the same uuid and
/// number of channels, joined, and both sides reported success with old pages in memory.
#[test]
fn channels_of_an_earlier_attempt_do_not_join() {
    let channel = |id: u8, token: [u8; 16], page: u64| channel_of_two(Hello { uuid: token, ..told_hello(id, 2) }, page);
    let (earlier, now) = ([1; 16], [2; 16]);
    let stale = || [channel(0, earlier, 0x7000), channel(1, earlier, 0x6000)];
    let main = || offering(Some(now));
    let ours = || [channel(0, now, 0x1000), channel(1, now, 0x2000)];
    let before = stale().into_iter().chain([main()]).chain(ours()).collect::<Vec<_>>();
    let after = [main()].into_iter().chain(stale()).chain(ours()).collect::<Vec<_>>();
    for wires in [before, after] {
        let received = receive_untold(&wires, Options::default());
        assert_eq!(received.outcome.unwrap().channels, 2);
        assert!(arrived(&received.ram));
    }
}

/// The whole main of a source with two channels that offers `token`, and no extensions.
fn offering(token: Option<[u8; 16]>) -> Wire {
    let mut head = MainEncoder::default();
    head.header().configuration("multifd");
    let whole = Wire::main().then(&main_end().bytes);
    let rest = whole.bytes.strip_prefix(head.bytes.as_slice()).expect("main begins so");
    head.config_offer(&Offer { channels: 2, token, extensions: Extensions::default() });
    Wire::from_encoder(&head).then(rest)
}

#[test]
fn both_ends_with_one_token_migrate_and_with_two_do_not() {
    time_limit(Duration::from_secs(60), || {
        for (theirs, works) in [(Some([7; 16]), true), (Some([8; 16]), false), (None, false)] {
            let (listener, connector) = memory::listener(1 << 20);
            let options =
                Options { token: Some([7; 16]), setup_timeout: Some(Duration::from_millis(200)), ..Options::default() };
            let mut vm = TestDestination::new(guarded_ram());
            let destination = Destination::new(options);
            let stop = destination.stop_handle();
            let receiver = thread::spawn(move || destination.run(&mut vm, Box::new(listener), &mut ()));
            let mut source = TestSource::new(guarded_ram());
            let mut options = source::Options::default();
            (options.format.token, options.qemu.uuid, options.plan.channels) = (theirs, [3; 16], 2);
            let sent = Source::new(options).run(&mut source, &connector, &mut ());
            if sent.is_err() {
                // It was none of this migration: the destination still waits for the one that is.
                stop.cancel();
            }
            let received = receiver.join().unwrap();
            assert_eq!((sent.is_ok(), received.is_ok()), (works, works), "{theirs:?}");
            if let Err(error) = received {
                assert!(matches!(error, Error::Cancelled), "{theirs:?}: {error}");
            }
        }
    });
}

/// One byte each time is no reason to wait longer.
#[test]
fn a_connection_that_says_what_it_is_byte_by_byte_is_dropped_in_time() {
    time_limit(Duration::from_secs(60), || {
        let directory = TempDir::new().unwrap();
        let uri: Uri = format!("unix:{}", directory.join("s").display()).parse().unwrap();
        let listener = Box::new(uri.listener().unwrap());
        let options = Options { setup_timeout: Some(Duration::from_millis(500)), ..Options::default() };
        let destination = Destination::new(options);
        let stop = destination.stop_handle();
        let receiver = thread::spawn(move || {
            destination.run(&mut TestDestination::new(guarded_ram()), listener, &mut ()).map(drop)
        });
        let mut slow = UnixStream::connect(directory.join("s")).unwrap();
        let begin = Instant::now();
        let (done, dropped) = mpsc::channel();
        thread::spawn(move || {
            for byte in Wire::channel(0).bytes.iter().cycle() {
                if slow.write_all(&[*byte]).is_err() {
                    break;
                }
                thread::sleep(Duration::from_millis(50));
            }
            done.send(()).unwrap();
        });
        dropped.recv().unwrap();
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
        stop.cancel();
        assert!(matches!(receiver.join().unwrap(), Err(Error::Cancelled)));
    });
}

/// Before main has come a receiver waits for any time, and strangers do not use it up.
#[test]
fn any_number_of_silent_connections_leaves_room_for_the_source() {
    time_limit(Duration::from_secs(60), || {
        let mut wires = vec![Wire::default(); 200];
        wires.extend(migration());
        let received = receive_untold(&wires, Options { setup_timeout: None, ..Options::default() });
        assert_eq!(received.outcome.unwrap().channels, 2);
        assert!(arrived(&received.ram));
    });
}

/// They would have waited for a main for as long as the destination does, which is as long as it takes.
#[test]
fn channels_whose_main_does_not_come_are_dropped_and_the_destination_waits_on() {
    time_limit(Duration::from_secs(60), || {
        for says in [Wire::channel(0), Wire::channel(0).sync(), Wire::channel(0).then(*b"\x11\x22")] {
            let (listener, connector) = memory::listener(1 << 16);
            let options = Options { setup_timeout: Some(Duration::from_millis(20)), ..Options::default() };
            let destination = Destination::new(options);
            let stop = destination.stop_handle();
            let mut alone = connector.connect().unwrap();
            alone.write(&says.bytes, &[]).unwrap();
            let mut vm = TestDestination::new(guarded_ram());
            thread::scope(|scope| {
                let receiving = scope.spawn(|| destination.run(&mut vm, Box::new(listener), &mut ()));
                assert_eq!(alone.read(&mut [0]).unwrap(), 0, "it is dropped");
                // The destination waits on.
                assert!(!receiving.is_finished());
                stop.cancel();
                assert!(matches!(receiving.join().unwrap(), Err(Error::Cancelled)));
            });
        }
    });
}

/// Main, the first channel, and how the destination for it ends that lacks the channel.
fn without_its_channel(channel: &Wire, comes_before_main: bool) -> String {
    time_limit(Duration::from_secs(60), || {
        let (listener, connector) = memory::listener(1 << 16);
        let setup_timeout = Some(Duration::from_millis(300));
        let destination = Destination::new(Options { channels: Some(1), setup_timeout, ..Options::default() });
        let progress = destination.progress();
        let listener = Faults::new().with_resets().listener(Box::new(listener));
        let mut vm = TestDestination::new(guarded_ram());
        thread::scope(|scope| {
            let receiving = scope.spawn(|| destination.run(&mut vm, Box::new(listener), &mut ()));
            let mut alone = None;
            if comes_before_main {
                alone = open(&connector, channel);
                let alone = alone.as_mut().expect("it stays open");
                assert_eq!(alone.read(&mut [0]).unwrap(), 0, "it is dropped");
            }
            let main = open(&connector, &Wire::main());
            while progress.snapshot().main_bytes == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            if !comes_before_main {
                alone = open(&connector, channel);
            }
            let error = receiving.join().unwrap().expect_err("its channel is missing");
            drop((main, alone));
            error.to_string()
        })
    })
}

/// All the same to the migration, and not to who has to find out why a channel is missing.
#[test]
fn what_ended_a_channel_before_its_first_packet_is_told() {
    let says = "says hello as channel 0 and";
    let silent = without_its_channel(&Wire::channel(0), true);
    assert!(silent.contains(&format!("{says} says nothing more, and its main does not come")), "{silent}");
    let early = without_its_channel(&Wire::channel(0).sync(), true);
    assert!(early.contains(&format!("{says} is at its first packet, and its main does not come")), "{early}");
    let half = without_its_channel(&Wire::channel(0).then(*b"\x11\x22"), true);
    assert!(half.contains(&format!("{says} breaks: ")), "{half}");
    let reset = without_its_channel(&Wire::channel(0).ends(), false);
    assert!(reset.contains(&format!("{says} breaks: ")), "{reset}");
}

/// Main has limits of its own, and a source is as slow with its channels as with main.
#[test]
fn a_channel_may_be_silent_for_longer_than_the_set_up_takes_where_main_is_there() {
    time_limit(Duration::from_secs(60), || {
        let (listener, connector) = memory::listener(1 << 16);
        let setup_timeout = Duration::from_millis(300);
        let options = Options { channels: Some(1), setup_timeout: Some(setup_timeout), ..Options::default() };
        let destination = Destination::new(options);
        let progress = destination.progress();
        let mut vm = TestDestination::new(guarded_ram());
        let start = main_start().bytes.len();
        let main = Wire::main().then(&main_end().bytes).bytes;
        let report = thread::scope(|scope| {
            let receiving = scope.spawn(|| destination.run(&mut vm, Box::new(listener), &mut ()));
            let mut stream = connector.connect().unwrap();
            stream.write(&main[..start], &[]).unwrap();
            while progress.snapshot().main_bytes == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            let channel = Wire::channel(0).sync().then(pages(&[0x1000])).sync();
            let mut slow = connector.connect().unwrap();
            slow.write(&channel.bytes[..HELLO_LEN], &[]).unwrap();
            thread::sleep(2 * setup_timeout);
            slow.write(&channel.bytes[HELLO_LEN..], &[]).unwrap();
            stream.write(&main[start..], &[]).unwrap();
            answers_on(stream);
            receiving.join().unwrap().unwrap()
        });
        assert_eq!(report.channels, 1);
    });
}

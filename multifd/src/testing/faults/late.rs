//! Channels that come late or not at all, from sources that say how many there are and from QEMU, whose packet numbers say
//! it: a migration that is complete is the same as with all of them in time, and every other fails.

use std::{
    collections::HashMap,
    io::{self, Read},
    path::Path,
    sync::LazyLock,
    thread,
    time::Duration,
};

use multifd_proto::{ProtocolError, Violation, packet::RamPacket};
use test_support::{TempDir, time_limit};

use super::script::{HEADER, PAGE, Wire, answers_on, main_end, main_start, pages};
use crate::{
    checkpoint::{Checkpoint, Writer},
    compress,
    destination::{Destination, Options, Report},
    error::{Error, Mismatch},
    progress::{Phase, Snapshot},
    testing::{faulty::Faults, memory, vm::TestDestination},
    transport::Connect,
};

/// Main and the channels of one recorded migration.
#[derive(Clone)]
struct Recording {
    name: String,
    main: Vec<u8>,
    channels: Vec<Vec<u8>>,
}

impl Recording {
    fn all() -> Vec<Recording> {
        static FILES: LazyLock<HashMap<String, Vec<u8>>> =
            LazyLock::new(|| compress::tests::recordings().into_iter().collect());
        let names = FILES.keys().filter_map(|file| file.strip_suffix("/main.bin"));
        let recording = |name: &str| Recording {
            name: name.to_owned(),
            main: FILES[&format!("{name}/main.bin")].clone(),
            channels: (0..).map_while(|id| FILES.get(&format!("{name}/ch{id}.bin")).cloned()).collect(),
        };
        names.map(recording).collect()
    }

    fn with_channels() -> Vec<Recording> {
        let recordings: Vec<_> =
            Recording::all().into_iter().filter(|recording| !recording.channels.is_empty()).collect();
        assert!(recordings.len() > 5 && recordings.iter().any(|recording| recording.channels.len() == 4));
        recordings
    }

    /// As of a source that says how many channels it has.
    fn told(mut self) -> Recording {
        let channels = u8::try_from(self.channels.len()).unwrap();
        self.channels.iter_mut().for_each(|channel| channel[25] = channels);
        self.name += ", told";
        self
    }

    /// As of a source that does not number its packets.
    fn unnumbered(mut self) -> Recording {
        for channel in &mut self.channels {
            let mut at = 64;
            while at < channel.len() {
                channel[at + 24..at + 32].fill(0);
                at += HEADER + RamPacket::decode(&channel[at..], PAGE).unwrap().payload_len;
            }
        }
        self
    }

    /// Without the first packet of a channel that has pages and no SYNC; `None` where there is none, or where the decompressor would
    /// miss it.
    fn without_a_packet(mut self) -> Option<Recording> {
        if ["zlib", "zstd"].iter().any(|method| self.name.contains(method)) {
            return None;
        }
        for channel in &mut self.channels {
            let mut at = 64;
            while at < channel.len() {
                let packet = RamPacket::decode(&channel[at..], PAGE).unwrap();
                let end = at + HEADER + packet.payload_len;
                if !packet.is_empty() && !packet.sync {
                    channel.drain(at..end);
                    self.name += ", without a packet";
                    return Some(self);
                }
                at = end;
            }
        }
        None
    }

    fn is_per_section(&self) -> bool {
        self.name.contains("7.2")
    }
}

/// When a channel connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Before main.
    First,
    /// When main has passed this many sync points; where main does not pass the first one alone, when it has begun.
    After(u64),
    Never,
}

/// Takes `recording` into a checkpoint at `path`; its channels connect when `order` says, in this order.
fn take(recording: &Recording, order: &[(usize, When)], path: &Path, options: Options) -> Result<Report, Error> {
    time_limit(Duration::from_secs(100), || {
        let (listener, connector) = memory::listener(1 << 16);
        let destination = Destination::new(options);
        let progress = destination.progress();
        thread::scope(|scope| {
            let receiver = scope
                .spawn(move || Writer::create(path, false).unwrap().receive(destination, Box::new(listener), &mut ()));
            let send = |bytes: &[u8]| {
                // Refused and broken off where the migration has failed.
                let Ok(mut stream) = connector.connect() else { return };
                let bytes = bytes.to_vec();
                let answers = ["returnpath", "postcopy"].iter().any(|name| recording.name.contains(name));
                let answered = answers && bytes.starts_with(b"QEVM");
                scope.spawn(move || {
                    if stream.write(&bytes, &[]).is_ok() && answered {
                        answers_on(stream);
                    }
                });
            };
            for (id, _) in order.iter().filter(|(_, when)| *when == When::First) {
                send(&recording.channels[*id]);
            }
            send(&recording.main);
            for (id, when) in order {
                if let When::After(rounds) = when {
                    while sync_points(&progress.snapshot()) < *rounds && !receiver.is_finished() {
                        thread::sleep(Duration::from_millis(1));
                    }
                    send(&recording.channels[*id]);
                }
            }
            receiver.join().unwrap()
        })
    })
}

/// How many sync points main has passed at least: that of the set-up is none of a round.
fn sync_points(now: &Snapshot) -> u64 {
    if now.phase < Some(Phase::Rounds) { 0 } else { 1 + now.round }
}

/// What a checkpoint is about: contents of all blocks, and the state of the devices.
fn contents(path: &Path) -> (Vec<Vec<u8>>, Vec<u8>) {
    let checkpoint = Checkpoint::open(path).unwrap();
    let blocks = (0..checkpoint.blocks().len()).map(|block| {
        let mut bytes = Vec::new();
        checkpoint.block_reader(block).read_to_end(&mut bytes).unwrap();
        bytes
    });
    (blocks.collect(), checkpoint.sections().to_vec())
}

fn seconds(milliseconds: u64) -> Options {
    Options { setup_timeout: Some(Duration::from_millis(milliseconds)), ..Options::default() }
}

#[test]
fn late_channels_change_nothing_in_what_arrives() {
    for recording in Recording::with_channels() {
        let directory = TempDir::new().unwrap();
        let channels = recording.channels.len();
        let in_time: Vec<_> = (0..channels).map(|id| (id, When::First)).collect();
        take(&recording, &in_time, &directory.join("in time"), Options::default()).unwrap();
        let expected = contents(&directory.join("in time"));
        // In the per-round dialect the first FLUSH waits for a channel.
        let alone = When::After(u64::from(recording.is_per_section()));
        let mut orders: Vec<Vec<(usize, When)>> = (0..channels)
            .map(|late| {
                let mut order = in_time.clone();
                order[late].1 = When::After(1);
                order
            })
            .collect();
        orders.push((0..channels).rev().map(|id| (id, When::First)).collect());
        orders.push(
            (0..channels).rev().map(|id| (id, if id == channels - 1 { alone } else { When::After(1) })).collect(),
        );
        let told = recording.clone().told();
        for (index, order) in orders.iter().enumerate() {
            let path = directory.join(index.to_string());
            let report = take(&recording, order, &path, Options::default());
            let report = report.unwrap_or_else(|error| panic!("{}, {order:?}: {error}", recording.name));
            assert_eq!(report.channels, channels, "{}, {order:?}", recording.name);
            assert!(contents(&path) == expected, "{}, {order:?}: another guest arrived", recording.name);
            // No round ends without a channel that is told of.
            let order: Vec<_> =
                order.iter().map(|&(id, when)| (id, if when == When::First { when } else { When::After(0) })).collect();
            let path = directory.join(format!("{index} told"));
            assert_eq!(take(&told, &order, &path, Options::default()).unwrap().channels, channels);
            assert!(contents(&path) == expected, "{}, {order:?}: another guest arrived", told.name);
        }
    }
}

/// Both sides reported success, with pages missing.
#[test]
fn a_channel_that_never_comes_fails_the_migration() {
    for recording in Recording::with_channels() {
        for recording in [recording.clone(), recording.told()] {
            let channels = recording.channels.len();
            for missing in 1..1usize << channels {
                let directory = TempDir::new().unwrap();
                let path = directory.join("checkpoint");
                let when = |id: usize| if missing >> id & 1 == 1 { When::Never } else { When::First };
                let order: Vec<_> = (0..channels).map(|id| (id, when(id))).collect();
                let error = take(&recording, &order, &path, seconds(100)).unwrap_err();
                let name = &recording.name;
                match error {
                    Error::SetupTimeout { .. } => {}
                    // Without any channel, and without a FLUSH, it could have been a stream without channels. On a busy machine none
                    // may have joined in time.
                    Error::Mismatch(Mismatch::ChannelsUnknown | Mismatch::ChannelTooLate { .. }) => {
                        assert!(recording.is_per_section(), "{name}");
                    }
                    error => panic!("{name} without {missing:#b}: {error}"),
                }
                assert!(!path.exists(), "{name} without {missing:#b}");
            }
        }
    }
}

#[test]
fn a_source_whose_numbers_prove_nothing_needs_the_number_of_channels() {
    for recording in Recording::with_channels() {
        let recording = recording.unnumbered();
        let directory = TempDir::new().unwrap();
        let channels = recording.channels.len();
        let order: Vec<_> = (0..channels).map(|id| (id, When::First)).collect();
        let path = directory.join("checkpoint");
        let error = take(&recording, &order, &path, Options::default()).unwrap_err();
        let Error::Protocol { source, .. } = &error else { panic!("{}: {error}", recording.name) };
        // Seen with any of the channels: the others may not have come by then.
        let unproven =
            |joined| ProtocolError::Mismatch(multifd_proto::Mismatch::ChannelsUnproven { joined }) == *source;
        assert!((1..=channels).any(unproven), "{}: {error}", recording.name);
        assert!(!path.exists());
        let required = Options { channels: Some(u8::try_from(channels).unwrap()), ..Options::default() };
        assert_eq!(take(&recording, &order, &path, required).unwrap().channels, channels);
    }
}

/// Once the channels of a source that says how many it has were here, the numbers were not looked at: what was lost on the way was
/// missing in a checkpoint that was reported complete.
#[test]
fn a_source_that_says_its_channels_and_whose_numbers_do_not_add_up_is_refused() {
    let mut lost = 0;
    for recording in Recording::with_channels() {
        let without = recording.clone().told().without_a_packet();
        lost += usize::from(without.is_some());
        for recording in without.into_iter().chain([recording.told().unnumbered()]) {
            let channels = recording.channels.len();
            let order: Vec<_> = (0..channels).map(|id| (id, When::First)).collect();
            for required in [None, u8::try_from(channels).ok()] {
                let directory = TempDir::new().unwrap();
                let path = directory.join("checkpoint");
                let options = Options { channels: required, ..Options::default() };
                let error = take(&recording, &order, &path, options).unwrap_err();
                let Error::Protocol { source: ProtocolError::Violation(violation), .. } = &error else {
                    panic!("{}: {error}", recording.name)
                };
                let unbalanced =
                    matches!(violation, Violation::PacketNumbers { highest, expected, .. } if highest != expected);
                assert!(unbalanced, "{}: {error}", recording.name);
                assert!(!path.exists());
            }
        }
    }
    assert!(lost > 3, "few recordings have a packet to lose");
}

/// A stream without channels that has no page with content looks like one whose channels are late.
#[test]
fn channels_that_come_after_rounds_without_any_fail_the_migration() {
    let recordings = Recording::with_channels().into_iter().filter(Recording::is_per_section);
    for recording in recordings {
        let directory = TempDir::new().unwrap();
        let path = directory.join("checkpoint");
        let order: Vec<_> = (0..recording.channels.len()).map(|id| (id, When::After(2))).collect();
        let error = take(&recording, &order, &path, seconds(50)).unwrap_err();
        let late = matches!(error, Error::Mismatch(Mismatch::ChannelTooLate { .. } | Mismatch::ChannelsUnknown));
        assert!(late, "{}: {error}", recording.name);
        assert!(!path.exists());
    }
}

#[test]
fn streams_without_channels_are_taken_without_waiting() {
    let recordings: Vec<_> = Recording::all().into_iter().filter(|recording| recording.channels.is_empty()).collect();
    assert_eq!(recordings.len(), 2);
    for recording in recordings {
        let directory = TempDir::new().unwrap();
        let report =
            take(&recording, &[], &directory.join("checkpoint"), Options { setup_timeout: None, ..Options::default() });
        assert_eq!(report.unwrap().channels, 0, "{}", recording.name);
    }
}

/// Per-section, without channels and without a page with content: complete if main has named every page, and not otherwise.
#[test]
fn a_stream_of_zeros_is_complete_when_every_page_was_named() {
    for (named, complete) in [(10, true), (9, false)] {
        let mut encoder = main_start();
        encoder.eos().footer(1).ram_part(1, false);
        for page in 0..named {
            let (block, offset) = if page < 8 { ("ram", page) } else { ("rom", page - 8) };
            encoder.zero_page(&super::script::block(block), offset * PAGE as u64);
        }
        encoder.eos().footer(1).ram_part(1, true).eos().footer(1).eof().vm_description(b"{}");
        let received = super::script::receive_untold(&[Wire::from_encoder(&encoder)], seconds(50));
        match received.outcome {
            Ok(report) => assert!(complete && report.channels == 0),
            Err(error) => assert!(!complete && matches!(error, Error::Mismatch(Mismatch::ChannelsUnknown)), "{error}"),
        }
        assert_eq!(received.calls.contains(&"start"), complete);
    }
}

/// The receiver hung, or had pages put into the memory of a VM that was running.
#[test]
fn what_a_channel_sends_after_the_last_sync_point_is_refused_or_ignored() {
    let main = || Wire::main().then(&main_end().bytes);
    let channel = || Wire::channel(0).sync().then(pages(&[0x1000])).sync();
    for (more, message) in [
        (Wire::default().sync(), "channel 0 has one SYNC packet more than main has sync points"),
        (Wire::default().then(pages(&[0x2000])), "channel 0 has pages after the last sync point"),
        (Wire::default().sync().then(pages(&[0x2000])), "channel 0 has one SYNC packet more than main has sync points"),
        (Wire::default().sync().sync().ends(), "channel 0 has one SYNC packet more than main has sync points"),
    ] {
        let received = super::script::receive(&[main(), channel().then(&more.bytes)], Options::default());
        match &received.outcome {
            // The channel had not come that far when it was decided.
            Ok(_) => assert_eq!(received.ram.page_bytes(2), [0; PAGE]),
            Err(error) => assert!(error.to_string().ends_with(message), "{error}"),
        }
    }
}

/// Lets a destination hear `main`, whose last `late` bytes come when the channel has had time to end, and a channel that is reset behind
/// all that it says.
pub(super) fn receive_with_reset(main: &Wire, late: usize, channel: &Wire) -> Result<Report, Error> {
    time_limit(Duration::from_secs(60), || {
        let (listener, connector) = memory::listener(1 << 24);
        let mut stream = connector.connect().unwrap();
        let (first, rest) = main.bytes.split_at(main.bytes.len() - late);
        stream.write(first, &[]).unwrap();
        connector.connect().unwrap().write(&channel.bytes, &[]).unwrap();
        let rest = rest.to_vec();
        let peer = thread::spawn(move || {
            // Too short, it would only miss a fault.
            thread::sleep(Duration::from_millis(200));
            // The destination may have given up.
            let _ = stream.write(&rest, &[]);
            answers_on(stream)
        });
        let listener = Faults::new().with_resets().listener(Box::new(listener));
        let mut vm = TestDestination::new(super::script::guarded_ram());
        let options = Options { channels: Some(1), ..Options::default() };
        let outcome = Destination::new(options).run(&mut vm, Box::new(listener), &mut ());
        peer.join().unwrap();
        outcome
    })
}

/// Its source's host may be slow with main, or with the state of its devices.
#[test]
fn a_channel_that_is_reset_behind_its_last_sync_has_brought_all() {
    let main = Wire::main().then(&main_end().bytes);
    let channel = Wire::channel(0).sync().then(pages(&[0x1000])).sync();
    let report = receive_with_reset(&main, 1, &channel).unwrap();
    assert_eq!(report.channels, 1);
}

/// What it had still to bring is on no other connection.
#[test]
fn a_channel_that_is_reset_before_its_last_sync_ends_the_migration() {
    let main = Wire::main().then(&main_end().bytes);
    let end = main_end().bytes.len();
    for channel in [Wire::channel(0).sync().then(pages(&[0x1000])), Wire::channel(0).sync()] {
        let error = receive_with_reset(&main, end, &channel).unwrap_err();
        let Error::Io { at, source } = &error else { panic!("{error}") };
        assert_eq!(*at, super::script::channel_at(0, channel.bytes.len()), "{error}");
        assert_eq!(source.kind(), io::ErrorKind::ConnectionReset, "{error}");
    }
}

/// What it brought of the round may not be all.
#[test]
fn a_channel_that_ends_in_order_among_the_pages_of_a_round_ends_the_migration() {
    let main = Wire::main().then(&main_end().bytes);
    let channel = Wire::channel(0).sync().then(pages(&[0x1000])).ends();
    let received = super::script::receive(&[main, channel], Options::default());
    let error = received.outcome.expect_err("it was accepted").to_string();
    assert!(error.contains("SYNC"), "{error}");
    assert!(!received.calls.contains(&"start"));
}

/// It has arrived at the end of the round, where main never comes.
#[test]
fn a_channel_that_is_cut_behind_its_sync_ends_the_migration_at_once() {
    let channel = Wire::channel(0).sync().sync().sync().cut_by(10);
    let received = super::script::receive(&[Wire::main(), channel.clone()], Options::default());
    let error = received.outcome.expect_err("it was accepted");
    assert!(matches!(&error, Error::Io { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof), "{error}");
}

//! What a source that keeps its connections open and says nothing more means: at the end of state, that there is no
//! vmdescription; anywhere else, nothing.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use multifd_proto::{
    Codec,
    encoder::MainEncoder,
    packet::PacketHeader,
    return_path::Message,
    stream::{Section, SectionKind},
};
use test_support::{TempDir, time_limit};

use super::script::*;
use crate::{
    checkpoint::{Checkpoint, CheckpointSource, Writer},
    destination::{Destination, Options},
    error::Error,
    source::{self, Source},
    testing::memory,
    testing::vm::TestDestination,
    transport::{Connect, uri::Uri},
};

/// Who receives.
#[derive(Clone, Copy, Debug)]
enum Receiver {
    Vm,
    Checkpoint,
}

const RECEIVERS: [Receiver; 2] = [Receiver::Vm, Receiver::Checkpoint];

/// A whole main up to the end of state, with return path.
fn undescribed() -> Wire {
    let mut encoder = MainEncoder::default();
    let device =
        |id, name: &str| Section { kind: SectionKind::Full, id, name: name.to_owned(), instance: 0, version: 1 };
    encoder.ram_part(1, true).flush().eos().footer(1);
    encoder.section(&device(2, "timer")).footer(2).section(&device(3, "cpu")).raw(STATE).footer(3).eof();
    Wire::main().then(&encoder.bytes)
}

/// What came of a main that stays open for as long as nobody answers, but for at most `patience`.
struct Heard {
    answer: Option<Message>,
    outcome: Result<(), Error>,
}

/// The packets of a script are not numbered.
fn one_channel() -> Options {
    Options { channels: Some(1), ..Options::default() }
}

/// Lets `receiver` hear `main` and then nothing, until it answers or `patience` is over.
fn hear(receiver: Receiver, main: &Wire, patience: Duration, dir: &TempDir) -> Heard {
    let socket = dir.join("socket");
    let uri: Uri = format!("unix:{}", socket.display()).parse().unwrap();
    let listener = Box::new(uri.listener().unwrap());
    thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let destination = Destination::new(one_channel());
            match receiver {
                Receiver::Vm => {
                    let mut vm = TestDestination::new(guarded_ram());
                    let outcome = destination.run(&mut vm, listener, &mut ());
                    assert_eq!(vm.calls().contains(&"start"), outcome.is_ok());
                    outcome.map(drop)
                }
                Receiver::Checkpoint => {
                    let mut writer = Writer::create(&dir.join("checkpoint"), false).unwrap();
                    writer.receive(destination, listener, &mut ()).map(drop)
                }
            }
        });
        let mut channel = UnixStream::connect(&socket).unwrap();
        channel.write_all(&Wire::channel(0).sync().sync().bytes).unwrap();
        let mut source = UnixStream::connect(&socket).unwrap();
        source.write_all(&main.bytes).unwrap();
        if main.ends {
            source.shutdown(std::net::Shutdown::Write).unwrap();
        }
        source.set_read_timeout(Some(patience)).unwrap();
        let mut bytes = [0; 8];
        let answer = match source.read_exact(&mut bytes) {
            Ok(()) => match Message::decode(&bytes).unwrap() {
                multifd_proto::Step::Item { item, .. } => Some(item),
                multifd_proto::Step::Need(_) => panic!("{bytes:?}"),
            },
            Err(error) => {
                assert!([ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()), "{error}");
                None
            }
        };
        drop((source, channel));
        Heard { answer, outcome: destination.join().unwrap() }
    })
}

/// Found with a QEMU that was told `suppress-vmdesc=on`: it waited for SHUT, and we for its description, forever.
#[test]
fn at_the_end_of_state_it_means_that_nothing_is_described() {
    time_limit(LIMIT, || {
        for receiver in RECEIVERS {
            let dir = TempDir::new().unwrap();
            let heard = hear(receiver, &undescribed(), LIMIT, &dir);
            heard.outcome.unwrap_or_else(|error| panic!("{receiver:?}: {error}"));
            assert_eq!(heard.answer, Some(Message::Shut(0)), "{receiver:?}");
            if let Receiver::Checkpoint = receiver {
                send_on(&Checkpoint::open(&dir.join("checkpoint")).unwrap());
            }
        }
    });
}

/// Our own source describes nothing either, where it has no description.
fn send_on(checkpoint: &Checkpoint) {
    let dir = TempDir::new().unwrap();
    let uri: Uri = format!("unix:{}", dir.join("socket").display()).parse().unwrap();
    let listener = Box::new(uri.listener().unwrap());
    let mut vm = TestDestination::new(guarded_ram());
    thread::scope(|scope| {
        let destination = scope.spawn(|| Destination::new(Options::default()).run(&mut vm, listener, &mut ()));
        let mut options = source::Options::default();
        checkpoint.apply_to(&mut options);
        let mut source = CheckpointSource::new(checkpoint).unwrap();
        Source::new(options).run(&mut source, &*uri.connector().unwrap(), &mut ()).unwrap();
        destination.join().unwrap().unwrap();
    });
    assert_eq!(vm.calls(), ["prepare", "load", "load", "start"]);
}

/// What would be lost is the state of the last device, with a source that was told that it is safe.
#[test]
fn before_the_end_of_state_it_means_nothing() {
    time_limit(LIMIT, || {
        thread::scope(|scope| {
            // The end of state; a footer, also but for its last byte; the state of a device; a whole section.
            for cut in [1, 2, 6, 7, 6 + STATE.len(), 6 + STATE.len() + 16, 6 + STATE.len() + 17] {
                for receiver in RECEIVERS {
                    scope.spawn(move || {
                        let whole = undescribed();
                        let main = Wire::raw(&whole.bytes[..whole.bytes.len() - cut]);
                        let dir = TempDir::new().unwrap();
                        let heard = hear(receiver, &main, Duration::from_millis(2500), &dir);
                        assert_eq!(heard.answer, None, "{receiver:?} without the last {cut} bytes");
                        let error = heard.outcome.unwrap_err().to_string();
                        assert!(error.ends_with("the connection ended in the middle"), "{cut}: {error}");
                        assert!(!dir.join("checkpoint").exists());
                    });
                }
            }
        });
    });
}

#[test]
fn the_end_of_main_in_its_place_is_an_error() {
    time_limit(LIMIT, || {
        for receiver in RECEIVERS {
            let dir = TempDir::new().unwrap();
            let heard = hear(receiver, &undescribed().ends(), LIMIT, &dir);
            assert_eq!(heard.answer, Some(Message::Shut(1)), "{receiver:?}");
            let error = heard.outcome.unwrap_err().to_string();
            let place = main_at(undescribed().len());
            assert_eq!(error, format!("{place}: the connection ended in the middle"), "{receiver:?}");
            assert!(!dir.join("checkpoint").exists());
        }
    });
}

#[test]
fn bytes_behind_the_description_are_refused_by_a_checkpoint() {
    let described = |bytes: &[u8]| {
        let device = Section { kind: SectionKind::Full, id: 2, name: "cpu".to_owned(), instance: 0, version: 1 };
        let mut encoder = MainEncoder::default();
        encoder.ram_part(1, true).flush().eos().footer(1).section(&device).raw(STATE).footer(2).eof();
        Wire::main().then(encoder.vm_description(DESCRIPTION).bytes.as_slice()).then(bytes)
    };
    let end = described(b"").len();
    for more in [&b"x"[..], b"\0", b"\x7e\0\0\0\x02\0"] {
        for main in [described(more), described(more).ends()] {
            let error = time_limit(LIMIT, || {
                let dir = TempDir::new().unwrap();
                let mut writer = Writer::create(&dir.join("checkpoint"), false).unwrap();
                let (listener, connector) = memory::listener(1 << 24);
                let streams = [Wire::channel(0).sync().sync(), main].map(|wire| {
                    let mut stream = crate::transport::Connect::connect(&connector).unwrap();
                    stream.write(&wire.bytes, &[]).unwrap();
                    (!wire.ends).then_some(stream)
                });
                let received = writer.receive(Destination::new(one_channel()), Box::new(listener), &mut ());
                drop(streams);
                received.unwrap_err()
            });
            assert_eq!(error.to_string(), format!("{}: more bytes after the end of the stream", main_at(end)));
            assert!(error.is_peers_fault());
        }
    }
}

const STATE: &[u8] = b"state of cpu 0";
const DESCRIPTION: &[u8] = br#"{"page_size":4096,"devices":[{"name":"cpu","instance_id":0,"fields":[{"name":"data","type":"buffer","size":14}]}]}"#;
const LIMIT: Duration = Duration::from_secs(60);

/// A QEMU 7.2 with more channels than were required: two of them are dropped, and it says nothing any more.
#[test]
fn a_channel_that_was_too_many_is_named_where_the_source_goes_silent() {
    let options = Options {
        channels: Some(1),
        setup_timeout: None,
        stall_limit: Some(Duration::from_millis(1500)),
        ..Options::default()
    };
    let error = receive(&[Wire::main(), Wire::channel(3).sync()], options).outcome.unwrap_err();
    let expected =
        "a connection said it is channel 3, 1 channels were expected; it was dropped, and then: the peer moved";
    assert!(error.to_string().starts_with(expected), "{error}");
    assert!(error.is_peers_fault());
}

/// Zero pages are packets without a payload.
#[test]
fn a_source_that_sends_nothing_but_zero_pages_is_not_silent() {
    time_limit(LIMIT, || {
        let stall_limit = Duration::from_secs(4);
        let (listener, connector) = memory::listener(1 << 20);
        let options = Options { stall_limit: Some(stall_limit), ..one_channel() };
        let mut vm = TestDestination::new(guarded_ram());
        thread::scope(|scope| {
            let receiving = scope.spawn(|| Destination::new(options).run(&mut vm, Box::new(listener), &mut ()));
            let mut main = connector.connect().unwrap();
            main.write(&Wire::main().then(&main_end().bytes).bytes, &[]).unwrap();
            let mut channel = connector.connect().unwrap();
            channel.write(&Wire::channel(0).sync().bytes, &[]).unwrap();
            let header = PacketHeader { block: "ram", zero: &[0x1000], ..PacketHeader::sync_packet(1) };
            let zeros = packet(&PacketHeader { sync: false, ..header });
            for _ in 0..30 {
                thread::sleep(stall_limit / 20);
                let _ = channel.write(&zeros, &[]);
            }
            let _ = channel.write(&packet(&PacketHeader::sync_packet(0)), &[]);
            answers_on(main);
            assert_eq!(receiving.join().unwrap().unwrap().channels, 1);
        });
    });
}

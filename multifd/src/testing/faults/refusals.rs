//! A destination that ends the migration says so on main before it ends its connections, whatever the reason.
//!
//! A source that has written GO would be in doubt otherwise, with its guest paused until an operator comes; every other one would
//! report a broken connection in place of the reason.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::Duration,
};

use multifd_proto::{
    Codec, Step,
    command::Command,
    encoder::MainEncoder,
    extension::{Extension, Extensions, Offer},
    packet::Hello,
    ram::BlockEntry,
    return_path::Message,
};
use test_support::time_limit;

use super::script::*;
use crate::{
    destination::{Destination, Options},
    error::Error,
    stop::StopHandle,
    testing::vm::TestDestination,
    transport::{fd::FdListener, uri::Uri},
};

/// Main of a source of ours with one channel, up to the end of the stream.
fn main_of_ours() -> Wire {
    main_with(&Offer { channels: 1, token: None, extensions: offered() }).then(&main_end().bytes)
}

/// The same of a source that offers `offer`, up to the last round.
fn main_with(offer: &Offer) -> Wire {
    let mut encoder = MainEncoder::default();
    encoder.header().configuration("multifd").config_offer(offer);
    encoder.command(&Command::OpenReturnPath);
    encoder.ram_start(1, BLOCKS.iter().map(|(_, pages)| (pages * PAGE) as u64).sum());
    for (name, pages) in BLOCKS {
        encoder.block(&BlockEntry::new(block(name), (pages * PAGE) as u64));
    }
    encoder.flush().eos().footer(1);
    Wire::from_encoder(&encoder)
}

fn go() -> Vec<u8> {
    MainEncoder::default().command(&Command::Go).bytes.clone()
}

/// What the destination says next on `main`.
fn next(main: &mut impl Read, heard: &mut Vec<u8>) -> Option<Message> {
    loop {
        if let Ok(Step::Item { item, used }) = Message::decode(heard) {
            heard.drain(..used);
            return Some(item);
        }
        let mut part = [0; 512];
        match main.read(&mut part) {
            Ok(n @ 1..) => heard.extend_from_slice(&part[..n]),
            _ => return None,
        }
    }
}

/// Lets a source say `channel` and main to a destination, and calls `at_ready` when that is ready. Returns all that the destination
/// says, and what it reports.
fn converse<S: Read + Write>(
    streams: (S, S),
    listener: FdListener,
    wire: &Wire,
    options: Options,
    at_ready: impl FnOnce(&StopHandle, &mut S),
) -> (Vec<Message>, Result<(), Error>) {
    converse_on(&main_of_ours(), streams, listener, wire, options, at_ready)
}

/// The same with another main.
fn converse_on<S: Read + Write>(
    main_wire: &Wire,
    (mut main, mut channel): (S, S),
    listener: FdListener,
    wire: &Wire,
    options: Options,
    at_ready: impl FnOnce(&StopHandle, &mut S),
) -> (Vec<Message>, Result<(), Error>) {
    let destination = Destination::new(options);
    let stop = destination.stop_handle();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut vm = TestDestination::new(guarded_ram());
            let outcome = destination.run(&mut vm, Box::new(listener), &mut ()).map(drop);
            assert_eq!(vm.calls().contains(&"start"), outcome.is_ok());
            outcome
        });
        channel.write_all(&wire.bytes).unwrap();
        main.write_all(&main_wire.bytes).unwrap();
        let (mut heard, mut said, mut at_ready) = (Vec::new(), Vec::new(), Some(at_ready));
        while let Some(message) = next(&mut main, &mut heard) {
            if message == Message::Ready {
                (at_ready.take().unwrap())(&stop, &mut main);
            }
            said.push(message);
        }
        (said, receiver.join().unwrap())
    })
}

fn over_unix() -> ((UnixStream, UnixStream), FdListener) {
    let directory = test_support::TempDir::new().unwrap();
    let path = directory.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let streams = (UnixStream::connect(&path).unwrap(), UnixStream::connect(&path).unwrap());
    (streams, FdListener::new(listener.into(), Uri::Unix(path.clone())).unwrap())
}

fn over_tcp() -> ((TcpStream, TcpStream), FdListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let streams = (TcpStream::connect(address).unwrap(), TcpStream::connect(address).unwrap());
    (streams, FdListener::new(listener.into(), Uri::from(address)).unwrap())
}

fn good_channel() -> Wire {
    Wire::raw(told_hello(0, 1).encode()).sync_number(0).sync_number(1)
}

/// No memory is handed over, and the migration has no token.
fn offered() -> Extensions {
    Extensions::known().without(Extension::SharedMemory).without(Extension::EndToken)
}

fn accepted() -> Message {
    Message::Accepted(offered())
}

/// Its connections were closed at once, with GO under way: the source stayed in doubt.
#[test]
fn a_destination_that_is_cancelled_between_ready_and_go_refuses() {
    fn check<S: Read + Write>((streams, listener): ((S, S), FdListener)) {
        let (said, outcome) = converse(streams, listener, &good_channel(), Options::default(), |stop, main| {
            stop.cancel();
            // It may be too late, for a destination that has ended.
            let _ = main.write_all(&go());
        });
        assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
        let expected = [accepted(), Message::Ready, Message::Reason("cancelled".to_owned()), Message::Shut(1)];
        assert_eq!(said, expected);
    }
    time_limit(Duration::from_secs(60), || {
        for _ in 0..20 {
            check(over_unix());
            check(over_tcp());
        }
    });
}

#[test]
fn a_destination_that_waited_too_long_for_go_refuses() {
    time_limit(Duration::from_secs(60), || {
        let limit = Duration::from_millis(400);
        let options = Options { stall_limit: Some(limit), ..Options::default() };
        let (streams, listener) = over_unix();
        let (said, outcome) = converse(streams, listener, &good_channel(), options, |_, _| {});
        assert!(matches!(outcome, Err(Error::Stalled { .. })), "{outcome:?}");
        let reason = Error::Stalled { limit }.to_string();
        assert_eq!(said, [accepted(), Message::Ready, Message::Reason(reason), Message::Shut(1)]);
    });
}

/// The connection of main was closed with the others when a channel broke a rule, and the source learned nothing.
#[test]
fn what_a_channel_did_wrong_is_said_on_main() {
    time_limit(Duration::from_secs(60), || {
        for (streams, listener) in [over_unix(), over_unix()] {
            let wire = Wire::raw(told_hello(0, 1).encode()).sync().then([0x5a; 2000]);
            let (said, outcome) = converse(streams, listener, &wire, Options::default(), |_, _| unreachable!());
            let error = outcome.unwrap_err().to_string();
            assert!(error.starts_with("channel 0, at byte "), "{error}");
            assert_eq!(said, [accepted(), Message::Reason(error), Message::Shut(1)]);
        }
    });
}

/// A VM waited for a description behind the end of the stream, for a second with the guest paused where a source had none to send.
#[test]
fn a_destination_goes_by_the_token_at_the_end_and_by_nothing_else() {
    const TOKEN: [u8; 16] = *b"of one migration";
    let extensions = Extensions::known().without(Extension::SharedMemory);
    let accepted = Message::Accepted(extensions.clone());
    let mut undescribed = MainEncoder::default();
    undescribed.ram_part(1, true).flush().eos().footer(1).eof();
    let (described, undescribed) = (main_end().bytes.clone(), undescribed.bytes.clone());
    let main = move |end: &[u8], behind: &[u8]| {
        main_with(&Offer { channels: 1, token: Some(TOKEN), extensions: extensions.clone() }).then(end).then(behind)
    };
    let channel = || Wire::raw(Hello { uuid: TOKEN, ..told_hello(0, 1) }.encode()).sync_number(0).sync_number(1);
    time_limit(Duration::from_secs(60), move || {
        let converse = |end: &[u8], behind: &[u8]| {
            let (streams, listener) = over_unix();
            let say_go = |_: &StopHandle, main: &mut UnixStream| main.write_all(&go()).unwrap();
            converse_on(&main(end, behind), streams, listener, &channel(), Options::default(), say_go)
        };
        for end in [described, undescribed] {
            let (said, outcome) = converse(&end, &TOKEN);
            outcome.unwrap();
            assert_eq!(said, [accepted.clone(), Message::Ready, Message::Shut(0)]);
            for wrong in [&b"of one migratiom"[..], &[TOKEN.as_slice(), b"x"].concat()] {
                let (said, outcome) = converse(&end, wrong);
                let error = outcome.unwrap_err().to_string();
                assert_eq!(said, [accepted.clone(), Message::Reason(error), Message::Shut(1)]);
            }
        }
    });
}

/// A source that does not read its return path: the cancel does not wait for it longer than the limit of the end.
#[test]
fn a_cancel_ends_a_destination_that_cannot_say_anything() {
    time_limit(Duration::from_secs(60), || {
        let destination = Destination::new(Options {
            close_timeout: Duration::from_millis(300),
            stall_limit: None,
            ..Options::default()
        });
        let stop = destination.stop_handle();
        let progress = destination.progress();
        let ((mut main, _channel), listener) = over_unix();
        thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let mut vm = TestDestination::new(guarded_ram());
                destination.run(&mut vm, Box::new(listener), &mut ()).unwrap_err()
            });
            let mut pings = MainEncoder::default();
            for number in 0..10_000 {
                pings.command(&Command::Ping(number));
            }
            let mut encoder = MainEncoder::default();
            encoder.header().configuration("multifd").command(&Command::OpenReturnPath);
            main.write_all(&encoder.bytes).unwrap();
            main.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
            // Until its answers fill everything in between, and it reads no more.
            while main.write_all(&pings.bytes).is_ok() {}
            assert!(progress.snapshot().phase.is_some());
            stop.cancel();
            assert!(matches!(receiver.join().unwrap(), Error::Cancelled));
        });
    });
}

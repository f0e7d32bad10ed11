//! A source that dies while main waits for its channels. Only main's connection can tell, and nothing was read from it then:
//! the destination waited for its whole `setup_timeout`, and without one until it was cancelled.

use std::{io::Write, os::unix::net::UnixStream, time::Duration};

use test_support::{TempDir, time_limit};

use super::script::*;
use crate::{
    destination::{Destination, Options},
    error::{Connection, Error},
    testing::{memory, vm::TestDestination},
    transport::{Connect, unix},
};

/// No limit but the test's own ends a wait.
fn patient() -> Options {
    Options { setup_timeout: None, stall_limit: None, ..Options::default() }
}

/// Main without return path up to the first sync point: its source closes it when it has said all.
fn one_way() -> Wire {
    let mut encoder = multifd_proto::encoder::MainEncoder::default();
    encoder.header().configuration("multifd");
    encoder.ram_start(1, BLOCKS.iter().map(|(_, pages)| (pages * PAGE) as u64).sum());
    for (name, pages) in BLOCKS {
        encoder.block(&multifd_proto::ram::BlockEntry::new(block(name), (pages * PAGE) as u64));
    }
    encoder.flush().eos().footer(1);
    Wire::from_encoder(&encoder)
}

#[test]
fn the_end_of_main_while_channels_are_missing_ends_the_migration() {
    let told = || Wire::raw(told_hello(0, 2).encode()).sync();
    for (wires, here) in [
        (vec![Wire::main().ends(), told()], "1 of 2 channels came"),
        (vec![told(), Wire::main().ends()], "1 of 2 channels came"),
        (vec![Wire::main().ends()], "no channel came"),
        (vec![Wire::main().then(&main_end().bytes).cut_by(1)], "no channel came"),
        (vec![one_way().ends(), told()], "1 of 2 channels came"),
        (vec![one_way().then(&main_end().bytes).cut_by(30)], "no channel came"),
    ] {
        let offset = wires.iter().find(|wire| wire.ends).unwrap().len();
        let received = receive_untold(&wires, patient());
        let error = received.outcome.unwrap_err();
        let Error::SourceGone { at, channels, .. } = &error else { panic!("{error}") };
        assert_eq!((at.connection, at.offset, &**channels), (Connection::Main, offset, here), "{error}");
        assert!(!received.calls.contains(&"start"));
    }
}

/// The same with a process that is gone, and bytes that it had not read: the kernel resets its connection.
#[test]
fn a_reset_of_main_while_channels_are_missing_ends_the_migration() {
    time_limit(Duration::from_secs(60), || {
        for tcp in [false, true] {
            let directory = TempDir::new().unwrap();
            let path = directory.join("s");
            let listener =
                if tcp { crate::transport::tcp::listen("127.0.0.1", 0) } else { unix::listen(&path) }.unwrap();
            let mut main: Box<dyn std::any::Any + Send> = match listener.uri() {
                crate::transport::uri::Uri::Tcp { port, .. } => {
                    let mut main = std::net::TcpStream::connect(("127.0.0.1", *port)).unwrap();
                    main.write_all(&Wire::main().bytes).unwrap();
                    Box::new(main)
                }
                _ => {
                    let mut main = UnixStream::connect(&path).unwrap();
                    main.write_all(&Wire::main().bytes).unwrap();
                    Box::new(main)
                }
            };
            let destination = Destination::new(patient());
            let progress = destination.progress();
            let error = std::thread::scope(|scope| {
                let receiver = scope.spawn(|| {
                    let mut vm = TestDestination::new(guarded_ram());
                    destination.run(&mut vm, Box::new(listener), &mut ()).unwrap_err()
                });
                // Its answers are under way.
                while progress.snapshot().phase != Some(crate::progress::Phase::Setup) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                std::thread::sleep(Duration::from_millis(50));
                main = Box::new(());
                receiver.join().unwrap()
            });
            drop(main);
            assert!(matches!(error, Error::SourceGone { .. }), "tcp {tcp}: {error}");
        }
    });
}

#[test]
fn the_end_of_main_while_a_channel_is_silent_ends_the_migration() {
    let wires = [Wire::main().then(&main_end().bytes).cut_by(1), Wire::channel(0).sync()];
    let error = receive(&wires, patient()).outcome.unwrap_err();
    assert_eq!(error.to_string(), format!("{}: the connection ended in the middle", main_at(wires[0].len())));
}

/// Through a proxy, or from a recording: main is over before the channels come.
#[test]
fn a_source_without_return_path_may_be_done_before_its_channels_come() {
    time_limit(Duration::from_secs(60), || {
        let (listener, connector) = memory::listener(1 << 20);
        let say = |wire: Wire| connector.connect().unwrap().write(&wire.bytes, &[]).unwrap();
        say(one_way().then(&main_end().bytes));
        let destination = Destination::new(Options { channels: Some(1), ..patient() });
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let mut vm = TestDestination::new(guarded_ram());
                destination.run(&mut vm, Box::new(listener), &mut ()).map(drop)
            });
            // Main is looked at a few times.
            std::thread::sleep(Duration::from_millis(350));
            say(Wire::channel(0).sync().then(pages(&[0x1000])).sync());
            receiver.join().unwrap().unwrap();
        });
    });
}

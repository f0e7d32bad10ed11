//! Connections that should not be there, or say nothing, over real sockets: the time limit of the set-up needs a clock.

use std::{
    io::Write,
    net::TcpStream,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use test_support::{TempDir, time_limit};

use super::script::*;
use crate::{
    destination::{Destination, Options},
    error::Error,
    test_vm::TestDestination,
    transport::{Listen, tcp, unix, uri::Uri},
};

/// Lets a destination with `options` listen at `listener` until it gives up. Returns why, and after how long.
fn gives_up(listener: Box<dyn Listen>, options: Options) -> (Error, Duration) {
    time_limit(Duration::from_secs(60), || {
        let begin = Instant::now();
        let mut vm = TestDestination::new(guarded_ram());
        let error = Destination::new(options).run(&mut vm, listener, &mut ()).unwrap_err();
        assert_eq!(vm.calls(), Vec::<&str>::new());
        (error, begin.elapsed())
    })
}

fn one_second(channels: Option<u8>) -> Options {
    Options { channels, setup_timeout: Some(Duration::from_secs(1)), ..Options::default() }
}

fn say(stream: &mut impl Write, wire: &Wire) {
    stream.write_all(&wire.bytes).unwrap();
}

#[test]
fn a_unix_connection_that_says_nothing_ends_the_set_up() {
    for said in [&b""[..], b"QE", &Wire::channel(0).bytes[..63]] {
        let directory = TempDir::new().unwrap();
        let path = directory.join("s");
        let listener = unix::listen(&path).unwrap();
        let mut main = UnixStream::connect(&path).unwrap();
        say(&mut main, &Wire::main());
        let mut silent = UnixStream::connect(&path).unwrap();
        silent.write_all(said).unwrap();
        let (error, took) = gives_up(Box::new(listener), one_second(None));
        let text = error.to_string();
        assert!(matches!(error, Error::SetupTimeout { .. }), "{text}");
        assert!(
            text.starts_with("connection 1 from ") && text.ends_with("did not say what it is within 1 s"),
            "{text}"
        );
        assert!(took >= Duration::from_secs(1), "{took:?}");
    }
}

#[test]
fn a_tcp_connection_that_says_nothing_ends_the_set_up() {
    let listener = tcp::listen("127.0.0.1", 0).unwrap();
    let &Uri::Tcp { port, .. } = listener.uri() else { unreachable!() };
    let _silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (error, _) = gives_up(Box::new(listener), one_second(None));
    let text = error.to_string();
    assert!(text.starts_with("connection 0 from ") && text.ends_with("did not say what it is within 1 s"), "{text}");
}

#[test]
fn channels_that_do_not_come_end_the_set_up() {
    let directory = TempDir::new().unwrap();
    let path = directory.join("s");
    let listener = unix::listen(&path).unwrap();
    let mut streams = [(); 3].map(|()| UnixStream::connect(&path).unwrap());
    say(&mut streams[0], &Wire::main());
    say(&mut streams[1], &Wire::channel(0));
    say(&mut streams[2], &Wire::channel(1));
    let (error, _) = gives_up(Box::new(listener), one_second(Some(3)));
    assert_eq!(error.to_string(), "3 of 4 connections came within 1 s");
}

#[test]
fn a_fourth_channel_where_three_were_fixed_is_refused() {
    let directory = TempDir::new().unwrap();
    let path = directory.join("s");
    let listener = unix::listen(&path).unwrap();
    let mut streams = [(); 5].map(|()| UnixStream::connect(&path).unwrap());
    for id in 0..4 {
        say(&mut streams[1 + usize::from(id)], &Wire::channel(id).sync());
    }
    say(&mut streams[0], &Wire::main());
    let (error, _) = gives_up(Box::new(listener), one_second(Some(3)));
    let text = error.to_string();
    assert!(text.starts_with("unexpected connection from "), "{text}");
    assert!(text.ends_with(", beside main and 3 channels"), "{text}");
    assert!(error.is_peers_fault());
}

#[test]
fn a_stray_connection_that_comes_late_is_refused() {
    // Both channels wait at the end of the round; the stranger comes before main gets there.
    let main = Wire::main().then(main_end().as_bytes());
    let channel = |id| Wire::channel(id).sync().sync();
    let stray = Wire::raw(*b"SSH-2.0-scanner\r\n");
    let fixed = Options { channels: Some(2), ..Options::default() };
    let error = receive(&[main, channel(0), channel(1), stray], fixed).outcome.unwrap_err();
    assert_eq!(error.to_string(), "unexpected connection from memory, beside main and 2 channels");
}

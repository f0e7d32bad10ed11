//! Connections that should not be there, or say nothing, over real sockets: the time limit of the set-up needs a clock.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use test_support::{TempDir, time_limit};

use super::script::*;
use crate::{
    destination::{Destination, Options},
    error::Error,
    testing::vm::TestDestination,
    transport::{Listen, unix},
};

/// Lets a destination with `options` listen at `listener` until it gives up. Returns why, and after how long.
fn gives_up(listener: Box<dyn Listen>, options: Options) -> (Error, Duration) {
    time_limit(Duration::from_secs(60), || {
        let begin = Instant::now();
        let mut vm = TestDestination::new(guarded_ram());
        let error = Destination::new(options).run(&mut vm, listener, &mut ()).unwrap_err();
        assert_eq!(vm.calls(), ["prepare", "abandon"]);
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
fn channels_that_do_not_come_end_the_set_up() {
    let directory = TempDir::new().unwrap();
    let path = directory.join("s");
    let listener = unix::listen(&path).unwrap();
    let mut streams = [(); 4].map(|()| UnixStream::connect(&path).unwrap());
    say(&mut streams[0], &Wire::main());
    say(&mut streams[1], &Wire::channel(0).sync());
    say(&mut streams[2], &Wire::channel(1).sync());
    // One that is only opened is none.
    let (error, took) = gives_up(Box::new(listener), one_second(Some(3)));
    let text = error.to_string();
    assert!(matches!(error, Error::SetupTimeout { .. }), "{text}");
    assert!(text.ends_with("2 of 3 channels came within 1 s"), "{text}");
    assert!(took >= Duration::from_secs(1), "{took:?}");
}

#[test]
fn a_source_that_says_how_many_channels_it_has_is_held_to_it() {
    let directory = TempDir::new().unwrap();
    let path = directory.join("s");
    let told = |id| Wire::raw(told_hello(id, 3).encode()).sync();
    for required in [None, Some(3)] {
        let listener = unix::listen(&path).unwrap();
        let mut streams = [(); 3].map(|()| UnixStream::connect(&path).unwrap());
        say(&mut streams[0], &Wire::main());
        say(&mut streams[1], &told(0));
        say(&mut streams[2], &told(2));
        let (error, _) = gives_up(Box::new(listener), one_second(required));
        assert_eq!(error.to_string(), "2 of 3 channels came within 1 s");
    }
    let listener = unix::listen(&path).unwrap();
    let mut streams = [(); 2].map(|()| UnixStream::connect(&path).unwrap());
    say(&mut streams[0], &Wire::main());
    say(&mut streams[1], &told(0));
    let (error, _) = gives_up(Box::new(listener), one_second(Some(4)));
    assert_eq!(error.to_string(), "3 channels were opened, 4 were expected");
}

#[test]
fn a_flush_without_any_channel_ends_the_set_up() {
    let directory = TempDir::new().unwrap();
    let path = directory.join("s");
    let listener = unix::listen(&path).unwrap();
    let mut main = UnixStream::connect(&path).unwrap();
    say(&mut main, &Wire::main().then(&main_end().bytes));
    let (error, _) = gives_up(Box::new(listener), one_second(None));
    assert_eq!(error.to_string(), "no channel came within 1 s");
}

//! A postcopy that is steered while it runs.

use super::*;

/// Sends the pages after the first at a byte per second: a test does not live to see one.
fn nearly_halted() -> Options {
    let prefetch = vec!["0x41000 pc.ram".parse().unwrap()];
    Options { max_bandwidth: Some(1), prefetch, ..patient() }
}

/// The limit was that of the beginning, whatever an operator said.
#[test]
fn a_limit_that_is_lifted_is_lifted_for_the_pages_that_wait() {
    let dir = TempDir::new().unwrap();
    let source = source(&checkpoint(&dir), nearly_halted());
    let handle = source.handle();
    let (source, outcome) = hands_over(source, |listener| {
        let mut main = Incoming::accept(listener);
        main.load();
        main.expect(b"\x02\0\0\0\x02");
        assert!(main.word());
        // The background waits; what is asked for does not.
        main.ask("pc.ram", 7);
        assert!(main.word());
        assert_eq!(main.pages, [(0, 65, true), (0, 7, false)]);
        handle.set_max_bandwidth(None);
        while main.word() {}
        main.expect(b"\x7e\0\0\0\x02\x03\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\0");
        main.say(&Message::Shut(0));
        assert_all_pages(main.pages);
    });
    outcome.unwrap();
    assert_eq!((source.handle().max_bandwidth(), source.report().background_pages), (None, 8));
    assert!(!source.handle().pause(), "there is nothing left to pause");
}

#[test]
fn a_postcopy_that_is_paused_goes_on_with_what_is_missing_and_the_limit_that_was_set() {
    let dir = TempDir::new().unwrap();
    let source = source(&checkpoint(&dir), nearly_halted());
    let handle = source.handle();
    assert!(!handle.pause(), "there is nothing to pause yet");
    let paused = hands_over(source, |listener| {
        let mut main = Incoming::accept(listener);
        main.load();
        main.expect(b"\x02\0\0\0\x02");
        assert!(main.word());
        assert!(handle.pause());
        assert_eq!(main.stream.read(&mut [0]).unwrap_or(0), 0, "the connection has ended");
    });
    assert!(matches!(&paused.1, Err(Error::Incomplete { reason, .. }) if matches!(**reason, Error::Paused)));
    let source = paused.0;
    assert_eq!(source.vm(), Whereabouts::There);
    assert!(!handle.pause(), "it is paused");
    handle.set_max_bandwidth(None);
    let (source, outcome) = recovers(source, |listener| {
        let mut main = Incoming::accept(listener);
        main.expect(&recovery());
        say_received(&mut main, "pc.ram", RAM.0, &[65]);
        say_received(&mut main, "pc.bios", BIOS.0, &[]);
        main.expect(b"\x08\0\x09\0\0");
        main.say(&Message::ResumeAck(1));
        main.pages();
        main.say(&Message::Shut(0));
        main.pages.push((0, 65, true));
        assert_all_pages(main.pages);
    });
    outcome.unwrap();
    assert_eq!(source.vm(), Whereabouts::Complete);
}

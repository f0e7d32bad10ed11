//! A source goes on after a break: right destinations, and such as break rules.

use super::*;

/// Another process than the one that handed the VM over.
#[test]
fn a_recovery_sends_exactly_what_is_missing() {
    for options in [Options::default(), preempt()] {
        let dir = TempDir::new().unwrap();
        let with_preempt = options.preempt;
        let (source, outcome) = recovers(source(&checkpoint(&dir), options), |listener| {
            let mut main = Incoming::accept(listener);
            main.expect(&recovery());
            let mut urgent = with_preempt.then(|| Incoming::accept(listener));
            let received: Vec<u64> = (0..RAM.0).filter(|page| ![2, 65, 199, 66, 7].contains(page)).collect();
            say_received(&mut main, "pc.ram", RAM.0, &received);
            say_received(&mut main, "pc.bios", BIOS.0, &[0, 1]);
            main.expect(b"\x08\0\x09\0\0");
            main.say(&Message::ResumeAck(1));
            main.ask("pc.ram", 66);
            // One that it has is not sent again.
            main.ask("pc.ram", 64);
            thread::scope(|scope| {
                scope.spawn(|| urgent.as_mut().map(|urgent| while urgent.word() {}));
                main.pages();
            });
            main.say(&Message::Shut(0));
            let mut pages = main.pages;
            pages.extend(urgent.into_iter().flat_map(|urgent| urgent.pages));
            pages.sort_unstable();
            let expected = [(0, 2, true), (0, 7, false), (0, 65, true), (0, 66, false), (0, 199, true), (1, 2, false)];
            assert_eq!(pages, expected);
        });
        outcome.unwrap();
        assert_eq!(source.report().lacking, Some(3), "those of zeros do not count");
        assert_eq!(source.vm(), Whereabouts::Complete);
        assert_eq!(source.report().recoveries, 1);
    }
}

#[test]
fn the_same_source_goes_on_after_a_break() {
    let dir = TempDir::new().unwrap();
    let (source, broken) = hands_over(source(&checkpoint(&dir), Options::default()), |listener| {
        let mut main = Incoming::accept(listener);
        main.load();
        main.expect(b"\x02\0\0\0\x02");
        assert!(main.word());
    });
    assert!(matches!(broken, Err(Error::Incomplete { .. })), "{broken:?}");
    let (source, outcome) = recovers(source, |listener| {
        let mut main = Incoming::accept(listener);
        main.expect(&recovery());
        say_received(&mut main, "pc.ram", RAM.0, &[0]);
        say_received(&mut main, "pc.bios", BIOS.0, &[]);
        main.expect(b"\x08\0\x09\0\0");
        main.say(&Message::ResumeAck(1));
        main.pages();
        main.say(&Message::Shut(0));
        main.pages.push((0, 0, true));
        assert_all_pages(main.pages);
    });
    outcome.unwrap();
    assert_eq!(source.report().left, 0);
}

/// A source without the last word said that the VM lacks memory, also where it had all.
#[test]
fn where_only_the_confirmation_is_missing_it_is_in_doubt_until_the_destination_says_more() {
    let dir = TempDir::new().unwrap();
    let (source, unheard) = hands_over(source(&checkpoint(&dir), patient()), |listener| {
        let mut main = Incoming::accept(listener);
        main.load();
        main.pages();
    });
    let in_doubt = |outcome: &Result<(), Error>| matches!(outcome, Err(Error::Unacknowledged { .. }));
    assert!(in_doubt(&unheard), "{unheard:?}");
    assert_eq!(source.vm(), Whereabouts::There);
    // A connection on which the destination says nothing tells nothing new.
    let (source, silent) = recovers(source, |listener| drop(Incoming::accept(listener)));
    assert!(in_doubt(&silent), "{silent:?}");
    // It has lost the end, and says so; then the end is lost again.
    let everything_but = |main: &mut Incoming, missing: &[u64]| {
        main.expect(&recovery());
        say_received(main, "pc.ram", RAM.0, &(0..RAM.0).filter(|page| !missing.contains(page)).collect::<Vec<_>>());
        say_received(main, "pc.bios", BIOS.0, &[0, 1, 2]);
    };
    let (source, broken) = recovers(source, |listener| {
        let mut main = Incoming::accept(listener);
        everything_but(&mut main, &[2]);
        main.expect(b"\x08\0\x09\0\0");
    });
    assert!(matches!(broken, Err(Error::Incomplete { left: Some(1), .. })), "{broken:?}");
    let (source, unheard) = recovers(source, |listener| {
        let mut main = Incoming::accept(listener);
        everything_but(&mut main, &[]);
        main.expect(b"\x08\0\x09\0\0");
        main.say(&Message::ResumeAck(1));
        main.pages();
    });
    assert!(in_doubt(&unheard), "{unheard:?}");
    let (source, outcome) = recovers(source, |listener| {
        let mut main = Incoming::accept(listener);
        everything_but(&mut main, &[]);
        main.expect(b"\x08\0\x09\0\0");
        main.say(&Message::ResumeAck(1));
        main.pages();
        main.say(&Message::Shut(0));
    });
    outcome.unwrap();
    assert_eq!(source.vm(), Whereabouts::Complete);
}

/// A QEMU that waited for a page when its connection broke may ask for it again, or for the next one, without its block's name.
#[test]
fn a_request_after_a_break_that_names_no_block_is_one_for_every_block_that_has_the_page() {
    let dir = TempDir::new().unwrap();
    let (_, outcome) = recovers(source(&checkpoint(&dir), preempt()), |listener| {
        let mut main = Incoming::accept(listener);
        main.expect(&recovery());
        let mut urgent = Incoming::accept(listener);
        say_received(&mut main, "pc.ram", RAM.0, &[]);
        say_received(&mut main, "pc.bios", BIOS.0, &[]);
        main.expect(b"\x08\0\x09\0\0");
        main.say(&Message::ReqPages { start: 0, len: 0x1000 });
        assert!(urgent.word() && urgent.word());
        let mut asked: Vec<_> = urgent.pages.iter().map(|&(block, page, _)| (block, page)).collect();
        asked.sort_unstable();
        assert_eq!(asked, [(0, 0), (1, 0)]);
        main.say(&Message::ResumeAck(1));
        thread::scope(|scope| {
            scope.spawn(|| while urgent.word() {});
            main.pages();
        });
        main.say(&Message::Shut(0));
        main.pages.extend(urgent.pages);
        assert_all_pages(main.pages);
    });
    outcome.unwrap();
}

#[test]
fn a_recovery_with_wrong_answers_leaves_a_vm_that_can_go_on() {
    type Destination = fn(&mut Incoming);
    let other_order = "RECV_BITMAP that was not asked for, or in another order";
    let cases: [(Destination, &str); 6] = [
        (|main| say_received(main, "pc.ram", RAM.0 + 64, &[]), "length 0x28 instead of 0x20"),
        (|main| say_received(main, "pc.bios", BIOS.0, &[]), other_order),
        (|main| say_received(main, "vga", 1, &[]), other_order),
        (
            |main| {
                main.say(&Message::RecvBitmap { block: name("pc.ram") });
                main.say_bytes(&[&32u64.to_be_bytes()[..], &[0; 32], &[0xff; 8]].concat());
            },
            "end 0xffffffffffffffff instead of",
        ),
        (
            |main| {
                say_received(main, "pc.ram", RAM.0, &[]);
                say_received(main, "pc.bios", BIOS.0, &[]);
                say_received(main, "pc.bios", BIOS.0, &[]);
            },
            other_order,
        ),
        (
            |main| {
                say_received(main, "pc.ram", RAM.0, &[]);
                main.say(&Message::Shut(1));
            },
            "status 1",
        ),
    ];
    for (destination, what) in cases {
        let dir = TempDir::new().unwrap();
        let mut source = source(&checkpoint(&dir), Options::default());
        source.set_vm(Whereabouts::There);
        let recovered = recovers(source, |listener| {
            let mut main = Incoming::accept(listener);
            main.expect(&recovery());
            destination(&mut main);
            while main.stream.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {}
        });
        let reason = incomplete(recovered).to_string();
        assert!(reason.contains(what), "{reason}");
    }
    assert!(matches!(
        received::decode(&1u64.to_be_bytes(), 1),
        Err(ProtocolError::Decode(DecodeError::BadReceivedBitmap { .. }))
    ));
}

/// The stall limit was held off by anything that was said before the bitmaps: PONG after PONG, without an end.
#[test]
fn a_recovery_is_not_kept_by_a_destination_that_says_other_things_than_bitmaps() {
    let dir = TempDir::new().unwrap();
    let options = Options { stall_limit: Some(Duration::from_millis(500)), ..Options::default() };
    let mut source = source(&checkpoint(&dir), options);
    source.set_vm(Whereabouts::There);
    let recovered = recovers(source, |listener| {
        let mut main = Incoming::accept(listener);
        main.expect(&recovery());
        let mut pongs = Vec::new();
        (0..1000).for_each(|value| Message::Pong(value).encode(&mut pongs));
        while main.stream.write(&pongs, &[]).is_ok() {}
    });
    let reason = incomplete(recovered);
    assert!(matches!(reason, Error::Stalled { .. }), "{reason}");
}

/// Nothing listens: the VM is where it was said to be, and a source that was not told where that is does not know. It said that
/// nothing is lost, of a VM of which it had not heard.
#[test]
fn a_recovery_that_reaches_no_destination_leaves_a_vm_where_it_was_said_to_be() {
    let dir = TempDir::new().unwrap();
    let (listener, connector): (MemoryListener, MemoryConnector) = memory::listener(ROOM);
    drop(listener);
    for told in [None, Some(Whereabouts::InDoubt), Some(Whereabouts::There)] {
        let mut source = source(&checkpoint(&dir), Options::default());
        told.into_iter().for_each(|vm| source.set_vm(vm));
        let error = source.recover(&connector).unwrap_err();
        assert_eq!(source.vm(), told.unwrap_or(Whereabouts::InDoubt));
        let reason = match (told, error) {
            (Some(Whereabouts::There), Error::Incomplete { left: None, reason }) => reason,
            (None | Some(Whereabouts::InDoubt), Error::InDoubt { reason }) => reason,
            (_, error) => panic!("{told:?}: {error:?}"),
        };
        assert!(matches!(*reason, Error::Io { .. }), "{reason:?}");
    }
}

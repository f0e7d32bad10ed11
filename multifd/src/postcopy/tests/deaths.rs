//! Destinations that die at each moment, and a disk that fails while it is read: where the VM is then, and that it can go on.

use std::fs::File;

use super::*;

/// Where in the package of [`opening`] LISTEN ends.
fn behind_listen() -> usize {
    let (before_run, _) = opening();
    let mut package = Vec::new();
    let in_package = Package::encode(&devices(), &mut package);
    before_run - in_package + 9 + 5
}

/// A destination that has read `len` bytes of the opening, said what it says by then, and is gone.
fn dies_after(len: usize) -> (Source, Result<(), Error>) {
    let dir = TempDir::new().unwrap();
    let (before_run, opening) = opening();
    hands_over(source(&checkpoint(&dir), patient()), |listener| {
        let mut main = Incoming::accept(listener);
        main.expect(&opening[..len.min(before_run)]);
        if len > before_run {
            main.say(&Message::Pong(2));
            main.expect(&opening[before_run..len]);
        }
    })
}

/// It has none of LISTEN, and none of RUN: the VM is in the checkpoint, and nowhere else.
#[test]
fn a_destination_that_dies_before_run_was_sent_does_not_have_the_vm() {
    let (before_run, listen) = (opening().0, behind_listen());
    assert!(listen < before_run);
    let before_listen = (0..listen).step_by(37).chain([listen - 1]);
    for len in before_listen.chain(listen..=before_run) {
        let (source, outcome) = dies_after(len);
        let error = outcome.unwrap_err();
        assert!(matches!(error, Error::Unconfirmed | Error::Io { .. }), "{len}: {error}");
        assert_eq!(source.vm(), Whereabouts::Here, "{len}");
    }
}

/// It has a part of RUN, or all of it, and has not said that it loaded the devices.
#[test]
fn a_destination_that_dies_with_run_leaves_doubt_and_may_be_asked() {
    let (before_run, opening) = opening();
    for len in before_run + 1..=opening.len() {
        let (source, outcome) = dies_after(len);
        assert!(matches!(outcome, Err(Error::InDoubt { .. })), "{len}: {outcome:?}");
        assert_eq!(source.vm(), Whereabouts::InDoubt, "{len}");
        // A recovery that hears nothing of it, or a refusal, tells nothing more.
        let nothing = |listener: &mut MemoryListener| drop(Incoming::accept(listener));
        let refusal = |listener: &mut MemoryListener| {
            let mut main = Incoming::accept(listener);
            main.expect(&recovery());
            main.say(&Message::Shut(1));
        };
        let (source, silent) = recovers(source, nothing);
        let (source, refused) = recovers(source, refusal);
        assert_eq!(source.vm(), Whereabouts::InDoubt, "{len}");
        assert!([silent, refused].iter().all(|outcome| matches!(outcome, Err(Error::InDoubt { .. }))), "{len}");
        // It had loaded them: it listens again, and lacks everything.
        let (source, outcome) = recovers(source, lacks_everything);
        outcome.unwrap();
        assert_eq!(source.vm(), Whereabouts::Complete);
    }
}

/// The guest ran, and waits at each page that did not come: after each of them.
#[test]
fn a_destination_whose_connection_dies_among_the_pages_gets_the_rest() {
    let words = RAM.0 + BIOS.0;
    for after in (0..words).step_by(23).chain([words - 1]) {
        let dir = TempDir::new().unwrap();
        let mut came = Vec::new();
        let handed = hands_over(source(&checkpoint(&dir), patient()), |listener| {
            let mut main = Incoming::accept(listener);
            main.load();
            main.expect(b"\x02\0\0\0\x02");
            (0..after).for_each(|_| assert!(main.word()));
            came = std::mem::take(&mut main.pages);
        });
        assert_eq!(handed.0.vm(), Whereabouts::There);
        // The rest may be on its way, up to the end: then it may have come. All of it does not fit.
        let (lacks, may_lack) = match &handed.1 {
            Err(Error::Incomplete { .. }) => (true, true),
            Err(Error::Unacknowledged { .. }) => (false, true),
            _ => (false, false),
        };
        assert!(may_lack && (lacks || after > 0), "{after}: {:?}", handed.1);
        let (source, outcome) = recovers(handed.0, |listener| gets_all_but(listener, came));
        outcome.unwrap();
        assert_eq!((source.vm(), source.report().left), (Whereabouts::Complete, 0));
    }
}

/// The disk gives an error where it gave pages before. The guest waits, and a process with a good copy of the file goes on.
#[test]
fn a_disk_that_fails_while_it_is_read_leaves_a_guest_that_can_go_on() {
    for options in [patient(), Options { preempt: true, ..patient() }] {
        let (dir, with_preempt) = (TempDir::new().unwrap(), options.preempt);
        let path = checkpoint(&dir);
        // The memory of this process as a file: the kernel gives EIO where none is mapped. Of both blocks only the first is.
        let contents: Vec<u8> = (0..RAM.0).flat_map(|page| content(0, page)).collect();
        let mut original = Original::new(&Checkpoint::open(&path).unwrap(), options.clone()).unwrap();
        let pages = Arc::get_mut(&mut original.pages).unwrap();
        pages.read_instead(File::open("/proc/self/mem").unwrap(), vec![contents.as_ptr() as u64, 0]);
        let mut came = Vec::new();
        let handed = hands_over(original.source().unwrap(), |listener| {
            let mut main = Incoming::accept(listener);
            // Kept open to the end.
            let _urgent = with_preempt.then(|| Incoming::accept(listener));
            main.load_until_asked();
            main.ask("pc.ram", 64);
            // On its own connection the page may be overtaken by the error.
            if !with_preempt {
                main.expect(b"\x02\0\0\0\x02");
                assert!(main.word());
                came = std::mem::take(&mut main.pages);
            }
            // Held by this end until the other one has given up.
            while main.stream.read(&mut [0; 64]).is_ok_and(|n| n > 0) {}
        });
        let reason = incomplete(handed);
        let Error::Checkpoint(CheckpointError::Io { doing, source: error, .. }) = &reason else { panic!("{reason:?}") };
        assert_eq!((*doing, error.raw_os_error()), ("reading it", Some(rustix::io::Errno::IO.raw_os_error())));
        assert!(reason.to_string().contains("/checkpoint\": reading it: Input/output error"), "{reason}");

        let (source, outcome) = recovers(source(&path, patient()), |listener| gets_all_but(listener, came));
        outcome.unwrap();
        assert_eq!(source.vm(), Whereabouts::Complete);
    }
}

/// A destination that listens again with the pages `came`, and gets the others, each once.
fn gets_all_but(listener: &mut MemoryListener, came: Vec<(usize, u64, bool)>) {
    let mut main = Incoming::accept(listener);
    main.expect(&recovery());
    for (index, (block, pages)) in [("pc.ram", RAM.0), ("pc.bios", BIOS.0)].into_iter().enumerate() {
        let received: Vec<u64> = came.iter().filter(|page| page.0 == index).map(|page| page.1).collect();
        say_received(&mut main, block, pages, &received);
    }
    main.expect(b"\x08\0\x09\0\0");
    main.say(&Message::ResumeAck(1));
    main.pages();
    main.say(&Message::Shut(0));
    main.pages.extend(came);
    assert_all_pages(main.pages);
}

fn lacks_everything(listener: &mut MemoryListener) {
    gets_all_but(listener, Vec::new());
}

//! Sources of ours, which say where the end of the stream is by bytes that no guest knows.

use std::{
    io,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use multifd_proto::{
    BlockName, Codec,
    command::Command,
    encoder::MainEncoder,
    extension::{Extension, Extensions, Offer},
    ram::BlockEntry,
    return_path::Message,
};
use test_support::{TempDir, time_limit};

use super::{
    Checkpoint, CheckpointError, Writer,
    forged_ends::{TIMER, assert_whole, description, end, forgeries, state},
    tail::QUIET,
};
use crate::{
    destination::{self, Destination},
    error::Error,
    ram::{GuestRange, Ram},
    source::{self, Source},
    sync::lock,
    testing::{memory, vm::TestSource},
    transport::{Connect, Listen, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
};

const TOKEN: [u8; 16] = *b"\x06\0unknown bytes\x07";
const LIMIT: Duration = Duration::from_secs(120);

/// What a checkpoint takes of all that a source offers.
fn taken() -> Extensions {
    let taken = Extensions::known().without(Extension::Prepare).without(Extension::SharedMemory);
    taken.without(Extension::SectionLength).without(Extension::StatePackets)
}

/// Main up to the first device, in two parts: the destination answers between them.
fn beginning(token: Option<[u8; 16]>) -> [Vec<u8>; 2] {
    let extensions = Extensions::known().without(Extension::SharedMemory);
    let mut head = MainEncoder::default();
    head.header().configuration("multifd").config_offer(&Offer { channels: 0, token, extensions });
    head.command(&Command::OpenReturnPath);
    let name = || BlockName::new("ram").unwrap();
    let mut ram = MainEncoder::default();
    ram.ram_start(1, 4096).block(&BlockEntry::new(name(), 4096)).eos().footer(1);
    ram.ram_part(1, true).page(&name(), 0).raw(&[1; 4096]).eos().footer(1);
    [head.bytes.clone(), ram.bytes.clone()]
}

/// Receives a stream that goes on with `parts` behind the pages, each with a pause before it, from a source that then waits for READY,
/// if it is to.
fn receive(parts: Vec<(Duration, Vec<u8>)>, waits: bool) -> (TempDir, Result<(), Error>) {
    let dir = TempDir::new().unwrap();
    let path = dir.join("checkpoint");
    let received = time_limit(LIMIT, move || {
        let (listener, connector) = memory::listener(1 << 20);
        let source = thread::spawn(move || -> io::Result<()> {
            let mut main = connector.connect()?;
            let [head, ram] = beginning(Some(TOKEN));
            main.write(&head, &[])?;
            expect(&mut *main, &Message::Accepted(taken()))?;
            main.write(&ram, &[])?;
            for (pause, part) in parts {
                thread::sleep(pause);
                main.write(&part, &[])?;
            }
            if waits {
                expect(&mut *main, &Message::Ready)?;
                main.write(&MainEncoder::default().command(&Command::Go).bytes, &[])?;
                expect(&mut *main, &Message::Shut(0))?;
            }
            Ok(())
        });
        let mut writer = Writer::create(&path, false).unwrap();
        let report = writer.receive(Destination::new(Default::default()), Box::new(listener), &mut ());
        let told = source.join().unwrap();
        assert!(report.is_err() || told.is_ok(), "{told:?}");
        assert_eq!(report.is_ok(), writer.is_published());
        report.map(drop)
    });
    (dir, received)
}

fn expect(main: &mut dyn Stream, message: &Message) -> io::Result<()> {
    let mut expected = Vec::new();
    message.encode(&mut expected);
    let mut found = vec![0; expected.len()];
    main.read_exact(&mut found)?;
    if found == expected { Ok(()) } else { Err(io::Error::other(format!("{message:?} was expected"))) }
}

fn described(sections: &[u8], description: &[u8]) -> Vec<u8> {
    [sections, MainEncoder::default().eof().vm_description(description).bytes.as_slice()].concat()
}

/// Those that fit were taken for the end where the stream stalled there, and what came instead of GO ended the migration.
#[test]
fn no_forgery_is_the_end_however_long_the_stream_stalls_behind_it() {
    thread::scope(|scope| {
        for (name, chosen) in forgeries() {
            let (sections, description) = state(&chosen);
            let stream = [described(&sections, &description), TOKEN.to_vec()].concat();
            let forged = sections.windows(chosen.len()).position(|part| part == chosen).unwrap() + chosen.len();
            for cut in [forged - 1, forged, forged + 1, stream.len() - 16, stream.len() - 7] {
                let parts = vec![(Duration::ZERO, stream[..cut].to_vec()), (QUIET * 2, stream[cut..].to_vec())];
                let (sections, description) = (sections.clone(), description.clone());
                scope.spawn(move || {
                    let (dir, received) = receive(parts, true);
                    assert_whole(&format!("{name}, cut at {cut} ({forged})"), &dir, received, &sections, &description);
                });
            }
        }
    });
}

#[test]
fn the_token_is_found_when_bytes_come_one_by_one() {
    let (sections, description) = state(&TOKEN[..15]);
    let stream = [described(&sections, &description), TOKEN.to_vec()].concat();
    let parts = stream.iter().map(|byte| (Duration::ZERO, vec![*byte])).collect();
    let (dir, received) = receive(parts, true);
    assert_whole("one by one", &dir, received, &sections, &description);
}

#[test]
fn what_is_no_whole_state_up_to_the_token_is_refused() {
    let (sections, good) = state(b"");
    let whole = described(&sections, &good);
    let cut = &whole[..whole.len() - 1];
    let unfit = [&sections[..], &end(&[("timer", TIMER.len())])].concat();
    let more = [&whole[..], &TOKEN, b"x"].concat();
    for (case, stream) in [
        ("it does not fit", [&unfit[..], &TOKEN].concat()),
        ("the last byte is missing", [cut, &TOKEN].concat()),
        ("no token", whole.clone()),
        ("half a token", [&whole[..], &TOKEN[..8]].concat()),
        ("a byte behind it", more),
    ] {
        // The source closes main then.
        let (dir, received) = receive(vec![(Duration::ZERO, stream)], false);
        let error = received.unwrap_err();
        let unfit = matches!(error, Error::Checkpoint(CheckpointError::NotDescribed { .. }));
        assert_eq!(unfit, case == "it does not fit", "{case}: {error}");
        assert!(!dir.join("checkpoint").exists(), "{case}");
    }
}

/// There the decoder finds the end, and not the search for it.
#[test]
fn the_token_ends_a_stream_without_devices_too() {
    let empty = description(&[]);
    let plain = || MainEncoder::default().eof().bytes.clone();
    for (case, stream, is_good) in [
        ("described", described(b"", &empty), true),
        ("not described", plain(), true),
        ("described, another token", [described(b"", &empty), vec![7; 16]].concat(), false),
        ("not described, another token", [plain(), vec![7; 16]].concat(), false),
    ] {
        let (dir, received) = receive(vec![(Duration::ZERO, [stream, TOKEN.to_vec()].concat())], is_good);
        assert_eq!(received.is_ok(), is_good, "{case}: {received:?}");
        assert_eq!(dir.join("checkpoint").exists(), is_good, "{case}");
    }
}

/// A listener whose connections note how long reads were to wait.
struct Noting<L> {
    listener: L,
    asked: Asked,
}

type Asked = Arc<Mutex<Vec<Duration>>>;

impl<L: Listen> Noting<L> {
    fn noted(&self, pending: Box<dyn Pending>) -> Box<dyn Pending> {
        let asked = self.asked.clone();
        wrapped(pending, move |stream| Ok(Box::new(Noted { inner: stream, asked })))
    }
}

impl<L: Listen> Listen for Noting<L> {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let pending = self.listener.accept(timeout)?;
        Ok(self.noted(pending))
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        let pending = self.listener.try_accept()?;
        Ok(pending.map(|pending| self.noted(pending)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.listener.stopper()
    }
}

struct Noted<S: ?Sized> {
    asked: Asked,
    inner: Box<S>,
}

impl<S: RecvHalf + ?Sized> RecvHalf for Noted<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buf)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.inner.read_pages(pages)
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        lock(&self.asked).extend(timeout);
        self.inner.set_read_timeout(timeout)
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.inner.interrupter()
    }
}

impl<S: SendHalf + ?Sized> SendHalf for Noted<S> {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.inner.write(header, pages)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }
}

impl Stream for Noted<dyn Stream> {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let (sends, inner) = self.inner.split()?;
        Ok((sends, Box::new(Noted { asked: self.asked, inner })))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

/// A quarter of a second with the guest paused, of each migration into a checkpoint. A source that takes its destination for a QEMU
/// cannot say where the end is, and the wait is the price of a guest that writes one into its devices.
#[test]
fn the_end_of_a_source_of_ours_is_waited_for_only_where_it_cannot_say_it() {
    for (peer, channels) in [(source::Peer::Multifd, 0), (source::Peer::Multifd, 2), (source::Peer::Qemu, 2)] {
        let dir = TempDir::new().unwrap();
        let path = dir.join("checkpoint");
        let asked = Asked::default();
        let (listener, connector) = memory::listener(1 << 20);
        let listener = Noting { listener, asked: asked.clone() };
        let ram = Ram::for_test(&[("ram", 16)]);
        ram.page(3).unwrap().write(&[7; 4096]);
        time_limit(LIMIT, {
            let path = path.clone();
            move || {
                let mut options = source::Options::default();
                (options.peer, options.plan.channels) = (peer, channels);
                let receiving = destination::Options { channels: Some(channels), ..Default::default() };
                thread::scope(|scope| {
                    let sender =
                        scope.spawn(|| Source::new(options).run(&mut TestSource::new(ram), &connector, &mut ()));
                    let mut writer = Writer::create(&path, false).unwrap();
                    writer.receive(Destination::new(receiving), Box::new(listener), &mut ()).unwrap();
                    sender.join().unwrap().unwrap();
                });
            }
        });
        let waited = lock(&asked).contains(&QUIET);
        assert_eq!(waited, peer == source::Peer::Qemu, "{peer:?}, {channels} channels");
        assert!(!Checkpoint::open(&path).unwrap().sections().is_empty());
    }
}

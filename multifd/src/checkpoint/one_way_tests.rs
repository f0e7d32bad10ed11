//! Plain streams without a way back, from files and pipes, into checkpoints.

use std::{
    fs::{self, File},
    io::{Cursor, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use multifd_proto::{encoder::MainEncoder, packet::Hello};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use test_support::{TempDir, time_limit};

use super::{
    Checkpoint, Writer,
    tests::{BLOCKS, contents, filled, receive},
};
use crate::{
    destination::{self, Destination},
    error::Error,
    source,
    stop::StopHandle,
    testing::vm::TestSource,
    transport::{Listen, fd::FdListener, one_way::OneWayListener, uri::Uri},
};

const LIMIT: Duration = Duration::from_secs(120);

/// A checkpoint of the test VM, and the plain stream that it makes.
fn checkpoint(dir: &TempDir) -> (Checkpoint, Vec<u8>) {
    let path = dir.join("original");
    let machine = "pc-i440fx-10.0".to_owned();
    let mut options = source::Options::default();
    options.qemu.machine = machine;
    options.qemu.uuid = [7; 16];
    options.qemu.validate_uuid = true;
    let (sent, received) = receive(&mut TestSource::new(filled()), &path, options);
    sent.unwrap();
    received.unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let mut stream = Vec::new();
    checkpoint.write_stream(&mut stream).unwrap();
    (checkpoint, stream)
}

/// Takes what comes `from` into the file `to`.
fn take(from: impl Listen + 'static, to: &Path) -> Result<destination::Report, Error> {
    take_with(from, to, destination::Options::default(), |_| ())
}

fn take_with(
    from: impl Listen + 'static,
    to: &Path,
    options: destination::Options,
    meanwhile: impl FnOnce(StopHandle),
) -> Result<destination::Report, Error> {
    let destination = Destination::new(options);
    let mut writer = Writer::create(to, false)?;
    meanwhile(destination.stop_handle());
    let received = writer.receive(destination, Box::new(from), &mut ());
    assert_eq!(writer.is_published(), received.is_ok());
    assert_eq!(to.exists(), received.is_ok());
    received
}

fn file(dir: &TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.join("stream");
    fs::write(&path, bytes).unwrap();
    path
}

fn pipe() -> (File, File) {
    let (read, write) = std::io::pipe().unwrap();
    (OwnedFd::from(read).into(), OwnedFd::from(write).into())
}

fn of_pipe(read: File) -> FdListener {
    FdListener::new(OwnedFd::from(read), Uri::Fd(9)).unwrap()
}

fn error(received: Result<destination::Report, Error>) -> String {
    received.expect_err("it is incomplete or something else").to_string()
}

fn assert_equal(one: &Checkpoint, other: &Checkpoint) {
    assert_eq!(one.machine(), other.machine());
    assert_eq!(one.uuid(), other.uuid());
    assert_eq!(one.ram_section(), other.ram_section());
    assert_eq!(one.sections(), other.sections());
    assert_eq!(one.vmdescription(), other.vmdescription());
    for index in 0..BLOCKS.len() {
        assert_eq!(one.blocks()[index].name, other.blocks()[index].name);
        assert_eq!(one.blocks()[index].pages_present, other.blocks()[index].pages_present);
        assert!(contents(one, index) == contents(other, index), "{}", one.blocks()[index].name);
    }
}

#[test]
fn a_plain_stream_from_a_file_a_pipe_or_a_reader_is_the_checkpoint_it_was_made_of() {
    time_limit(LIMIT, || {
        let dir = TempDir::in_memory().unwrap();
        let (original, stream) = checkpoint(&dir);
        let shifted = [&[0xee; 4321][..], &stream].concat();
        let to = ["file", "offset", "pipe", "reader"].map(|name| dir.join(name));
        let path = file(&dir, &stream);
        let report = take(OneWayListener::open(&path, 0).unwrap(), &to[0]).unwrap();
        assert_eq!(report.channels, 0);
        take(OneWayListener::open(&file(&dir, &shifted), 4321).unwrap(), &to[1]).unwrap();
        let (read, mut write) = pipe();
        let writer = thread::spawn({
            let stream = stream.clone();
            move || stream.chunks(1 << 14).try_for_each(|part| write.write_all(part)).unwrap()
        });
        take(of_pipe(read), &to[2]).unwrap();
        writer.join().unwrap();
        take(OneWayListener::of_reader(Box::new(Cursor::new(stream)), "memory".to_owned()).unwrap(), &to[3]).unwrap();
        for path in &to {
            assert_equal(&original, &Checkpoint::open(path).unwrap());
        }
    });
}

#[test]
fn a_stream_that_is_cut_anywhere_is_no_checkpoint() {
    time_limit(LIMIT, || {
        let dir = TempDir::in_memory().unwrap();
        let (original, stream) = checkpoint(&dir);
        let described = 1 + 1 + 4 + original.vmdescription().len();
        // Behind the end of state all is there, as from a QEMU that is told to describe nothing.
        let without_description = stream.len() - described + 1;
        let near_the_end = (1..60).map(|back| stream.len() - back * back);
        let cuts: Vec<usize> = (0..20).map(|part| stream.len() / 20 * part + part).chain(near_the_end).collect();
        let to = dir.join("to");
        for cut in cuts.into_iter().filter(|cut| *cut != without_description) {
            let from = OneWayListener::of_reader(Box::new(Cursor::new(stream[..cut].to_vec())), "memory".to_owned());
            let cut_short = take(from.unwrap(), &to).err();
            let cut_short = cut_short.unwrap_or_else(|| panic!("{cut} of {} bytes are a checkpoint", stream.len()));
            assert!(!cut_short.to_string().is_empty());
        }
        for more in [&b"\0"[..], b"QEVM\0\0\0\x03", &[0; 5000]] {
            let from = Cursor::new([&stream, more].concat());
            let from = OneWayListener::of_reader(Box::new(from), "memory".to_owned()).unwrap();
            let error = error(take(from, &to));
            assert!(error.contains("after the end of the stream"), "{error}");
        }
    });
}

/// A pipe that ends without a byte, or with something else, left the command waiting for another connection forever.
#[test]
fn the_only_connection_that_is_no_migration_ends_the_wait_for_one() {
    time_limit(LIMIT, || {
        let dir = TempDir::in_memory().unwrap();
        let (original, _) = checkpoint(&dir);
        let to = dir.join("to");
        let hello = Hello { uuid: [0; 16], channel: multifd_proto::ChannelId(0), channels: None }.encode().to_vec();
        let with_channels = {
            let mut encoder = MainEncoder::default();
            encoder.header().configuration("pc-q35-10.0").ram_start(1, 1 << 20);
            let name = multifd_proto::BlockName::new("ram").unwrap();
            encoder.block(&multifd_proto::ram::BlockEntry::new(name, 1 << 20)).flush().eos().footer(1);
            encoder.bytes.clone()
        };
        for (bytes, what) in [
            (vec![], "ends before it has said what it is"),
            (b"QE".to_vec(), "ends before it has said what it is"),
            (b"GET / HTTP/1.1".to_vec(), "speaks HTTP"),
            (b"LibvirtQemudSave".to_vec(), "multifd convert"),
            (vec![0x1f, 0x8b, 8, 0, 0], "gunzip -c"),
            (vec![0; 5000], "not with QEVM"),
            (hello, "one channel of a migration, without its main"),
            (with_channels, "the source has channels"),
            (fs::read(original.path()).unwrap(), "`multifd inspect`"),
        ] {
            let from_file = error(take(OneWayListener::open(&file(&dir, &bytes), 0).unwrap(), &to));
            let (read, mut write) = pipe();
            let writer = thread::spawn(move || drop(write.write_all(&bytes)));
            let from_pipe = error(take(of_pipe(read), &to));
            writer.join().unwrap();
            for error in [from_file, from_pipe] {
                assert!(error.contains(what), "{what:?} is not in {error:?}");
            }
        }
    });
}

#[test]
fn a_cancel_ends_the_wait_for_a_writer_and_for_its_next_byte() {
    time_limit(LIMIT, || {
        let dir = TempDir::in_memory().unwrap();
        let (_, stream) = checkpoint(&dir);
        let to = dir.join("to");
        let cancel_soon = |stop: StopHandle| {
            thread::spawn(move || {
                thread::sleep(Duration::from_millis(200));
                stop.cancel();
            });
        };
        let fifo = dir.join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let from = OneWayListener::open(&fifo, 0).unwrap();
        assert_eq!(error(take_with(from, &to, Default::default(), cancel_soon)), "cancelled");
        for written in [3, 100, stream.len() / 2, stream.len() - 10] {
            let (read, mut write) = pipe();
            let part = stream[..written].to_vec();
            // It stays open until the destination has gone.
            let writer = thread::spawn(move || drop((write.write_all(&part), thread::sleep(Duration::from_secs(1)))));
            assert_eq!(error(take_with(of_pipe(read), &to, Default::default(), cancel_soon)), "cancelled");
            writer.join().unwrap();
        }
    });
}

#[test]
fn a_writer_that_stalls_is_given_up_and_one_that_comes_late_is_not() {
    time_limit(LIMIT, || {
        let dir = TempDir::in_memory().unwrap();
        let (original, stream) = checkpoint(&dir);
        let to = dir.join("to");
        let limit = Duration::from_millis(300);
        let options = || destination::Options { stall_limit: Some(limit), ..Default::default() };
        let fifo = dir.join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let (read, mut write) = pipe();
        write.write_all(&stream[..1000]).unwrap();
        let stalled = error(take_with(of_pipe(read), &to, options(), |_| ()));
        assert!(stalled.contains("fewer than 4096 bytes"), "{stalled}");
        drop(write);
        let from = OneWayListener::open(&fifo, 0).unwrap();
        let late = thread::spawn(move || {
            thread::sleep(2 * limit);
            File::options().write(true).open(&fifo).unwrap().write_all(&stream).unwrap();
        });
        take_with(from, &to, options(), |_| ()).unwrap();
        late.join().unwrap();
        assert_equal(&original, &Checkpoint::open(&to).unwrap());
    });
}

#[test]
fn what_cannot_be_read_is_refused_before_anything_is_waited_for() {
    let dir = TempDir::in_memory().unwrap();
    let path = file(&dir, b"1234");
    let (read, write) = pipe();
    let refused = |opened: std::io::Result<OneWayListener>| opened.err().unwrap().to_string();
    assert!(refused(OneWayListener::open(dir.path(), 0)).contains("directory"));
    assert!(refused(OneWayListener::open(&path, 5)).contains("lies beyond its end, at byte 4"));
    assert!(refused(OneWayListener::open(&dir.join("none"), 0)).contains("No such file"));
    assert!(refused(OneWayListener::new(OwnedFd::from(write), "x".to_owned())).contains("only be written to"));
    drop(read);
    let fifo = dir.join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    assert!(refused(OneWayListener::open(&fifo, 1)).contains("an offset needs a file"));
}

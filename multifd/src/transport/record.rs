//! Keeps a copy of every byte that arrives: one file for each connection, to be looked at later.
//!
//! Files are named after what the connection turns out to be, by its first bytes: `main.bin`, `ch0.bin`, …, and
//! `preempt.bin` for the bare words of postcopy; what is none of these, or is there already, is `connection0.bin`, … in the order of arrival. Sent bytes are not recorded.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use multifd_proto::{packet, postcopy::Beginning};

use super::{
    FarEnd, Listen, Meter, Pending, RecvHalf, SendHalf, Stopper, Stream, ZeroCopyCounters, socket::context, wrapped,
};
use crate::{
    ram::GuestRange,
    sync::{Arc, Mutex, lock},
};

/// A directory that takes the recorded connections of one migration.
#[derive(Clone)]
pub struct Recording {
    shared: Arc<Shared>,
}

struct Shared {
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Connections so far.
    arrived: usize,
    /// Files that exist.
    names: HashSet<String>,
    /// What went wrong first in writing them.
    failure: Option<String>,
}

impl Recording {
    /// Records into `dir`, which is created if needed.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] where the directory has files: a mixture of two recordings is of no use to
    /// anybody. Else the kernel's.
    pub fn new(dir: impl Into<PathBuf>) -> io::Result<Recording> {
        let dir = dir.into();
        let make = |dir: &Path| {
            fs::create_dir_all(dir)?;
            if fs::read_dir(dir)?.next().is_some() {
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the directory is not empty"));
            }
            Ok(())
        };
        make(&dir).map_err(context(dir.display()))?;
        Ok(Recording { shared: Arc::new(Shared { dir, state: Mutex::default() }) })
    }

    /// Why something could not be recorded; the first reason. A connection whose bytes cannot be recorded breaks, and one that breaks
    /// before it has joined a migration is taken for a stranger's, so the migration itself may end for another reason.
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared.state).failure.clone()
    }

    /// The same connection, recorded from now on.
    pub fn stream(&self, stream: Box<dyn Stream>) -> RecordedStream {
        RecordedStream { stream, tape: Arc::new(Mutex::new(self.tape())), staging: Vec::new() }
    }

    /// For the connection that has arrived now.
    fn tape(&self) -> Tape {
        let mut state = lock(&self.shared.state);
        let number = state.arrived;
        state.arrived += 1;
        drop(state);
        Tape { shared: self.shared.clone(), number, head: Vec::new(), file: None }
    }

    fn pending(&self, pending: Box<dyn Pending>) -> Box<dyn Pending> {
        let tape = Arc::new(Mutex::new(self.tape()));
        wrapped(pending, |stream| Ok(Box::new(RecordedStream { stream, tape, staging: Vec::new() })))
    }

    /// The same listener, whose connections are recorded.
    pub fn listener(&self, listener: Box<dyn Listen>) -> RecordingListener {
        RecordingListener { listener, recording: self.clone() }
    }
}

/// A connection that is recorded, or one of its halves.
pub struct RecordedStream<S: ?Sized = dyn Stream> {
    tape: Arc<Mutex<Tape>>,
    staging: Vec<u8>,
    stream: Box<S>,
}

impl<S: SendHalf + ?Sized> SendHalf for RecordedStream<S> {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.stream.write(header, pages)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }

    fn send_without_copy(&mut self, counters: &Arc<ZeroCopyCounters>) -> io::Result<()> {
        self.stream.send_without_copy(counters)
    }

    fn limit_unsent(&mut self, bytes: usize) -> io::Result<()> {
        self.stream.limit_unsent(bytes)
    }

    fn limit_untaken(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.stream.limit_untaken(limit)
    }

    fn discard(&mut self) -> io::Result<()> {
        self.stream.discard()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.stream.finish()
    }
}

impl<S: RecvHalf + ?Sized> RecvHalf for RecordedStream<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(buf)?;
        let mut tape = lock(&self.tape);
        if let Err(error) = tape.record(&buf[..n]) {
            lock(&tape.shared.state).failure.get_or_insert_with(|| error.to_string());
            return Err(error);
        }
        Ok(n)
    }

    /// Goes through private memory, so that also what arrives before an error is recorded.
    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        for page in pages {
            let mut staging = std::mem::take(&mut self.staging);
            staging.resize(page.len(), 0);
            self.read_exact(&mut staging)?;
            page.write(&staging);
            self.staging = staging;
        }
        Ok(())
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.stream.interrupter()
    }
}

impl Stream for RecordedStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let RecordedStream { tape, staging, stream } = *self;
        let (sends, receives) = stream.split()?;
        Ok((sends, Box::new(RecordedStream { tape, staging, stream: receives })))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.stream.stopper()
    }

    fn meter(&self) -> io::Result<Option<Box<dyn Meter>>> {
        self.stream.meter()
    }

    fn far_end(&self) -> FarEnd {
        self.stream.far_end()
    }

    fn peer(&self) -> String {
        self.stream.peer()
    }
}

/// A listener whose connections are recorded.
pub struct RecordingListener {
    listener: Box<dyn Listen>,
    recording: Recording,
}

impl Listen for RecordingListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let pending = self.listener.accept(timeout)?;
        Ok(self.recording.pending(pending))
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        let pending = self.listener.try_accept()?;
        Ok(pending.map(|pending| self.recording.pending(pending)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.listener.stopper()
    }

    fn is_single(&self) -> bool {
        self.listener.is_single()
    }
}

/// What has arrived on one connection.
struct Tape {
    shared: Arc<Shared>,
    /// In the order of arrival.
    number: usize,
    /// The first bytes, for as long as they do not tell what this is. Shorter than a hello then.
    head: Vec<u8>,
    /// Made once the name is known.
    file: Option<File>,
}

impl Tape {
    fn record(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            return file.write_all(bytes).map_err(context(self.shared.dir.display()));
        }
        self.head.extend_from_slice(bytes);
        match name_by(&self.head, self.number) {
            Some(name) => self.open(&name),
            None => Ok(()),
        }
    }

    fn open(&mut self, name: &str) -> io::Result<()> {
        let mut state = lock(&self.shared.state);
        let name = match state.names.insert(name.to_owned()) {
            true => name.to_owned(),
            // A peer that opens a channel twice must not get at the recording of the first one.
            false => unknown(self.number),
        };
        drop(state);
        let path = self.shared.dir.join(name);
        // Guest memory is for nobody but its owner.
        let file = File::options().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.and_then(|mut file| file.write_all(&self.head).map(|()| file));
        self.file = Some(file.map_err(context(path.display()))?);
        self.head = Vec::new();
        Ok(())
    }
}

impl Drop for Tape {
    fn drop(&mut self) {
        // Ended before it said what it is; that, too, may be what somebody looks for.
        if !self.head.is_empty()
            && self.file.is_none()
            && let Err(error) = self.open(&unknown(self.number))
        {
            tracing::warn!(%error, "the recording of a connection is lost");
        }
    }
}

/// The file for connection `number`, which begins with `head`; `None` where that is too little to tell.
fn name_by(head: &[u8], number: usize) -> Option<String> {
    match Beginning::of(*head.first_chunk()?) {
        Beginning::Main => return Some("main.bin".to_owned()),
        // The upper half of an offset, as its first word begins.
        Beginning::Bare if head[0] == 0 => return Some("preempt.bin".to_owned()),
        Beginning::Bare | Beginning::Recovery => return Some(unknown(number)),
        Beginning::Channel => {}
    }
    match packet::Hello::decode(head.first_chunk()?) {
        Ok(hello) => Some(format!("ch{}.bin", hello.channel.0)),
        Err(_) => Some(unknown(number)),
    }
}

fn unknown(number: usize) -> String {
    format!("connection{number}.bin")
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::ChannelId;
    use test_support::TempDir;

    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{ram::Ram, testing::memory};

    fn hello(channel: u8) -> [u8; packet::HELLO_LEN] {
        packet::Hello { uuid: [0; 16], channel: ChannelId(channel), channels: None }.encode()
    }

    /// Sends `sent` over a connection of its own and receives it through `recording`, the last page into guest memory.
    fn pass(recording: &Recording, sent: &[u8]) {
        let (mut ours, theirs) = memory::pair(100_000);
        let mut theirs = recording.stream(Box::new(theirs));
        ours.write(sent, &[]).unwrap();
        drop(ours);
        let into_memory = if sent.len() > 4096 { 4096 } else { 0 };
        // In pieces, so that the name is not known at once.
        let mut rest = sent.len() - into_memory;
        while rest > 0 {
            let mut piece = vec![0; rest.min(7)];
            theirs.read_exact(&mut piece).unwrap();
            rest -= piece.len();
        }
        if into_memory > 0 {
            let ram = Ram::for_test(&[("a", 1)]);
            theirs.read_pages(&[ram.page(0).unwrap()]).unwrap();
            assert_eq!(ram.page_bytes(0), &sent[sent.len() - 4096..]);
        }
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn files_are_named_after_what_the_connection_says_it_is() {
        let dir = TempDir::new().unwrap();
        let recording = Recording::new(dir.path().join("new")).unwrap();
        let mut channel = hello(7).to_vec();
        channel.extend((0..5000).map(|byte| byte as u8));
        let stray = [b'x'; 100];
        let sent: [(&str, &[u8]); 6] = [
            ("ch7.bin", &channel),
            ("main.bin", b"QEVM and more"),
            ("connection2.bin", &stray),
            ("connection3.bin", &hello(7)),
            ("connection4.bin", b"abc"),
            ("ch255.bin", &hello(255)),
        ];
        for (_, bytes) in sent {
            pass(&recording, bytes);
        }
        pass(&recording, b"");
        for (name, bytes) in sent {
            let path = dir.path().join("new").join(name);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
            assert_eq!(fs::read(path).unwrap(), bytes, "{name}");
        }
        assert_eq!(fs::read_dir(dir.path().join("new")).unwrap().count(), sent.len());
    }

    #[test]
    fn bytes_before_an_end_within_a_page_are_kept() {
        let dir = TempDir::new().unwrap();
        let recording = Recording::new(dir.path()).unwrap();
        let (mut ours, theirs) = memory::pair(100_000);
        let mut theirs = recording.stream(Box::new(theirs));
        let ram = Ram::for_test(&[("a", 1)]);
        ours.write(b"QEVM", &[]).unwrap();
        ours.write(&[5; 1000], &[]).unwrap();
        drop(ours);
        theirs.read_exact(&mut [0; 4]).unwrap();
        let error = theirs.read_pages(&[ram.page(0).unwrap()]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(fs::read(dir.path().join("main.bin")).unwrap().len(), 1004);
    }

    #[test]
    fn a_directory_with_files_is_refused() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("main.bin"), "of last week").unwrap();
        let error = Recording::new(dir.path()).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(error.to_string().contains(&*dir.path().to_string_lossy()), "{error}");
    }
}

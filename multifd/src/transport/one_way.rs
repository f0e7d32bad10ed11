//! Streams without a way back: pipes, FIFOs, files, and whatever a program unpacks.
//!
//! There is one connection, which is main. What the destination would answer is not heard, so it is not said. A pipe has a
//! writer that may stall or die; a file has all there is from the beginning, and its end is the end of the stream.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use rustix::{
    fs::{OFlags, fcntl_getfl},
    io::Errno,
};

use super::{
    Established, FarEnd, Listen, Pending, RecvHalf, SendHalf, Stopper, Stream,
    socket::{context, invalid},
    stop_event::StopEvent,
};
use crate::ram::GuestRange;

/// Where the only connection comes from.
pub struct OneWayListener {
    /// `None` once accepted.
    stream: Option<OneWayStream>,
    stopped: StopEvent,
}

impl OneWayListener {
    /// The stream in the file, FIFO or device `path`. In a file it begins at byte `offset`. A FIFO needs no writer yet.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a directory or socket, and for an offset in anything but a file; the kernel's.
    pub fn open(path: &Path, offset: u64) -> io::Result<OneWayListener> {
        let name = format!("file:{}", path.display());
        let open = || {
            // A FIFO without a writer would have us wait here, where nothing can end the wait.
            let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
            if offset > 0 {
                let metadata = file.metadata()?;
                if !metadata.is_file() && !metadata.file_type().is_block_device() {
                    return Err(invalid("an offset needs a file, and this is none"));
                }
                if metadata.is_file() && offset > metadata.len() {
                    let message = format!("the offset {offset} lies beyond its end, at byte {}", metadata.len());
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
                }
                file.seek(SeekFrom::Start(offset))?;
            }
            OneWayListener::new(file.into(), name.clone())
        };
        open().map_err(context(&name))
    }

    /// The stream that `descriptor` gives. It is called `name` in messages.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a directory or socket, and a descriptor that can only be written to; the kernel's.
    pub fn new(descriptor: OwnedFd, name: String) -> io::Result<OneWayListener> {
        let file = File::from(descriptor);
        let kind = file.metadata()?.file_type();
        if kind.is_dir() || kind.is_socket() {
            return Err(invalid(if kind.is_dir() { "it is a directory" } else { "it is a socket" }));
        }
        if fcntl_getfl(&file)? & OFlags::ACCMODE == OFlags::WRONLY {
            return Err(invalid("it can only be written to"));
        }
        let far_end = if kind.is_file() || kind.is_block_device() { FarEnd::File } else { FarEnd::Writer };
        OneWayListener::with(Bytes::Descriptor(Arc::new(file.into())), far_end, name)
    }

    /// The stream that `reader` gives, to its end. It is called `name` in messages. Nothing interrupts its `read`, so that must not wait
    /// for anything but a disk: a pipe or a socket is for [`new`](Self::new), or a transport of its own.
    ///
    /// # Errors
    /// The kernel's, when it is out of descriptors.
    pub fn of_reader(reader: Box<dyn Read + Send>, name: String) -> io::Result<OneWayListener> {
        OneWayListener::with(Bytes::Reader(reader), FarEnd::File, name)
    }

    fn with(bytes: Bytes, far_end: FarEnd, name: String) -> io::Result<OneWayListener> {
        let stream = OneWayStream {
            bytes,
            stopped: StopEvent::new()?,
            interrupted: Arc::default(),
            far_end,
            timeout: None,
            name,
        };
        Ok(OneWayListener { stream: Some(stream), stopped: StopEvent::new()? })
    }
}

impl Listen for OneWayListener {
    /// After the only stream, this waits as it does for any listener to which no more come.
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        match self.stream.take() {
            Some(stream) if !self.stopped.is_set()? => Ok(Box::new(Established::new(stream))),
            _ => Err(self.stopped.wait(timeout)?.into()),
        }
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        Ok(self.stream.take().map(|stream| Box::new(Established::new(stream)) as Box<dyn Pending>))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(self.stopped.clone()))
    }

    fn is_single(&self) -> bool {
        true
    }
}

/// A connection that can only be read.
pub struct OneWayStream {
    bytes: Bytes,
    /// The listener's is another one: it is stopped when no further connection is needed.
    stopped: StopEvent,
    /// Whether it was stopped by its interrupter.
    interrupted: Arc<AtomicBool>,
    far_end: FarEnd,
    timeout: Option<Duration>,
    name: String,
}

enum Bytes {
    Descriptor(Arc<OwnedFd>),
    /// What it reads from is a file, so it does not block.
    Reader(Box<dyn Read + Send>),
}

impl SendHalf for OneWayStream {
    fn write(&mut self, _header: &[u8], _pages: &[GuestRange<'_>]) -> io::Result<()> {
        NoWayBack.write(&[], &[])
    }

    fn finish(&mut self) -> io::Result<()> {
        NoWayBack.finish()
    }
}

impl RecvHalf for OneWayStream {
    /// After [`Stopper::stop`] this is at its end, as a socket is.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let bytes = match &mut self.bytes {
            Bytes::Descriptor(descriptor) => loop {
                match self.stopped.wait_readable(descriptor.as_fd(), self.timeout) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => break 0,
                    waited => waited?,
                }
                match rustix::io::read(&*descriptor, &mut *buf) {
                    // Another reader of the pipe was faster.
                    Err(Errno::INTR | Errno::AGAIN) => {}
                    read => break read?,
                }
            },
            Bytes::Reader(_) if self.stopped.is_set()? => 0,
            Bytes::Reader(reader) => read_some(&mut **reader, buf)?,
        };
        // What was read meanwhile is of no use to a thread that is told to leave.
        if self.interrupted.load(SeqCst) { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(bytes) }
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        for page in pages {
            let mut staging = vec![0; page.len()];
            self.read_exact(&mut staging)?;
            page.write(&staging);
        }
        Ok(())
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.timeout = timeout;
        Ok(())
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        let interrupter = Interrupter { interrupted: self.interrupted.clone(), wakes: self.stopped.clone() };
        Ok(Box::new(interrupter))
    }
}

impl Stream for OneWayStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        Ok((Box::new(NoWayBack), self))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(self.stopped.clone()))
    }

    fn far_end(&self) -> FarEnd {
        self.far_end
    }

    fn peer(&self) -> String {
        self.name.clone()
    }
}

/// Reads what is there, as any reader is read: one that a signal has interrupted is asked again.
pub(crate) fn read_some(reader: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buf) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

/// The half of a one-way stream that does not exist.
struct NoWayBack;

impl SendHalf for NoWayBack {
    fn write(&mut self, _header: &[u8], _pages: &[GuestRange<'_>]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "there is no way back"))
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends the waiting in a way that is told from the end of the stream.
struct Interrupter {
    interrupted: Arc<AtomicBool>,
    wakes: StopEvent,
}

impl Stopper for Interrupter {
    fn stop(&self) {
        // Before the wait ends, so that the thread that waits sees it.
        self.interrupted.store(true, SeqCst);
        self.wakes.stop();
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// Gives one byte at a time, after a signal.
    struct Interrupted(&'static [u8], bool);

    impl Read for Interrupted {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            match self.1 {
                true => Err(io::ErrorKind::Interrupted.into()),
                false => self.0.read(&mut buf[..1]),
            }
        }
    }

    /// It was an error of the connection, and the checkpoint was not read.
    #[test]
    fn a_reader_that_a_signal_interrupts_is_asked_again() {
        let reader = Box::new(Interrupted(b"stream", false));
        let mut listener = OneWayListener::of_reader(reader, "a reader".to_owned()).unwrap();
        let mut stream = listener.accept(None).unwrap().establish(None).unwrap();
        let mut bytes = [0; 6];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!((&bytes, stream.read(&mut [0; 1]).unwrap()), (b"stream", 0));
    }
}

//! Writes a stream to the standard output, until it is interrupted.

use std::{
    io::{self, IsTerminal, Write},
    os::fd::AsFd,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{image::Stop, stdout};

/// The standard output. Once `stop` is cancelled, a write fails with [`io::ErrorKind::ConnectionAborted`], also one that waits for
/// its reader ([`io::ErrorKind::Interrupted`] would be tried again).
pub struct StreamOut<'a> {
    stop: &'a Stop,
    written: u64,
}

impl<'a> StreamOut<'a> {
    /// Begins to write.
    ///
    /// # Errors
    /// It was closed, or is a terminal.
    pub fn new(stop: &'a Stop) -> Result<StreamOut<'a>, String> {
        if stdout::was_closed() {
            return Err("the standard output is closed".to_owned());
        }
        if io::stdout().is_terminal() {
            return Err(
                "the standard output is a terminal, which cannot keep a stream; expected a pipe, or a file for OUT"
                    .to_owned(),
            );
        }
        Ok(StreamOut { stop, written: 0 })
    }

    /// How many bytes were written.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Waits until something can be written.
    fn wait(&self) -> io::Result<()> {
        let stdout = io::stdout();
        let interval = Timespec { tv_sec: 0, tv_nsec: INTERVAL.as_nanos() as _ };
        loop {
            if self.stop.is_cancelled() {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "cancelled"));
            }
            match poll(&mut [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::OUT)], Some(&interval)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Write for StreamOut<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait()?;
        // As much as a pipe takes at once when it takes anything: the write does not wait for its reader.
        let piece = &bytes[..bytes.len().min(PIECE)];
        let written = rustix::io::write(io::stdout().as_fd(), piece)?;
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How soon an interrupt is noticed.
const INTERVAL: Duration = Duration::from_millis(100);
/// PIPE_BUF.
const PIECE: usize = 4096;

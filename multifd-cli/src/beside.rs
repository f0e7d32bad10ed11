//! A file that the command line names beside the VM: a list of pages, the description of a domain.
//!
//! It may be a pipe, as a shell makes one of `<(COMMAND)`. A FIFO to which nothing writes is named and not waited for, and a command
//! that is silent for long is given up.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    io::Errno,
};

/// A file that is read from its beginning.
pub struct Beside {
    file: File,
    /// A FIFO of which nothing has been read yet.
    is_unread_fifo: bool,
    patience: Duration,
}

impl Beside {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(path: &Path) -> io::Result<Beside> {
        Beside::with_patience(path, PATIENCE)
    }

    fn with_patience(path: &Path, patience: Duration) -> io::Result<Beside> {
        // Without this the kernel waits for a writer of a FIFO.
        let file = File::options().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
        let is_unread_fifo = file.metadata()?.file_type().is_fifo();
        Ok(Beside { file, is_unread_fifo, patience })
    }

    /// Waits until there is something to read, or the end.
    fn wait(&self) -> io::Result<()> {
        let patience = Timespec::try_from(self.patience).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&patience)) {
            Ok(0) => {
                let message = format!("it has given nothing for {} s", self.patience.as_secs_f64());
                Err(io::Error::new(io::ErrorKind::TimedOut, message))
            }
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Read for Beside {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read(into) {
                Ok(0) if self.is_unread_fifo && !into.is_empty() => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "it is a FIFO, and nothing was written to it",
                    ));
                }
                Ok(n) => {
                    self.is_unread_fifo = false;
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait()?,
                Err(error) => return Err(error),
            }
        }
    }
}

/// How long a command may take for the next bytes.
const PATIENCE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, thread};

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use test_support::{TempDir, time_limit};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn fifo(dir: &TempDir) -> std::path::PathBuf {
        let path = dir.join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        path
    }

    /// `--prefetch` and `--libvirt-xml` waited for a writer.
    #[test]
    fn a_fifo_without_a_writer_is_not_waited_for_and_not_taken_for_an_empty_file() {
        time_limit(LIMIT, || {
            let dir = TempDir::new().unwrap();
            let error = Beside::open(&fifo(&dir)).unwrap().read_to_end(&mut Vec::new()).unwrap_err();
            assert!(error.to_string().contains("nothing was written"), "{error}");
            fs::write(dir.join("empty"), "").unwrap();
            assert_eq!(Beside::open(&dir.join("empty")).unwrap().read_to_end(&mut Vec::new()).unwrap(), 0);
        });
    }

    #[test]
    fn what_a_command_writes_is_read_to_its_end_and_a_silent_one_is_given_up() {
        time_limit(LIMIT, || {
            let dir = TempDir::new().unwrap();
            let path = fifo(&dir);
            let mut reader = Beside::open(&path).unwrap();
            let mut writer = File::options().write(true).open(&path).unwrap();
            let writes = thread::spawn(move || {
                for _ in 0..3 {
                    thread::sleep(Duration::from_millis(20));
                    writer.write_all(b"<domain>").unwrap();
                }
            });
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            writes.join().unwrap();
            assert_eq!(text, "<domain>".repeat(3));
            let mut reader = Beside::with_patience(&path, Duration::from_millis(20)).unwrap();
            let _writer = File::options().write(true).open(&path).unwrap();
            assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        });
    }
}

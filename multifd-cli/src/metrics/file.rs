//! Metrics in a file, for the textfile collector of the node exporter.
//!
//! A reader finds the metrics of one moment, complete: each state is a new file that takes the name of the old one.

use std::{
    io,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    time::Duration,
};

use crate::{replace, threads};

/// Writes the file once a second until it is dropped, and once more then.
pub struct File {
    path: PathBuf,
    /// Ends the thread when dropped, and the other end of what the thread drops at its own end.
    writer: Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
}

impl File {
    /// Writes `path` and goes on doing so.
    ///
    /// # Errors
    /// The kernel's, of the first time.
    pub(super) fn start(path: &Path) -> io::Result<File> {
        write(path)?;
        let (end, ended) = mpsc::channel();
        let (done, is_done) = mpsc::channel();
        let to = path.to_owned();
        threads::spawn("metrics", move || {
            let mut failing = false;
            while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                match write(&to) {
                    Ok(()) => failing = false,
                    Err(error) if !std::mem::replace(&mut failing, true) => {
                        tracing::warn!(path = %to.display(), %error, "metrics cannot be written, tries again");
                    }
                    Err(_) => {}
                }
            }
            drop(done);
        })?;
        Ok(File { path: path.to_owned(), writer: Some((end, is_done)) })
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let Some((end, ended)) = self.writer.take() else { return };
        drop(end);
        // A disk that does not answer must not keep the process.
        if ended.recv_timeout(LAST_WRITE) == Err(RecvTimeoutError::Disconnected)
            && let Err(error) = write(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the last metrics were not written");
        }
    }
}

fn write(path: &Path) -> io::Result<()> {
    replace::file(path, super::now().as_bytes())
}

const INTERVAL: Duration = Duration::from_secs(1);
const LAST_WRITE: Duration = Duration::from_secs(2);

//! What tests of every crate share: skipping at run time, tables of results, time limits, temporary directories,
//! archives.
//!
//! Rust's test runner has no skip at run time, so the project has a convention: a test that cannot run here calls
//! [`skip`] with the reason and returns. `cargo xtask test` counts these as skipped, not as passed, and prints the
//! reasons. It relies on nothing but the standard library, so each crate can use it as a dev-dependency.

mod huge_pages;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use std::{env, io, process, thread};

pub use huge_pages::HugePages;

/// Names the file to which [`skip`] appends one line per skipped test.
pub const SKIPPED_FILE: &str = "MULTIFD_SKIPPED_FILE";

/// Declares that the current test cannot run here; the caller returns afterwards.
///
/// Prints `skipped: TEST: REASON` to stderr and appends `TEST: REASON` to the file named by [`SKIPPED_FILE`]. One
/// call is one skipped test.
///
/// # Panics
///
/// If that file is named and cannot be written: the test would otherwise be counted as passed.
pub fn skip(reason: &str) {
    let current = thread::current();
    let line = format!("{}: {}\n", current.name().unwrap_or("unnamed test"), reason.replace('\n', " "));
    eprint!("skipped: {line}");
    if let Some(path) = env::var_os(SKIPPED_FILE) {
        append_line(Path::new(&path), &line).expect("the file for skipped tests is writable");
    }
}

/// Names the directory that collects what tests [`report`].
pub const REPORTS: &str = "MULTIFD_REPORTS";

/// Adds a row to the table `table` that the test run prints at its end.
///
/// For results that are worth a table besides passed and failed, such as which combinations of versions were tried.
/// Rows come from many test processes in any order, so the table is sorted by row. Goes to stderr outside of a
/// test run.
///
/// # Panics
///
/// If the directory for tables is named and cannot be written: the table would be incomplete.
pub fn report(table: &str, row: &str) {
    let row = format!("{}\n", row.replace('\n', " "));
    match env::var_os(REPORTS) {
        None => eprint!("{table}: {row}"),
        Some(directory) => {
            append_line(&Path::new(&directory).join(table), &row).expect("the directory for tables is writable");
        }
    }
}

/// Runs under continuous integration (`CI=true`), where what is needed must be there instead of skipped.
pub fn in_ci() -> bool {
    env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}

/// Runs `body` and aborts the whole process with a message if it takes longer than `limit`.
///
/// The limit is kept by another thread, so it also ends a `body` that is stuck in a system call or waits for a
/// lock. Aborting is deliberate: a stuck thread cannot be ended in any other way, and a test that hangs must fail.
pub fn time_limit<T>(limit: Duration, body: impl FnOnce() -> T) -> T {
    let test = thread::current().name().unwrap_or("unnamed test").to_owned();
    let (done, watch) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if watch.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{test}: not finished after {limit:?}, aborting");
            process::abort();
        }
    });
    // Dropped at the end and also when `body` panics, which ends the watchdog.
    let result = {
        let _done = done;
        body()
    };
    let _ = watchdog.join();
    result
}

/// The names and contents of the files in `archive`, a tar archive as the recorded streams are.
///
/// # Panics
///
/// If it is none, or ends too early.
pub fn untar(mut archive: impl Read) -> Vec<(String, Vec<u8>)> {
    let (mut files, mut head) = (Vec::new(), [0; 512]);
    // A tar archive ends with a block of zeros.
    while archive.read_exact(&mut head).is_ok() && head[0] != 0 {
        let text = |field: &[u8]| {
            let len = field.iter().position(|byte| *byte == 0 || *byte == b' ').unwrap_or(field.len());
            String::from_utf8(field[..len].to_vec()).expect("ustar fields are text")
        };
        let size = usize::from_str_radix(&text(&head[124..136]), 8).expect("ustar sizes are octal");
        let mut bytes = vec![0; size.next_multiple_of(512)];
        archive.read_exact(&mut bytes).expect("the archive is complete");
        bytes.truncate(size);
        files.push((text(&head[..100]), bytes));
    }
    files
}

/// A directory of its own that is removed with everything in it when this is dropped.
#[derive(Debug)]
pub struct TempDir {
    path: PathBuf,
}

impl TempDir {
    /// Creates an empty directory below the system's directory for temporary files.
    ///
    /// The path is short, so that a unix socket (at most 107 bytes) fits into it.
    pub fn new() -> io::Result<Self> {
        Self::new_in(&env::temp_dir())
    }

    /// Creates an empty directory in memory (`/dev/shm`) if there is one, for files as large as a guest's memory.
    pub fn in_memory() -> io::Result<Self> {
        Self::new_in(Path::new("/dev/shm")).or_else(|_| Self::new())
    }

    /// Creates an empty directory below `parent`.
    pub fn new_in(parent: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            // Relaxed: the number only has to be another one each time.
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("multifd-{}-{number}", process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path }),
                // Left behind by a killed process that had the same id.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of `name` inside the directory.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // Nothing depends on it, and a panic here would hide the test's own.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// One write in append mode keeps the lines of processes that run side by side apart.
fn append_line(path: &Path, line: &str) -> io::Result<()> {
    OpenOptions::new().create(true).append(true).open(path)?.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temp_dir_goes_away_with_its_contents() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().to_owned();
        fs::write(dir.join("file"), b"x").unwrap();
        assert!(path.is_dir());
        drop(dir);
        assert!(!path.exists());
    }

    #[test]
    fn two_temp_dirs_are_different() {
        assert_ne!(TempDir::new().unwrap().path(), TempDir::new().unwrap().path());
    }

    #[test]
    fn a_body_within_its_limit_returns_its_value() {
        assert_eq!(time_limit(Duration::from_secs(60), || 7), 7);
    }

    #[test]
    fn a_panic_in_a_limited_body_reaches_the_caller() {
        let caught = std::panic::catch_unwind(|| time_limit(Duration::from_secs(60), || panic!("as planned")));
        assert!(caught.is_err());
    }

    /// Runs the current test again in a process of its own, in which `ROLE` is set: one aborts, the other reports
    /// through an environment variable.
    fn run_again(test: &str, skipped: &Path) -> process::Output {
        process::Command::new(env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture"])
            .env(ROLE, "child")
            .env(SKIPPED_FILE, skipped)
            .env(REPORTS, skipped.parent().unwrap())
            .output()
            .unwrap()
    }

    const ROLE: &str = "MULTIFD_TEST_ROLE";

    #[test]
    fn a_body_that_hangs_ends_the_process() {
        if env::var_os(ROLE).is_some() {
            time_limit(Duration::from_millis(50), || {
                loop {
                    thread::park();
                }
            })
        }
        let dir = TempDir::new().unwrap();
        let output = run_again("tests::a_body_that_hangs_ends_the_process", &dir.join("skipped"));
        assert!(!output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("not finished after 50ms"), "{output:?}");
    }

    #[test]
    fn a_report_is_a_row_of_the_named_table() {
        if env::var_os(ROLE).is_some() {
            return report("peers", "7.2 | ok");
        }
        let dir = TempDir::new().unwrap();
        let output = run_again("tests::a_report_is_a_row_of_the_named_table", &dir.join("skipped"));
        assert!(output.status.success(), "{output:?}");
        assert_eq!(fs::read_to_string(dir.join("peers")).unwrap(), "7.2 | ok\n");
    }

    #[test]
    fn a_skip_is_one_line_in_the_named_file() {
        if env::var_os(ROLE).is_some() {
            return skip("no such\ndevice");
        }
        let dir = TempDir::new().unwrap();
        let output = run_again("tests::a_skip_is_one_line_in_the_named_file", &dir.join("skipped"));
        assert!(output.status.success(), "{output:?}");
        let line = "tests::a_skip_is_one_line_in_the_named_file: no such device\n";
        assert_eq!(fs::read_to_string(dir.join("skipped")).unwrap(), line);
    }
}

//! Prints the engine's events to stderr, as many of them as `-v` and `-q` say.

use std::io;

use tracing_subscriber::{filter::LevelFilter, fmt::MakeWriter};

use crate::{cli::OutputArgs, progress};

/// Sends the events of this process to stderr from now on.
pub fn start(output: &OutputArgs) {
    let level = match (output.quiet, output.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::WARN,
        (false, 1) => LevelFilter::INFO,
        (false, 2) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    let terminal = io::IsTerminal::is_terminal(&io::stderr());
    // Fails only where a subscriber is set already, and nobody else sets one.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(terminal)
        .with_writer(AboveTheBar)
        .try_init();
}

/// Prints above the progress bar, where there is one.
struct AboveTheBar;

impl<'a> MakeWriter<'a> for AboveTheBar {
    type Writer = Lines;

    fn make_writer(&'a self) -> Lines {
        Lines
    }
}

/// One event.
struct Lines;

impl io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        progress::above_the_bar(|| io::stderr().write_all(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

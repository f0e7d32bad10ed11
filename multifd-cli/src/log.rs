//! Prints the engine's events to stderr, as many of them as `-v` and `-q` say.

use std::io;

use tracing_subscriber::{
    field::MakeExt,
    filter::LevelFilter,
    fmt::{MakeWriter, format},
};

use crate::{args::OutputArgs, printable, terminal};

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
    // Values may be the peer's text.
    let fields = format::debug_fn(|writer, field, value| {
        let text = format!("{value:?}");
        match field.name() {
            "message" => write!(writer, "{}", printable::line(&text)),
            name => write!(writer, "{name}={}", printable::line(&text)),
        }
    });
    // Fails only where a subscriber is set already, and this is the only place that sets one.
    let _ = tracing_subscriber::fmt()
        .fmt_fields(fields.delimited(" "))
        .with_max_level(level)
        .with_target(false)
        .with_ansi(terminal)
        .with_writer(AboveTheBar)
        .try_init();
}

/// Passes events on to the thread that prints. It never fails: the subscriber would print that itself, and panic where
/// stderr is gone, in a thread of the migration.
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
        terminal::write(String::from_utf8_lossy(line).into_owned());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

//! `--metrics`: the figures of this process for Prometheus, over HTTP or in a file of its textfile collector.
//!
//! Threads of their own serve them, which look at the counters of the migration and nothing else. Nothing that a client does,
//! and no error, reaches the migration.

mod file;
mod served;
mod server;
mod text;
mod two_ends;

use std::{fmt, io, path::PathBuf, str::FromStr, sync::OnceLock};

use multifd::transport::uri::{Uri, UriError};

pub use self::{
    served::{Sent, Served, render as render_served},
    two_ends::TwoEnds,
};
use crate::{current, terminal};

/// Where metrics are to be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Over HTTP at this address: tcp or unix.
    Http(Uri),
    /// In this file.
    File(PathBuf),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        let expected = || "expected tcp:HOST:PORT, unix:PATH or file:PATH".to_owned();
        match text.parse() {
            Ok(Uri::File(_)) | Err(_) if text.starts_with("file:") => match &text["file:".len()..] {
                "" => Err(expected()),
                path => Ok(Target::File(path.into())),
            },
            Ok(uri @ (Uri::Tcp { .. } | Uri::Unix(_))) => Ok(Target::Http(uri)),
            Err(error) if text.starts_with("unix:") => Err(UriError::to_string(&error)),
            Ok(_) | Err(_) => Err(expected()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Http(uri) => uri.fmt(f),
            Target::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

/// Serves metrics for as long as it exists; a file gets its last state when it is dropped.
pub struct Metrics {
    _server: Option<server::Server>,
    _file: Option<file::File>,
}

impl Metrics {
    /// Begins to serve at `target`.
    ///
    /// # Errors
    /// The kernel's: the address is in use, the file cannot be written.
    pub fn start(target: &Target) -> io::Result<Metrics> {
        let context = |error: io::Error| io::Error::new(error.kind(), format!("--metrics {target}: {error}"));
        match target {
            Target::Http(uri) => {
                let (server, uri) = server::Server::start(uri).map_err(context)?;
                terminal::say(&format!("metrics on {uri}"));
                Ok(Metrics { _server: Some(server), _file: None })
            }
            Target::File(path) => {
                let file = file::File::start(path).map_err(context)?;
                Ok(Metrics { _server: None, _file: Some(file) })
            }
        }
    }
}

/// Has `render` say the metrics of this process from now on, in place of the one migration that it makes otherwise. The first call
/// of a process counts.
pub fn render_by(render: impl Fn() -> String + Send + Sync + 'static) {
    let _ = OTHERS.set(Box::new(render));
}

/// The metrics of this moment.
fn now() -> String {
    match OTHERS.get() {
        Some(render) => render(),
        None => {
            let (current, ended) = current::get();
            text::render(current.as_ref(), ended)
        }
    }
}

type Render = Box<dyn Fn() -> String + Send + Sync>;

static OTHERS: OnceLock<Render> = OnceLock::new();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_an_address_or_a_file() {
        let target = |text: &str| text.parse::<Target>();
        assert_eq!(target("file:/x/y"), Ok(Target::File("/x/y".into())));
        assert!(matches!(target("tcp:127.0.0.1:9100"), Ok(Target::Http(Uri::Tcp { port: 9100, .. }))));
        assert!(matches!(target("unix:/x"), Ok(Target::Http(Uri::Unix(_)))));
        for wrong in ["", "file:", "fd:3", "9100", "http://x", "tcp:x"] {
            assert!(target(wrong).is_err(), "{wrong}");
        }
        for text in ["file:/x/y", "tcp:127.0.0.1:9100", "unix:/x"] {
            assert_eq!(target(text).unwrap().to_string(), text);
        }
    }
}

//! Where a stream comes from: `-`, `file:PATH[,offset=N]`, `systemd[:NAME]`, or a URI.

use std::{fmt, io, path::PathBuf};

use multifd::transport::{
    Listen,
    fd::FdListener,
    one_way::OneWayListener,
    uri::{Uri, UriError},
};

use crate::{activation, units};

/// Where a destination finds its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The standard input.
    StandardInput,
    /// A file, FIFO or device.
    File {
        /// Where it is.
        path: PathBuf,
        /// Where the stream begins in it.
        offset: u64,
    },
    /// Where the source connects to, or an inherited descriptor.
    Uri(Uri),
    /// A socket that systemd passes: the only one, or the one of this name.
    Systemd(Option<String>),
}

/// An origin that can be accepted from.
pub struct Ready {
    /// Where connections arrive.
    pub listener: Box<dyn Listen>,
    /// What is waited for, as a sentence.
    pub what: String,
    /// Where the source connects to, with the port that was picked.
    pub uri: Option<Uri>,
}

/// Where a guest comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming<A> {
    /// It connects there, or is read from there.
    At(A),
    /// A client says it later, by QMP's `migrate-incoming`.
    Defer,
}

impl<A> Incoming<A> {
    /// The address, where it is known from the start.
    pub fn address(&self) -> Option<&A> {
        match self {
            Incoming::At(address) => Some(address),
            Incoming::Defer => None,
        }
    }
}

impl Origin {
    /// Makes it ready to be accepted from.
    ///
    /// # Errors
    /// It cannot be opened or listened at.
    pub fn listener(&self) -> io::Result<Ready> {
        Ok(match self {
            Origin::StandardInput => Ready {
                listener: Box::new(FdListener::standard_input()?),
                what: "reading from standard input".to_owned(),
                uri: None,
            },
            Origin::File { path, offset } => Ready {
                listener: Box::new(OneWayListener::open(path, *offset)?),
                what: format!("reading from {self}"),
                uri: None,
            },
            Origin::Uri(uri) => {
                let listener = uri.listener()?;
                let uri = listener.uri().clone();
                Ready { listener: Box::new(listener), what: format!("listening on {uri}"), uri: Some(uri) }
            }
            Origin::Systemd(name) => {
                let (listener, at) = activation::listener(name.as_deref())?;
                Ready { listener, what: format!("listening on {at}"), uri: None }
            }
        })
    }

    /// Where the source connects to.
    pub fn address(&self) -> Option<&Uri> {
        match self {
            Origin::Uri(uri) => Some(uri),
            Origin::StandardInput | Origin::File { .. } | Origin::Systemd(_) => None,
        }
    }

    /// Whether there is a single connection, without a way back.
    pub fn is_one_way(&self) -> bool {
        !matches!(self, Origin::Uri(_) | Origin::Systemd(_))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::StandardInput => f.write_str("-"),
            Origin::File { path, offset: 0 } => write!(f, "file:{}", path.display()),
            Origin::File { path, offset } => write!(f, "file:{},offset={offset}", path.display()),
            Origin::Uri(uri) => uri.fmt(f),
            Origin::Systemd(None) => f.write_str("systemd"),
            Origin::Systemd(Some(name)) => write!(f, "systemd:{name}"),
        }
    }
}

/// Reads an [`Origin`].
///
/// # Errors
/// What was expected, for clap.
pub fn origin(text: &str) -> Result<Origin, String> {
    if text == "-" {
        return Ok(Origin::StandardInput);
    }
    if let Some(socket) = systemd(text)? {
        return Ok(socket);
    }
    match text.parse().map_err(|error: UriError| format!("{error}; or systemd, or - for the standard input"))? {
        Uri::Fd(0) => Ok(Origin::StandardInput),
        Uri::File(_) => file(text.strip_prefix("file:").unwrap_or(text)),
        uri => Ok(Origin::Uri(uri)),
    }
}

/// Reads an [`Origin`], or `defer`.
///
/// # Errors
/// What was expected, for clap.
pub fn incoming_origin(text: &str) -> Result<Incoming<Origin>, String> {
    if text == "defer" { Ok(Incoming::Defer) } else { origin(text).map(Incoming::At) }
}

/// Reads where a guest arrives that comes over several connections, or `defer`.
///
/// # Errors
/// What was expected, for clap.
pub fn incoming_uri(text: &str) -> Result<Incoming<Uri>, UriError> {
    if text == "defer" { Ok(Incoming::Defer) } else { text.parse().map(Incoming::At) }
}

/// Reads where any number of connections arrive: `tcp:HOST:PORT`, `unix:PATH`, `vsock:CID:PORT`, `fd:N` or `systemd[:NAME]`.
///
/// # Errors
/// What was expected, for clap.
pub fn meeting_place(text: &str) -> Result<Origin, String> {
    if let Some(socket) = systemd(text)? {
        return Ok(socket);
    }
    match text.parse().map_err(|error: UriError| format!("{error}; or systemd"))? {
        Uri::File(_) => {
            Err("a file connects nothing; expected tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:N or systemd"
                .to_owned())
        }
        uri => Ok(Origin::Uri(uri)),
    }
}

/// `systemd` or `systemd:NAME`; nothing where it is something else.
fn systemd(text: &str) -> Result<Option<Origin>, String> {
    match text.strip_prefix("systemd") {
        Some("") => Ok(Some(Origin::Systemd(None))),
        Some(":") => Err("expected systemd, or systemd:NAME with the FileDescriptorName= of a socket".to_owned()),
        Some(name) => Ok(name.strip_prefix(':').map(|name| Origin::Systemd(Some(name.to_owned())))),
        None => Ok(None),
    }
}

/// `PATH[,offset=N]`.
fn file(text: &str) -> Result<Origin, String> {
    let (path, offset) = match text.rsplit_once(",offset=") {
        None => (text, 0),
        Some((path, offset)) => (path, bytes(offset).ok_or_else(|| format!("{text:?}: expected {OFFSET_FORM}"))?),
    };
    match path {
        "" => Err(format!("{text:?}: expected {OFFSET_FORM}")),
        path => Ok(Origin::File { path: path.into(), offset }),
    }
}

/// A number of bytes: decimal, hexadecimal, or with a unit.
fn bytes(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => u64::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None => units::size(text).ok(),
    }
}

const OFFSET_FORM: &str = "file:PATH[,offset=N], where N is a number of bytes, as in 4096, 0x1000 or 4K";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_read_and_written_back() {
        let file = |path: &str, offset| Origin::File { path: path.into(), offset };
        for (text, expected) in [
            ("-", Origin::StandardInput),
            ("file:/tmp/x", file("/tmp/x", 0)),
            ("file:/tmp/x,offset=4096", file("/tmp/x", 4096)),
            ("file:a,b", file("a,b", 0)),
            ("file:a,offset=1,offset=2", file("a,offset=1", 2)),
            ("unix:/tmp/s", Origin::Uri(Uri::Unix("/tmp/s".into()))),
            ("fd:7", Origin::Uri(Uri::Fd(7))),
            ("systemd", Origin::Systemd(None)),
            ("systemd:vm", Origin::Systemd(Some("vm".to_owned()))),
        ] {
            assert_eq!(origin(text).as_ref(), Ok(&expected), "{text}");
            assert_eq!(expected.to_string(), text);
        }
        assert_eq!(origin("fd:0"), Ok(Origin::StandardInput));
        assert_eq!(origin("file:/tmp/x,offset=0x1000"), Ok(file("/tmp/x", 4096)));
        assert_eq!(origin("file:/tmp/x,offset=4K"), Ok(file("/tmp/x", 4096)));
    }

    #[test]
    fn a_wrong_offset_or_form_is_named() {
        for text in ["file:/x,offset=", "file:/x,offset=0x", "file:/x,offset=-1", "file:,offset=1", "file:/x,offset=y"]
        {
            assert!(origin(text).unwrap_err().contains("file:PATH[,offset=N]"), "{text}");
        }
        assert!(origin("systemd:").unwrap_err().contains("systemd:NAME"));
        assert!(origin("systemdx").unwrap_err().contains("or systemd"));
        assert!(origin("stdin").unwrap_err().contains("or - for the standard input"));
    }
}

//! Values of options: how they are read, and shown to be read again.

use std::{num::NonZeroU8, time::Duration};

use clap::ValueEnum;
use multifd::transport::{
    uri::{Uri, UriError},
    vsock::{ANY_CID, ANY_PORT},
};

use crate::units::Limit;

/// Addresses that any number of connections can be opened to.
pub const SEVERAL: &str = "tcp:HOST:PORT, unix:PATH or vsock:CID:PORT";

/// The name of `value` on the command line.
pub fn value_name(value: &impl ValueEnum) -> String {
    value.to_possible_value().expect("no value is skipped").get_name().to_owned()
}

/// A number of channels.
pub fn channels(text: &str) -> Result<NonZeroU8, String> {
    text.parse().map_err(|_| "expected a number from 1 to 255".to_owned())
}

/// A number of channels, or none beside main.
pub fn channels_or_none(text: &str) -> Result<u8, String> {
    text.parse().map_err(|_| "expected a number from 0 to 255".to_owned())
}

/// A host for `tcp:HOST:PORT`.
pub fn host(text: &str) -> Result<String, String> {
    match format!("tcp:{text}:0").parse::<Uri>() {
        Ok(Uri::Tcp { .. }) => Ok(text.to_owned()),
        _ => Err("expected a name or an address, IPv6 in brackets, as in [::1]".to_owned()),
    }
}

/// Where a source can send to.
pub fn destination_uri(text: &str) -> Result<Uri, String> {
    match text.parse().map_err(|error: UriError| error.to_string())? {
        uri @ (Uri::Tcp { .. } | Uri::Unix(_) | Uri::Vsock { .. } | Uri::File(_)) => Ok(uri),
        uri @ Uri::Fd(_) => Err(format!("{uri} is one connection, and a source opens several; expected {SEVERAL}")),
    }
}

/// Where the two ends of a migration meet: an address that means the same to both.
pub fn meeting_uri(text: &str) -> Result<Uri, String> {
    let expected = format!("expected {SEVERAL}");
    match text.parse().map_err(|error: UriError| error.to_string())? {
        Uri::Tcp { host, .. } if host.parse().is_ok_and(|address: std::net::IpAddr| address.is_unspecified()) => {
            Err("it is every address of this host, and one to connect to is needed; expected tcp:HOST:PORT".to_owned())
        }
        Uri::Tcp { host, .. } if host.is_empty() => Err(expected),
        Uri::Unix(path) if !path.is_absolute() => {
            Err("QEMU has another directory; expected unix:PATH with an absolute PATH".to_owned())
        }
        Uri::Vsock { cid: ANY_CID, .. } | Uri::Vsock { port: ANY_PORT, .. } => Err(format!(
            "{ANY_CID} is for listening alone, and an address to connect to is needed; expected vsock:CID:PORT"
        )),
        uri @ (Uri::Tcp { .. } | Uri::Unix(_) | Uri::Vsock { .. }) => Ok(uri),
        Uri::Fd(_) | Uri::File(_) => Err(expected),
    }
}

/// `unix:PATH`.
pub fn unix_uri(text: &str) -> Result<Uri, String> {
    match text.parse() {
        Ok(uri @ Uri::Unix(_)) => Ok(uri),
        Err(error) if text.starts_with("unix:") => Err(UriError::to_string(&error)),
        _ => Err("expected unix:PATH".to_owned()),
    }
}

/// `text` as 16 bytes: 32 hexadecimal digits.
pub fn bytes16(text: &str) -> Option<[u8; 16]> {
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes))?
}

/// A UUID, with hyphens or without.
pub fn uuid(text: &str) -> Result<[u8; 16], String> {
    let hyphens = text.match_indices('-').map(|(at, _)| at).eq([8, 13, 18, 23]);
    let digits = if hyphens { text.replace('-', "") } else { text.to_owned() };
    bytes16(&digits).ok_or_else(|| "expected a UUID, as in 6f1d7c1e-4d4a-4b0e-9a3c-2f6f0f3a5b11".to_owned())
}

/// As [`units::time_limit`] reads it.
pub fn show_limit(Limit(time): Limit<Duration>) -> String {
    time.map_or("0".to_owned(), |time| format!("{}us", time.as_micros()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_32_digits_with_hyphens_or_without() {
        let bytes = [0, 17, 34, 51, 68, 85, 102, 119, 136, 153, 170, 187, 204, 221, 238, 255];
        assert_eq!(uuid("00112233-4455-6677-8899-AABBCCDDEEFF"), Ok(bytes));
        assert_eq!(uuid("00112233445566778899aabbccddeeff"), Ok(bytes));
        for wrong in
            ["", "0011223344556677", "0011-22334455-6677-8899-AABBCCDDEEFF", "+0112233445566778899aabbccddeeff"]
        {
            assert!(uuid(wrong).unwrap_err().contains("expected a UUID"), "{wrong}");
        }
    }
}

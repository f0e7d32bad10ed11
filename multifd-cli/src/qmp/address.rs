//! The addresses in QMP's `migrate` and `migrate-incoming`: a URI, or the list of channels that QEMU has had since 8.2.
//!
//! Both forms end in the same type. What a QEMU has and this program does not is refused by name, and not ignored.

use multifd::transport::uri::Uri;
use multifd_qmp::server::{Arguments, CommandError};
use serde_json::Value;

use super::Incoming;
use crate::args::{Origin, SEVERAL, origin};

/// Where `migrate` migrates to.
///
/// # Errors
/// It is none, or none that a source connects to.
pub(super) fn destination(mut arguments: Arguments) -> Result<Uri, CommandError> {
    // A migration is always detached from its client.
    arguments.flag("detach")?;
    for option in ["blk", "inc"] {
        if arguments.flag(option)? == Some(true) {
            return Err(not_here(option));
        }
    }
    match address(arguments)? {
        Origin::Uri(uri @ (Uri::Tcp { .. } | Uri::Unix(_) | Uri::Vsock { .. })) => Ok(uri),
        other => Err(CommandError::generic(format!("{other}: expected {SEVERAL}; a source opens several connections"))),
    }
}

/// Where `migrate-recover` has a destination listen.
///
/// # Errors
/// It is no place to listen at.
pub(super) fn to_listen_at(uri: &str) -> Result<Origin, CommandError> {
    match by_uri(uri)? {
        at @ Origin::Uri(Uri::Tcp { .. } | Uri::Unix(_) | Uri::Vsock { .. }) => Ok(at),
        other => Err(CommandError::generic(format!("{other}: expected an address to listen at"))),
    }
}

/// Where `migrate-incoming` says that a guest comes from.
///
/// # Errors
/// It is no place.
pub(super) fn incoming(mut arguments: Arguments) -> Result<Incoming, CommandError> {
    let stays = arguments.flag("exit-on-error")? == Some(false);
    Ok(Incoming { from: address(arguments)?, stays })
}

/// The rest of `arguments`: a URI or a list of channels.
fn address(mut arguments: Arguments) -> Result<Origin, CommandError> {
    let uri = arguments.text("uri")?;
    // An empty list is none, as in QEMU.
    let channels = arguments.list("channels")?.filter(|channels| !channels.is_empty());
    arguments.end()?;
    match (uri, channels) {
        (Some(uri), None) => by_uri(&uri),
        (None, Some(channels)) => match <[Value; 1]>::try_from(channels) {
            Ok([channel]) => by_channel(channel),
            Err(_) => Err(CommandError::generic("Channel list must have only one entry, for type 'main'")),
        },
        _ => Err(CommandError::generic("need either 'uri' or 'channels' argument")),
    }
}

fn by_uri(uri: &str) -> Result<Origin, CommandError> {
    match uri.split_once(':') {
        Some(("tcp" | "unix" | "vsock" | "fd" | "file", _)) => origin(uri).map_err(CommandError::generic),
        Some((protocol @ ("exec" | "rdma"), _)) => Err(no_protocol(protocol)),
        _ => Err(CommandError::generic(format!("unknown migration protocol: {uri}"))),
    }
}

/// The address of a channel, which has to be the main one.
fn by_channel(channel: Value) -> Result<Origin, CommandError> {
    let mut channel = object("channels[0]", channel)?;
    match required(&mut channel, "channel-type")?.as_str() {
        "main" => {}
        other => return Err(CommandError::generic(format!("A channel of type '{other}' is not supported here"))),
    }
    let address = channel.rest().remove("addr").ok_or_else(|| Arguments::missing("channels[0].addr"))?;
    let mut address = object("channels[0].addr", address)?;
    let place = match required(&mut address, "transport")?.as_str() {
        "socket" => socket(&mut address)?,
        "file" => {
            let path = required(&mut address, "filename")?;
            if path.is_empty() {
                return Err(CommandError::generic("Parameter 'filename' expects a path"));
            }
            Origin::File { path: path.into(), offset: address.number("offset")?.unwrap_or(0) }
        }
        protocol @ ("exec" | "rdma") => return Err(no_protocol(protocol)),
        other => return Err(no_value("transport", other)),
    };
    address.end()?;
    Ok(place)
}

/// The address of a channel on a socket.
fn socket(address: &mut Arguments) -> Result<Origin, CommandError> {
    let wrong = |name: &str, value: &str| CommandError::generic(format!("Parameter '{name}' expects {value}"));
    match required(address, "type")?.as_str() {
        "inet" => {
            let (host, port) = (required(address, "host")?, required(address, "port")?);
            let port = port.parse().map_err(|_| wrong("port", "a number from 0 to 65535"))?;
            // Both are as they say in any case.
            address.flag("numeric")?;
            address.flag("keep-alive")?;
            Ok(Origin::Uri(Uri::Tcp { host, port }))
        }
        "unix" => {
            let path = required(address, "path")?;
            if address.flag("abstract")? == Some(true) {
                return Err(not_here("abstract"));
            }
            address.flag("tight")?;
            origin(&format!("unix:{path}")).map_err(CommandError::generic)
        }
        "fd" => {
            let name = required(address, "str")?;
            origin(&format!("fd:{name}")).map_err(|_| wrong("str", "the number of a descriptor of this process"))
        }
        "vsock" => {
            let (cid, port) = (required(address, "cid")?, required(address, "port")?);
            origin(&format!("vsock:{cid}:{port}")).map_err(CommandError::generic)
        }
        other => Err(no_value("type", other)),
    }
}

fn object(name: &str, value: Value) -> Result<Arguments, CommandError> {
    match value {
        Value::Object(map) => Ok(Arguments::from(map)),
        _ => Err(CommandError::generic(format!("Invalid parameter type for '{name}', expected: object"))),
    }
}

fn required(arguments: &mut Arguments, name: &str) -> Result<String, CommandError> {
    arguments.text(name)?.ok_or_else(|| Arguments::missing(name))
}

fn not_here(name: &str) -> CommandError {
    CommandError::generic(format!("Parameter '{name}' is not supported here"))
}

fn no_protocol(name: &str) -> CommandError {
    CommandError::generic(format!(
        "The migration protocol {name} is not supported here; expected tcp, unix, vsock, fd or file"
    ))
}

fn no_value(name: &str, value: &str) -> CommandError {
    CommandError::generic(format!("Parameter '{name}' does not accept value '{value}'"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(arguments: Value) -> Result<Incoming, String> {
        let Value::Object(map) = arguments else { unreachable!("tests pass objects") };
        incoming(Arguments::from(map)).map_err(|error| error.description)
    }

    fn by_channels(address: Value) -> Result<Origin, String> {
        read(json!({ "channels": [{ "channel-type": "main", "addr": address }] })).map(|incoming| incoming.from)
    }

    #[test]
    fn both_forms_of_an_address_are_the_same() {
        let socket = |mut rest: Value| {
            rest["transport"] = "socket".into();
            rest
        };
        for (uri, address) in [
            ("tcp:127.0.0.1:4444", socket(json!({ "type": "inet", "host": "127.0.0.1", "port": "4444" }))),
            ("unix:/tmp/x", socket(json!({ "type": "unix", "path": "/tmp/x", "abstract": false }))),
            ("vsock:2:4444", socket(json!({ "type": "vsock", "cid": "2", "port": "4444" }))),
            ("fd:7", socket(json!({ "type": "fd", "str": "7" }))),
            ("file:/tmp/x", json!({ "transport": "file", "filename": "/tmp/x", "offset": 0 })),
            ("file:/tmp/x,offset=0x1000", json!({ "transport": "file", "filename": "/tmp/x", "offset": 4096 })),
        ] {
            let expected = read(json!({ "uri": uri, "channels": [] })).unwrap();
            assert_eq!(by_channels(address), Ok(expected.from), "{uri}");
        }
        assert!(!read(json!({ "uri": "fd:7", "exit-on-error": true })).unwrap().stays);
        assert!(read(json!({ "uri": "fd:7", "exit-on-error": false })).unwrap().stays);
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        for (arguments, what) in [
            (json!({}), "need either 'uri' or 'channels' argument"),
            (json!({ "channels": [] }), "need either"),
            (json!({ "uri": "foo:bar" }), "unknown migration protocol: foo:bar"),
            (json!({ "uri": "-" }), "unknown migration protocol: -"),
            (json!({ "uri": "systemd:vm" }), "unknown migration protocol: systemd:vm"),
            (json!({ "uri": "exec:cat" }), "protocol exec is not supported here"),
            (json!({ "uri": "tcp:nowhere" }), "tcp:HOST:PORT"),
            (json!({ "uri": "fd:7", "resume": true }), "'resume' is unexpected"),
            (json!({ "uri": "fd:7", "channels": [{}] }), "need either"),
            (json!({ "channels": [{}, {}] }), "only one entry"),
            (json!({ "channels": [1] }), "'channels[0]', expected: object"),
            (json!({ "channels": [{ "channel-type": "cpr", "addr": {} }] }), "type 'cpr'"),
            (json!({ "channels": [{ "channel-type": "main" }] }), "'channels[0].addr' is missing"),
        ] {
            let error = read(arguments.clone()).unwrap_err();
            assert!(error.contains(what), "{arguments}: {error}");
        }
        for (address, what) in [
            (json!({ "transport": "nope" }), "'transport' does not accept value 'nope'"),
            (json!({ "transport": "exec", "args": [] }), "protocol exec"),
            (json!({ "transport": "socket", "type": "inet", "host": "x" }), "'port' is missing"),
            (json!({ "transport": "socket", "type": "inet", "host": "x", "port": "70000" }), "0 to 65535"),
            (json!({ "transport": "socket", "type": "inet", "host": "x", "port": "1", "to": 9 }), "'to' is unexpected"),
            (json!({ "transport": "socket", "type": "unix", "path": "x", "abstract": true }), "'abstract'"),
            (json!({ "transport": "socket", "type": "fd", "str": "vm" }), "number of a descriptor"),
            (json!({ "transport": "socket", "type": "vsock", "cid": "2" }), "'port' is missing"),
            (json!({ "transport": "socket", "type": "vsock", "cid": "me", "port": "1" }), "two numbers"),
            (json!({ "transport": "socket", "type": "vsock", "cid": "1:2", "port": "1" }), "two numbers"),
            (json!({ "transport": "socket", "type": "unix", "path": "x".repeat(108) }), "at most 107 bytes"),
            (json!({ "transport": "socket", "type": "unix", "path": "" }), "a path after the colon"),
            (json!({ "transport": "file", "filename": "" }), "expects a path"),
            (json!({ "transport": "file", "filename": "x", "offset": -1 }), "uint64"),
            (json!({ "transport": "file", "filename": "x", "foo": 1 }), "'foo' is unexpected"),
        ] {
            let error = by_channels(address.clone()).unwrap_err();
            assert!(error.contains(what), "{address}: {error}");
        }
    }

    #[test]
    fn a_source_connects_to_sockets_only() {
        for uri in ["fd:7", "file:/tmp/x"] {
            let map = json!({ "uri": uri }).as_object().unwrap().clone();
            let error = destination(Arguments::from(map)).unwrap_err();
            assert!(
                error.description.contains("expected tcp:HOST:PORT, unix:PATH or vsock:CID:PORT"),
                "{}",
                error.description
            );
        }
    }
}

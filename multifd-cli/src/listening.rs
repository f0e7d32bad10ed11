//! Says that this process listens: to the operator on stderr, and to systemd where that started it.

use std::{
    env, io,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    path::Path,
};

use crate::terminal;

/// This process accepts connections now, as `what` says.
pub fn announce(what: &str) {
    terminal::say(what);
    if let Some(Err(error)) = env::var_os("NOTIFY_SOCKET").map(|socket| notify(Path::new(&socket))) {
        // A service of Type=notify is ended by systemd then, which says so.
        tracing::warn!(%error, "systemd could not be told that this process listens (NOTIFY_SOCKET)");
    }
}

/// Tells systemd at `socket` that the service is ready.
///
/// # Errors
/// The kernel's.
fn notify(socket: &Path) -> io::Result<()> {
    let bytes = socket.as_os_str().as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    sender.send_to_addr(b"READY=1\n", &address).map(drop)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use test_support::{TempDir, time_limit};

    use super::*;

    fn heard(listener: &UnixDatagram) -> Vec<u8> {
        let mut buf = [0; 64];
        let n = listener.recv(&mut buf).unwrap();
        buf[..n].to_vec()
    }

    #[test]
    fn systemd_hears_it_at_a_path_and_at_an_abstract_name() {
        time_limit(Duration::from_secs(60), || {
            let dir = TempDir::new().unwrap();
            let path = dir.join("notify");
            let listener = UnixDatagram::bind(&path).unwrap();
            notify(&path).unwrap();
            assert_eq!(heard(&listener), b"READY=1\n");
            let name = format!("multifd-test-{}", std::process::id());
            let listener = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
            notify(Path::new(&format!("@{name}"))).unwrap();
            assert_eq!(heard(&listener), b"READY=1\n");
            assert!(notify(&dir.join("nonesuch")).is_err());
        });
    }
}

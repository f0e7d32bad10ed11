//! Connections between a VM and its host, or within one host, over vsock.
//!
//! An address is a context id (CID) and a port. The hypervisor is CID 0, the machine itself CID 1 (where the kernel has the module
//! `vsock_loopback`), the host of a VM CID 2. As TCP, but within one machine: there is a handshake, and no path to measure.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{self, AddressFamily, SocketFlags, SocketType, sockopt},
};

use super::{
    Connect, Pending, Stopper, Stream,
    socket::{SocketListener, SocketStream, context},
    stop_event::StopEvent,
    uri::Uri,
};
use crate::{sync::Deadline, sys::vsock::VsockAddress};

/// Every CID of this machine, when listening.
pub const ANY_CID: u32 = libc::VMADDR_CID_ANY;

/// Any free port, when listening. 0 is a port like any other.
pub const ANY_PORT: u32 = libc::VMADDR_PORT_ANY;

/// Opens connections to one port of one machine.
#[derive(Clone, Debug)]
pub struct VsockConnector {
    cid: u32,
    port: u32,
}

impl VsockConnector {
    /// Connects to `port` of the machine `cid`.
    pub fn new(cid: u32, port: u32) -> VsockConnector {
        VsockConnector { cid, port }
    }

    fn uri(&self) -> Uri {
        Uri::Vsock { cid: self.cid, port: self.port }
    }
}

impl Connect for VsockConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(Box::new(PendingVsock { to: self.clone(), stopped: StopEvent::new()? }))
    }
}

/// A connection that is to be opened.
struct PendingVsock {
    to: VsockConnector,
    stopped: StopEvent,
}

impl PendingVsock {
    fn open(&self, deadline: Deadline) -> io::Result<OwnedFd> {
        if self.to.cid == ANY_CID || self.to.port == ANY_PORT {
            let message =
                format!("{} is for listening; a connection needs the CID and the port of one machine", u32::MAX);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let socket = socket(SocketFlags::NONBLOCK)?;
        match net::connect(&socket, &VsockAddress::new(self.to.cid, self.to.port)) {
            Ok(()) => return Ok(socket),
            Err(Errno::INPROGRESS | Errno::INTR) => {}
            Err(error) => return Err(self.explain(error)),
        }
        // The kernel itself gives up after 2 s.
        self.stopped.wait_writable(socket.as_fd(), deadline.left()).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => io::ErrorKind::ConnectionAborted.into(),
            io::ErrorKind::TimedOut => self.explain(Errno::TIMEDOUT),
            _ => error,
        })?;
        match sockopt::socket_error(&socket)? {
            Ok(()) => Ok(socket),
            Err(error) => Err(self.explain(error)),
        }
    }

    /// `error` in words that say what to do: the kernel's say it of devices and resets.
    fn explain(&self, error: Errno) -> io::Error {
        match error {
            Errno::CONNRESET => {
                io::Error::new(io::ErrorKind::ConnectionRefused, "connection refused: nothing listens there")
            }
            Errno::NODEV => {
                io::Error::new(io::ErrorKind::AddrNotAvailable, format!("this machine has no way there: {MODULES}"))
            }
            Errno::TIMEDOUT => {
                let message = format!("no machine of this CID has answered: {MODULES}");
                io::Error::new(io::ErrorKind::TimedOut, message)
            }
            other => other.into(),
        }
    }
}

impl Pending for PendingVsock {
    fn establish(self: Box<Self>, limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        let uri = self.to.uri();
        let socket = self.open(Deadline::after(limit)).map_err(context(&uri))?;
        Ok(Box::new(SocketStream::new(socket)?))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(self.stopped.clone()))
    }

    fn peer(&self) -> String {
        self.to.uri().to_string()
    }
}

/// Listens on `port` of this machine's address `cid`: [`ANY_CID`] is each that it has, [`ANY_PORT`] any free port.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] where the kernel has no vsock; the kernel's.
pub fn listen(cid: u32, port: u32) -> io::Result<SocketListener> {
    let uri = Uri::Vsock { cid, port };
    let bound =
        socket(SocketFlags::empty()).and_then(|socket| match net::bind(&socket, &VsockAddress::new(cid, port)) {
            Ok(()) => Ok(socket),
            Err(Errno::ADDRNOTAVAIL) => {
                let message = format!("this machine does not have this CID; {ANY_CID} is each that it has");
                Err(io::Error::new(io::ErrorKind::AddrNotAvailable, message))
            }
            Err(error) => Err(error.into()),
        });
    let socket = bound.map_err(context(&uri))?;
    let bound = VsockAddress::from_any(&net::getsockname(&socket)?);
    let port = bound.map_or(port, |bound| bound.port());
    SocketListener::opened(socket, Uri::Vsock { cid, port }, None)
}

/// The other end of `socket`; `None` for a connection that was reset before it was accepted.
pub(super) fn peer(socket: &OwnedFd) -> Option<Uri> {
    let peer = VsockAddress::from_any(&net::getpeername(socket).ok()??)?;
    Some(Uri::Vsock { cid: peer.cid(), port: peer.port() })
}

fn socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    match net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC | flags, None) {
        Err(Errno::AFNOSUPPORT) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel has no vsock: its module 'vsock' is neither built in nor loaded",
        )),
        other => Ok(other?),
    }
}

/// Where connections need a module of the kernel.
const MODULES: &str =
    "a host needs the module vhost_vsock for its VMs, a VM a vsock device, and CID 1 the module vsock_loopback";

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// Whether `error` is that of a kernel without vsock, or of a container that may not use it. The test is skipped then.
    fn is_missing(error: &io::Error) -> bool {
        let missing = matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied);
        if missing {
            test_support::skip(&error.to_string());
        }
        missing
    }

    #[test]
    fn a_listener_tells_the_port_it_was_given() {
        match listen(ANY_CID, ANY_PORT) {
            Ok(listener) => {
                let Uri::Vsock { cid, port } = *listener.uri() else { panic!("{}", listener.uri()) };
                assert_eq!(cid, ANY_CID);
                assert_ne!(port, ANY_PORT);
            }
            Err(error) => assert!(is_missing(&error), "{error}"),
        }
    }

    #[test]
    fn addresses_for_listening_cannot_be_connected_to() {
        for connector in [VsockConnector::new(ANY_CID, 1), VsockConnector::new(1, ANY_PORT)] {
            let error = connector.connect().err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            assert!(error.to_string().starts_with(&connector.uri().to_string()), "{error}");
        }
    }

    /// 3,000,000,000 is not given to VMs, nor is it this machine.
    #[test]
    fn a_cid_of_another_machine_cannot_be_listened_at() {
        let error = listen(3_000_000_000, ANY_PORT).err().unwrap();
        if !is_missing(&error) {
            assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable, "{error}");
            assert!(error.to_string().starts_with("vsock:3000000000:4294967295: this machine"), "{error}");
        }
    }

    #[test]
    fn each_way_to_fail_says_what_is_missing() {
        let pending = PendingVsock { to: VsockConnector::new(1, 4444), stopped: StopEvent::new().unwrap() };
        for (error, kind, words) in [
            (Errno::CONNRESET, io::ErrorKind::ConnectionRefused, "nothing listens there"),
            (Errno::NODEV, io::ErrorKind::AddrNotAvailable, "vhost_vsock"),
            (Errno::TIMEDOUT, io::ErrorKind::TimedOut, "vsock_loopback"),
            (Errno::ACCESS, io::ErrorKind::PermissionDenied, ""),
        ] {
            let error = pending.explain(error);
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_stop_ends_a_connect_that_is_not_answered() {
        let pending = VsockConnector::new(3_000_000_000, 4444).dial().unwrap();
        pending.stopper().unwrap().stop();
        let error = pending.establish(None).err().unwrap();
        if !is_missing(&error) {
            // Where the kernel knows at once that there is no way, it says so before it waits.
            let kinds = [io::ErrorKind::ConnectionAborted, io::ErrorKind::AddrNotAvailable];
            assert!(kinds.contains(&error.kind()), "{error}");
        }
    }
}

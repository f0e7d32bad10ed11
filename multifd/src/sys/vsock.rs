//! The address of a vsock socket, which `rustix` has no type for.

use rustix::net::{
    AddressFamily, SocketAddrAny,
    addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque},
};

/// A port of a VM or of its host: `struct sockaddr_vm`.
#[derive(Clone, Copy)]
pub(crate) struct VsockAddress(libc::sockaddr_vm);

impl VsockAddress {
    pub(crate) fn new(cid: u32, port: u32) -> VsockAddress {
        VsockAddress(libc::sockaddr_vm {
            svm_family: libc::AF_VSOCK as libc::sa_family_t,
            svm_reserved1: 0,
            svm_port: port,
            svm_cid: cid,
            svm_zero: [0; 4],
        })
    }

    /// `None` for an address of another family.
    pub(crate) fn from_any(address: &SocketAddrAny) -> Option<VsockAddress> {
        let is_vsock = address.address_family() == AddressFamily::VSOCK;
        if !is_vsock || (address.addr_len() as usize) < size_of::<libc::sockaddr_vm>() {
            return None;
        }
        // SAFETY: at least so many bytes are there and initialized, as was checked, and they are integers. The type of the
        // storage is aligned for any address.
        Some(VsockAddress(unsafe { address.as_ptr().cast::<libc::sockaddr_vm>().read_unaligned() }))
    }

    pub(crate) fn cid(&self) -> u32 {
        self.0.svm_cid
    }

    pub(crate) fn port(&self) -> u32 {
        self.0.svm_port
    }
}

// SAFETY: `f` gets a pointer to a whole `sockaddr_vm` and its length, which are valid during the call.
unsafe impl SocketAddrArg for VsockAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f((&raw const self.0).cast(), size_of::<libc::sockaddr_vm>() as SocketAddrLen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_what_it_was_on_its_way_through_the_kernels_form() {
        let address = VsockAddress::from_any(&VsockAddress::new(3, 4444).as_any()).unwrap();
        assert_eq!((address.cid(), address.port()), (3, 4444));
    }

    #[test]
    fn an_address_of_another_family_is_none() {
        let tcp = std::net::SocketAddr::from(([127, 0, 0, 1], 4444));
        assert!(VsockAddress::from_any(&tcp.as_any()).is_none());
        assert!(VsockAddress::from_any(&rustix::net::SocketAddrUnix::new("/x").unwrap().as_any()).is_none());
    }
}

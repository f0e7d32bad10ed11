//! What only the kernel can say, by doing it.

use std::io;

use multifd::{dirty::uffd_wp::UffdUnavailable, host};
use multifd_guest::host_kvm::HostKvm;
use rustix::{
    net::{AddressFamily, SocketType, socket},
    process::{Resource, Rlimit, getrlimit},
};

/// The answers of one host to one process.
pub struct Asked {
    /// KVM, or why this process has none.
    pub kvm: Result<HostKvm, String>,
    /// Whether there is a userfaultfd as the engine needs it.
    pub userfaultfd: Result<(), UffdUnavailable>,
    /// Whether the kernel tells which pages were written.
    pub pagemap_scan: Result<(), UffdUnavailable>,
    /// Whether there are vsock sockets.
    pub vsock: io::Result<()>,
    /// How many files a process may have open; `None` in it is no limit.
    pub open_files: Rlimit,
    /// How many bytes a process may lock.
    pub locked_memory: Rlimit,
}

impl Asked {
    /// Asks this host.
    pub fn this_host() -> Asked {
        Asked {
            kvm: HostKvm::ask().map_err(|error| error.to_string()),
            userfaultfd: host::userfaultfd(),
            pagemap_scan: host::pagemap_scan(),
            vsock: socket(AddressFamily::VSOCK, SocketType::STREAM, None).map(drop).map_err(io::Error::from),
            open_files: getrlimit(Resource::Nofile),
            locked_memory: getrlimit(Resource::Memlock),
        }
    }
}

//! All system calls and all unsafe code of the engine, behind safe functions whose arguments prove what they need.

#![allow(unsafe_code)]

pub(crate) mod accept_once;
pub(crate) mod advice;
pub(crate) mod cpu_time;
pub(crate) mod file_block;
#[cfg(all(any(test, feature = "__fuzzing"), not(any(loom, shuttle))))]
pub(crate) mod guarded;
pub(crate) mod guest_copy;
pub(crate) mod heap;
pub(crate) mod holes;
pub(crate) mod inherited;
pub(crate) mod kvm;
pub(crate) mod lease;
pub(crate) mod mapping;
pub(crate) mod pagemap;
pub(crate) mod protection;
pub(crate) mod residency;
pub(crate) mod shared_words;
#[cfg(all(test, not(any(loom, shuttle))))]
pub(crate) mod signals;
pub(crate) mod uffd;
pub(crate) mod unsent;
pub(crate) mod vectored;
#[cfg(feature = "vm-memory")]
pub(crate) mod vm_memory;
pub(crate) mod vsock;
pub(crate) mod writeback;
pub(crate) mod zerocopy;
pub(crate) mod zeroed;

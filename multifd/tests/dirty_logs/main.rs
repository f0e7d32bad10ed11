//! The dirty logs of the kernel, under the suite that all logs pass.

mod kvm;
mod kvm_guest;
mod memory;
mod uffd;
mod untouched;
mod vhost;

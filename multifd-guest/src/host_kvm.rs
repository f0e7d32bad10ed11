//! What the host's KVM has of what dirty logs need, found out without making a VM.

use crate::guest::GuestError;

/// What KVM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostKvm {
    /// The dirty log is fetched and re-armed in two steps, so it can also be looked into.
    pub manual_protection: bool,
    /// The most pages that a vCPU's dirty ring holds; 0 where there are no rings.
    pub ring_entries: u32,
}

impl HostKvm {
    /// Asks `/dev/kvm`.
    ///
    /// # Errors
    /// [`GuestError::NoKvm`]: this process may not open it, or there is none.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub fn ask() -> Result<HostKvm, GuestError> {
        use kvm_bindings::{
            KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_dirty_gfn,
        };
        let kvm = kvm_ioctls::Kvm::new().map_err(|error| GuestError::NoKvm { why: format!("/dev/kvm: {error}") })?;
        // Without the capability, and where it cannot be asked for, there is nothing.
        let has = |capability: u32| u32::try_from(kvm.check_extension_raw(capability.into())).unwrap_or(0);
        let ring_bytes = has(KVM_CAP_DIRTY_LOG_RING_ACQ_REL).max(has(KVM_CAP_DIRTY_LOG_RING));
        Ok(HostKvm {
            manual_protection: has(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0,
            ring_entries: ring_bytes / size_of::<kvm_dirty_gfn>() as u32,
        })
    }

    /// Says that there is none.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    pub fn ask() -> Result<HostKvm, GuestError> {
        Err(GuestError::NoKvm { why: "the built-in KVM guest exists for Linux on x86-64".to_owned() })
    }

    /// A host with these, for tests of programs that ask.
    pub fn with(manual_protection: bool, ring_entries: u32) -> HostKvm {
        HostKvm { manual_protection, ring_entries }
    }
}

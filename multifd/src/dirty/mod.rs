//! Dirty logs: who wrote which page since the last time we asked.
//!
//! The tracking law rests on this trait. A write that happens after [`DirtyLog::drain`] returned is reported by a later
//! call; pages may be reported that were not written, a written page is never missed.

use std::io;

use crate::{dirty_bitmap::DirtyBitmap, ram::Ram};

pub mod bitmap;
#[cfg(any(feature = "conformance", all(test, not(any(loom, shuttle)))))]
pub mod conformance;
pub mod kvm_log;
pub mod kvm_ring;
pub(crate) mod kvm_slot;
pub(crate) mod mappings;
pub mod merged;
pub mod uffd_wp;
pub mod untouched;
pub mod vhost;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;

/// Reports the pages that were written, by the guest's CPUs or by its devices.
///
/// Every implementation passes the same suite, `dirty::conformance`.
pub trait DirtyLog {
    /// What it is called in reports, e.g. `kvm-dirty-log`.
    fn name(&self) -> &'static str;

    /// Begins to track `ram`. A write that happens after this returns is reported by a later [`drain`](Self::drain).
    ///
    /// # Errors
    /// The kernel's, when it refuses; tracking is then off.
    fn start(&mut self, ram: &Ram) -> io::Result<()>;

    /// Adds the pages written since the previous call, or since [`start`](Self::start), to `into` and re-arms tracking
    /// for them. Pages already in `into` stay.
    ///
    /// A write that happens after this returns is reported by a later call. Pages may be reported that were not
    /// written; a written page is never missed.
    ///
    /// # Errors
    /// The kernel's. Which writes were reported is then unknown, and the migration has to end.
    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()>;

    /// Adds pages that were written since the last [`drain`](Self::drain), as far as that can be told at little cost, to `into`.
    ///
    /// It takes nothing out: what a `drain` reports afterwards is the same as without it. It is a hint, which nothing correct rests on: a
    /// source sends these pages in the next round instead of twice, see `source`. It may leave pages out, and does by default.
    ///
    /// # Errors
    /// The kernel's. The source goes on without hints.
    fn peek(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        let _ = into;
        Ok(())
    }

    /// Ends tracking, so that the guest writes at full speed again. Without effect when it was not started.
    ///
    /// # Errors
    /// The kernel's; the guest is unharmed.
    fn stop(&mut self) -> io::Result<()>;
}

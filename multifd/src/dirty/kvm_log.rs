//! A dirty log for the guest's CPUs: KVM_GET_DIRTY_LOG of each memory slot.
//!
//! KVM protects the pages of a slot (or uses the hardware's dirty bits) and sets a bit at the first write. There are two
//! ways to fetch and re-arm:
//!
//! - *Plain*: KVM_GET_DIRTY_LOG takes the bits out and protects these pages in one step. Nothing can come between.
//! - *Manual protection* (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): GET copies the bits, KVM_CLEAR_DIRTY_LOG takes out and
//!   protects the pages it is given. It is given exactly what GET reported, before `drain` returns, so before anybody
//!   reads a page. No write between the two is lost: a page that GET did not report keeps its bit, since CLEAR is not
//!   given that page; a page that GET did report loses the bit of its second write, but it is reported, and read after
//!   CLEAR, with both writes in it. CLEAR is done in portions, so vCPUs that fault wait for one portion instead of for
//!   the whole slot.
//!
//! **Writes by the host process are not seen**, neither those of a device model nor of read(2) into guest memory: merge
//! with the devices' own [bitmap](crate::dirty::bitmap) through [`MergedLog`](crate::dirty::merged::MergedLog). With
//! hardware that buffers addresses of dirty pages (PML), a write may be reported later than by the next drain, as the
//! tracking law allows; when the vCPUs are out of KVM_RUN, all are.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};

pub use super::kvm_slot::KvmSlot;
use super::kvm_slot::TrackedSlot;
use crate::{dirty::DirtyLog, dirty_bitmap::DirtyBitmap, ram::Ram, sys::kvm};

/// Writes by the vCPUs of a KVM guest.
///
/// Pass the slots that make up the RAM blocks. What lies in no slot cannot be written by a vCPU and is not reported.
/// The VMM leaves the slots as they are between [`start`](DirtyLog::start) and [`stop`](DirtyLog::stop), and nobody else
/// fetches their log.
#[derive(Debug)]
pub struct KvmDirtyLog {
    vm: OwnedFd,
    slots: Vec<KvmSlot>,
    protection: Protection,
    tracked: Vec<TrackedSlot>,
    /// KVM's bitmap of one slot at a time.
    bitmap: Vec<u64>,
}

/// How pages are fetched and re-armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// In one step.
    Plain,
    /// In two steps. KVM protects the whole slot when logging is switched on.
    Manual,
    /// In two steps. KVM begins with all pages dirty and protects none; `start` then protects them in portions, which
    /// stops no vCPU for long.
    ManualInitiallySet,
}

impl KvmDirtyLog {
    /// A log for `slots` of the VM behind `vm`, a KVM VM descriptor (it is duplicated), with the best protection that
    /// the kernel has.
    ///
    /// ```compile_fail,E0133
    /// # use std::os::fd::BorrowedFd;
    /// use multifd::dirty::kvm_log::{KvmDirtyLog, KvmSlot};
    ///
    /// fn log(vm: BorrowedFd<'_>, slots: Vec<KvmSlot>) -> KvmDirtyLog {
    ///     KvmDirtyLog::new(vm, slots).unwrap()
    /// }
    /// ```
    ///
    /// # Safety
    /// From each [`start`](DirtyLog::start) until the following [`stop`](DirtyLog::stop), no slot of the VM that has the
    /// number of one of `slots` is deleted, made anew, or resized. The kernel writes a bit for each page of the slot as
    /// the VM has it then, and the log has room for as many as `slots` says.
    ///
    /// # Errors
    /// The kernel's, e.g. if `vm` is no such descriptor.
    #[allow(unsafe_code)]
    pub unsafe fn new(vm: BorrowedFd<'_>, slots: Vec<KvmSlot>) -> io::Result<KvmDirtyLog> {
        let manual = kvm::check_extension(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)?;
        let protection = if manual & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
            Protection::Plain
        } else if manual & KVM_DIRTY_LOG_INITIALLY_SET == 0 {
            Protection::Manual
        } else {
            Protection::ManualInitiallySet
        };
        // SAFETY: as the caller promises.
        unsafe { KvmDirtyLog::with_protection(vm, slots, protection) }
    }

    /// The same with a protection of the caller's choice.
    ///
    /// # Safety
    /// As for [`new`](Self::new).
    ///
    /// # Errors
    /// The kernel's, if `vm` cannot be duplicated. Whether it has this protection turns out at the start.
    #[allow(unsafe_code)]
    pub unsafe fn with_protection(
        vm: BorrowedFd<'_>,
        slots: Vec<KvmSlot>,
        protection: Protection,
    ) -> io::Result<KvmDirtyLog> {
        let vm = vm.try_clone_to_owned()?;
        Ok(KvmDirtyLog { vm, slots, protection, tracked: Vec::new(), bitmap: Vec::new() })
    }

    /// How pages are fetched and re-armed.
    pub fn protection(&self) -> Protection {
        self.protection
    }

    fn choose_protection(&self) -> io::Result<()> {
        let flags = match self.protection {
            Protection::Plain => 0,
            Protection::Manual => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
            Protection::ManualInitiallySet => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
        };
        // Also for 0: if manual protection had been switched on before, a plain GET would not re-arm anything.
        if flags != 0 || kvm::check_extension(self.vm.as_fd(), KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)? != 0 {
            kvm::enable_capability(self.vm.as_fd(), KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, u64::from(flags))?;
        }
        Ok(())
    }

    fn begin(&mut self) -> io::Result<()> {
        self.choose_protection()?;
        for slot in &self.tracked {
            kvm::set_logging(self.vm.as_fd(), slot, true)?;
        }
        if self.protection == Protection::ManualInitiallySet {
            // All pages are dirty and none is armed. Nobody has read a page yet, so they are forgotten, which arms them.
            for slot in &self.tracked {
                self.bitmap.fill(!0);
                clear(self.vm.as_fd(), slot, &self.bitmap)?;
            }
        }
        Ok(())
    }
}

impl DirtyLog for KvmDirtyLog {
    fn name(&self) -> &'static str {
        "kvm-dirty-log"
    }

    /// Switches the log of each slot on.
    ///
    /// # Errors
    /// Also for a slot that does not lie in RAM blocks.
    fn start(&mut self, ram: &Ram) -> io::Result<()> {
        self.stop()?;
        self.tracked = TrackedSlot::all(&self.slots, ram)?;
        let most = self.tracked.iter().map(TrackedSlot::pages).max().unwrap_or(0);
        self.bitmap = vec![0; usize::try_from(most.div_ceil(64)).expect("a bitmap of mapped memory")];
        self.begin().inspect_err(|_| {
            // The first error is the one to tell. A log left on only costs speed.
            let _ = self.stop();
        })
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        for slot in &self.tracked {
            let bitmap = &mut self.bitmap[..slot.pages().div_ceil(64) as usize];
            kvm::get_dirty_log(self.vm.as_fd(), slot, bitmap)?;
            if self.protection != Protection::Plain {
                clear(self.vm.as_fd(), slot, bitmap)?;
            }
            slot.merge(bitmap, into);
        }
        Ok(())
    }

    /// Nothing with [`Protection::Plain`], where fetching the log re-arms it.
    fn peek(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        if self.protection == Protection::Plain {
            return Ok(());
        }
        for slot in &self.tracked {
            let bitmap = &mut self.bitmap[..slot.pages().div_ceil(64) as usize];
            kvm::get_dirty_log(self.vm.as_fd(), slot, bitmap)?;
            slot.merge(bitmap, into);
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        let mut first = Ok(());
        for slot in std::mem::take(&mut self.tracked) {
            let result = kvm::set_logging(self.vm.as_fd(), &slot, false);
            first = first.and(result);
        }
        self.bitmap = Vec::new();
        first
    }
}

/// Re-arms the pages in `bitmap`, in portions; portions without any are left out.
fn clear(vm: BorrowedFd<'_>, slot: &TrackedSlot, bitmap: &[u64]) -> io::Result<()> {
    for first in (0..slot.pages()).step_by(PORTION) {
        let pages = (slot.pages() - first).min(PORTION as u64);
        let words = &bitmap[(first / 64) as usize..][..pages.div_ceil(64) as usize];
        if words.iter().any(|&word| word != 0) {
            kvm::clear_dirty_log(vm, slot, first, pages as u32, words)?;
        }
    }
    Ok(())
}

/// Pages re-armed in one call: 1 GiB, which holds KVM's lock of the guest's page tables for up to 8 ms.
const PORTION: usize = 1 << 18;

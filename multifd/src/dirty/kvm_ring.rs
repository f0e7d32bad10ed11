//! A dirty log for the guest's CPUs: the dirty ring that KVM keeps for each vCPU.
//!
//! A vCPU puts the number of each page that it writes first into its ring and goes on; it is stopped only when the ring
//! is full. The cost of a drain is that of the pages written, whatever the size of memory.
//!
//! **Order.** Entries are taken (*Acquire*), marked taken (*Release*), and KVM_RESET_DIRTY_RINGS re-arms their pages
//! before anybody reads one. A write between taking and re-arming makes no new entry, but its page is reported and read
//! afterwards, so the copy holds it. A write after re-arming makes a new entry.
//!
//! **Who takes.** The ring has one consumer: a lock that [`collect`](KvmDirtyRing::collect) and `drain` share. A vCPU
//! thread that leaves KVM_RUN with exit reason 31 (KVM_EXIT_DIRTY_RING_FULL) calls `collect`, which empties the rings of
//! all vCPUs into a bitmap that the next drain reports, and runs again. Other vCPUs go on meanwhile.
//!
//! **Last entries.** Hardware that buffers addresses of dirty pages (PML) hands them over when the vCPU leaves the guest,
//! so the last drain has to come when the vCPUs are out of KVM_RUN, as it does in a migration.
//!
//! **A ring that ran over.** KVM stops a vCPU some entries before its ring is full, so a ring that is found full to the
//! last entry means that it did not, and that entries may be overwritten. From then on every call is an error. This
//! happens: a KVM that emulates instructions (Linux 6.18 without hardware virtualisation) emulates many in a row and
//! does not look at the ring meanwhile.
//!
//! The order of set-up is KVM's: [`enable`](KvmDirtyRing::enable), create the vCPUs,
//! [`add_vcpu`](KvmDirtyRing::add_vcpu) for each, [`log`](KvmDirtyRing::log). A VM with rings has no
//! KVM_GET_DIRTY_LOG. As with that one, writes by the host process are not seen.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_dirty_gfn};

use super::kvm_slot::{KvmSlot, TrackedSlot};
use crate::{
    dirty::DirtyLog,
    dirty_bitmap::DirtyBitmap,
    ram::Ram,
    sync::{Arc, Mutex, lock},
    sys::kvm::{self, GfnRing},
};

/// The dirty rings of a VM. All clones are the same rings; each vCPU thread keeps one.
#[derive(Clone)]
pub struct KvmDirtyRing {
    inner: Arc<Inner>,
}

struct Inner {
    vm: OwnedFd,
    /// Bytes of one ring.
    bytes: u32,
    state: Mutex<State>,
}

/// Invariant: whatever was taken from a ring while tracking is on is in `pending` or was reported.
struct State {
    rings: Vec<GfnRing>,
    tracking: Option<Tracking>,
    /// A ring was full to its last entry, so entries may have been overwritten; it is out of step forever.
    overrun: bool,
}

struct Tracking {
    slots: Vec<TrackedSlot>,
    /// Taken and re-armed, not yet reported.
    pending: DirtyBitmap,
}

impl KvmDirtyRing {
    /// Gives each vCPU that the VM will have a ring of `entries` pages, a power of two. No vCPU exists yet.
    ///
    /// `vm` is a KVM VM descriptor and is duplicated.
    ///
    /// # Errors
    /// Where KVM has no dirty ring (`Unsupported`), or not such a large one (`InvalidInput`, with the largest); else the
    /// kernel's.
    pub fn enable(vm: BorrowedFd<'_>, entries: u32) -> io::Result<KvmDirtyRing> {
        // The one with acquire and release is what KVM has on processors that order memory weakly; x86-64 has both.
        let capabilities = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        for capability in capabilities {
            // The value of the capability is the size of the largest ring in bytes; 0 if there is none.
            let most = kvm::check_extension(vm, capability)?;
            if most == 0 {
                continue;
            }
            let bytes = entries.checked_mul(size_of::<kvm_dirty_gfn>() as u32).filter(|&bytes| bytes <= most);
            let Some(bytes) = bytes else {
                let message =
                    format!("a dirty ring has at most {} entries", most as usize / size_of::<kvm_dirty_gfn>());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            };
            kvm::enable_capability(vm, capability, u64::from(bytes))?;
            let state = Mutex::new(State { rings: Vec::new(), tracking: None, overrun: false });
            return Ok(KvmDirtyRing { inner: Arc::new(Inner { vm: vm.try_clone_to_owned()?, bytes, state }) });
        }
        Err(io::Error::new(io::ErrorKind::Unsupported, "KVM has no dirty ring here"))
    }

    /// Maps the ring of a vCPU, before it runs.
    ///
    /// # Safety
    /// `vcpu` is a vCPU of this VM, and was not passed before: what is mapped is used as its ring, whose other user is the
    /// kernel.
    ///
    /// # Errors
    /// The kernel's.
    #[allow(unsafe_code)]
    pub unsafe fn add_vcpu(&self, vcpu: BorrowedFd<'_>) -> io::Result<()> {
        let ring = GfnRing::map(vcpu, self.inner.bytes)?;
        lock(&self.inner.state).rings.push(ring);
        Ok(())
    }

    /// Empties the rings and re-arms the pages, which the next drain reports. Returns how many entries there were.
    ///
    /// To be called by a vCPU thread on KVM_EXIT_DIRTY_RING_FULL; by anybody at any other time.
    ///
    /// # Errors
    /// The kernel's: the pages are then still reported by the next drain. A ring that ran over, as the beginning of this module has
    /// it: from then on every call fails, and so does every drain.
    pub fn collect(&self) -> io::Result<u64> {
        self.inner.collect(&mut lock(&self.inner.state))
    }

    /// The log of what the vCPUs write to `slots`, those that make up the RAM blocks.
    pub fn log(&self, slots: Vec<KvmSlot>) -> KvmRingLog {
        KvmRingLog { ring: self.clone(), slots }
    }
}

impl Inner {
    fn collect(&self, state: &mut State) -> io::Result<u64> {
        let mut count = 0;
        for ring in &mut state.rings {
            let mut taken = 0;
            while taken < ring.entries()
                && let Some((slot, page)) = ring.take()
            {
                taken += 1;
                let Some(tracking) = &mut state.tracking else { continue };
                if let Some(slot) = tracking.slots.iter().find(|tracked| tracked.description().slot == slot) {
                    slot.merge_page(page, &mut tracking.pending);
                }
            }
            count += u64::from(taken);
            state.overrun |= taken == ring.entries();
        }
        if count > 0 {
            kvm::reset_dirty_rings(self.vm.as_fd())?;
        }
        if state.overrun {
            return Err(io::Error::other("a dirty ring ran over, so writes may be lost"));
        }
        Ok(count)
    }

    fn stop(&self, state: &mut State) -> io::Result<()> {
        let Some(tracking) = state.tracking.take() else { return Ok(()) };
        let mut first = Ok(());
        for slot in &tracking.slots {
            let result = kvm::set_logging(self.vm.as_fd(), slot, false);
            first = first.and(result);
        }
        // What is left belongs to nobody; taken out, it cannot fill the rings of the next start.
        first.and(self.collect(state).map(drop))
    }
}

/// Writes by the vCPUs of a KVM guest, from their dirty rings.
pub struct KvmRingLog {
    ring: KvmDirtyRing,
    slots: Vec<KvmSlot>,
}

impl DirtyLog for KvmRingLog {
    fn name(&self) -> &'static str {
        "kvm-dirty-ring"
    }

    /// Switches the log of each slot on.
    ///
    /// # Errors
    /// Also for a slot that does not lie in RAM blocks.
    fn start(&mut self, ram: &Ram) -> io::Result<()> {
        let inner = &self.ring.inner;
        let mut state = lock(&inner.state);
        inner.stop(&mut state)?;
        let slots = TrackedSlot::all(&self.slots, ram)?;
        // Before logging is on, so that no entry comes that is not kept.
        let tracking = state.tracking.insert(Tracking { slots, pending: DirtyBitmap::new(ram.layout()) });
        let result = tracking.slots.iter().try_for_each(|slot| kvm::set_logging(inner.vm.as_fd(), slot, true));
        result.inspect_err(|_| {
            // The first error is the one to tell. A log left on only costs speed.
            let _ = inner.stop(&mut state);
        })
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        let inner = &self.ring.inner;
        let mut state = lock(&inner.state);
        inner.collect(&mut state)?;
        if let Some(tracking) = &mut state.tracking {
            into.merge(&tracking.pending);
            tracking.pending.clear();
        }
        Ok(())
    }

    /// Takes the entries that there are, as a vCPU with a full ring does, which re-arms their pages; the next drain reports them.
    fn peek(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        let inner = &self.ring.inner;
        let mut state = lock(&inner.state);
        inner.collect(&mut state)?;
        if let Some(tracking) = &state.tracking {
            into.merge(&tracking.pending);
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.ring.inner.stop(&mut lock(&self.ring.inner.state))
    }
}

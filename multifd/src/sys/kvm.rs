//! KVM's interfaces for dirty tracking, on the descriptors of a VM and its vCPUs.
//!
//! Structures and constants come from `kvm-bindings`, which asserts their sizes; the calls are made here because
//! `kvm-ioctls` has no KVM_CLEAR_DIRTY_LOG and no dirty ring, and because a descriptor works for a VMM on any version
//! of it.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, Release},
    },
};

use kvm_bindings::{
    KVM_DIRTY_GFN_F_MASK, KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_dirty_gfn, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};

use crate::dirty::kvm_slot::TrackedSlot;

/// The value of a capability of this VM; 0 where it is missing.
pub(crate) fn check_extension(vm: BorrowedFd<'_>, capability: u32) -> io::Result<u32> {
    // SAFETY: takes a number.
    let value = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CHECK_EXTENSION, libc::c_ulong::from(capability)) };
    u32::try_from(value).map_err(|_| io::Error::last_os_error())
}

/// Switches a capability of the VM on, with one argument.
pub(crate) fn enable_capability(vm: BorrowedFd<'_>, capability: u32, argument: u64) -> io::Result<()> {
    let mut enable = kvm_enable_cap { cap: capability, ..kvm_enable_cap::default() };
    enable.args[0] = argument;
    // SAFETY: the kernel reads one struct kvm_enable_cap. The capabilities used here change how writes are reported.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_ENABLE_CAP, &raw const enable) })
}

/// Switches the log of `slot` on or off; nothing else about the slot changes.
pub(crate) fn set_logging(vm: BorrowedFd<'_>, slot: &TrackedSlot, on: bool) -> io::Result<()> {
    let description = slot.description();
    let region = kvm_userspace_memory_region {
        slot: description.slot,
        flags: if on {
            description.flags | KVM_MEM_LOG_DIRTY_PAGES
        } else {
            description.flags & !KVM_MEM_LOG_DIRTY_PAGES
        },
        guest_phys_addr: description.guest_address,
        memory_size: description.bytes,
        userspace_addr: description.host_address,
    };
    // SAFETY: the kernel reads one struct kvm_userspace_memory_region. A `TrackedSlot` lies within RAM blocks and keeps
    // them mapped, so even a description that does not match the VM's slot gives the guest nothing but its own memory.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_SET_USER_MEMORY_REGION, &raw const region) })
}

/// Fetches the log of `slot` into `bitmap`, which has a bit for each of its pages. Re-arms it, unless the VM has manual
/// protection.
pub(crate) fn get_dirty_log(vm: BorrowedFd<'_>, slot: &TrackedSlot, bitmap: &mut [u64]) -> io::Result<()> {
    assert!(bitmap.len() as u64 * 64 >= slot.pages());
    let dirty_bitmap = bitmap.as_mut_ptr().cast();
    let log = kvm_dirty_log {
        slot: slot.description().slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap },
    };
    // SAFETY: the kernel writes a bit for each page of the slot, in whole words, for which there is room: KVM accepted
    // this size of the slot when logging was switched on, refuses to change the size of a slot that exists, and the
    // author of the VMM promised (`KvmDirtyLog::new`) that the slot is still the same one.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_DIRTY_LOG, &raw const log) })
}

/// Clears the pages in `bitmap` from the log of `slot` and re-arms them; its first bit is `first_page` of the slot, a
/// multiple of 64, and it covers `pages`, a multiple of 64 unless they end with the slot.
pub(crate) fn clear_dirty_log(
    vm: BorrowedFd<'_>,
    slot: &TrackedSlot,
    first_page: u64,
    pages: u32,
    bitmap: &[u64],
) -> io::Result<()> {
    assert!(bitmap.len() * 64 >= pages as usize);
    let dirty_bitmap = bitmap.as_ptr().cast_mut().cast();
    let clear = kvm_clear_dirty_log {
        slot: slot.description().slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap },
    };
    // SAFETY: the kernel reads `pages` bits, in whole words, which `bitmap` has; it does not write them.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw const clear) })
}

/// Re-arms the pages of all entries that were taken from the rings of the VM.
pub(crate) fn reset_dirty_rings(vm: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no argument.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0) })
}

/// The dirty ring of one vCPU, mapped. The vCPU fills it while this empties it.
#[derive(Debug)]
pub(crate) struct GfnRing {
    first: NonNull<kvm_dirty_gfn>,
    entries: u32,
    /// The entry that the kernel fills next after those that were taken; below `entries`.
    next: u32,
}

// SAFETY: the ring is shared with the kernel; a `GfnRing` may be used by any thread, one at a time.
unsafe impl Send for GfnRing {}

impl GfnRing {
    /// Maps the ring of `vcpu`, which has `bytes` bytes, as was said when rings were enabled.
    pub(crate) fn map(vcpu: BorrowedFd<'_>, bytes: u32) -> io::Result<GfnRing> {
        let offset = DIRTY_LOG_PAGE_OFFSET * system_page_size() as libc::off_t;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (null, fd) = (std::ptr::null_mut(), vcpu.as_raw_fd());
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { libc::mmap(null, bytes as usize, protection, libc::MAP_SHARED, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let first = NonNull::new(base.cast()).expect("a new mapping is not at address 0");
        Ok(GfnRing { first, entries: bytes / size_of::<kvm_dirty_gfn>() as u32, next: 0 })
    }

    /// Entries in the ring.
    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// Takes the next page that the vCPU wrote: its slot (with the address space in the upper half) and its number in
    /// the slot.
    pub(crate) fn take(&mut self) -> Option<(u32, u64)> {
        let entry = self.first.as_ptr().wrapping_add(self.next as usize);
        // SAFETY: `next` is below `entries`, so the entry lies in the mapping. Its flags come first (asserted below), and
        // the kernel accesses them atomically.
        let flags = unsafe { AtomicU32::from_ptr(entry.cast()) };
        // Acquire: pairs with the kernel's release of a filled entry.
        if flags.load(Acquire) & KVM_DIRTY_GFN_F_MASK != FILLED {
            return None;
        }
        // SAFETY: a filled entry belongs to us until it is marked taken.
        let kvm_dirty_gfn { slot, offset, .. } = unsafe { entry.read() };
        // Release: the entry is read before the kernel may fill it again.
        flags.store(TAKEN, Release);
        self.next = (self.next + 1) % self.entries;
        Some((slot, offset))
    }
}

impl Drop for GfnRing {
    fn drop(&mut self) {
        let bytes = self.entries as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: mapped by `map` with this length; nobody else has the address.
        unsafe { libc::munmap(self.first.as_ptr().cast(), bytes) };
    }
}

/// Bytes in a page of the system, which is KVM's unit.
pub(crate) fn system_page_size() -> u64 {
    // SAFETY: takes a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).expect("Linux has a page size")
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

const _: () = assert!(size_of::<kvm_dirty_gfn>() == 16 && std::mem::offset_of!(kvm_dirty_gfn, flags) == 0);
const _: () = assert!(size_of::<kvm_clear_dirty_log>() == 24);

/// KVM_DIRTY_GFN_F_DIRTY: the kernel filled the entry.
const FILLED: u32 = 1;
/// KVM_DIRTY_GFN_F_RESET: it was taken, and its page is to be re-armed.
const TAKEN: u32 = 2;
/// KVM_DIRTY_LOG_PAGE_OFFSET of x86-64 and arm64, in pages.
const DIRTY_LOG_PAGE_OFFSET: libc::off_t = 64;
/// `_IO(0xae, 0x03)`
const KVM_CHECK_EXTENSION: libc::Ioctl = 0xae03;
/// `_IOW(0xae, 0xa3, struct kvm_enable_cap)`
const KVM_ENABLE_CAP: libc::Ioctl = 0x4068_aea3;
/// `_IOW(0xae, 0x46, struct kvm_userspace_memory_region)`
const KVM_SET_USER_MEMORY_REGION: libc::Ioctl = 0x4020_ae46;
/// `_IOW(0xae, 0x42, struct kvm_dirty_log)`
const KVM_GET_DIRTY_LOG: libc::Ioctl = 0x4010_ae42;
/// `_IOWR(0xae, 0xc0, struct kvm_clear_dirty_log)`
const KVM_CLEAR_DIRTY_LOG: libc::Ioctl = 0xc018_aec0_u32 as libc::Ioctl;
/// `_IO(0xae, 0xc7)`
const KVM_RESET_DIRTY_RINGS: libc::Ioctl = 0xaec7;

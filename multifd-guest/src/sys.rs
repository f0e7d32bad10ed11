//! Memory mappings and signals, behind safe functions.

#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd},
    ptr::NonNull,
    sync::{
        Once,
        atomic::{AtomicU8, AtomicU64},
    },
};

use multifd::ram::{Backing, MemoryFile, RamBlock};
use multifd_proto::BlockName;

/// Memory of this process that is unmapped when this is dropped. All access is by atomics or by the kernel.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// The file in memory that it is of.
    file: Option<File>,
}

// SAFETY: plain memory, only reachable through atomics and raw pointers.
unsafe impl Send for Mapping {}
// SAFETY: see `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Fresh private memory.
    pub(crate) fn anonymous(len: usize) -> io::Result<Mapping> {
        Mapping::map_aligned(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    }

    /// Fresh memory of a file that exists in memory only.
    pub(crate) fn memfd(len: usize) -> io::Result<Mapping> {
        // SAFETY: the name is a string with its end.
        let fd = unsafe { libc::memfd_create(c"multifd-guest".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len as u64)?;
        let mut mapping = Mapping::map_aligned(len, libc::MAP_SHARED | libc::MAP_NORESERVE, file.as_raw_fd())?;
        mapping.file = Some(file);
        Ok(mapping)
    }

    /// The first `len` bytes of a descriptor, shared with the kernel or another mapping.
    pub(crate) fn shared(fd: RawFd, len: usize) -> io::Result<Mapping> {
        Mapping::map(len, libc::MAP_SHARED, fd)
    }

    /// Maps memory that is long enough at a multiple of a huge page, as VMMs do: the kernel maps large pages only where the address and
    /// the place in the file are alike.
    fn map_aligned(len: usize, flags: i32, fd: RawFd) -> io::Result<Mapping> {
        if len < HUGE_PAGE || !len.is_multiple_of(HUGE_PAGE) {
            return Mapping::map(len, flags, fd);
        }
        // Room is taken first; what is left of it before and behind the memory goes back.
        let room_len = len.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut room = Mapping::map(room_len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)?;
        let start = room.base.addr().get();
        let before = start.next_multiple_of(HUGE_PAGE) - start;
        let at = room.base.as_ptr().wrapping_add(before);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: `len` bytes within the room, which is ours and holds nothing.
        let base = unsafe { libc::mmap(at.cast(), len, access, flags | libc::MAP_FIXED, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        for (from, len) in [(room.base.as_ptr(), before), (at.wrapping_add(len), HUGE_PAGE - before)] {
            if len > 0 {
                // SAFETY: whole pages of the room before and behind the memory.
                unsafe { libc::munmap(from.cast(), len) };
            }
        }
        room.base = NonNull::new(at).ok_or_else(|| io::Error::other("memory was mapped at address 0"))?;
        room.len = len;
        Ok(room)
    }

    fn map(len: usize, flags: i32, fd: RawFd) -> io::Result<Mapping> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses an address that is not in use, so nothing else is affected.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("memory was mapped at address 0"))?;
        Ok(Mapping { base, len, file: None })
    }

    /// Asks for 2 MiB pages. That they are not to be had is no error.
    pub(crate) fn advise_huge(&self) {
        // SAFETY: the range is this mapping; the advice does not change its contents.
        unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, libc::MADV_HUGEPAGE) };
    }

    /// Bytes in the mapping.
    pub(crate) fn bytes(&self) -> usize {
        self.len
    }

    /// Address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// The 8 bytes at `offset`, a multiple of 8.
    ///
    /// # Panics
    /// If they are not within the mapping.
    #[inline]
    pub(crate) fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset < self.len && offset.is_multiple_of(8), "offset {offset:#x} of {:#x} bytes", self.len);
        // SAFETY: in bounds (the length is a multiple of the page size), aligned, and mapped for as long as `self`
        // lives; nobody makes any reference to these bytes other than atomics.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().wrapping_add(offset).cast()) }
    }

    /// The byte at `offset`.
    ///
    /// # Panics
    /// If it is not within the mapping.
    pub(crate) fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.len);
        // SAFETY: as for `word`.
        unsafe { AtomicU8::from_ptr(self.base.as_ptr().wrapping_add(offset)) }
    }
}

/// The largest page that the kernel gives without being asked for it by name.
const HUGE_PAGE: usize = 2 << 20;

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` and unmapped nowhere else; references into it cannot outlive `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The whole of `mapping`, which is private memory or a memfd, as a RAM block.
pub(crate) fn ram_block(name: &'static str, mapping: &std::sync::Arc<Mapping>) -> RamBlock {
    let backing = match &mapping.file {
        // Without /proc nothing is known of its holes.
        Some(file) => MemoryFile::new(file.as_fd(), 0).map_or(Backing::Foreign, Backing::MemoryFile),
        None => Backing::Anonymous,
    };
    let name = BlockName::new(name).expect("our block names are short");
    // SAFETY: the block keeps a reference to the mapping, which is mapped readable and writable until the last one is
    // dropped, and which hands out references to atomics only.
    let block = unsafe { RamBlock::from_raw(name, mapping.base, mapping.len, Box::new(mapping.clone())) };
    block.backed_by(backing)
}

/// The descriptor of something that does not lend it in the standard library's type.
pub(crate) fn borrowed(owner: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as its owner is borrowed.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}

/// A thread that can be interrupted in a system call. Some C libraries name it by a pointer, which is only a number here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kick(usize);

impl Kick {
    /// The calling thread.
    pub(crate) fn for_this_thread() -> Kick {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: all zeros is a valid `sigaction`: no flags, so that system calls are not restarted.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
            // SAFETY: the handler does nothing, so it may run at any moment on any thread.
            let result = unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) };
            assert_eq!(result, 0, "a handler can be set for a realtime signal");
        });
        // SAFETY: has no preconditions.
        Kick(unsafe { libc::pthread_self() } as usize)
    }

    /// Interrupts the thread, which must not have been joined.
    pub(crate) fn kick(self) {
        // SAFETY: the caller's promise is kept by `kvm::Cpu`, which kicks only while it holds the join handle.
        unsafe { libc::pthread_kill(self.0 as libc::pthread_t, kick_signal()) };
    }
}

extern "C" fn ignore(_: libc::c_int) {}

/// One of the realtime signals that the C library leaves to the program.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

/// What the ioctls that take addresses or trust a length need.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) mod kvm {
    use std::sync::Arc;

    use kvm_bindings::{kvm_userspace_memory_region, kvm_xsave};
    use kvm_ioctls::{VcpuFd, VmFd};
    use multifd::dirty::kvm_log::KvmSlot;

    use super::Mapping;

    /// Memory that a virtual machine sees. It stays mapped for as long as this lives.
    #[derive(Debug)]
    pub(crate) struct Slot {
        pub(crate) index: u32,
        pub(crate) guest_address: u64,
        pub(crate) memory: Arc<Mapping>,
    }

    impl Slot {
        /// The same for a dirty log.
        pub(crate) fn describe(&self) -> KvmSlot {
            KvmSlot {
                slot: self.index,
                guest_address: self.guest_address,
                host_address: self.memory.address(),
                bytes: self.memory.bytes() as u64,
                flags: 0,
            }
        }

        /// Shows the memory to `vm`. The caller drops `vm` and its vCPUs before the slot.
        pub(crate) fn attach(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
            let region = kvm_userspace_memory_region {
                slot: self.index,
                flags: 0,
                guest_phys_addr: self.guest_address,
                memory_size: self.memory.bytes() as u64,
                userspace_addr: self.memory.address(),
            };
            // SAFETY: the region is the whole of a mapping that outlives the virtual machine; slots do not overlap, as
            // their addresses are constants of the machine's layout.
            unsafe { vm.set_user_memory_region(region) }
        }
    }

    /// Sets the extended register state, of at most 4096 bytes.
    pub(crate) fn set_xsave(cpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
        // SAFETY: the kernel reads more than `kvm_xsave` only where the process was permitted dynamic features such as
        // AMX for its guests, which needs a call that nothing here makes.
        unsafe { cpu.set_xsave(xsave) }
    }

    /// The machine code between two labels of an assembly block in this crate.
    pub(crate) fn code(start: &'static u8, end: &'static u8) -> &'static [u8] {
        let (start, end) = (std::ptr::from_ref(start), std::ptr::from_ref(end));
        let len = (end as usize).checked_sub(start as usize).expect("the end label is behind the start label");
        // SAFETY: the labels enclose one read-only section of this crate's assembly.
        unsafe { std::slice::from_raw_parts(start, len) }
    }
}

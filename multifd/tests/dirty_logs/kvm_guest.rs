//! A KVM guest that writes words where it is told: 32-bit code without paging, one mailbox for each vCPU.

use std::{
    fs::File,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use multifd::{
    dirty::{conformance::Writer, kvm_log::KvmSlot, kvm_ring::KvmDirtyRing},
    ram::Ram,
};

use crate::memory::{Backing, Mapping, map};

/// A VM whose RAM is that of a [`Ram`], spread over several slots.
pub struct Guest {
    vm: Arc<VmFd>,
    pub ram: Ram,
    pub slots: Vec<KvmSlot>,
    /// Code and mailboxes, in a slot of its own that nobody tracks.
    control: Arc<Mapping>,
    /// The dirty ring, of a guest that has one.
    pub ring: Option<KvmDirtyRing>,
    vcpus: u64,
    _files: Vec<File>,
}

impl Guest {
    /// A guest with `blocks` (name and pages); the error says why there is none here.
    pub fn new(blocks: &[(&str, usize)], ring_entries: Option<u32>) -> Result<Guest, String> {
        let kvm = Kvm::new().map_err(|error| format!("/dev/kvm: {error}"))?;
        let vm = kvm.create_vm().map_err(|error| format!("KVM_CREATE_VM: {error}"))?;
        vm.set_tss_address(0xfffb_d000).map_err(|error| format!("KVM_SET_TSS_ADDR: {error}"))?;
        let ring = match ring_entries {
            // SAFETY: `vm` is open for longer than the borrow.
            Some(entries) => Some(
                KvmDirtyRing::enable(unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }, entries)
                    .map_err(|error| format!("dirty ring: {error}"))?,
            ),
            None => None,
        };
        let (ram, files) = map(Backing::Anonymous, blocks);
        let slots = slots(&ram);
        let control = Arc::new(Mapping::anonymous(CONTROL_BYTES as usize));
        let control_slot = KvmSlot {
            slot: 500,
            guest_address: 0,
            host_address: control.base.as_ptr() as u64,
            bytes: CONTROL_BYTES,
            flags: 0,
        };
        for slot in slots.iter().chain([&control_slot]) {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: slot.flags,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.bytes,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the memory stays mapped for longer than the VM runs: each writer holds `ram` and `control`.
            unsafe { vm.set_user_memory_region(region) }.map_err(|error| format!("memory slot: {error}"))?;
        }
        store(&control, CODE, &PROGRAM);
        Ok(Guest { vm: Arc::new(vm), ram, slots, control, ring, vcpus: 0, _files: files })
    }

    /// The descriptor of the VM.
    pub fn vm(&self) -> BorrowedFd<'_> {
        // SAFETY: open for as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) }
    }

    /// One more vCPU.
    pub fn vcpu(&mut self) -> Vcpu {
        let vcpu = self.vm.create_vcpu(self.vcpus).unwrap();
        if let Some(ring) = &self.ring {
            // SAFETY: `vcpu` is open for longer than the borrow.
            let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
            // SAFETY: a new vCPU of this VM.
            unsafe { ring.add_vcpu(fd) }.unwrap();
        }
        let mut sregs = vcpu.get_sregs().unwrap();
        let flat = |kind, selector| kvm_segment {
            base: 0,
            limit: !0,
            selector,
            type_: kind,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..kvm_segment::default()
        };
        sregs.cs = flat(11, 8);
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *segment = flat(3, 16);
        }
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs).unwrap();
        let mailbox = MAILBOXES + self.vcpus * MAILBOX_BYTES;
        self.vcpus += 1;
        Vcpu {
            vcpu,
            ring: self.ring.clone(),
            ram: self.ram.clone(),
            slots: self.slots.clone(),
            control: Arc::clone(&self.control),
            mailbox,
            ring_full_exits: 0,
            _vm: Arc::clone(&self.vm),
        }
    }
}

/// Cuts the blocks into slots, each block into three where it is large enough, with holes between them in guest
/// addresses and cuts that are no multiples of 64 pages.
fn slots(ram: &Ram) -> Vec<KvmSlot> {
    let mut slots = Vec::new();
    let mut guest_address = FIRST_RAM;
    for block in ram.blocks() {
        let pages = block.bytes() as u64 / 4096;
        let cuts = if pages < 8 { vec![0, pages] } else { vec![0, pages / 3, pages / 3 + 1, pages] };
        for cut in cuts.windows(2) {
            let (first, end) = (cut[0], cut[1]);
            slots.push(KvmSlot {
                slot: slots.len() as u32,
                guest_address,
                host_address: block.address() + first * 4096,
                bytes: (end - first) * 4096,
                flags: 0,
            });
            guest_address += (end - first) * 4096 + 4096;
        }
    }
    slots
}

/// A vCPU, stopped unless it writes.
pub struct Vcpu {
    vcpu: VcpuFd,
    ring: Option<KvmDirtyRing>,
    ram: Ram,
    slots: Vec<KvmSlot>,
    control: Arc<Mapping>,
    mailbox: u64,
    /// How often the ring was full.
    pub ring_full_exits: u64,
    _vm: Arc<VmFd>,
}

impl Vcpu {
    /// Writes all of `writes` (page number and value) before it returns, in as few runs as fit the mailbox.
    pub fn write_all(&mut self, writes: &[(u64, u64)]) {
        for writes in writes.chunks(MAILBOX_BYTES as usize / 12) {
            let mut mail = Vec::with_capacity(writes.len() * 12);
            for &(page, value) in writes {
                let host = self.ram.page(page).unwrap().as_ptr() as u64;
                let slot = self.slots.iter().find(|slot| host.wrapping_sub(slot.host_address) < slot.bytes).unwrap();
                let address = u32::try_from(slot.guest_address + (host - slot.host_address)).unwrap();
                mail.extend_from_slice(&address.to_le_bytes());
                mail.extend_from_slice(&value.to_le_bytes());
            }
            store(&self.control, self.mailbox, &mail);
            let mut regs = self.vcpu.get_regs().unwrap();
            (regs.rip, regs.rsi, regs.rcx, regs.rflags) = (CODE, self.mailbox, writes.len() as u64, 2);
            self.vcpu.set_regs(&regs).unwrap();
            self.run();
        }
    }

    fn run(&mut self) {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return,
                Ok(VcpuExit::Unsupported(31)) => {
                    self.ring_full_exits += 1;
                    self.ring.as_ref().unwrap().collect().unwrap();
                }
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

impl Writer for Vcpu {
    fn write(&mut self, page: u64, value: u64) {
        self.write_all(&[(page, value)]);
    }
}

fn store(control: &Mapping, at: u64, bytes: &[u8]) {
    assert!(at + bytes.len() as u64 <= CONTROL_BYTES);
    let to = control.base.as_ptr().wrapping_add(at as usize);
    // SAFETY: within the mapping, and the vCPU that reads it stands still.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
}

/// `again: lodsd; mov edi, eax; lodsd; mov [edi], eax; lodsd; mov [edi + 4], eax; dec ecx; jnz again; hlt`
const PROGRAM: [u8; 15] = [0xad, 0x89, 0xc7, 0xad, 0x89, 0x07, 0xad, 0x89, 0x47, 0x04, 0x49, 0x75, 0xf3, 0xf4, 0xf4];
const CODE: u64 = 0x1000;
const MAILBOXES: u64 = 0x10_0000;
const MAILBOX_BYTES: u64 = 0x10_0000;
const CONTROL_BYTES: u64 = 0x80_0000;
const FIRST_RAM: u64 = 0x1000_0000;

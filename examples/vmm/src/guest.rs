//! What runs in the VM: a program that verifies its own memory while it rewrites it.
//!
//! Each vCPU has a share of the memory. In pass `n` it finds `(n - 1) * address` in the first and the last word of a page,
//! and leaves `n * address` there. After each pass it writes a dot to the serial port. Where it finds anything else, it
//! writes `X` for good: one stale page is enough. It uses no stack, so registers and memory are all of its state.
//!
//! It runs in user mode (CPL 3) from its first instruction on, as there is nothing here that needs a kernel.
//!
//! ```text
//! guest address     0      system: code, page tables, the pages that the DMA device writes
//!                   4 GiB  RAM
//! ```

// The assembler counts as unsafe. The program is data here: nothing in this process jumps to it.
#![allow(unsafe_code)]

use std::arch::global_asm;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_xcr, kvm_xcrs};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::Memory;

global_asm!(
    ".pushsection .rodata.vmm_guest, \"a\", @progbits",
    ".globl vmm_guest_start",
    ".globl vmm_guest_end",
    "vmm_guest_start:",
    "20:",
    "    mov rdi, rsi", // the first page
    "30:",
    "    lea rax, [rbx - 1]",
    "    imul rax, rdi",
    "    cmp [rdi], rax",
    "    jne 40f",
    "    cmp [rdi + 4088], rax",
    "    jne 40f",
    "    add rax, rdi", // n * address
    "    mov [rdi], rax",
    "    mov [rdi + 4088], rax",
    "    add rdi, 4096",
    "    cmp rdi, rbp", // the end
    "    jne 30b",
    "    inc rbx", // the pass
    "    mov dx, 0x3f8",
    "    mov al, 0x2e",
    "    out dx, al",
    "    jmp 20b",
    "40:",
    "    mov dx, 0x3f8",
    "    mov al, 0x58",
    "    out dx, al",
    "    jmp 40b",
    "vmm_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static vmm_guest_start: u8;
    static vmm_guest_end: u8;
}

/// Bytes of the system region.
pub const SYSTEM_BYTES: usize = 2 << 20;
/// Where RAM begins.
pub const RAM: u64 = 4 << 30;
/// Where the DMA device writes.
pub const DMA: u64 = 0x10_0000;
/// As much RAM as there is room for page tables.
pub const MAX_RAM: usize = 64 << 30;

const CODE: u64 = 0x1000;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const DIRECTORIES: u64 = 0x1_0000;
/// Present, writable, for user mode; a leaf is also accessed, dirty and 2 MiB large.
const TABLE: u64 = 0x7;
const LEAF: u64 = 0xe7;

/// Writes code and page tables into the memory of a new VM: an identity map in pages of 2 MiB.
pub fn boot(memory: &Memory, ram_bytes: usize) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(code(), GuestAddress(CODE))?;
    let entry = |table: u64, index: u64, value: u64| memory.write_obj(value, GuestAddress(table + index * 8));
    entry(PML4, 0, PDPT | TABLE)?;
    entry(PDPT, 0, DIRECTORIES | TABLE)?;
    entry(DIRECTORIES, 0, LEAF)?;
    for page in 0..(ram_bytes as u64).div_ceil(2 << 20) {
        let directory = DIRECTORIES + 0x1000 * (1 + page / 512);
        entry(PDPT, 4 + page / 512, directory | TABLE)?;
        entry(directory, page % 512, (RAM + (page << 21)) | LEAF)?;
    }
    Ok(())
}

/// The registers of the vCPU that works on the pages from `first` to before `end`.
pub fn first_registers(first: u64, end: u64) -> kvm_regs {
    // IOPL 3: the program may use ports.
    kvm_regs { rip: CODE, rflags: 0x3002, rbx: 1, rsi: first, rbp: end, ..kvm_regs::default() }
}

/// 64-bit user mode with the page tables of [`boot`].
pub fn first_system_registers(mut sregs: kvm_sregs) -> kvm_sregs {
    let flat = kvm_segment { limit: u32::MAX, present: 1, dpl: 3, s: 1, g: 1, ..kvm_segment::default() };
    sregs.cs = kvm_segment { selector: 0x33, type_: 0xb, l: 1, ..flat };
    let data = kvm_segment { selector: 0x2b, type_: 3, db: 1, ..flat };
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.cr0 = 0x8005_0033; // PG AM WP NE ET MP PE
    sregs.cr3 = PML4;
    sregs.cr4 = 0x4_0620; // OSXSAVE OSXMMEXCPT OSFXSR PAE
    sregs.efer = 0xd01; // NXE LMA LME SCE
    sregs
}

/// x87, SSE and AVX.
pub fn first_extended_control() -> kvm_xcrs {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: 7, ..kvm_xcr::default() };
    xcrs
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const vmm_guest_start, &raw const vmm_guest_end);
    // SAFETY: the labels enclose one read-only section of the assembly above.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}

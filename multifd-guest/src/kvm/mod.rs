//! The KVM guest: vCPUs that run the program in `code.rs` in user mode (CPL 3) from their first instruction on.
//!
//! The machine has no firmware, interrupts or kernel: page tables and registers are set up as a kernel would leave them.
//! It needs nothing that only a kernel could do, and user-mode code runs at full speed also on hosts whose KVM emulates
//! everything else.
//!
//! ```text
//! guest-physical = virtual     0       block control: code, page tables, a page per vCPU
//!                              2 MiB   mailbox: one page that the host writes; not RAM, so it does not migrate
//!                              4 GiB   block ram
//! ```

mod code;
mod parallel;
mod state;

use std::{
    io::{self, Read},
    ops::Range,
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::Ordering::{Relaxed, SeqCst},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use kvm_bindings::{
    CpuId, KVM_EXIT_DIRTY_RING_FULL, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use multifd::{
    dirty::{kvm_log::KvmDirtyLog, kvm_ring::KvmDirtyRing},
    threads,
};

pub use self::state::StateError;
#[cfg(test)]
pub(crate) use self::state::without_vectors;
use self::{
    parallel::Background,
    state::{CpuState, clock_from_body, clock_to_body},
};
use crate::{
    guest::{GuestError, SavedSection},
    log::{self, Chosen, DirtyLogChoice},
    memory::{self, Memory, field},
    pace::{Pacer, Rate},
    pattern::{PAGE_SIZE, PAGE_STEP, PASS_STEP, Pattern, Position, WORD_STEP},
    sys::{self, Kick, Mapping, kvm::Slot},
    worker::{Next, Reins},
};

/// The virtual machine and its vCPUs.
pub(crate) struct KvmCpus {
    cpus: Vec<Cpu>,
    pattern: Pattern,
    supported: Arc<CpuId>,
    msrs: Vec<u32>,
    /// vCPUs that are taking their state.
    loading: Background<StateError>,
    // Fields are dropped in this order: threads end first, memory goes last.
    vm: VmFd,
    slots: Vec<Slot>,
}

struct Cpu {
    reins: Arc<Reins>,
    /// Locked by its thread for as long as it runs.
    fd: Arc<Mutex<VcpuFd>>,
    run: Arc<Mapping>,
    kick: Kick,
    thread: Option<JoinHandle<()>>,
}

impl KvmCpus {
    /// Makes a virtual machine around `memory`, with one paused vCPU per share of the working set and without any state,
    /// and the log of what the vCPUs write.
    pub(crate) fn new(
        memory: &Memory,
        pattern: Pattern,
        count: usize,
        rate: Rate,
        choice: DirtyLogChoice,
    ) -> Result<(KvmCpus, Chosen), GuestError> {
        if memory.ram_map.bytes() as u64 > MAX_RAM {
            return Err(GuestError::Config { why: format!("a KVM guest has at most {MAX_RAM} bytes of memory") });
        }
        let kvm = Kvm::new().map_err(no_kvm)?;
        let vm = kvm.create_vm().map_err(no_kvm)?;
        // Before there is any vCPU: each gets a ring when it is created.
        let ring = match choice {
            DirtyLogChoice::KvmDirtyRing => {
                Some(KvmDirtyRing::enable(sys::borrowed(&vm), RING_ENTRIES).map_err(GuestError::no_log)?)
            }
            _ => None,
        };
        let mailbox = Arc::new(Mapping::anonymous(PAGE_SIZE)?);
        let slot = |index, guest_address, memory: &Arc<Mapping>| Slot { index, guest_address, memory: memory.clone() };
        let slots = vec![
            slot(RAM_SLOT, RAM_ADDRESS, &memory.ram_map),
            slot(CONTROL_SLOT, CONTROL_ADDRESS, &memory.control),
            slot(MAILBOX_SLOT, MAILBOX_ADDRESS, &mailbox),
        ];
        slots.iter().try_for_each(|slot| slot.attach(&vm)).map_err(no_kvm)?;
        let msrs = kvm.get_msr_index_list().map_err(no_kvm)?.as_slice().to_vec();
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(no_kvm)?;
        let (supported, loading) = (Arc::new(supported), Background::new());
        let mut guest = KvmCpus { cpus: Vec::new(), pattern, supported, msrs, loading, vm, slots };
        for index in 0..count {
            let pacer = Pacer::new(rate, count as u64, PAGE_SIZE as u64);
            let reins = Arc::new(Reins::new(pacer, mailbox.clone(), mailbox_word(index)));
            guest.cpus.push(Cpu::new(&guest.vm, index, reins, ring.clone()).map_err(no_kvm)?);
        }
        let log = guest.dirty_log(choice, ring)?;
        Ok((guest, log))
    }

    fn dirty_log(&self, choice: DirtyLogChoice, ring: Option<KvmDirtyRing>) -> Result<Chosen, GuestError> {
        // All that is RAM. The mailbox is not, and only the host writes to it.
        let slots = self.slots.iter().filter(|slot| slot.index != MAILBOX_SLOT).map(Slot::describe).collect();
        match (choice, ring) {
            (_, Some(ring)) => Ok(Chosen::new(ring.log(slots), DirtyLogChoice::KvmDirtyRing)),
            (DirtyLogChoice::UffdWp, None) => log::uffd_wp().map_err(GuestError::no_log),
            (DirtyLogChoice::Bitmap, None) => {
                let why = "vCPUs do not mark their own writes: a bitmap needs a process guest".to_owned();
                Err(GuestError::Config { why })
            }
            (DirtyLogChoice::Auto | DirtyLogChoice::KvmDirtyLog | DirtyLogChoice::KvmDirtyRing, None) => {
                // SAFETY: the slots are attached once, when the VM is made, and stay as they are.
                #[allow(unsafe_code)]
                let log = unsafe { KvmDirtyLog::new(sys::borrowed(&self.vm), slots) }.map_err(GuestError::no_log)?;
                Ok(Chosen::new(log, DirtyLogChoice::KvmDirtyLog))
            }
        }
    }

    /// Writes code, page tables and parameters into the control block and gives the vCPUs their first state.
    pub(crate) fn boot(&self, control: &Mapping) -> Result<(), StateError> {
        write_program(control);
        write_page_tables(control, self.slots[0].memory.bytes() as u64);
        for (index, cpu) in self.cpus.iter().enumerate() {
            write_parameters(control, memory::worker_page(index), &self.pattern, &self.share(index));
            self.set_first_state(&cpu.fd(), index)?;
        }
        Ok(())
    }

    fn set_first_state(&self, cpu: &VcpuFd, index: usize) -> Result<(), StateError> {
        let kernel = |what| move |source: kvm_ioctls::Error| StateError::Kernel { what, source: source.into() };
        // CPUID first: it decides which bits of CR4 and XCR0 exist.
        cpu.set_cpuid2(&self.supported).map_err(kernel("the CPUID table"))?;
        let mut sregs = cpu.get_sregs().map_err(kernel("the system registers"))?;
        let flat = kvm_segment { limit: u32::MAX, present: 1, dpl: 3, s: 1, g: 1, ..kvm_segment::default() };
        sregs.cs = kvm_segment { selector: 0x33, type_: 0xb, l: 1, ..flat };
        let data = kvm_segment { selector: 0x2b, type_: 3, db: 1, ..flat };
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.cr0 = 0x8005_0033; // PG AM WP NE ET MP PE
        sregs.cr3 = CONTROL_ADDRESS + PML4_AT as u64;
        sregs.cr4 = 0x4_0620; // OSXSAVE OSXMMEXCPT OSFXSR PAE
        sregs.efer = 0xd01; // NXE LMA LME SCE
        cpu.set_sregs(&sregs).map_err(kernel("the system registers"))?;
        let xcr0 = kvm_xcr { xcr: 0, value: 7, ..kvm_xcr::default() }; // x87, SSE, AVX
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
        xcrs.xcrs[0] = xcr0;
        cpu.set_xcrs(&xcrs).map_err(kernel("the extended control registers"))?;
        let share = self.share(index);
        let regs = kvm_regs {
            rip: CONTROL_ADDRESS + CODE_AT as u64,
            rflags: 0x3002, // IOPL 3: the program asks for its budget by `out`
            rdi: page_address(share.start),
            rsi: 0,
            rbp: CONTROL_ADDRESS + memory::worker_page(index) as u64,
            rbx: MAILBOX_ADDRESS + mailbox_word(index) as u64,
            r11: self.pattern.zero_mask,
            r12: self.pattern.base(1, share.start),
            r13: share.start + 1,
            ..kvm_regs::default()
        };
        cpu.set_regs(&regs).map_err(kernel("the registers"))?;
        sys::kvm::set_xsave(cpu, &first_vectors()).map_err(kernel("the vector registers"))
    }

    /// Pauses all vCPUs, between any two instructions.
    pub(crate) fn pause(&self) -> Result<(), String> {
        for cpu in &self.cpus {
            cpu.reins.ask_to_pause();
            cpu.interrupt();
        }
        self.reins().try_for_each(|reins| reins.wait_paused())
    }

    /// Reads the state of vCPU `index`, which never ran, and begins to give it to the vCPU.
    ///
    /// # Errors
    /// The body's, or that of a vCPU before.
    pub(crate) fn load_cpu(&mut self, index: u32, input: &mut dyn Read) -> Result<(), StateError> {
        let state = CpuState::from_body(input)?;
        let (fd, supported) = (self.cpus[index as usize].fd.clone(), self.supported.clone());
        self.loading.begin(move || state.set(&lock(&fd), &supported))
    }

    /// Waits until all vCPUs have their states.
    ///
    /// # Errors
    /// The first vCPU's that did not take its own.
    pub(crate) fn finish_loading(&mut self) -> Result<(), StateError> {
        self.loading.finish()
    }

    /// Takes the time of the clock.
    pub(crate) fn load_clock(&self, input: &mut dyn Read) -> Result<(), StateError> {
        clock_from_body(&self.vm, input)
    }

    pub(crate) fn reins(&self) -> impl Iterator<Item = &Arc<Reins>> {
        self.cpus.iter().map(|cpu| &cpu.reins)
    }

    /// Takes over what the source's program does, so that it is known what its registers mean.
    pub(crate) fn set_pattern(&mut self, pattern: Pattern) {
        self.pattern = pattern;
    }

    /// The sections of the paused machine.
    pub(crate) fn save(&self) -> Result<Vec<SavedSection>, StateError> {
        let states = parallel::map(&self.cpus, |cpu| CpuState::get(&cpu.fd(), &self.msrs));
        let cpus = (0..).zip(states).map(|(index, state)| Ok((CPU_SECTION, index, VERSION, state?.to_body())));
        let mut sections = cpus.collect::<Result<Vec<_>, StateError>>()?;
        sections.push((CLOCK_SECTION, 0, VERSION, clock_to_body(&self.vm)?));
        Ok(sections)
    }

    /// Where the paused vCPUs stand.
    pub(crate) fn positions(&self) -> io::Result<Vec<Position>> {
        let writes = self.pattern.writes;
        let position = |(index, cpu): (usize, &Cpu)| {
            let (share, regs) = (self.share(index), cpu.fd().get_regs()?);
            let page = page_address(share.start + regs.rsi % (share.end - share.start));
            let words_done = code::words_done(regs.rdi, page, writes.words(), writes.stride());
            Ok(Position { pages_done: regs.rsi, words_done })
        };
        self.cpus.iter().enumerate().map(position).collect()
    }

    /// Whether each paused vCPU has counted in its SSE register what it has counted in a general one.
    pub(crate) fn registers_agree(&self) -> io::Result<bool> {
        for cpu in &self.cpus {
            let fd = cpu.fd();
            let (regs, xsave) = (fd.get_regs()?, fd.get_xsave()?);
            // One less, if the program was stopped between the two additions.
            if !matches!(regs.rsi.wrapping_sub(xmm0(&xsave)), 0 | 1) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn share(&self, index: usize) -> Range<u64> {
        self.pattern.share(index as u64, self.cpus.len() as u64)
    }
}

impl Drop for KvmCpus {
    fn drop(&mut self) {
        // A vCPU that takes its state may write to memory.
        let _ = self.loading.finish();
        for cpu in &self.cpus {
            cpu.reins.ask_to_end();
            cpu.interrupt();
        }
        for thread in self.cpus.iter_mut().filter_map(|cpu| cpu.thread.take()) {
            // It panicked: that was printed, and was reported to whoever waited for it.
            let _ = thread.join();
        }
    }
}

impl Cpu {
    fn new(vm: &VmFd, index: usize, reins: Arc<Reins>, ring: Option<KvmDirtyRing>) -> io::Result<Cpu> {
        let fd = vm.create_vcpu(index as u64)?;
        if let Some(ring) = &ring {
            // SAFETY: it was just made, of the VM that the ring is of.
            #[allow(unsafe_code)]
            unsafe { ring.add_vcpu(sys::borrowed(&fd)) }?;
        }
        // A second mapping of the page that the kernel shares with us, so that other threads can set `immediate_exit`.
        let run = Arc::new(Mapping::shared(fd.as_raw_fd(), PAGE_SIZE)?);
        let fd = Arc::new(Mutex::new(fd));
        let (sender, receiver) = mpsc::channel();
        let runner = Runner { reins: reins.clone(), fd: fd.clone(), run: run.clone(), ring, unfinished: false };
        let body = move || {
            let sent = sender.send(Kick::for_this_thread());
            sent.expect("`new` waits for the answer");
            runner.run();
        };
        let thread = threads::spawn(format!("vcpu {index}"), body)?;
        let kick = receiver.recv().map_err(|_| io::Error::other("the thread of a vCPU ended at its start"))?;
        Ok(Cpu { reins, fd, run, kick, thread: Some(thread) })
    }

    /// Makes the vCPU leave the guest, or not enter it. What it does then is up to its reins.
    ///
    /// The flag covers the time before the kernel is entered, the signal the time after; the thread clears the flag
    /// only between leaving the guest and asking its reins, so no interruption is lost.
    fn interrupt(&self) {
        self.run.byte(IMMEDIATE_EXIT_AT).store(1, SeqCst);
        if self.thread.is_some() {
            self.kick.kick();
        }
    }

    fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        lock(&self.fd)
    }
}

/// The thread of one vCPU.
struct Runner {
    reins: Arc<Reins>,
    fd: Arc<Mutex<VcpuFd>>,
    run: Arc<Mapping>,
    ring: Option<KvmDirtyRing>,
    /// The kernel completes an `out` when the vCPU is entered the next time; until then its registers are not final.
    unfinished: bool,
}

impl Runner {
    fn run(mut self) {
        /// Says so when the thread panics, so that nobody waits for it forever.
        struct Ending(Arc<Reins>, Option<String>);
        impl Drop for Ending {
            fn drop(&mut self) {
                let panicked = || thread::panicking().then(|| "the thread of a vCPU panicked".to_owned());
                self.0.ended(self.1.take().or_else(panicked));
            }
        }
        let mut ending = Ending(self.reins.clone(), None);
        let result = self.follow();
        ending.1 = result.err();
    }

    fn follow(&mut self) -> Result<(), String> {
        let mut pages_done = 0;
        loop {
            match self.reins.next(pages_done) {
                Next::Run => self.enter()?,
                Next::Pause => {
                    if self.unfinished {
                        self.run.byte(IMMEDIATE_EXIT_AT).store(1, SeqCst);
                        self.enter()?;
                    }
                    self.reins.paused();
                }
                Next::End => return Ok(()),
            }
            let regs = lock(&self.fd).get_regs();
            pages_done = regs.map_err(|error| format!("the registers of a vCPU cannot be read: {error}"))?.rsi;
        }
    }

    /// Runs the vCPU until it has used up its budget or is interrupted.
    fn enter(&mut self) -> Result<(), String> {
        let mut fd = lock(&self.fd);
        loop {
            let failure = match fd.run() {
                Ok(VcpuExit::IoOut(code::BUDGET_PORT, _)) => {
                    self.unfinished = true;
                    return Ok(());
                }
                Err(error) if error.errno() == libc::EINTR => {
                    self.unfinished = false;
                    self.run.byte(IMMEDIATE_EXIT_AT).store(0, SeqCst);
                    return Ok(());
                }
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) if self.ring.is_some() => {
                    let collected = self.ring.as_ref().map_or(Ok(0), KvmDirtyRing::collect);
                    collected.map_err(|error| format!("the dirty rings cannot be emptied: {error}"))?;
                    continue;
                }
                Ok(exit) => format!("{exit:?}"),
                Err(error) => error.to_string(),
            };
            let regs = fd.get_regs().unwrap_or_default();
            return Err(format!("the vCPU left the guest at {:#x} for an unexpected reason: {failure}", regs.rip));
        }
    }
}

fn lock(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    // The state is the kernel's; a panic of ours leaves it whole.
    fd.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn no_kvm(error: impl std::fmt::Display) -> GuestError {
    GuestError::NoKvm { why: format!("/dev/kvm: {error}") }
}

fn write_program(control: &Mapping) {
    for (index, chunk) in code::program().chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        control.word(CODE_AT + index * 8).store(u64::from_le_bytes(word), Relaxed);
    }
}

/// Maps every address to itself, for user mode, in pages of 2 MiB.
fn write_page_tables(control: &Mapping, ram: u64) {
    // Present, writable, user, and already accessed (and dirty): the CPU then never writes to the tables.
    const TABLE: u64 = 0x27;
    const LEAF: u64 = 0xe7;
    const GIB: u64 = 1 << 30;
    let set = |at: usize, index: u64, value: u64| control.word(at + index as usize * 8).store(value, Relaxed);
    set(PML4_AT, 0, PDPT_AT as u64 | TABLE);
    let gibs = std::iter::once(0).chain((0..ram.div_ceil(GIB)).map(|gib| RAM_ADDRESS / GIB + gib));
    for (table, gib) in gibs.enumerate() {
        let directory = DIRECTORIES_AT + table * PAGE_SIZE;
        set(PDPT_AT, gib, directory as u64 | TABLE);
        for page in 0..512 {
            set(directory, page, (gib * GIB + page * (2 << 20)) | LEAF);
        }
    }
}

fn write_parameters(control: &Mapping, page: usize, pattern: &Pattern, share: &Range<u64>) {
    let set = |field: usize, value: u64| control.word(page + field).store(value, Relaxed);
    let pages = share.end - share.start;
    set(field::WORDS, pattern.writes.words());
    set(field::GAP, pattern.writes.stride() - 8);
    set(field::WORD_STEP, WORD_STEP);
    set(field::PASS_STEP, PASS_STEP);
    set(field::PAGE_STEP, PAGE_STEP);
    set(field::VALUE_WRAP, PASS_STEP.wrapping_sub(pages.wrapping_mul(PAGE_STEP)));
    set(field::SUM_WRAP, 1u64.wrapping_sub(pages));
    set(field::START, page_address(share.start));
    set(field::END, page_address(share.end));
    set(field::ZERO_MASK, pattern.zero_mask);
}

/// The vector registers as a kernel leaves them to a program, with 1 in `xmm1`.
fn first_vectors() -> kvm_xsave {
    let mut xsave = kvm_xsave::default();
    xsave.region[XSAVE_FCW] = 0x37f;
    xsave.region[XSAVE_MXCSR] = 0x1f80;
    xsave.region[XSAVE_XMM0 + 4] = 1;
    xsave.region[XSAVE_XSTATE_BV] = XSTATE_X87 | XSTATE_SSE;
    xsave
}

/// The lower half of `xmm0`.
fn xmm0(xsave: &kvm_xsave) -> u64 {
    if xsave.region[XSAVE_XSTATE_BV] & XSTATE_SSE == 0 {
        return 0;
    }
    u64::from(xsave.region[XSAVE_XMM0]) | u64::from(xsave.region[XSAVE_XMM0 + 1]) << 32
}

/// Guest address of a page of RAM.
fn page_address(page: u64) -> u64 {
    RAM_ADDRESS + page * PAGE_SIZE as u64
}

/// Where the budget of vCPU `index` is in the mailbox: each in a cache line of its own.
fn mailbox_word(index: usize) -> usize {
    index * 64
}

/// Names and version of the sections.
pub(crate) const CPU_SECTION: &str = "cpu";
pub(crate) const CLOCK_SECTION: &str = "clock";
const VERSION: u32 = 1;

/// Pages in the ring of each vCPU, 64 KiB of memory.
const RING_ENTRIES: u32 = 4096;

const RAM_SLOT: u32 = 0;
const CONTROL_SLOT: u32 = 1;
const MAILBOX_SLOT: u32 = 2;
const CONTROL_ADDRESS: u64 = 0;
const MAILBOX_ADDRESS: u64 = 2 << 20;
const RAM_ADDRESS: u64 = 4 << 30;

/// In the control block; a worker's page follows at `memory::worker_page`.
const CODE_AT: usize = 0;
const PML4_AT: usize = 0x1000;
const PDPT_AT: usize = 0x2000;
const DIRECTORIES_AT: usize = 0x8_0000;
/// As much as there is room for page directories, one of which is for the first GiB.
const MAX_RAM: u64 = (((memory::CONTROL_BYTES - DIRECTORIES_AT) / PAGE_SIZE - 1) as u64) << 30;

/// Places in the XSAVE area, in units of 4 bytes, and bits of its header's `XSTATE_BV`.
const XSAVE_FCW: usize = 0;
const XSAVE_MXCSR: usize = 24 / 4;
const XSAVE_XMM0: usize = 160 / 4;
const XSAVE_XSTATE_BV: usize = 512 / 4;
const XSTATE_X87: u32 = 1;
const XSTATE_SSE: u32 = 2;

/// `immediate_exit` is the second byte of `struct kvm_run`.
const IMMEDIATE_EXIT_AT: usize = 1;

//! The virtual machine: memory, vCPUs and devices. It knows nothing of migration.

// KVM is told addresses of this process.
#![allow(unsafe_code)]

use std::{
    fs::File,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::{
    Failure,
    devices::{Display, Dma, Serial},
    gate::Gate,
    guest,
    memory::{self, Backing, Memory},
    vcpu::{CpuState, Vcpu},
};

/// What a VM is like; the same on both sides of a migration.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Config {
    pub cpus: u64,
    pub ram_bytes: usize,
    /// How much of it the guest uses.
    pub busy_bytes: usize,
    pub display_bytes: usize,
    /// What this side's memory is made of; the other side's may be made of something else.
    #[serde(skip)]
    pub backing: Backing,
}

impl Config {
    /// The same in memory of the kind that `most` has.
    ///
    /// # Errors
    /// It has more of something than `most`.
    pub fn within(self, most: &Config) -> Result<Config, Failure> {
        let parts = [
            ("vCPUs", self.cpus, most.cpus),
            ("bytes of RAM", self.ram_bytes as u64, most.ram_bytes as u64),
            ("bytes of display", self.display_bytes as u64, most.display_bytes as u64),
        ];
        match parts.into_iter().find(|(_, has, most)| has > most) {
            Some((what, has, most)) => {
                Err(format!("the VM has {has} {what}, and at most {most} are given here").into())
            }
            None => Ok(Config { backing: most.backing, ..self }),
        }
    }
}

/// A VM, paused when it was made.
pub struct Machine {
    pub memory: Memory,
    pub serial: Arc<Serial>,
    pub dma: Dma,
    pub display: Display,
    pub vcpus: Vec<Vcpu>,
    pub config: Config,
    gate: Arc<Gate>,
    msrs: Vec<u32>,
    vm: VmFd,
}

impl Machine {
    /// A VM without any state: for a guest that boots, or one that arrives.
    pub fn new(config: Config) -> Result<Machine, Failure> {
        Machine::with_memory(config, Vec::new())
    }

    /// The same with memory that is in `files` from the places on that go with them.
    pub fn with_memory(config: Config, files: Vec<(File, u64)>) -> Result<Machine, Failure> {
        let per_cpu = config.busy_bytes / 4096 / config.cpus.max(1) as usize;
        if per_cpu == 0 || config.busy_bytes > config.ram_bytes || config.ram_bytes > guest::MAX_RAM {
            return Err("each vCPU needs a page, all pages have to lie in RAM, and RAM has a limit of 64 GiB".into());
        }
        // The signal only ends KVM_RUN.
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), nothing)?;
        let kvm = Kvm::new().map_err(|error| format!("/dev/kvm: {error}"))?;
        let vm = kvm.create_vm()?;
        let memory = memory::map(config.backing, config.ram_bytes, files)?;
        for (slot, region) in (0..).zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the machine keeps the memory for longer than the VM.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        let (gate, serial) = (Arc::new(Gate::default()), Arc::new(Serial::default()));
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let vcpus = (0..config.cpus).map(|index| Vcpu::new(&vm, &cpuid, index, &gate, &serial));
        Ok(Machine {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            dma: Dma::new(&memory, &gate)?,
            display: Display::new(config.display_bytes, &gate)?,
            msrs: kvm.get_msr_index_list()?.as_slice().to_vec(),
            memory,
            serial,
            config,
            gate,
            vm,
        })
    }

    /// Loads the guest's program.
    pub fn boot(&mut self) -> Result<(), Failure> {
        guest::boot(&self.memory, self.config.ram_bytes)?;
        let share = self.config.busy_bytes as u64 / 4096 / self.config.cpus * 4096;
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            vcpu.boot(guest::RAM + index * share, guest::RAM + (index + 1) * share)?;
        }
        Ok(())
    }

    /// Lets vCPUs and devices run.
    pub fn run(&self) {
        self.gate.open();
    }

    /// Pauses vCPUs and devices. When it returns, nothing writes guest memory.
    pub fn pause(&self) {
        self.gate.close(|| self.kick());
    }

    /// The state of all vCPUs.
    pub fn cpu_states(&self) -> Result<Vec<CpuState>, Failure> {
        self.vcpus.iter().map(|vcpu| vcpu.state(&self.msrs)).collect()
    }

    /// Gives a vCPU its state.
    pub fn load_cpu(&self, index: usize, state: &CpuState) -> Result<(), Failure> {
        self.vcpus.get(index).ok_or("the source has more vCPUs")?.load(state)
    }

    /// The VM, for KVM's dirty log.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open for as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) }
    }

    fn kick(&self) {
        self.vcpus.iter().for_each(Vcpu::kick);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.gate.end(|| self.kick());
    }
}

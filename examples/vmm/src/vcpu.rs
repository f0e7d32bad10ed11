//! A vCPU: its thread, and its state.

// Reads and writes more than the structure says where dynamic features such as AMX were permitted; they are not here.
#![allow(unsafe_code)]

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use kvm_bindings::{
    CpuId, Msrs, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::{Failure, devices::Serial, gate::Gate, guest};

/// One vCPU. Its thread holds the lock of `fd` while it runs.
pub struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    thread: JoinHandle<()>,
}

impl Vcpu {
    /// A paused vCPU that has what `cpuid` says, and no state. A VMM for more than one kind of host compares these tables with those
    /// of the source first; this one takes its host's.
    pub fn new(vm: &VmFd, cpuid: &CpuId, index: u64, gate: &Arc<Gate>, serial: &Arc<Serial>) -> Result<Vcpu, Failure> {
        let fd = vm.create_vcpu(index)?;
        // It decides which bits of the state exist. Here, and not with the state: the guest waits for that.
        fd.set_cpuid2(cpuid)?;
        let fd = Arc::new(Mutex::new(fd));
        gate.add_thread();
        let thread = std::thread::Builder::new().name(format!("vcpu {index}")).spawn({
            let (fd, gate, serial) = (fd.clone(), gate.clone(), serial.clone());
            move || {
                while gate.pass() {
                    if let Err(error) = run(&mut lock(&fd), &gate, &serial) {
                        eprintln!("vcpu {index}: {error}");
                        break;
                    }
                }
                gate.leave();
            }
        })?;
        Ok(Vcpu { fd, thread })
    }

    /// Makes it leave the guest.
    pub fn kick(&self) {
        // It fails where the thread has ended.
        let _ = self.thread.kill(SIGRTMIN());
    }

    /// Gives it the state in which the program begins that works on the pages from `first` to before `end`.
    pub fn boot(&self, first: u64, end: u64) -> Result<(), Failure> {
        let fd = lock(&self.fd);
        fd.set_sregs(&guest::first_system_registers(fd.get_sregs()?))?;
        fd.set_xcrs(&guest::first_extended_control())?;
        fd.set_regs(&guest::first_registers(first, end))?;
        Ok(())
    }

    /// Its state, while it is paused.
    pub fn state(&self, msrs: &[u32]) -> Result<CpuState, Failure> {
        let fd = lock(&self.fd);
        Ok(CpuState {
            sregs: fd.get_sregs()?,
            regs: fd.get_regs()?,
            xcrs: fd.get_xcrs()?,
            xsave: fd.get_xsave()?,
            msrs: read_msrs(&fd, msrs)?,
            mp_state: fd.get_mp_state()?,
            events: fd.get_vcpu_events()?,
            debugregs: fd.get_debug_regs()?,
        })
    }

    /// Gives it a state.
    pub fn load(&self, state: &CpuState) -> Result<(), Failure> {
        let fd = lock(&self.fd);
        fd.set_sregs(&state.sregs)?;
        fd.set_regs(&state.regs)?;
        fd.set_xcrs(&state.xcrs)?;
        // SAFETY: see the top of the file.
        unsafe { fd.set_xsave(&state.xsave) }?;
        write_msrs(&fd, &state.msrs)?;
        fd.set_vcpu_events(&state.events)?;
        fd.set_debug_regs(&state.debugregs)?;
        Ok(fd.set_mp_state(state.mp_state)?)
    }
}

/// All that is needed to go on elsewhere.
#[derive(Serialize, Deserialize)]
pub struct CpuState {
    sregs: kvm_sregs,
    regs: kvm_regs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    msrs: Vec<kvm_msr_entry>,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    debugregs: kvm_debugregs,
}

/// Runs the guest until the gate closes. The registers are final then.
fn run(fd: &mut VcpuFd, gate: &Gate, serial: &Serial) -> Result<(), Failure> {
    let mut unfinished = false;
    while gate.is_open() {
        unfinished = false;
        match fd.run() {
            Ok(VcpuExit::IoOut(Serial::PORT, bytes)) => {
                serial.write(bytes);
                unfinished = true;
            }
            Ok(exit) => return Err(format!("the guest did {exit:?}").into()),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if unfinished {
        // KVM completes an `out` when the guest is entered again, and only then moves on to the next instruction.
        fd.set_kvm_immediate_exit(1);
        let entered = fd.run().map(|exit| format!("{exit:?}"));
        fd.set_kvm_immediate_exit(0);
        if !matches!(&entered, Err(error) if error.errno() == libc::EINTR) {
            return Err(format!("an `out` was not completed: {entered:?}").into());
        }
    }
    Ok(())
}

/// The kernel stops at the first that it does not want to read, which is left out.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Failure> {
    let (mut found, mut left) = (Vec::new(), indices);
    while !left.is_empty() {
        let entries: Vec<_> = left.iter().map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|error| format!("{error:?}"))?;
        let read = fd.get_msrs(&mut msrs)?;
        found.extend_from_slice(&msrs.as_slice()[..read]);
        left = left.get(read + 1..).unwrap_or_default();
    }
    Ok(found)
}

/// One that the kernel refuses may have that value already: some can be read and never written.
fn write_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Failure> {
    let mut left = entries;
    while !left.is_empty() {
        let written = fd.set_msrs(&Msrs::from_entries(left).map_err(|error| format!("{error:?}"))?)?;
        if let Some(refused) = left.get(written)
            && read_msrs(fd, &[refused.index])?.first().map(|ours| ours.data) != Some(refused.data)
        {
            return Err(format!("MSR {:#x} cannot be {:#x} here", refused.index, refused.data).into());
        }
        left = left.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}

fn lock(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    fd.lock().unwrap_or_else(PoisonError::into_inner)
}

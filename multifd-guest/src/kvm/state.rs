//! The state of a vCPU as a section body, and back.
//!
//! The structures are the kernel's, byte for byte; they are part of its binary interface and equal on all x86-64
//! machines. Lengths are checked here, contents by the kernel that takes them.

use std::io::Read;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    body::{Body, BodyError, BodyWriter},
    sys,
};

/// Everything that makes a vCPU go on elsewhere as if nothing had happened.
pub(crate) struct CpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    sregs: kvm_sregs,
    regs: kvm_regs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    msrs: Vec<kvm_msr_entry>,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    debugregs: kvm_debugregs,
}

impl CpuState {
    /// Reads the state of a vCPU that does not run. Of the MSRs in `indices`, those that the kernel lets us read.
    pub(crate) fn get(cpu: &VcpuFd, indices: &[u32]) -> Result<CpuState, StateError> {
        Ok(CpuState {
            cpuid: cpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(kernel("the CPUID table"))?.as_slice().to_vec(),
            // 0 where the kernel cannot tell; then the destination leaves its own.
            tsc_khz: cpu.get_tsc_khz().unwrap_or(0),
            sregs: cpu.get_sregs().map_err(kernel("the system registers"))?,
            regs: cpu.get_regs().map_err(kernel("the registers"))?,
            xcrs: cpu.get_xcrs().map_err(kernel("the extended control registers"))?,
            xsave: cpu.get_xsave().map_err(kernel("the vector registers"))?,
            msrs: get_msrs(cpu, indices)?,
            mp_state: cpu.get_mp_state().map_err(kernel("the run state"))?,
            events: cpu.get_vcpu_events().map_err(kernel("pending events"))?,
            debugregs: cpu.get_debug_regs().map_err(kernel("the debug registers"))?,
        })
    }

    /// Gives the state to a vCPU that never ran.
    ///
    /// `supported` is what CPUs of this machine can do; a state that needs more is refused.
    pub(crate) fn set(&self, cpu: &VcpuFd, supported: &CpuId) -> Result<(), StateError> {
        // A KVM that passes features of the host through whatever the table says reports them in a vCPU's table only.
        cpu.set_cpuid2(supported).map_err(kernel("the CPUID table"))?;
        self.check_features(&cpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(kernel("the CPUID table"))?)?;
        // CPUID first: it decides which bits of CR4, XCR0 and the MSRs exist.
        let cpuid =
            CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooManyCpuid { found: self.cpuid.len() })?;
        cpu.set_cpuid2(&cpuid).map_err(kernel("the CPUID table"))?;
        let ours = cpu.get_tsc_khz().unwrap_or(0);
        if self.tsc_khz != 0 && self.tsc_khz != ours && cpu.set_tsc_khz(self.tsc_khz).is_err() {
            return Err(StateError::Tsc { theirs: self.tsc_khz, ours });
        }
        cpu.set_sregs(&self.sregs).map_err(kernel("the system registers"))?;
        cpu.set_regs(&self.regs).map_err(kernel("the registers"))?;
        cpu.set_xcrs(&self.xcrs).map_err(kernel("the extended control registers"))?;
        sys::kvm::set_xsave(cpu, &self.xsave).map_err(kernel("the vector registers"))?;
        set_msrs(cpu, &self.msrs)?;
        cpu.set_vcpu_events(&self.events).map_err(kernel("pending events"))?;
        cpu.set_debug_regs(&self.debugregs).map_err(kernel("the debug registers"))?;
        cpu.set_mp_state(self.mp_state).map_err(kernel("the run state"))
    }

    fn check_features(&self, ours: &CpuId) -> Result<(), StateError> {
        for theirs in &self.cpuid {
            let ours =
                ours.as_slice().iter().find(|ours| (ours.function, ours.index) == (theirs.function, theirs.index));
            let ours = ours.copied().unwrap_or_default();
            let (function, index) = (theirs.function, theirs.index);
            // Only registers that are sets of features, without the bits that mirror CR4 (OSXSAVE, OSPKE).
            let sets: &[(&'static str, u32, u32)] = match (function, index) {
                (1, _) => &[("ecx", theirs.ecx & !(1 << 27), ours.ecx), ("edx", theirs.edx, ours.edx)],
                (7, 0) => &[
                    ("ebx", theirs.ebx, ours.ebx),
                    ("ecx", theirs.ecx & !(1 << 4), ours.ecx),
                    ("edx", theirs.edx, ours.edx),
                ],
                (0xd, 0 | 1) => &[("eax", theirs.eax, ours.eax)],
                (0x8000_0001, _) => &[("ecx", theirs.ecx, ours.ecx), ("edx", theirs.edx, ours.edx)],
                _ => &[],
            };
            for &(register, theirs, ours) in sets {
                if theirs & !ours != 0 {
                    return Err(StateError::Features { function, index, register, missing: theirs & !ours });
                }
            }
        }
        Ok(())
    }

    pub(crate) fn to_body(&self) -> Vec<u8> {
        let msrs: Vec<u8> = self.msrs.iter().flat_map(|msr| msr.as_bytes().to_vec()).collect();
        BodyWriter::new(FORMAT)
            .field(CPUID, self.cpuid.as_bytes())
            .field(TSC_KHZ, self.tsc_khz.as_bytes())
            .field(SREGS, self.sregs.as_bytes())
            .field(REGS, self.regs.as_bytes())
            .field(XCRS, self.xcrs.as_bytes())
            .field(XSAVE, self.xsave.as_bytes())
            .field(MSRS, &msrs)
            .field(MP_STATE, self.mp_state.as_bytes())
            .field(EVENTS, self.events.as_bytes())
            .field(DEBUGREGS, self.debugregs.as_bytes())
            .finish()
    }

    pub(crate) fn from_body(input: &mut dyn Read) -> Result<CpuState, StateError> {
        let mut body = Body::read(input, FORMAT, LIMIT)?;
        let state = CpuState {
            cpuid: entries(&mut body, CPUID)?,
            tsc_khz: whole(&mut body, TSC_KHZ)?,
            sregs: whole(&mut body, SREGS)?,
            regs: whole(&mut body, REGS)?,
            xcrs: whole(&mut body, XCRS)?,
            xsave: whole(&mut body, XSAVE)?,
            msrs: entries(&mut body, MSRS)?,
            mp_state: whole(&mut body, MP_STATE)?,
            events: whole(&mut body, EVENTS)?,
            debugregs: whole(&mut body, DEBUGREGS)?,
        };
        body.finish()?;
        // The kernel uses the length to index the array.
        if state.xcrs.nr_xcrs as usize > state.xcrs.xcrs.len() {
            return Err(StateError::TooManyXcrs { found: state.xcrs.nr_xcrs });
        }
        Ok(state)
    }
}

/// The time of the virtual machine's paravirtual clock, as a body.
pub(crate) fn clock_to_body(vm: &VmFd) -> Result<Vec<u8>, StateError> {
    let clock = vm.get_clock().map_err(kernel("the clock"))?;
    Ok(BodyWriter::new(FORMAT).number(CLOCK, clock.clock).finish())
}

/// Sets the clock to the time in a body.
pub(crate) fn clock_from_body(vm: &VmFd, input: &mut dyn Read) -> Result<(), StateError> {
    let mut body = Body::read(input, FORMAT, LIMIT)?;
    let clock = kvm_clock_data { clock: body.take_number(CLOCK)?, ..kvm_clock_data::default() };
    body.finish()?;
    vm.set_clock(&clock).map_err(kernel("the clock"))
}

/// Reads MSRs; the kernel stops at the first that it does not want to read, which is then left out.
fn get_msrs(cpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut found = Vec::new();
    let mut left = indices;
    while !left.is_empty() {
        let entries: Vec<_> = left.iter().map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| StateError::TooManyMsrs { found: entries.len() })?;
        let read = cpu.get_msrs(&mut msrs).map_err(kernel("the MSRs"))?;
        found.extend_from_slice(&msrs.as_slice()[..read]);
        left = left.get(read + 1..).unwrap_or_default();
    }
    Ok(found)
}

/// Writes MSRs. One that the kernel refuses is left as it is where it already has that value: some can be read but
/// never written.
fn set_msrs(cpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let mut left = entries;
    while !left.is_empty() {
        let msrs = Msrs::from_entries(left).map_err(|_| StateError::TooManyMsrs { found: left.len() })?;
        let written = cpu.set_msrs(&msrs).map_err(kernel("the MSRs"))?;
        if let Some(refused) = left.get(written) {
            let ours = get_msrs(cpu, &[refused.index])?.first().map(|msr| msr.data);
            if ours != Some(refused.data) {
                return Err(StateError::Msr { index: refused.index, theirs: refused.data, ours });
            }
        }
        left = left.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}

fn whole<T: FromBytes>(body: &mut Body, tag: u16) -> Result<T, StateError> {
    let bytes = body.take(tag)?;
    T::read_from_bytes(&bytes).map_err(|_| BodyError::Length { tag, found: bytes.len() }.into())
}

fn entries<T: FromBytes + Immutable>(body: &mut Body, tag: u16) -> Result<Vec<T>, StateError> {
    let bytes = body.take(tag)?;
    let chunks = bytes.chunks(size_of::<T>());
    chunks
        .map(|chunk| T::read_from_bytes(chunk).map_err(|_| BodyError::Length { tag, found: bytes.len() }.into()))
        .collect()
}

fn kernel(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kernel { what, source: source.into() }
}

/// Why the state of a vCPU cannot be read or taken.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The body is not one.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// The kernel refuses part of it.
    #[error("the kernel refuses {what}: {source}")]
    Kernel {
        /// Which part.
        what: &'static str,
        /// Its error.
        source: std::io::Error,
    },
    /// The source's CPU can do more.
    #[error(
        "the source's CPU has features that this machine lacks: bits {missing:#x} of {register} in CPUID leaf {function:#x}.{index}"
    )]
    Features {
        /// The leaf.
        function: u32,
        /// The sub-leaf.
        index: u32,
        /// The register.
        register: &'static str,
        /// The bits.
        missing: u32,
    },
    /// The time stamp counters run differently, and this machine cannot scale its own.
    #[error("the source's time stamp counter runs at {theirs} kHz, ours at {ours} kHz and cannot be scaled")]
    Tsc {
        /// The source's.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// A model-specific register cannot have the source's value here.
    #[error("MSR {index:#x} is {theirs:#x} on the source, and cannot be set here (it is {ours:x?})")]
    Msr {
        /// Which one.
        index: u32,
        /// The source's value.
        theirs: u64,
        /// Ours, if it can be read.
        ours: Option<u64>,
    },
    /// More CPUID entries than the kernel takes.
    #[error("{found} CPUID entries")]
    TooManyCpuid {
        /// How many.
        found: usize,
    },
    /// More MSRs than the kernel takes.
    #[error("{found} MSRs")]
    TooManyMsrs {
        /// How many.
        found: usize,
    },
    /// More extended control registers than exist.
    #[error("{found} extended control registers")]
    TooManyXcrs {
        /// How many.
        found: u32,
    },
}

/// Format of the bodies.
const FORMAT: u16 = 1;
/// Above the length of any state: 256 CPUID entries of 40 bytes and 256 MSRs of 16 are 14 KiB, vector registers 4.
const LIMIT: usize = 64 << 10;

const CPUID: u16 = 1;
const TSC_KHZ: u16 = 2;
const SREGS: u16 = 3;
const REGS: u16 = 4;
const XCRS: u16 = 5;
const XSAVE: u16 = 6;
const MSRS: u16 = 7;
const MP_STATE: u16 = 8;
const EVENTS: u16 = 9;
const DEBUGREGS: u16 = 10;
const CLOCK: u16 = 1;

/// A saved state with the contents of its vector registers lost.
#[cfg(test)]
pub(crate) fn without_vectors(body: &[u8]) -> Vec<u8> {
    let mut state = CpuState::from_body(&mut &*body).unwrap();
    // Bytes 160 to 416 of the XSAVE area are xmm0 to xmm15.
    state.xsave.region[160 / 4..416 / 4].fill(0);
    state.to_body()
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;
    use proptest::prelude::*;
    use test_support::skip;

    use super::*;

    /// A vCPU that never ran, and the CPUID table that it may have; `None` where KVM is absent.
    fn vcpu() -> Option<(VmFd, VcpuFd, CpuId)> {
        let kvm = Kvm::new().ok()?;
        let vm = kvm.create_vm().ok()?;
        let cpu = vm.create_vcpu(0).ok()?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ok()?;
        cpu.set_cpuid2(&supported).ok()?;
        Some((vm, cpu, supported))
    }

    fn state() -> CpuState {
        CpuState {
            cpuid: vec![kvm_cpuid_entry2 { function: 1, ecx: 1, ..kvm_cpuid_entry2::default() }; 3],
            tsc_khz: 2_000_000,
            sregs: kvm_sregs::default(),
            regs: kvm_regs { rip: 77, ..kvm_regs::default() },
            xcrs: kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() },
            xsave: kvm_xsave::default(),
            msrs: vec![kvm_msr_entry { index: 0x10, data: 5, ..kvm_msr_entry::default() }],
            mp_state: kvm_mp_state::default(),
            events: kvm_vcpu_events::default(),
            debugregs: kvm_debugregs::default(),
        }
    }

    #[test]
    fn a_body_holds_all_of_the_state() {
        let body = state().to_body();
        let back = CpuState::from_body(&mut &body[..]).unwrap();
        assert_eq!(back.to_body(), body);
        assert_eq!((back.cpuid.len(), back.regs.rip, back.msrs[0].data), (3, 77, 5));
    }

    #[test]
    fn a_feature_that_this_machine_lacks_is_named() {
        let Some((_vm, cpu, supported)) = vcpu() else { return skip("no usable /dev/kvm") };
        let mut state = CpuState::get(&cpu, &[]).unwrap();
        state.set(&cpu, &supported).unwrap();
        let leaf = state.cpuid.iter_mut().find(|entry| (entry.function, entry.index) == (7, 0)).unwrap();
        let bit = 1 << (!leaf.ebx).trailing_zeros();
        leaf.ebx |= bit;
        match state.set(&cpu, &supported) {
            Err(StateError::Features { function: 7, register: "ebx", missing, .. }) => assert_eq!(missing, bit),
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_state_or_an_error(noise: Vec<u8>, at in 0usize..8000, value: u8, cut in 0usize..8000) {
            let mut body = state().to_body();
            let _ = CpuState::from_body(&mut &noise[..]);
            prop_assert!(CpuState::from_body(&mut &body[..cut.min(body.len() - 1)]).is_err());
            let at = at % body.len();
            body[at] = value;
            let _ = CpuState::from_body(&mut &body[..]);
        }
    }

    /// The kernel is the judge of what is in the structures; whatever it says, we do not panic.
    #[test]
    fn a_vcpu_survives_hostile_states() {
        let Some((_vm, cpu, supported)) = vcpu() else { return skip("no usable /dev/kvm") };
        let good = CpuState::get(&cpu, &[0x10, 0x174]).unwrap().to_body();
        let mut seed = 1u64;
        let mut refused = 0;
        for _ in 0..300 {
            let mut body = good.clone();
            for _ in 0..4 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (seed >> 33) as usize % body.len();
                body[at] = (seed >> 20) as u8;
            }
            refused +=
                u32::from(CpuState::from_body(&mut &body[..]).and_then(|state| state.set(&cpu, &supported)).is_err());
        }
        assert!(refused > 0);
    }
}

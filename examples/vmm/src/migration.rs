//! The glue to `multifd`: all that this VMM has to say about migration. `docs/embedding.md` goes through it line by line.

// KVM's log takes a promise.
#![allow(unsafe_code)]

use std::{io::Read, sync::atomic::Ordering::Relaxed};

use multifd::{
    destination::{self, Destination},
    dirty::{
        DirtyLog,
        kvm_log::{KvmDirtyLog, KvmSlot},
        merged::MergedLog,
        untouched::untouched,
        vm_memory::{VmMemoryLog, ram},
    },
    dirty_bitmap::DirtyBitmap,
    multifd_proto::BlockName,
    ram::Ram,
    sections::Sections,
    source::{self, Source},
    transport::uri::Uri,
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::{Failure, machine::Machine};

/// A machine as the engine sees it.
pub struct Vm {
    pub machine: Machine,
    ram: Ram,
    log: MergedLog,
}

impl Vm {
    pub fn new(machine: Machine) -> Result<Vm, Failure> {
        // RAM blocks: one for each region. The name says where it lies, so both sides agree on it.
        let ram = ram(&machine.memory, 4096, |_, address| {
            BlockName::new(&format!("ram@{address:#x}")).expect("short, and not empty")
        })?;
        // What vCPUs write is in KVM's log, what devices write is in the bitmaps of the memory.
        let slots = machine.memory.iter().enumerate().map(|(slot, region)| KvmSlot {
            slot: slot as u32,
            guest_address: region.start_addr().raw_value(),
            host_address: region.as_ptr() as u64,
            bytes: region.len(),
            flags: 0,
        });
        // SAFETY: the machine changes none of its slots.
        let vcpus = unsafe { KvmDirtyLog::new(machine.fd(), slots.collect()) }?;
        let log = MergedLog::new(vec![Box::new(vcpus), Box::new(VmMemoryLog::new(&machine.memory))]);
        Ok(Vm { machine, ram, log })
    }
}

impl SourceVm for Vm {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        &mut self.log
    }

    fn untouched(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        Ok(untouched(&self.ram, into)?)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.machine.pause();
        Ok(())
    }

    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        for (index, state) in (0..).zip(self.machine.cpu_states()?) {
            section(out, "cpu", index, &serde_json::to_vec(&state)?)?;
        }
        section(out, "serial", 0, &self.machine.serial.written.load(Relaxed).to_le_bytes())?;
        section(out, "dma", 0, &self.machine.dma.state().to_le_bytes())?;
        section(out, "display", 0, &self.machine.display.picture)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.machine.run();
        Ok(())
    }
}

impl DestinationVm for Vm {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        let body = body(input)?;
        let number = || Ok::<_, VmError>(u64::from_le_bytes(body[..].try_into()?));
        match (section.name.as_str(), section.version) {
            ("cpu", 1) => self.machine.load_cpu(section.instance as usize, &serde_json::from_slice(&body)?)?,
            ("serial", 1) => self.machine.serial.written.store(number()?, Relaxed),
            ("dma", 1) => self.machine.dma.load(number()?)?,
            ("display", 1) => self.machine.display.load(body)?,
            _ => return Err(format!("this VM has no device {section:?}").into()),
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.machine.run();
        Ok(())
    }
}

/// Adds a section that says how long it is: the stream does not.
fn section(out: &mut Sections, name: &str, instance: u32, body: &[u8]) -> Result<(), VmError> {
    let len = u64::try_from(body.len())?.to_le_bytes();
    Ok(out.section(name, instance, 1, &[&len, body].concat())?)
}

/// Reads what [`section`] wrote, up to its end and no further.
fn body(input: &mut dyn Read) -> Result<Vec<u8>, VmError> {
    let mut len = [0; 8];
    input.read_exact(&mut len)?;
    let (len, mut body) = (u64::from_le_bytes(len), Vec::new());
    // The length is the source's word: memory is taken as bytes come, and not more than any device has.
    if len > 1 << 30 || input.take(len).read_to_end(&mut body)? as u64 != len {
        return Err(format!("{len} bytes of state were announced").into());
    }
    Ok(body)
}

/// Moves the VM to `to`. On an error it runs on here, except for those that say otherwise.
pub fn send(vm: &mut Vm, to: &Uri) -> Result<source::Report, Failure> {
    Ok(Source::new(source::Options::default()).run(vm, &*to.connector()?, &mut ())?)
}

/// Waits for a VM at `at`, and lets it run. `listening` is told the address.
pub fn receive(vm: &mut Vm, at: &Uri, listening: impl FnOnce(&Uri)) -> Result<(), Failure> {
    let listener = at.listener()?;
    listening(listener.uri());
    Destination::new(destination::Options::default()).run(vm, Box::new(listener), &mut ())?;
    Ok(())
}

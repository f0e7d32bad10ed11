//! The glue to `multifd`: all that this VMM has to say about migration. `docs/embedding.md` goes through it line by line.

// KVM's log takes a promise.
#![allow(unsafe_code)]

use std::{fs::File, io::Read, mem::take, sync::atomic::Ordering::Relaxed};

use multifd::{
    destination::{self, Destination},
    dirty::{
        DirtyLog,
        kvm_log::{KvmDirtyLog, KvmSlot},
        merged::MergedLog,
        vm_memory::{VmMemoryLog, ram},
    },
    ram::{BlockName, Ram, SharedBlock},
    sections::{Sections, read_framed},
    source::{self, Source},
    transport::uri::Uri,
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::machine::{Config, Machine};

/// A machine as the engine sees it.
pub struct Vm {
    pub machine: Machine,
    ram: Ram,
    log: MergedLog,
}

impl Vm {
    pub fn new(machine: Machine) -> Result<Vm, VmError> {
        // RAM blocks: one for each region. The name says where it lies, so both sides agree on it.
        let name = |_, address| BlockName::new(&format!("ram@{address:#x}")).expect("short, and not empty");
        let ram = ram(&machine.memory, 4096, name)?;
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
    fn describe(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(serde_json::to_vec(&self.machine.config)?)
    }

    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        &mut self.log
    }

    fn save_live(&mut self, out: &mut Sections) -> Result<u64, VmError> {
        out.framed("display", 0, 2, &self.machine.display.state(out.live_rounds() == 0))?;
        Ok(0)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.machine.pause();
        Ok(())
    }

    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        for (index, state) in (0..).zip(self.machine.cpu_states()?) {
            out.framed("cpu", index, 1, &serde_json::to_vec(&state)?)?;
        }
        out.framed("serial", 0, 1, &self.machine.serial.written.load(Relaxed).to_le_bytes())?;
        out.framed("dma", 0, 1, &self.machine.dma.state().to_le_bytes())?;
        Ok(out.framed("display", 0, 2, &self.machine.display.state(out.live_rounds() == 0))?)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.machine.run();
        Ok(())
    }
}

/// A machine that is made when the source has said what it is like.
pub struct Arrival {
    /// No VM has more than this here; and what its memory is to be made of.
    pub most: Config,
    /// What the source hands over of its own memory.
    pub memory: Vec<(File, u64)>,
    pub vm: Option<Vm>,
}

impl DestinationVm for Arrival {
    fn take_memory(&mut self, memory: Vec<SharedBlock>) -> Result<(), VmError> {
        self.memory = memory.into_iter().map(SharedBlock::into_file).collect();
        Ok(())
    }

    fn prepare(&mut self, description: &[u8]) -> Result<Vec<u8>, VmError> {
        let config = serde_json::from_slice::<Config>(description)?.within(&self.most)?;
        self.vm = Some(Vm::new(Machine::with_memory(config, take(&mut self.memory))?)?);
        Ok(Vec::new())
    }

    fn ram(&self) -> &Ram {
        &self.vm.as_ref().expect("asked for once it was prepared").ram
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        // Framed, so that it can be read by a version whose stream has no lengths, too.
        let (body, machine) = (read_framed(input, 1 << 30)?, &mut self.vm.as_mut().ok_or("no VM was made")?.machine);
        let number = || Ok::<_, VmError>(u64::from_le_bytes(body[..].try_into()?));
        match (section.name.as_str(), section.version) {
            ("cpu", 1) => machine.load_cpu(section.instance as usize, &serde_json::from_slice(&body)?)?,
            ("serial", 1) => machine.serial.written.store(number()?, Relaxed),
            ("dma", 1) => machine.dma.load(number()?)?,
            ("display", 2) => machine.display.load(&body)?,
            _ => return Err(format!("this VM has no device {section:?}").into()),
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.vm.as_ref().ok_or("no VM was made")?.machine.run();
        Ok(())
    }
}

/// Moves the VM to `to`, where it may keep its memory. On an error it runs on here, except for those that say otherwise.
pub fn send(vm: &mut Vm, to: &Uri, hand_over: bool) -> Result<source::Report, VmError> {
    let mut options = source::Options::default();
    options.plan.hand_over = hand_over;
    Ok(Source::new(options).run(vm, &*to.connector()?, &mut ())?)
}

/// Waits at `at` for a VM that has no more than `most`, and lets it run. `listening` is told the address.
pub fn receive(most: Config, at: &Uri, listening: impl FnOnce(&Uri)) -> Result<Vm, VmError> {
    let listener = at.listener()?;
    listening(listener.uri());
    let mut arrival = Arrival { most, memory: Vec::new(), vm: None };
    Destination::new(destination::Options::default()).run(&mut arrival, Box::new(listener), &mut ())?;
    arrival.vm.ok_or_else(|| "nothing arrived".into())
}

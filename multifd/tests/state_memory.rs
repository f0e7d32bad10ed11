//! Much device state takes little memory on its way. By itself in a process, whose peak it looks at.

use std::{
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use multifd::{
    destination::{self, Destination},
    dirty::{DirtyLog, bitmap::AtomicDirtyBitmap},
    ram::{BlockName, Ram, RamBlock},
    sections::Sections,
    source::{self, Source},
    transport::uri::Uri,
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};
use test_support::{skip, time_limit};

const MIB: u64 = 1 << 20;
const STATE: u64 = 512 * MIB;
/// What both ends may have at most: 18 MiB of packets at the source, 32 MiB at the destination, and all else.
const MOST: u64 = 80 * MIB;

/// A VM with one device, whose state is made while it is written.
struct Device {
    ram: Ram,
    dirty: AtomicDirtyBitmap,
    /// How much of the state the source has written.
    written: Arc<AtomicU64>,
    /// How much is read before the reader waits for the source to be as far ahead as it can get.
    read: u64,
    is_live: bool,
}

impl Device {
    fn new(written: &Arc<AtomicU64>, is_live: bool) -> Device {
        let block = RamBlock::anonymous(BlockName::new("ram").unwrap(), MIB as usize).unwrap();
        let ram = Ram::new(4096, vec![block]).unwrap();
        let dirty = AtomicDirtyBitmap::new(ram.layout());
        Device { ram, dirty, written: written.clone(), read: 0, is_live }
    }

    fn write(&mut self, out: &mut Sections, len: u64) -> Result<(), VmError> {
        let piece = vec![7; MIB as usize / 4];
        let written = self.written.clone();
        out.section_from("device", 0, 1, &mut |out| {
            for _ in 0..len / piece.len() as u64 {
                out.write_all(&piece)?;
                written.fetch_add(piece.len() as u64, Relaxed);
            }
            Ok(())
        })
    }
}

impl SourceVm for Device {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        &mut self.dirty
    }

    fn save_live(&mut self, out: &mut Sections) -> Result<u64, VmError> {
        if self.is_live {
            let len = (STATE - self.written.load(Relaxed)).min(out.room());
            self.write(out, len)?;
        }
        Ok(0)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        let left = STATE - self.written.load(Relaxed);
        self.write(out, left)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

impl DestinationVm for Device {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn load(&mut self, _: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        let mut piece = vec![0; 64 << 10];
        loop {
            match input.read(&mut piece)? {
                0 => return Ok(()),
                n => self.read += n as u64,
            }
            if self.read == piece.len() as u64 {
                // What has no bound would grow now.
                let mut before = 0;
                while before < self.written.load(Relaxed) {
                    before = self.written.load(Relaxed);
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    fn start(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// Bytes that this process had in memory at most since the last call of [`forget_peak`].
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

fn forget_peak() -> std::io::Result<()> {
    std::fs::write("/proc/self/clear_refs", "5")
}

/// It took 1,026 MiB once, as the state was kept whole at the source, twice.
#[test]
fn half_a_gigabyte_of_device_state_takes_little_memory_over_main_over_channels_and_early() {
    if let Err(error) = forget_peak() {
        return skip(&format!("/proc/self/clear_refs: {error}"));
    }
    for (channels, is_live) in [(0, false), (4, false), (4, true)] {
        let written = Arc::default();
        let (mut vm, mut to) = (Device::new(&written, is_live), Device::new(&written, false));
        let mut options = source::Options::default();
        options.plan.channels = channels;
        forget_peak().unwrap();
        let before = peak();
        time_limit(Duration::from_secs(120), || {
            let listener = "tcp:127.0.0.1:0".parse::<Uri>().unwrap().listener().unwrap();
            let at = listener.uri().clone();
            std::thread::scope(|scope| {
                let options_there = destination::Options::default();
                let received =
                    scope.spawn(|| Destination::new(options_there).run(&mut to, Box::new(listener), &mut ()));
                Source::new(options).run(&mut vm, &*at.connector().unwrap(), &mut ()).unwrap();
                received.join().unwrap().unwrap();
            });
        });
        assert_eq!(to.read, STATE);
        let more = peak() - before;
        assert!(more < MOST, "{channels} channels, live {is_live}: {} MiB more", more / MIB);
        println!("{channels} channels, live {is_live}: {} MiB more", more / MIB);
    }
}

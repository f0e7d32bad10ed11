//! A guest that writes while it moves: source and destination in one process, the memory verified at the end.
use multifd::{
    destination::Destination,
    dirty::{DirtyLog, bitmap::AtomicDirtyBitmap},
    multifd_proto::BlockName,
    ram::{Ram, RamBlock},
    sections::Sections,
    source::Source,
    transport::uri::Uri,
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::{io::Read, sync::Arc, thread};

const PAGES: u64 = 4096;

/// Its CPU is a thread that counts: it writes each number to the page whose turn it is. Where it stands is its device state.
struct Guest {
    ram: Ram,
    dirty: AtomicDirtyBitmap,
    running: Arc<AtomicBool>,
    cpu: Option<thread::JoinHandle<u64>>,
    count: u64,
}

impl Guest {
    fn new() -> Result<Guest, VmError> {
        let ram = Ram::new(4096, vec![RamBlock::anonymous(BlockName::new("ram")?, PAGES as usize * 4096)?])?;
        let dirty = AtomicDirtyBitmap::new(ram.layout());
        Ok(Guest { ram, dirty, running: Arc::default(), cpu: None, count: 0 })
    }

    fn run(&mut self) {
        self.running.store(true, SeqCst);
        let (ram, dirty, running, mut count) = (self.ram.clone(), self.dirty.clone(), self.running.clone(), self.count);
        self.cpu = Some(thread::spawn(move || {
            while running.load(SeqCst) {
                let offset = count % PAGES * 4096;
                count += 1;
                ram.blocks()[0].range(offset, 8).expect("in bounds").write(&count.to_le_bytes());
                dirty.mark(0, offset, 8); // after the write: the tracking law
            }
            count
        }));
    }

    fn stop(&mut self) {
        self.running.store(false, SeqCst);
        self.count = self.cpu.take().map_or(self.count, |cpu| cpu.join().expect("it only counts"));
    }

    /// Each page has to hold the last number that was written to it.
    fn verify(&self) {
        for count in self.count.saturating_sub(PAGES)..self.count {
            let mut word = [0; 8];
            self.ram.blocks()[0].range(count % PAGES * 4096, 8).expect("in bounds").read(&mut word);
            assert_eq!(u64::from_le_bytes(word), count + 1);
        }
    }
}

#[rustfmt::skip]
impl SourceVm for Guest {
    fn ram(&self) -> &Ram { &self.ram }
    fn dirty_log(&mut self) -> &mut dyn DirtyLog { &mut self.dirty }
    fn pause(&mut self) -> Result<(), VmError> { self.stop(); Ok(()) }
    fn resume(&mut self) -> Result<(), VmError> { self.run(); Ok(()) }
    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        Ok(out.section("counter", 0, 1, &self.count.to_le_bytes())?)
    }
}

#[rustfmt::skip]
impl DestinationVm for Guest {
    fn ram(&self) -> &Ram { &self.ram }
    fn start(&mut self) -> Result<(), VmError> { self.run(); Ok(()) }
    fn load(&mut self, _section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        let mut count = [0; 8];
        self.count = input.read_exact(&mut count).map(|()| u64::from_le_bytes(count))?;
        Ok(())
    }
}

fn main() -> Result<(), VmError> {
    let (mut here, mut there) = (Guest::new()?, Guest::new()?);
    let listener = "tcp:127.0.0.1:0".parse::<Uri>()?.listener()?;
    let address = listener.uri().clone();
    here.run();
    let destination = thread::spawn(move || {
        Destination::new(Default::default()).run(&mut there, Box::new(listener), &mut ()).map(|_| there)
    });
    let report = Source::new(Default::default()).run(&mut here, &*address.connector()?, &mut ())?;
    let mut there = destination.join().expect("no panic")?;
    there.stop();
    there.verify();
    assert!(there.count >= here.count && here.cpu.is_none(), "it went on there, and only there");
    println!("{} rounds, {:?} of downtime", report.rounds.len(), report.downtime.total);
    Ok(())
}

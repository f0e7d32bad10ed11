//! VMs that are watched while they migrate, and of which one call fails.

use std::{
    io::Read,
    thread,
    time::{Duration, Instant},
};

use crate::{
    dirty::DirtyLog,
    dirty_bitmap::DirtyBitmap,
    ram::Ram,
    sections::Sections,
    sync::{Arc, Mutex, lock},
    vm::{DestinationVm, SectionId, SourceVm, Throttled, VmError},
};

/// Which call fails, of those that can.
#[derive(Default)]
pub(super) struct Plan {
    fails_at: Option<usize>,
    calls: usize,
}

impl Plan {
    pub(super) fn failing(at: Option<usize>) -> Plan {
        Plan { fails_at: at, calls: 0 }
    }

    /// Calls so far.
    pub(super) fn calls(&self) -> usize {
        self.calls
    }

    /// One more call, of the method `name`.
    fn next(&mut self, name: &str) -> Result<(), VmError> {
        let call = self.calls;
        self.calls += 1;
        if self.fails_at == Some(call) { Err(format!("{name} fails on purpose").into()) } else { Ok(()) }
    }
}

/// The pages that the source's VM excluded last: no side may read them. Clones are the same set.
#[derive(Clone, Default)]
pub(super) struct Excluded(Arc<Mutex<Option<DirtyBitmap>>>);

pub(super) struct WatchedSource<S> {
    vm: S,
    pub(super) plan: Plan,
    pub(super) excluded: Excluded,
    paused: bool,
}

impl<S: SourceVm> WatchedSource<S> {
    pub(super) fn new(vm: S) -> WatchedSource<S> {
        WatchedSource { vm, plan: Plan::default(), excluded: Excluded::default(), paused: false }
    }

    pub(super) fn runs(&self) -> bool {
        !self.paused
    }

    /// A digest of each page.
    pub(super) fn digest(&self) -> Vec<u64> {
        digest(self.vm.ram(), &self.excluded)
    }

    /// Whether its guest writes memory within so long.
    ///
    /// # Errors
    /// It does not say which memory must not be read.
    pub(super) fn writes(&mut self, within: Duration) -> Result<bool, String> {
        let excluded = self.excluded(&mut DirtyBitmap::new(self.vm.ram().layout()));
        excluded.map_err(|error| format!("it does not say which memory must not be read: {error}"))?;
        Ok(changes(self.vm.ram(), &self.excluded, within))
    }

    /// Checks that its guest, which is said to run, writes memory within so long.
    ///
    /// # Errors
    /// What does not hold.
    pub(super) fn has_to_write(&mut self, within: Duration) -> Result<(), String> {
        match self.writes(within)? {
            true => Ok(()),
            false => Err("the guest is at the source, and does not run: it writes no memory".to_owned()),
        }
    }
}

impl<S: SourceVm> SourceVm for WatchedSource<S> {
    fn describe(&mut self) -> Result<Vec<u8>, VmError> {
        self.plan.next("describe")?;
        self.vm.describe()
    }

    fn agreed(&mut self, answer: &[u8]) -> Result<(), VmError> {
        self.plan.next("agreed")?;
        self.vm.agreed(answer)
    }

    fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        self.vm.dirty_log()
    }

    fn untouched(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        self.vm.untouched(into)
    }

    fn excluded(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        let mut now = DirtyBitmap::new(self.vm.ram().layout());
        self.vm.excluded(&mut now)?;
        into.merge(&now);
        *lock(&self.excluded.0) = Some(now);
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> Throttled {
        self.vm.throttle(percent)
    }

    fn save_live(&mut self, out: &mut Sections) -> Result<u64, VmError> {
        self.plan.next("save_live")?;
        self.vm.save_live(out)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.paused = true;
        self.vm.pause()?;
        self.plan.next("pause")
    }

    fn save_writes_memory(&self) -> bool {
        self.vm.save_writes_memory()
    }

    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        self.plan.next("save")?;
        self.vm.save(out)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.vm.resume()?;
        self.paused = false;
        Ok(())
    }
}

pub(super) struct WatchedDestination<D> {
    vm: D,
    pub(super) plan: Plan,
    excluded: Excluded,
    started: bool,
    digest: Vec<u64>,
}

impl<D: DestinationVm> WatchedDestination<D> {
    /// A VM to which one comes that excludes what is in `excluded`.
    pub(super) fn new(vm: D, excluded: Excluded) -> WatchedDestination<D> {
        WatchedDestination { vm, plan: Plan::default(), excluded, started: false, digest: Vec::new() }
    }

    pub(super) fn runs(&self) -> bool {
        self.started
    }

    /// Whether its guest writes memory within so long.
    pub(super) fn writes(&self, within: Duration) -> bool {
        changes(self.vm.ram(), &self.excluded, within)
    }

    pub(super) fn into_digest(self) -> Vec<u64> {
        self.digest
    }
}

impl<D: DestinationVm> DestinationVm for WatchedDestination<D> {
    fn page_size(&self) -> usize {
        self.vm.page_size()
    }

    fn prepare(&mut self, description: &[u8]) -> Result<Vec<u8>, VmError> {
        self.plan.next("prepare")?;
        self.vm.prepare(description)
    }

    fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        self.plan.next("load")?;
        self.vm.load(section, input)
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.plan.next("start")?;
        // All is in place, and no vCPU runs yet.
        self.digest = digest(self.vm.ram(), &self.excluded);
        self.vm.start()?;
        self.started = true;
        Ok(())
    }

    fn abandon(&mut self) {
        self.vm.abandon();
    }
}

/// FNV-1a over the words of each page; 0 for a page of zeros, and for one that is not to be read.
fn digest(ram: &Ram, excluded: &Excluded) -> Vec<u64> {
    let excluded = lock(&excluded.0);
    let mut bytes = vec![0; ram.layout().page_size()];
    let pages = ram.layout().blocks().iter().flat_map(|block| block.page_range());
    pages
        .map(|page| {
            if excluded.as_ref().is_some_and(|excluded| excluded.contains(page)) {
                return 0;
            }
            let range = ram.page(page).expect("a page of a block");
            if range.is_zero() {
                return 0;
            }
            range.read(&mut bytes);
            let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
            words.fold(0xcbf2_9ce4_8422_2325, |hash: u64, word| (hash ^ word).wrapping_mul(0x0100_0000_01b3))
        })
        .collect()
}

/// Whether memory changes within so long: whatever the VM's methods say, a guest that writes memory runs.
fn changes(ram: &Ram, excluded: &Excluded, within: Duration) -> bool {
    let (begun, before) = (Instant::now(), digest(ram, excluded));
    loop {
        if digest(ram, excluded) != before {
            return true;
        }
        if begun.elapsed() >= within {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

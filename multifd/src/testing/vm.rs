//! A VM without a CPU, for tests of the engine: memory, a log of writes, and callbacks that can be told to fail.

use std::io::{self, Read};

use crate::{
    dirty::DirtyLog,
    dirty_bitmap::DirtyBitmap,
    ram::Ram,
    sections::Sections,
    sync::{Arc, Mutex, lock},
    vm::{DestinationVm, SectionId, SourceVm, Throttled, VmError},
};

/// Writes to memory and remembers where. Clones write to the same memory, from any thread.
#[derive(Clone)]
pub(crate) struct Writer {
    ram: Ram,
    dirty: Arc<Mutex<DirtyBitmap>>,
    running: Arc<Mutex<bool>>,
}

impl Writer {
    /// Fills `page` with `value`, unless the guest is paused; says whether it did.
    pub(crate) fn write(&self, page: u64, value: u64) -> bool {
        // Held over both steps, so a pause falls between two writes.
        let running = lock(&self.running);
        if *running {
            let bytes: Vec<u8> = value.to_ne_bytes().repeat(self.ram.layout().page_size() / 8);
            self.ram.page(page).unwrap().write(&bytes);
            lock(&self.dirty).set(page);
        }
        *running
    }

    /// Reports `page` as written, which may be one that there is not.
    pub(crate) fn report(&self, page: u64) {
        lock(&self.dirty).set(page);
    }

    pub(crate) fn is_running(&self) -> bool {
        *lock(&self.running)
    }
}

/// What a VM was asked, in order.
pub(crate) type Calls = Arc<Mutex<Vec<&'static str>>>;

/// Sends state while the guest runs, and says how much is to come.
pub(crate) type AtLive = Box<dyn FnMut(&mut Sections) -> Result<u64, VmError> + Send>;

/// Adds sections behind the others.
pub(crate) type AtSave = Box<dyn FnMut(&mut Sections) -> Result<(), VmError> + Send>;

/// Says which pages must not be read.
pub(crate) type AtExcluded = Box<dyn FnMut(&mut DirtyBitmap) -> Result<(), VmError> + Send>;

/// Writes, and changes what the log says.
pub(crate) type AtPeek = Box<dyn FnMut(&Writer, &mut DirtyBitmap) -> io::Result<()> + Send>;

pub(crate) struct TestSource {
    pub(crate) writer: Writer,
    pub(crate) calls: Calls,
    /// The call that fails, counted from 0 over all calls that may fail.
    pub(crate) fail_at: Option<usize>,
    /// That call panics instead.
    pub(crate) panics: bool,
    /// Run at each drain, before it: a guest that writes while a round is sent.
    pub(crate) at_drain: Box<dyn FnMut(&Writer) + Send>,
    /// Run at each peek, before it; its log knows nothing then where there is none. It may change what the log says.
    pub(crate) at_peek: Option<AtPeek>,
    /// Run where state can be sent early. It has none where there is none.
    pub(crate) at_live: Option<AtLive>,
    /// Run before each round, where there is one.
    pub(crate) at_excluded: Option<AtExcluded>,
    /// Run in `save`, where there is one.
    pub(crate) at_save: Option<AtSave>,
    /// What `save` was told of the rounds before.
    pub(crate) live_rounds: Option<u64>,
    pub(crate) untouched: Vec<u64>,
    pub(crate) untouched_fails: bool,
    /// Writes this page with this value when it is asked for its state.
    pub(crate) save_writes: Option<(u64, u64)>,
    /// What it says of itself.
    pub(crate) description: Vec<u8>,
    /// What the destination answered.
    pub(crate) answer: Option<Vec<u8>>,
    /// A defect: what was reported is tracked again only when the next drain comes.
    pub(crate) rearms_late: Option<DirtyBitmap>,
    fallible: usize,
}

impl TestSource {
    pub(crate) fn new(ram: Ram) -> TestSource {
        let dirty = Arc::new(Mutex::new(DirtyBitmap::new(ram.layout())));
        let writer = Writer { ram, dirty, running: Arc::new(Mutex::new(true)) };
        TestSource {
            writer,
            calls: Arc::new(Mutex::new(Vec::new())),
            fail_at: None,
            panics: false,
            at_drain: Box::new(|_| {}),
            at_peek: None,
            at_live: None,
            at_excluded: None,
            at_save: None,
            live_rounds: None,
            untouched: Vec::new(),
            untouched_fails: false,
            save_writes: None,
            description: Vec::new(),
            answer: None,
            rearms_late: None,
            fallible: 0,
        }
    }

    pub(crate) fn writer_ram(&self) -> Ram {
        self.writer.ram.clone()
    }

    #[cfg(not(shuttle))]
    pub(crate) fn calls(&self) -> Vec<&'static str> {
        lock(&self.calls).clone()
    }

    /// How many calls there were that may fail.
    #[cfg(not(shuttle))]
    pub(crate) fn fallible(&self) -> usize {
        self.fallible
    }

    fn call(&mut self, name: &'static str) -> Result<(), VmError> {
        lock(&self.calls).push(name);
        let index = self.fallible;
        self.fallible += 1;
        assert!(!(self.panics && self.fail_at == Some(index)), "told to panic at {name}");
        if self.fail_at == Some(index) { Err(format!("told to fail at {name}").into()) } else { Ok(()) }
    }
}

impl SourceVm for TestSource {
    fn describe(&mut self) -> Result<Vec<u8>, VmError> {
        self.call("describe")?;
        Ok(self.description.clone())
    }

    fn agreed(&mut self, answer: &[u8]) -> Result<(), VmError> {
        self.call("agreed")?;
        self.answer = Some(answer.to_vec());
        Ok(())
    }

    fn ram(&self) -> &Ram {
        &self.writer.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        self
    }

    fn untouched(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        lock(&self.calls).push("untouched");
        if self.untouched_fails {
            into.set(0);
            return Err("told to fail at untouched".into());
        }
        for &page in &self.untouched {
            into.set(page);
        }
        Ok(())
    }

    fn excluded(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        self.at_excluded.as_mut().map_or(Ok(()), |at_excluded| at_excluded(into))
    }

    fn throttle(&mut self, _percent: u8) -> Throttled {
        Throttled::Unsupported
    }

    fn save_live(&mut self, out: &mut Sections) -> Result<u64, VmError> {
        if self.at_live.is_some() {
            self.call("save_live")?;
        }
        self.at_live.as_mut().map_or(Ok(0), |at_live| at_live(out))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.call("pause")?;
        *lock(&self.writer.running) = false;
        Ok(())
    }

    fn save_writes_memory(&self) -> bool {
        self.save_writes.is_some()
    }

    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        self.call("save")?;
        self.live_rounds = Some(out.live_rounds());
        if let Some((page, value)) = self.save_writes {
            self.writer.ram.page(page).unwrap().write(&value.to_ne_bytes().repeat(512));
            self.writer.report(page);
        }
        out.section("cpu", 0, 1, b"state of cpu 0")?;
        out.section("timer", 7, 3, b"")?;
        self.at_save.as_mut().map_or(Ok(()), |at_save| at_save(out))
    }

    fn resume(&mut self) -> Result<(), VmError> {
        lock(&self.calls).push("resume");
        *lock(&self.writer.running) = true;
        Ok(())
    }
}

impl DirtyLog for TestSource {
    fn name(&self) -> &'static str {
        "test"
    }

    fn start(&mut self, _ram: &Ram) -> io::Result<()> {
        self.call("start log").map_err(io::Error::other)?;
        lock(&self.writer.dirty).clear();
        Ok(())
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        self.call("drain").map_err(io::Error::other)?;
        let writer = self.writer.clone();
        (self.at_drain)(&writer);
        let mut dirty = lock(&self.writer.dirty);
        if let Some(reported) = &mut self.rearms_late {
            dirty.subtract(reported);
            into.merge(&dirty);
            reported.clone_from(&dirty);
            return Ok(());
        }
        into.merge(&dirty);
        dirty.clear();
        Ok(())
    }

    fn peek(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        let Some(at_peek) = &mut self.at_peek else { return Ok(()) };
        lock(&self.calls).push("peek");
        into.merge(&lock(&self.writer.dirty));
        at_peek(&self.writer, into)
    }

    fn stop(&mut self) -> io::Result<()> {
        lock(&self.calls).push("stop log");
        Ok(())
    }
}

pub(crate) struct TestDestination {
    pub(crate) ram: Ram,
    pub(crate) calls: Calls,
    /// What the source is told when the VM was made.
    pub(crate) answer: Vec<u8>,
    /// Its memory was asked for before it was made.
    pub(crate) asked_early: std::sync::atomic::AtomicBool,
    /// What the source said of its VM.
    pub(crate) description: Option<Vec<u8>>,
    /// The call that fails: `prepare`, `load` or `start`.
    pub(crate) fail: Option<&'static str>,
    /// The call that fails, counted from 0 over both.
    pub(crate) fail_at: Option<usize>,
    /// Calls that fail panic instead.
    pub(crate) panics: bool,
    pub(crate) loaded: Vec<(String, u32, u32)>,
    /// Sections of the name `live`, read to their end.
    pub(crate) live: Vec<(SectionId, Vec<u8>)>,
}

impl TestDestination {
    pub(crate) fn new(ram: Ram) -> TestDestination {
        TestDestination {
            ram,
            calls: Arc::new(Mutex::new(Vec::new())),
            answer: Vec::new(),
            asked_early: std::sync::atomic::AtomicBool::new(false),
            description: None,
            fail: None,
            fail_at: None,
            panics: false,
            loaded: Vec::new(),
            live: Vec::new(),
        }
    }

    pub(crate) fn calls(&self) -> Vec<&'static str> {
        lock(&self.calls).clone()
    }

    fn call(&mut self, name: &'static str) -> Result<(), VmError> {
        let index = self.calls().len();
        lock(&self.calls).push(name);
        if self.fail == Some(name) || self.fail_at == Some(index) {
            assert!(!self.panics, "told to panic at {name}");
            Err(format!("told to fail at {name}").into())
        } else {
            Ok(())
        }
    }
}

impl DestinationVm for TestDestination {
    fn page_size(&self) -> usize {
        self.ram.layout().page_size()
    }

    fn prepare(&mut self, description: &[u8]) -> Result<Vec<u8>, VmError> {
        self.call("prepare")?;
        self.description = Some(description.to_vec());
        Ok(self.answer.clone())
    }

    fn ram(&self) -> &Ram {
        if !self.calls().contains(&"prepare") {
            self.asked_early.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        &self.ram
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        self.call("load")?;
        if section.name == "live" {
            let mut state = Vec::new();
            input.read_to_end(&mut state)?;
            self.live.push((section.clone(), state));
            return Ok(());
        }
        let expected: &[u8] = if section.name == "cpu" { b"state of cpu 0" } else { b"" };
        let mut body = vec![0; expected.len()];
        input.read_exact(&mut body)?;
        if body != expected {
            return Err("the body is another".into());
        }
        self.loaded.push((section.name.clone(), section.instance, section.version));
        Ok(())
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.call("start")
    }

    fn abandon(&mut self) {
        lock(&self.calls).push("abandon");
    }
}

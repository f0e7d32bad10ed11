//! [`Guest`]: a small machine that runs, proves its memory, and can be migrated.
//!
//! It is the VMM of the demo and the tests: it implements [`SourceVm`] and [`DestinationVm`] and nothing of the
//! migration itself. Beside the state of its CPUs it sends two sections of its own: its configuration, by which the other
//! side knows what memory has to be, and on request a digest of every page.

use std::{
    io::Read,
    sync::Arc,
    time::{Duration, Instant},
};

use multifd::{
    dirty::{DirtyLog, untouched},
    dirty_bitmap::DirtyBitmap,
    ram::Ram,
    sections::Sections,
    vm::{DestinationVm, SectionId, SourceVm, Throttled, VmError},
};

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
use crate::kvm::{self, KvmCpus};
use crate::{
    body::{Body, BodyError, BodyWriter},
    log::{self, Chosen, DirtyLogChoice},
    memory::{self, Backing, MAX_WORKERS, Memory},
    pace::Rate,
    pattern::{CheckReport, PAGE_SIZE, Pattern, Position, Writes},
    process::{self, ProcessCpus},
    verify::{self, VerifyReport},
    view::{GuestView, View},
    worker::Reins,
};

pub use crate::{
    error::GuestError,
    monitor::{Monitor, Status},
};

/// What guest to make.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Which kind.
    pub kind: Kind,
    /// Bytes of block `ram`, a multiple of 4096. It has to be the same on both sides.
    pub memory: u64,
    /// How many of them the guest rewrites; at least two pages per CPU.
    pub working_set: u64,
    /// Of the rest, the percentage that is filled with random-like bytes; the other pages are never touched.
    pub filled_percent: u8,
    /// How fast it writes. Each side has its own: after the switchover the destination's holds.
    pub write_rate: Rate,
    /// Every byte of a page, or only eight words of it.
    pub whole_pages: bool,
    /// Makes two guests different.
    pub seed: u64,
    /// How many CPUs share the working set. It has to be the same on both sides.
    pub cpus: usize,
    /// What is behind the memory.
    pub backing: Backing,
    /// What tracks the guest's writes.
    pub dirty_log: DirtyLogChoice,
    /// Sends a digest of every page at the switchover, to be compared on the destination.
    pub verify: bool,
    /// Watches an incoming guest for a second, for [`Guest::view`]; meanwhile one that writes fast has a small part of its speed.
    pub watch: bool,
}

impl Default for GuestConfig {
    /// 64 MiB, half of them in the working set, written at 50 MB/s.
    fn default() -> GuestConfig {
        GuestConfig {
            kind: Kind::Auto,
            memory: 64 << 20,
            working_set: 32 << 20,
            filled_percent: 50,
            write_rate: Rate::BytesPerSecond(50_000_000),
            whole_pages: false,
            seed: 1,
            cpus: 1,
            backing: Backing::Anonymous,
            dirty_log: DirtyLogChoice::Auto,
            verify: true,
            watch: true,
        }
    }
}

/// Who writes the memory of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// vCPUs where KVM works, else threads.
    Auto,
    /// vCPUs under KVM.
    Kvm,
    /// Threads of this process.
    Process,
}

/// A guest: memory, CPUs, and the log of what they write.
pub struct Guest {
    // Fields are dropped in this order: first the CPUs stop.
    cpus: Cpus,
    log: Chosen,
    memory: Memory,
    pattern: Pattern,
    verify: bool,
    watch: bool,
    kind_reason: String,
    /// Sections that still have to come before an incoming guest can start.
    missing: Vec<SectionId>,
    verified: Option<VerifyReport>,
    verify_time: Duration,
    /// When it stopped at the source and how long that took digests afterwards, in nanoseconds, where the source has told.
    stopped_there: Option<(u64, u64)>,
}

enum Cpus {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    Kvm(KvmCpus),
    Process(ProcessCpus),
}

/// Name, instance, version and body.
pub(crate) type SavedSection = (&'static str, u32, u32, Vec<u8>);

impl Guest {
    /// Makes a guest with its memory filled, paused before its first instruction: [`run`](Guest::run) starts it.
    ///
    /// # Errors
    /// A configuration that does not make sense; memory or KVM are not to be had.
    pub fn create(config: &GuestConfig) -> Result<Guest, GuestError> {
        let guest = Guest::new(config)?;
        guest.pattern.fill_all(&guest.memory.ram);
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        if let Cpus::Kvm(cpus) = &guest.cpus {
            cpus.boot(&guest.memory.control)?;
        }
        Ok(guest)
    }

    /// Makes a guest that waits for its memory and state. Nothing of its memory is touched.
    ///
    /// Only kind, memory, CPUs, write rate and backing matter; the rest comes from the source.
    ///
    /// # Errors
    /// As [`create`](Guest::create).
    pub fn create_incoming(config: &GuestConfig) -> Result<Guest, GuestError> {
        let mut guest = Guest::new(config)?;
        guest.missing = guest.expected_sections(config.cpus);
        Ok(guest)
    }

    fn new(config: &GuestConfig) -> Result<Guest, GuestError> {
        let pattern = config.pattern()?;
        let memory = memory::allocate(config.memory, config.backing)?;
        let (cpus, log, kind_reason) = Cpus::new(config, pattern, &memory)?;
        cpus.reins().try_for_each(|reins| reins.wait_paused()).map_err(|why| GuestError::CpuEnded { why })?;
        Ok(Guest {
            cpus,
            log,
            memory,
            pattern,
            verify: config.verify,
            watch: config.watch,
            kind_reason,
            missing: Vec::new(),
            verified: None,
            verify_time: Duration::ZERO,
            stopped_there: None,
        })
    }

    fn expected_sections(&self, cpus: usize) -> Vec<SectionId> {
        let id = |name: &str, instance| SectionId::new(name, instance, 1);
        let mut sections = vec![id(CONFIG_SECTION, 0)];
        match &self.cpus {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Cpus::Kvm(_) => {
                sections.extend((0..cpus as u32).map(|index| id(kvm::CPU_SECTION, index)));
                sections.push(id(kvm::CLOCK_SECTION, 0));
            }
            Cpus::Process(_) => sections.extend((0..cpus as u32).map(|index| id(process::SECTION, index))),
        }
        sections
    }

    /// Lets the CPUs run.
    pub fn run(&mut self) {
        self.cpus.reins().for_each(Reins::run);
    }

    /// Stops the CPUs. Memory does not change until [`run`](Guest::run).
    ///
    /// # Errors
    /// A CPU has ended.
    pub fn stop(&mut self) -> Result<(), GuestError> {
        match &self.cpus {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Cpus::Kvm(cpus) => cpus.pause(),
            Cpus::Process(cpus) => cpus.pause(),
        }
        .map_err(|why| GuestError::CpuEnded { why })
    }

    /// Compares every page of RAM with what it has to be at this moment, and the CPUs' registers with each other.
    ///
    /// # Errors
    /// The guest runs: then there is no moment.
    pub fn check_all(&self) -> Result<CheckReport, GuestError> {
        let positions = self.positions()?;
        let untouched = self.untouched_pages();
        Ok(self.pattern.check(&self.memory.ram, &positions, &untouched))
    }

    /// Whether the registers of the paused CPUs are what they have to be: the counter that each keeps in a vector
    /// register is the one it keeps in a general one.
    ///
    /// # Errors
    /// The guest runs.
    pub fn registers_agree(&self) -> Result<bool, GuestError> {
        self.require_pause()?;
        Ok(match &self.cpus {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Cpus::Kvm(cpus) => cpus.registers_agree()?,
            Cpus::Process(cpus) => cpus.registers_agree(),
        })
    }

    /// Where the paused CPUs stand.
    ///
    /// # Errors
    /// The guest runs.
    pub fn positions(&self) -> Result<Vec<Position>, GuestError> {
        self.require_pause()?;
        Ok(match &self.cpus {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Cpus::Kvm(cpus) => cpus.positions()?,
            Cpus::Process(cpus) => cpus.positions(),
        })
    }

    /// Whether all CPUs stand still.
    pub fn is_paused(&self) -> bool {
        self.cpus.reins().all(Reins::is_paused)
    }

    fn require_pause(&self) -> Result<(), GuestError> {
        if self.is_paused() { Ok(()) } else { Err(GuestError::Runs) }
    }

    /// Follows the guest from another thread, also while a migration has it.
    pub fn monitor(&self) -> Monitor {
        Monitor {
            control: self.memory.control.clone(),
            reins: self.cpus.shared_reins(),
            pattern: self.pattern,
            last: None,
        }
    }

    /// What the guest reports.
    pub fn status(&self) -> Status {
        self.monitor().status()
    }

    /// Waits until each CPU has gone `passes` more times over its share; see [`Monitor::wait_passes`].
    pub fn wait_passes(&self, passes: u64, timeout: Duration) -> bool {
        self.monitor().wait_passes(passes, timeout)
    }

    /// `kvm` or `process`.
    pub fn kind(&self) -> Kind {
        match &self.cpus {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Cpus::Kvm(_) => Kind::Kvm,
            Cpus::Process(_) => Kind::Process,
        }
    }

    /// Why it is of this kind, in a sentence.
    pub fn kind_reason(&self) -> &str {
        &self.kind_reason
    }

    /// What tracks the guest's writes; never `Auto`.
    pub fn dirty_log_choice(&self) -> DirtyLogChoice {
        self.log.choice
    }

    /// Why a better log was not chosen, in words.
    pub fn dirty_log_reason(&self) -> Option<&str> {
        self.log.reason.as_deref()
    }

    /// What memory has to be.
    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// The comparison of all pages with the source's digests, once that section came in.
    pub fn verified(&self) -> Option<&VerifyReport> {
        self.verified.as_ref()
    }

    /// How long digests took on this side while the guest stood still.
    pub fn verify_time(&self) -> Duration {
        self.verify_time
    }

    /// What the guest saw of its migration to here. `None` as long as it has not written a page on each CPU, where the source has
    /// not told when it stopped, and where it is not watched ([`GuestConfig::watch`]).
    pub fn view(&self) -> Option<GuestView> {
        let (stopped, digests) = self.stopped_there?;
        let seen = self.cpus.reins().map(|reins| reins.view(View::seen));
        let (first_page, longest_wait) = seen.reduce(|one, other| {
            one.zip(other).map(|((page, wait), (other, more))| (page.max(other), wait.max(more)))
        })??;
        let pause = Duration::from_nanos(first_page.checked_sub(stopped)?.saturating_sub(digests));
        Some(GuestView { pause: pause.saturating_sub(self.verify_time), longest_wait })
    }

    /// How many pages of all blocks were ever touched; those of which the kernel does not know it count as touched.
    pub fn touched_pages(&self) -> u64 {
        self.memory.ram.layout().pages() - self.untouched_pages().count()
    }

    /// Pages of which it is known that they are zero because nobody touched them.
    fn untouched_pages(&self) -> DirtyBitmap {
        let mut untouched = DirtyBitmap::new(self.memory.ram.layout());
        // An old kernel cannot tell. What was found is right; every other page is read, which takes longer.
        let _ = untouched::untouched(&self.memory.ram, &mut untouched);
        untouched
    }

    /// All sections of the paused guest.
    pub(crate) fn save_sections(&mut self) -> Result<Vec<SavedSection>, GuestError> {
        let digests = self.verify.then(|| {
            let begin = Instant::now();
            let untouched = self.untouched_pages();
            let body = verify::to_body(&self.memory.ram, &untouched);
            self.verify_time = begin.elapsed();
            (verify::SECTION, 0, verify::VERSION, body)
        });
        // First, as it says what the others are about.
        let mut sections = vec![(CONFIG_SECTION, 0, CONFIG_VERSION, self.config_body())];
        sections.extend(digests);
        sections.extend(match &self.cpus {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Cpus::Kvm(cpus) => cpus.save()?,
            Cpus::Process(cpus) => cpus.save(),
        });
        Ok(sections)
    }

    pub(crate) fn load_section(&mut self, id: &SectionId, input: &mut dyn Read) -> Result<(), GuestError> {
        match id {
            SectionId { name, instance: 0, version: verify::VERSION, .. } if name == verify::SECTION => {
                let untouched = self.untouched_pages();
                let report = verify::compare(&self.memory.ram, &untouched, input).map_err(in_section(id))?;
                self.verify_time = report.destination_time;
                self.verified = Some(report);
                return Ok(());
            }
            _ => {}
        }
        let Some(expected) = self.missing.iter().position(|missing| missing == id) else {
            return Err(GuestError::UnexpectedSection { id: id.clone(), ours: self.in_words() });
        };
        if id.name == CONFIG_SECTION {
            self.load_config(input).map_err(|error| error.in_section(id))?;
        } else if self.missing.iter().any(|missing| missing.name == CONFIG_SECTION) {
            return Err(GuestError::ConfigNotFirst);
        } else {
            match &mut self.cpus {
                #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
                Cpus::Kvm(cpus) if id.name == kvm::CLOCK_SECTION => cpus.load_clock(input)?,
                #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
                Cpus::Kvm(cpus) => cpus.load_cpu(id.instance, input)?,
                Cpus::Process(cpus) => cpus.load(id.instance, input).map_err(in_section(id))?,
            }
        }
        if self.missing.len() == 1 {
            self.finish_loading()?;
        }
        self.missing.remove(expected);
        Ok(())
    }

    /// With its last section a guest has all of its state.
    fn finish_loading(&mut self) -> Result<(), GuestError> {
        match &mut self.cpus {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Cpus::Kvm(cpus) => Ok(cpus.finish_loading()?),
            Cpus::Process(_) => Ok(()),
        }
    }

    fn in_words(&self) -> String {
        let cpus = self.cpus.reins().count();
        format!("a {} guest with {cpus} CPU{}", self.kind().name(), if cpus == 1 { "" } else { "s" })
    }

    fn config_body(&self) -> Vec<u8> {
        let Pattern { seed, pages, working_set, writes, filled_percent, zero_mask } = self.pattern;
        let stopped = self.cpus.reins().filter_map(|reins| reins.view(View::stopped)).min();
        let digests = u64::try_from(self.verify_time.as_nanos()).unwrap_or(u64::MAX);
        BodyWriter::new(CONFIG_FORMAT)
            .number(STOPPED, stopped.unwrap_or(0))
            .number(DIGESTS, digests)
            .number(KIND, self.kind().number())
            .number(CPUS, self.cpus.reins().count() as u64)
            .number(PAGES, pages)
            .number(WORKING_SET, working_set)
            .number(SEED, seed)
            .number(WRITES, u64::from(writes == Writes::WholePages))
            .number(FILLED, u64::from(filled_percent))
            .number(ZERO_MASK, zero_mask)
            .finish()
    }

    fn load_config(&mut self, input: &mut dyn Read) -> Result<(), GuestError> {
        let mut body = Body::read(input, CONFIG_FORMAT, 4096)?;
        let (kind, cpus) = (body.take_number(KIND)?, body.take_number(CPUS)?);
        let pattern = Pattern {
            pages: body.take_number(PAGES)?,
            working_set: body.take_number(WORKING_SET)?,
            seed: body.take_number(SEED)?,
            writes: if body.take_number(WRITES)? == 0 { Writes::Marks } else { Writes::WholePages },
            filled_percent: u8::try_from(body.take_number(FILLED)?).unwrap_or(u8::MAX).min(100),
            zero_mask: body.take_number(ZERO_MASK)?,
        };
        // A source of another version may not tell.
        let told = body.take_number(STOPPED).ok().zip(body.take_number(DIGESTS).ok());
        self.stopped_there = told.filter(|(stopped, _)| *stopped > 0);
        body.finish()?;
        let ours = self.cpus.reins().count() as u64;
        if kind != self.kind().number() || cpus != ours {
            let kind = Kind::from_number(kind).map_or("unknown", Kind::name);
            let theirs = format!("a {kind} guest with {cpus} CPU{}", if cpus == 1 { "" } else { "s" });
            return Err(GuestError::OtherGuest { theirs, ours: self.in_words() });
        }
        if pattern.pages != self.pattern.pages || !(2 * ours..=pattern.pages).contains(&pattern.working_set) {
            let (theirs, ours) = (pattern.pages, self.pattern.pages);
            return Err(GuestError::OtherMemory { theirs, working_set: pattern.working_set, ours });
        }
        self.pattern = pattern;
        match &mut self.cpus {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Cpus::Kvm(cpus) => cpus.set_pattern(pattern),
            Cpus::Process(cpus) => cpus.set_pattern(pattern),
        }
        Ok(())
    }
}

impl SourceVm for Guest {
    fn ram(&self) -> &Ram {
        &self.memory.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        &mut *self.log.log
    }

    fn untouched(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        into.merge(&self.untouched_pages());
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> Throttled {
        self.cpus.reins().for_each(|reins| reins.throttle(percent));
        Throttled::Applied
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(self.stop()?)
    }

    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        for (name, instance, version, body) in self.save_sections()? {
            out.section(name, instance, version, &body)?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.run();
        Ok(())
    }
}

impl DestinationVm for Guest {
    fn ram(&self) -> &Ram {
        &self.memory.ram
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        Ok(self.load_section(section, input)?)
    }

    fn start(&mut self) -> Result<(), VmError> {
        if let Some(missing) = self.missing.first() {
            return Err(GuestError::MissingSection { id: missing.clone() }.into());
        }
        self.cpus.reins().for_each(if self.watch { Reins::arrive } else { Reins::run });
        Ok(())
    }
}

impl GuestConfig {
    fn pattern(&self) -> Result<Pattern, GuestError> {
        let refuse = |why: String| Err(GuestError::Config { why });
        let page = PAGE_SIZE as u64;
        if self.memory == 0 || !self.memory.is_multiple_of(page) {
            return refuse(format!("{} bytes of memory are not a multiple of {page} above 0", self.memory));
        }
        if !(1..=MAX_WORKERS).contains(&self.cpus) {
            return refuse(format!("{} CPUs; 1 to {MAX_WORKERS} are possible", self.cpus));
        }
        let (pages, working_set) = (self.memory / page, self.working_set.div_ceil(page));
        let least = 2 * self.cpus as u64;
        if !(least..=pages).contains(&working_set) {
            return refuse(format!("a working set of {working_set} pages; {least} to {pages} are possible"));
        }
        if self.filled_percent > 100 {
            return refuse(format!("{} percent of the memory cannot be filled", self.filled_percent));
        }
        Ok(Pattern {
            seed: self.seed,
            pages,
            working_set,
            writes: if self.whole_pages { Writes::WholePages } else { Writes::Marks },
            filled_percent: self.filled_percent,
            zero_mask: ZERO_PAGES,
        })
    }
}

impl Kind {
    /// The word for it in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Auto => "auto",
            Kind::Kvm => "kvm",
            Kind::Process => "process",
        }
    }

    fn number(self) -> u64 {
        match self {
            Kind::Auto => 0,
            Kind::Kvm => 1,
            Kind::Process => 2,
        }
    }

    fn from_number(number: u64) -> Option<Kind> {
        [Kind::Kvm, Kind::Process].into_iter().find(|kind| kind.number() == number)
    }
}

impl Cpus {
    fn new(config: &GuestConfig, pattern: Pattern, memory: &Memory) -> Result<(Cpus, Chosen, String), GuestError> {
        let with_reason = |(cpus, log), reason| (cpus, log, reason);
        match config.kind {
            Kind::Kvm => Ok(with_reason(Cpus::kvm(config, pattern, memory)?, "a KVM guest, as asked for".to_owned())),
            Kind::Process => {
                Ok(with_reason(Cpus::process(config, pattern, memory)?, "a process guest, as asked for".to_owned()))
            }
            Kind::Auto => match Cpus::probe_kvm().and_then(|()| Cpus::kvm(config, pattern, memory)) {
                Ok(kvm) => Ok(with_reason(kvm, "a KVM guest, as KVM works here".to_owned())),
                Err(why) => {
                    let reason = format!("a process guest, as KVM does not work here: {why}");
                    Ok(with_reason(Cpus::process(config, pattern, memory)?, reason))
                }
            },
        }
    }

    fn process(config: &GuestConfig, pattern: Pattern, memory: &Memory) -> Result<(Cpus, Chosen), GuestError> {
        let (log, marks) = log::for_process(config.dirty_log, memory)?;
        let cpus = ProcessCpus::new(memory, pattern, config.cpus, config.write_rate, marks)?;
        Ok((Cpus::Process(cpus), log))
    }

    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn kvm(config: &GuestConfig, pattern: Pattern, memory: &Memory) -> Result<(Cpus, Chosen), GuestError> {
        let (cpus, log) = KvmCpus::new(memory, pattern, config.cpus, config.write_rate, config.dirty_log)?;
        Ok((Cpus::Kvm(cpus), log))
    }

    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    fn kvm(_: &GuestConfig, _: Pattern, _: &Memory) -> Result<(Cpus, Chosen), GuestError> {
        Err(GuestError::NoKvm { why: "the KVM guest exists for Linux on x86-64".to_owned() })
    }

    /// Runs a guest of four pages, since a KVM that can be opened may still not run our program.
    fn probe_kvm() -> Result<(), GuestError> {
        let config = GuestConfig {
            kind: Kind::Kvm,
            memory: 4 * PAGE_SIZE as u64,
            working_set: 4 * PAGE_SIZE as u64,
            write_rate: Rate::Max,
            ..GuestConfig::default()
        };
        let mut guest = Guest::create(&config)?;
        guest.run();
        if !guest.wait_passes(2, PROBE_TIMEOUT) {
            let why = guest.cpus.reins().find_map(Reins::failure);
            return Err(GuestError::NoKvm { why: why.unwrap_or_else(|| "a vCPU makes no progress".to_owned()) });
        }
        guest.stop()?;
        let report = guest.check_all()?;
        if report.pages_different > 0 {
            return Err(GuestError::NoKvm { why: format!("its memory is wrong: {report}") });
        }
        Ok(())
    }

    fn reins(&self) -> Box<dyn Iterator<Item = &Reins> + '_> {
        match self {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Cpus::Kvm(cpus) => Box::new(cpus.reins().map(|reins| &**reins)),
            Cpus::Process(cpus) => Box::new(cpus.reins().map(|reins| &**reins)),
        }
    }

    fn shared_reins(&self) -> Vec<Arc<Reins>> {
        match self {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Cpus::Kvm(cpus) => cpus.reins().cloned().collect(),
            Cpus::Process(cpus) => cpus.reins().cloned().collect(),
        }
    }
}

fn in_section(id: &SectionId) -> impl FnOnce(BodyError) -> GuestError {
    move |source| GuestError::Section { name: id.name.clone(), source }
}

/// Name and version of the section that says what guest this is.
pub(crate) const CONFIG_SECTION: &str = "multifd-guest/config";
const CONFIG_VERSION: u32 = 1;
const CONFIG_FORMAT: u16 = 1;
const KIND: u16 = 1;
const CPUS: u16 = 2;
const PAGES: u16 = 3;
const WORKING_SET: u16 = 4;
const SEED: u16 = 5;
const WRITES: u16 = 6;
const FILLED: u16 = 7;
const ZERO_MASK: u16 = 8;
const STOPPED: u16 = 9;
const DIGESTS: u16 = 10;

/// Each 16th page that is written whole becomes zero, another one in each pass.
const ZERO_PAGES: u64 = 15;
/// A working KVM needs less than a millisecond.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use test_support::{skip, time_limit};

    const LIMIT: Duration = Duration::from_secs(60);
    const PAGE: u64 = PAGE_SIZE as u64;

    fn config(kind: Kind) -> GuestConfig {
        GuestConfig {
            kind,
            memory: 300 * PAGE,
            working_set: 120 * PAGE,
            write_rate: Rate::Max,
            ..GuestConfig::default()
        }
    }

    /// A full ring stops its vCPU: one that writes fast gets nowhere.
    #[test]
    fn no_guest_has_a_dirty_ring_unless_it_was_asked_for() {
        with_each(|config| {
            assert_eq!(config.dirty_log, DirtyLogChoice::Auto);
            let mut guest = Guest::create(&config).unwrap();
            let chosen = guest.dirty_log_choice();
            assert_eq!(chosen.name(), guest.dirty_log().name());
            match config.kind {
                Kind::Kvm => assert_eq!(chosen, DirtyLogChoice::KvmDirtyLog),
                _ => assert!([DirtyLogChoice::UffdWp, DirtyLogChoice::Bitmap].contains(&chosen), "{chosen:?}"),
            }
        });
    }

    /// Runs `test` with each kind of guest that is possible here, in each way of writing, with one CPU and with three.
    fn with_each(test: impl Fn(GuestConfig)) {
        for kind in [Kind::Process, Kind::Kvm] {
            if kind == Kind::Kvm
                && let Err(why) = Cpus::probe_kvm()
            {
                return skip(&format!("the part with KVM: {why}"));
            }
            for (whole_pages, cpus) in [(false, 1), (true, 1), (true, 3)] {
                time_limit(LIMIT, || test(GuestConfig { whole_pages, cpus, ..config(kind) }));
            }
        }
    }

    #[track_caller]
    fn assert_sound(guest: &mut Guest) {
        let report = guest.check_all().unwrap();
        assert_eq!(report.pages_different, 0, "{report}");
        assert!(guest.registers_agree().unwrap(), "{:?} {:?}", guest.kind(), guest.positions());
        let status = guest.status();
        assert_eq!((status.guest_errors(), &status.failure), (0, &None), "{status:?}");
    }

    fn copy_memory(from: &Guest, to: &Guest) {
        let mut bytes = [0; PAGE_SIZE];
        for block in from.memory.ram.layout().blocks() {
            for page in block.page_range() {
                from.memory.ram.page(page).unwrap().read(&mut bytes);
                to.memory.ram.page(page).unwrap().write(&bytes);
            }
        }
    }

    fn load(guest: &mut Guest, sections: &[SavedSection]) -> Result<(), GuestError> {
        for (name, instance, version, body) in sections {
            let mut id = SectionId::new(name, *instance, *version);
            // As a source of ours says it.
            (id.len, id.is_bounded) = (Some(body.len() as u64), true);
            let mut input = &body[..];
            guest.load_section(&id, &mut input)?;
            assert!(input.is_empty(), "{name} was not read to its end");
        }
        Ok(())
    }

    #[test]
    fn a_guest_runs_and_every_page_is_right_at_any_pause() {
        with_each(|config| {
            let mut guest = Guest::create(&config).unwrap();
            assert_sound(&mut guest);
            let mut passes = 0;
            for _ in 0..20 {
                guest.run();
                assert!(guest.wait_passes(1, LIMIT), "{:?}", guest.status());
                guest.stop().unwrap();
                assert_sound(&mut guest);
                assert!(guest.status().passes > passes);
                passes = guest.status().passes;
            }
        });
    }

    /// Without waiting for a pass, so that the pause comes anywhere in the program.
    #[test]
    fn a_guest_is_right_wherever_it_is_stopped() {
        with_each(|config| {
            let mut guest = Guest::create(&config).unwrap();
            let mut positions = std::collections::BTreeSet::new();
            let within_pages = config.whole_pages && guest.kind() == Kind::Kvm;
            // A busy machine may stop a vCPU always at the same place, so there are more attempts than it should take.
            for attempt in 0..2000 {
                if attempt >= 40 && (!within_pages || positions.len() > 1) {
                    break;
                }
                let before = guest.status().pages_written;
                guest.run();
                while guest.status().pages_written == before {
                    std::thread::yield_now();
                }
                // Anywhere within the next pages.
                (0..attempt * 37 % 4096).for_each(|_| std::hint::spin_loop());
                guest.stop().unwrap();
                assert_sound(&mut guest);
                positions.insert(guest.positions().unwrap()[0].words_done);
            }
            if within_pages {
                assert!(positions.len() > 1, "the vCPU was never stopped within a page: {positions:?}");
            }
        });
    }

    #[test]
    fn a_guest_goes_on_elsewhere_where_it_stopped() {
        with_each(|config| {
            let mut source = Guest::create(&config).unwrap();
            source.run();
            assert!(source.wait_passes(3, LIMIT));
            source.stop().unwrap();
            let sections = source.save_sections().unwrap();
            // What the destination was told on its own command line does not matter.
            let mut destination =
                Guest::create_incoming(&GuestConfig { working_set: 7 * PAGE, seed: 99, ..config.clone() }).unwrap();
            copy_memory(&source, &destination);
            let positions = source.positions().unwrap();
            drop(source);
            load(&mut destination, &sections).unwrap();
            assert_eq!(destination.positions().unwrap(), positions);
            assert_eq!(destination.verified().unwrap().pages_different, 0);
            assert_eq!(destination.verified().unwrap().pages_compared, 300 + 512);
            assert_sound(&mut destination);
            destination.start().unwrap();
            assert!(destination.wait_passes(3, LIMIT), "{:?}", destination.status());
            destination.stop().unwrap();
            assert_sound(&mut destination);
            assert!(destination.status().passes >= 6);
        });
    }

    #[test]
    fn a_stale_page_is_found_by_host_digests_and_guest() {
        with_each(|config| {
            let mut source = Guest::create(&config).unwrap();
            source.run();
            assert!(source.wait_passes(2, LIMIT));
            source.stop().unwrap();
            let sections = source.save_sections().unwrap();
            let mut destination = Guest::create_incoming(&config).unwrap();
            copy_memory(&source, &destination);
            // Neither its present nor its next content is zeros.
            let page = 60;
            let mut stale = [0; PAGE_SIZE];
            source.memory.ram.page(page).unwrap().read(&mut stale);
            stale[..8].copy_from_slice(&source.pattern.base(1 << 30, page).to_ne_bytes());
            destination.memory.ram.page(page).unwrap().write(&stale);
            load(&mut destination, &sections).unwrap();
            assert_eq!(destination.verified().unwrap().differences, [("ram".to_owned(), page)]);
            let report = destination.check_all().unwrap();
            assert_eq!((report.pages_different, report.differences[0].page), (1, page));
            destination.start().unwrap();
            assert!(destination.wait_passes(2, LIMIT));
            assert_eq!(destination.status().wrong_words, 1);
        });
    }

    /// A state that lost its vector registers would go unnoticed by a guest that uses none.
    #[test]
    fn a_lost_register_is_found_by_host_and_guest() {
        with_each(|config| {
            let mut source = Guest::create(&GuestConfig { verify: false, ..config.clone() }).unwrap();
            source.run();
            assert!(source.wait_passes(2, LIMIT));
            source.stop().unwrap();
            let mut sections = source.save_sections().unwrap();
            for (name, _, _, body) in &mut sections {
                match *name {
                    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
                    kvm::CPU_SECTION => *body = kvm::without_vectors(body),
                    process::SECTION => *body = process::without_register(body),
                    _ => {}
                }
            }
            let mut destination = Guest::create_incoming(&config).unwrap();
            copy_memory(&source, &destination);
            load(&mut destination, &sections).unwrap();
            assert!(!destination.registers_agree().unwrap());
            destination.start().unwrap();
            assert!(destination.wait_passes(2, LIMIT));
            assert!(destination.status().register_errors > 0, "{:?}", destination.status());
            assert_eq!(destination.status().wrong_words, 0);
        });
    }

    #[test]
    fn a_guest_is_not_faster_than_its_rate() {
        with_each(|config| {
            for (throttle, least) in [(0, Duration::from_millis(180)), (50, Duration::from_millis(360))] {
                // Ten passes per second.
                let rate = Rate::BytesPerSecond(1200 * PAGE);
                let mut guest = Guest::create(&GuestConfig { write_rate: rate, ..config.clone() }).unwrap();
                guest.throttle(throttle);
                let begin = Instant::now();
                guest.run();
                assert!(guest.wait_passes(2, LIMIT));
                assert!(begin.elapsed() >= least, "two passes in {:?}, throttled by {throttle} %", begin.elapsed());
            }
        });
    }

    #[test]
    fn a_stale_page_of_the_control_block_is_found_by_the_guest() {
        with_each(|config| {
            let mut guest = Guest::create(&config).unwrap();
            guest.run();
            assert!(guest.wait_passes(1, LIMIT));
            guest.stop().unwrap();
            let word = guest.memory.control.word(memory::worker_page(0) + memory::field::PAGES_DONE);
            word.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
            guest.run();
            assert!(guest.wait_passes(1, LIMIT));
            let errors = guest.status().report_errors;
            // None if the guest was stopped right before it writes that word.
            assert!(errors <= 1);
            assert!(errors == 1 || guest.kind() == Kind::Kvm);
        });
    }

    #[test]
    fn an_idle_guest_writes_nothing_and_pauses_and_ends() {
        with_each(|config| {
            let mut guest = Guest::create(&GuestConfig { write_rate: Rate::Idle, ..config }).unwrap();
            guest.run();
            assert!(!guest.wait_passes(1, Duration::from_millis(20)));
            guest.stop().unwrap();
            assert_eq!(guest.status().pages_written, 0);
            assert_sound(&mut guest);
        });
    }

    #[test]
    fn a_throttled_guest_goes_on_slower() {
        with_each(|config| {
            let mut guest = Guest::create(&config).unwrap();
            guest.run();
            assert!(guest.wait_passes(1, LIMIT));
            assert_eq!(guest.throttle(90), Throttled::Applied);
            assert!(guest.wait_passes(20, LIMIT), "{:?}", guest.status());
            assert_eq!(guest.throttle(0), Throttled::Applied);
            assert!(guest.wait_passes(1, LIMIT));
            guest.stop().unwrap();
            assert_sound(&mut guest);
        });
    }

    #[test]
    fn a_running_guest_cannot_be_checked() {
        with_each(|config| {
            let mut guest = Guest::create(&config).unwrap();
            guest.run();
            assert!(matches!(guest.check_all(), Err(GuestError::Runs)));
        });
    }

    #[test]
    fn another_guest_is_refused_in_words() {
        with_each(|config| {
            let mut source = Guest::create(&config).unwrap();
            let sections = source.save_sections().unwrap();
            let refused = |config: GuestConfig| {
                let mut destination = Guest::create_incoming(&config).unwrap();
                load(&mut destination, &sections[..1]).unwrap_err().to_string()
            };
            let cpus = refused(GuestConfig { cpus: config.cpus + 1, ..config.clone() });
            assert!(
                cpus.starts_with("the source runs a ") && cpus.contains(&format!("with {} CPU", config.cpus)),
                "{cpus}"
            );
            let memory = refused(GuestConfig { memory: 301 * PAGE, ..config.clone() });
            assert!(memory.contains("has 300 pages with a working set of 120, this one has 301"), "{memory}");
        });
    }

    #[test]
    fn an_incomplete_guest_does_not_start() {
        with_each(|config| {
            let mut source = Guest::create(&GuestConfig { verify: false, ..config.clone() }).unwrap();
            let sections = source.save_sections().unwrap();
            for missing in 0..sections.len() {
                let mut destination = Guest::create_incoming(&config).unwrap();
                let mut sections = sections.clone();
                sections.remove(missing);
                match load(&mut destination, &sections) {
                    Ok(()) => assert!(destination.start().unwrap_err().to_string().contains("never came")),
                    Err(error) => assert!(matches!(error, GuestError::ConfigNotFirst), "{error}"),
                }
            }
            let mut destination = Guest::create_incoming(&config).unwrap();
            load(&mut destination, &sections).unwrap();
            let error = load(&mut destination, &sections[..1]).unwrap_err();
            assert!(matches!(error, GuestError::UnexpectedSection { .. }), "{error}");
        });
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let config = config(Kind::Process);
        let refused = |config: GuestConfig| Guest::create(&config).err().map(|error| error.to_string());
        for (config, words) in [
            (GuestConfig { memory: 5000, ..config.clone() }, "not a multiple"),
            (GuestConfig { memory: 0, ..config.clone() }, "not a multiple"),
            (GuestConfig { working_set: 301 * PAGE, ..config.clone() }, "working set of 301 pages"),
            (GuestConfig { working_set: PAGE, ..config.clone() }, "working set of 1 pages"),
            (GuestConfig { cpus: 0, ..config.clone() }, "0 CPUs"),
            (GuestConfig { cpus: 65, ..config.clone() }, "65 CPUs"),
            (GuestConfig { filled_percent: 101, ..config.clone() }, "101 percent"),
        ] {
            let error = refused(config).expect("has to be refused");
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn auto_says_what_it_chose_and_why() {
        let guest = Guest::create(&config(Kind::Auto)).unwrap();
        match guest.kind() {
            Kind::Kvm => assert!(guest.kind_reason().starts_with("a KVM guest")),
            Kind::Process => assert!(guest.kind_reason().contains("KVM does not work here: ")),
            Kind::Auto => panic!("it has to choose"),
        }
    }
}

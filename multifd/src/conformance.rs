//! The suite for a VMM's own two traits: everything goes wrong once, and each time exactly one side has the guest.
//!
//! [`vm`] migrates between the VMs that the caller makes, over connections within the process, again and again. Each time
//! one thing goes wrong: an operation of a connection, on either side, or a call of either VM. Afterwards the guest has one
//! owner, no memory was lost, and where it is still at the source, the next attempt succeeds.
//!
//! The suites for dirty logs and for transports are [`dirty::conformance`](crate::dirty::conformance) and
//! [`transport::conformance`](crate::transport::conformance).

mod watched;

use std::{io, time::Duration};

use self::watched::{Plan, WatchedDestination, WatchedSource};
use crate::{
    destination::{self, Destination},
    error::Error,
    progress::Phase,
    source::{self, AtLimit, Source},
    testing::{
        faulty::{Fault, Faults},
        memory,
    },
    vm::{DestinationVm, SourceVm},
};

/// How much is tried.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// At how many operations of the connections each kind of fault happens on each side, spread over a migration: a guest
    /// that writes much makes many of them.
    pub operations: u64,
}

impl Effort {
    /// At every operation.
    pub const FULL: Effort = Effort { operations: u64::MAX };
    /// At some of them: for VMs that take a while to make.
    pub const QUICK: Effort = Effort { operations: 6 };
}

/// What was tried, and who had the guest afterwards: the last three add up to the migrations. In some of them the fault that was planned was
/// harmless, or had no occasion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Migrations that one side at least ended with an error.
    pub faults: u64,
    /// The guest ran on at the source.
    pub at_source: u64,
    /// It ran at the destination, and the source knew it or was in doubt.
    pub at_destination: u64,
    /// It was paused at the source, which was in doubt, and did not run at the destination.
    pub in_doubt: u64,
    /// The first source's guest was seen to write its memory by itself. So it is known that the guest ran on the side that had it, each
    /// time; else that is what the methods of the VMs have said.
    pub seen_to_run: bool,
}

/// What does not hold.
#[derive(Debug, thiserror::Error)]
#[error("{context}: {what}")]
#[non_exhaustive]
pub struct Broken {
    /// What went wrong on purpose.
    pub context: String,
    /// What should not have happened.
    pub what: String,
}

/// Migrates from VMs of `make_source` to VMs of `make_destination`, and lets everything go wrong once.
///
/// A source is a VM that runs, a destination one that waits for it. The source is used for as many attempts as it takes to
/// lose it, the destination for one. Make them small: there are hundreds of migrations. Destinations are made and used in
/// a thread of their own.
///
/// The caller's methods are called as in any migration, except where one is made to fail: then it is not called.
/// [`pause`](SourceVm::pause) is called first, so that [`resume`](SourceVm::resume) has something to do.
///
/// Give it a guest that writes other content to its memory again and again: of one that does so within 200 ms it is checked that it goes on
/// where it is to run. The memory is all that is seen from here. What no method and no page shows is not found: state of a device
/// that `save` leaves out or `load` ignores, a page in use that `excluded` names, a guest that runs on after
/// [`abandon`](DestinationVm::abandon).
///
/// # Errors
/// The first thing that does not hold: the guest has two owners or none and no side says so, a guest that writes does not where it was
/// resumed or started, a page differs, a VM cannot be moved after a fault that left it where it was.
pub fn vm<S: SourceVm, D: DestinationVm>(
    make_source: impl FnMut() -> S,
    make_destination: impl FnMut() -> D + Send,
) -> Result<Report, Broken> {
    vm_with(Effort::FULL, make_source, make_destination)
}

/// The same with another effort.
///
/// # Errors
/// As [`vm`].
pub fn vm_with<S: SourceVm, D: DestinationVm>(
    effort: Effort,
    make_source: impl FnMut() -> S,
    make_destination: impl FnMut() -> D + Send,
) -> Result<Report, Broken> {
    let mut suite = Suite { make_source, make_destination, source: None, report: Report::default() };
    let seen = suite.source().writes(SEEN);
    suite.report.seen_to_run =
        seen.map_err(|what| Broken { context: "before the first migration".to_owned(), what })?;
    suite.nothing_goes_wrong()?;
    suite.each_call_fails_once()?;
    suite.each_operation_fails_once(effort)?;
    Ok(suite.report)
}

struct Suite<S, MS, MD> {
    make_source: MS,
    make_destination: MD,
    /// A VM that runs; `None` once it has gone.
    source: Option<WatchedSource<S>>,
    report: Report,
}

/// What is to go wrong.
#[derive(Clone, Default)]
struct Trouble {
    on_source: Faults,
    on_destination: Faults,
    source_call: Option<usize>,
    destination_call: Option<usize>,
}

/// What became of a migration.
struct Outcome {
    sent: Result<(), Error>,
    received: Result<(), Error>,
    /// Calls of the destination that could have failed.
    destination_calls: usize,
    /// Whether it was started.
    runs_there: bool,
    /// Whether it was seen to write memory then, where that is looked at.
    writes_there: bool,
    /// A digest of each page as it was at the destination when all were there.
    memory: Vec<u64>,
}

impl<S: SourceVm, D: DestinationVm, MS: FnMut() -> S, MD: FnMut() -> D + Send> Suite<S, MS, MD> {
    /// The VM that runs.
    fn source(&mut self) -> &mut WatchedSource<S> {
        self.source.get_or_insert_with(|| WatchedSource::new((self.make_source)()))
    }

    fn nothing_goes_wrong(&mut self) -> Result<(), Broken> {
        self.attempt("nothing goes wrong", Trouble::default()).map(drop)
    }

    fn each_call_fails_once(&mut self) -> Result<(), Broken> {
        for call in 0.. {
            let trouble = Trouble { source_call: Some(call), ..Trouble::default() };
            let context = format!("call {call} of the source's VM fails");
            if self.attempt(&context, trouble)?.sent.is_ok() {
                break;
            }
        }
        for call in 0.. {
            let trouble = Trouble { destination_call: Some(call), ..Trouble::default() };
            let context = format!("call {call} of the destination's VM fails");
            if self.attempt(&context, trouble)?.destination_calls <= call {
                break;
            }
        }
        Ok(())
    }

    fn each_operation_fails_once(&mut self, effort: Effort) -> Result<(), Broken> {
        for on_source in [true, false] {
            let counted = Faults::new();
            self.attempt("operations are counted", Trouble::on(on_source, counted.clone()))?;
            let step = counted.operations().div_ceil(effort.operations.max(1)).max(1);
            for fault in [Fault::Fail(io::ErrorKind::TimedOut), Fault::Cut, Fault::Shorten(7)] {
                for operation in (0..).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
                    let faults = Faults::new().at(operation, fault.clone());
                    let side = if on_source { "source" } else { "destination" };
                    let context = format!("operation {operation} on the {side}'s connections: {fault:?}");
                    self.attempt(&context, Trouble::on(on_source, faults.clone()))?;
                    if faults.operations() <= operation {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Migrates once with `trouble`, and checks what has to hold then; and once more without, where the guest has stayed.
    fn attempt(&mut self, context: &str, trouble: Trouble) -> Result<Outcome, Broken> {
        let broken = |what: String| Broken { context: context.to_owned(), what };
        let outcome = self.migrate(trouble.clone());
        let seen_to_run = self.report.seen_to_run;
        let source = self.source.as_mut().expect("made by `migrate`");
        self.report.faults += u64::from(outcome.sent.is_err() || outcome.received.is_err());
        match (source.runs(), outcome.runs_there) {
            (true, true) => return Err(broken(format!("the guest runs on both sides: {:?}", outcome.sent))),
            (true, false) => {
                self.report.at_source += 1;
                if outcome.sent.is_ok() || outcome.received.is_ok() {
                    return Err(broken("a side reports success, and the guest is at the source".to_owned()));
                }
                if seen_to_run {
                    source.has_to_write(IS_TO_WRITE).map_err(broken)?;
                }
            }
            (false, true) => {
                self.report.at_destination += 1;
                if let Err(error) = &outcome.sent
                    && !matches!(error, Error::InDoubt { .. })
                {
                    return Err(broken(format!("the guest is at the destination, and the source reports: {error}")));
                }
                let ours = source.digest();
                if ours.len() != outcome.memory.len() {
                    let what =
                        format!("{} pages at the destination, {} at the source", outcome.memory.len(), ours.len());
                    return Err(broken(what));
                }
                let differing = ours.iter().zip(&outcome.memory).position(|(ours, theirs)| ours != theirs);
                if let Some(page) = differing {
                    return Err(broken(format!("page {page} differs at the destination")));
                }
                if !outcome.writes_there {
                    return Err(broken("the guest was started, and does not run: it writes no memory".to_owned()));
                }
                self.source = None;
            }
            (false, false) => {
                self.report.in_doubt += 1;
                if !matches!(outcome.sent, Err(Error::InDoubt { .. })) {
                    return Err(broken(format!("the guest runs on no side: {:?}", outcome.sent)));
                }
                // The operator's part.
                source.resume().map_err(|error| broken(format!("it cannot be resumed: {error}")))?;
                if seen_to_run {
                    source.has_to_write(IS_TO_WRITE).map_err(broken)?;
                }
            }
        }
        if self.source.is_some() {
            let again = self.migrate(Trouble::default());
            match (again.sent, again.received) {
                (Ok(()), Ok(())) => self.source = None,
                (sent, received) => return Err(broken(format!("the next attempt fails: {sent:?}, {received:?}"))),
            }
        }
        Ok(outcome)
    }

    fn migrate(&mut self, trouble: Trouble) -> Outcome {
        let seen_to_run = self.report.seen_to_run;
        self.source();
        let source = self.source.as_mut().expect("just made");
        source.plan = Plan::failing(trouble.source_call);
        let excluded = source.excluded.clone();
        let make_destination = &mut self.make_destination;
        let (listener, connector) = memory::listener(1 << 16);
        let listener = trouble.on_destination.listener(Box::new(listener));
        let connector = trouble.on_source.connector(Box::new(connector));
        let mut options = source::Options::default();
        options.plan.channels = CHANNELS;
        // How fast the guest writes, and this machine sends, is not what is tested.
        options.parameters.limits.rounds = Some(ROUNDS);
        options.parameters.limits.at_limit = AtLimit::SwitchOver;
        let receiving = destination::Options {
            channels: Some(CHANNELS),
            setup_timeout: Some(Duration::from_secs(3)),
            ..destination::Options::default()
        };
        let destination = Destination::new(receiving);
        let (waiting, progress) = (destination.stop_handle(), destination.progress());
        std::thread::scope(|scope| {
            let receiving = scope.spawn(move || {
                let mut vm = WatchedDestination::new(make_destination(), excluded);
                vm.plan = Plan::failing(trouble.destination_call);
                let received = destination.run(&mut vm, Box::new(listener), &mut ()).map(drop);
                let writes = !vm.runs() || !seen_to_run || vm.writes(IS_TO_WRITE);
                (received, vm.plan.calls(), vm.runs(), writes, vm.into_digest())
            });
            let sent = Source::new(options).run(source, &connector, &mut ()).map(drop);
            drop(connector);
            // A source that has ended before it said that it is one leaves the destination waiting for one.
            while sent.is_err() && !receiving.is_finished() {
                std::thread::sleep(Duration::from_millis(5));
                if matches!(progress.snapshot().phase, None | Some(Phase::Connect)) {
                    waiting.cancel();
                }
            }
            let (received, destination_calls, runs_there, writes_there, memory) = match receiving.join() {
                Ok(received) => received,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            Outcome { sent, received, destination_calls, runs_there, writes_there, memory }
        })
    }
}

impl Trouble {
    fn on(source: bool, faults: Faults) -> Trouble {
        if source {
            Trouble { on_source: faults, ..Trouble::default() }
        } else {
            Trouble { on_destination: faults, ..Trouble::default() }
        }
    }
}

/// After so many the guest is paused, however much it writes.
const ROUNDS: u64 = 5;
/// A guest that has not written memory by then is not expected to.
const SEEN: Duration = Duration::from_millis(200);
/// One that has is to write again within so long, where it runs.
const IS_TO_WRITE: Duration = Duration::from_secs(10);
/// Connections beside main.
const CHANNELS: u8 = 2;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering::SeqCst},
        },
        thread,
    };

    use test_support::time_limit;

    use super::*;
    use crate::{
        ram::{BlockName, Ram},
        sections::Sections,
        sys::guarded,
        testing::vm::{TestDestination, TestSource},
        vm::{SectionId, VmError},
    };

    fn source() -> TestSource {
        let vm = TestSource::new(Ram::for_test(&[("ram", 70)]));
        for page in (0..70).step_by(3) {
            assert!(vm.writer.write(page, 1000 + page));
        }
        vm
    }

    fn destination() -> TestDestination {
        TestDestination::new(Ram::for_test(&[("ram", 70)]))
    }

    #[test]
    fn our_own_vm_passes() {
        // `testing::faults` goes through all operations of the same VM.
        let some = Effort { operations: 10 };
        let report = time_limit(Duration::from_secs(300), || vm_with(some, source, destination)).unwrap();
        assert!(report.faults > 10 && report.at_source > 10 && report.at_destination > 3, "{report:?}");
    }

    /// State that is sent while the guest runs is cut, refused and lost like all else, and an attempt after that begins anew.
    #[test]
    fn our_own_vm_passes_with_state_that_is_sent_early() {
        let sending = || {
            let mut vm = source();
            vm.at_live = Some(Box::new(|out: &mut Sections| {
                let round = out.live_rounds();
                let mut write = |out: &mut dyn io::Write| -> Result<(), VmError> { Ok(out.write_all(&[7; 5000])?) };
                out.section("live", 0, 1, &round.to_be_bytes())?;
                out.section_from("live", 1, 1, &mut write)?;
                Ok(if round < 2 { u64::MAX } else { 0 })
            }));
            vm
        };
        let some = Effort { operations: 10 };
        let report = time_limit(Duration::from_secs(300), || {
            vm_with(some, sending, || Complete { vm: destination(), rounds: 0 }).unwrap()
        });
        assert!(report.faults > 10 && report.at_source > 10 && report.at_destination > 3, "{report:?}");
    }

    /// A VM that starts only with the state of every round.
    /// The suite itself reads all pages at the end, of which some cannot be read.
    #[test]
    fn memory_that_must_not_be_read_is_not_read() {
        let excluding = || {
            let block = guarded::block(BlockName::new("ram").unwrap(), 70 * 4096).unwrap();
            let mut vm = TestSource::new(Ram::new(4096, vec![block]).unwrap());
            assert!((0..60).all(|page| vm.writer.write(page, 1000 + page)));
            (60..70).for_each(|page| guarded::forbid(&vm.ram().page(page).unwrap()));
            vm.at_excluded = Some(Box::new(|into| {
                into.set_range(60..70);
                Ok(())
            }));
            vm
        };
        let few = Effort { operations: 1 };
        let report = time_limit(Duration::from_secs(300), || vm_with(few, excluding, destination)).unwrap();
        assert!(report.at_source > 3 && report.at_destination > 1, "{report:?}");
    }

    struct Complete {
        vm: TestDestination,
        rounds: u64,
    }

    impl DestinationVm for Complete {
        fn ram(&self) -> &Ram {
            self.vm.ram()
        }

        fn load(&mut self, section: &SectionId, input: &mut dyn io::Read) -> Result<(), VmError> {
            self.vm.load(section, input)?;
            match self.vm.live.pop() {
                Some((id, state)) if id.instance == 0 => {
                    assert_eq!(state, self.rounds.to_be_bytes(), "no round is missing, and none is of another attempt");
                    self.rounds += 1;
                }
                Some((_, state)) => assert_eq!(state, [7; 5000]),
                None => {}
            }
            Ok(())
        }

        fn start(&mut self) -> Result<(), VmError> {
            assert!(self.rounds >= 3, "{}", self.rounds);
            self.vm.start()
        }
    }

    /// A VM that says it runs again, and does not.
    struct Lame(TestSource);

    impl SourceVm for Lame {
        fn ram(&self) -> &Ram {
            self.0.ram()
        }

        fn dirty_log(&mut self) -> &mut dyn crate::dirty::DirtyLog {
            self.0.dirty_log()
        }

        fn pause(&mut self) -> Result<(), VmError> {
            self.0.pause()
        }

        fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
            self.0.save(out)
        }

        fn resume(&mut self) -> Result<(), VmError> {
            Err("it does not".into())
        }
    }

    /// A thread that writes a page of `ram` again and again while it may.
    struct VCpu {
        may_run: Arc<AtomicBool>,
        ended: Arc<AtomicBool>,
        thread: Option<thread::JoinHandle<()>>,
    }

    impl VCpu {
        fn new(ram: &Ram) -> VCpu {
            let (ram, may_run, ended) = (ram.clone(), Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
            let (may, ends) = (may_run.clone(), ended.clone());
            let body = move || {
                let mut count = 0u64;
                while !ends.load(SeqCst) {
                    if may.load(SeqCst) {
                        count += 1;
                        ram.page(5).unwrap().write(&count.to_ne_bytes().repeat(512));
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            };
            VCpu { may_run, ended, thread: Some(thread::spawn(body)) }
        }

        fn run(&self, runs: bool) {
            self.may_run.store(runs, SeqCst);
            // What it has begun by then is written.
            thread::sleep(Duration::from_millis(if runs { 0 } else { 20 }));
        }
    }

    impl Drop for VCpu {
        fn drop(&mut self) {
            self.ended.store(true, SeqCst);
            let _ = self.thread.take().unwrap().join();
        }
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Defect {
        None,
        /// `resume` succeeds, and nothing runs.
        Resume,
        /// `start` does.
        Start,
    }

    /// The thread ends before the memory does.
    struct Writing(VCpu, TestSource, Defect);

    impl SourceVm for Writing {
        fn ram(&self) -> &Ram {
            self.1.ram()
        }

        fn dirty_log(&mut self) -> &mut dyn crate::dirty::DirtyLog {
            self.1.dirty_log()
        }

        fn pause(&mut self) -> Result<(), VmError> {
            self.0.run(false);
            self.1.pause()
        }

        fn save_writes_memory(&self) -> bool {
            true
        }

        fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
            // The log of this VM knows the pages that its own writer writes.
            let mut bytes = vec![0; 4096];
            self.1.ram().page(5).unwrap().read(&mut bytes);
            let count = u64::from_ne_bytes(bytes[..8].try_into()?);
            self.1.resume()?;
            assert!(self.1.writer.write(5, count));
            self.1.pause()?;
            self.1.save(out)
        }

        fn resume(&mut self) -> Result<(), VmError> {
            self.1.resume()?;
            self.0.run(self.2 != Defect::Resume);
            Ok(())
        }
    }

    struct Written(VCpu, TestDestination, Defect);

    impl DestinationVm for Written {
        fn ram(&self) -> &Ram {
            self.1.ram()
        }

        fn load(&mut self, section: &SectionId, input: &mut dyn io::Read) -> Result<(), VmError> {
            self.1.load(section, input)
        }

        fn start(&mut self) -> Result<(), VmError> {
            self.1.start()?;
            self.0.run(self.2 != Defect::Start);
            Ok(())
        }
    }

    /// Both passed: what ran was what the methods had said.
    #[test]
    fn a_vm_that_does_not_run_where_it_says_so_is_found() {
        let tried = |defect| {
            let sending = || {
                let vm = source();
                let vcpu = VCpu::new(vm.ram());
                vcpu.run(true);
                Writing(vcpu, vm, defect)
            };
            let receiving = || {
                let vm = destination();
                let vcpu = VCpu::new(vm.ram());
                Written(vcpu, vm, defect)
            };
            time_limit(Duration::from_secs(300), || vm_with(Effort { operations: 2 }, sending, receiving))
        };
        let report = tried(Defect::None).unwrap();
        assert!(report.seen_to_run && report.at_source > 3 && report.at_destination > 1, "{report:?}");
        let what = tried(Defect::Resume).unwrap_err().what;
        assert!(what.contains("at the source, and does not run"), "{what}");
        let what = tried(Defect::Start).unwrap_err().what;
        assert!(what.contains("was started, and does not run"), "{what}");
    }

    #[test]
    fn a_vm_that_cannot_be_resumed_is_found() {
        let broken = time_limit(Duration::from_secs(300), || vm(|| Lame(source()), destination)).unwrap_err();
        assert!(broken.what.contains("the guest runs on no side"), "{broken}");
    }

    /// A VM that loses a page when it loads the state of a device.
    struct Forgetful(TestDestination);

    impl DestinationVm for Forgetful {
        fn ram(&self) -> &Ram {
            self.0.ram()
        }

        fn load(&mut self, section: &SectionId, input: &mut dyn io::Read) -> Result<(), VmError> {
            self.0.ram().page(3).unwrap().clear();
            self.0.load(section, input)
        }

        fn start(&mut self) -> Result<(), VmError> {
            self.0.start()
        }
    }

    #[test]
    fn a_vm_that_loses_a_page_is_found() {
        let broken = time_limit(Duration::from_secs(300), || vm(source, || Forgetful(destination()))).unwrap_err();
        assert!(broken.what.contains("page 3 differs"), "{broken}");
    }
}

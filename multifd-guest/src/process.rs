//! The process guest: the same self-checking writer as the KVM guest, as a thread of this process.
//!
//! For machines without `/dev/kvm`. It pauses between two pages; its state is the number of pages it finished and a
//! register that steps once per page, so a state that does not belong to the memory shows.

use std::{
    io::Read,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
    thread::{self, JoinHandle},
};

use multifd::{dirty::bitmap::AtomicDirtyBitmap, threads};

use crate::{
    body::{Body, BodyError, BodyWriter},
    guest::SavedSection,
    memory::{self, Memory, field},
    pace::{Pacer, Rate},
    pattern::{PAGE_SIZE, Pattern, Position},
    sys::Mapping,
    worker::{Next, Reins},
};

/// Threads that write the guest's memory.
pub(crate) struct ProcessCpus {
    workers: Vec<Worker>,
}

struct Worker {
    reins: Arc<Reins>,
    /// The worker's own copy counts while it runs.
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
}

/// What host and worker hand each other while the worker stands still.
#[derive(Clone, Copy)]
struct Shared {
    cpu: CpuState,
    pattern: Pattern,
}

/// What a worker keeps outside of the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct CpuState {
    pages_done: u64,
    register: u64,
}

impl ProcessCpus {
    /// Starts one paused thread per share of the working set.
    pub(crate) fn new(
        memory: &Memory,
        pattern: Pattern,
        count: usize,
        rate: Rate,
        marks: Option<AtomicDirtyBitmap>,
    ) -> std::io::Result<ProcessCpus> {
        // Ends those that were started, if a later one cannot be.
        let mut cpus = ProcessCpus { workers: Vec::new() };
        for index in 0..count {
            let mailbox = Arc::new(Mapping::anonymous(PAGE_SIZE)?);
            let reins = Arc::new(Reins::new(Pacer::new(rate, count as u64, PAGE_SIZE as u64), mailbox, 0));
            let shared = Arc::new(Mutex::new(Shared { cpu: CpuState::default(), pattern }));
            let writer = Writer {
                reins: reins.clone(),
                shared: shared.clone(),
                state: CpuState::default(),
                ram: memory.ram_map.clone(),
                control: memory.control.clone(),
                report: memory::worker_page(index),
                pattern,
                index: index as u64,
                count: count as u64,
                marks: marks.clone(),
            };
            let thread = threads::spawn(format!("guest cpu {index}"), move || writer.run())?;
            cpus.workers.push(Worker { reins, shared, thread: Some(thread) });
        }
        Ok(cpus)
    }

    pub(crate) fn reins(&self) -> impl Iterator<Item = &Arc<Reins>> {
        self.workers.iter().map(|worker| &worker.reins)
    }

    pub(crate) fn pause(&self) -> Result<(), String> {
        self.reins().for_each(|reins| reins.ask_to_pause());
        self.reins().try_for_each(|reins| reins.wait_paused())
    }

    /// Takes over what the source's workers do. The workers stand still.
    pub(crate) fn set_pattern(&mut self, pattern: Pattern) {
        for worker in &self.workers {
            lock(&worker.shared).pattern = pattern;
        }
    }

    /// Where the paused workers stand.
    pub(crate) fn positions(&self) -> Vec<Position> {
        self.workers
            .iter()
            .map(|worker| Position { pages_done: lock(&worker.shared).cpu.pages_done, words_done: 0 })
            .collect()
    }

    /// Whether each paused worker's register is what it has to be after so many pages.
    pub(crate) fn registers_agree(&self) -> bool {
        self.workers
            .iter()
            .map(|worker| lock(&worker.shared).cpu)
            .all(|state| state.register == register_after(state.pages_done))
    }

    /// The sections of the paused workers.
    pub(crate) fn save(&self) -> Vec<SavedSection> {
        let body = |state: CpuState| {
            BodyWriter::new(FORMAT).number(PAGES_DONE, state.pages_done).number(REGISTER, state.register).finish()
        };
        let states = self.workers.iter().map(|worker| lock(&worker.shared).cpu);
        (0..).zip(states).map(|(index, state)| (SECTION, index, VERSION, body(state))).collect()
    }

    /// Takes the state of worker `index`, which stands still.
    pub(crate) fn load(&self, index: u32, input: &mut dyn Read) -> Result<(), BodyError> {
        let mut body = Body::read(input, FORMAT, 4096)?;
        let state = CpuState { pages_done: body.take_number(PAGES_DONE)?, register: body.take_number(REGISTER)? };
        body.finish()?;
        lock(&self.workers[index as usize].shared).cpu = state;
        Ok(())
    }
}

impl Drop for ProcessCpus {
    fn drop(&mut self) {
        self.reins().for_each(|reins| reins.ask_to_end());
        for thread in self.workers.iter_mut().filter_map(|worker| worker.thread.take()) {
            // It panicked: that was printed, and was reported to whoever waited for it.
            let _ = thread.join();
        }
    }
}

/// The guest itself, on its thread.
struct Writer {
    reins: Arc<Reins>,
    shared: Arc<Mutex<Shared>>,
    state: CpuState,
    ram: Arc<Mapping>,
    control: Arc<Mapping>,
    /// Where its page begins in the control block.
    report: usize,
    pattern: Pattern,
    index: u64,
    count: u64,
    marks: Option<AtomicDirtyBitmap>,
}

impl Writer {
    fn run(mut self) {
        /// Says so when the thread panics, so that nobody waits for it forever.
        struct Ending(Arc<Reins>);
        impl Drop for Ending {
            fn drop(&mut self) {
                self.0.ended(thread::panicking().then(|| "the guest's thread panicked".to_owned()));
            }
        }
        let _ending = Ending(self.reins.clone());
        loop {
            match self.reins.next(self.state.pages_done) {
                Next::Run => {
                    // Relaxed: the budget is only a number; what it is about is exchanged under the lock of the reins.
                    while self.state.pages_done < self.reins.budget().load(Relaxed) {
                        self.write_page();
                    }
                }
                Next::Pause => {
                    lock(&self.shared).cpu = self.state;
                    self.reins.paused();
                    Shared { cpu: self.state, pattern: self.pattern } = *lock(&self.shared);
                }
                Next::End => return,
            }
        }
    }

    fn write_page(&mut self) {
        let share = self.pattern.share(self.index, self.count);
        let pages = share.end - share.start;
        let (pass, cursor) = (self.state.pages_done / pages + 1, self.state.pages_done % pages);
        let page = share.start + cursor;
        let (mut value, step) = self.pattern.marks(page, pass);
        let (mut before, step_before) = self.pattern.marks(page, pass - 1);
        let offset = page as usize * PAGE_SIZE;
        for word in 0..self.pattern.writes.words() {
            let at = offset + (word * self.pattern.writes.stride()) as usize;
            let memory = self.ram.word(at);
            if memory.load(Relaxed) != before {
                self.add(field::WRONG_WORDS);
                self.report(field::WRONG_AT, at as u64);
            }
            memory.store(value, Relaxed);
            value = value.wrapping_add(step);
            before = before.wrapping_add(step_before);
        }
        if self.control.word(self.report + field::PAGES_DONE).load(Relaxed) != self.state.pages_done {
            self.add(field::REPORT_ERRORS);
        }
        self.state.pages_done += 1;
        self.state.register = next_register(self.state.register);
        self.report(field::PAGES_DONE, self.state.pages_done);
        self.report(field::REGISTER, self.state.register);
        if cursor + 1 == pages && self.state.register != register_after(self.state.pages_done) {
            self.add(field::REGISTER_ERRORS);
        }
        // After the writes, and before anybody learns of them: the order that the tracking law asks of a writer.
        if let Some(marks) = &self.marks {
            marks.mark(0, offset as u64, PAGE_SIZE as u64);
            marks.mark(1, self.report as u64, PAGE_SIZE as u64);
        }
    }

    fn report(&self, field: usize, value: u64) {
        // Release pairs with the Acquire of whoever reads the report while this runs.
        self.control.word(self.report + field).store(value, Release);
    }

    fn add(&self, field: usize) {
        self.control.word(self.report + field).fetch_add(1, AcqRel);
    }
}

/// Reads a field of worker `index`'s report.
pub(crate) fn reported(control: &Mapping, index: usize, field: usize) -> u64 {
    control.word(memory::worker_page(index) + field).load(Acquire)
}

fn next_register(register: u64) -> u64 {
    register.wrapping_mul(REGISTER_FACTOR).wrapping_add(1)
}

/// The register after so many steps from 0, by squaring the step.
fn register_after(steps: u64) -> u64 {
    let (mut value, mut factor, mut summand, mut left) = (0u64, REGISTER_FACTOR, 1u64, steps);
    while left > 0 {
        if left & 1 == 1 {
            value = value.wrapping_mul(factor).wrapping_add(summand);
        }
        summand = summand.wrapping_mul(factor).wrapping_add(summand);
        factor = factor.wrapping_mul(factor);
        left >>= 1;
    }
    value
}

fn lock(state: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // Copied in one piece, so a panic leaves no half of it.
    state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Name and version of the section of one worker.
pub(crate) const SECTION: &str = "multifd-guest/process-cpu";
const VERSION: u32 = 1;
const FORMAT: u16 = 1;
const PAGES_DONE: u16 = 1;
const REGISTER: u16 = 2;
const REGISTER_FACTOR: u64 = 6_364_136_223_846_793_005;

/// A saved state with its register lost.
#[cfg(test)]
pub(crate) fn without_register(body: &[u8]) -> Vec<u8> {
    let mut body = Body::read(&mut &*body, FORMAT, 4096).unwrap();
    BodyWriter::new(FORMAT).number(PAGES_DONE, body.take_number(PAGES_DONE).unwrap()).number(REGISTER, 0).finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_register_can_be_computed_ahead() {
        let mut register = 0;
        for steps in 0..1000 {
            assert_eq!(register_after(steps), register);
            register = next_register(register);
        }
    }
}

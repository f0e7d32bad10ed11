//! Visits every state of the model, nearest first, so that what it finds is found by a shortest path.
//!
//! A visited state is remembered by a 128-bit fingerprint. Two states with the same one would be taken for one; with ten
//! million states the chance of any such pair is below 10⁻²⁴.

use std::{
    collections::HashSet,
    hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState},
    time::{Duration, Instant},
};

use crate::protocol::{Config, Event, Harm, Protocol, State};

/// What a search found.
#[derive(Debug)]
pub struct Outcome {
    /// Different states visited.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// Length of the longest of the shortest paths.
    pub depth: usize,
    /// States in which both sides have ended.
    pub ends: usize,
    /// Those of them in which the VM runs on both sides because the confirmation was lost.
    pub unconfirmed: usize,
    /// How long it took.
    pub took: Duration,
    /// The nearest harm, with the way to it; `None` if the search was complete without any.
    pub harm: Option<(Harm, Vec<Event>)>,
}

/// Searches `config` until harm is done or everything was seen.
pub fn explore(config: &Config) -> Outcome {
    let begun = Instant::now();
    let protocol = Protocol::new(config.clone());
    let fingerprint = Fingerprint::new();
    let mut outcome =
        Outcome { states: 1, steps: 0, depth: 0, ends: 0, unconfirmed: 0, took: Duration::ZERO, harm: None };
    let initial = protocol.initial();
    let seen = |state: &State| {
        if protocol.is_symmetric() { fingerprint.of(&protocol.key(state)) } else { fingerprint.of(state) }
    };
    let mut visited = HashSet::with_hasher(BuildHasherDefault::<Low>::default());
    visited.insert(seen(&initial));
    // Of each state the one it was first reached from, and by which of that one's steps.
    let mut reached_from: Vec<(u32, u16)> = vec![(0, 0)];
    let mut level: Vec<(u32, State)> = vec![(0, initial)];
    let mut successors = Vec::new();
    while !level.is_empty() {
        let mut next_level = Vec::new();
        for (index, state) in &level {
            successors.clear();
            protocol.successors(state, &mut successors);
            if let Some(harm) = protocol.harm(state, successors.is_empty()) {
                outcome.harm = Some((harm, path(&protocol, &reached_from, *index)));
                outcome.took = begun.elapsed();
                return outcome;
            }
            if protocol.is_over(state) {
                outcome.ends += 1;
                outcome.unconfirmed += usize::from(protocol.guest_runs_twice(state));
            }
            for (step, (_, next)) in successors.drain(..).enumerate() {
                outcome.steps += 1;
                if visited.insert(seen(&next)) {
                    let new = u32::try_from(reached_from.len()).expect("fewer than 2^32 states");
                    reached_from.push((*index, u16::try_from(step).expect("few steps from a state")));
                    next_level.push((new, next));
                }
            }
        }
        outcome.states = visited.len();
        outcome.depth += usize::from(!next_level.is_empty());
        level = next_level;
    }
    outcome.took = begun.elapsed();
    outcome
}

/// The steps that lead to state number `index`.
fn path(protocol: &Protocol, reached_from: &[(u32, u16)], mut index: u32) -> Vec<Event> {
    let mut steps = Vec::new();
    while index != 0 {
        let (from, step) = reached_from[index as usize];
        steps.push(step);
        index = from;
    }
    let mut state = protocol.initial();
    let mut events = Vec::new();
    for step in steps.into_iter().rev() {
        let mut successors = Vec::new();
        protocol.successors(&state, &mut successors);
        let (event, next) = successors.swap_remove(usize::from(step));
        events.push(event);
        state = next;
    }
    events
}

struct Fingerprint([RandomState; 2]);

impl Fingerprint {
    fn new() -> Fingerprint {
        Fingerprint([RandomState::new(), RandomState::new()])
    }

    fn of(&self, state: &impl Hash) -> u128 {
        let [high, low] = [0, 1].map(|half: usize| u128::from(self.0[half].hash_one(state)));
        high << 64 | low
    }
}

/// Half of a fingerprint: it is a hash already.
#[derive(Default)]
struct Low(u64);

impl Hasher for Low {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("fingerprints are numbers");
    }

    fn write_u128(&mut self, fingerprint: u128) {
        self.0 = fingerprint as u64;
    }
}

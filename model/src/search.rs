//! Visits every state of the model, nearest first, so that what it finds is found by a shortest path.
//!
//! A visited state is remembered by a 128-bit fingerprint. Two states with the same one would be taken for one; with ten
//! million states the chance of any such pair is below 10⁻²⁴.

use std::{
    collections::HashSet,
    hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState},
    time::{Duration, Instant},
};

use crate::protocol::{Config, Protocol};

/// What can be searched: states, and the steps between them.
pub trait Model {
    /// Everything that decides what can happen next.
    type State: Clone + Hash;
    /// A step, for people.
    type Event;
    /// What must not happen.
    type Harm;

    /// Where it begins.
    fn initial(&self) -> Self::State;

    /// Appends every step that can be made from `state`, with the state it leads to.
    fn successors(&self, state: &Self::State, out: &mut Vec<(Self::Event, Self::State)>);

    /// What is wrong with `state`, from which `successors` lead on.
    fn harm(&self, state: &Self::State, successors: &[(Self::Event, Self::State)]) -> Option<Self::Harm>;

    /// Whether both sides have ended in `state`.
    fn is_over(&self, state: &Self::State) -> bool;

    /// Whether the source ends in `state` without knowing which side has the guest.
    fn is_in_doubt(&self, state: &Self::State) -> bool;

    /// Identifies `state`; states with the same future may share a fingerprint.
    fn fingerprint(&self, state: &Self::State, fingerprint: &Fingerprint) -> u128 {
        fingerprint.of(state)
    }
}

/// What a search found.
#[derive(Debug)]
pub struct Outcome<E, H> {
    /// Different states visited.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// Length of the longest of the shortest paths.
    pub depth: usize,
    /// States in which both sides have ended.
    pub ends: usize,
    /// Those of them in which the source is in doubt.
    pub in_doubt: usize,
    /// How long it took.
    pub took: Duration,
    /// The nearest harm, with the way to it; `None` if the search was complete without any.
    pub harm: Option<(H, Vec<E>)>,
}

/// Searches the round protocol of `config` until harm is done or everything was seen.
pub fn explore(config: &Config) -> Outcome<crate::protocol::Event, crate::protocol::Harm> {
    search(&Protocol::new(config.clone()), |_| {})
}

/// Searches `model` until harm is done or everything was seen, and shows each state to `visit` once.
pub fn search<M: Model>(model: &M, mut visit: impl FnMut(&M::State)) -> Outcome<M::Event, M::Harm> {
    let begun = Instant::now();
    let fingerprint = Fingerprint::new();
    let mut outcome = Outcome { states: 1, steps: 0, depth: 0, ends: 0, in_doubt: 0, took: Duration::ZERO, harm: None };
    let initial = model.initial();
    let mut visited = HashSet::with_hasher(BuildHasherDefault::<Low>::default());
    visited.insert(model.fingerprint(&initial, &fingerprint));
    // Of each state the one it was first reached from, and by which of that one's steps.
    let mut reached_from: Vec<(u32, u16)> = vec![(0, 0)];
    let mut level: Vec<(u32, M::State)> = vec![(0, initial)];
    let mut successors = Vec::new();
    while !level.is_empty() {
        let mut next_level = Vec::new();
        for (index, state) in &level {
            visit(state);
            successors.clear();
            model.successors(state, &mut successors);
            if let Some(harm) = model.harm(state, &successors) {
                outcome.harm = Some((harm, path(model, &reached_from, *index)));
                outcome.took = begun.elapsed();
                return outcome;
            }
            if model.is_over(state) {
                outcome.ends += 1;
                outcome.in_doubt += usize::from(model.is_in_doubt(state));
            }
            for (step, (_, next)) in successors.drain(..).enumerate() {
                outcome.steps += 1;
                if visited.insert(model.fingerprint(&next, &fingerprint)) {
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
fn path<M: Model>(model: &M, reached_from: &[(u32, u16)], mut index: u32) -> Vec<M::Event> {
    let mut steps = Vec::new();
    while index != 0 {
        let (from, step) = reached_from[index as usize];
        steps.push(step);
        index = from;
    }
    let mut state = model.initial();
    let mut events = Vec::new();
    for step in steps.into_iter().rev() {
        let mut successors = Vec::new();
        model.successors(&state, &mut successors);
        let (event, next) = successors.swap_remove(usize::from(step));
        events.push(event);
        state = next;
    }
    events
}

/// Hashes states to 128 bits, by keys that differ from one search to the next.
#[derive(Debug)]
pub struct Fingerprint([RandomState; 2]);

impl Fingerprint {
    fn new() -> Fingerprint {
        Fingerprint([RandomState::new(), RandomState::new()])
    }

    /// The hash of `state`.
    pub fn of(&self, state: &impl Hash) -> u128 {
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

//! What decides how many channels there are is the machine of `proof/membership.py`: `Rounds` ends a round when its guards hold, and
//! not before, in made-up migrations whose channels come at any time, in any order.

use std::collections::BTreeSet;

use multifd_model::variants::late_channels;
use multifd_proto::{
    ChannelId,
    membership::Evidence,
    rounds::{Arrival, Party, Rounds, Sync},
};

const PROOF: &str = include_str!("../../proof/membership.py");
const VARIANTS: &str = include_str!("../../proof/membership_variants.py");

const MY_ROUND: &str = "the channel has not ended the round";
const NO_PAGES: &str = "the set-up has no pages";
const ROUND_ENDED: &str = "every channel has written SYNC of the round";
const WRITTEN: &str = "it was written";
const UNKNOWN: &str = "the number of channels is not known";
const JOINED: &str = "it has joined";
const TO_READ: &str = "there is one to read";
const ON_ITS_WAY: &str = "it has not ended the round";
const ALL_ENDED: &str = "all that have joined have ended it";
const HAS_CHANNELS: &str = "a round with pages has channels";
const BALANCED: &str = "the numbers of a round with pages balance";
const GUARDS: [&str; 11] =
    [MY_ROUND, NO_PAGES, ROUND_ENDED, WRITTEN, UNKNOWN, JOINED, TO_READ, ON_ITS_WAY, ALL_ENDED, HAS_CHANNELS, BALANCED];

/// The steps of the machine. Channels are counted in the order in which they join.
#[derive(Clone, Copy, Debug)]
enum Step {
    Pack(usize),
    Sync(usize),
    Open,
    Join,
    Arrive(usize),
    Pass,
}

/// The state of the machine, without what is for its proof alone.
#[derive(Debug)]
struct Machine {
    round: u64,
    next: u64,
    packed: Vec<u64>,
    /// The number of each SYNC, and the packets with pages up to it.
    sent: Vec<Vec<(u64, u64)>>,
    at: u64,
    joined: usize,
    taken: Vec<usize>,
    packets: u64,
    highest: Option<u64>,
    known: bool,
}

fn guard(holds: bool, sentence: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(sentence) }
}

impl Machine {
    fn new(channels: usize) -> Machine {
        Machine {
            round: 0,
            next: 0,
            packed: vec![0; channels],
            sent: vec![Vec::new(); channels],
            at: 0,
            joined: 0,
            taken: vec![0; channels],
            packets: 0,
            highest: None,
            known: false,
        }
    }

    /// Takes a step, or names a guard that does not hold.
    fn take(&mut self, step: Step) -> Result<(), &'static str> {
        let channels = self.sent.len();
        match step {
            Step::Pack(channel) => {
                guard(self.sent[channel].len() as u64 == self.round, MY_ROUND)?;
                guard(self.round >= 1, NO_PAGES)?;
                self.next += 1;
                self.packed[channel] += 1;
            }
            Step::Sync(channel) => {
                guard(self.sent[channel].len() as u64 == self.round, MY_ROUND)?;
                self.sent[channel].push((self.next, self.packed[channel]));
                self.next += 1;
            }
            Step::Open => {
                guard(self.sent.iter().all(|sent| sent.len() as u64 == self.round + 1), ROUND_ENDED)?;
                self.round += 1;
            }
            Step::Join => {
                guard(self.joined < channels && !self.sent[self.joined].is_empty(), WRITTEN)?;
                guard(!self.known, UNKNOWN)?;
                self.joined += 1;
                self.reads(self.joined - 1, self.at == 0);
            }
            Step::Arrive(channel) => {
                guard(channel < self.joined, JOINED)?;
                guard(self.sent[channel].len() > self.taken[channel], TO_READ)?;
                guard(self.taken[channel] as u64 == self.at, ON_ITS_WAY)?;
                self.reads(channel, true);
            }
            Step::Pass => {
                guard(self.taken[..self.joined].iter().all(|&taken| taken as u64 == self.at + 1), ALL_ENDED)?;
                guard(self.at == 0 || self.joined >= 1, HAS_CHANNELS)?;
                guard(self.at == 0 || self.balance() == 0, BALANCED)?;
                self.known = self.at >= 1;
                self.at += 1;
                self.highest = None;
            }
        }
        Ok(())
    }

    fn reads(&mut self, channel: usize, is_of_this_round: bool) {
        let sync = self.next_sync(channel);
        self.packets += sync.packets;
        self.taken[channel] += 1;
        if is_of_this_round {
            self.highest = self.highest.max(Some(sync.number));
        }
    }

    /// The SYNC that is read next from a channel, with the packets since the one before.
    fn next_sync(&self, channel: usize) -> Sync {
        let (sent, taken) = (&self.sent[channel], self.taken[channel]);
        let before = taken.checked_sub(1).map_or(0, |before| sent[before].1);
        Sync { number: sent[taken].0, packets: sent[taken].1 - before }
    }

    fn balance(&self) -> i128 {
        let numbers = self.highest.map_or(0, |highest| i128::from(highest) + 1);
        numbers - i128::from(self.packets) - self.joined as i128 * (i128::from(self.at) + 1)
    }
}

/// A small generator: each run of the test is the same.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// A destination by `Rounds`, beside the machine.
struct Destination {
    rounds: Rounds,
    /// The id of each channel, which says nothing of the order in which they join.
    ids: Vec<ChannelId>,
    main_is_there: bool,
    waited_for_a_stranger: bool,
}

impl Destination {
    /// Takes the step in `Rounds` that the machine is about to take, and returns whether that ends the round.
    fn take(&mut self, machine: &Machine, step: Step) -> bool {
        let arrival = match step {
            Step::Join => {
                let (id, sync) = (self.ids[machine.joined], machine.next_sync(machine.joined));
                self.rounds.admit(id, None).unwrap();
                self.rounds.join(id, None, sync)
            }
            Step::Arrive(channel) => self.rounds.sync(self.ids[channel], machine.next_sync(channel)),
            _ => return false,
        };
        arrival.unwrap() == Arrival::Completes
    }

    /// Compares what both know, after the machine has taken its step; `ended` says whether `Rounds` has ended the round.
    fn compare(&mut self, machine: &mut Machine, ended: bool) {
        let passes = if self.main_is_there { machine.take(Step::Pass) } else { Err("main is on its way") };
        assert_eq!(ended, passes.is_ok(), "{passes:?}: {machine:?}");
        self.main_is_there &= !ended;
        self.waited_for_a_stranger |= passes == Err(BALANCED);
        assert_eq!(self.rounds.round(), machine.at);
        assert_eq!(self.rounds.members.joined(), machine.joined);
        let channels = self.ids.len();
        assert_eq!(self.rounds.members.channels(), machine.known.then_some(channels), "{machine:?}");
        if machine.known {
            assert_eq!(self.rounds.members.evidence(), Some(Evidence::Numbers));
            let another = ChannelId(u8::try_from(channels).unwrap());
            assert!(self.rounds.admit(another, None).is_err(), "no channel joins any more");
        }
    }
}

/// One made-up migration, in which steps are tried at random. Returns whether a round had to wait for a channel that had not joined.
fn migrate(random: &mut Random, channels: usize) -> bool {
    let mut ids: Vec<ChannelId> = (0..channels).map(|id| ChannelId(u8::try_from(id).unwrap())).collect();
    (1..channels).for_each(|last| ids.swap(last, random.below(last + 1)));
    let mut machine = Machine::new(channels);
    let rounds = Rounds::open(None);
    let mut destination = Destination { rounds, ids, main_is_there: false, waited_for_a_stranger: false };
    // A destination that is slow to let channels join is as good a case as a fast one.
    let eager = 1 + random.below(8);
    while machine.at < 4 {
        let channel = random.below(channels);
        let step = match random.below(6) {
            0 => Step::Pack(channel),
            1 => Step::Sync(channel),
            2 if machine.round < 4 => Step::Open,
            3 if random.below(eager) == 0 => Step::Join,
            4 => Step::Arrive(channel),
            5 if !destination.main_is_there && machine.at <= machine.round => {
                destination.main_is_there = true;
                let ended = destination.rounds.arrive(Party::Main).unwrap() == Arrival::Completes;
                destination.compare(&mut machine, ended);
                continue;
            }
            _ => continue,
        };
        let may = match step {
            Step::Join => machine.joined < channels && !machine.sent[machine.joined].is_empty() && !machine.known,
            Step::Arrive(channel) => {
                let taken = machine.taken[channel];
                channel < machine.joined && machine.sent[channel].len() > taken && taken as u64 == machine.at
            }
            _ => false,
        };
        let ended = may && destination.take(&machine, step);
        if machine.take(step).is_ok() {
            destination.compare(&mut machine, ended);
        }
    }
    assert!(machine.known && machine.joined == channels, "{machine:?}");
    destination.waited_for_a_stranger
}

#[test]
fn rounds_end_when_the_guards_of_the_proof_hold_and_not_before() {
    let mut random = Random(13);
    let mut waited = 0;
    for run in 0..1500 {
        waited += usize::from(migrate(&mut random, 1 + run % 5));
    }
    assert!(waited > 100, "only {waited} runs had to wait for a channel");
}

/// The guards in `text`: a guard is a sentence in front of its formula.
fn guards(text: &str) -> BTreeSet<&str> {
    let parts: Vec<&str> = text.split('"').collect();
    let is_guard = |pair: &&[&str]| {
        let formula = pair[1].trim_start().strip_prefix(':').map(str::trim_start);
        formula.is_some_and(|formula| formula.starts_with("lambda"))
    };
    parts.windows(2).filter(is_guard).map(|pair| pair[0]).filter(|sentence| sentence.contains(' ')).collect()
}

#[test]
fn the_guards_are_those_of_the_proof() {
    let steps = &PROOF[PROOF.find("MY_ROUND =").unwrap()..PROOF.find("INVARIANT = {").unwrap()];
    assert_eq!(guards(steps), GUARDS.into_iter().collect());
}

#[test]
fn variants_without_brackets_are_rows_of_the_model_that_do_harm() {
    let harmful: Vec<&str> =
        late_channels().iter().filter(|variant| variant.expected.is_some()).map(|variant| variant.name).collect();
    let names: Vec<&str> = VARIANTS.split("    Variant(").skip(1).map(|text| text.split('"').nth(1).unwrap()).collect();
    let rows: Vec<&str> = names.iter().copied().filter(|name| !name.starts_with('[')).collect();
    assert_eq!(rows.len(), 3);
    assert!(rows.iter().all(|row| harmful.contains(row)), "{rows:?} of {harmful:?}");
    assert!(names.len() >= 15);
}

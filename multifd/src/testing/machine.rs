//! Checks recorded steps against the machine of the proofs: each has to be one that `proof/round_law.py` allows.
//!
//! The guards have the sentences that they have there, and a test compares them. What a trace cannot show (what a copy holds, whether
//! the guest runs) is in [`UNSEEN`]. A barrier passes as soon as it may: nothing in a trace depends on when it does.

use std::collections::{BTreeMap, BTreeSet};

use multifd_proto::rounds::Party;

use super::{
    device_machine,
    trace::{BEHIND_BARRIER, Refused},
};
use crate::round::trace::Step;

/// Checks that each of `steps` is allowed, with this many channels, also by the machine of device state. `Ok` has what was seen.
pub(crate) fn check(steps: &[Step], channels: usize) -> Result<Machine, Refused> {
    let mut machine = Machine::new(channels);
    for (index, step) in steps.iter().enumerate() {
        machine.take(step).map_err(|guard| Refused { prefix: steps[..=index].to_vec(), guard })?;
    }
    device_machine::check(steps, channels)?;
    Ok(machine)
}

/// The state, as far as a trace shows it.
#[derive(Debug)]
pub(crate) struct Machine {
    round: u64,
    todo: BTreeSet<u64>,
    held: BTreeMap<u64, usize>,
    zero: BTreeSet<u64>,
    /// By connection: channels by their ids, then main.
    sent: Vec<u64>,
    taken: Vec<u64>,
    flying: BTreeSet<(usize, u64, u64)>,
    passed: u64,
    ended: bool,
    /// The last step was the start of the guest.
    pub(crate) started: bool,
    /// Copies put into place.
    pub(crate) applied: usize,
}

const WORKS: &str = "the source has neither ended nor given up";
const ROUND_ENDED: &str = "every channel has written SYNC of the round";
const ZEROS_NAMED: &str = "no zero page is left to name";
const MY_ROUND: &str = "the channel has not ended the round";
const FREE: &str = "no channel has taken it";
const HELD: &str = "it has taken it";
const FOUND: &str = "a channel found it";
const MAINS_ROUND: &str = "main has not ended the round";
const HOLDS_NONE: &str = "it holds no page";
const OPEN: &str = "the round is open";
const NAMED_FIRST: &str = "where main names zero pages, it has named those of the round";
const ALL_SENT: &str = "every write was drained and sent";
const FLUSHED: &str = "main has written FLUSH of the last round";
const NEXT: &str = "it is the next on its connection";
const WRITTEN: &str = "it was written";
const IN_PLACE: &str = "all that was written before it is in place";
const END_CAME: &str = "the end of the stream has come";
const READ_ALL: &str = "main has read all that was before it";
const LAST_BARRIER: &str = "main has passed the last barrier";
/// Not one of the machine's: a trace names connections by number.
const KNOWN: &str = "there is such a connection";

/// Guards of the machine that a trace does not show.
#[cfg(not(any(loom, shuttle)))]
const UNSEEN: [&str; 9] = [
    "the guest runs at the source",
    "it runs",
    "the copy is what memory holds, or the log knows better",
    "main names zero pages",
    "the guest stands still",
    "the destination has neither started nor given up",
    "its connection is alive",
    // These two let the machine pass a barrier.
    "every channel has read its SYNC",
    "main has read its FLUSH",
];

fn guard(holds: bool, sentence: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(sentence) }
}

impl Machine {
    fn new(channels: usize) -> Machine {
        Machine {
            round: 0,
            todo: BTreeSet::new(),
            held: BTreeMap::new(),
            zero: BTreeSet::new(),
            sent: vec![0; channels + 1],
            taken: vec![0; channels + 1],
            flying: BTreeSet::new(),
            // There is no page in the set-up, and no barrier behind it.
            passed: 1,
            ended: false,
            started: false,
            applied: 0,
        }
    }

    fn main(&self) -> usize {
        self.sent.len() - 1
    }

    fn connection(&self, party: Party) -> Result<usize, &'static str> {
        match party {
            Party::Main => Ok(self.main()),
            Party::Channel(id) if id.index() < self.main() => Ok(id.index()),
            Party::Channel(_) => Err(KNOWN),
        }
    }

    fn channels_sent(&self, least: u64) -> bool {
        self.sent[..self.main()].iter().all(|&sent| sent >= least)
    }

    fn take(&mut self, step: &Step) -> Result<(), &'static str> {
        if let Step::Drain(_)
        | Step::Section
        | Step::Take(..)
        | Step::Send(..)
        | Step::Find(..)
        | Step::Name(_)
        | Step::Sync(_)
        | Step::Flush
        | Step::End = step
        {
            guard(!self.ended, WORKS)?;
        }
        match step {
            Step::Drain(pages) => {
                self.open()?;
                self.todo.extend(pages);
            }
            Step::Section => self.open()?,
            Step::Take(channel, pages) => {
                let channel = self.connection(*channel)?;
                guard(channel != self.main() && self.sent[channel] == self.round, MY_ROUND)?;
                for page in pages {
                    guard(self.todo.remove(page), FREE)?;
                    self.held.insert(*page, channel);
                }
            }
            Step::Send(channel, pages) => {
                let channel = self.connection(*channel)?;
                for page in pages {
                    guard(self.held.remove(page) == Some(channel), HELD)?;
                    self.flying.insert((channel, *page, self.sent[channel]));
                }
            }
            Step::Find(channel, pages) => {
                let channel = self.connection(*channel)?;
                for page in pages {
                    guard(self.held.remove(page) == Some(channel), HELD)?;
                    self.zero.insert(*page);
                }
            }
            Step::Name(pages) => {
                for page in pages {
                    guard(self.zero.remove(page), FOUND)?;
                    guard(self.sent[self.main()] == self.round, MAINS_ROUND)?;
                    self.flying.insert((self.main(), *page, self.round));
                }
            }
            Step::Sync(channel) => {
                let channel = self.connection(*channel)?;
                guard(channel != self.main() && self.sent[channel] == self.round, MY_ROUND)?;
                guard(!self.held.values().any(|&holder| holder == channel), HOLDS_NONE)?;
                self.sent[channel] += 1;
            }
            Step::Flush => {
                let main = self.main();
                guard(self.sent[main] <= self.round, OPEN)?;
                guard(self.zero.is_empty() || self.sent[main] < self.round, NAMED_FIRST)?;
                self.sent[main] += 1;
            }
            Step::End => {
                guard(self.channels_sent(self.round + 1), ROUND_ENDED)?;
                guard(self.zero.is_empty(), ZEROS_NAMED)?;
                guard(self.todo.is_empty() && self.held.is_empty(), ALL_SENT)?;
                guard(self.sent[self.main()] == self.round + 1, FLUSHED)?;
                self.ended = true;
            }
            Step::Apply(connection, pages) => {
                let connection = self.connection(*connection)?;
                self.behind_barrier(connection)?;
                for page in pages {
                    guard(self.flying.remove(&(connection, *page, self.taken[connection])), NEXT)?;
                    self.applied += 1;
                }
            }
            Step::Arrive(connection) => {
                let connection = self.connection(*connection)?;
                self.behind_barrier(connection)?;
                let taken = self.taken[connection];
                guard(self.sent[connection] > taken, WRITTEN)?;
                guard(!self.flying.iter().any(|&(on, _, round)| on == connection && round == taken), IN_PLACE)?;
                self.taken[connection] += 1;
                if self.taken.iter().all(|&taken| taken > self.passed) {
                    self.passed += 1;
                }
            }
            // None of the machine's steps, as it moves no page. It may come only when no copy is under way any more.
            Step::State(connection) => {
                let connection = self.connection(*connection)?;
                self.behind_barrier(connection)?;
                guard(self.taken[connection] == self.round + 1 && self.flying.is_empty(), IN_PLACE)?;
                guard(self.passed >= self.taken[self.main()], LAST_BARRIER)?;
            }
            // Those have a machine of their own.
            Step::Device(_) | Step::HandOver(_) => {}
            Step::Start => {
                guard(self.ended, END_CAME)?;
                guard(self.taken[self.main()] == self.sent[self.main()], READ_ALL)?;
                guard(self.passed >= self.taken[self.main()], LAST_BARRIER)?;
                self.started = true;
            }
        }
        Ok(())
    }

    fn open(&mut self) -> Result<(), &'static str> {
        guard(self.channels_sent(self.round + 1), ROUND_ENDED)?;
        guard(self.zero.is_empty(), ZEROS_NAMED)?;
        self.round += 1;
        Ok(())
    }

    fn behind_barrier(&self, connection: usize) -> Result<(), &'static str> {
        guard(self.passed >= self.taken[connection], BEHIND_BARRIER)
    }
}

/// The guards in `steps`, a part of a proof: a guard is a sentence in front of its formula.
#[cfg(not(any(loom, shuttle)))]
pub(super) fn guards(steps: &str) -> BTreeSet<&str> {
    let parts: Vec<&str> = steps.split('"').collect();
    let is_guard = |pair: &&[&str]| {
        let formula = pair[1].trim_start().strip_prefix(':').map(str::trim_start);
        formula.is_some_and(|formula| formula.starts_with("lambda"))
    };
    parts.windows(2).filter(is_guard).map(|pair| pair[0]).filter(|sentence| sentence.contains(' ')).collect()
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::ChannelId;

    use super::*;

    /// Read when the test runs: the package alone has no proof.
    const PROOF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../proof/round_law.py");

    fn channel(id: u8) -> Party {
        Party::Channel(ChannelId(id))
    }

    /// Two channels, one round of two pages.
    fn migration() -> Vec<Step> {
        use Step::*;
        let [a, b] = [0, 1].map(channel);
        vec![
            Sync(a),
            Sync(b),
            Flush,
            Drain(vec![1, 2]),
            Take(a, vec![1]),
            Send(a, vec![1]),
            Arrive(b),
            Arrive(Party::Main),
            Take(b, vec![2]),
            Find(b, vec![2]),
            Arrive(a),
            Apply(a, vec![1]),
            Sync(b),
            Sync(a),
            Name(vec![2]),
            Flush,
            End,
            Apply(Party::Main, vec![2]),
            Arrive(a),
            Arrive(Party::Main),
            Arrive(b),
            Start,
        ]
    }

    #[test]
    fn a_whole_migration_is_allowed() {
        let machine = check(&migration(), 2).unwrap();
        assert!(machine.started && machine.applied == 2 && machine.passed == 2 && machine.round == 1);
    }

    /// By each step of the migration, what is refused when it is left out.
    #[test]
    fn a_step_too_few_is_refused_by_the_guard_that_needs_it() {
        let steps = migration();
        let refused: Vec<Option<&str>> = (0..steps.len())
            .map(|left_out| {
                let mut rest = steps.clone();
                rest.remove(left_out);
                check(&rest, 2).err().map(|refused| refused.guard)
            })
            .collect();
        let expected = [
            Some(ROUND_ENDED),
            Some(ROUND_ENDED),
            Some(WRITTEN),
            Some(MY_ROUND),
            Some(HELD),
            Some(NEXT),
            Some(LAST_BARRIER),
            Some(NEXT),
            Some(HELD),
            Some(HOLDS_NONE),
            Some(NEXT),
            Some(IN_PLACE),
            Some(ROUND_ENDED),
            Some(ROUND_ENDED),
            Some(NAMED_FIRST),
            Some(FLUSHED),
            Some(END_CAME),
            Some(IN_PLACE),
            Some(LAST_BARRIER),
            Some(READ_ALL),
            Some(LAST_BARRIER),
            None,
        ];
        assert_eq!(refused, expected);
    }

    #[test]
    fn a_step_too_soon_is_refused_with_what_led_to_it() {
        let mut steps = migration();
        let apply = steps.iter().position(|step| matches!(step, Step::Apply(..))).unwrap();
        steps.swap(apply - 1, apply);
        let refused = check(&steps, 2).unwrap_err();
        assert_eq!((refused.guard, refused.prefix.len()), (NEXT, apply));
        let text = refused.to_string();
        assert!(text.starts_with("step 11 is not allowed (it is the next on its connection):\n    Sync("), "{text}");
        assert!(text.ends_with(&format!("{:?}", migration()[apply])), "{text}");
    }

    #[test]
    fn a_page_sent_twice_or_by_another_or_behind_the_end_is_refused() {
        use Step::*;
        let [a, b, c] = [0, 1, 2].map(channel);
        let opened = [Sync(a), Sync(b), Drain(vec![1])];
        for (more, guard) in [
            (vec![Take(a, vec![1]), Take(b, vec![1])], FREE),
            (vec![Take(a, vec![1]), Send(b, vec![1])], HELD),
            (vec![Take(a, vec![1]), Sync(a)], HOLDS_NONE),
            (vec![Sync(a), Take(a, vec![1])], MY_ROUND),
            (vec![Sync(a), Sync(a)], MY_ROUND),
            (vec![Take(c, vec![1])], KNOWN),
            (vec![Section], ROUND_ENDED),
            (vec![Take(a, vec![1]), Find(a, vec![1]), Flush, Name(vec![1])], ""),
            (vec![Take(a, vec![1]), Find(a, vec![1]), Flush, Flush], NAMED_FIRST),
            (vec![Flush, Flush, Flush], OPEN),
            (vec![Name(vec![1])], FOUND),
            (vec![Flush, Flush, Take(a, vec![1]), Find(a, vec![1]), Name(vec![1])], MAINS_ROUND),
            (vec![Take(a, vec![1]), Find(a, vec![1]), Sync(a), Sync(b), Section], ZEROS_NAMED),
            (vec![Flush, Flush, Sync(a), Sync(b), End], ALL_SENT),
        ] {
            let steps = [&opened[..], &more].concat();
            let refused = check(&steps, 2).err().map_or("", |refused| refused.guard);
            assert_eq!(refused, guard, "{more:?}");
        }
        let mut ended = migration();
        ended.push(Flush);
        assert_eq!(check(&ended, 2).unwrap_err().guard, WORKS);
    }

    /// Each guard of the machine that is proved is checked here, or is known not to be.
    #[test]
    fn the_guards_are_those_of_the_proof() {
        let proof = std::fs::read_to_string(PROOF).unwrap();
        let steps = &proof[proof.find("SOURCE_WORKS =").unwrap()..proof.find("INVARIANT = {").unwrap()];
        let checked = [
            WORKS,
            ROUND_ENDED,
            ZEROS_NAMED,
            MY_ROUND,
            FREE,
            HELD,
            FOUND,
            MAINS_ROUND,
            HOLDS_NONE,
            OPEN,
            NAMED_FIRST,
            ALL_SENT,
            FLUSHED,
            BEHIND_BARRIER,
            NEXT,
            WRITTEN,
            IN_PLACE,
            END_CAME,
            READ_ALL,
            LAST_BARRIER,
        ];
        assert_eq!(guards(steps), checked.into_iter().chain(UNSEEN).collect());
    }
}

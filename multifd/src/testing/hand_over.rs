//! Checks the recorded steps of a postcopy against the machine of the proofs: each has to be one that `proof/hand_over_law.py` allows.
//!
//! The guards have the sentences that they have there, and a test compares them. What the engine does not see is in [`UNSEEN`]: the
//! guest runs in a VMM. Where the two sides see something at different times, the machine takes it so:
//!
//! - The connections are lost when the destination has given them up, with all that is under way on them. What a source still sends is
//!   lost then, as if it had been sent before.
//! - They are in use again when the destination takes new ones. The source's bits are the destination's pages from the moment at which it
//!   knows them, and it sends nothing before.

use std::collections::BTreeSet;

use super::trace::Refused;
use crate::{
    postcopy::trace::{HandOver, Via},
    round::trace::Step,
};

/// Checks that each of `steps` is allowed, of a VM with these pages. `Ok` has what was seen.
pub(crate) fn check(steps: &[Step], pages: &BTreeSet<u64>) -> Result<Machine, Refused> {
    let mut machine = Machine { pages: pages.clone(), ..Machine::default() };
    for (index, step) in steps.iter().enumerate() {
        machine.take(step).map_err(|guard| Refused { prefix: steps[..=index].to_vec(), guard })?;
    }
    Ok(machine)
}

/// The state, as far as a trace shows it.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    /// All that there are.
    pages: BTreeSet<u64>,
    is_final: BTreeSet<u64>,
    claimed: BTreeSet<u64>,
    given: bool,
    /// Copies of the last round that are under way.
    old: BTreeSet<u64>,
    flying: BTreeSet<(Via, u64)>,
    settled: bool,
    discarded: BTreeSet<u64>,
    placed: BTreeSet<u64>,
    pub(crate) runs: bool,
    broken: bool,
    pub(crate) done: bool,
    /// How often the source went on.
    pub(crate) recoveries: usize,
    /// Pages that were placed, by what they came on.
    pub(crate) on_main: usize,
    pub(crate) on_preempt: usize,
}

const WORKS: &str = "the migration has not ended";
const CONNECTED: &str = "the connections are in use";
const DISCARDED: &str = "all that is not final was discarded";
const UNDER_WAY: &str = "it is under way";
const ALL_IN_PLACE: &str = "all of its copies are in place";
const NOT_YET: &str = "not yet";
const LAST_BARRIER: &str = "the last barrier has passed";
const NOT_FINAL: &str = "it is not final";
const HAS_COME: &str = "it has come";
const BIT: &str = "the bit was not set";
const LOST: &str = "the connections were lost";
const GIVEN: &str = "the guest was given away";
const RUNS_THERE: &str = "the guest runs at the destination";
const ALL_THERE: &str = "every page is there";
/// Not a guard: a theorem.
const ONCE: &str = "a page is placed only where none is, and never over a write of the guest";
/// Not a guard: what a recovery does.
const HAS: &str = "goes on with what the destination says it has";

/// Guards of the machine that a trace does not show.
#[cfg(not(any(loom, shuttle)))]
const UNSEEN: [&str; 7] = [
    "the guest does not run there",
    "RUN is not written",
    "the connection is in use",
    "it runs",
    "the page is there",
    "the page is not there",
    "its connection is a new one",
];

fn guard(holds: bool, sentence: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(sentence) }
}

impl Machine {
    fn take(&mut self, step: &Step) -> Result<(), &'static str> {
        match step {
            Step::Apply(_, pages) => pages.iter().try_for_each(|&page| self.round(page)),
            Step::HandOver(step) => self.step(step),
            _ => Ok(()),
        }
    }

    fn round(&mut self, page: u64) -> Result<(), &'static str> {
        guard(!self.settled, UNDER_WAY)?;
        self.old.remove(&page);
        self.placed.insert(page);
        Ok(())
    }

    fn step(&mut self, step: &HandOver) -> Result<(), &'static str> {
        match step {
            HandOver::Final(pages) => {
                self.old.extend(pages);
                self.claimed.extend(pages);
                self.is_final.extend(pages);
            }
            HandOver::Barrier => {
                guard(self.old.is_empty(), ALL_IN_PLACE)?;
                guard(!self.settled, NOT_YET)?;
                self.settled = true;
            }
            HandOver::Discard(pages) => {
                guard(self.settled, LAST_BARRIER)?;
                for page in pages {
                    guard(!self.is_final.contains(page), NOT_FINAL)?;
                    guard(self.discarded.insert(*page), NOT_YET)?;
                    self.placed.remove(page);
                }
            }
            HandOver::Give => {
                guard(!self.broken, CONNECTED)?;
                self.all_discarded()?;
                guard(self.settled, LAST_BARRIER)?;
                guard(!std::mem::replace(&mut self.given, true), NOT_YET)?;
            }
            HandOver::Run => {
                guard(self.given && !self.broken && !self.runs, HAS_COME)?;
                self.runs = true;
            }
            HandOver::Send(via, pages) => self.send(*via, pages)?,
            HandOver::Place(via, page) => self.place(*via, *page)?,
            HandOver::Break => {
                guard(!self.done, WORKS)?;
                self.broken = true;
                self.flying.clear();
            }
            HandOver::Recover => {
                guard(!self.done, WORKS)?;
                guard(self.broken, LOST)?;
                guard(self.given && self.runs, GIVEN)?;
                self.broken = false;
                self.recoveries += 1;
            }
            HandOver::Bits(bits) => {
                self.claimed = bits.iter().copied().collect();
                guard(self.claimed == self.placed, HAS)?;
            }
            HandOver::End => {
                guard(!self.done, WORKS)?;
                guard(!self.broken, CONNECTED)?;
                guard(self.runs, RUNS_THERE)?;
                guard(self.placed == self.pages, ALL_THERE)?;
                self.done = true;
            }
        }
        Ok(())
    }

    fn send(&mut self, via: Via, pages: &[u64]) -> Result<(), &'static str> {
        guard(!self.done || pages.is_empty(), WORKS)?;
        self.all_discarded()?;
        for &page in pages {
            guard(self.claimed.insert(page), BIT)?;
            if !self.broken {
                self.flying.insert((via, page));
            }
        }
        Ok(())
    }

    fn place(&mut self, via: Via, page: u64) -> Result<(), &'static str> {
        guard(!self.placed.contains(&page), ONCE)?;
        guard(self.flying.remove(&(via, page)), UNDER_WAY)?;
        self.placed.insert(page);
        match via {
            Via::Main => self.on_main += 1,
            Via::Preempt => self.on_preempt += 1,
        }
        Ok(())
    }

    fn all_discarded(&self) -> Result<(), &'static str> {
        let is_known = |page: &u64| self.is_final.contains(page) || self.discarded.contains(page);
        guard(self.pages.iter().all(is_known), DISCARDED)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::rounds::Party;

    use super::{HandOver::*, *};

    /// Read when the test runs: the package alone has no proof.
    const PROOF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../proof/hand_over_law.py");

    fn pages() -> BTreeSet<u64> {
        (0..4).collect()
    }

    fn checked(steps: Vec<HandOver>) -> Result<Machine, Refused> {
        check(&in_place(steps), &pages())
    }

    /// Page 0 is final, and in place before the last barrier.
    fn in_place(steps: Vec<HandOver>) -> Vec<Step> {
        let apply = |step| match step {
            Barrier => vec![Step::Apply(Party::Main, vec![0]), Step::HandOver(Barrier)],
            step => vec![Step::HandOver(step)],
        };
        steps.into_iter().flat_map(apply).collect()
    }

    /// Three pages are sent again, of which one is lost with the connections and sent once more.
    fn switch() -> Vec<HandOver> {
        vec![
            Final(vec![0]),
            Barrier,
            Discard(vec![1]),
            Discard(vec![2, 3]),
            Give,
            Run,
            Send(Via::Main, vec![1, 2]),
            Place(Via::Main, 1),
            Send(Via::Preempt, vec![3]),
            Place(Via::Preempt, 3),
            Break,
            Recover,
            Bits(vec![0, 1, 3]),
            Send(Via::Preempt, vec![2]),
            Place(Via::Preempt, 2),
            End,
        ]
    }

    #[test]
    fn a_whole_switch_is_allowed() {
        let machine = checked(switch()).unwrap();
        assert!(machine.done && machine.runs);
        assert_eq!((machine.recoveries, machine.on_main, machine.on_preempt), (1, 1, 2));
    }

    /// By each step of the switch, what is refused when it is left out.
    #[test]
    fn a_step_too_few_is_refused_by_the_guard_that_needs_it() {
        let steps = switch();
        let refused: Vec<Option<&str>> = (0..steps.len())
            .map(|left_out| {
                let mut rest = steps.clone();
                rest.remove(left_out);
                checked(rest).err().map(|refused| refused.guard)
            })
            .collect();
        let expected = [
            Some(DISCARDED),
            Some(LAST_BARRIER),
            Some(DISCARDED),
            Some(DISCARDED),
            Some(HAS_COME),
            Some(GIVEN),
            Some(UNDER_WAY),
            Some(HAS),
            Some(UNDER_WAY),
            Some(HAS),
            Some(LOST),
            Some(UNDER_WAY),
            Some(BIT),
            Some(UNDER_WAY),
            Some(ALL_THERE),
            None,
        ];
        assert_eq!(refused, expected);
    }

    #[test]
    fn a_page_that_comes_twice_or_too_late_is_refused() {
        let until = |step: HandOver| {
            let steps = switch();
            let end = steps.iter().position(|other| *other == step).unwrap();
            steps[..=end].to_vec()
        };
        for (before, more, guard) in [
            (until(Place(Via::Main, 1)), vec![Send(Via::Preempt, vec![1])], BIT),
            (until(Place(Via::Main, 1)), vec![Place(Via::Main, 1)], ONCE),
            (until(Place(Via::Main, 1)), vec![Place(Via::Preempt, 2)], UNDER_WAY),
            (until(Run), vec![Run], HAS_COME),
            (until(Run), vec![Place(Via::Main, 0)], ONCE),
            (until(Give), vec![Give], NOT_YET),
            (until(Give), vec![Discard(vec![0])], NOT_FINAL),
            (until(Give), vec![Discard(vec![1])], NOT_YET),
            // What an old connection brings after the destination has said what it has.
            (until(Break), vec![Place(Via::Main, 2)], UNDER_WAY),
            (until(Recover), vec![Place(Via::Main, 2)], UNDER_WAY),
            (until(Break), vec![End], CONNECTED),
            (until(Recover), vec![Bits(vec![0, 1, 2, 3])], HAS),
            (until(Recover), vec![Recover], LOST),
            (until(Final(vec![0])), vec![Send(Via::Main, vec![1])], DISCARDED),
            (switch(), vec![End], WORKS),
            (switch(), vec![Break], WORKS),
        ] {
            let refused = checked([before, more.clone()].concat()).unwrap_err();
            assert_eq!(refused.guard, guard, "{more:?}");
        }
        let mut steps = in_place(switch());
        steps.push(Step::HandOver(Barrier));
        assert_eq!(check(&steps, &pages()).unwrap_err().guard, NOT_YET);
        // A copy of the last round that comes behind its barrier.
        let mut steps = in_place(switch());
        steps.push(Step::Apply(Party::Main, vec![2]));
        assert_eq!(check(&steps, &pages()).unwrap_err().guard, UNDER_WAY);
        let steps: Vec<Step> = switch().into_iter().map(Step::HandOver).collect();
        assert_eq!(check(&steps, &pages()).unwrap_err().guard, ALL_IN_PLACE);
    }

    /// Each guard of the machine that is proved is checked here, or is known not to be.
    #[test]
    fn the_guards_are_those_of_the_proof() {
        let proof = std::fs::read_to_string(PROOF).unwrap();
        let steps = &proof[proof.find("WORKS =").unwrap()..proof.find("INVARIANT = {").unwrap()];
        let checked = [
            WORKS,
            CONNECTED,
            DISCARDED,
            UNDER_WAY,
            ALL_IN_PLACE,
            NOT_YET,
            LAST_BARRIER,
            NOT_FINAL,
            HAS_COME,
            BIT,
            LOST,
            GIVEN,
            RUNS_THERE,
            ALL_THERE,
        ];
        assert_eq!(super::super::machine::guards(steps), checked.into_iter().chain(UNSEEN).collect());
        assert!(proof.contains(ONCE) && steps.contains(HAS));
    }
}

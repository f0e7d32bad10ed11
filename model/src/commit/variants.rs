//! What is asked of the commit: as it is, in one step and in two, and with single parts done wrong.

use std::{collections::BTreeMap, time::Duration};

use multifd_proto::commit::SourcePhase;

use super::{Cause, CommitDefect, CommitEvent, CommitHarm, CommitModel, Whereabouts};
use crate::search::{Model, search};

/// One question.
#[derive(Clone, Debug)]
pub struct CommitVariant {
    /// What is asked, as a row of the table.
    pub name: &'static str,
    /// The commit that is asked about.
    pub model: CommitModel,
    /// The answer that is known: the harm, and how many steps it takes.
    pub expected: Option<(CommitHarm, usize)>,
}

/// The answer to one question.
#[derive(Debug)]
pub struct CommitVerdict {
    /// States visited.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// States in which both sides have ended, by how: the source's phase (`None` if its process is gone) and the destination.
    pub ends: BTreeMap<(Option<SourcePhase>, Whereabouts), usize>,
    /// States in which the source may have let the destination start and has no answer, by what the destination does.
    pub doubts: BTreeMap<Whereabouts, usize>,
    /// How long it took.
    pub took: Duration,
    /// The nearest harm, with the shortest way to it.
    pub harm: Option<(CommitHarm, Vec<CommitEvent>)>,
}

impl CommitVariant {
    /// Searches all states.
    pub fn verdict(&self) -> CommitVerdict {
        let (mut doubts, mut ends) = (BTreeMap::new(), BTreeMap::new());
        let outcome = search(&self.model, |state| {
            if state.is_doubtful() {
                *doubts.entry(state.destination()).or_default() += 1;
            }
            if self.model.is_over(state) {
                *ends.entry((state.source(), state.destination())).or_default() += 1;
            }
        });
        let (states, steps, harm) = (outcome.states, outcome.steps, outcome.harm);
        CommitVerdict { states, steps, ends, doubts, took: outcome.took, harm }
    }
}

impl CommitVerdict {
    /// Whether the answer is `expected`.
    pub fn is(&self, expected: Option<(CommitHarm, usize)>) -> bool {
        self.harm.as_ref().map(|(harm, trace)| (*harm, trace.len())) == expected
    }

    /// What a destination that has not ended may be doing while the source is in doubt.
    pub fn window(&self) -> Vec<Whereabouts> {
        let ended = [Whereabouts::Running, Whereabouts::Abandoned, Whereabouts::Dead];
        self.doubts.keys().copied().filter(|whereabouts| !ended.contains(whereabouts)).collect()
    }
}

/// The commit as it is; no harm can come of it.
pub fn commits() -> Vec<CommitVariant> {
    let commit = |name, model| CommitVariant { name, model, expected: None };
    let two_steps = CommitModel::default();
    let one_step = CommitModel { one_step: true, ..two_steps.clone() };
    vec![
        commit("two steps, between our own ends", two_steps.clone()),
        commit("two steps, into a checkpoint", CommitModel { checkpoint: true, ..two_steps.clone() }),
        commit("two steps, the memory is handed over", CommitModel { shared_memory: true, ..two_steps }),
        commit("one step, our source to a QEMU", one_step.clone()),
    ]
}

/// The commit with a part done wrong, and peers that do it otherwise.
pub fn mutants() -> Vec<CommitVariant> {
    let two_steps = CommitModel::default();
    let one_step = CommitModel { one_step: true, ..two_steps.clone() };
    let twice = |steps| Some((CommitHarm::TwoGuests, steps));
    let forever = |steps| Some((CommitHarm::WaitsForever, steps));
    let unproven = |steps| Some((CommitHarm::UnprovenSuccess, steps));
    let resumes = |name, cause, steps| CommitVariant {
        name,
        model: CommitModel { resumes_on: vec![cause], ..two_steps.clone() },
        expected: twice(steps),
    };
    let defects = |name, defects: &[CommitDefect], expected| CommitVariant {
        name,
        model: CommitModel { defects: defects.to_vec(), ..two_steps.clone() },
        expected,
    };
    let shared = |name, defect, steps| CommitVariant {
        name,
        model: CommitModel { shared_memory: true, defects: vec![defect], ..two_steps.clone() },
        expected: Some((CommitHarm::MemoryDamaged, steps)),
    };
    let succeeds = |name, model: &CommitModel, steps| CommitVariant {
        name,
        model: CommitModel { succeeds_on: vec![Cause::End], ..model.clone() },
        expected: unproven(steps),
    };
    // A QEMU source resumes on whatever is not SHUT(0). The limit stands for the one of its host's kernel.
    let qemu = CommitModel {
        resumes_on: vec![Cause::Reset, Cause::End, Cause::WriteFailed, Cause::Limit],
        ..one_step.clone()
    };
    vec![
        CommitVariant {
            name: "one step, a reset or an end after the end of the stream resumes",
            model: CommitModel { resumes_on: vec![Cause::Reset, Cause::End], ..one_step.clone() },
            expected: twice(8),
        },
        CommitVariant { name: "a QEMU source to our destination", model: qemu.clone(), expected: twice(7) },
        CommitVariant {
            name: "a QEMU source to a checkpoint of ours",
            model: CommitModel { checkpoint: true, ..qemu },
            expected: Some((CommitHarm::KeptTwice, 7)),
        },
        resumes("a reset after GO resumes", Cause::Reset, 12),
        resumes("an end of the connection after GO resumes", Cause::End, 12),
        resumes("the limit after GO resumes", Cause::Limit, 12),
        resumes("a cancel after GO resumes", Cause::Cancel, 12),
        resumes("a failed write of GO resumes", Cause::WriteFailed, 11),
        succeeds("an end of the connection after GO is success", &two_steps, 9),
        succeeds("one step, an end of the connection is success", &one_step, 3),
        defects("the destination starts with READY", &[CommitDefect::StartsAtReady], twice(7)),
        defects("the destination starts on GO after it gave up", &[CommitDefect::StartsOnLateGo], twice(13)),
        defects("the destination refuses although it has begun to start", &[CommitDefect::RefusesAfterGo], twice(14)),
        defects("an operator resumes in doubt without knowing", &[CommitDefect::BlindOperator], twice(12)),
        defects(
            "READY before everything has arrived, GO starts what is there",
            &[CommitDefect::ReadyTooEarly],
            Some((CommitHarm::StartedHalf, 8)),
        ),
        defects("READY before everything is loaded, GO loads", &[CommitDefect::LoadsAfterGo], None),
        defects("the destination waits for GO without limit", &[CommitDefect::NoLimitForGo], forever(7)),
        defects("the source waits without limit", &[CommitDefect::NoSourceLimit], forever(4)),
        CommitVariant {
            name: "one step, RUNNING before the start",
            model: CommitModel { defects: vec![CommitDefect::RunningBeforeStart], ..one_step.clone() },
            expected: Some((CommitHarm::GuestLost, 8)),
        },
        defects("no RUNNING", &[CommitDefect::NoAnswer], None),
        defects(
            "no RUNNING, and the source waits without limit",
            &[CommitDefect::NoAnswer, CommitDefect::NoSourceLimit],
            forever(4),
        ),
        defects("the destination gives up without a word", &[CommitDefect::NoRefusal], None),
        shared("the memory is handed over, and written by a load", CommitDefect::WritesInLoad, 6),
        shared("the memory is handed over, and written by a start that fails", CommitDefect::WritesBeforeFailure, 12),
        shared("the memory is handed over, and an operator resumes after a death", CommitDefect::ForgetfulOperator, 13),
    ]
}

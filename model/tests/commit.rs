//! The commit, explored completely: never two guests, never none, no wait without an end, and what each part done wrong leads to.

use std::collections::{BTreeSet, HashMap, HashSet};

use multifd_model::{
    commit::{
        Cause, CommitDefect, CommitEvent, CommitModel, CommitState, Message,
        Whereabouts::{self, Abandoned, AwaitsGo, Dead, Loading, Receiving, Running, Starting},
        Write,
        variants::{CommitVariant, commits, mutants},
    },
    protocol::Side,
    search::Model,
};
use multifd_proto::commit::SourcePhase::{self, Done, InDoubt, Resumable};

#[test]
fn the_commit_does_no_harm() {
    for variant in commits() {
        let verdict = variant.verdict();
        assert!(verdict.is(None), "{}: {:?}", variant.name, verdict.harm);
    }
}

#[test]
fn each_part_done_wrong_has_its_known_verdict_and_shortest_way() {
    for variant in mutants() {
        let verdict = variant.verdict();
        assert!(verdict.is(variant.expected), "{}: {:?}", variant.name, verdict.harm);
    }
}

/// In particular: a source that is done has its guest running at the destination, or it died there; a source that resumed has
/// a destination that gave up or died.
#[test]
fn the_commit_ends_in_all_allowed_ways_and_no_other() {
    let allowed: BTreeSet<(Option<SourcePhase>, Whereabouts)> = [
        (Some(Done), Running),
        (Some(Done), Dead),
        (Some(Resumable), Abandoned),
        (Some(Resumable), Dead),
        (Some(InDoubt), Running),
        (Some(InDoubt), Abandoned),
        (Some(InDoubt), Dead),
        (None, Running),
        (None, Abandoned),
        (None, Dead),
    ]
    .into();
    for variant in commits() {
        let ends: BTreeSet<_> = variant.verdict().ends.into_keys().collect();
        assert_eq!(ends, allowed, "{}", variant.name);
    }
}

/// With two steps the doubt spans a message each way and the start; with one it spans the rest of the stream, loading and
/// everything that makes it durable.
#[test]
fn two_steps_leave_no_doubt_while_the_destination_receives_or_loads() {
    let window = |model| CommitVariant { name: "", model, expected: None }.verdict().window();
    assert_eq!(window(CommitModel::default()), [AwaitsGo, Starting]);
    assert_eq!(window(CommitModel { one_step: true, ..CommitModel::default() }), [Receiving, Loading, Starting]);
    let loads_after_go = CommitModel { defects: vec![CommitDefect::LoadsAfterGo], ..CommitModel::default() };
    assert_eq!(window(loads_after_go), [Loading, AwaitsGo, Starting]);
}

/// A cancel has the same effect in every state of a source that waits: the guest runs on, or, once the destination may have
/// been let start, it stays paused and the source says so.
#[test]
fn cancel_works_in_every_state_that_has_no_outcome() {
    for CommitVariant { name, model, .. } in commits() {
        let mut cancels = [0, 0];
        for (state, successors) in states(&model) {
            for (event, next) in successors {
                if event == CommitEvent::Stops(Side::Source, Cause::Cancel) {
                    let doubtful = state.is_doubtful();
                    let expected = if doubtful { InDoubt } else { Resumable };
                    assert_eq!(next.source(), Some(expected), "{name}: cancelled in {state:?}");
                    cancels[usize::from(doubtful)] += 1;
                }
            }
        }
        assert!(cancels.iter().all(|&cancels| cancels > 0), "{name}");
    }
}

/// An operator is asked only where no answer arrives.
#[test]
fn an_answer_ends_the_doubt() {
    for CommitVariant { name, model, .. } in commits() {
        let mut answers = BTreeSet::new();
        for (state, successors) in states(&model) {
            let waits = state.is_doubtful() && state.source() != Some(InDoubt);
            for (event, next) in successors.into_iter().filter(|_| waits) {
                match event {
                    CommitEvent::Receives(Side::Source, Message::Running) => assert_eq!(next.source(), Some(Done)),
                    CommitEvent::Receives(Side::Source, Message::Refusal) => assert_eq!(next.source(), Some(Resumable)),
                    _ => continue,
                }
                answers.insert(next.source());
            }
        }
        assert_eq!(answers, [Some(Done), Some(Resumable)].into(), "{name}");
    }
}

/// The steps that processes and limits make by themselves lead from every state to an end, without going in circles: no
/// peer, network or user is needed to end a wait.
#[test]
fn every_wait_ends_by_steps_that_will_be_made() {
    for CommitVariant { name, model, .. } in commits() {
        let states = states(&model);
        let mut steps: HashMap<CommitState, usize> = HashMap::new();
        for state in states.keys() {
            let longest = steps_to_the_end(state, &states, &mut steps, 0);
            assert!(longest < 40, "{name}: {longest} steps from {state:?}");
        }
    }
}

/// Length of the longest way from `state` that no luck makes longer or shorter; panics on a circle.
fn steps_to_the_end(
    state: &CommitState,
    states: &HashMap<CommitState, Vec<(CommitEvent, CommitState)>>,
    known: &mut HashMap<CommitState, usize>,
    depth: usize,
) -> usize {
    assert!(depth < 100, "the steps go in circles at {state:?}");
    if let Some(&steps) = known.get(state) {
        return steps;
    }
    let mut longest = 0;
    for (_, next) in states[state].iter().filter(|(event, next)| event.is_certain() && next != state) {
        longest = longest.max(1 + steps_to_the_end(next, states, known, depth + 1));
    }
    known.insert(state.clone(), longest);
    longest
}

#[test]
fn without_bad_luck_the_guest_arrives() {
    for CommitVariant { name, model, .. } in commits() {
        let lucky = |event: &CommitEvent| match event {
            CommitEvent::Writes(.., write) => *write == Write::Sent,
            CommitEvent::Loads(fine) | CommitEvent::Starts(fine) => *fine,
            CommitEvent::Stops(..) => false,
            event => event.is_certain(),
        };
        let mut ends = BTreeSet::new();
        let mut waiting = vec![model.initial()];
        let mut seen = HashSet::new();
        while let Some(state) = waiting.pop() {
            let mut successors = Vec::new();
            model.successors(&state, &mut successors);
            successors.retain(|(event, _)| lucky(event));
            if successors.is_empty() {
                ends.insert((state.source(), state.destination()));
            }
            waiting.extend(successors.into_iter().map(|(_, next)| next).filter(|next| seen.insert(next.clone())));
        }
        assert_eq!(ends, [(Some(Done), Running)].into(), "{name}");
    }
}

/// The trace of a partition as it was seen: the answer is dropped, the source's connection ends, the destination runs.
#[test]
fn a_lost_connection_taken_for_a_dead_destination_runs_two_guests() {
    let today = &mutants()[0];
    let (_, trace) = today.verdict().harm.expect("known to do harm");
    let lost = trace.iter().position(|event| *event == CommitEvent::Stops(Side::Source, Cause::Reset));
    let starts = trace.iter().position(|event| *event == CommitEvent::Starts(true));
    assert!(lost.is_some() && lost < starts, "{trace:?}");
}

/// All states, with the steps from each.
fn states(model: &CommitModel) -> HashMap<CommitState, Vec<(CommitEvent, CommitState)>> {
    let mut states = HashMap::new();
    let mut waiting = vec![model.initial()];
    while let Some(state) = waiting.pop() {
        if states.contains_key(&state) {
            continue;
        }
        let mut successors = Vec::new();
        model.successors(&state, &mut successors);
        waiting.extend(successors.iter().map(|(_, next)| next.clone()));
        states.insert(state, successors);
    }
    states
}

//! The answers of the model: no harm from the protocol as it is, and harm from each part left out that is known to matter.

use std::collections::{BTreeSet, HashMap, HashSet, hash_map::Entry};

use multifd_model::{
    protocol::{Config, Key, Order, Protocol, Wait},
    search::explore,
    variants::{Effort, Variant, late_channels, protocols, removals},
};

#[test]
fn the_protocol_does_no_harm_in_any_dialect() {
    for variant in protocols() {
        let verdict = variant.verdict(Effort::Smallest);
        assert!(verdict.is(None), "{}: {:?}", variant.name, verdict.counterexample());
        assert!(verdict.ends > 0, "{}: nobody ever got to the end", variant.name);
    }
}

#[test]
fn each_part_left_out_has_its_known_verdict() {
    for variant in removals() {
        let verdict = variant.verdict(Effort::Smallest);
        assert!(verdict.is(variant.expected), "{}: {:?}", variant.name, verdict.harms);
    }
}

/// The second of them was the engine's: both sides reported success with pages missing.
#[test]
fn late_channels_are_waited_for_and_each_wrong_way_has_its_known_verdict() {
    for variant in late_channels() {
        let verdict = variant.verdict(Effort::Smallest);
        assert!(verdict.is(variant.expected), "{}: {:?}", variant.name, verdict.harms);
    }
}

/// The interleavings left out are said to change nothing: here they are all kept.
#[test]
fn all_interleavings_have_the_same_verdicts_and_the_same_ends() {
    for Variant { name, dialects, faults, .. } in protocols().into_iter().chain(removals()) {
        for dialect in dialects {
            for (channels, pages) in [(1, 1), (2, 1), (1, 2)] {
                let faults = faults && channels == 1;
                let all = Config {
                    channels,
                    rounds: 2,
                    pages,
                    faults,
                    order: Order::Any,
                    symmetric: false,
                    ..dialect.clone()
                };
                let complete = explore(&all);
                for order in [Order::Arrivals, Order::SourceFirst] {
                    let some = Config { order, ..all.clone() };
                    if !Protocol::is_possible(&some) {
                        continue;
                    }
                    let some = explore(&some);
                    assert_eq!(some.harm.is_some(), complete.harm.is_some(), "{name}, {dialect:?}");
                    if complete.harm.is_none() {
                        assert_eq!(some.ends, complete.ends, "{name}, {dialect:?}");
                        assert!(
                            some.states < complete.states || dialect.rounds_overlap,
                            "{name}: nothing was left out"
                        );
                    }
                }
            }
        }
    }
}

/// States with the same key are said to have the same future: here each is asked for its next steps.
#[test]
fn states_with_equal_keys_have_successors_with_equal_keys() {
    let mut merged = 0;
    for Variant { name, dialects, faults, .. } in protocols().into_iter().chain(removals()) {
        // Without this wait channels go on forever, and only harm that was done ends the search.
        for dialect in dialects.into_iter().filter(|dialect| !dialect.without.contains(&Wait::SourceChannelsAtOpen)) {
            for (channels, rounds, pages, faults) in [(2, 2, 1, false), (1, 2, 2, faults), (2, 1, 1, faults)] {
                let config =
                    Config { channels, rounds, pages, faults, order: Order::Any, symmetric: false, ..dialect.clone() };
                merged += assert_futures_are_equal(&config, name);
            }
        }
    }
    assert!(merged > 0, "no two states were alike");
}

/// How many states had the key of another one.
fn assert_futures_are_equal(config: &Config, name: &str) -> usize {
    let protocol = Protocol::new(config.clone());
    let initial = protocol.initial();
    let mut futures: HashMap<Key, BTreeSet<Key>> = HashMap::new();
    let mut visited = HashSet::from([initial.clone()]);
    let mut waiting = vec![initial];
    while let Some(state) = waiting.pop() {
        let mut successors = Vec::new();
        protocol.successors(&state, &mut successors);
        let future: BTreeSet<Key> = successors.iter().map(|(_, next)| protocol.key(next)).collect();
        match futures.entry(protocol.key(&state)) {
            Entry::Occupied(known) => assert_eq!(*known.get(), future, "{name}: two futures of {state:?}"),
            Entry::Vacant(new) => {
                new.insert(future);
            }
        }
        // As the search does, no further than the first harm on each way.
        if protocol.harm(&state, successors.is_empty()).is_none() {
            waiting.extend(successors.into_iter().map(|(_, next)| next).filter(|next| visited.insert(next.clone())));
        }
    }
    let merged = explore(&Config { symmetric: true, ..config.clone() });
    if merged.harm.is_none() {
        assert_eq!(merged.states, futures.len(), "{name}: as many states as keys");
    }
    visited.len() - futures.len()
}

//! The answers of the model: no harm from the protocol as it is, and harm from each part left out that is known to matter.

use multifd_model::{
    protocol::Config,
    search::explore,
    variants::{Effort, Variant, protocols, removals},
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

/// The interleavings left out are said to change nothing: here they are all kept.
#[test]
fn all_interleavings_have_the_same_verdicts_and_the_same_ends() {
    for Variant { name, dialects, faults, .. } in protocols().into_iter().chain(removals()) {
        for dialect in dialects {
            for (channels, pages) in [(1, 1), (2, 1), (1, 2)] {
                let reduced = Config { channels, rounds: 2, pages, faults: faults && channels == 1, ..dialect.clone() };
                let complete = Config { reduced: false, ..reduced.clone() };
                let (reduced, complete) = (explore(&reduced), explore(&complete));
                assert_eq!(reduced.harm.is_some(), complete.harm.is_some(), "{name}, {dialect:?}");
                if complete.harm.is_none() {
                    assert_eq!(reduced.ends, complete.ends, "{name}, {dialect:?}");
                    assert!(reduced.states < complete.states || dialect.rounds_overlap, "{name}: nothing was left out");
                }
            }
        }
    }
}

//! Device state on its way, explored completely: each part reaches its device, in order, and what each part done wrong leads to.

use multifd_model::devices::variants::{devices, devices_done_wrong};

#[test]
fn device_state_on_its_way_does_no_harm() {
    for variant in devices() {
        let verdict = variant.verdict();
        assert!(verdict.is(None), "{}: {:?}", variant.name, verdict.harm);
        assert!(verdict.ends > 0, "{}: nobody ever got to the end", variant.name);
    }
}

#[test]
fn each_part_done_wrong_has_its_known_verdict_and_shortest_way() {
    for variant in devices_done_wrong() {
        let verdict = variant.verdict();
        assert!(verdict.is(variant.expected), "{}: {:?}", variant.name, verdict.harm);
    }
}

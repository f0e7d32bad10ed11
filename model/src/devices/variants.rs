//! What is asked of device state on its way: as it is, and with single parts done wrong.

use std::time::Duration;

use super::{DeviceDefect, DeviceEvent, DeviceHarm, DeviceModel};
use crate::search::search;

/// One question.
#[derive(Clone, Debug)]
pub struct DeviceVariant {
    /// What is asked, as a row of the table.
    pub name: &'static str,
    /// What is searched, from the smallest, up to the first harm.
    pub models: Vec<DeviceModel>,
    /// The answer that is known: the harm, and how many steps it takes.
    pub expected: Option<(DeviceHarm, usize)>,
}

/// The answer to one question.
#[derive(Debug)]
pub struct DeviceVerdict {
    /// States visited.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// States in which both sides had ended.
    pub ends: usize,
    /// How long it took.
    pub took: Duration,
    /// The nearest harm, with the shortest way to it.
    pub harm: Option<(DeviceHarm, Vec<DeviceEvent>)>,
}

impl DeviceVariant {
    /// Searches all states.
    pub fn verdict(&self) -> DeviceVerdict {
        let mut verdict = DeviceVerdict { states: 0, steps: 0, ends: 0, took: Duration::ZERO, harm: None };
        for model in &self.models {
            let outcome = search(model, |_| {});
            verdict.states += outcome.states;
            verdict.steps += outcome.steps;
            verdict.ends += outcome.ends;
            verdict.took += outcome.took;
            verdict.harm = outcome.harm;
            if verdict.harm.is_some() {
                break;
            }
        }
        verdict
    }
}

impl DeviceVerdict {
    /// Whether the answer is `expected`.
    pub fn is(&self, expected: Option<(DeviceHarm, usize)>) -> bool {
        self.harm.as_ref().map(|(harm, trace)| (*harm, trace.len())) == expected
    }
}

/// As it is; no harm can come of it.
pub fn devices() -> Vec<DeviceVariant> {
    let variant = |name, models| DeviceVariant { name, models, expected: None };
    let failing = |model: DeviceModel| DeviceModel { faults: true, ..model };
    vec![
        variant("sections in packets and on main", vec![small(), order(), mixed(), three(), long()]),
        variant(
            "the same, a failure in any state",
            vec![failing(small()), failing(order()), failing(mixed()), failing(three()), failing(long())],
        ),
        variant("main speaks of packets two at a time", vec![untold(), failing(untold())]),
        variant("all packets are queued before main speaks of one", vec![kept(), failing(kept())]),
        variant("only some channels take packets", vec![few(), failing(few())]),
        variant("state of the running guest in each of two rounds", vec![live(), failing(live())]),
        variant("the same, two channels, then sections in packets", vec![live_two(), failing(live_two())]),
        variant("a checkpoint, and state that looks like the end", vec![opaque(), failing(opaque())]),
    ]
}

/// With a part left out or done wrong.
pub fn devices_done_wrong() -> Vec<DeviceVariant> {
    let with = |name, defect, models: &[DeviceModel], expected| {
        let models = models.iter().map(|model| DeviceModel { defect: Some(defect), ..model.clone() }).collect();
        DeviceVariant { name, models, expected }
    };
    let failing = |model: DeviceModel| DeviceModel { faults: true, ..model };
    use DeviceDefect::*;
    use DeviceHarm::*;
    vec![
        with(
            "the destination goes on although a packet is on its way",
            MainDoesNotWait,
            &[one()],
            Some((StartedWithoutState, 29)),
        ),
        with("packets are given in the order in which they come", InOrderOfArrival, &[order()], Some((OutOfOrder, 25))),
        with(
            "packets are numbered by the channel that writes them",
            NumberedWhenWritten,
            &[order()],
            Some((OutOfOrder, 25)),
        ),
        with("the numbers of packets begin again with each section", NumbersBeginAgain, &[order()], Some((GaveUp, 31))),
        with("channels take the packet that was queued last", LastFirst, &[small(), order()], Some((GaveUp, 20))),
        with("channels do not wait for room", NoRoom, &[small(), order()], Some((MoreThanRoom, 22))),
        DeviceVariant {
            name: "main speaks of packets when more are queued than there is room for",
            models: vec![DeviceModel { untold: 6, ..long() }],
            expected: Some((WaitsForever, 22)),
        },
        with("channels end when the queue is empty", EmptyIsTheEnd, &[small()], Some((WaitsForever, 16))),
        with("main does not say that no packet follows", NotClosed, &[small()], Some((WaitsForever, 32))),
        with(
            "the window is not told that a channel has ended",
            EndUntold,
            &[failing(small())],
            Some((WaitsForever, 16)),
        ),
        with(
            "an end within a packet counts as one between two",
            CutIsAnEnd,
            &[failing(small())],
            Some((WaitsForever, 22)),
        ),
        with("no barrier behind the last round, devices on main", NoLastBarrier, &[opaque()], Some((LoadedEarly, 8))),
        with("the same, devices in packets", NoLastBarrier, &[small()], Some((GaveUp, 11))),
        with("a checkpoint takes what looks like the end for the end", FirstEnd, &[opaque()], Some((GaveUp, 15))),
        with(
            "channels take state before the last round is over",
            StateBeforeBarrier,
            &[small(), order(), failing(small())],
            None,
        ),
        with(
            "the source writes GO without having joined its channels",
            NoJoin,
            &[small(), order(), failing(small())],
            None,
        ),
        with("the source goes on without PONG", NoPong, &[live(), failing(live())], None),
    ]
}

fn small() -> DeviceModel {
    DeviceModel {
        channels: 1,
        live: 0,
        sections: vec![2],
        window: 1,
        buffers: 2,
        capacity: 1,
        taking: 3,
        untold: 1,
        kept: false,
        opaque: false,
        faults: false,
        defect: None,
    }
}

fn one() -> DeviceModel {
    DeviceModel { sections: vec![1], ..small() }
}

/// Two channels, which may bring packets in any order.
fn order() -> DeviceModel {
    DeviceModel { channels: 2, sections: vec![2, 1], window: 2, buffers: 3, ..small() }
}

/// A section on main between two in packets.
fn mixed() -> DeviceModel {
    DeviceModel { sections: vec![1, 0, 2], capacity: 2, ..order() }
}

fn three() -> DeviceModel {
    DeviceModel { channels: 3, sections: vec![3, 2], window: 2, buffers: 4, ..small() }
}

/// More packets than there is room for on the way.
fn long() -> DeviceModel {
    DeviceModel { sections: vec![6], ..small() }
}

/// As many as there is room for.
fn untold() -> DeviceModel {
    DeviceModel { sections: vec![3, 2], untold: 2, ..order() }
}

fn kept() -> DeviceModel {
    DeviceModel { sections: vec![2, 2], kept: true, window: 1, ..order() }
}

fn few() -> DeviceModel {
    DeviceModel { taking: 1, ..order() }
}

fn live() -> DeviceModel {
    DeviceModel { live: 2, sections: vec![1], ..small() }
}

fn live_two() -> DeviceModel {
    DeviceModel { live: 1, ..order() }
}

fn opaque() -> DeviceModel {
    DeviceModel { sections: vec![0, 0], opaque: true, ..small() }
}

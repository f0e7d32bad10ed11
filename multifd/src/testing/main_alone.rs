//! Migrations without channels: main carries the pages. What happens to them when a connection breaks is in `faults::injected`.

use std::{os::unix::net::UnixStream, thread, time::Duration};

use multifd_proto::{
    ChannelId,
    machine::{Dialect, ZeroPages},
    packet::Compression,
    rounds::Party,
};
use test_support::time_limit;

use super::{
    machine::{self, Machine},
    memory,
    trace::{Refused, Trace},
    vm::{TestDestination, TestSource},
};
use crate::{
    destination::{self, Destination},
    error::{Error, Mismatch},
    ram::Ram,
    round::{
        device_trace::{DeviceStep, Takes},
        trace::Step,
    },
    source::{self, Peer, Source},
    transport::{
        Connect, Listen,
        fd::{FdConnector, FdListener},
        uri::Uri,
    },
};

/// Checks the steps of a migration without channels, as [`machine::check`] does for others.
///
/// The proof is of migrations with at least one channel. This one is one of them: one with a single channel that finds each page to be
/// one of those that it leaves to main, and whose SYNCs are there at once. The proof lets a page that is left to main have any content.
pub(super) fn check(steps: &[Step]) -> Result<Machine, Refused> {
    let translated: Vec<Step> = steps.iter().flat_map(with_a_silent_channel).collect();
    machine::check(&translated, 1)
}

fn with_a_silent_channel(step: &Step) -> Vec<Step> {
    const SILENT: Party = Party::Channel(ChannelId(0));
    match step {
        Step::Take(Party::Main, pages) => vec![Step::Take(SILENT, pages.clone())],
        Step::Send(Party::Main, pages) => vec![Step::Find(SILENT, pages.clone()), Step::Name(pages.clone())],
        Step::Flush => vec![Step::Sync(SILENT), Step::Flush],
        // It takes no packets, either.
        Step::Device(DeviceStep::Go) => vec![Step::Device(DeviceStep::Over(ChannelId(0), Takes::None)), step.clone()],
        Step::Arrive(Party::Main) => vec![Step::Arrive(SILENT), Step::Arrive(Party::Main)],
        other => vec![other.clone()],
    }
}

const BLOCKS: [(&str, usize); 3] = [("ram", 700), ("rom", 1), ("vga", 130)];
const LIMIT: Duration = Duration::from_secs(60);

/// A guest with content on two of three pages, which writes some in each round, also zeros over content.
fn guest() -> TestSource {
    let ram = Ram::for_test(&BLOCKS);
    for page in (0..ram.layout().pages()).filter(|page| page % 3 != 0) {
        if let Some(page_of_block) = ram.page(page) {
            page_of_block.write(&(page + 1).to_ne_bytes().repeat(512));
        }
    }
    let mut vm = TestSource::new(ram);
    let mut round = 0;
    vm.at_drain = Box::new(move |writer| {
        round += 1;
        for page in (round..400).step_by(13 * round as usize).take(50) {
            writer.write(page, if page % 5 == 0 { 0 } else { page * 1000 + round });
        }
    });
    vm
}

fn alone() -> source::Options {
    let mut options = source::Options::default();
    options.plan.channels = 0;
    options
}

type Outcome = (Result<source::Report, Error>, Result<destination::Report, Error>);

fn migrate(
    (listener, connector): (Box<dyn Listen>, &dyn Connect),
    vm: &mut TestSource,
    to: &mut TestDestination,
    mut options: source::Options,
    channels: Option<u8>,
) -> Outcome {
    let trace = Trace::recording();
    options.trace = trace.clone();
    let receiving = destination::Options { audit: true, channels, trace: trace.clone(), ..Default::default() };
    let outcome = thread::scope(|scope| {
        let destination = scope.spawn(|| Destination::new(receiving).run(to, listener, &mut ()));
        let sent = Source::new(options).run(vm, connector, &mut ());
        (sent, destination.join().unwrap())
    });
    match check(&trace.steps()) {
        Ok(machine) => assert!(outcome.1.is_err() || (machine.started && machine.applied > 0), "{machine:?}"),
        Err(refused) => panic!("{refused}"),
    }
    outcome
}

fn assert_same(vm: &TestSource, to: &TestDestination) {
    let source = vm.writer_ram();
    for page in source.layout().blocks().iter().flat_map(|block| block.page_range()) {
        assert!(source.page_bytes(page) == to.ram.page_bytes(page), "page {page} differs");
    }
}

#[test]
fn memory_arrives_on_main_to_either_kind_of_peer() {
    for peer in [Peer::Multifd, Peer::Qemu] {
        for (zero_pages, peek_every) in [
            (ZeroPages::Multifd, Duration::from_secs(3600)),
            (ZeroPages::Legacy, Duration::ZERO),
            (ZeroPages::None, Duration::ZERO),
        ] {
            for channels in [None, Some(0)] {
                let (mut vm, mut to) = (guest(), TestDestination::new(Ram::for_test(&BLOCKS)));
                let mut options = alone();
                options.peer = peer;
                options.qemu.zero_pages = zero_pages;
                options.peek_every = peek_every;
                let (listener, connector) = memory::listener(100_000);
                let over: (Box<dyn Listen>, &dyn Connect) = (Box::new(listener), &connector);
                let (sent, received) = time_limit(LIMIT, || migrate(over, &mut vm, &mut to, options, channels));
                let (received, sent) = (received.unwrap(), sent.unwrap());
                assert_same(&vm, &to);
                assert!(!vm.writer.is_running(), "the VM belongs to the destination");
                assert_eq!(to.calls(), ["prepare", "load", "load", "start"]);
                assert_eq!(received.audit, Some(destination::Findings::default()));
                assert_eq!((received.channels, received.dialect), (0, Some(Dialect::PerSection)));
                assert_eq!((sent.normal, sent.zero), (received.normal, received.zero));
                assert_eq!(sent.main_bytes, received.main_bytes);
                assert!(sent.channel_bytes.is_empty() && sent.rounds.len() >= 2, "{sent:?}");
                assert_eq!(zero_pages == ZeroPages::None, sent.zero == 0);
            }
        }
    }
}

#[test]
fn one_connection_is_enough() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let listener = FdListener::new(ours.into(), Uri::Fd(3)).unwrap();
    let connector = FdConnector::new(theirs.into()).unwrap();
    let (mut vm, mut to) = (guest(), TestDestination::new(Ram::for_test(&BLOCKS)));
    let over: (Box<dyn Listen>, &dyn Connect) = (Box::new(listener), &connector);
    let (sent, received) = time_limit(LIMIT, || migrate(over, &mut vm, &mut to, alone(), None));
    received.unwrap();
    sent.unwrap();
    assert_same(&vm, &to);
}

#[test]
fn a_destination_that_was_told_of_channels_refuses_a_source_without() {
    let (mut vm, mut to) = (guest(), TestDestination::new(Ram::for_test(&BLOCKS)));
    let (listener, connector) = memory::listener(100_000);
    let over: (Box<dyn Listen>, &dyn Connect) = (Box::new(listener), &connector);
    let (sent, received) = time_limit(LIMIT, || migrate(over, &mut vm, &mut to, alone(), Some(2)));
    assert!(matches!(received, Err(Error::Mismatch(Mismatch::Channels { opened: 0, expected: 2 }))), "{received:?}");
    assert!(sent.is_err() && vm.writer.is_running());
}

#[test]
fn what_only_channels_can_do_is_refused_or_said() {
    let mut compressed = alone();
    compressed.format.compression = Compression::Zlib;
    let (_listener, connector) = memory::listener(100_000);
    let mut vm = guest();
    let error = Source::new(compressed).run(&mut vm, &connector, &mut ()).unwrap_err();
    assert!(matches!(error, Error::Mismatch(Mismatch::CompressionNeedsChannels)), "{error}");
    assert!(vm.writer.is_running());

    let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
    let mut copied = alone();
    copied.plan.zero_copy = true;
    let (listener, connector) = memory::listener(100_000);
    let over: (Box<dyn Listen>, &dyn Connect) = (Box::new(listener), &connector);
    let (sent, received) = time_limit(LIMIT, || migrate(over, &mut vm, &mut to, copied, None));
    received.unwrap();
    let refused = sent.unwrap().zero_copy.unwrap().refused;
    assert!(refused.as_ref().is_some_and(|why| why.contains("main carries the pages")), "{refused:?}");
}

/// Main is the only party: a page behind the sync point of its round, or a round that is not ended, is seen by nothing else.
#[test]
fn steps_out_of_order_are_refused() {
    let steps = || {
        vec![
            Step::Flush,
            Step::Arrive(Party::Main),
            Step::Drain(vec![1, 2]),
            Step::Take(Party::Main, vec![1, 2]),
            Step::Send(Party::Main, vec![1, 2]),
            Step::Flush,
            Step::Apply(Party::Main, vec![1]),
            Step::Apply(Party::Main, vec![2]),
            Step::Arrive(Party::Main),
            Step::End,
            Step::Start,
        ]
    };
    assert!(check(&steps()).unwrap().started);
    for (left_out, what) in [(1, "arrival"), (4, "send"), (5, "flush"), (6, "page"), (8, "last arrival"), (9, "end")] {
        let mut rest = steps();
        rest.remove(left_out);
        assert!(check(&rest).is_err(), "without the {what}");
    }
    let mut late = steps();
    late.swap(4, 5);
    assert!(check(&late).is_err(), "a page after the end of its round");
}

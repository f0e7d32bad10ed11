//! Whole migrations between two threads: what arrives, and what is left behind when something fails.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use multifd_proto::{
    BlockName, Codec,
    machine::{Dialect, ZeroPages},
    packet::Compression,
    return_path::Message,
    rounds::Party,
};

use crate::{
    clock::Clock,
    destination::{self, Destination, FirstTouch},
    error::Error,
    ram::{Ram, RamBlock},
    round::trace::Step,
    source::{self, Flush, Source, Untouched},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    testing::memory,
    testing::trace::Trace,
    testing::vm::{TestDestination, TestSource},
    transport::{
        Connect, Listen,
        fd::{FdConnector, FdListener},
        uri::Uri,
    },
};

const BLOCKS: [(&str, usize); 3] = [("ram", 700), ("rom", 1), ("vga", 130)];

/// Memory with some content: every third page is zero.
fn filled() -> Ram {
    let ram = Ram::for_test(&BLOCKS);
    for block in ram.layout().blocks() {
        for page in block.page_range().filter(|page| page % 3 != 0) {
            ram.page(page).unwrap().write(&(page + 1).to_ne_bytes().repeat(512));
        }
    }
    ram
}

fn assert_same(source: &Ram, destination: &Ram) {
    for block in source.layout().blocks() {
        for page in block.page_range() {
            assert!(source.page_bytes(page) == destination.page_bytes(page), "page {page} differs");
        }
    }
}

type Outcome = (Result<source::Report, Error>, Result<destination::Report, Error>);

/// Migrates `vm` to `to`.
fn migrate(
    vm: &mut TestSource,
    to: &mut TestDestination,
    options: source::Options,
    receiving: destination::Options,
) -> Outcome {
    let (listener, connector) = memory::listener(100_000);
    migrate_over((Box::new(listener), &connector), vm, to, options, receiving)
}

/// Migrates `vm` to `to` over connections of one transport.
fn migrate_over(
    (listener, connector): (Box<dyn Listen>, &dyn Connect),
    vm: &mut TestSource,
    to: &mut TestDestination,
    options: source::Options,
    receiving: destination::Options,
) -> Outcome {
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| Destination::new(receiving).run(to, listener, &mut ()));
        let sent = Source::new(options).run(vm, connector, &mut ());
        (sent, destination.join().unwrap())
    })
}

/// A source whose guest writes a few pages in each of the first rounds, also zeros over content.
fn writing_source(ram: Ram) -> TestSource {
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

#[test]
fn memory_and_device_state_arrive_in_every_mode() {
    for dialect in [Dialect::PerRound, Dialect::PerSection] {
        for zero_pages in [ZeroPages::Multifd, ZeroPages::Legacy, ZeroPages::None] {
            for flush in [Flush::Early, Flush::Late] {
                for channels in [1, 2, 5] {
                    let mut vm = writing_source(filled());
                    let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
                    let mut options = source::Options::default();
                    options.plan.channels = channels;
                    options.qemu.dialect = dialect;
                    options.qemu.zero_pages = zero_pages;
                    options.qemu.flush = flush;
                    let receiving = destination::Options { audit: true, ..Default::default() };
                    let (sent, received) = migrate(&mut vm, &mut to, options, receiving);
                    let (sent, received) = (sent.unwrap(), received.unwrap());
                    assert_same(&vm.writer_ram(), &to.ram);
                    assert_eq!(to.loaded, [("cpu".to_owned(), 0, 1), ("timer".to_owned(), 7, 3)]);
                    assert_eq!(to.calls(), ["prepare", "load", "load", "start"]);
                    assert!(!vm.writer.is_running(), "the VM belongs to the destination");
                    assert_eq!(received.audit, Some(destination::Findings::default()));
                    assert_eq!(received.channels, usize::from(channels));
                    assert_eq!(received.dialect, Some(dialect));
                    assert_eq!((sent.normal, sent.zero), (received.normal, received.zero));
                    assert_eq!(sent.channel_bytes, received.channel_bytes);
                    assert_eq!(sent.main_bytes, received.main_bytes);
                    assert_eq!(zero_pages == ZeroPages::None, sent.zero == 0);
                    assert!(sent.rounds.len() >= 2, "{:?}", sent.rounds);
                }
            }
        }
    }
}

#[test]
fn untouched_pages_are_not_sent_or_sent_as_zeros_without_being_read() {
    for (untouched, zero_pages) in [
        (Untouched::Skip, ZeroPages::Multifd),
        (Untouched::Name, ZeroPages::Multifd),
        (Untouched::Name, ZeroPages::Legacy),
        (Untouched::Name, ZeroPages::None),
    ] {
        let ram = filled();
        let mut vm = TestSource::new(ram.clone());
        // The source lies about these pages, which shows that nobody read them.
        vm.untouched = (100..300).collect();
        let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
        let mut options = source::Options::default();
        options.format.untouched = untouched;
        options.qemu.zero_pages = zero_pages;
        let trace = Trace::recording();
        options.trace = trace.clone();
        let (sent, received) = migrate(&mut vm, &mut to, options, destination::Options::default());
        received.unwrap();
        if zero_pages == ZeroPages::Legacy {
            // A QEMU before 9.0 does not know them there, and would not put them into place.
            let sent = trace.steps().into_iter().filter_map(|step| match step {
                Step::Send(Party::Channel(_), pages) => Some(pages),
                _ => None,
            });
            let on_channels: Vec<u64> = sent.flatten().collect();
            assert!(!on_channels.is_empty());
            assert!(on_channels.iter().all(|page| !(100..300).contains(page)), "a zero page on a channel");
        }
        assert_eq!(sent.unwrap().skipped, if untouched == Untouched::Skip { 200 } else { 0 });
        for page in 0..700 {
            let expected = if (100..300).contains(&page) { vec![0; 4096] } else { ram.page_bytes(page) };
            assert!(to.ram.page_bytes(page) == expected, "page {page} differs");
        }
    }
}

#[test]
fn other_page_sizes_work() {
    for page_size in [1024, 16384, 65536] {
        let ram = Ram::for_test_with_pages(page_size, &[("ram", 300)]);
        for page in (0..300).step_by(2) {
            ram.page(page).unwrap().write(&page.to_ne_bytes().repeat(page_size / 8));
        }
        let mut vm = TestSource::new(ram.clone());
        let mut to = TestDestination::new(Ram::for_test_with_pages(page_size, &[("ram", 300)]));
        let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
        // Of the two the one that says why.
        received.unwrap();
        sent.unwrap();
        assert_same(&ram, &to.ram);
    }
}

#[test]
fn a_failing_call_of_the_source_vm_leaves_the_guest_running() {
    for fail_at in 0.. {
        let mut vm = writing_source(filled());
        vm.fail_at = Some(fail_at);
        let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
        let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
        let Err(error) = sent else {
            received.unwrap();
            assert!(fail_at > 5, "only {fail_at} calls may fail");
            break;
        };
        assert!(error.to_string().contains("told to fail"), "{error}");
        assert!(received.is_err());
        assert!(vm.writer.is_running());
        assert!(!to.calls().contains(&"start"));
        assert_eq!(vm.calls().contains(&"pause"), vm.calls().contains(&"resume"));
        // A second attempt needs nothing to be repaired first.
        vm.fail_at = None;
        let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
        let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
        sent.unwrap();
        received.unwrap();
        assert_same(&vm.writer_ram(), &to.ram);
    }
}

#[test]
fn a_failing_load_leaves_the_guest_running_on_the_source() {
    let mut vm = writing_source(filled());
    let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
    to.fail = Some("load");
    let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
    assert!(matches!(sent, Err(Error::Refused { status: 1, .. })), "{sent:?}");
    assert!(matches!(received, Err(Error::Load { .. })), "{received:?}");
    assert!(vm.writer.is_running());
    assert_eq!(to.calls(), ["prepare", "load", "abandon"]);
}

#[test]
fn blocks_that_differ_are_named() {
    for (blocks, expected) in [
        (
            &[("ram", 700), ("rom", 1)][..],
            "the source has RAM block \"vga\" (0x82000 bytes), which this VM does not have",
        ),
        (
            &[("ram", 700), ("rom", 1), ("vga", 130), ("x", 1)],
            "this VM has RAM block \"x\", which the source does not have",
        ),
        (
            &[("ram", 699), ("rom", 1), ("vga", 130)],
            "RAM block \"ram\" has 0x2bc000 bytes on the source and 0x2bb000 here",
        ),
    ] {
        let mut vm = TestSource::new(filled());
        let mut to = TestDestination::new(Ram::for_test(blocks));
        let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
        assert!(sent.is_err());
        let error = received.unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert!(error.is_peers_fault());
        assert!(vm.writer.is_running());
    }
}

#[test]
fn another_number_of_channels_than_required_is_refused() {
    for (opened, required) in [(2, 1), (3, 2)] {
        let mut vm = TestSource::new(filled());
        let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
        let mut options = source::Options::default();
        options.plan.channels = opened;
        let receiving = destination::Options { channels: Some(required), ..Default::default() };
        let (sent, received) = migrate(&mut vm, &mut to, options, receiving);
        assert!(sent.is_err());
        let error = received.unwrap_err();
        assert!(error.is_peers_fault(), "{error}");
        assert!(vm.writer.is_running());
    }
}

#[test]
fn a_guest_that_writes_too_fast_does_not_converge() {
    let mut vm = TestSource::new(filled());
    vm.at_drain = Box::new(|writer| {
        for page in 0..700 {
            writer.write(page, page + 7);
        }
    });
    let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
    let mut options = source::Options::default();
    options.parameters.limits.rounds = Some(4);
    options.parameters.limits.downtime = std::time::Duration::ZERO;
    let (sent, received) = migrate(&mut vm, &mut to, options, Default::default());
    assert!(matches!(sent, Err(Error::DoesNotConverge { rounds: 4, .. })), "{sent:?}");
    assert!(received.is_err());
    assert!(vm.writer.is_running());
    assert!(!vm.calls().contains(&"pause"));
}

#[test]
fn a_downtime_limit_that_is_raised_meanwhile_lets_the_migration_end() {
    let mut options = source::Options::default();
    options.parameters.limits.rounds = None;
    options.parameters.limits.downtime = std::time::Duration::ZERO;
    let source = Source::new(options);
    let handle = source.handle();
    let mut vm = TestSource::new(filled());
    let mut drains = 0;
    vm.at_drain = Box::new(move |writer| {
        for page in 0..700 {
            writer.write(page, page + drains);
        }
        drains += 1;
        if drains == 4 {
            handle.set_parameters(|parameters| parameters.limits.downtime = std::time::Duration::from_secs(3600));
            assert_eq!(handle.parameters().limits.rounds, None);
        }
    });
    let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
    let (listener, connector) = memory::listener(100_000);
    let report = std::thread::scope(|scope| {
        let receiving =
            scope.spawn(|| destination::Destination::new(Default::default()).run(&mut to, Box::new(listener), &mut ()));
        let sent = source.run(&mut vm, &connector, &mut ()).unwrap();
        receiving.join().unwrap().unwrap();
        sent
    });
    // Four with the guest running, and the last one.
    assert_eq!(report.rounds.len(), 5);
}

#[test]
fn memory_that_is_not_fresh_ends_up_like_the_source() {
    let mut vm = TestSource::new(filled());
    vm.untouched = (0..700).filter(|page| page % 3 == 0).collect();
    let ram = Ram::for_test(&BLOCKS).not_fresh();
    for block in ram.layout().blocks() {
        for page in block.page_range() {
            ram.page(page).unwrap().write(&[0xee; 4096]);
        }
    }
    let mut to = TestDestination::new(ram);
    let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
    sent.unwrap();
    received.unwrap();
    assert_same(&vm.writer_ram(), &to.ram);
}

#[test]
fn a_destination_that_confirms_before_it_has_the_vm_is_not_believed() {
    let (mut listener, connector) = memory::listener(100_000);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut main = listener.accept(None).unwrap().establish(None).unwrap();
            let mut shut = Vec::new();
            Message::Shut(0).encode(&mut shut);
            main.write(&shut, &[]).unwrap();
            // The channels wait to be accepted until the source gives up.
            while main.read(&mut [0; 1000]).unwrap() > 0 {}
        });
        let mut vm = TestSource::new(filled());
        let error = Source::new(source::Options::default()).run(&mut vm, &connector, &mut ()).unwrap_err();
        assert!(error.is_peers_fault(), "{error}");
        assert!(error.to_string().contains("SHUT with status 0 before the end of the stream"), "{error}");
        assert!(vm.writer.is_running());
    });
}

#[test]
fn memory_arrives_whatever_way_fresh_memory_is_filled() {
    let source = filled();
    for first_touch in [FirstTouch::Auto, FirstTouch::Direct, FirstTouch::Copy, FirstTouch::Populate, FirstTouch::Huge]
    {
        for map in [RamBlock::anonymous, RamBlock::memory_file] {
            let block = |&(name, pages): &(&str, usize)| map(BlockName::new(name).unwrap(), pages * 4096).unwrap();
            let ram = Ram::new(4096, BLOCKS.iter().map(block).collect()).unwrap();
            // Somebody was faster than the stream: a page that is present, in the middle of a run.
            ram.page(400).unwrap().write(&[0xee; 4096]);
            let mut vm = writing_source(filled());
            let mut to = TestDestination::new(ram);
            let receiving = destination::Options { first_touch, ..Default::default() };
            let (sent, received) = migrate(&mut vm, &mut to, source::Options::default(), receiving);
            sent.unwrap();
            received.unwrap();
            assert_same(&vm.writer_ram(), &to.ram);
            assert!(source.page_bytes(400) == to.ram.page_bytes(400), "{first_touch:?}");
        }
    }
}

#[test]
fn compressed_pages_arrive() {
    for compression in [Compression::Zlib, Compression::Zstd] {
        for zero_pages in [ZeroPages::Multifd, ZeroPages::Legacy] {
            let mut vm = writing_source(filled());
            let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
            let mut options = source::Options::default();
            options.format.compression = compression;
            options.qemu.zero_pages = zero_pages;
            let (sent, received) = migrate(&mut vm, &mut to, options, destination::Options::default());
            let sent = sent.unwrap();
            received.unwrap();
            assert_same(&vm.writer_ram(), &to.ram);
            assert!(sent.channel_bytes.iter().sum::<u64>() < sent.normal * 1000, "{:?}", sent.channel_bytes);
        }
    }
}

#[test]
fn another_compression_than_required_is_named() {
    let mut vm = TestSource::new(filled());
    let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
    let mut options = source::Options::default();
    options.format.compression = Compression::Zlib;
    options.plan.channels = 1;
    let receiving = destination::Options { compression: Some(Compression::Zstd), ..Default::default() };
    let (sent, received) = migrate(&mut vm, &mut to, options, receiving);
    assert!(sent.is_err());
    let error = received.unwrap_err();
    assert!(error.is_peers_fault());
    let message = error.to_string();
    assert!(message.contains("compression zstd, the packet has zlib"), "{message}");
    assert!(vm.writer.is_running());
}

#[test]
fn pages_sent_without_copies_arrive_and_are_counted() {
    for (zero_pages, dialect) in [(ZeroPages::Multifd, Dialect::PerRound), (ZeroPages::None, Dialect::PerSection)] {
        let listener = "tcp:127.0.0.1:0".parse::<Uri>().unwrap().listener().unwrap();
        let connector = listener.uri().connector().unwrap();
        let mut vm = writing_source(filled());
        let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
        let mut options = source::Options::default();
        options.plan.zero_copy = true;
        options.qemu.zero_pages = zero_pages;
        options.qemu.dialect = dialect;
        let transport: (Box<dyn Listen>, &dyn Connect) = (Box::new(listener), &*connector);
        let (sent, received) = migrate_over(transport, &mut vm, &mut to, options, destination::Options::default());
        received.unwrap();
        assert_same(&vm.writer_ram(), &to.ram);
        let zero_copy = sent.unwrap().zero_copy.unwrap();
        assert_eq!(zero_copy.refused, None);
        assert!(zero_copy.sends > 0 && zero_copy.copied <= zero_copy.sends, "{zero_copy:?}");
        // The kernel copies on loopback.
        assert!(zero_copy.copied > 0 && zero_copy.syncs_with_copies > 0, "{zero_copy:?}");
    }
}

#[test]
fn where_sending_without_copies_is_not_possible_the_report_says_why() {
    for (asked, refused) in [(false, None), (true, Some("this kind of connection does not have it"))] {
        let mut vm = writing_source(filled());
        let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
        let mut options = source::Options::default();
        options.plan.zero_copy = asked;
        let (sent, received) = migrate(&mut vm, &mut to, options, destination::Options::default());
        received.unwrap();
        assert_same(&vm.writer_ram(), &to.ram);
        let zero_copy = sent.unwrap().zero_copy;
        let expected = refused.map(|why| source::ZeroCopy { refused: Some(why.to_owned()), ..Default::default() });
        assert_eq!(zero_copy, expected);
    }
}

const LIMIT_OF_AUTO: u64 = 10_000_000;

/// 16 MiB whose pages hold words from `word`, sent below a limit of 10 MB/s to a destination that takes packets of any
/// kind.
fn sent_with_auto_compression(clock: Clock, word: impl FnMut() -> u64) -> source::ChannelCompression {
    let ram = || Ram::for_test(&[("ram", 4096)]);
    let from = ram();
    let mut words = std::iter::repeat_with(word);
    for page in 0..4096 {
        let content: Vec<u8> = words.by_ref().take(512).flat_map(u64::to_le_bytes).collect();
        from.page(page).unwrap().write(&content);
    }
    let mut vm = TestSource::new(from);
    let mut to = TestDestination::new(ram());
    let mut options = source::Options::default();
    options.plan.channels = 1;
    options.format.compression = Compression::Zstd;
    options.format.auto_compression = true;
    options.parameters.max_bandwidth = Some(LIMIT_OF_AUTO);
    options.clock = clock;
    let (sent, received) = migrate(&mut vm, &mut to, options, destination::Options::default());
    received.unwrap();
    assert_same(&vm.writer_ram(), &to.ram);
    let channels = sent.unwrap().auto_compression;
    let [channel] = &channels[..] else { panic!("{channels:?}") };
    assert_eq!(channel.packets_plain + channel.packets_compressed, 32, "packets of 512 KiB");
    assert!(channel.packets_plain > 0 && channel.packets_compressed > 0, "both kinds: {channel:?}");
    channel.clone()
}

#[test]
fn a_channel_compresses_below_a_limit_what_can_be_compressed() {
    let mut count = 0;
    let channel = sent_with_auto_compression(Clock::monotonic(), || {
        count += 1;
        count % 100 + 1
    });
    // The first packets fill the bucket of the limit at once, and tell nothing about it.
    assert!(channel.compresses && channel.packets_compressed >= 16, "{channel:?}");
    assert!(channel.ratio.unwrap() > 2.0 && channel.reason.starts_with("compressed in the end"), "{channel:?}");
}

#[test]
fn a_channel_sends_as_it_is_what_cannot_be_compressed() {
    // All that takes time is the limit.
    let looks = AtomicU64::new(3_600_000_000);
    let clock = Clock::from_fn(move || Duration::from_micros(looks.fetch_add(1, Relaxed)));
    let mut state = 1u64;
    let begun = Instant::now();
    let channel = sent_with_auto_compression(clock, || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    assert!(!channel.compresses && channel.switches == 0 && channel.packets_plain >= 16, "{channel:?}");
    assert!(channel.reason.starts_with("sent as they are in the end"), "{channel:?}");
    // What the limit costs is in it. On a machine that is slower than the limit no packet waits.
    let least = (16 << 20) as f64 / LIMIT_OF_AUTO as f64;
    if begun.elapsed().as_secs_f64() < 1.5 * least {
        assert!(channel.plain_speed.unwrap() < 4.0 * LIMIT_OF_AUTO as f64, "{channel:?}");
    }
}

/// As a VMM in a jail gets them: main and each channel opened by another program.
#[test]
fn a_vm_moves_over_sockets_that_exist() {
    let pairs =
        |count| (0..count).map(|_| UnixStream::pair().unwrap()).map(|(a, b)| (OwnedFd::from(a), OwnedFd::from(b)));
    for (channels, sockets) in [(0, 1), (1, 2), (4, 5), (4, 7)] {
        let (ours, theirs): (Vec<_>, Vec<_>) = pairs(sockets).unzip();
        let listener = FdListener::of(theirs, "unix:/handed/over".parse().unwrap()).unwrap();
        let mut options = source::Options::default();
        options.plan.channels = channels;
        let (mut vm, mut to) = (writing_source(filled()), TestDestination::new(Ram::for_test(&BLOCKS)));
        let over = (Box::new(listener) as Box<dyn Listen>, &FdConnector::of(ours).unwrap() as &dyn Connect);
        let (sent, received) = migrate_over(over, &mut vm, &mut to, options, Default::default());
        sent.unwrap();
        assert_eq!(received.unwrap().channels, usize::from(channels));
        assert_same(&vm.writer_ram(), &to.ram);
    }
    // One too few.
    let (ours, theirs): (Vec<_>, Vec<_>) = pairs(4).unzip();
    let listener = FdListener::of(theirs, "unix:/handed/over".parse().unwrap()).unwrap();
    let (mut vm, mut to) = (writing_source(filled()), TestDestination::new(Ram::for_test(&BLOCKS)));
    let over = (Box::new(listener) as Box<dyn Listen>, &FdConnector::of(ours).unwrap() as &dyn Connect);
    let (sent, received) = migrate_over(over, &mut vm, &mut to, source::Options::default(), Default::default());
    let error = sent.unwrap_err().to_string();
    assert!(error.contains("a socket for each, or fewer channels"), "{error}");
    assert!(received.is_err() && vm.writer.is_running());
}

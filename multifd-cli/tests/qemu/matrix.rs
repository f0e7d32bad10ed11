//! {QEMU} → `receive` → checkpoint → `send` → {QEMU}, in combinations that cover each pair of values.

use std::collections::BTreeSet;

use qemu_peer::{Installed, Version};
use test_support::{TempDir, report, time_limit};

use crate::harness::{
    LIMIT, Multifd, Settings, TEST_LIMIT, UUID, assert_goes_on, assert_same_memory, listen, migrate_away, receive_uri,
    vm,
};

/// One combination; each field is an index into the table of its name below.
type Case = [usize; 7];

const PEERS: [(Version, Version); 4] = [
    (Version::V7_2, Version::V7_2),
    (Version::V7_2, Version::V10_0),
    (Version::V10_0, Version::V7_2),
    (Version::V10_0, Version::V10_0),
];
/// The first two exist in both versions.
const MACHINES: [&str; 6] =
    ["pc-i440fx-7.2", "pc-q35-7.2", "pc-i440fx-8.1", "pc-q35-8.2", "pc-i440fx-10.0", "pc-q35-10.0"];
const CHANNELS: [u8; 3] = [1, 4, 16];
const COMPRESSIONS: [&str; 3] = ["none", "zlib", "zstd"];
const RETURN_PATHS: [bool; 2] = [true, false];
const UUIDS: [bool; 2] = [false, true];
const TRANSPORTS: [&str; 2] = ["tcp", "unix"];

const SIZES: Case = [
    PEERS.len(),
    MACHINES.len(),
    CHANNELS.len(),
    COMPRESSIONS.len(),
    RETURN_PATHS.len(),
    UUIDS.len(),
    TRANSPORTS.len(),
];

/// How many tests share the cases, so that they run side by side.
const LANES: usize = 3;

#[test]
fn guests_move_through_a_checkpoint_lane_0() {
    lane(0);
}

#[test]
fn guests_move_through_a_checkpoint_lane_1() {
    lane(1);
}

#[test]
fn guests_move_through_a_checkpoint_lane_2() {
    lane(2);
}

fn lane(lane: usize) {
    let (Some(old), Some(new)) = (Installed::require(Version::V7_2), Installed::require(Version::V10_0)) else {
        return;
    };
    let installed = |version| if version == Version::V7_2 { &old } else { &new };
    for case in cases().iter().skip(lane).step_by(LANES) {
        let row = describe(case);
        eprintln!("{row}");
        time_limit(TEST_LIMIT, || run(case, &installed));
        report("QEMU -> checkpoint -> QEMU", &format!("{row} ok"));
    }
}

fn run<'a>(
    &[peers, machine, channels, compression, return_path, uuid, transport]: &Case,
    installed: &dyn Fn(Version) -> &'a Installed,
) {
    let (from, to) = PEERS[peers];
    let settings = Settings {
        channels: CHANNELS[channels],
        compression: COMPRESSIONS[compression],
        return_path: RETURN_PATHS[return_path],
    };
    let tcp = TRANSPORTS[transport] == "tcp";
    let start = |version, incoming| {
        let mut builder = vm(installed(version), MACHINES[machine]);
        if UUIDS[uuid] {
            builder = builder.uuid(UUID);
        }
        if incoming {
            builder = builder.incoming();
        }
        let mut qemu = builder.start().unwrap();
        settings.apply(&mut qemu);
        qemu.qmp().set_capabilities(&[("validate-uuid", UUIDS[uuid])]).unwrap();
        qemu
    };
    let mut source = start(from, false);
    source.wait_passes(3, LIMIT).unwrap();

    let dir = TempDir::new().unwrap();
    let file = dir.join("checkpoint");
    let compression = format!("--compression={}", settings.compression);
    let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), tcp), &file, &["--digest", &compression]);
    migrate_away(&mut source, &uri);
    let received = receive.done();
    assert_eq!(received["machine"], MACHINES[machine]);
    assert_eq!(received["channels"], settings.channels);
    assert_eq!(received["compression"], settings.compression);
    assert_same_memory(&mut source, &received);

    let mut destination = start(to, true);
    let uri = listen(&mut destination, tcp);
    let file = file.display().to_string();
    let [channels, compression] = settings.args();
    let sent = Multifd::start(["send", &file, &uri, &channels, &compression]).done();
    assert_eq!(sent["dialect"], received["dialect"]);
    assert_goes_on(&source, &mut destination);
}

fn describe(&[peers, machine, channels, compression, return_path, uuid, transport]: &Case) -> String {
    let (from, to) = PEERS[peers];
    let word = |yes, word| if yes { word } else { "" };
    format!(
        "{:>4} -> {:<4} {:14} {:>2} channels {:4} {:11} {:4} {:4}",
        from.name(),
        to.name(),
        MACHINES[machine],
        CHANNELS[channels],
        COMPRESSIONS[compression],
        word(RETURN_PATHS[return_path], "return path"),
        word(UUIDS[uuid], "uuid"),
        TRANSPORTS[transport],
    )
}

/// Whether both QEMUs have the machine type.
fn exists(&[peers, machine, ..]: &Case) -> bool {
    machine < 2 || PEERS[peers] == (Version::V10_0, Version::V10_0)
}

/// All combinations of indices that exist.
fn all() -> Vec<Case> {
    let count: usize = SIZES.iter().product();
    let case = |mut number: usize| {
        SIZES.map(|size| {
            let index = number % size;
            number /= size;
            index
        })
    };
    (0..count).map(case).filter(exists).collect()
}

/// Two fields and their values.
type Pair = (usize, usize, usize, usize);

fn pairs(case: &Case) -> BTreeSet<Pair> {
    let fields = 0..case.len();
    fields.flat_map(|a| (a + 1..case.len()).map(move |b| (a, case[a], b, case[b]))).collect()
}

/// Cases that cover each pair of values that exists: always the one that adds the most.
fn cases() -> Vec<Case> {
    let all: Vec<(Case, BTreeSet<Pair>)> = all().into_iter().map(|case| (case, pairs(&case))).collect();
    let mut missing: BTreeSet<Pair> = all.iter().flat_map(|(_, pairs)| pairs.iter().copied()).collect();
    let mut chosen = Vec::new();
    while !missing.is_empty() {
        let best = all.iter().rev().max_by_key(|(_, pairs)| pairs.intersection(&missing).count()).unwrap();
        missing = missing.difference(&best.1).copied().collect();
        chosen.push(best.0);
    }
    chosen
}

#[test]
fn each_pair_of_values_is_covered_by_few_cases() {
    let cases = cases();
    let covered: BTreeSet<Pair> = cases.iter().flat_map(pairs).collect();
    assert!(all().iter().flat_map(pairs).all(|pair| covered.contains(&pair)));
    assert!(cases.len() <= 26, "{}", cases.len());
    assert!(cases.iter().all(exists));
}

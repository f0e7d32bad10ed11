//! {QEMU} → `receive` → checkpoint → `send` → {QEMU}, in combinations that cover each pair of values.

use std::collections::BTreeSet;

use qemu_peer::{Installed, Version};
use serde_json::json;
use test_support::{TempDir, report, time_limit};

use crate::harness::{
    LIMIT, Multifd, Settings, TEST_LIMIT, UUID, assert_goes_on, assert_same_memory, listen, migrate_away, receive_uri,
    vm,
};

/// One combination; each field is an index into the table of its name below.
type Case = [usize; 9];

/// Where the guest comes from, and where it goes.
const VERSIONS: [Version; 3] = Version::ALL;
/// The machine types, and the first version that has each. The last version has all of them.
const MACHINES: [(&str, Version); 8] = [
    ("pc-i440fx-7.2", Version::V7_2),
    ("pc-q35-7.2", Version::V7_2),
    ("pc-i440fx-8.1", Version::V10_0),
    ("pc-q35-8.2", Version::V10_0),
    ("pc-i440fx-10.0", Version::V10_0),
    ("pc-q35-10.0", Version::V10_0),
    ("pc-i440fx-11.1", Version::V11_1),
    ("pc-q35-11.1", Version::V11_1),
];
const CHANNELS: [u8; 3] = [1, 4, 16];
const COMPRESSIONS: [&str; 3] = ["none", "zlib", "zstd"];
const RETURN_PATHS: [bool; 2] = [true, false];
const UUIDS: [bool; 2] = [false, true];
const TRANSPORTS: [&str; 2] = ["tcp", "unix"];
/// Where the source puts pages of zeros.
const ZERO_PAGES: [ZeroPages; 3] = [ZeroPages::Default, ZeroPages::None, ZeroPages::Other];

/// Values of `zero-page-detection`, which QEMU 7.2 does not have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ZeroPages {
    /// What comes with the machine type.
    Default,
    /// Sent as they are.
    None,
    /// Where this machine type does not have them: in packets before 9.0, on main from then on.
    Other,
}

impl ZeroPages {
    fn value(self, machine: &str) -> Option<&'static str> {
        match self {
            ZeroPages::Default => None,
            ZeroPages::None => Some("none"),
            ZeroPages::Other if machine.ends_with("7.2") || machine.contains("-8.") => Some("multifd"),
            ZeroPages::Other => Some("legacy"),
        }
    }
}

const SIZES: Case = [
    VERSIONS.len(),
    VERSIONS.len(),
    MACHINES.len(),
    CHANNELS.len(),
    COMPRESSIONS.len(),
    RETURN_PATHS.len(),
    UUIDS.len(),
    TRANSPORTS.len(),
    ZERO_PAGES.len(),
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
    // Where it is not to be had, the other two have their own cover.
    let installed: Vec<Installed> =
        [Some(old), Some(new), Installed::require(Version::V11_1)].into_iter().flatten().collect();
    for case in cases(installed.len()).iter().skip(lane).step_by(LANES) {
        let row = describe(case);
        eprintln!("{row}");
        time_limit(TEST_LIMIT, || run(case, &installed));
        report("QEMU -> checkpoint -> QEMU", &format!("{row} ok"));
    }
}

fn run(
    &[from, to, machine, channels, compression, return_path, uuid, transport, zero_pages]: &Case,
    installed: &[Installed],
) {
    let machine = MACHINES[machine].0;
    let settings = Settings {
        channels: CHANNELS[channels],
        compression: COMPRESSIONS[compression],
        return_path: RETURN_PATHS[return_path],
    };
    let tcp = TRANSPORTS[transport] == "tcp";
    let start = |version: usize, incoming| {
        let mut builder = vm(&installed[version], machine);
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
    if let Some(mode) = ZERO_PAGES[zero_pages].value(machine) {
        source.qmp().set_parameters(&[("zero-page-detection", json!(mode))]).unwrap();
    }
    source.wait_passes(3, LIMIT).unwrap();

    let dir = TempDir::new().unwrap();
    let file = dir.join("checkpoint");
    let compression = format!("--compression={}", settings.compression);
    let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), tcp), &file, &["--digest", &compression]);
    migrate_away(&mut source, &uri);
    let received = receive.done();
    assert_eq!(received["machine"], machine);
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

fn describe(&[from, to, machine, channels, compression, return_path, uuid, transport, zero_pages]: &Case) -> String {
    let word = |yes, word| if yes { word } else { "" };
    format!(
        "{:>4} -> {:<4} {:14} {:>2} channels {:4} {:11} {:4} {:4} {}",
        VERSIONS[from].name(),
        VERSIONS[to].name(),
        MACHINES[machine].0,
        CHANNELS[channels],
        COMPRESSIONS[compression],
        word(RETURN_PATHS[return_path], "return path"),
        word(UUIDS[uuid], "uuid"),
        TRANSPORTS[transport],
        ZERO_PAGES[zero_pages].value(MACHINES[machine].0).map(|mode| format!("zero pages {mode}")).unwrap_or_default(),
    )
}

/// Whether the first `versions` versions of QEMU can do it.
fn exists(&[from, to, machine, .., zero_pages]: &Case, versions: usize) -> bool {
    let first = VERSIONS.iter().position(|&version| version == MACHINES[machine].1).expect("a version of the table");
    let has_parameter = VERSIONS[from] != Version::V7_2 || ZERO_PAGES[zero_pages] == ZeroPages::Default;
    (first..versions).contains(&from) && (first..versions).contains(&to) && has_parameter
}

/// All combinations of indices that exist with so many versions.
fn all(versions: usize) -> Vec<Case> {
    let count: usize = SIZES.iter().product();
    let case = |mut number: usize| {
        SIZES.map(|size| {
            let index = number % size;
            number /= size;
            index
        })
    };
    (0..count).map(case).filter(|case| exists(case, versions)).collect()
}

/// Two fields and their values.
type Pair = (usize, usize, usize, usize);

fn pairs(case: &Case) -> BTreeSet<Pair> {
    let fields = 0..case.len();
    fields.flat_map(|a| (a + 1..case.len()).map(move |b| (a, case[a], b, case[b]))).collect()
}

/// Cases that cover each pair of values that exists: always the one that adds the most.
fn cases(versions: usize) -> Vec<Case> {
    let all: Vec<(Case, BTreeSet<Pair>)> = all(versions).into_iter().map(|case| (case, pairs(&case))).collect();
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
    for versions in [2, 3] {
        let cases = cases(versions);
        let covered: BTreeSet<Pair> = cases.iter().flat_map(pairs).collect();
        assert!(all(versions).iter().flat_map(pairs).all(|pair| covered.contains(&pair)));
        assert!(cases.len() <= 29, "{}", cases.len());
        assert!(cases.iter().all(|case| exists(case, versions)));
    }
}

//! `multifd inspect` on the recorded streams of real QEMUs: as they are, and with one thing broken in each.

use std::{
    fs,
    io::Read,
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use test_support::{TempDir, time_limit};

const LIMIT: Duration = Duration::from_secs(180);

const CAPTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../multifd-proto/tests/captures");

/// Unpacks the recordings, one directory each.
fn unpack() -> TempDir {
    unpacked("streams.tar.xz")
}

/// The same of another archive.
fn unpacked(archive: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    let archive = fs::File::open(Path::new(CAPTURES).join(archive)).unwrap();
    let mut tar = liblzma::read::XzDecoder::new(archive);
    let mut head = [0; 512];
    // A tar archive ends with a block of zeros.
    while tar.read_exact(&mut head).is_ok() && head[0] != 0 {
        let text = |range: std::ops::Range<usize>| {
            let field = &head[range];
            let len = field.iter().position(|byte| *byte == 0 || *byte == b' ').unwrap_or(field.len());
            std::str::from_utf8(&field[..len]).unwrap().to_owned()
        };
        let size = usize::from_str_radix(&text(124..136), 8).unwrap();
        let mut bytes = vec![0; size.next_multiple_of(512)];
        tar.read_exact(&mut bytes).unwrap();
        let path = dir.join(text(0..100));
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            continue;
        }
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &bytes[..size]).unwrap();
    }
    dir
}

/// Exit status and report of `multifd inspect`.
fn inspect(path: &Path, more: &[&str]) -> (i32, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_multifd")).arg("inspect").arg(path).arg("--json").args(more).output();
    let output = output.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    (output.status.code().unwrap(), serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}")))
}

#[test]
fn recorded_streams_are_what_an_independent_decoder_found() {
    let dir = unpack();
    let manifest: Value =
        serde_json::from_str(&fs::read_to_string(Path::new(CAPTURES).join("manifest.json")).unwrap()).unwrap();
    let captures = manifest.as_array().unwrap();
    assert_eq!(captures.len(), 9);
    for capture in captures {
        let name = capture["name"].as_str().unwrap();
        let (status, report) = inspect(&dir.join(name), &["--digest"]);
        assert_eq!((status, &report["broken-rule"]), (0, &Value::Null), "{name}");
        let expect = &capture["expect"];
        assert_eq!(report["machine"], capture["machine"], "{name}");
        if capture["channels"] != 0 {
            assert_eq!(report["dialect"], expect["sync_mode"], "{name}");
            assert_eq!(report["main"]["sync-points"], expect["sync_points_on_main"], "{name}");
        }
        for (ours, theirs) in
            [("zero", "zero"), ("page", "page"), ("xbzrle", "xbzrle"), ("compressed", "cpage"), ("flush", "flush")]
        {
            assert_eq!(report["main"][ours], expect["main"][theirs], "{name} {ours}");
        }
        assert_eq!(report["main"]["parts"], expect["main"]["parts"], "{name}");
        assert_eq!(report["device-state-bytes"], expect["device_blob"], "{name}");
        assert_eq!(report["device-state-digest"], expect["devices_sha256"], "{name}");
        assert_eq!(report["vmdescription-bytes"], expect["vmdesc"], "{name}");
        assert_eq!(report["devices-cut"], true, "{name}");
        assert_eq!(report["devices"].as_array().unwrap().len() as u64, expect["devices"].as_u64().unwrap(), "{name}");
        let blocks = report["ram-blocks"].as_array().unwrap();
        assert_eq!(blocks.len(), expect["blocks"].as_array().unwrap().len());
        for (block, expected) in blocks.iter().zip(expect["blocks"].as_array().unwrap()) {
            assert_eq!((&block["name"], &block["size"]), (&expected[0], &expected[1]), "{name}");
            assert_eq!(block["digest"], expect["ram_sha256"][block["name"].as_str().unwrap()], "{name}");
        }
        for (channel, expected) in
            report["channels"].as_array().unwrap().iter().zip(capture["per_channel"].as_array().unwrap())
        {
            for (ours, theirs) in [
                ("id", "id"),
                ("packets", "packets"),
                ("sync", "sync"),
                ("sync-with-pages", "sync_with_data"),
                ("empty", "empty"),
                ("stale-size", "stale_size"),
                ("normal", "normal"),
                ("duplicate", "zero"),
                ("bytes", "bytes"),
                ("payload", "payload"),
            ] {
                assert_eq!(channel[ours], expected[theirs], "{name} {ours}");
            }
        }
    }
}

/// Breaks one file of a recording, and expects the rule that this breaks, with its place.
fn broken(
    dir: &TempDir,
    file: &str,
    change: impl FnOnce(&mut Vec<u8>),
    connection: &str,
    offset: Option<u64>,
    rule: &str,
) {
    let path: PathBuf = dir.join("q10.0-none-2ch").join(file);
    let good = fs::read(&path).unwrap();
    let mut bytes = good.clone();
    change(&mut bytes);
    fs::write(&path, &bytes).unwrap();
    let (status, report) = inspect(&dir.join("q10.0-none-2ch"), &[]);
    fs::write(&path, good).unwrap();
    let found = &report["broken-rule"];
    assert_eq!((status, &report["status"]), (4, &"failed".into()), "{report}");
    assert_eq!(found["connection"], connection, "{found}");
    assert!(found["rule"].as_str().unwrap().contains(rule), "{rule:?} is not in {found}");
    assert!(offset.is_none_or(|offset| found["offset"] == offset), "{offset:?} {found}");
    // What was found before is told all the same; of a channel's first bytes, nothing is before.
    assert!(file == "main.bin" || offset == Some(0) || report["machine"] == "pc-i440fx-10.0", "{report}");
}

#[test]
fn the_first_broken_rule_is_named_with_its_place() {
    const HELLO: usize = 64;
    const HEADER: usize = 1344;
    let dir = unpack();
    // The first packet is a SYNC, the second has pages.
    let second = HELLO + HEADER;
    broken(&dir, "ch0.bin", |bytes| bytes[HELLO] = 0, "channel 0", Some(64), "magic 0x00223344");
    broken(
        &dir,
        "ch0.bin",
        |bytes| bytes[second + 64] = b'q',
        "channel 0",
        Some(second as u64),
        "block \"qc.ram\" is unknown",
    );
    let outside = |bytes: &mut Vec<u8>| bytes[second + 320..][..8].copy_from_slice(&0x80_0000u64.to_be_bytes());
    broken(&dir, "ch0.bin", outside, "channel 0", Some(second as u64), "page at 0x800000 lies outside \"pc.ram\"");
    let half = |bytes: &mut Vec<u8>| bytes.truncate(second + 700);
    broken(&dir, "ch1.bin", half, "channel 1", Some(second as u64), "ended in the middle");
    let without_last_sync = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - HEADER);
    broken(&dir, "ch1.bin", without_last_sync, "main", None, "channel 1 ended without the SYNC packet of round");
    let one_sync_more = |bytes: &mut Vec<u8>| bytes.extend_from_within(HELLO..HELLO + HEADER);
    broken(&dir, "ch1.bin", one_sync_more, "channel 1", None, "SYNC packet after the last sync point on main");
    broken(&dir, "ch1.bin", |bytes| bytes[24] = 0, "channel 0", Some(0), "channel id 0 came twice");
    broken(&dir, "ch1.bin", |bytes| bytes[8] = 1, "channel 1", Some(0), "channel belongs to VM");
    broken(&dir, "main.bin", |bytes| bytes.truncate(1000), "main", None, "ended in the middle");
    let end = fs::metadata(dir.join("q10.0-none-2ch/main.bin")).unwrap().len();
    broken(&dir, "main.bin", |bytes| bytes.push(b'x'), "main", Some(end), "more bytes after the end of the stream");
    broken(&dir, "main.bin", |bytes| bytes[0] = b'q', "main", Some(0), "magic");
    let (status, _) = inspect(&dir.join("q10.0-none-2ch"), &[]);
    assert_eq!(status, 0);
}

#[test]
fn packed_recordings_are_read_as_they_are() {
    use std::io::Write;

    let dir = unpack();
    let recording = dir.join("q10.0-none-2ch");
    let plain = inspect(&recording, &["--digest"]);
    for name in ["main.bin", "ch0.bin", "ch1.bin"] {
        let bytes = fs::read(recording.join(name)).unwrap();
        let mut packed =
            liblzma::write::XzEncoder::new(fs::File::create(recording.join(format!("{name}.xz"))).unwrap(), 1);
        packed.write_all(&bytes).unwrap();
        packed.finish().unwrap();
        fs::remove_file(recording.join(name)).unwrap();
    }
    assert_eq!(inspect(&recording, &["--digest"]), plain);
}

#[test]
fn devices_are_shown_with_their_fields() {
    let dir = unpack();
    let (_, report) = inspect(&dir.join("q10.0-none-2ch"), &["--devices"]);
    let devices = report["devices"].as_array().unwrap();
    let device = |name: &str| devices.iter().find(|device| device["name"] == name).unwrap();
    // "running", padded with zeros, and its length.
    assert!(device("globalstate")["fields"]["runstate"].as_str().unwrap().starts_with("72756e6e696e6700"));
    assert!(device("cpu")["fields"]["env.eip"].is_number(), "{}", device("cpu"));
}

#[test]
fn what_is_not_there_is_named() {
    let dir = unpack();
    let recording = dir.join("q7.2-none-2ch");
    for (path, more, error) in [
        (dir.join("none"), &[][..], "No such file or directory"),
        (dir.path().to_owned(), &[], "there is no main.bin"),
        (recording.clone(), &["--extract", "vga.ram", "--output", "/dev/null/x"], "there is no RAM block \"vga.ram\""),
    ] {
        let (status, report) = inspect(&path, more);
        assert_eq!(status, 1, "{report}");
        assert!(report["error"].as_str().unwrap().contains(error), "{report}");
    }
    let (status, _) = inspect(&recording, &["--extract", "pc.ram"]);
    assert_eq!(status, 2, "--extract needs --output");
    let out = dir.join("bios");
    let (status, report) =
        inspect(&recording, &["--digest", "--extract", "pc.bios", "--output", out.to_str().unwrap()]);
    assert_eq!(status, 0, "{report}");
    let extracted = fs::metadata(&out).unwrap();
    assert_eq!((extracted.len(), extracted.permissions().mode() & 0o777), (256 << 10, 0o600));
    let (status, report) = inspect(&recording, &["--extract", "pc.bios", "--output", out.to_str().unwrap()]);
    assert_eq!(status, 1, "it must not be replaced: {report}");
}

/// Makes a checkpoint at `path` with `claimed` bytes of guest memory that are all zero. Skips and returns `false` where no file can be so
/// long.
fn claim(path: &Path, claimed: u64) -> bool {
    use multifd_proto::{BlockName, encoder::MainEncoder, mapped_ram::BlockHeader, ram::BlockEntry};
    let mut out = MainEncoder::default();
    out.header().configuration("multifd").config_capabilities(&["mapped-ram"]).ram_start(1, claimed);
    let mut entry = BlockEntry::new(BlockName::new("ram").unwrap(), claimed);
    let header_end = (out.bytes.len() + 1 + 3 + 8 + BlockHeader::LEN) as u64;
    let header = BlockHeader::place(header_end, claimed, 4096);
    entry.mapped_ram = Some(header);
    out.block(&entry);
    let file = fs::File::create(path).unwrap();
    file.write_all_at(&out.bytes, 0).unwrap();
    let mut end = MainEncoder::default();
    end.eos().footer(1).ram_part(1, true).eos().footer(1).eof();
    if let Err(error) = file.write_all_at(&end.bytes, header.next_entry(claimed)) {
        test_support::skip(&format!("no sparse file of {} TiB here: {error}", claimed >> 40));
        return false;
    }
    true
}

/// A file of 8 KB that claims 16 TiB of guest memory ended the process with an abort.
#[test]
fn a_file_that_claims_more_memory_than_there_may_be_is_an_error() {
    let dir = TempDir::new().unwrap();
    let path = dir.join("x");
    if !claim(&path, 15 << 40) {
        return;
    }
    let command = format!("ulimit -v 300000; exec '{}' inspect '{}'", env!("CARGO_BIN_EXE_multifd"), path.display());
    let output = Command::new("sh").args(["-c", &command]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("no room for an array of"), "{stderr}");
}

#[test]
fn recorded_switches_to_postcopy_are_understood() {
    let dir = unpacked("postcopy.tar.xz");
    let manifest: Value =
        serde_json::from_str(&fs::read_to_string(Path::new(CAPTURES).join("postcopy.json")).unwrap()).unwrap();
    for capture in manifest.as_array().unwrap() {
        let (name, expect) = (capture["name"].as_str().unwrap(), &capture["expect"]);
        let (status, report) = inspect(&dir.join(name), &["--digest"]);
        assert_eq!((status, &report["broken-rule"]), (0, &Value::Null), "{name}");
        assert_eq!((&report["mode"], &report["complete"]), (&"postcopy".into(), &true.into()), "{name}");
        assert_eq!(
            report["channels"].as_array().unwrap().len() as u64,
            capture["channels"].as_u64().unwrap(),
            "{name}"
        );
        for (ours, theirs) in [
            ("discarded-pages", "discarded"),
            ("package-bytes", "package"),
            ("package-pings", "package_pings"),
            ("main-pages", "main_pages"),
            ("preempt-pages", "preempt_pages"),
            ("preempt-ended", "preempt_ended"),
        ] {
            assert_eq!(report["postcopy"][ours], expect[theirs], "{name} {ours}");
        }
        assert_eq!(report["device-state-bytes"], expect["devices"], "{name}");
        assert_eq!(report["device-state-digest"], expect["devices_sha256"], "{name}");
        for block in report["ram-blocks"].as_array().unwrap() {
            if let Some(digests) = expect["ram_sha256"].as_object() {
                assert_eq!(block["digest"], digests[block["name"].as_str().unwrap()], "{name}");
            }
        }
    }
}

/// A page that is missing, one too many, and a connection that is not there.
#[test]
fn a_switch_with_one_thing_broken_is_noticed() {
    let dir = unpacked("postcopy.tar.xz");
    let recording = dir.join("q10.0-preempt-0ch");
    let preempt = recording.join("preempt.bin");
    let whole = fs::read(&preempt).unwrap();
    let rule = |bytes: Option<&[u8]>| {
        match bytes {
            Some(bytes) => fs::write(&preempt, bytes).unwrap(),
            None => fs::remove_file(&preempt).unwrap(),
        }
        let (status, report) = inspect(&recording, &[]);
        assert_eq!(status, 4, "{report}");
        report["broken-rule"]["rule"].as_str().unwrap().to_owned()
    };
    // A word with CONTINUE and its page.
    let last = whole.len() - 8 - 4096;
    assert!(
        rule(Some(&whole[..last]))
            .contains("1 of the 513 pages that were discarded at the switch to postcopy are missing")
    );
    assert!(
        rule(Some(&[&whole[..], &whole[last..]].concat())).contains("is not one that was discarded and is missing")
    );
    assert!(rule(Some(&whole[..whole.len() - 1])).contains("ended in the middle"));
    assert!(rule(None).contains("321 of the 513 pages"));
}

/// The signal ended it, without a status or a report of its own, and what it had extracted of a guest's memory stayed there.
#[test]
fn an_interrupted_inspection_leaves_nothing_behind_and_says_so() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let path = dir.join("x");
        // Takes minutes.
        if !claim(&path, 1 << 40) {
            return;
        }
        let to = dir.join("out");
        let extracts = |dir: &Path, _: u32| fs::read_dir(dir).unwrap().count() == 2;
        let digests = |_: &Path, id: u32| {
            // It may not have been there yet.
            let tasks = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
            tasks.into_iter().any(|task| fs::read(task.path().join("comm")).is_ok_and(|name| name == b"digest\n"))
        };
        let to = to.to_str().unwrap();
        type IsAtWork = fn(&Path, u32) -> bool;
        for (more, is_at_work) in
            [(&["--extract", "ram", "-o", to][..], extracts as IsAtWork), (&["--digest"], digests)]
        {
            for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
                // Whatever started the tests may ignore it, as nohup does.
                let mut command = Command::new("env");
                command.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_multifd"), "inspect"]);
                command.arg(&path).arg("--json").args(more);
                let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
                while !is_at_work(dir.path(), child.id()) {
                    thread::sleep(Duration::from_millis(5));
                }
                kill_process(Pid::from_child(&child), signal).unwrap();
                let output = child.wait_with_output().unwrap();
                assert_eq!(output.status.code(), Some(3), "{more:?} {signal:?}");
                let report: Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(report["status"], "cancelled", "{report}");
                let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
                assert_eq!(left, ["x"], "{more:?}");
            }
        }
    });
}

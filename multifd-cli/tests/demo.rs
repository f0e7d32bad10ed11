//! `multifd demo`: a guest moves between two processes, and nothing is lost.

mod common;

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use common::{LIMIT, exit_code, json, kvm_or_skip, multifd, number, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use test_support::{TempDir, skip, time_limit};

/// Runs the demo with a small guest, which has to arrive whole.
#[track_caller]
fn moves(args: &str) -> Value {
    let size = if args.contains("--memory") { "" } else { "--memory 64MiB --working-set 16MiB" };
    let output = time_limit(LIMIT, || run(&format!("demo --json {size} {args}")));
    let report = json(&output.stdout);
    assert_eq!(exit_code(&output), 0, "{report} {}", String::from_utf8_lossy(&output.stderr));
    assert_arrived(&report);
    report
}

#[track_caller]
fn assert_arrived(report: &Value) {
    assert_eq!(report["status"], "completed");
    assert_eq!(number(report, "/verified/pages-different"), 0.0);
    assert_eq!(number(report, "/verified/guest-errors"), 0.0);
    let passes = ["/verified/guest-passes-before", "/verified/guest-passes-after"].map(|path| number(report, path));
    assert!(passes[1] >= passes[0] + 2.0, "{passes:?}");
    assert!(number(report, "/downtime") <= number(report, "/total-time"), "{report}");
    assert!(number(report, "/ram/transferred") > 0.0);
    let rounds = report["rounds"].as_array().unwrap();
    assert_eq!(rounds.len() as f64, number(report, "/ram/dirty-sync-count"));
    let running: Vec<bool> = rounds.iter().map(|round| round["guest-running"].as_bool().unwrap()).collect();
    assert!(running.len() >= 2 && running[..running.len() - 1].iter().all(|&running| running), "{rounds:?}");
    assert!(!running[running.len() - 1], "the guest is paused in the last round only");
    let channel_bytes: f64 = report["channel-bytes"].as_array().unwrap().iter().filter_map(Value::as_f64).sum();
    assert_eq!(number(report, "/ram/multifd-bytes"), channel_bytes);
}

/// Round 0 sent memory that was hardly written to.
#[test]
fn the_guest_has_made_a_pass_before_it_is_migrated() {
    let report = moves("--guest process --after 0 --write-rate 50MB/s");
    assert!(number(&report, "/verified/guest-passes-before") >= 1.0, "{report}");
}

#[test]
fn a_process_guest_moves_over_each_transport() {
    for transport in ["--transport tcp", "--transport unix", "--address localhost"] {
        let report = moves(&format!("--guest process --audit {transport}"));
        assert_eq!(number(&report, "/audit/stale-writes"), 0.0);
        assert_eq!(report["guest"], "process");
        assert!(["uffd-wp", "bitmap"].contains(&report["dirty-log"].as_str().unwrap()), "{report}");
        assert_eq!(number(&report, "/channels"), 4.0);
        // 64 MiB of RAM and 2 MiB of the guest's own.
        assert_eq!(number(&report, "/verified/pages-compared"), 16384.0 + 512.0);
        assert!(number(&report, "/verify-time") > 0.0);
        // What the guest saw itself ends with its first page there; digests are in neither figure.
        assert!(number(&report, "/verified/guest-pause") > 0.0, "{report}");
        assert!(number(&report, "/verified/guest-longest-wait") > 0.0, "{report}");
    }
}

#[test]
fn a_kvm_guest_moves_over_each_transport() {
    if kvm_or_skip() {
        for transport in ["--transport tcp", "--transport unix"] {
            assert_eq!(moves(&format!("--guest kvm {transport}"))["guest"], "kvm");
        }
    }
}

#[test]
fn a_guest_moves_over_ipv6() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return skip("no IPv6 on this machine");
    }
    moves("--ipv6");
    moves("--address [::1]");
}

#[test]
fn a_process_guest_moves_with_any_number_of_channels_and_at_full_speed() {
    for channels in [1, 16] {
        let report = moves(&format!("--guest process --channels {channels} --write-rate max"));
        assert_eq!(report["channel-bytes"].as_array().unwrap().len(), channels);
    }
}

#[test]
fn a_kvm_guest_moves_with_any_number_of_channels_and_at_full_speed() {
    if kvm_or_skip() {
        for channels in [1, 16] {
            moves(&format!("--guest kvm --channels {channels} --write-rate max"));
        }
    }
}

#[test]
fn a_kvm_guest_of_several_vcpus_moves_with_either_log() {
    if kvm_or_skip() {
        for cpus in [1, 2, 4, 8] {
            for log in ["kvm-dirty-log", "kvm-dirty-ring"] {
                let report = moves(&format!("--guest kvm --cpus {cpus} --dirty-log {log} --write-rate 20MB/s"));
                assert_eq!(report["dirty-log"], log, "{cpus} vCPUs");
            }
        }
    }
}

#[test]
fn a_guest_moves_in_every_mode() {
    for (mode, name, value) in [
        ("--sync per-section", "dialect", "per-section"),
        ("--zero-pages legacy", "dialect", "per-round"),
        ("--zero-pages none", "dialect", "per-round"),
        ("--compression zlib", "compression", "zlib"),
        ("--compression zstd --compression-level 3", "compression", "zstd"),
        ("--cpus 2", "compression", "none"),
        ("--dirty-log bitmap", "dirty-log", "bitmap"),
    ] {
        assert_eq!(moves(&format!("--guest process {mode}"))[name], value, "{mode}");
    }
}

/// The guest's words are all different, so they do not compress.
#[test]
fn a_guest_that_does_not_compress_is_sent_as_it_is_and_the_report_says_why() {
    let options = "--compression auto --max-bandwidth 50MB/s --write-rate 5MB/s --channels 2";
    let report = moves(&format!("--guest process --audit {options}"));
    assert_eq!(report["compression"], "auto");
    assert_eq!(number(&report, "/audit/stale-writes"), 0.0);
    let channels = report["auto-compression"].as_array().unwrap();
    assert_eq!(channels.len(), 2);
    for channel in channels {
        let [plain, compressed] = ["/packets-plain", "/packets-compressed"].map(|path| number(channel, path));
        assert!(compressed > 0.0 && plain > compressed, "it was tried: {channel}");
        assert!(number(channel, "/ratio") < 1.1 && channel["compresses"] == false, "{channel}");
        let reason = channel["reason"].as_str().unwrap();
        assert!(reason.starts_with("sent as they are") && reason.contains("to compress"), "{reason}");
    }
    assert!(moves("--guest process --compression zstd").get("auto-compression").is_none(), "there was no choice");
}

#[test]
fn zero_copy_is_counted_and_a_guest_that_writes_arrives_whole() {
    for options in ["", "--sync per-section --zero-pages none", "--max-bandwidth 100MB/s --downtime-limit 50ms"] {
        let report = moves(&format!("--guest process --audit --zero-copy --write-rate max {options}"));
        assert_eq!(number(&report, "/audit/stale-writes"), 0.0);
        let [sends, copied] = ["/zero-copy/sends", "/zero-copy/copied"].map(|path| number(&report, path));
        assert!(sends > 0.0, "{report}");
        // Within this machine the kernel copies.
        assert!(copied > 0.0 && copied <= sends, "{report}");
        assert!(number(&report, "/ram/dirty-sync-missed-zero-copy") > 0.0, "{report}");
        assert!(report.pointer("/zero-copy/refused").is_none(), "{report}");
    }
    assert!(moves("--guest process").get("zero-copy").is_none(), "it was not asked for");
}

#[test]
fn zero_copy_falls_back_over_unix_sockets_and_says_why() {
    let args = "demo --json --guest process --memory 16MiB --working-set 4MiB --zero-copy --transport unix";
    let output = time_limit(LIMIT, || run(args));
    let (report, said) = (json(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(exit_code(&output), 0, "{report} {said}");
    assert_arrived(&report);
    assert_eq!(number(&report, "/zero-copy/sends"), 0.0);
    assert!(report["zero-copy"]["refused"].as_str().unwrap().contains("not for this kind of socket"), "{report}");
    assert_eq!(said.matches("zero-copy is not possible here, pages are copied").count(), 1, "{said}");
}

/// A limit on locked memory below one packet: the kernel takes hardly any send without a copy.
#[test]
fn zero_copy_falls_back_where_locked_memory_is_limited_and_says_why() {
    let has = |program: &str| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !has("prlimit") || (rustix::process::getuid().is_root() && !has("setpriv")) {
        return skip("prlimit or setpriv is not installed");
    }
    let mut command = Command::new("prlimit");
    command.args(["--memlock=65536:65536", "--"]);
    if rustix::process::getuid().is_root() {
        // Root's limit does not count.
        command.args(["setpriv", "--inh-caps=-ipc_lock", "--bounding-set=-ipc_lock"]);
    }
    command.arg(env!("CARGO_BIN_EXE_multifd"));
    command.args(["demo", "--json", "--guest=process", "--memory=64MiB", "--working-set=16MiB", "--zero-copy"]);
    let output = time_limit(LIMIT, || command.output().unwrap());
    let (report, said) = (json(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(exit_code(&output), 0, "{report} {said}");
    assert_arrived(&report);
    assert!(number(&report, "/zero-copy/no-room") > 0.0, "{report}");
    assert!(number(&report, "/zero-copy/copied") >= number(&report, "/zero-copy/no-room"), "{report}");
    assert_eq!(said.matches("ulimit -l").count(), 1, "{said}");
}

#[test]
fn without_digests_the_guest_still_checks_itself() {
    let report = moves("--guest process --no-verify");
    assert_eq!(number(&report, "/verified/pages-compared"), 0.0);
    assert!(report.get("verify-time").is_none(), "{report}");
}

#[test]
fn the_result_for_a_person_names_guest_rounds_downtime_and_verdict() {
    let output = time_limit(LIMIT, || run("demo --memory 16MiB --guest process"));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    for part in
        ["a process guest", "16MiB", "expected downtime", "pause", "downtime", "0 of 4,608 pages differ", "0 errors"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("zero-copy"), "{text}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "quiet when not a terminal");
    let output = time_limit(LIMIT, || run("demo --memory 16MiB --guest process --zero-copy"));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("zero-copy   ") && text.contains("sends were copied"), "{text}");
}

#[test]
fn progress_is_a_line_per_round_where_it_is_asked_for() {
    let output = time_limit(LIMIT, || run("demo --memory 16MiB --guest process --progress always --json"));
    let report = json(&output.stdout);
    let lines = String::from_utf8(output.stderr).unwrap();
    assert_eq!(lines.lines().count(), 1 + report["rounds"].as_array().unwrap().len(), "{lines}");
    assert!(lines.contains("round") && !lines.contains('\x1b'), "{lines}");
}

#[test]
fn a_guest_that_writes_faster_than_the_link_sends_does_not_converge() {
    let args = "demo --json --guest process --memory 8MiB --working-set 4MiB --write-rate max --max-bandwidth 20MB/s \
                --switchover-bandwidth 20MB/s --downtime-limit 1ms --max-rounds 3 --no-throttle";
    let output = time_limit(LIMIT, || run(args));
    let report = json(&output.stdout);
    assert_eq!(exit_code(&output), 5, "{report}");
    assert_eq!(report["status"], "failed");
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("does not converge") && error.contains("3 rounds"), "{error}");
    assert_eq!(report["rounds"].as_array().unwrap().len(), 3);
    // The guest runs on where it was.
    assert!(number(&report, "/guest-passes-after") > number(&report, "/guest-passes-before"), "{report}");
    assert_eq!(number(&report, "/guest-errors"), 0.0);
}

#[test]
fn a_guest_is_slowed_down_where_it_has_to_be() {
    let report = moves(
        "--guest process --memory 16MiB --working-set 8MiB --write-rate max --max-bandwidth 60MB/s --downtime-limit 40ms \
         --switchover-bandwidth 60MB/s",
    );
    assert!(number(&report, "/cpu-throttle-percentage") >= 20.0, "{report}");
}

#[test]
fn an_address_of_another_machine_is_reported_by_the_demo() {
    let output = time_limit(LIMIT, || run("demo --json --guest process --memory 1MiB --address 192.0.2.1"));
    assert_eq!(exit_code(&output), 1);
    let report = json(&output.stdout);
    assert!(report["error"].as_str().unwrap().contains("192.0.2.1"), "{report}");
}

/// The processes that the demo with id `parent` started.
fn child_ids(parent: u32) -> Vec<i32> {
    let wanted = format!("--child-of\0{parent}\0");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    // A process may end while we look.
    let ours = processes.filter(|process| {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&wanted)
    });
    ours.filter_map(|process| process.file_name().to_str()?.parse().ok()).collect()
}

fn children(parent: u32) -> usize {
    child_ids(parent).len()
}

fn wait_for_children(parent: u32, count: usize) {
    while children(parent) != count {
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_interrupted_demo_ends_both_processes() {
    time_limit(LIMIT, || {
        for (signal, exit) in [(Signal::INT, Some(3)), (Signal::TERM, Some(3)), (Signal::KILL, None)] {
            let mut command = multifd("demo --json --guest process --memory 64MiB --max-bandwidth 5MB/s");
            let demo = command.stdout(Stdio::piped()).spawn().unwrap();
            let id = demo.id();
            wait_for_children(id, 2);
            thread::sleep(Duration::from_millis(300));
            kill_process(Pid::from_raw(id as i32).unwrap(), signal).unwrap();
            let output = demo.wait_with_output().unwrap();
            assert_eq!(output.status.code(), exit);
            if exit.is_some() {
                assert_eq!(json(&output.stdout)["status"], "cancelled");
                assert_eq!(children(id), 0, "they ended before the demo did");
            }
            wait_for_children(id, 0);
        }
    });
}

/// It waited for them for as long as they were stopped.
#[test]
fn a_second_interrupt_ends_a_demo_whose_processes_do_not_end() {
    time_limit(LIMIT, || {
        let mut command = multifd("demo --json --guest process --memory 64MiB --max-bandwidth 5MB/s");
        let demo = command.stdout(Stdio::piped()).spawn().unwrap();
        let id = demo.id();
        wait_for_children(id, 2);
        for child in child_ids(id) {
            kill_process(Pid::from_raw(child).unwrap(), Signal::STOP).unwrap();
        }
        for _ in 0..2 {
            // Two that come at once are one.
            thread::sleep(Duration::from_millis(300));
            kill_process(Pid::from_raw(id as i32).unwrap(), Signal::TERM).unwrap();
        }
        let output = demo.wait_with_output().unwrap();
        assert_eq!((exit_code(&output), &json(&output.stdout)["status"]), (3, &"cancelled".into()));
        assert_eq!(children(id), 0);
    });
}

/// A plain container, or a user without rights: no /dev/kvm.
#[test]
fn an_ordinary_user_needs_no_rights() {
    if !rustix::process::getuid().is_root() {
        let report = moves("");
        assert!(["kvm", "process"].contains(&report["guest"].as_str().unwrap()));
        return;
    }
    let has_setpriv = Command::new("setpriv").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !has_setpriv {
        return skip("setpriv is not installed, and the test runs as root");
    }
    // The build directory may be closed to others.
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let program = dir.join("multifd");
    fs::copy(env!("CARGO_BIN_EXE_multifd"), &program).unwrap();
    for dirty_log in ["auto", "bitmap"] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]);
        command.arg(&program).args(["demo", "--json", "--memory", "32MiB", "--dirty-log", dirty_log]);
        if dirty_log == "bitmap" {
            command.args(["--guest", "process"]);
        }
        let output = time_limit(LIMIT, || command.env("TMPDIR", "/tmp").output().unwrap());
        let report = json(&output.stdout);
        assert_eq!(exit_code(&output), 0, "{report} {}", String::from_utf8_lossy(&output.stderr));
        assert_arrived(&report);
        let kvm_is_open_to_all = fs::metadata("/dev/kvm").is_ok_and(|kvm| kvm.permissions().mode() & 0o006 == 0o006);
        if !kvm_is_open_to_all {
            assert_eq!(report["guest"], "process", "{report}");
        }
    }
}

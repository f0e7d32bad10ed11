//! The command line as scripts see it: exit statuses, messages, and where output goes.

mod common;

use std::fs;

use common::{LIMIT, exit_code, json, run};
use test_support::{TempDir, time_limit};

#[test]
fn a_wrong_value_is_a_usage_error_that_names_option_value_and_what_was_expected() {
    for (option, value, right) in [
        ("--channels", "-1", "0 to 255"),
        ("--channels", "256", "0 to 255"),
        ("--channels", "four", "0 to 255"),
        ("--compression", "lz4", "auto"),
        ("--compression-level", "21", "20"),
        ("--zero-pages", "all", "legacy"),
        ("--sync", "always", "per-section"),
        ("--max-bandwidth", "200MB", "200MB/s"),
        ("--max-bandwidth", "0B/s", "1B/s"),
        ("--max-bandwidth", "200", "128M"),
        ("--downtime-limit", "300", "300ms"),
        ("--max-time", "5", "0 for no limit"),
        ("--connect-timeout", "soon", "expected a time"),
        ("--memory", "1000000", "4KiB"),
        ("--memory", "lots", "512MiB"),
        ("--working-set", "4KiB", "two pages"),
        ("--working-set", "1GiB", "--memory"),
        ("--write-rate", "fast", "max"),
        ("--guest", "xen", "kvm"),
        ("--progress", "sometimes", "never"),
        ("--cpus", "65", "64"),
    ] {
        for verb in ["guest", "demo"] {
            let output = time_limit(LIMIT, || run(&format!("{verb} {option}={value}")));
            let message = String::from_utf8_lossy(&output.stderr);
            assert_eq!(exit_code(&output), 2, "{option} {value}: {message}");
            assert_eq!(output.stdout, b"");
            assert!(message.contains(option) && message.contains(right), "{option} {value}: {message}");
            let shown = if value == "1GiB" || value == "4KiB" { value } else { &format!("'{value}'") };
            assert!(message.contains(shown), "{option} {value}: {message}");
        }
    }
}

#[test]
fn zero_copy_together_with_compression_is_a_usage_error() {
    for verb in ["demo", "guest", "send no-file tcp:localhost:1"] {
        for compression in ["zlib", "zstd", "auto"] {
            let output = time_limit(LIMIT, || run(&format!("{verb} --zero-copy --compression {compression}")));
            let message = String::from_utf8_lossy(&output.stderr);
            assert_eq!(exit_code(&output), 2, "{message}");
            assert!(message.contains("--zero-copy") && message.contains(compression), "{message}");
        }
    }
    let output = time_limit(LIMIT, || run("send no-file tcp:localhost:1 --zero-copy --compression none"));
    assert_eq!(exit_code(&output), 1, "only the file is missing: {output:?}");
}

#[test]
fn a_compression_level_without_its_compression_or_out_of_its_range_is_a_usage_error() {
    for verb in ["demo", "guest", "send no-file tcp:localhost:1"] {
        for (options, expected) in [
            ("--compression-level 3", "--compression zlib"),
            ("--compression none --compression-level 3", "no effect"),
            ("--compression zlib --compression-level 10", "expected 0 to 9 for zlib"),
            ("--compression zstd --compression-level 0", "expected 1 to 20 for zstd"),
            ("--compression auto --compression-level 0", "expected 1 to 20 for auto"),
            ("--compression zstd --compression-level 21", "20"),
        ] {
            let output = time_limit(LIMIT, || run(&format!("{verb} {options}")));
            let message = String::from_utf8_lossy(&output.stderr);
            assert_eq!(exit_code(&output), 2, "{verb} {options}: {message}");
            assert!(message.contains("--compression-level") && message.contains(expected), "{options}: {message}");
        }
        if verb.starts_with("send") {
            let output = time_limit(LIMIT, || run(&format!("{verb} --compression zlib --compression-level 9")));
            assert_eq!(exit_code(&output), 1, "only the file is missing: {output:?}");
        }
    }
}

/// An option that is silently ignored lets its user believe in something that is not so.
#[test]
fn an_option_that_would_have_no_effect_is_a_usage_error() {
    for (args, option) in [
        ("demo --transport unix --ipv6", "--ipv6"),
        ("demo --transport unix --address localhost", "--address"),
        ("guest --audit", "--incoming"),
        ("guest --after 1s", "--migrate-to"),
        ("guest --incoming tcp::0 --after 1s", "--after"),
        ("inspect no-file --output no-other", "--extract"),
    ] {
        let output = time_limit(LIMIT, || run(args));
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(exit_code(&output), 2, "{args}: {message}");
        assert!(message.contains(option), "{args}: {message}");
    }
}

#[test]
fn a_uuid_that_is_none_is_a_usage_error() {
    for verb in ["send no-file tcp:localhost:1", "receive tcp:localhost:0 -o no-file"] {
        let output = time_limit(LIMIT, || run(&format!("{verb} --uuid 1234")));
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(exit_code(&output), 2, "{message}");
        assert!(
            message.contains("--uuid") && message.contains("'1234'") && message.contains("expected a UUID"),
            "{message}"
        );
    }
}

#[test]
fn a_wrong_uri_is_a_usage_error() {
    for (option, value, right) in [
        ("--incoming", "tcp:localhost", "tcp:HOST:PORT"),
        ("--migrate-to", "localhost:4444", "unix:PATH"),
        ("--migrate-to", "tcp:::1:4444", "brackets"),
        ("--qmp", "tcp:localhost:1", "unix:PATH"),
    ] {
        let output = time_limit(LIMIT, || run(&format!("guest {option} {value}")));
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(exit_code(&output), 2, "{message}");
        assert!(message.contains(option) && message.contains(value) && message.contains(right), "{message}");
    }
}

#[test]
fn a_usage_error_is_one_json_object_where_json_was_asked_for() {
    let output = time_limit(LIMIT, || run("demo --json --channels=256"));
    assert_eq!(exit_code(&output), 2);
    let report = json(&output.stdout);
    assert_eq!(report["status"], "failed");
    assert!(report["error"].as_str().unwrap().contains("--channels"), "{report}");
}

#[test]
fn help_goes_to_stdout_and_is_no_error() {
    for args in ["--help", "demo --help", "guest --help", "--version"] {
        let output = time_limit(LIMIT, || run(args));
        assert_eq!(exit_code(&output), 0, "{args}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args}");
    }
}

#[test]
fn a_failure_is_one_json_object_and_status_1() {
    let args = "guest --guest process --memory 1MiB --json --after 0s --run-for 0s --migrate-to";
    for uri in ["unix:/nonexistent/socket", "file:/tmp/x"] {
        let output = time_limit(LIMIT, || run(&format!("{args} {uri}")));
        assert_eq!(exit_code(&output), 1);
        let report = json(&output.stdout);
        assert_eq!(report["status"], "failed");
        assert!(report["error"].as_str().unwrap().contains(uri), "{report}");
    }
    let output = time_limit(LIMIT, || run("guest --memory 1MiB --json --incoming unix:/nonexistent/socket"));
    assert_eq!(exit_code(&output), 1);
    assert!(json(&output.stdout)["error"].as_str().unwrap().contains("/nonexistent/socket"));
}

#[test]
fn without_json_the_result_is_on_stdout_and_the_error_on_stderr() {
    let output = time_limit(LIMIT, || run("guest --guest process --memory 1MiB --write-rate max --run-for 100ms"));
    assert_eq!(exit_code(&output), 0, "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("found 0 errors"), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    let uri = "unix:/nonexistent/socket";
    let output = time_limit(LIMIT, || {
        run(&format!("guest --guest process --memory 1MiB --after 0s --run-for 0s --quiet --migrate-to {uri}"))
    });
    assert_eq!(exit_code(&output), 1);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.starts_with("multifd: ") && message.contains(uri) && message.lines().count() == 1, "{message}");
}

#[test]
fn what_needs_channels_is_refused_without_them() {
    for (args, right) in [
        ("demo --channels 0 --compression zstd", "--channels 1"),
        ("send no-file tcp:localhost:1 --channels 0 --compression auto", "--channels 1"),
        ("restore no-file unix:/no/socket --channels 0", "--channels 1"),
    ] {
        let output = time_limit(LIMIT, || run(args));
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(exit_code(&output), 2, "{args}: {message}");
        assert!(message.contains(right), "{args}: {message}");
    }
}

/// `receive --output F --report F` took a VM, told its source so, and put the report in its place: the VM was nowhere. `send F --metrics
/// file:F` did that to a checkpoint before it was sent.
#[test]
fn a_file_that_is_written_over_must_be_none_of_the_others() {
    let dir = TempDir::new().unwrap();
    let at = dir.path().display();
    fs::write(dir.join("f"), "precious").unwrap();
    std::os::unix::fs::symlink("f", dir.join("link")).unwrap();
    std::os::unix::fs::symlink("new", dir.join("dangling")).unwrap();
    for (args, options) in [
        (format!("receive unix:{at}/s --output {at}/new --report {at}/new"), ["--report <FILE>", "--output <FILE>"]),
        (
            format!("receive unix:{at}/s --output {at}/new --report {at}/dangling"),
            ["--report <FILE>", "--output <FILE>"],
        ),
        (format!("receive file:{at}/f --output {at}/new --metrics file:{at}/link"), ["--metrics <TARGET>", "<URI>"]),
        (
            format!("checkpoint unix:{at}/q --output {at}/new --metrics file:{at}/./new"),
            ["--metrics <TARGET>", "--output <FILE>"],
        ),
        (format!("send {at}/f unix:{at}/s --report {at}/link"), ["--report <FILE>", "<FILE>"]),
        (format!("send {at}/link unix:{at}/s --metrics file:{at}/f"), ["--metrics <TARGET>", "<FILE>"]),
        (format!("send {at}/f unix:{at}/s --postcopy --record-faults {at}/f"), ["--record-faults <LIST>", "<FILE>"]),
        (format!("send {at}/f unix:{at}/s --postcopy --report {at}/f.postcopy"), ["--report <FILE>", "--state <PATH>"]),
        (
            format!("send {at}/f unix:{at}/s --recover --state {at}/n --report {at}/n"),
            ["--report <FILE>", "--state <PATH>"],
        ),
        (format!("restore {at}/f unix:{at}/q --report {at}/f"), ["--report <FILE>", "<FILE>"]),
        (
            format!("restore {at}/f unix:{at}/q --postcopy --report {at}/f.postcopy"),
            ["--report <FILE>", "--state <PATH>"],
        ),
        (format!("serve {at}/f --listen unix:{at}/s --report {at}/f"), ["--report <FILE>", "<FILE>"]),
        (format!("demo --report {at}/r --metrics file:{at}/r"), ["--metrics <TARGET>", "--report <FILE>"]),
    ] {
        let output = run(&args);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(exit_code(&output), 2, "{args}: {message}");
        let [written, other] = options.map(|option| format!("'{option}'"));
        assert!(
            message.contains(&format!("the option {written} writes over")) && message.contains(&other),
            "{args}: {message}"
        );
    }
    assert_eq!(fs::read(dir.join("f")).unwrap(), b"precious");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing was made");
}

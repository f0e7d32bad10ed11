//! As many channels as there may be, with as many open files as a process has by default.

mod common;

use std::process::{Command, Output, Stdio};

use common::{LIMIT, exit_code, json, number, run};
use test_support::{TempDir, time_limit};

/// The command with `args`, and its children, with at most `files` open files.
fn with_files(files: u32, args: &str) -> Output {
    let mut command = Command::new("prlimit");
    command.arg(format!("--nofile={files}:{files}")).arg(env!("CARGO_BIN_EXE_multifd"));
    command.args(args.split_whitespace()).stdin(Stdio::null()).output().unwrap()
}

const SMALL: &str =
    "demo --guest process --memory 8MiB --working-set 1MiB --write-rate 10MB/s --after 1ms --no-verify --json";

#[test]
fn a_guest_moves_over_255_channels_within_the_default_limit_of_files() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let tls = dir.join("tls").display().to_string();
        assert_eq!(exit_code(&run(&format!("tls-init {tls} --host 127.0.0.1 --host guests.example"))), 0);
        for transport in ["tcp".to_owned(), "unix".to_owned(), format!("tcp --tls-dir {tls}")] {
            let output = with_files(1024, &format!("{SMALL} --channels 255 --transport {transport}"));
            assert_eq!(exit_code(&output), 0, "{transport}: {output:?}");
            assert_eq!(number(&json(&output.stdout), "/channels"), 255.0, "{transport}");
        }
    });
}

/// It said that there are too many open files, and not what to do.
#[test]
fn too_few_files_for_the_channels_are_named_with_what_helps() {
    time_limit(LIMIT, || {
        for transport in ["tcp", "unix"] {
            let output =
                with_files(100, &format!("{SMALL} --channels 255 --connect-timeout 1s --transport {transport}"));
            assert_eq!(exit_code(&output), 1, "{transport}: {output:?}");
            let error = json(&output.stdout)["error"].to_string();
            assert!(error.contains("open files") && error.contains("ulimit -n"), "{transport}: {error}");
        }
    });
}

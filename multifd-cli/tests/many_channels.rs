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

/// A destination that could not accept all channels waited for 30 s, and its source and guest with it.
#[test]
fn a_destination_with_too_few_files_says_so_without_waiting_for_the_channels() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (uri, socket) = (format!("unix:{}", dir.join("s").display()), dir.join("s"));
        let small = "--guest process --memory 8MiB --working-set 1MiB --json";
        let mut destination = Command::new("prlimit");
        destination.args(["--nofile=40:40", env!("CARGO_BIN_EXE_multifd"), "guest", "--incoming", &uri]);
        destination.args(small.split_whitespace()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let destination = destination.spawn().unwrap();
        while !socket.exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let source = run(&format!("guest --migrate-to {uri} --after 1ms --run-for 1ms --channels 64 {small}"));
        let destination = destination.wait_with_output().unwrap();
        for (output, whose) in [(&destination, "of the destination"), (&source, "of the source")] {
            let error = json(&output.stdout)["error"].to_string();
            assert_eq!(exit_code(output), 1, "{whose}: {error}");
            assert!(!error.contains("channels came within"), "{whose}: {error}");
        }
        // Where main is what the last descriptor was missing for, its source sees a closed connection.
        assert!(json(&destination.stdout)["error"].as_str().unwrap().contains("ulimit -n"));
        assert!(json(&destination.stdout)["error"].as_str().unwrap().contains("40 open files"));
        assert_eq!(json(&source.stdout)["pages-wrong"], 0, "the guest runs on");
    });
}

//! The built-in guest into a checkpoint and out of it again, as a user would do it.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use test_support::{TempDir, time_limit};

const GUEST: [&str; 5] = ["guest", "--guest=process", "--memory=32MiB", "--working-set=4MiB", "--json"];

fn start(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_multifd"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until the process listens, and returns where.
fn listening(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}")).to_owned()
}

/// Exit status and report.
fn end(mut child: Child) -> (i32, Value) {
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    let status = child.wait().unwrap();
    (status.code().unwrap(), serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status}: {text}")))
}

/// A checkpoint of the built-in guest.
fn checkpoint(dir: &TempDir, file: &Path) -> Value {
    let uri = format!("unix:{}", dir.join("receive").display());
    let mut receive = start(&["receive", &uri, "--output", file.to_str().unwrap(), "--digest", "--json"]);
    listening(&mut receive);
    let to = format!("--migrate-to={uri}");
    let (status, left) = end(start(&[&GUEST[..], &["--after=200ms", &to]].concat()));
    assert_eq!(status, 0, "{left}");
    let (status, received) = end(receive);
    assert_eq!(status, 0, "{received}");
    received
}

#[test]
fn a_guest_goes_on_from_its_checkpoint_as_often_as_one_likes() {
    time_limit(Duration::from_secs(120), || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("guest.ckpt");
        let received = checkpoint(&dir, &file);
        assert_eq!(received["ram-blocks"][0]["size"], 32 << 20);
        assert_eq!(received["checkpoint"]["path"], file.display().to_string());
        assert_eq!(received["devices"].as_array().unwrap().len(), 2);

        for options in
            [&[][..], &["--compression=zstd", "--channels=7"], &["--zero-pages=legacy", "--sync=per-section"]]
        {
            let uri = format!("unix:{}", dir.join("incoming").display());
            let incoming = format!("--incoming={uri}");
            let mut guest = start(&[&GUEST[..], &[&incoming, "--run-for=300ms"]].concat());
            listening(&mut guest);
            let send = [&["send", file.to_str().unwrap(), &uri, "--json"], options].concat();
            let (status, sent) = end(start(&send));
            assert_eq!(status, 0, "{sent}");
            let (status, report) = end(guest);
            // 6 if a single page were wrong.
            assert_eq!(status, 0, "{report}");
        }
    });
}

#[test]
fn a_checkpoint_is_sent_without_copies() {
    time_limit(Duration::from_secs(120), || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("guest.ckpt");
        checkpoint(&dir, &file);
        let mut guest = start(&[&GUEST[..], &["--incoming=tcp:127.0.0.1:0", "--run-for=300ms"]].concat());
        let uri = listening(&mut guest);
        let (status, sent) = end(start(&["send", file.to_str().unwrap(), &uri, "--json", "--zero-copy"]));
        assert_eq!(status, 0, "{sent}");
        assert!(sent["zero-copy"]["sends"].as_u64().unwrap() > 0, "{sent}");
        let (status, report) = end(guest);
        // 6 if a single page were wrong.
        assert_eq!(status, 0, "{report}");
    });
}

#[test]
fn sending_to_nobody_fails_and_names_the_address() {
    let dir = TempDir::new().unwrap();
    let file = dir.join("guest.ckpt");
    checkpoint(&dir, &file);
    let uri = format!("unix:{}", dir.join("nobody").display());
    let (status, report) = end(start(&["send", file.to_str().unwrap(), &uri, "--json"]));
    assert_eq!(status, 1, "{report}");
    assert!(report["error"].as_str().unwrap().contains("nobody"), "{report}");
}

//! `multifd convert` on the recorded streams of real QEMUs: to each kind of file and back, packed, cut, damaged, and through
//! the standard input.

mod common;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Output, Stdio},
    thread,
    time::Duration,
};

use common::{LIMIT, captures::recorded, exit_code, json, multifd};
use multifd_proto::libvirt::{SaveFormat, SaveHeader};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use test_support::{TempDir, time_limit};

const XML: &str = "<domain type='qemu'>\n<name>vm</name><os><type machine='pc-i440fx-10.0'>hvm</type></os></domain>\n";

fn ended(output: &Output) -> (i32, Value) {
    (exit_code(output), json(&output.stdout))
}

fn convert(from: &Path, to: &Path, more: &[&str]) -> (i32, Value) {
    ended(&multifd("convert --json").args([from, to]).args(more).output().unwrap())
}

#[track_caller]
fn converted(from: &Path, to: &Path, more: &[&str]) -> Value {
    let (status, report) = convert(from, to, &[more, &["--digest"]].concat());
    assert_eq!(status, 0, "{report}");
    assert!(report["machine"].is_string());
    report
}

fn inspect(path: &Path) -> (i32, Value) {
    ended(&multifd("inspect --digest --json").arg(path).output().unwrap())
}

#[track_caller]
fn failed((status, report): (i32, Value), expected: i32, what: &str) {
    let error = report["error"].as_str().unwrap_or_default();
    assert_eq!(status, expected, "{report}");
    assert!(error.contains(what), "{what:?} is not in {error:?}");
}

/// The stream in an image of libvirt's, packed as `format` says.
fn image(stream: &[u8], format: SaveFormat) -> Vec<u8> {
    let mut data = format!("{XML}\0<cookie/>\0").into_bytes();
    data.resize(70_000, 0);
    let mut header = SaveHeader::new(70_000, false, format);
    header.cookie_offset = XML.len() as u32 + 1;
    let packed = match format {
        SaveFormat::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(stream).unwrap();
            encoder.finish().unwrap()
        }
        SaveFormat::Xz => {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
            encoder.write_all(stream).unwrap();
            encoder.finish().unwrap()
        }
        SaveFormat::Zstd => zstd::encode_all(stream, 1).unwrap(),
        _ => stream.to_vec(),
    };
    [&header.encode()[..], &data, &packed].concat()
}

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_recorded_stream_becomes_each_kind_and_comes_back_the_same() {
    time_limit(LIMIT, || {
        for name in ["q10.0-xbzrle-0ch", "q10.0-postcopyram-0ch"] {
            let dir = TempDir::new().unwrap();
            let path = write(&dir, "stream", &recorded(name));
            let (status, original) = inspect(&path);
            assert_eq!((status, &original["kind"]), (0, &Value::from("stream")));
            let xml = write(&dir, "xml", XML.as_bytes()).display().to_string();
            let (one, two, three) = (dir.join("1"), dir.join("2"), dir.join("3"));
            let made = converted(&path, &one, &[]);
            assert_eq!((&made["input"]["kind"], &made["output"]["kind"]), (&"stream".into(), &"checkpoint".into()));
            converted(&one, &two, &["--format=stream"]);
            converted(&two, &three, &[]);
            let raw = dir.join("raw");
            converted(&three, &raw, &["--libvirt-xml", &xml]);
            let sparse = dir.join("sparse");
            converted(&raw, &sparse, &["--libvirt-xml", &xml, "--format=mapped-ram"]);
            let last = dir.join("last");
            converted(&sparse, &last, &[]);
            for (path, kind, content) in [
                (&one, "checkpoint", Value::Null),
                (&two, "stream", Value::Null),
                (&three, "checkpoint", Value::Null),
                (&raw, "libvirt-image", "stream".into()),
                (&sparse, "libvirt-image", "checkpoint".into()),
                (&last, "checkpoint", Value::Null),
            ] {
                let (status, inspected) = inspect(path);
                assert_eq!((status, &inspected["kind"], &inspected["content"]), (0, &kind.into(), &content));
                assert_eq!(inspected["machine"], original["machine"]);
                assert_eq!(inspected["device-state-digest"], original["device-state-digest"], "{path:?}");
                let digests = |report: &Value| -> Vec<(Value, Value)> {
                    let blocks = report["ram-blocks"].as_array().unwrap();
                    blocks.iter().map(|block| (block["name"].clone(), block["digest"].clone())).collect()
                };
                assert_eq!(digests(&inspected), digests(&original), "{path:?}");
            }
            let (_, inspected) = inspect(&sparse);
            assert_eq!(inspected["libvirt"]["format"], "sparse");
            assert_eq!(inspected["libvirt"]["domain"], "vm");
            assert!(fs::read(&one).unwrap() == fs::read(&last).unwrap(), "the same checkpoint to the byte");
        }
    });
}

#[test]
fn an_image_of_each_format_is_inspected_and_converted() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let stream = recorded("q10.0-postcopyram-0ch");
        let plain = converted(&write(&dir, "stream", &stream), &dir.join("plain"), &[]);
        for format in [SaveFormat::Raw, SaveFormat::Gzip, SaveFormat::Xz, SaveFormat::Zstd] {
            let bytes = image(&stream, format);
            let (path, to) = (write(&dir, "image", &bytes), dir.join("to"));
            let (status, inspected) = inspect(&path);
            assert_eq!((status, &inspected["broken-rule"]), (0, &Value::Null), "{format:?}");
            let libvirt = &inspected["libvirt"];
            assert_eq!((&libvirt["format"], &libvirt["was-running"]), (&format.name().into(), &false.into()));
            assert_eq!((&libvirt["cookie-bytes"], &libvirt["stream-offset"]), (&9.into(), &70_092.into()));
            let made = converted(&path, &to, &["--force"]);
            assert_eq!(made["ram-blocks"], plain["ram-blocks"], "{format:?}");
            // All of it cut in the middle, and at the end of its description.
            for cut in [bytes.len() - 5, bytes.len() / 2, 70_092, 50_000, 92, 40] {
                let (status, report) = convert(&write(&dir, "cut", &bytes[..cut]), &dir.join("none"), &[]);
                assert!([1, 4].contains(&status), "{format:?} cut at {cut}: {report}");
                assert!(!dir.join("none").exists());
            }
            if format != SaveFormat::Raw {
                let mut damaged = bytes.clone();
                damaged[70_094..70_100].fill(0xee);
                let damaged = write(&dir, "damaged", &damaged);
                failed(convert(&damaged, &dir.join("none"), &[]), 4, format.name());
                failed(inspect(&damaged), 4, format.name());
            }
        }
        for (format, what) in [(SaveFormat::Bzip2, "bunzip2 -c"), (SaveFormat::Lzop, "lzop -dc")] {
            let path = write(&dir, "image", &image(&stream, format));
            failed(convert(&path, &dir.join("none"), &[]), 4, what);
            failed(inspect(&path), 4, what);
        }
        let partial = [b"LibvirtQemudPart", &image(&stream, SaveFormat::Raw)[16..]].concat();
        failed(inspect(&write(&dir, "image", &partial)), 4, "did not come to its end");
    });
}

/// What such a file is unpacked into goes away with the process, and the guest would run already.
#[test]
fn only_a_file_with_a_place_for_each_page_is_sent_to_a_guest_that_runs() {
    let dir = TempDir::new().unwrap();
    let path = write(&dir, "image", &image(&recorded("q10.0-xbzrle-0ch"), SaveFormat::Gzip));
    let mut send = multifd("send --json --postcopy");
    let sent = send.arg(path).arg(format!("unix:{}", dir.join("none").display())).output().unwrap();
    failed(ended(&sent), 4, "multifd convert FILE CHECKPOINT");
}

fn from_stdin(to: &Path) -> Child {
    let mut command = multifd("convert - --json --digest");
    command.arg(to).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn streams_and_images_come_through_the_standard_input() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let stream = recorded("q10.0-xbzrle-0ch");
        let mut first = None;
        for bytes in [stream.clone(), image(&stream, SaveFormat::Raw), image(&stream, SaveFormat::Zstd)] {
            let to = dir.join("to");
            let mut child = from_stdin(&to);
            let mut stdin = child.stdin.take().unwrap();
            let writer = thread::spawn(move || bytes.chunks(50_000).try_for_each(|part| stdin.write_all(part)));
            let (status, report) = ended(&child.wait_with_output().unwrap());
            writer.join().unwrap().unwrap();
            assert_eq!(status, 0, "{report}");
            assert_eq!(first.get_or_insert_with(|| report["ram-blocks"].clone()), &report["ram-blocks"]);
            fs::remove_file(to).unwrap();
        }
    });
}

#[test]
fn an_interrupt_ends_the_wait_for_the_standard_input() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        for written in [0, 10, 100_000] {
            let mut child = from_stdin(&dir.join("to"));
            let mut stdin = child.stdin.take().unwrap();
            stdin.write_all(&recorded("q10.0-xbzrle-0ch")[..written]).unwrap();
            thread::sleep(Duration::from_millis(300));
            kill_process(Pid::from_child(&child), Signal::INT).unwrap();
            let (status, report) = ended(&child.wait_with_output().unwrap());
            assert_eq!((status, &report["status"]), (3, &"cancelled".into()), "{written}: {report}");
            drop(stdin);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    });
}

#[test]
fn what_is_there_stays_unless_it_is_to_be_replaced() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (from, to) = (write(&dir, "stream", &recorded("q10.0-xbzrle-0ch")), write(&dir, "to", b"precious"));
        for format in ["--format=stream", "--format=mapped-ram"] {
            failed(convert(&from, &to, &[format]), 1, "--force replaces it");
            assert_eq!(fs::read(&to).unwrap(), b"precious");
        }
        let other = write(&dir, "other", b"<domainsnapshot/>").display().to_string();
        failed(convert(&from, &to, &["--force", "--libvirt-xml", &other]), 1, "virsh dumpxml");
        let cut = write(&dir, "cut", &fs::read(&from).unwrap()[..100_000]);
        for format in ["--format=stream", "--format=mapped-ram"] {
            failed(convert(&cut, &to, &["--force", format]), 1, "ended in the middle");
            assert_eq!(fs::read(&to).unwrap(), b"precious");
        }
        converted(&from, &to, &["--force"]);
        // In place.
        converted(&to, &to, &["--force", "--format=stream"]);
        assert!(inspect(&to).1["kind"] == "stream");
    });
}

/// A result that is cut short cannot be told from a whole one there.
#[test]
fn the_standard_output_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let output = multifd("convert --json stream -").current_dir(dir.path()).output().unwrap();
    failed(ended(&output), 2, "expected a file for OUT");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// Memory in files that both sides map is not in a stream of such a source, so there is nothing to make a checkpoint of.
#[test]
fn a_stream_without_its_memory_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let (stream, to) = (dir.join("stream"), dir.join("to"));
    let mut encoder = multifd_proto::encoder::MainEncoder::new();
    encoder.header().configuration("pc-i440fx-10.0").config_capabilities(&["x-ignore-shared"]).ram_start(2, 4096);
    fs::write(&stream, encoder.as_bytes()).unwrap();
    failed(inspect(&stream), 4, "keep those files");
    failed(convert(&stream, &to, &[]), 4, "keep those files");
    let output = multifd("send --json").arg(&stream).arg("unix:/nonexistent").output().unwrap();
    failed(ended(&output), 4, "keep those files");
    assert!(!to.exists());
}

//! `multifd convert` on the recorded streams of real QEMUs: to each kind of file and back, packed, cut, damaged, and through
//! the standard input.

mod common;

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use common::{
    LIMIT,
    captures::recorded,
    convert::{convert, converted, ended, failed, inspect},
    multifd,
};
use multifd::inspect::libvirt::{SaveFormat, SaveHeader};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use test_support::{TempDir, time_limit};

const XML: &str = "<domain type='qemu'>\n<name>vm</name><os><type machine='pc-i440fx-10.0'>hvm</type></os></domain>\n";

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

/// The mapped-ram stream `checkpoint` in an image as libvirt 11.3 writes it: the places in it count from the beginning of the image.
fn sparse_image(checkpoint: &[u8]) -> Vec<u8> {
    const FRONT: usize = 1 << 20;
    const BLOCK_HEADER: usize = 28;
    let mut header = SaveHeader::new((FRONT - SaveHeader::LEN) as u32, false, SaveFormat::Sparse);
    header.cookie_offset = XML.len() as u32 + 1;
    let mut bytes = [&header.encode()[..], XML.as_bytes(), b"\0<cookie/>\0"].concat();
    bytes.resize(FRONT, 0);
    bytes.extend_from_slice(checkpoint);
    // In the header of each block: version 1, pages of 4096 bytes, and two places.
    let begin = [&1u32.to_be_bytes()[..], &4096u64.to_be_bytes()].concat();
    let mut blocks = 0;
    for at in FRONT..bytes.len() - BLOCK_HEADER {
        let after = (at - FRONT + BLOCK_HEADER) as u64;
        // The bitmap begins where its header ends, so no page is taken for one.
        if bytes[at..].starts_with(&begin) && bytes[at + begin.len()..].starts_with(&after.to_be_bytes()) {
            blocks += 1;
            for place in [at + begin.len(), at + begin.len() + 8] {
                let offset = u64::from_be_bytes(*bytes[place..].first_chunk().unwrap()) + FRONT as u64;
                bytes[place..place + 8].copy_from_slice(&offset.to_be_bytes());
            }
        }
    }
    assert!(blocks > 0);
    bytes
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
        // The same with a place for each page, put together by hand: a header, and a mapped-ram stream that counts its places from
        // the beginning of the image.
        let sparse = write(&dir, "sparse", &sparse_image(&fs::read(dir.join("plain")).unwrap()));
        let (status, inspected) = inspect(&sparse);
        assert_eq!((status, &inspected["libvirt"]["format"]), (0, &"sparse".into()), "{inspected}");
        assert_eq!(
            (&inspected["content"], &inspected["libvirt"]["was-running"]),
            (&"checkpoint".into(), &false.into())
        );
        assert_eq!(converted(&sparse, &dir.join("to"), &["--force"])["ram-blocks"], plain["ram-blocks"]);
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

#[test]
fn a_stream_goes_through_a_pipe_from_the_standard_input_to_the_standard_output() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let stream = write(&dir, "stream", &recorded("q10.0-xbzrle-0ch"));
        let (file, piped) = (dir.join("file"), dir.join("piped"));
        converted(&stream, &file, &["--format=stream"]);
        let output = multifd("convert --format=stream").arg(&file).arg("-").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("(stream) to - (stream)"), "{said}");
        assert!(output.stdout == fs::read(&file).unwrap(), "the same as in a file");
        // From pipe to pipe, and what comes out is what went in.
        let mut middle =
            multifd("convert --format=stream -q - -").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut last = from_stdin_of(&piped, middle.stdout.take().unwrap().into());
        let mut stdin = middle.stdin.take().unwrap();
        stdin.write_all(&output.stdout).unwrap();
        drop(stdin);
        assert!(middle.wait().unwrap().success() && last.wait().unwrap().success());
        assert_eq!(inspect(&piped).1["device-state-digest"], inspect(&stream).1["device-state-digest"]);
        // A reader that goes away early is an error.
        let mut cut = multifd("convert --format=stream -q").arg(&file).arg("-").stdout(Stdio::piped()).spawn().unwrap();
        drop(cut.stdout.take());
        assert_eq!(cut.wait().unwrap().code(), Some(1));
        // One that takes nothing holds up no interrupt.
        let mut held =
            multifd("convert --format=stream -q").arg(&file).arg("-").stdout(Stdio::piped()).spawn().unwrap();
        let mut first = [0; 4];
        held.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        kill_process(Pid::from_child(&held), Signal::TERM).unwrap();
        assert_eq!(held.wait().unwrap().code(), Some(3));
    });
}

/// `convert - to`, reading `from`.
fn from_stdin_of(to: &Path, from: Stdio) -> Child {
    multifd("convert - -q").arg(to).stdin(from).stdout(Stdio::null()).spawn().unwrap()
}

#[test]
fn what_the_standard_output_cannot_take_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    for (args, what) in
        [("convert --json stream -", "'--format stream'"), ("convert --json --format stream stream -", "no '--json'")]
    {
        let output = multifd(args).current_dir(dir.path()).output().unwrap();
        failed(ended(&output), 2, what);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

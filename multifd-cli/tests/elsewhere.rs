//! Checkpoints of a VM a part of whose memory is in a file that its QEMU shares (`x-ignore-shared`): what each verb makes of them.

mod common;

use std::{fs, path::PathBuf, process::Stdio, thread, time::Duration};

use common::{
    LIMIT,
    captures::recorded,
    convert::{convert, converted, ended, failed, inspect},
    multifd,
};
use multifd_proto::{
    BlockName,
    encoder::MainEncoder,
    ram::BlockEntry,
    stream::{Section, SectionKind},
};
use serde_json::{Value, json};
use test_support::{TempDir, time_limit};

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// A stream of a QEMU with `x-ignore-shared` on: its `pc.ram` is in a file that both sides map.
fn stream_without_its_memory() -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    encoder.header().configuration("pc-i440fx-10.0").config_capabilities(&["x-ignore-shared"]).ram_start(2, 3 * 4096);
    let [ram, bios] = ["pc.ram", "pc.bios"].map(|name| BlockName::new(name).unwrap());
    for (name, pages, gpa) in [(&ram, 2, 0), (&bios, 1, 0xfffc_0000)] {
        encoder.block(&BlockEntry { gpa: Some(gpa), ..BlockEntry::new(name.clone(), pages * 4096) });
    }
    encoder.eos().footer(2).ram_part(2, false).page(&bios, 0).raw(&[7; 4096]).eos().footer(2);
    encoder.ram_part(2, true).eos().footer(2);
    let cpu = Section { kind: SectionKind::Full, id: 7, name: "cpu".to_owned(), instance: 0, version: 1 };
    encoder.section(&cpu).raw(b"state").footer(7).eof();
    encoder.bytes
}

/// It is kept, and looked into; nothing takes it for a whole VM.
#[test]
fn devices_without_their_memory_are_kept_and_never_pass_for_a_vm() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (stream, kept) = (write(&dir, "stream", &stream_without_its_memory()), dir.join("kept"));
        let report = converted(&stream, &kept, &[]);
        assert_eq!(report["memory-elsewhere"], json!(["pc.ram"]));
        for (path, kind) in [(&stream, "stream"), (&kept, "checkpoint")] {
            let (status, inspected) = inspect(path);
            assert_eq!((status, &inspected["kind"]), (0, &json!(kind)));
            assert_eq!(inspected["memory-elsewhere"], json!(["pc.ram"]), "{inspected}");
            let [ram, bios] = ["pc.ram", "pc.bios"].map(|name| {
                inspected["ram-blocks"].as_array().unwrap().iter().find(|block| block["name"] == name).unwrap()
            });
            let known = [&ram["elsewhere"], &ram["normal"], &ram["zero"], &ram["digest"]];
            assert_eq!(known, [&json!(true), &json!(0), &json!(0), &Value::Null]);
            let known = [&bios["elsewhere"], &bios["normal"], &bios["zero"], &bios["digest"].is_string().into()];
            assert_eq!(known, [&Value::Null, &json!(1), &json!(0), &json!(true)]);
            let text = multifd("inspect").arg(path).output().unwrap();
            let text = String::from_utf8(text.stdout).unwrap();
            assert!(text.contains("not a whole VM: the memory of pc.ram is not in it"), "{text}");
            let extracted = multifd("inspect --json --extract pc.ram --output").arg(dir.join("ram")).arg(path).output();
            failed(ended(&extracted.unwrap()), 1, "the memory of \"pc.ram\" is not here");
            assert!(!dir.join("ram").exists());
        }
        // And back: the same stream, in which nothing is made up.
        let back = dir.join("back");
        converted(&kept, &back, &["--format", "stream"]);
        assert_eq!(inspect(&back).1["ram-blocks"], inspect(&stream).1["ram-blocks"]);

        let said = "the devices of a VM and not its memory: pc.ram";
        let file = kept.display().to_string();
        let nowhere = format!("unix:{}", dir.join("nobody").display());
        for (args, status, what) in [
            (vec!["send", &file, &nowhere], 4, "--ignore-shared sends the rest"),
            (vec!["send", &file, &nowhere, "--postcopy"], 4, said),
            (vec!["serve", &file, "--listen", &nowhere], 4, said),
            (vec!["restore", &file, &nowhere], 4, "--ignore-shared sends the rest"),
            (vec!["send", &file, &nowhere, "--ignore-shared", "--postcopy"], 2, "--postcopy"),
            (vec!["restore", &file, &nowhere, "--ignore-shared", "--postcopy"], 2, "--postcopy"),
        ] {
            let output = multifd("").args(args).arg("--json").output().unwrap();
            let output = if status == 2 {
                (2, json!({ "error": String::from_utf8_lossy(&output.stderr) }))
            } else {
                ended(&output)
            };
            failed(output, status, what);
        }
        // What is whole is not sent as if it were not.
        let whole = dir.join("whole");
        fs::write(dir.join("plain"), recorded("q10.0-xbzrle-0ch")).unwrap();
        converted(&dir.join("plain"), &whole, &[]);
        for verb in ["send", "restore"] {
            let output = multifd(verb).args(["--json", "--ignore-shared"]).arg(&whole).arg(&nowhere).output().unwrap();
            failed(ended(&output), 2, "all of the VM's memory is in");
        }
        // Nor does libvirt get it, in either of its formats.
        let xml = write(&dir, "xml", b"<domain type='qemu'><name>n</name></domain>");
        for (format, from) in [("stream", &kept), ("mapped-ram", &kept), ("mapped-ram", &stream)] {
            let image = dir.join("image");
            let more = ["--libvirt-xml", xml.to_str().unwrap(), "--format", format];
            failed(convert(from, &image, &more), 4, "the devices of a VM and not its memory");
            assert!(!image.exists());
        }
    });
}

/// With the word of the operator that the destination has the memory, the rest is sent; and only then.
#[test]
fn devices_without_their_memory_are_sent_where_the_memory_is() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (stream, kept) = (write(&dir, "stream", &stream_without_its_memory()), dir.join("kept"));
        converted(&stream, &kept, &[]);
        let (uri, again) = (format!("unix:{}", dir.join("socket").display()), dir.join("again"));
        let mut command = multifd("receive --json --output");
        let mut receive = command.arg(&again).arg(&uri).stdout(Stdio::piped()).spawn().unwrap();
        // Once the socket is there, send waits until it listens.
        while !dir.join("socket").exists() {
            assert!(receive.try_wait().unwrap().is_none(), "receive has ended");
            thread::sleep(Duration::from_millis(1));
        }
        let sent = multifd("send --json --ignore-shared").arg(&kept).arg(&uri).output().unwrap();
        let received = receive.wait_with_output().unwrap();
        let (status, report) = ended(&sent);
        assert_eq!(status, 0, "{report}");
        let (status, report) = ended(&received);
        assert_eq!((status, &report["memory-elsewhere"]), (0, &json!(["pc.ram"])), "{report}");
        assert_eq!(inspect(&again).1["ram-blocks"], inspect(&kept).1["ram-blocks"]);
    });
}

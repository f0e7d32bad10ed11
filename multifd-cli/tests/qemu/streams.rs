//! Sources whose streams are unlike those of the matrix.

use qemu_peer::{BootGuest, Installed, Qemu, QemuBuilder, Version};
use serde_json::{Value, json};
use test_support::{TempDir, report, time_limit};

use crate::harness::{
    LIMIT, MIB, Multifd, Settings, TEST_LIMIT, assert_goes_on, assert_same_memory, block, listen, load_file,
    migrate_away, receive_uri, vm,
};

const TABLE: &str = "other streams";

/// Takes a guest of `version`, prepared by `prepare`, into a checkpoint and sends it on to the same version.
fn through_a_checkpoint(
    version: Version,
    machine: &str,
    shape: impl Fn(QemuBuilder) -> QemuBuilder,
    prepare: impl Fn(&mut Qemu),
    more: &[&str],
) -> Option<Value> {
    from_one_to_another([version, version], machine, shape, prepare, more)
}

/// The same from one version to another.
fn from_one_to_another(
    [from, to]: [Version; 2],
    machine: &str,
    shape: impl Fn(QemuBuilder) -> QemuBuilder,
    prepare: impl Fn(&mut Qemu),
    more: &[&str],
) -> Option<Value> {
    let (installed, to) = (Installed::require(from)?, Installed::require(to)?);
    let received = time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let mut source = shape(vm(&installed, machine)).start().unwrap();
        source.qmp().set_parameters(&[("max-bandwidth", json!(10u64 << 30))]).unwrap();
        prepare(&mut source);
        source.wait_passes(3, LIMIT).unwrap();
        let more: Vec<&str> = ["--digest"].iter().chain(more).copied().collect();
        let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &more);
        migrate_away(&mut source, &uri);
        let received = receive.done();
        assert_same_memory(&mut source, &received);

        let mut destination = shape(vm(&to, machine)).incoming().start().unwrap();
        Settings::default().apply(&mut destination);
        let uri = listen(&mut destination, false);
        Multifd::start(["send", &file.display().to_string(), &uri]).done();
        assert_goes_on(&source, &mut destination);
        drop(destination);
        if has_early_state(&received) {
            assert_goes_on(&source, &mut load_file(shape(vm(&to, machine)), &file, &[]));
        }
        received
    });
    Some(received)
}

/// Whether a device's state came before the pages.
fn has_early_state(received: &Value) -> bool {
    received["devices"].as_array().unwrap().iter().any(|device| device["early"] == true)
}

fn as_it_is(builder: QemuBuilder) -> QemuBuilder {
    builder
}

#[test]
fn a_plain_migration_has_its_pages_on_main() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-q35-10.0"), (Version::V11_1, "pc-q35-11.1")]
    {
        let Some(received) = through_a_checkpoint(version, machine, as_it_is, |_| {}, &[]) else { return };
        assert_eq!(received["channels"], 0);
        assert_eq!(received["ram"]["multifd-bytes"], 0);
        report(TABLE, &format!("{:4} plain, without channels: ok", version.name()));
    }
}

#[test]
fn xbzrle_differences_are_applied() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-i440fx-10.0"), (Version::V11_1, "pc-i440fx-11.1")]
    {
        let dir = TempDir::new().unwrap();
        let record = dir.join("recorded").display().to_string();
        let prepare = |source: &mut Qemu| {
            source.qmp().set_capabilities(&[("xbzrle", true)]).unwrap();
            let parameters = [("xbzrle-cache-size", json!(64 << 20)), ("max-bandwidth", json!(60 << 20))];
            source.qmp().set_parameters(&parameters).unwrap();
        };
        let Some(_) = through_a_checkpoint(version, machine, as_it_is, prepare, &["--record", &record]) else { return };
        let inspected = Multifd::start(["inspect", &record]).done();
        assert!(inspected["main"]["xbzrle"].as_u64().unwrap() > 0, "{}", inspected["main"]);
        report(TABLE, &format!("{:4} XBZRLE: ok", version.name()));
    }
}

#[test]
fn pages_compressed_one_by_one_are_inflated() {
    let dir = TempDir::new().unwrap();
    let record = dir.join("recorded").display().to_string();
    let prepare = |source: &mut Qemu| source.qmp().set_capabilities(&[("compress", true)]).unwrap();
    let more = ["--record", &record];
    let Some(_) = through_a_checkpoint(Version::V7_2, "pc-i440fx-7.2", as_it_is, prepare, &more) else { return };
    let inspected = Multifd::start(["inspect", &record]).done();
    assert!(inspected["main"]["compressed"].as_u64().unwrap() > 1000, "{}", inspected["main"]);
    report(TABLE, "7.2  compress: ok");
}

#[test]
fn postcopy_that_is_announced_and_not_begun_is_no_hindrance() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-i440fx-10.0"), (Version::V11_1, "pc-i440fx-11.1")]
    {
        let prepare = |source: &mut Qemu| {
            // Older versions refuse the two together.
            if version == Version::V11_1 {
                Settings::default().apply(source);
            }
            source.qmp().set_capabilities(&[("postcopy-ram", true)]).unwrap();
        };
        let Some(_) = through_a_checkpoint(version, machine, as_it_is, prepare, &[]) else { return };
        report(TABLE, &format!("{:4} postcopy-ram, not begun: ok", version.name()));
    }
}

/// A QEMU does not say how many channels it has; the numbers of its packets prove it at the end of each round. If they ever
/// do not, the migration ends without success here.
#[test]
fn the_numbers_of_packets_prove_the_channels_of_a_guest_that_writes_without_pause() {
    for (version, machine, channels, postcopy) in [
        (Version::V7_2, "pc-i440fx-7.2", 4, false),
        (Version::V7_2, "pc-q35-7.2", 13, false),
        (Version::V10_0, "pc-i440fx-10.0", 5, false),
        (Version::V10_0, "pc-i440fx-7.2", 8, false),
        (Version::V11_1, "pc-q35-11.1", 4, false),
        (Version::V11_1, "pc-i440fx-11.1", 16, true),
        (Version::V11_1, "pc-i440fx-7.2", 6, true),
    ] {
        let Some(installed) = Installed::require(version) else { continue };
        let rounds = time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let mut source = vm(&installed, machine).guest(BootGuest::filling(MIB)).start().unwrap();
            Settings { channels, ..Settings::default() }.apply(&mut source);
            source.qmp().set_capabilities(&[("postcopy-ram", postcopy)]).unwrap();
            source.wait_passes(3, LIMIT).unwrap();
            let more = ["--digest"];
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &dir.join("checkpoint"), &more);
            migrate_away(&mut source, &uri);
            let received = receive.done();
            assert_eq!(received["channels"], channels, "{received}");
            assert_same_memory(&mut source, &received);
            let rounds = received["ram"]["dirty-sync-count"].as_u64().unwrap_or_default();
            // The set-up is none.
            assert!(rounds >= 2, "{received}");
            rounds
        });
        let with = if postcopy { ", postcopy-ram" } else { "" };
        report(TABLE, &format!("{:4} {machine}, {channels} channels{with}: proved in {rounds} rounds", version.name()));
    }
}

#[test]
fn a_source_that_asks_for_permission_to_switch_over_gets_it() {
    let prepare = |source: &mut Qemu| {
        Settings::default().apply(source);
        source.qmp().set_capabilities(&[("switchover-ack", true)]).unwrap();
    };
    // With the capability off, each is in the matrix.
    for (version, machine, ack) in [
        (Version::V10_0, "pc-i440fx-10.0", "auto"),
        // The machine type does not tell that this source waits, and its guest leaves it no moment without a page to send.
        (Version::V10_0, "pc-i440fx-7.2", "always"),
        (Version::V11_1, "pc-i440fx-7.2", "always"),
        (Version::V11_1, "pc-q35-10.0", "auto"),
        (Version::V11_1, "pc-i440fx-11.0", "auto"),
        // This one waits for nothing, and fails when it is told.
        (Version::V11_1, "pc-i440fx-11.1", "auto"),
    ] {
        let more = ["--return-path-ack", ack];
        if through_a_checkpoint(version, machine, as_it_is, prepare, &more).is_some() {
            report(TABLE, &format!("{:4} switchover-ack, {machine}, --return-path-ack {ack}: ok", version.name()));
        }
    }
}

/// The machine type says nothing, so what the source does tells that it waits.
#[test]
fn an_old_machine_type_that_waits_to_switch_over_is_noticed() {
    for version in [Version::V10_0, Version::V11_1] {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let mut source = vm(&installed, "pc-i440fx-7.2").start().unwrap();
            Settings::default().apply(&mut source);
            source.qmp().set_capabilities(&[("switchover-ack", true)]).unwrap();
            source.wait_passes(1, LIMIT).unwrap();
            source.qmp().stop().unwrap();
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &dir.join("checkpoint"), &[]);
            migrate_away(&mut source, &uri);
            receive.done();
        });
        report(TABLE, &format!("{:4} switchover-ack, pc-i440fx-7.2: noticed", version.name()));
    }
}

#[test]
fn each_place_for_zero_pages_is_understood() {
    for mode in ["none", "legacy", "multifd"] {
        let prepare = |source: &mut Qemu| {
            Settings::default().apply(source);
            source.qmp().set_parameters(&[("zero-page-detection", json!(mode))]).unwrap();
        };
        let received = through_a_checkpoint(Version::V10_0, "pc-i440fx-10.0", as_it_is, prepare, &[]);
        let Some(received) = received else { return };
        // Pages of zeros are holes, however they were sent.
        assert!(block(&received, "pc.ram")["zero"].as_u64().unwrap() > 100, "{received}");
        assert_eq!(received["ram"]["duplicate"] == 0, mode == "none", "{}", received["ram"]);
        report(TABLE, &format!("10.0 zero-page-detection={mode}: ok"));
    }
}

#[test]
fn state_that_is_needed_before_the_pages_is_kept_and_sent_there() {
    let with_virtio_mem = |builder: QemuBuilder| {
        builder.arguments(&[
            "-m",
            "48M,maxmem=1G,slots=2",
            "-object",
            "memory-backend-ram,id=vmem0,size=256M",
            "-device",
            "virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=128M",
        ])
    };
    let prepare = |source: &mut Qemu| Settings::default().apply(source);
    let (new, newest) = (Version::V10_0, Version::V11_1);
    for (versions, machine) in [
        ([new, new], "pc-i440fx-10.0"),
        ([newest, newest], "pc-i440fx-11.1"),
        ([new, newest], "pc-q35-10.0"),
        ([newest, new], "pc-i440fx-10.0"),
    ] {
        let received = from_one_to_another(versions, machine, with_virtio_mem, prepare, &[]);
        let Some(received) = received else { continue };
        let early: Vec<&Value> =
            received["devices"].as_array().unwrap().iter().filter(|device| device["early"] == true).collect();
        assert_eq!(early.len(), 1, "{}", received["devices"]);
        assert!(early[0]["name"].as_str().unwrap().ends_with("virtio-mem-device-early"), "{}", early[0]);
        let names = versions.map(Version::name).join(" -> ");
        report(TABLE, &format!("{names} virtio-mem, early state, {machine}: ok"));
    }
}

/// Bitmaps of disks travel in a section of their own, in parts, whose lengths are not on the wire.
#[test]
fn dirty_bitmaps_are_kept_and_come_back() {
    let with_disk = |builder: QemuBuilder| {
        builder.arguments(&["-blockdev", "driver=null-co,size=67108864,read-zeroes=on,node-name=disk"])
    };
    let (old, new, newest) = (Version::V7_2, Version::V10_0, Version::V11_1);
    for ([from, to], machine, written) in [
        ([old, old], "pc-i440fx-7.2", Some("1M 2M")),
        ([new, old], "pc-i440fx-7.2", Some("0 64M")),
        ([new, new], "pc-i440fx-10.0", None),
        ([newest, newest], "pc-i440fx-11.1", Some("5M 64k")),
        ([old, newest], "pc-q35-7.2", Some("63M 1M")),
    ] {
        let (Some(installed), Some(loading)) = (Installed::require(from), Installed::require(to)) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            let with_capability = |qemu: &mut Qemu| {
                Settings::default().apply(qemu);
                qemu.qmp().set_capabilities(&[("dirty-bitmaps", true)]).unwrap();
            };
            let mut source = with_disk(vm(&installed, machine)).start().unwrap();
            with_capability(&mut source);
            if let Some(written) = written {
                for (name, granularity) in [("coarse", 65536), ("fine", 512)] {
                    let bitmap = json!({ "node": "disk", "name": name, "granularity": granularity });
                    source.qmp().execute("block-dirty-bitmap-add", bitmap).unwrap();
                }
                let write = format!("qemu-io disk \"write {written}\"");
                source.qmp().execute("human-monitor-command", json!({ "command-line": write })).unwrap();
            }
            let digests = |qemu: &mut Qemu| {
                ["coarse", "fine"].map(|name| {
                    let bitmap = json!({ "node": "disk", "name": name });
                    qemu.qmp().execute("x-debug-block-dirty-bitmap-sha256", bitmap).ok()
                })
            };
            let before = digests(&mut source);
            assert_eq!(before[0].is_some(), written.is_some());
            if from == new {
                // So slow that the bitmaps alone are more than it may send in a short pause: it ends no round.
                source.qmp().set_parameters(&[("max-bandwidth", json!(32 << 20))]).unwrap();
            }
            source.wait_passes(3, LIMIT).unwrap();
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &[]);
            migrate_away(&mut source, &uri);
            let received = receive.done();
            assert!(received["devices"].as_array().unwrap().len() > 10, "{received}");

            let mut destination = with_disk(vm(&loading, machine)).incoming().start().unwrap();
            with_capability(&mut destination);
            let uri = listen(&mut destination, false);
            Multifd::start(["send", &file.display().to_string(), &uri]).done();
            assert_goes_on(&source, &mut destination);
            assert_eq!(digests(&mut destination), before);
            drop(destination);
            if to != Version::V7_2 {
                let capabilities = [("dirty-bitmaps", true)];
                let mut destination = load_file(with_disk(vm(&loading, machine)), &file, &capabilities);
                assert_goes_on(&source, &mut destination);
                assert_eq!(digests(&mut destination), before);
            }
        });
        let names = [from, to].map(Version::name).join(" -> ");
        report(TABLE, &format!("{names} dirty-bitmaps, {} written: ok", written.unwrap_or("none, nothing")));
    }
}

/// Found by a review: such a source says nothing behind the end of state and waits for SHUT, and the destination waited for
/// a description.
#[test]
fn a_source_that_describes_nothing_and_waits_is_told() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-q35-10.0"), (Version::V11_1, "pc-q35-11.1")]
    {
        for return_path in [true, false] {
            let settings = Settings { return_path, ..Settings::default() };
            let machine = format!("{machine},suppress-vmdesc=on");
            let prepare = |source: &mut Qemu| settings.apply(source);
            let Some(_) = through_a_checkpoint(version, &machine, as_it_is, prepare, &[]) else { return };
            let shape = if return_path { "with" } else { "without" };
            report(TABLE, &format!("{:4} suppress-vmdesc=on, {shape} return path: ok", version.name()));
        }
    }
}

#[test]
fn a_recorded_migration_decodes_to_what_was_received() {
    for (version, machine, compression) in [
        (Version::V7_2, "pc-q35-7.2", "zstd"),
        (Version::V10_0, "pc-q35-10.0", "zlib"),
        (Version::V11_1, "pc-q35-11.1", "zstd"),
    ] {
        let dir = TempDir::new().unwrap();
        let record = dir.join("recorded").display().to_string();
        let settings = Settings { compression, ..Settings::default() };
        let prepare = |source: &mut Qemu| settings.apply(source);
        let more = ["--record", &record];
        let Some(received) = through_a_checkpoint(version, machine, as_it_is, prepare, &more) else { return };
        let inspected = Multifd::start(["inspect", &record, "--digest", "--devices"]).done();
        assert_eq!(inspected["broken-rule"], Value::Null);
        assert_eq!(inspected["dialect"], received["dialect"]);
        assert_eq!(inspected["channels"].as_array().unwrap().len(), 4);
        for known in received["ram-blocks"].as_array().unwrap() {
            let name = known["name"].as_str().unwrap();
            assert_eq!(block(&inspected, name)["digest"], known["digest"], "{name}");
        }
        let devices = inspected["devices"].as_array().unwrap();
        let cpu = devices.iter().find(|device| device["name"] == "cpu").unwrap();
        assert!(cpu["fields"].as_object().unwrap().len() > 10, "{cpu}");
        report(TABLE, &format!("{:4} recorded and inspected, {compression}: ok", version.name()));
    }
}

//! Images that libvirt saves, and images that it restores.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use qemu_peer::{Installed, Libvirt, Qemu, Status, Version, guest::Output, libvirt::Daemon};
use test_support::{TempDir, report, time_limit};

use crate::harness::{LIMIT, MIB, Multifd, Settings, TEST_LIMIT, guest, listen, vm};

const TABLE: &str = "libvirt 9.0 with QEMU 7.2";
const MACHINE: &str = "pc-i440fx-7.2";
const DOMAIN: &str = "saved";

/// The description of a domain with the devices that the harness gives a QEMU.
fn description(daemon: &Daemon) -> String {
    format!(
        "<domain type='qemu'><name>{DOMAIN}</name><memory unit='MiB'>{MIB}</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='{MACHINE}'>hvm</type></os><features><acpi/></features>\
         <on_reboot>destroy</on_reboot><on_crash>destroy</on_crash><devices>\
         <emulator>/usr/bin/qemu-system-x86_64</emulator>\
         <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>\
         <target dev='hda' bus='ide'/></disk><controller type='usb' model='none'/><memballoon model='none'/>\
         <serial type='file'><source path='{serial}' append='on'/><target type='isa-serial' port='0'/></serial>\
         </devices></domain>",
        disk = daemon.path("disk").display(),
        serial = daemon.path("serial").display(),
    )
}

/// A domain that has written for a while, and is saved as `image`. Returns what its guest said until then.
fn saved(daemon: &Daemon, image: &Path) -> Output {
    let (disk, xml) = (daemon.path("disk"), daemon.path("xml"));
    fs::write(&disk, guest().sector()).unwrap();
    daemon.own(&disk).unwrap();
    fs::write(&xml, description(daemon)).unwrap();
    daemon.virsh(&["create", &text(&xml)]).unwrap();
    wait_passes(daemon, 3);
    daemon.virsh(&["save", DOMAIN, &text(image)]).unwrap();
    said(daemon, 0)
}

/// What the guest has said from byte `from` on.
fn said(daemon: &Daemon, from: usize) -> Output {
    let serial = fs::read(daemon.path("serial")).unwrap_or_default();
    Output::parse(&serial[from.min(serial.len())..]).unwrap()
}

fn wait_passes(daemon: &Daemon, passes: usize) {
    let deadline = Instant::now() + LIMIT;
    while said(daemon, 0).passes() < passes {
        assert!(Instant::now() < deadline, "{} of {passes} passes", said(daemon, 0).passes());
        thread::sleep(Duration::from_millis(50));
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The guest that stopped after `earlier` goes on in `destination` without a wrong byte.
fn assert_goes_on(earlier: &Output, destination: &mut Qemu) {
    destination.qmp().wait_migration(&[Status::Completed], LIMIT).unwrap();
    // libvirt pauses a VM before it saves it, and that is a part of its state.
    destination.qmp().wait_run_state("paused", LIMIT).unwrap();
    destination.qmp().cont().unwrap();
    let later = destination.wait_passes(4, LIMIT).unwrap();
    assert!(!earlier.is_corrupted() && !later.is_corrupted(), "{earlier:?} {later:?}");
    assert!(earlier.is_continued_by(&later), "{earlier:?} {later:?}");
    destination.qmp().stop().unwrap();
    guest().check_ram_file(&destination.ram_file().unwrap()).unwrap();
}

#[test]
fn a_saved_domain_is_inspected_sent_and_converted_and_restored_from_a_checkpoint() {
    let (Some(libvirt), Some(qemu)) = (Libvirt::require(), Installed::require(Version::V7_2)) else { return };
    for format in ["raw", "gzip"] {
        time_limit(TEST_LIMIT, || {
            let daemon = libvirt.start(format).unwrap();
            let dir = TempDir::new().unwrap();
            let (image, checkpoint) = (daemon.path("image"), dir.join("checkpoint"));
            let earlier = saved(&daemon, &image);

            let inspected = Multifd::start(["inspect", &text(&image), "--digest"]).done();
            assert_eq!((&inspected["kind"], &inspected["content"]), (&"libvirt-image".into(), &"stream".into()));
            assert_eq!(inspected["libvirt"]["format"], format);
            assert_eq!(inspected["libvirt"]["domain"], DOMAIN);
            assert_eq!((&inspected["machine"], &inspected["devices-cut"]), (&MACHINE.into(), &true.into()));

            let mut destination = vm(&qemu, MACHINE).incoming().start().unwrap();
            Settings::default().apply(&mut destination);
            let uri = listen(&mut destination, false);
            Multifd::start(["send", &text(&image), &uri]).done();
            assert_goes_on(&earlier, &mut destination);
            drop(destination);

            let converted = Multifd::start(["convert", &text(&image), &text(&checkpoint), "--digest"]).done();
            for block in inspected["ram-blocks"].as_array().unwrap() {
                let same =
                    converted["ram-blocks"].as_array().unwrap().iter().find(|made| made["name"] == block["name"]);
                assert_eq!(same.unwrap()["digest"], block["digest"]);
            }

            let (xml, again) = (daemon.path("saved.xml"), daemon.path("again"));
            fs::write(&xml, daemon.virsh(&["save-image-dumpxml", &text(&image)]).unwrap()).unwrap();
            Multifd::start(["convert", &text(&checkpoint), &text(&again), "--libvirt-xml", &text(&xml)]).done();
            daemon.own(&again).unwrap();
            daemon.virsh(&["restore", &text(&again)]).unwrap();
            assert!(daemon.virsh(&["domstate", DOMAIN]).unwrap().contains("running"));
            // All of it is one row of passes: none is missing, repeated or wrong.
            wait_passes(&daemon, earlier.passes() + 4);
            assert!(!said(&daemon, 0).is_corrupted());
        });
        report(TABLE, &format!("{format}: saved, inspected, sent, converted, restored: ok"));
    }
}

//! Checkpoints that QEMU loads without us, and migration files of QEMU that we read.

use std::path::Path;

use qemu_peer::{Installed, Qemu, Status, Version};
use test_support::{TempDir, report, time_limit};

use crate::harness::{
    LIMIT, Multifd, Settings, TEST_LIMIT, UUID, assert_goes_on, assert_same_memory, listen, load_file, migrate_away,
    receive_uri, vm,
};

const TABLE: &str = "migration files";

/// A checkpoint of a guest on `from`, and its source.
fn checkpoint(from: &Installed, machine: &str, settings: Settings, file: &Path, dir: &TempDir) -> Qemu {
    let mut source = vm(from, machine).uuid(UUID).start().unwrap();
    settings.apply(&mut source);
    source.wait_passes(3, LIMIT).unwrap();
    let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), file, &["--digest"]);
    migrate_away(&mut source, &uri);
    assert_same_memory(&mut source, &receive.done());
    source
}

/// Lets a QEMU of `installed` load the mapped-ram file.
fn load(installed: &Installed, machine: &str, file: &Path, multifd: bool) -> Qemu {
    load_file(vm(installed, machine).uuid(UUID), file, &[("multifd", multifd)])
}

fn qemu_loads_our_checkpoint(from: Version, to: Version, machine: &str, multifd: bool) {
    let (Some(from), Some(new)) = (Installed::require(from), Installed::require(to)) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&from, machine, Settings::default(), &file, &dir);
        let mut destination = load(&new, machine, &file, multifd);
        assert_goes_on(&source, &mut destination);
    });
    report(
        TABLE,
        &format!("checkpoint of {:4} {machine} loaded by {}, multifd {multifd}: ok", from.version().name(), to.name()),
    );
}

#[test]
fn qemu_loads_a_checkpoint_of_10_0() {
    qemu_loads_our_checkpoint(Version::V10_0, Version::V10_0, "pc-i440fx-10.0", false);
}

#[test]
fn qemu_loads_a_checkpoint_of_10_0_on_q35_with_its_own_channels() {
    qemu_loads_our_checkpoint(Version::V10_0, Version::V10_0, "pc-q35-10.0", true);
}

#[test]
fn qemu_10_0_loads_a_checkpoint_of_7_2() {
    qemu_loads_our_checkpoint(Version::V7_2, Version::V10_0, "pc-i440fx-7.2", true);
}

#[test]
fn qemu_11_1_loads_a_checkpoint_of_its_own() {
    qemu_loads_our_checkpoint(Version::V11_1, Version::V11_1, "pc-q35-11.1", true);
}

#[test]
fn qemu_11_1_loads_a_checkpoint_of_7_2() {
    qemu_loads_our_checkpoint(Version::V7_2, Version::V11_1, "pc-q35-7.2", false);
}

#[test]
fn qemu_10_0_loads_a_checkpoint_of_11_1() {
    qemu_loads_our_checkpoint(Version::V11_1, Version::V10_0, "pc-i440fx-10.0", false);
}

/// A file that QEMU wrote: described, sent, and equal to the memory of the source.
fn we_send_qemus_file(from: Version, to: Version, machine: &str, multifd: bool) {
    let (Some(to), Some(new)) = (Installed::require(to), Installed::require(from)) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("migration").display().to_string();
        let mut source = vm(&new, machine).uuid(UUID).start().unwrap();
        source.qmp().set_capabilities(&[("mapped-ram", true), ("validate-uuid", true)]).unwrap();
        if multifd {
            source.qmp().set_multifd(3, "none").unwrap();
        }
        source.wait_passes(3, LIMIT).unwrap();
        migrate_away(&mut source, &format!("file:{file}"));
        let inspected = Multifd::start(["inspect", &file, "--digest"]).done();
        assert_eq!(inspected["kind"], "checkpoint");
        assert_eq!(inspected["uuid"], UUID);
        assert_eq!(inspected["devices-cut"], true, "{}", inspected["devices-problem"]);
        assert_same_memory(&mut source, &inspected);

        let mut destination = vm(&to, machine).uuid(UUID).incoming().start().unwrap();
        let settings = Settings { channels: 3, compression: "zstd", return_path: true };
        settings.apply(&mut destination);
        let uri = listen(&mut destination, true);
        let [channels, compression] = settings.args();
        Multifd::start(["send", &file, &uri, &channels, &compression]).done();
        assert_goes_on(&source, &mut destination);
    });
    report(
        TABLE,
        &format!(
            "mapped-ram file of {} {machine}, multifd {multifd}, sent to {}: ok",
            from.name(),
            to.version().name()
        ),
    );
}

#[test]
fn we_send_a_file_of_qemu_to_10_0() {
    we_send_qemus_file(Version::V10_0, Version::V10_0, "pc-i440fx-10.0", true);
}

#[test]
fn we_send_a_file_of_qemu_10_0_to_7_2() {
    we_send_qemus_file(Version::V10_0, Version::V7_2, "pc-i440fx-7.2", false);
}

#[test]
fn we_send_a_file_of_qemu_11_1_to_11_1() {
    we_send_qemus_file(Version::V11_1, Version::V11_1, "pc-i440fx-11.1", true);
}

#[test]
fn a_plain_migration_file_of_qemu_is_inspected() {
    for (version, machine) in [(Version::V10_0, "pc-i440fx-10.0"), (Version::V11_1, "pc-q35-11.1")] {
        let Some(new) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("migration").display().to_string();
            let mut source = vm(&new, machine).start().unwrap();
            source.wait_passes(3, LIMIT).unwrap();
            migrate_away(&mut source, &format!("file:{file}"));
            let extracted = dir.join("ram");
            let to = extracted.display().to_string();
            let extract = ["inspect", &file, "--digest", "--extract", "pc.ram", "--output", &to];
            let inspected = Multifd::start(extract).done();
            assert_eq!(inspected["kind"], "stream");
            assert!(inspected["main"]["page"].as_u64().unwrap() > 1000, "{}", inspected["main"]);
            assert_same_memory(&mut source, &inspected);
            assert_eq!(crate::harness::digest(&extracted), crate::harness::digest(&source.ram_file().unwrap()));
        });
        report(TABLE, &format!("plain file: migration of {} inspected: ok", version.name()));
    }
}

/// The negative control: one bit of one page, and the guest sees it.
#[test]
fn a_changed_bit_in_a_checkpoint_is_noticed_by_the_guest() {
    use std::os::unix::fs::FileExt;

    let Some(new) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let machine = "pc-i440fx-10.0";
        drop(checkpoint(&new, machine, Settings::default(), &file, &dir));
        let guest = crate::harness::guest();
        // The first block's pages begin at the first multiple of 1 MiB.
        let at = (1 << 20) + guest.address(guest.pages() / 2) + 1;
        let changed = std::fs::File::options().read(true).write(true).open(&file).unwrap();
        let mut byte = [0];
        changed.read_exact_at(&mut byte, at).unwrap();
        changed.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
        let mut destination = load(&new, machine, &file, false);
        destination.qmp().wait_migration(&[Status::Completed], LIMIT).unwrap();
        let output = destination.wait_passes(3, LIMIT).unwrap();
        assert_eq!(output.errors, Some(1), "{output:?}");
    });
}

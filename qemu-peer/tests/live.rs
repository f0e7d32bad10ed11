//! The harness itself under test: guests boot, prove their memory and move between two QEMUs.
//!
//! With this passing, a failure of a test with our own source or destination in the middle is ours and not the harness's.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use qemu_peer::guest::{BootGuest, RamFault};
use qemu_peer::{Installed, Memory, Qemu, Status, Version};
use serde_json::json;
use test_support::time_limit;

const MIB: u32 = 48;
const LIMIT: Duration = Duration::from_secs(60);
const TEST_LIMIT: Duration = Duration::from_secs(300);

/// Slow enough for a migration to converge, fast enough for many passes a second.
fn guest() -> BootGuest {
    BootGuest::filling(MIB).slowed(2000)
}

fn require_both() -> Option<(Installed, Installed)> {
    Some((Installed::require(Version::V7_2)?, Installed::require(Version::V10_0)?))
}

fn boots(version: Version, machine: &str) {
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let builder = Qemu::builder(&installed).machine(machine).memory_mib(MIB).memory(Memory::SharedFile);
        let mut vm = builder.guest(guest()).start().unwrap();
        let output = vm.wait_passes(5, LIMIT).unwrap();
        assert!(!output.is_corrupted(), "{output:?}");
        assert_eq!(output.letters[..5], *b"abcde");

        vm.qmp().stop().unwrap();
        assert_eq!(vm.qmp().run_state().unwrap(), "paused");
        let passes = vm.output().unwrap().passes();
        let cursor = guest().check_ram_file(&vm.ram_file().unwrap()).unwrap();
        // The letter comes after the pass.
        let printed = u32::try_from(passes).unwrap();
        assert!((printed..=printed + 1).contains(&cursor.pass), "{cursor:?} after {printed} letters");

        vm.qmp().cont().unwrap();
        vm.wait_passes(passes + 3, LIMIT).unwrap();
        vm.qmp().quit().unwrap();
        assert!(vm.wait_exit(LIMIT).unwrap().success());
    });
}

#[test]
fn guest_proves_its_memory_on_7_2_i440fx() {
    boots(Version::V7_2, "pc-i440fx-7.2");
}

#[test]
fn guest_proves_its_memory_on_7_2_q35() {
    boots(Version::V7_2, "pc-q35-7.2");
}

#[test]
fn guest_proves_its_memory_on_10_0_i440fx() {
    boots(Version::V10_0, "pc-i440fx-10.0");
}

#[test]
fn guest_proves_its_memory_on_10_0_q35() {
    boots(Version::V10_0, "pc-q35-10.0");
}

#[test]
fn guest_proves_its_memory_on_11_1_i440fx() {
    boots(Version::V11_1, "pc-i440fx-11.1");
}

#[test]
fn guest_proves_its_memory_on_11_1_q35() {
    boots(Version::V11_1, "pc-q35-11.1");
}

fn migrates(from: &Installed, to: &Installed, machine: &str, memory: Memory, return_path: bool) {
    time_limit(TEST_LIMIT, || {
        let vm = |installed| Qemu::builder(installed).machine(machine).memory_mib(MIB).guest(guest());
        let mut source = vm(from).memory(memory).start().unwrap();
        let mut destination = vm(to).memory(Memory::SharedFile).incoming().start().unwrap();
        for side in [&mut source, &mut destination] {
            side.qmp().set_capabilities(&[("return-path", return_path)]).unwrap();
            side.qmp().set_multifd(2, "none").unwrap();
        }
        source.qmp().set_parameters(&[("max-bandwidth", json!(10u64 << 30))]).unwrap();
        source.wait_passes(3, LIMIT).unwrap();

        let uri = format!("unix:{}", destination.path("migration").display());
        destination.qmp().migrate_incoming(&uri).unwrap();
        let result = source.qmp().migrate_live(&uri, LIMIT).unwrap();
        // The guest wrote while it moved, or this would show nothing about live migration.
        assert!(result["ram"]["dirty-sync-count"].as_u64() >= Some(2), "{result}");
        destination.qmp().wait_migration(&[Status::Completed], LIMIT).unwrap();
        destination.qmp().wait_run_state("running", LIMIT).unwrap();
        assert_eq!(source.qmp().run_state().unwrap(), "postmigrate");

        let later = destination.wait_passes(4, LIMIT).unwrap();
        let earlier = source.output().unwrap();
        assert!(!earlier.is_corrupted() && !later.is_corrupted(), "{earlier:?} {later:?}");
        assert!(earlier.is_continued_by(&later), "{earlier:?} {later:?}");
        if let Some(ram) = source.ram_file() {
            guest().check_ram_file(&ram).unwrap();
        }
        destination.qmp().stop().unwrap();
        guest().check_ram_file(&destination.ram_file().unwrap()).unwrap();
    });
}

#[test]
fn guest_moves_from_7_2_to_10_0() {
    let Some((old, new)) = require_both() else { return };
    migrates(&old, &new, "pc-i440fx-7.2", Memory::SharedFile, false);
}

#[test]
fn guest_moves_from_10_0_to_7_2_with_return_path() {
    let Some((old, new)) = require_both() else { return };
    migrates(&new, &old, "pc-i440fx-7.2", Memory::SharedFile, true);
}

#[test]
fn guest_moves_between_two_7_2_on_q35_from_anonymous_memory_to_a_file() {
    let Some(old) = Installed::require(Version::V7_2) else { return };
    migrates(&old, &old, "pc-q35-7.2", Memory::Anonymous, true);
}

#[test]
fn guest_moves_between_two_10_0_in_the_dialect_of_10_0() {
    let Some(new) = Installed::require(Version::V10_0) else { return };
    migrates(&new, &new, "pc-i440fx-10.0", Memory::SharedFile, true);
}

#[test]
fn guest_moves_from_10_0_to_11_1_with_return_path() {
    let Some(newest) = Installed::require(Version::V11_1) else { return };
    let Some(new) = Installed::require(Version::V10_0) else { return };
    migrates(&new, &newest, "pc-q35-10.0", Memory::SharedFile, true);
}

/// The negative control of every test above: one wrong byte in one page is seen by the host and by the guest.
#[test]
fn a_page_changed_from_outside_is_reported() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let builder = Qemu::builder(&installed).memory_mib(MIB).memory(Memory::SharedFile);
        let mut vm = builder.guest(guest()).start().unwrap();
        vm.wait_passes(3, LIMIT).unwrap();
        vm.qmp().stop().unwrap();
        let ram_file = vm.ram_file().unwrap();
        guest().check_ram_file(&ram_file).unwrap();

        let page = guest().pages() / 2;
        let ram = File::options().read(true).write(true).open(&ram_file).unwrap();
        let mut byte = [0];
        ram.read_exact_at(&mut byte, guest().address(page) + 1).unwrap();
        ram.write_all_at(&[byte[0] ^ 0x40], guest().address(page) + 1).unwrap();
        let fault = guest().check_ram_file(&ram_file).unwrap_err();
        assert!(matches!(fault, RamFault::Page { page: found, .. } if found == page), "{fault}");

        let passes = vm.output().unwrap().passes();
        vm.qmp().cont().unwrap();
        let output = vm.wait_passes(passes + 3, LIMIT).unwrap();
        assert_eq!(output.errors, Some(1), "{output:?}");
    });
}

#[test]
fn a_qemu_that_ends_at_once_tells_why() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let error = Qemu::builder(&installed).machine("no-such-machine").start().unwrap_err().to_string();
        assert!(error.contains("no-such-machine") || error.contains("unsupported machine"), "{error}");
    });
}

#[test]
fn a_qemu_is_killed_at_its_deadline() {
    let Some(installed) = Installed::require(Version::V7_2) else { return };
    time_limit(TEST_LIMIT, || {
        let mut vm = Qemu::builder(&installed).limit(Duration::from_secs(3)).start().unwrap();
        assert!(!vm.wait_exit(LIMIT).unwrap().success());
    });
}

#[test]
fn a_dropped_qemu_is_gone() {
    let Some(installed) = Installed::require(Version::V7_2) else { return };
    time_limit(TEST_LIMIT, || {
        let vm = Qemu::builder(&installed).start().unwrap();
        let process = format!("/proc/{}", vm.pid());
        assert!(std::path::Path::new(&process).exists());
        drop(vm);
        assert!(!std::path::Path::new(&process).exists());
    });
}

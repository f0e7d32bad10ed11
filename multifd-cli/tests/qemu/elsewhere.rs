//! A QEMU whose memory is in a shared file, with `x-ignore-shared` on: its devices go through a checkpoint, the memory stays where it is.

use qemu_peer::{Installed, Memory, Qemu, QemuBuilder, Version};
use serde_json::json;
use test_support::{TempDir, report, time_limit};

use crate::harness::{
    LIMIT, MIB, Multifd, Settings, TEST_LIMIT, block, guest, listen, load_file, migrate_away, receive_uri, vm,
};

/// A QEMU that maps the memory of `source`, and waits for a VM.
fn with_memory_of(source: &Qemu, installed: &Installed, machine: &str) -> qemu_peer::QemuBuilder {
    let file = source.ram_file().unwrap();
    let backend = format!("memory-backend-file,id=pc.ram,size={MIB}M,mem-path={},share=on", file.display());
    // Not a memory file of its own.
    vm(installed, &format!("{machine},memory-backend=pc.ram"))
        .memory(Memory::Anonymous)
        .arguments(&["-object", &backend])
}

/// The guest of `source` has gone on in `destination`, in the memory of `source`.
fn assert_goes_on(source: &Qemu, destination: &mut Qemu) {
    let completed = destination.qmp().wait_migration(&[qemu_peer::Status::Completed], LIMIT);
    completed.unwrap_or_else(|error| panic!("{error}\n{}", destination.log()));
    destination.qmp().wait_run_state("running", LIMIT).unwrap();
    let later = destination.wait_passes(3, LIMIT).unwrap();
    let earlier = source.output().unwrap();
    assert!(!earlier.is_corrupted() && !later.is_corrupted(), "{earlier:?} {later:?}");
    assert!(earlier.is_continued_by(&later), "{earlier:?} {later:?}");
    destination.qmp().stop().unwrap();
    guest().check_ram_file(&source.ram_file().unwrap()).unwrap();
}

/// A QEMU in the memory of `source`, to which the devices in `file` were sent.
fn loaded(source: &Qemu, installed: &Installed, machine: &str, file: &str, settings: Settings) -> Qemu {
    let mut destination = with_memory_of(source, installed, machine).incoming().start().unwrap();
    settings.apply(&mut destination);
    destination.qmp().set_capabilities(&SHARED).unwrap();
    let uri = listen(&mut destination, false);
    let [channels, compression] = settings.args();
    Multifd::start(["send", file, &uri, "--ignore-shared", &channels, &compression]).done();
    destination
}

const SHARED: [(&str, bool); 1] = [("x-ignore-shared", true)];

#[test]
fn devices_go_through_a_checkpoint_and_the_memory_stays_where_it_is() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-q35-10.0"), (Version::V11_1, "pc-q35-11.1")]
    {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            let path = file.display().to_string();
            let settings = Settings { channels: 2, ..Settings::default() };
            let mut source = vm(&installed, machine).start().unwrap();
            settings.apply(&mut source);
            source.qmp().set_capabilities(&SHARED).unwrap();
            source.wait_passes(2, LIMIT).unwrap();
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &["--digest"]);
            migrate_away(&mut source, &uri);
            let received = receive.done();
            assert_eq!(received["memory-elsewhere"], json!(["pc.ram"]));
            assert!(
                block(&received, "pc.ram")["digest"].is_null() && block(&received, "pc.bios")["digest"].is_string()
            );

            // Without the operator's word that the memory is there, nothing is sent.
            Multifd::start(["send", &path, "unix:/nonexistent"])
                .end()
                .failed(4, "the devices of a VM and not its memory");
            // QEMU 11.1 loads the file itself, and others get it over the network.
            let mut destination = match version {
                Version::V11_1 => load_file(with_memory_of(&source, &installed, machine), &file, &SHARED),
                _ => loaded(&source, &installed, machine, &path, settings),
            };
            assert_goes_on(&source, &mut destination);
        });
        report("memory that stays where it is", &format!("{:4} {machine}: ok", version.name()));
    }
}

/// `restore` asks the QEMU whether it shares such memory, sets the capability, and puts it back.
#[test]
fn devices_are_restored_into_a_qemu_that_has_the_memory() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-q35-10.0"), (Version::V11_1, "pc-q35-11.1")]
    {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            let path = file.display().to_string();
            let mut source = vm(&installed, machine).start().unwrap();
            Settings::default().apply(&mut source);
            source.qmp().set_capabilities(&SHARED).unwrap();
            source.wait_passes(2, LIMIT).unwrap();
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &[]);
            migrate_away(&mut source, &uri);
            receive.done();

            let restore = |name: &str, shape: QemuBuilder| {
                let socket = dir.join(name);
                let monitor = format!("unix:{},server=on,wait=off", socket.display());
                let mut qemu = shape.incoming().arguments(&["-qmp", &monitor]).start().unwrap();
                let capabilities =
                    |qemu: &mut Qemu| qemu.qmp().execute("query-migrate-capabilities", json!({})).unwrap();
                let before = capabilities(&mut qemu);
                let qmp = format!("unix:{}", socket.display());
                let ended = Multifd::start(["restore", &path, &qmp, "--ignore-shared"]).end();
                assert_eq!(capabilities(&mut qemu), before);
                (qemu, ended)
            };
            // QEMU would run what is in its own memory.
            let (mut other, ended) = restore("other", vm(&installed, machine).memory(Memory::Anonymous));
            ended.failed(4, "pc.ram is not in the checkpoint, and the QEMU does not share its own");
            assert_eq!(other.qmp().query_migrate().unwrap().get("status"), None, "nothing was begun");
            drop(other);
            let (mut destination, ended) = restore("there", with_memory_of(&source, &installed, machine));
            assert_eq!(ended.report["guest-state"], "running", "{}", ended.log);
            assert_goes_on(&source, &mut destination);
        });
        report("memory that stays where it is", &format!("{:4} {machine}: restored", version.name()));
    }
}

/// What QEMU 11.1 writes itself, with a place for each page that is not in the shared file.
#[test]
fn a_file_of_qemu_without_its_memory_is_sent() {
    let (version, machine) = (Version::V11_1, "pc-q35-11.1");
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let path = dir.join("file").display().to_string();
        let mut source = vm(&installed, machine).start().unwrap();
        source.qmp().set_capabilities(&[("x-ignore-shared", true), ("mapped-ram", true)]).unwrap();
        source.wait_passes(2, LIMIT).unwrap();
        migrate_away(&mut source, &format!("file:{path}"));
        let inspected = Multifd::start(["inspect", &path]).done_within(LIMIT);
        assert_eq!(inspected["memory-elsewhere"], json!(["pc.ram"]), "{inspected}");
        let mut destination = loaded(&source, &installed, machine, &path, Settings::default());
        assert_goes_on(&source, &mut destination);
    });
}

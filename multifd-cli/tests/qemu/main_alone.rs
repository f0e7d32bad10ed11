//! A checkpoint is sent to a QEMU that has multifd off: over one connection, with the pages on main.

use qemu_peer::{Installed, Version};
use serde_json::json;
use test_support::{TempDir, report, time_limit};

use crate::harness::{
    LIMIT, Multifd, TEST_LIMIT, assert_goes_on, assert_same_memory, listen, migrate_away, receive_uri, vm,
};

#[test]
fn without_channels_a_checkpoint_goes_to_a_qemu_with_multifd_off() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-q35-10.0"), (Version::V11_1, "pc-q35-11.1")]
    {
        let Some(installed) = Installed::require(version) else { return };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            let mut source = vm(&installed, machine).start().unwrap();
            source.qmp().set_parameters(&[("max-bandwidth", json!(10u64 << 30))]).unwrap();
            source.wait_passes(2, LIMIT).unwrap();
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &["--digest"]);
            migrate_away(&mut source, &uri);
            assert_same_memory(&mut source, &receive.done());

            let mut destination = vm(&installed, machine).incoming().start().unwrap();
            let uri = listen(&mut destination, true);
            let sent = Multifd::start(["send", &file.display().to_string(), &uri, "--channels", "0"]).done();
            assert_eq!((&sent["channels"], &sent["dialect"]), (&json!(0), &json!("per-section")));
            assert_goes_on(&source, &mut destination);
        });
        report("streams without channels", &format!("{:4} send --channels 0: ok", version.name()));
    }
}

//! A QEMU that waits without a word for what never comes.

use qemu_peer::{Installed, Version};
use rustix::process::Signal;
use serde_json::json;
use test_support::{TempDir, time_limit};

use crate::harness::{LIMIT, Multifd, Settings, TEST_LIMIT, listen, migrate_away, vm};

#[test]
fn send_says_what_to_compare_when_a_qemu_waits_for_more_channels() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint").display().to_string();
        let mut source = vm(&installed, "pc-q35-10.0").start().unwrap();
        source.qmp().set_capabilities(&[("mapped-ram", true)]).unwrap();
        source.qmp().set_parameters(&[("max-bandwidth", json!(10u64 << 30))]).unwrap();
        source.wait_passes(1, LIMIT).unwrap();
        migrate_away(&mut source, &format!("file:{file}"));
        let mut destination = vm(&installed, "pc-q35-10.0").incoming().start().unwrap();
        Settings { channels: 8, ..Settings::default() }.apply(&mut destination);
        let uri = listen(&mut destination, false);
        let mut send = Multifd::start(["send", &file, &uri, "--channels=4"]);
        let said = send.wait_line("no progress for 10 s: ");
        for what in ["machine pc-q35-10.0", "4 channels", "no compression", "multifd-channels"] {
            assert!(said.contains(what), "{said}");
        }
        send.signal(Signal::INT);
        assert!([Some(3), Some(7)].contains(&send.end().status.code()));
    });
}

//! All QEMU versions can be had on this machine, or the reason is told.

use std::time::{Duration, Instant};

use qemu_peer::{Installed, Version};
use test_support::time_limit;

#[test]
fn all_versions_install_and_the_second_call_is_instant() {
    time_limit(Duration::from_secs(1800), || {
        for version in Version::ALL {
            let Some(first) = Installed::require(version) else { continue };
            let started = Instant::now();
            let second = Installed::find(version).unwrap();
            assert!(started.elapsed() < Duration::from_secs(1));
            assert_eq!(first.binary(), second.binary());

            let output = second.command(&[]).arg("--version").output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(text.starts_with("QEMU emulator version"), "{text}");
        }
    });
}

//! Hosts that are trees of files.

use std::{fs, io};

use multifd::dirty::uffd_wp::UffdUnavailable;
use multifd_guest::host_kvm::HostKvm;
use rustix::process::Rlimit;
use test_support::TempDir;

use super::*;

/// The settings of a host on which all is well.
const GOOD: &[(&str, &str)] = &[
    ("sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled", "always inherit [madvise] never"),
    ("sys/kernel/mm/transparent_hugepage/hugepages-64kB/shmem_enabled", "always inherit within_size [advise] never"),
    ("proc/sys/vm/max_map_count", "65530"),
    ("proc/sys/net/core/optmem_max", "131072"),
    ("proc/sys/net/core/wmem_max", "212992"),
    ("proc/sys/net/core/rmem_max", "212992"),
    ("proc/sys/net/core/somaxconn", "4096"),
    ("proc/sys/net/ipv4/tcp_wmem", "4096\t16384\t4194304"),
    ("proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t6291456"),
];

fn limit(current: Option<u64>) -> Rlimit {
    Rlimit { current, maximum: None }
}

fn asked() -> Asked {
    Asked {
        kvm: Ok(HostKvm::with(true, 65_536)),
        userfaultfd: Ok(()),
        pagemap_scan: Ok(()),
        vsock: Ok(()),
        open_files: limit(Some(1024)),
        locked_memory: limit(None),
    }
}

fn tree(settings: &[(&str, &str)]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (path, text) in settings {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }
    dir
}

/// The good host, with `path` saying `text`.
fn with(path: &str, text: &str) -> TempDir {
    assert!(GOOD.iter().any(|(known, _)| *known == path), "{path}");
    let settings: Vec<_> = GOOD.iter().map(|&(known, good)| (known, if known == path { text } else { good })).collect();
    tree(&settings)
}

/// The checks that are not ok: their names, what came out, and the advice.
fn complaints(dir: &TempDir, asked: &Asked) -> Vec<(&'static str, State, String)> {
    let checks = checks(dir.path(), asked);
    assert_eq!(checks.len(), 12);
    let bad = checks.into_iter().filter(|check| {
        assert_eq!(check.advice.is_none(), check.state == State::Ok, "{check:?}");
        check.state != State::Ok
    });
    bad.map(|check| (check.name, check.state, check.advice.unwrap())).collect()
}

#[test]
fn nothing_is_said_against_a_host_that_has_all() {
    assert_eq!(complaints(&tree(GOOD), &asked()), []);
}

#[test]
fn each_setting_that_is_too_small_has_its_own_warning() {
    for (path, text, name, advice) in [
        (GOOD[0].0, "always inherit madvise [never]", "large-pages", "echo madvise > "),
        (GOOD[1].0, "always inherit within_size advise [never]", "large-pages-shared", "echo advise > "),
        ("proc/sys/vm/max_map_count", "65529", "mappings", "vm.max_map_count=65530"),
        ("proc/sys/net/core/optmem_max", "20480", "zero-copy", "net.core.optmem_max"),
        ("proc/sys/net/core/wmem_max", "131071", "local-buffers", "net.core.wmem_max=262144"),
        ("proc/sys/net/core/rmem_max", "4096", "local-buffers", "net.core.rmem_max=262144"),
        ("proc/sys/net/core/somaxconn", "128", "listen-queue", "net.core.somaxconn"),
        ("proc/sys/net/ipv4/tcp_wmem", "4096 16384 1048576", "tcp-buffers", "number of net.ipv4.tcp_wmem to"),
        ("proc/sys/net/ipv4/tcp_rmem", "4096 16384 65536", "tcp-buffers", "number of net.ipv4.tcp_rmem to"),
    ] {
        let found = complaints(&with(path, text), &asked());
        let [(complaint, State::Warning, what)] = &found[..] else { panic!("{path}: {found:?}") };
        assert_eq!(*complaint, name);
        assert!(what.contains(advice), "{what}");
    }
}

/// What the advice says is enough.
#[test]
fn a_host_that_follows_the_advice_about_buffers_is_ok() {
    let found = complaints(&with("proc/sys/net/ipv4/tcp_wmem", "4096 16384 65536"), &asked());
    let words: Vec<&str> = found[0].2.split([' ', ',']).collect();
    let enough = words.iter().find(|word| word.bytes().all(|byte| byte.is_ascii_digit()) && !word.is_empty()).unwrap();
    assert_eq!(complaints(&with("proc/sys/net/ipv4/tcp_wmem", &format!("4096 16384 {enough}")), &asked()), []);
}

/// A file that is not there, is no file, or says something else, is never taken for a good one.
#[test]
fn what_cannot_be_read_is_not_known() {
    for (path, _) in GOOD {
        let is_large_pages = path.starts_with("sys");
        for text in [
            "",
            "-1",
            "+4194304",
            "4096 16384",
            "1 2 3 4",
            "99999999999999999999",
            "many",
            "4096 16384 1e9",
            "0x100000",
        ] {
            let found = complaints(&with(path, text), &asked());
            assert!(matches!(found[..], [(_, State::NotKnown, _)]), "{path}: {text:?}: {found:?}");
        }
        let dir = with(path, "");
        fs::remove_file(dir.join(path)).unwrap();
        // A kernel without these pages has no such file.
        let expected = if is_large_pages { State::Warning } else { State::NotKnown };
        assert!(matches!(complaints(&dir, &asked())[..], [(_, state, _)] if state == expected), "{path} is not there");
        fs::create_dir(dir.join(path)).unwrap();
        let found = complaints(&dir, &asked());
        assert!(matches!(found[..], [(_, State::NotKnown, _)]), "{path} is a directory: {found:?}");
    }
    let nothing = TempDir::new().unwrap();
    let found = complaints(&nothing, &asked());
    assert_eq!(found.len(), 7, "{found:?}");
}

#[test]
fn a_setting_of_bytes_that_are_no_text_is_not_known() {
    let dir = tree(GOOD);
    fs::write(dir.join("proc/sys/net/core/somaxconn"), b"40\xff96\n").unwrap();
    assert!(matches!(complaints(&dir, &asked())[..], [("listen-queue", State::NotKnown, _)]));
}

#[test]
fn each_refusal_of_the_kernel_has_its_own_warning() {
    let refused = || io::Error::from(io::ErrorKind::PermissionDenied);
    let dir = tree(GOOD);
    let cases: [(&str, &str, Asked); 11] = [
        ("kvm", "/dev/kvm", Asked { kvm: Err("/dev/kvm: no".to_owned()), ..asked() }),
        ("kvm", "KVM_CAP_MANUAL", Asked { kvm: Ok(HostKvm::with(false, 0)), ..asked() }),
        (
            "userfaultfd",
            "/dev/userfaultfd",
            Asked { userfaultfd: Err(UffdUnavailable::NotPermitted { source: refused() }), ..asked() },
        ),
        (
            "userfaultfd",
            "newer kernel",
            Asked { userfaultfd: Err(UffdUnavailable::NoAsyncWriteProtection { source: refused() }), ..asked() },
        ),
        (
            "pagemap-scan",
            "/proc",
            Asked { pagemap_scan: Err(UffdUnavailable::NoPagemap { source: refused() }), ..asked() },
        ),
        (
            "pagemap-scan",
            "newer kernel",
            Asked { pagemap_scan: Err(UffdUnavailable::NoPagemapScan { source: refused() }), ..asked() },
        ),
        ("vsock", "modprobe", Asked { vsock: Err(refused()), ..asked() }),
        ("open-files", "ulimit -n 1024", Asked { open_files: limit(Some(1023)), ..asked() }),
        (
            "open-files",
            "hard limit",
            Asked { open_files: Rlimit { current: Some(256), maximum: Some(512) }, ..asked() },
        ),
        ("open-files", "LimitNOFILE=1024", Asked { open_files: limit(Some(0)), ..asked() }),
        ("zero-copy", "ulimit -l 8192", Asked { locked_memory: limit(Some(64 << 10)), ..asked() }),
    ];
    for (name, advice, asked) in cases {
        let found = complaints(&dir, &asked);
        let [(complaint, State::Warning, what)] = &found[..] else { panic!("{name}: {found:?}") };
        assert_eq!(*complaint, name);
        assert!(what.contains(advice), "{what}");
    }
}

#[test]
fn pages_that_come_unasked_are_said() {
    let dir = with(GOOD[0].0, "[always] inherit madvise never");
    let checks = checks(dir.path(), &asked());
    let pages = checks.iter().find(|check| check.name == "large-pages").unwrap();
    assert_eq!(pages.state, State::Ok);
    assert!(pages.found.contains("64 KiB come unasked"), "{}", pages.found);
}

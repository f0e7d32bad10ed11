//! A filter of system calls for the whole process (`--seccomp`): what this VMM calls itself, and what it is told beside that.

use seccompiler::{apply_filter, compile_from_json};

use crate::Failure;

/// From here on this thread, and each that it makes, may make the calls of [`OWN`] and of `others`. Any other one ends the process.
///
/// # Errors
/// A call of another architecture; the kernel's.
pub fn apply(others: &[&str]) -> Result<(), Failure> {
    let calls: Vec<String> = OWN.iter().chain(others).map(|call| format!(r#"{{"syscall":"{call}"}}"#)).collect();
    let filter = format!(
        r#"{{"vmm":{{"mismatch_action":"kill_process","match_action":"allow","filter":[{}]}}}}"#,
        calls.join(",")
    );
    let filters = compile_from_json(filter.as_bytes(), std::env::consts::ARCH.try_into()?)?;
    Ok(apply_filter(&filters["vmm"])?)
}

/// What this VMM makes by itself, once its options are read.
const OWN: &[&str] = &[
    // KVM, memory, and the signal that makes a vCPU leave the guest.
    "openat",
    "ioctl",
    "mmap",
    "munmap",
    "memfd_create",
    "ftruncate",
    "fcntl",
    "close",
    "rt_sigaction",
    "rt_sigprocmask",
    "tgkill",
    "getpid",
    "gettid",
    // Threads.
    "clone",
    "clone3",
    "rseq",
    "set_robust_list",
    "sched_getaffinity",
    "prctl",
    "futex",
    // A listener.
    "socket",
    "bind",
    "listen",
    "getsockname",
    "setsockopt",
    "statx",
    "flock",
    "fchmod",
    "getcwd",
    // The console, and the end.
    "read",
    "write",
    "exit",
    "exit_group",
];

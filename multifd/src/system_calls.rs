//! Which system calls the engine makes, for filters (seccomp).
//!
//! Kept true by `tests/system_calls.rs`, which runs every kind of migration with each thread under exactly these.

use crate::threads::ThreadRole;

/// The system calls that a thread of `role` makes, by their names, from the call of its body to the end of the thread.
///
/// The kernel's filters stack: a thread has those of the thread that made it, too. So the list of
/// [`Accept`](ThreadRole::Accept), which makes the threads of connections, has theirs, and that of
/// [the caller of `run`](system_calls_of_run) has all. A thread of [`StdThreads`](crate::threads::StdThreads) also
/// makes calls before its body (`set_robust_list`, `rseq`, `sigaltstack`, `prctl`, …): a VMM sets its filter in a
/// closure around the body: `Box::new(move || { set(filter); body() })`.
///
/// A thread that sets its filter below that of another one needs `seccomp` there, and each other call that the VMM makes before the
/// body: `sched_setaffinity` in the filter of [`Accept`](ThreadRole::Accept) to pin the threads of connections, for example.
///
/// What is not in it: the calls of the VMM's own code, such as an observer, a subscriber of `tracing`, a transport or an
/// allocator of its own; those of the thread that looks a host's *name* up, which the resolver of the C library decides; and
/// those of a panic.
pub fn system_calls(role: ThreadRole) -> &'static [&'static str] {
    match role {
        ThreadRole::SendChannel(_) => SEND_CHANNEL,
        ThreadRole::ReturnPath | ThreadRole::Urgent => RETURN_PATH,
        ThreadRole::Watchdog => WATCHDOG,
        ThreadRole::Accept => ACCEPT,
        ThreadRole::Connection(_) => CONNECTION,
    }
}

/// The system calls of the thread that calls [`Source::run`](crate::source::Source::run) or
/// [`Destination::run`](crate::destination::Destination::run), and of all threads that these make, which inherit its filter.
///
/// The calls of the VM and of its dirty log are the VMM's, except those of the logs of this crate.
pub fn system_calls_of_run() -> &'static [&'static str] {
    RUN
}

/// `calls`, and those that every thread makes: for memory, locks, time, and at its end.
macro_rules! with_common {
    ($($(#[$cfg:meta])* $call:literal)*) => {
        &[
            "brk", "clock_gettime", "clock_nanosleep", "close", "exit", "futex", "getrandom", "gettid", "madvise", "mmap",
            "mprotect", "mremap", "munmap", "prctl", "read", "restart_syscall", "rt_sigprocmask", "rt_sigreturn",
            "sched_yield", "sigaltstack", "write",
            // The allocator of glibc, which looks for the number of CPUs, and at /proc/sys/vm/overcommit_memory.
            "openat", "sched_getaffinity",
            $($(#[$cfg])* $call,)*
        ]
    };
}

const SEND_CHANNEL: &[&str] = with_common!(
    "connect" "eventfd2" "fcntl" "getpeername" "getsockname" "getsockopt" "ioctl" "mincore" "ppoll" "pread64" "recvfrom"
    "recvmsg" "sendmsg" "sendto" "setsockopt" "shutdown" "socket" "writev"
);

const RETURN_PATH: &[&str] = with_common!("fcntl" "getsockopt" "ioctl" "ppoll" "recvfrom" "recvmsg" "sendmsg" "sendto" "setsockopt" "shutdown" "writev");

const WATCHDOG: &[&str] = with_common!("fcntl" "sendmsg" "sendto" "shutdown" "writev");

const CONNECTION: &[&str] = with_common!(
    "eventfd2" "fadvise64" "fallocate" "fcntl" "fdatasync" "getpeername" "getsockname" "getsockopt" "ioctl" "lseek" "ppoll" "pwrite64" "pwritev"
    "readv" "recvfrom" "recvmsg" "sendmsg" "sendto" "setsockopt" "shutdown" "statx" "sync_file_range" "writev"
);

const ACCEPT: &[&str] = with_common!(
    // Its own. The file of a unix socket goes with its listener.
    #[cfg(not(target_arch = "aarch64"))]
    "unlink"
    "unlinkat" "accept4" "io_uring_enter" "fstat" "clone" "clone3" "rseq" "set_robust_list"
    // Those of the threads that it makes.
    "eventfd2" "fadvise64" "fallocate" "fcntl" "fdatasync" "getpeername" "getsockname" "getsockopt" "ioctl" "lseek" "ppoll" "pwrite64" "pwritev"
    "readv" "recvfrom" "recvmsg" "sendmsg" "sendto" "setsockopt" "shutdown" "statx" "sync_file_range" "writev"
);

const RUN: &[&str] = with_common!(
    // Its own, with the dirty logs of this crate.
    #[cfg(not(target_arch = "aarch64"))]
    "unlink"
    "unlinkat" "memfd_create" "userfaultfd"
    // Memory that is handed over.
    "fstat" "fstatfs"
    // Those of the threads that it makes.
    "accept4" "io_uring_enter" "clone" "clone3" "rseq" "set_robust_list"
    "connect" "eventfd2" "fadvise64" "fallocate" "fcntl" "fdatasync" "getpeername" "getsockname" "getsockopt" "ioctl" "lseek" "mincore" "ppoll"
    "pread64" "pwrite64" "pwritev" "readv" "recvfrom" "recvmsg" "sendmsg" "sendto" "setsockopt" "shutdown" "socket" "statx"
    "sync_file_range" "writev"
);

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::ChannelId;

    use super::*;

    /// A thread has the filters of the thread that made it, too.
    #[test]
    fn a_thread_may_make_what_those_may_that_it_makes() {
        let contains = |whole: &[&str], part: &[&str]| part.iter().all(|call| whole.contains(call));
        let made = [
            ThreadRole::SendChannel(ChannelId(0)),
            ThreadRole::ReturnPath,
            ThreadRole::Urgent,
            ThreadRole::Watchdog,
            ThreadRole::Accept,
            ThreadRole::Connection(0),
        ];
        for role in made {
            assert!(contains(system_calls_of_run(), system_calls(role)), "{role}");
        }
        assert!(contains(system_calls(ThreadRole::Accept), system_calls(ThreadRole::Connection(0))));
    }
}

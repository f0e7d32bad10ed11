//! Interrupts system calls of a thread, for tests of calls that move only a part.

use std::{os::unix::thread::JoinHandleExt, sync::Once, thread::JoinHandle};

/// Makes a blocking system call of `thread` return what it has done so far, or EINTR.
pub(crate) fn interrupt<T>(thread: &JoinHandle<T>) {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        extern "C" fn nothing(_signal: libc::c_int) {}
        // SAFETY: all zeros is a valid `sigaction`: no flags (so calls are not restarted) and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the handler does nothing, which is safe in a signal handler; the old action is not asked for.
        let status = unsafe { libc::sigaction(libc::SIGUSR2, &action, std::ptr::null_mut()) };
        assert_eq!(status, 0);
    });
    // SAFETY: the thread has not been joined, because its handle exists, so its id is valid.
    let status = unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR2) };
    assert!(status == 0 || status == libc::ESRCH);
}

//! Whether the process was started without a stdout.

use std::{
    os::fd::BorrowedFd,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use rustix::io::fcntl_getfd;

/// Whether stdout was closed when the process began.
pub fn was_closed() -> bool {
    WAS_CLOSED.load(Relaxed)
}

static WAS_CLOSED: AtomicBool = AtomicBool::new(false);

/// Looks before `main`: there, Rust has put `/dev/null` in the place of what was closed, for reading and writing. The same is what
/// many programs give their children as a stdout that they do not want, so nothing tells the two apart later.
extern "C" fn look() {
    // SAFETY: the number is not -1; it is used for this question only, and the kernel answers EBADF where it is not open.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(1) });
    WAS_CLOSED.store(flags.is_err(), Relaxed);
}

// SAFETY: the loader calls what this section has, before `main` and in the only thread; `look` uses nothing that would have to be
// set up before.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

//! An accept that never waits, whatever the mode of the socket that listens.
//!
//! The mode belongs to the open file description, so it cannot be another one for this process alone, and `accept(2)` has no flag for one
//! call. io_uring tries each accept without waiting first, and what would wait is a request that can be cancelled.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use io_uring::{
    IoUring,
    opcode::{Accept, AsyncCancel},
    register::Restriction,
    types::Fd,
};
use rustix::io::Errno;

/// A ring that accepts connections, and can do nothing else: whoever has its descriptor cannot get around a filter of system calls with it.
pub(crate) struct AcceptOnce(IoUring);

impl AcceptOnce {
    /// # Errors
    /// The kernel has no io_uring or cannot restrict it (before 5.10), or this process may not use it.
    pub(crate) fn new() -> io::Result<AcceptOnce> {
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(REQUESTS as u32)?;
        let mut permitted = [Restriction::sqe_op(Accept::CODE), Restriction::sqe_op(AsyncCancel::CODE)];
        ring.submitter().register_restrictions(&mut permitted)?;
        ring.submitter().register_enable_rings()?;
        Ok(AcceptOnce(ring))
    }

    /// A connection that waits at `listener`, close-on-exec; or the error of `accept(2)`, which is [`Errno::AGAIN`] where there is none.
    ///
    /// # Errors
    /// The ring's: it is of no use any more then.
    pub(crate) fn accept(&mut self, listener: BorrowedFd<'_>) -> io::Result<Result<OwnedFd, Errno>> {
        let accept = Accept::new(Fd(listener.as_raw_fd()), std::ptr::null_mut(), std::ptr::null_mut());
        let accept = accept.flags(libc::SOCK_CLOEXEC).build().user_data(ACCEPT);
        // Comes after the attempt to accept without waiting, and before anything can be waited for.
        let cancel = AsyncCancel::new(ACCEPT).build().user_data(CANCEL);
        // SAFETY: the requests point to no memory, and `listener` is open until both have ended.
        unsafe { self.0.submission().push_multiple(&[accept, cancel]) }.map_err(io::Error::other)?;
        let (mut ended, mut accepted) = (0, Err(Errno::AGAIN));
        while ended < REQUESTS {
            match self.0.submit_and_wait(REQUESTS - ended) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for completion in self.0.completion() {
                ended += 1;
                if completion.user_data() == ACCEPT {
                    accepted = outcome(completion.result());
                }
            }
        }
        Ok(accepted)
    }
}

/// What the kernel says of an accept that was cancelled, if it came too late.
fn outcome(result: i32) -> Result<OwnedFd, Errno> {
    match result {
        // SAFETY: the kernel has just opened it for this request, and nobody else knows of it.
        0.. => Ok(unsafe { OwnedFd::from_raw_fd(result) }),
        _ => match Errno::from_raw_os_error(-result) {
            // Cancelled while it waited: in the queue of a poll, or in a thread of the kernel.
            Errno::CANCELED | Errno::INTR => Err(Errno::AGAIN),
            error => Err(error),
        },
    }
}

/// The accept, and what cancels it.
const REQUESTS: usize = 2;
const ACCEPT: u64 = 1;
const CANCEL: u64 = 2;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
        time::Duration,
    };

    use io_uring::opcode::Nop;

    use super::*;

    fn ring() -> Option<AcceptOnce> {
        AcceptOnce::new().map_err(|error| test_support::skip(&format!("no io_uring here: {error}"))).ok()
    }

    #[test]
    fn an_accept_on_a_blocking_listener_does_not_wait_and_takes_nothing_that_comes_later() {
        let Some(mut ring) = ring() else { return };
        test_support::time_limit(Duration::from_secs(60), || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            for _ in 0..100 {
                assert_eq!(ring.accept(listener.as_fd()).unwrap().unwrap_err(), Errno::AGAIN);
                let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let socket = ring.accept(listener.as_fd()).unwrap().unwrap();
                assert!(rustix::io::fcntl_getfd(&socket).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
                let accepted = TcpStream::from(socket);
                assert_eq!(accepted.peer_addr().unwrap(), ours.local_addr().unwrap());
            }
            assert_eq!(ring.accept(io::stdin().as_fd()).unwrap().unwrap_err(), Errno::NOTSOCK);
        });
    }

    /// A filter of system calls sees nothing of what a ring is told to do.
    #[test]
    fn the_ring_does_nothing_else_and_is_not_inherited() {
        let Some(mut ring) = ring() else { return };
        // SAFETY: the request points to nothing.
        unsafe { ring.0.submission().push(&Nop::new().build()) }.unwrap();
        ring.0.submit_and_wait(1).unwrap();
        let results: Vec<_> = ring.0.completion().map(|completion| completion.result()).collect();
        assert_eq!(results, [-libc::EACCES]);
        let register = ring.0.submitter().register_files(&[0]).unwrap_err();
        assert_eq!(register.raw_os_error(), Some(libc::EACCES));
        // SAFETY: the descriptor is open as long as the ring.
        let descriptor = unsafe { BorrowedFd::borrow_raw(ring.0.as_raw_fd()) };
        assert!(rustix::io::fcntl_getfd(descriptor).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }
}

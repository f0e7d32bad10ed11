//! Sends guest memory without copying it (`MSG_ZEROCOPY`), and learns when the kernel has let go of it.
//!
//! The kernel numbers the calls that sent with this flag, one number each, also where a call sent only a part. When it
//! no longer reads the memory of some of them it puts the range of their numbers on the socket's error queue. Headers
//! are sent by copy before their pages: their buffer is free again as soon as the call returns.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    net::sockopt,
};

use super::vectored::{IoVecs, retried};
use crate::{
    ram::GuestRange,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// How the sends of one or several connections with zero-copy went, for display.
#[derive(Debug, Default)]
pub struct ZeroCopyCounters {
    /// Calls whose pages the network card read from guest memory.
    zero_copied: AtomicU64,
    /// Calls whose pages were copied after all.
    copied: AtomicU64,
    /// Those of them that were copied because the kernel had no room to note another.
    no_room: AtomicU64,
    /// Flushes of a connection with a copied call since the one before.
    flushes_with_copies: AtomicU64,
}

impl ZeroCopyCounters {
    /// Sends whose pages were read straight from guest memory.
    pub fn zero_copied(&self) -> u64 {
        self.zero_copied.load(Relaxed)
    }

    /// Sends that asked for it and were copied: by the kernel, as it always does on loopback, or because it had no room
    /// to note another send.
    pub fn copied(&self) -> u64 {
        self.copied.load(Relaxed)
    }

    /// Those of [`copied`](Self::copied) for which the kernel had no room: the limit of locked memory, or optmem_max.
    pub fn no_room(&self) -> u64 {
        self.no_room.load(Relaxed)
    }

    /// How often a connection was flushed that had copied since its flush before: per round, or per section, and channel.
    pub fn flushes_with_copies(&self) -> u64 {
        self.flushes_with_copies.load(Relaxed)
    }
}

/// Zero-copy sends on one socket. Only one exists for a socket, because the kernel's numbers belong to the socket.
pub(crate) struct ZeroCopy {
    /// Sends that the kernel has numbered.
    sent: u64,
    /// Those of which it has let go. `<= sent`
    completed: u64,
    counters: Arc<ZeroCopyCounters>,
    /// Something was copied since the last flush.
    copied: bool,
}

impl ZeroCopy {
    /// Turns zero-copy on for `socket`.
    ///
    /// # Errors
    /// The kernel's, where this kind of socket does not have it.
    pub(crate) fn enable(socket: BorrowedFd<'_>, counters: Arc<ZeroCopyCounters>) -> io::Result<ZeroCopy> {
        let on: libc::c_int = 1;
        // SAFETY: the option takes an int, which `on` is, and the kernel only reads it.
        let status = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ZEROCOPY,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        if status != 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                // The first has no name outside the kernel.
                Some(ENOTSUPP | libc::EOPNOTSUPP) => {
                    io::Error::new(io::ErrorKind::Unsupported, "the kernel has it for TCP, not for this kind of socket")
                }
                _ => error,
            });
        }
        Ok(ZeroCopy { sent: 0, completed: 0, counters, copied: false })
    }

    /// Sends `header` and `pages`. The kernel may read the pages until the next [`flush`](Self::flush).
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        let mut pages = IoVecs::new(&[], pages);
        let mut header = IoVecs::new(header, &[]);
        // MSG_MORE: the header waits for the first page instead of travelling alone.
        let more = if pages.is_empty() { 0 } else { libc::MSG_MORE };
        while !header.is_empty() {
            header.send_some(socket, libc::MSG_NOSIGNAL | more)?;
        }
        while !pages.is_empty() {
            match pages.send_some(socket, libc::MSG_NOSIGNAL | libc::MSG_ZEROCOPY) {
                Ok(_) => self.sent += 1,
                // No room to note another send (optmem_max), or too much memory pinned (RLIMIT_MEMLOCK).
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    if self.sent > self.completed {
                        self.wait(socket)?;
                    } else {
                        pages.send_some(socket, libc::MSG_NOSIGNAL)?;
                        self.copied = true;
                        self.counters.copied.fetch_add(1, Relaxed);
                        if self.counters.no_room.fetch_add(1, Relaxed) == 0 {
                            report_no_room(&error);
                        }
                    }
                }
                Err(error) => return Err(error),
            }
        }
        // Not for each send, because it is a system call; and not never, because the queue is bounded.
        if self.sent - self.completed >= REAP_ABOVE {
            self.reap(socket)?;
        }
        Ok(())
    }

    /// Returns when the kernel no longer reads memory passed to [`send`](Self::send).
    ///
    /// # Errors
    /// The connection's; also where it was shut down before the kernel let go, which it then does soon, but nobody knows
    /// when.
    pub(crate) fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.reap(socket)?;
        while self.completed < self.sent {
            self.wait(socket)?;
        }
        if std::mem::take(&mut self.copied) {
            self.counters.flushes_with_copies.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    /// Waits until the kernel has let go of at least one send.
    fn wait(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let before = self.completed;
        loop {
            let mut entry = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
            match poll(&mut entry, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.reap(socket)?;
            if self.completed > before {
                return Ok(());
            }
            // A connection that is shut down polls ready forever, so waiting on would burn a processor.
            if entry[0].revents().contains(PollFlags::HUP) {
                return Err(match sockopt::socket_error(socket)? {
                    Err(error) => error.into(),
                    Ok(()) => io::ErrorKind::BrokenPipe.into(),
                });
            }
            // Not ours to clear by waiting: an error of the connection itself polls ready as well.
            if let Err(error) = sockopt::socket_error(socket)? {
                return Err(error.into());
            }
        }
    }

    /// Takes all completions that are on the error queue. Does not block.
    fn reap(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while let Some(notice) = next_notice(socket)? {
            let Some((sends, copied)) = completion(&notice) else { continue };
            self.completed += sends;
            if self.completed > self.sent {
                return Err(io::Error::other("the kernel completed more zero-copy sends than there were"));
            }
            let counter = if copied { &self.counters.copied } else { &self.counters.zero_copied };
            counter.fetch_add(sends, Relaxed);
            self.copied |= copied;
        }
        Ok(())
    }
}

/// Once for all connections that share counters.
fn report_no_room(error: &io::Error) {
    tracing::warn!(
        %error,
        "zero-copy: the kernel has no room for a send, so it is copied; \
         raise the limit of locked memory (ulimit -l) or net.core.optmem_max"
    );
}

/// The next message on the error queue; `None` where there is none.
fn next_notice(socket: BorrowedFd<'_>) -> io::Result<Option<libc::sock_extended_err>> {
    // In words of 8 bytes, because control messages begin with a length that is aligned like that.
    let mut control = [0u64; 32];
    // SAFETY: all zeros is a valid `msghdr`; see `IoVecs::message`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    // SAFETY: `message` has no data buffer and a control buffer of the length given, which the kernel writes.
    match retried(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) }) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error),
    }
    // SAFETY: the kernel filled in `message`, and its control buffer is alive.
    let mut entry = unsafe { libc::CMSG_FIRSTHDR(&message) };
    while !entry.is_null() {
        // SAFETY: not null, so a header within the control buffer, which is aligned for it.
        let header = unsafe { entry.read() };
        let is_error = matches!(
            (header.cmsg_level, header.cmsg_type),
            (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)
        );
        // SAFETY: `CMSG_LEN` only computes.
        let enough = unsafe { libc::CMSG_LEN(size_of::<libc::sock_extended_err>() as u32) } as usize;
        if is_error && header.cmsg_len as usize >= enough {
            // SAFETY: the header lies within the control buffer.
            let payload = unsafe { libc::CMSG_DATA(entry) };
            // SAFETY: the payload is long enough, by the length just compared; `read_unaligned` asks for no alignment.
            return Ok(Some(unsafe { payload.cast::<libc::sock_extended_err>().read_unaligned() }));
        }
        // SAFETY: as for the first one.
        entry = unsafe { libc::CMSG_NXTHDR(&message, entry) };
    }
    Err(io::Error::other("a message without an error on the error queue of a socket"))
}

/// How many sends a notice completes, and whether they were copied; `None` for a notice of something else.
fn completion(notice: &libc::sock_extended_err) -> Option<(u64, bool)> {
    if notice.ee_errno != 0 || notice.ee_origin != SO_EE_ORIGIN_ZEROCOPY {
        return None;
    }
    // Numbers of 32 bits, first and last, which wrap.
    let sends = u64::from(notice.ee_data.wrapping_sub(notice.ee_info)) + 1;
    Some((sends, notice.ee_code & SO_EE_CODE_ZEROCOPY_COPIED != 0))
}

/// What the kernel says where a kind of socket does not have an option.
const ENOTSUPP: libc::c_int = 524;

/// The notice is about zero-copy sends.
const SO_EE_ORIGIN_ZEROCOPY: u8 = 5;

/// The kernel copied the pages of these sends.
const SO_EE_CODE_ZEROCOPY_COPIED: u8 = 1;

/// Completions are taken once so many are outstanding. The default optmem_max has room for about 100.
const REAP_ABOVE: u64 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(first: u32, last: u32, code: u8) -> libc::sock_extended_err {
        libc::sock_extended_err {
            ee_errno: 0,
            ee_origin: SO_EE_ORIGIN_ZEROCOPY,
            ee_type: 0,
            ee_code: code,
            ee_pad: 0,
            ee_info: first,
            ee_data: last,
        }
    }

    #[test]
    fn a_notice_counts_the_sends_of_its_range() {
        assert_eq!(completion(&notice(7, 7, 0)), Some((1, false)));
        assert_eq!(completion(&notice(3, 9, 1)), Some((7, true)));
        assert_eq!(completion(&notice(u32::MAX, 1, 0)), Some((3, false)), "numbers wrap");
        let foreign = libc::sock_extended_err { ee_origin: 2, ..notice(0, 0, 0) };
        assert_eq!(completion(&foreign), None);
    }
}

//! What a TCP connection keeps that its peer does not have: how much it is, and a limit, so that what is written next does not
//! wait long.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    time::Duration,
};

use linux_raw_sys::{
    ioctl::TIOCOUTQ,
    net::{TCP_INFO, tcp_info},
};
use rustix::ioctl;

use crate::transport::Transit;

/// Has writes wait while about `bytes` are unsent (`TCP_NOTSENT_LOWAT`). Bytes that are on their way do not count, so long
/// links are as fast as before.
pub(crate) fn limit(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the option takes an int, which `bytes` is, and the kernel only reads it.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_NOTSENT_LOWAT,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bytes that were written and that the peer has not acknowledged (`SIOCOUTQ`), also not behind a hole (`tcpi_sacked`), the shortest round trip so far, and the rate of delivery
/// that the kernel has measured (`tcpi_delivery_rate`): the latest, or the highest where there was not always something to send.
///
/// # Errors
/// [`io::ErrorKind::ConnectionReset`] where the connection has ended in both directions; the kernel's.
pub(crate) fn in_transit(socket: BorrowedFd<'_>) -> io::Result<Transit> {
    let info = info(socket)?;
    if info.tcpi_state == TCP_CLOSE {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    // SAFETY: the call writes an int, and SIOCOUTQ has the number of TIOCOUTQ.
    let request = unsafe { ioctl::Getter::<{ TIOCOUTQ as ioctl::Opcode }, libc::c_int>::new() };
    // SAFETY: `request` is complete.
    let bytes = unsafe { ioctl::ioctl(socket, request) }?;
    // No sample so far.
    let round_trip = if info.tcpi_min_rtt == u32::MAX { 0 } else { info.tcpi_min_rtt };
    let unacknowledged = without_holes(u64::try_from(bytes).unwrap_or(0), &info);
    let transit = Transit::new(unacknowledged, Duration::from_micros(round_trip.into()));
    // No sample so far, or a kernel before 4.9.
    let rate = info.tcpi_delivery_rate;
    Ok(if rate == 0 { transit } else { transit.carrying(rate) })
}

/// Less what the peer has behind bytes that were lost: they are acknowledged together, when the lost ones have been sent again.
fn without_holes(unacknowledged: u64, info: &tcp_info) -> u64 {
    let behind = u64::from(info.tcpi_sacked) * u64::from(info.tcpi_snd_mss);
    // Of these packets some may be shorter than most, and what was lost is on its way in any case.
    unacknowledged.saturating_sub(behind).max(unacknowledged.min(1))
}

fn info(socket: BorrowedFd<'_>) -> io::Result<tcp_info> {
    // SAFETY: it consists of integers, of which 0 is one.
    let mut info: tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `info`, and to `len`. An older one writes fewer.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_INFO as libc::c_int,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    if status == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// A state of the kernel's, in which a connection is that was reset.
const TCP_CLOSE: u8 = 7;
/// Linux's, which libc does not name on all targets.
const TCP_NOTSENT_LOWAT: libc::c_int = 25;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn what_the_peer_has_behind_a_lost_packet_is_not_on_its_way() {
        // SAFETY: it consists of integers, of which 0 is one.
        let none: tcp_info = unsafe { std::mem::zeroed() };
        let sacked = |packets| tcp_info { tcpi_sacked: packets, tcpi_snd_mss: 1448, ..none };
        assert_eq!(without_holes(100_000, &sacked(0)), 100_000);
        assert_eq!(without_holes(100_000, &sacked(60)), 13_120);
        // The lost packet and those behind it were short.
        assert_eq!(without_holes(2_000, &sacked(2)), 1, "something is on its way");
        assert_eq!(without_holes(0, &sacked(2)), 0);
    }
}

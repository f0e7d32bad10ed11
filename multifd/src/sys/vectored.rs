//! Sends and receives guest memory with one system call for many ranges.
//!
//! Contiguous ranges are one entry of the vector; calls that moved only a part go on where the kernel stopped.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsRawFd, BorrowedFd},
};

use crate::ram::GuestRange;

/// Sends `header` and then the bytes of `pages` to a socket. A peer that is gone is an error, not a signal.
pub(crate) fn send(socket: BorrowedFd<'_>, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
    let mut left = IoVecs::new(header, pages);
    while !left.is_empty() {
        left.send_some(socket, libc::MSG_NOSIGNAL)?;
    }
    Ok(())
}

/// Fills `pages` from a socket.
pub(crate) fn receive(socket: BorrowedFd<'_>, pages: &[GuestRange<'_>]) -> io::Result<()> {
    pages.iter().try_for_each(GuestRange::require_writable)?;
    let mut left = IoVecs::new(&[], pages);
    while !left.is_empty() {
        left.receive_some(socket)?;
    }
    Ok(())
}

/// Byte ranges that the kernel is yet to move, in order.
pub(crate) struct IoVecs<'a> {
    /// None is empty. Each lies within a slice or a [`GuestRange`] that lives for `'a`.
    vecs: Vec<libc::iovec>,
    /// Those before this one have been moved.
    first: usize,
    ranges: PhantomData<&'a ()>,
}

impl<'a> IoVecs<'a> {
    /// `header`, then `pages`, with neighbours joined. The header is only ever read.
    pub(crate) fn new(header: &'a [u8], pages: &[GuestRange<'a>]) -> IoVecs<'a> {
        let mut vecs: Vec<libc::iovec> = Vec::with_capacity(1 + pages.len());
        if !header.is_empty() {
            vecs.push(libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() });
        }
        let mut pages = pages.iter().filter(|page| !page.is_empty());
        if let Some(mut run) = pages.next().copied() {
            for page in pages {
                match run.joined(page) {
                    Some(joined) => run = joined,
                    None => {
                        vecs.push(iovec(run));
                        run = *page;
                    }
                }
            }
            vecs.push(iovec(run));
        }
        IoVecs { vecs, first: 0, ranges: PhantomData }
    }

    /// Sends at least one byte of what is left and returns how many.
    pub(crate) fn send_some(&mut self, socket: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<usize> {
        let message = self.message();
        // SAFETY: `message` refers to at most IOV_MAX entries, each of them readable memory that lives as long as
        // `self`. The kernel only reads it; no Rust reference to guest memory exists.
        let sent = retried(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) })?;
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.advance(sent);
        Ok(sent)
    }

    /// Fills at least one byte of what is left. All ranges must be guest memory.
    fn receive_some(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut message = self.message();
        // SAFETY: `message` refers to at most IOV_MAX entries, each made of a `GuestRange` that may be written because the
        // only caller has checked that and passes no header, so each is mapped memory that lives as long as `self`. The kernel writes it; no Rust
        // reference to it exists.
        let received = retried(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, 0) })?;
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.advance(received);
        Ok(())
    }

    /// Everything has been moved.
    pub(crate) fn is_empty(&self) -> bool {
        self.first == self.vecs.len()
    }

    /// What the next call moves: as many entries as one call takes.
    fn message(&mut self) -> libc::msghdr {
        let vecs = &mut self.vecs[self.first..];
        // SAFETY: all zeros is a valid `msghdr`: null pointers with zero lengths. (It has private padding in some C
        // libraries, so it cannot be written as a literal.)
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vecs.as_mut_ptr();
        message.msg_iovlen = vecs.len().min(IOV_MAX) as _;
        message
    }

    /// The first `moved` bytes of what is left are done.
    fn advance(&mut self, mut moved: usize) {
        while moved > 0 {
            let vec = &mut self.vecs[self.first];
            if moved < vec.iov_len {
                vec.iov_base = vec.iov_base.wrapping_byte_add(moved);
                vec.iov_len -= moved;
                return;
            }
            moved -= vec.iov_len;
            self.first += 1;
        }
    }
}

fn iovec(range: GuestRange<'_>) -> libc::iovec {
    libc::iovec { iov_base: range.as_ptr().cast(), iov_len: range.len() }
}

/// The result of `call`, repeated for as long as a signal interrupts it.
pub(super) fn retried(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_negative) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// What Linux takes in one call (`UIO_MAXIOV`).
const IOV_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::Ram;

    fn lengths(vecs: &IoVecs<'_>) -> Vec<usize> {
        vecs.vecs[vecs.first..].iter().map(|vec| vec.iov_len).collect()
    }

    #[test]
    fn neighbours_are_one_entry() {
        let ram = Ram::for_test(&[("a", 8)]);
        let pages: Vec<_> = [0, 1, 2, 4, 3, 5, 6].map(|page| ram.page(page).unwrap()).into();
        assert_eq!(lengths(&IoVecs::new(b"head", &pages)), [4, 3 * 4096, 4096, 4096, 2 * 4096]);
        assert_eq!(lengths(&IoVecs::new(&[], &[])), [0; 0]);
    }

    #[test]
    fn the_next_call_begins_where_the_last_one_ended() {
        let ram = Ram::for_test(&[("a", 4)]);
        let pages = [ram.page(0).unwrap(), ram.page(2).unwrap()];
        let mut vecs = IoVecs::new(b"head", &pages);
        vecs.advance(3);
        assert_eq!(lengths(&vecs), [1, 4096, 4096]);
        vecs.advance(1);
        assert_eq!(lengths(&vecs), [4096, 4096]);
        vecs.advance(4096 + 5);
        assert_eq!(lengths(&vecs), [4091]);
        assert_eq!(vecs.vecs[vecs.first].iov_base as usize, pages[1].as_ptr() as usize + 5);
        vecs.advance(4091);
        assert!(vecs.is_empty());
    }

    #[test]
    fn a_send_that_moved_a_part_goes_on_in_the_middle_of_a_page() {
        use std::{io::Read, os::fd::AsFd, os::unix::net::UnixStream};
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let ram = Ram::for_test(&[("a", 128)]);
        let pages: Vec<_> = (0..128).step_by(2).map(|page| ram.page(page).unwrap()).collect();
        for (index, page) in pages.iter().enumerate() {
            page.write(&[index as u8; 4096]);
        }
        let mut vecs = IoVecs::new(b"head", &pages);
        let (mut received, mut within_a_page) = (Vec::new(), 0);
        while !vecs.is_empty() {
            match vecs.send_some(ours.as_fd(), libc::MSG_DONTWAIT) {
                Ok(_) => within_a_page += usize::from(lengths(&vecs).first().is_some_and(|&len| len < 4096)),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    let mut some = vec![0; 10_001];
                    let n = theirs.read(&mut some).unwrap();
                    received.extend_from_slice(&some[..n]);
                }
            }
        }
        drop(ours);
        theirs.read_to_end(&mut received).unwrap();
        assert!(received[..4] == *b"head" && received.len() == 4 + 64 * 4096);
        assert!(received[4..].chunks(4096).enumerate().all(|(index, page)| *page == [index as u8; 4096]));
        assert!(within_a_page > 0, "no send ended within a page");
    }

    #[test]
    fn a_call_is_given_at_most_what_the_kernel_takes() {
        let ram = Ram::for_test(&[("a", 2 * IOV_MAX + 2)]);
        let pages: Vec<_> = (0..=IOV_MAX as u64).map(|page| ram.page(2 * page).unwrap()).collect();
        let mut vecs = IoVecs::new(&[], &pages);
        assert_eq!(vecs.vecs.len(), IOV_MAX + 1);
        assert_eq!(vecs.message().msg_iovlen, IOV_MAX);
        vecs.advance(IOV_MAX * 4096);
        assert_eq!(vecs.message().msg_iovlen, 1);
    }
}

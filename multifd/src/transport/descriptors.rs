//! Descriptors beside the bytes of a unix socket (`SCM_RIGHTS`).

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::{
    cmsg_space,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
};

/// Sends at least one of `bytes`, of which there are some, and all of `descriptors` beside it. Returns how many bytes were sent.
pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    debug_assert!(!bytes.is_empty(), "descriptors travel beside a byte");
    let mut space = [MaybeUninit::uninit(); ROOM];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 253 descriptors"));
    }
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Reads what is there into `into`, and puts the descriptors beside it behind those in `descriptors`.
pub(super) fn receive(socket: BorrowedFd<'_>, into: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); ROOM];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            descriptors.extend(came);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        let message = "descriptors were lost: this process may not have more of them (ulimit -n)";
        return Err(io::Error::other(message));
    }
    Ok(received.bytes)
}

/// For as many descriptors as the kernel passes at once.
const ROOM: usize = cmsg_space!(ScmRights(253));

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::os::{fd::AsFd, unix::net::UnixStream};

    use rustix::fs::fstat;

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    #[test]
    fn descriptors_arrive_with_the_first_byte_and_are_those_that_were_sent() {
        let (from, to) = pair();
        let files: Vec<UnixStream> = (0..253).map(|_| pair().0).collect();
        let sent: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        assert_eq!(send(from.as_fd(), b"here", &sent).unwrap(), 4);
        let (mut came, mut bytes) = (Vec::new(), [0; 1]);
        assert_eq!(receive(to.as_fd(), &mut bytes, &mut came).unwrap(), 1);
        let inode = |file: BorrowedFd<'_>| fstat(file).unwrap().st_ino;
        let inodes = |files: Vec<BorrowedFd<'_>>| files.into_iter().map(inode).collect::<Vec<_>>();
        assert_eq!(inodes(came.iter().map(AsFd::as_fd).collect()), inodes(sent.clone()));
        assert_eq!(receive(to.as_fd(), &mut [0; 9], &mut came).unwrap(), 3);
        assert_eq!(came.len(), 253, "none comes a second time");
        let too_many: Vec<_> = sent.iter().copied().chain([from.as_fd()]).collect();
        assert_eq!(send(from.as_fd(), b"x", &too_many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

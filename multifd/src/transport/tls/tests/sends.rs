//! How records go out: together, sealed, and each under its key.

use std::sync::Mutex;

use super::*;
use crate::{
    ram::GuestRange,
    transport::tls::{records::MAX_PLAIN, sends::TlsSends},
};

/// Keeps what is written to it, until it fails.
#[derive(Clone, Default)]
struct Written {
    writes: Arc<Mutex<Vec<Vec<u8>>>>,
    /// The number of the write that fails, from 0.
    failing: Option<usize>,
}

impl SendHalf for Written {
    fn write(&mut self, bytes: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        assert!(pages.is_empty(), "no page leaves as it is");
        let mut writes = self.writes.lock().unwrap();
        writes.push(bytes.to_vec());
        if self.failing == Some(writes.len() - 1) { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// 128 pages, as many as a packet has, of bytes that are never zero.
fn packet() -> Ram {
    let ram = Ram::for_test(&[("a", 128)]);
    (0..128).for_each(|page| ram.page(page).unwrap().write(&[page as u8 | 1; 4096]));
    ram
}

fn pages(ram: &Ram) -> Vec<GuestRange<'_>> {
    (0..128).map(|page| ram.page(page).unwrap()).collect()
}

/// The lengths of the records in `bytes`, which has nothing else.
fn records(mut bytes: &[u8]) -> Vec<usize> {
    let mut lens = Vec::new();
    while let [23, 3, 3, a, b, rest @ ..] = bytes {
        let len = usize::from(u16::from_be_bytes([*a, *b]));
        lens.push(len);
        bytes = &rest[len..];
    }
    assert!(bytes.is_empty(), "{bytes:?}");
    lens
}

#[test]
fn a_packet_goes_out_in_whole_records_several_at_a_time_and_nothing_of_it_is_plain() {
    let (_ours, session, _theirs) = by_hand();
    let (ram, written) = (packet(), Written::default());
    let mut sends = TlsSends::new(Box::new(written.clone()), session.sealer);
    sends.write(b"a header", &pages(&ram)).unwrap();
    let writes = written.writes.lock().unwrap();
    let in_each: Vec<Vec<usize>> = writes.iter().map(|bytes| records(bytes)).collect();
    let all: Vec<usize> = in_each.concat();
    // Content, its type, and a tag.
    assert_eq!(all.iter().map(|len| len - 17).sum::<usize>(), 8 + 128 * 4096);
    assert!(all[..all.len() - 1].iter().all(|&len| len == MAX_PLAIN + 17), "{all:?}");
    assert_eq!(in_each.iter().map(Vec::len).collect::<Vec<_>>(), [8, 8, 8, 8, 1]);
    for bytes in writes.iter() {
        assert!(!bytes.windows(8).any(|bytes| bytes == b"a header" || bytes == [bytes[0]; 8]), "it is not sealed");
    }
}

#[test]
fn what_a_write_says_is_out_when_it_returns() {
    let (_ours, session, _theirs) = by_hand();
    let written = Written::default();
    let mut sends = TlsSends::new(Box::new(written.clone()), session.sealer);
    for len in [1, 7, MAX_PLAIN, MAX_PLAIN + 1] {
        let before = written.writes.lock().unwrap().len();
        sends.write(&vec![1; len], &[]).unwrap();
        let writes = written.writes.lock().unwrap();
        let content: usize = writes[before..].iter().flat_map(|bytes| records(bytes)).map(|len| len - 17).sum();
        assert_eq!(content, len);
    }
    sends.write(b"", &[]).unwrap();
    assert_eq!(written.writes.lock().unwrap().len(), 4, "nothing to say");
}

/// The peer cannot tell how much of it came, so nothing that was sealed may be sent a second time.
#[test]
fn what_a_failed_write_left_is_not_sent_later() {
    for failing in 0..5 {
        let (_ours, session, _theirs) = by_hand();
        let (ram, written) = (packet(), Written { failing: Some(failing), ..Written::default() });
        let mut sends = TlsSends::new(Box::new(written.clone()), session.sealer);
        let error = sends.write(b"a header", &pages(&ram)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(written.writes.lock().unwrap().len(), failing + 1, "it ends there");
        sends.write(b"next", &[]).unwrap();
        sends.finish().unwrap();
        let writes = written.writes.lock().unwrap();
        let rest: Vec<Vec<usize>> = writes[failing + 1..].iter().map(|bytes| records(bytes)).collect();
        assert_eq!(rest, [[4 + 17], [2 + 17]], "the next, and close_notify");
    }
}

/// A key is used up in the middle of what goes out together.
#[test]
fn the_key_is_replaced_within_a_write() {
    let (ours, mut session, mut theirs) = by_hand();
    session.sealer.limit_records(5);
    let (inner, _receives) = Box::new(SocketStream::new(ours.into()).unwrap()).split().unwrap();
    let send = thread::spawn(move || {
        let (ram, mut sends) = (packet(), TlsSends::new(inner, session.sealer));
        (0..3).for_each(|_| sends.write(b"odd", &pages(&ram)).unwrap());
        sends.finish().unwrap();
    });
    time_limit(LIMIT, || {
        for _ in 0..3 {
            let mut header = [0; 3];
            theirs.read_exact(&mut header).unwrap();
            assert_eq!(&header, b"odd");
            let to = Ram::for_test(&[("a", 128)]);
            theirs.read_pages(&pages(&to)).unwrap();
            (0..128).for_each(|page| assert_eq!(to.page_bytes(page), [page as u8 | 1; 4096], "page {page}"));
        }
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        send.join().unwrap();
    });
}

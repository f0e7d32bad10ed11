//! What a source writes on its connections: the headers of its packets, and how it ends.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use multifd_proto::packet::{Compression, HELLO_LEN, RamPacket, header_len};
use test_support::time_limit;

use super::{
    memory,
    vm::{TestDestination, TestSource},
};
use crate::{
    destination::{self, Destination},
    ram::{GuestRange, Ram},
    source::{self, Source, Untouched},
    sync::lock,
    transport::{Connect, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
};

const PAGE: usize = 4096;
const PAGES: usize = 600;

/// A connector whose connections note what is written.
struct Noting {
    inner: memory::MemoryConnector,
    /// What came with each write on a channel, without the pages that it named.
    packets: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Connections that were ended in order.
    finished: Arc<AtomicUsize>,
}

impl Connect for Noting {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        let (packets, finished) = (self.packets.clone(), self.finished.clone());
        Ok(wrapped(self.inner.dial()?, move |inner| Ok(Box::new(Noted { inner, packets, finished }))))
    }
}

struct Noted<S: ?Sized = dyn Stream> {
    packets: Arc<Mutex<Vec<Vec<u8>>>>,
    finished: Arc<AtomicUsize>,
    inner: Box<S>,
}

impl<S: SendHalf + ?Sized> SendHalf for Noted<S> {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        lock(&self.packets).push(header.to_vec());
        self.inner.write(header, pages)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.finished.fetch_add(1, SeqCst);
        self.inner.finish()
    }
}

receives_as_inner!(Noted<S>, S: RecvHalf + ?Sized);

impl Stream for Noted {
    /// Of main, whose writes are no packets.
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let Noted { inner, finished, .. } = *self;
        let (sends, receives) = inner.split()?;
        Ok((Box::new(Noted { packets: Arc::default(), finished, inner: sends }), receives))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

/// Migrates a VM whose page `n` holds `content(n)` everywhere. Returns the source's report, what was written on channels, and how many
/// connections were ended in order.
fn written(options: source::Options, content: impl Fn(u64) -> u64) -> (source::Report, Vec<Vec<u8>>, usize) {
    let ram = || Ram::for_test(&[("ram", PAGES)]);
    let (from, to) = (ram(), ram());
    for page in 0..PAGES as u64 {
        from.page(page).unwrap().write(&content(page).to_ne_bytes().repeat(PAGE / 8));
    }
    let (listener, inner) = memory::listener(1 << 20);
    let connector = Noting { inner, packets: Arc::default(), finished: Arc::default() };
    let report = time_limit(Duration::from_secs(60), || {
        std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                let mut vm = TestDestination::new(to.clone());
                Destination::new(destination::Options::default()).run(&mut vm, Box::new(listener), &mut ()).map(drop)
            });
            let sent = Source::new(options).run(&mut TestSource::new(from.clone()), &connector, &mut ());
            there.join().unwrap().unwrap();
            sent.unwrap()
        })
    });
    assert!((0..PAGES as u64).all(|page| from.page_bytes(page) == to.page_bytes(page)));
    let packets = std::mem::take(&mut *lock(&connector.packets));
    (report, packets, connector.finished.load(SeqCst))
}

fn options(compression: Compression) -> source::Options {
    let mut options = source::Options::default();
    options.plan.channels = 2;
    options.format.untouched = Untouched::Name;
    options.format.compression = compression;
    options
}

/// Those of `written` that are packets of pages.
fn packets(written: &[Vec<u8>]) -> impl Iterator<Item = RamPacket<'_>> {
    let headers = written.iter().filter(|bytes| bytes.len() != HELLO_LEN).map(|bytes| &bytes[..header_len(PAGE)]);
    headers.map(|header| RamPacket::decode(header, PAGE).unwrap()).filter(|packet| !packet.is_empty())
}

/// A destination may have more of them to read than of main, and takes an end that is none of these for a failure.
#[test]
fn every_connection_is_ended_in_order() {
    let (_, _, finished) = written(options(Compression::None), |page| page);
    assert_eq!(finished, 1 + 2, "main and each channel");
}

/// A QEMU compares the method of every packet with its own.
#[test]
fn a_packet_of_zero_pages_names_the_compression_and_has_no_payload() {
    for (name, content) in [("all zero", 0), ("some content", 1)] {
        let (_, written, _) = written(options(Compression::Zstd), |page| if page < 300 { 0 } else { content * page });
        let mut without = 0;
        for packet in packets(&written) {
            assert_eq!(packet.compression, Compression::Zstd, "{name}: {packet:?}");
            if packet.normal.clone().next().is_none() {
                assert_eq!(packet.payload_len, 0, "{name}: {packet:?}");
                without += 1;
            }
        }
        assert!(without > 0, "{name}: every packet has content");
    }
}

/// It takes no time to compress and none to send, and says nothing about either.
#[test]
fn a_packet_of_zero_pages_is_not_measured() {
    let mut options = options(Compression::Zstd);
    options.format.auto_compression = true;
    let (report, written, _) = written(options, |page| if page < 300 { 0 } else { page });
    let with = packets(&written).filter(|packet| packet.normal.clone().next().is_some()).count();
    assert!(with > 0 && packets(&written).count() > with, "both kinds are there");
    let channels = report.auto_compression.iter();
    let measured: u64 = channels.map(|channel| channel.packets_plain + channel.packets_compressed).sum();
    assert_eq!(measured, with as u64);
}

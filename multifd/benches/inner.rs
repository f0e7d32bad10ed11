//! What the inner parts cost: the zero test, the page scan, the packet codec, the barrier.

use std::{hint::black_box, thread, time::Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use multifd::{
    dirty_bitmap::DirtyBitmap,
    layout::Layout,
    multifd_proto::{
        BlockName,
        packet::{self, Compression, PacketHeader, RamPacket},
    },
    ram::{Ram, RamBlock},
    testing::bench::{Barrier, Pages, Scan},
};

const PAGE: usize = 4096;

fn zero_test(c: &mut Criterion) {
    let block = RamBlock::anonymous(BlockName::new("ram").expect("short"), 64 << 20).expect("64 MiB");
    let ram = Ram::new(PAGE, vec![block]).expect("one block");
    for page in 0..ram.layout().pages() {
        ram.page(page).expect("of the block").clear();
    }
    let mut group = c.benchmark_group("zero test");
    group.throughput(Throughput::Bytes(64 << 20));
    group.bench_function("64 MiB of zeros", |b| {
        b.iter(|| (0..ram.layout().pages()).filter(|&page| ram.page(page).expect("of the block").is_zero()).count());
    });
    let page = ram.page(0).expect("the first");
    page.write(&[1; PAGE]);
    group.throughput(Throughput::Elements(1));
    group.bench_function("a page with content", |b| b.iter(|| black_box(page).is_zero()));
    group.finish();
}

/// A terabyte of 4 KiB pages.
fn terabyte() -> Layout {
    terabytes(1)
}

fn terabytes(count: u64) -> Layout {
    Layout::new(PAGE, [(BlockName::new("ram").expect("short"), count << 40)]).expect("one block")
}

/// What each round pays for the size of the guest, and the pause once more: counting what is dirty, and taking over what a
/// log reports. The bitmap has been through a round with all of its pages.
fn rounds_of_large_guests(c: &mut Criterion) {
    let mut group = c.benchmark_group("bitmap after a full round");
    group.sample_size(10);
    for count in [1, 16, 64] {
        let layout = terabytes(count);
        let mut dirty = DirtyBitmap::full(&layout);
        let mut none = DirtyBitmap::new(&layout);
        dirty.subtract(&DirtyBitmap::full(&layout));
        group.bench_function(format!("{count} TiB, count"), |b| b.iter(|| black_box(&dirty).count()));
        let mut few = DirtyBitmap::new(&layout);
        (0..1000).for_each(|page| few.set(page * (layout.pages() / 1000)));
        group.bench_function(format!("{count} TiB, drain and count 1000 pages"), |b| {
            b.iter(|| {
                none.merge(black_box(&few));
                let counted = none.count();
                none.subtract(&few);
                counted
            });
        });
    }
    group.finish();
}

fn scan(c: &mut Criterion) {
    let layout = terabyte();
    let scan = Scan::new(layout.clone(), packet::capacity(PAGE));
    let mut pages = Pages::default();
    let mut group = c.benchmark_group("bitmap of 1 TiB");
    let clean = DirtyBitmap::new(&layout);
    group.bench_function("count, clean", |b| b.iter(|| black_box(&clean).count()));
    let mut sparse = DirtyBitmap::new(&layout);
    (0..layout.pages()).step_by(100).for_each(|page| sparse.set(page));
    group.sample_size(10);
    group.bench_function("count, every 100th page dirty", |b| b.iter(|| black_box(&sparse).count()));
    group.bench_function("scan, every 100th page dirty", |b| {
        b.iter_custom(|times| {
            (0..times)
                .map(|_| {
                    let mut dirty = sparse.clone();
                    let begun = Instant::now();
                    scan.open(&mut dirty);
                    while scan.next(&mut pages) > 0 {}
                    begun.elapsed()
                })
                .sum()
        });
    });
    group.finish();
}

/// Batches while `threads` take them.
fn batches(c: &mut Criterion) {
    let layout = terabyte();
    let scan = Scan::new(layout.clone(), packet::capacity(PAGE));
    let mut group = c.benchmark_group("batch of 128 pages");
    for threads in [1, 2, 8] {
        group.bench_function(format!("{threads} threads"), |b| {
            b.iter_custom(|times| {
                // As many as will be taken: what is left over belongs to no later measurement.
                let mut dirty = DirtyBitmap::new(&layout);
                dirty.set_range(0..layout.pages().min(times.div_ceil(threads) * threads * 128));
                scan.open(&mut dirty);
                let begun = Instant::now();
                thread::scope(|scope| {
                    for _ in 0..threads {
                        scope.spawn(|| {
                            let mut pages = Pages::default();
                            for _ in 0..times.div_ceil(threads) {
                                black_box(scan.next(&mut pages));
                            }
                        });
                    }
                });
                begun.elapsed()
            });
        });
    }
    group.finish();
}

fn codec(c: &mut Criterion) {
    let offsets: Vec<u64> = (0..128).map(|page| page * PAGE as u64).collect();
    let header = PacketHeader {
        sync: false,
        compression: Compression::None,
        packet_num: 7,
        block: "ram",
        normal: &offsets,
        zero: &[],
        payload_len: packet::PACKET_BYTES as u32,
    };
    let mut bytes = vec![0; packet::header_len(PAGE)];
    let mut group = c.benchmark_group("packet of 128 pages");
    group.bench_function("encode", |b| b.iter(|| black_box(&header).encode_into(&mut bytes, PAGE)));
    let name = BlockName::new("ram").expect("short");
    group.bench_function("decode and check", |b| {
        b.iter(|| {
            let packet = RamPacket::decode(black_box(&bytes), PAGE).expect("just encoded");
            packet.check_pages(&name, 1 << 30, PAGE).expect("in bounds");
            packet.normal.clone().sum::<u64>()
        });
    });
    group.finish();
}

fn barrier(c: &mut Criterion) {
    let mut group = c.benchmark_group("barrier");
    for channels in [1, 4, 8, 16] {
        group.bench_function(format!("{channels} channels"), |b| {
            b.iter_custom(|times| {
                let barrier = Barrier::new(channels);
                thread::scope(|scope| {
                    for id in 0..channels {
                        let barrier = barrier.clone();
                        scope.spawn(move || (0..times).for_each(|_| barrier.channel(id)));
                    }
                    let begun = Instant::now();
                    (0..times).for_each(|_| barrier.main());
                    begun.elapsed()
                })
            });
        });
    }
    group.finish();
}

criterion_group!(inner, zero_test, scan, rounds_of_large_guests, batches, codec, barrier);
criterion_main!(inner);

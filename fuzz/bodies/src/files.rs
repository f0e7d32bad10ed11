//! Mapped-ram files, of which whatever opens lies inside the file; and recorded migrations.

use std::{
    cell::RefCell,
    fs,
    io::{Cursor, Read},
    path::PathBuf,
};

use multifd::{
    checkpoint::Checkpoint,
    inspect::{Inspection, Recorded},
};
use multifd_proto::{Codec, Step, mapped_ram::BlockHeader};
use test_support::TempDir;

/// Opens the input as a checkpoint and reads all of it; also takes its first bytes for a block's header.
pub(crate) fn mapped_ram(input: &[u8]) {
    if let Ok(Step::Item { item, used }) = BlockHeader::decode(input) {
        let mut encoded = Vec::new();
        item.encode(&mut encoded);
        assert_eq!(encoded, input[..used]);
    }
    thread_local! {
        static PLACE: RefCell<Option<(TempDir, PathBuf)>> = const { RefCell::new(None) };
    }
    PLACE.with_borrow_mut(|place| {
        let (_, path) = place.get_or_insert_with(|| {
            let directory = TempDir::in_memory().expect("a temporary directory");
            let path = directory.join("checkpoint");
            (directory, path)
        });
        fs::write(&*path, input).expect("a file in memory");
        let Ok(checkpoint) = Checkpoint::open(path) else { return };
        let mut total = 0;
        for (index, block) in checkpoint.blocks().iter().enumerate() {
            if block.elsewhere {
                checkpoint.block_reader(index).read(&mut [0]).expect_err("nothing is known of it");
                continue;
            }
            assert!(block.pages_offset + block.bytes <= input.len() as u64);
            let mut content = Vec::new();
            checkpoint.block_reader(index).take(1 << 24).read_to_end(&mut content).expect("it lies inside the file");
            assert_eq!(content.len() as u64, block.bytes.min(1 << 24));
            total += block.bytes;
        }
        assert!(total <= input.len() as u64, "blocks overlap");
        let beside_ram = checkpoint.beside_ram();
        let kept = checkpoint.sections().len() + beside_ram.early().len() + beside_ram.in_parts().len();
        assert!(kept <= input.len());
    });
}

/// Inspects a recording, in the frames of [`destination`](crate::destination); its connection 0 is main. If the first byte
/// is odd, the contents of memory are kept.
pub(crate) fn inspect(input: &[u8]) {
    let Some((first, frames)) = input.split_first() else { return };
    let total = frames.len();
    let mut wires = crate::destination::wires(frames).into_iter().map(|wire| Box::new(Cursor::new(wire.bytes)) as _);
    let Some(main) = wires.next() else { return };
    let directory = (first % 2 == 1).then(|| TempDir::in_memory().expect("a temporary directory"));
    let recorded = Recorded { main, channels: wires.collect(), preempt: None };
    let inspection = Inspection::of(recorded, directory.as_ref().map(TempDir::path)).expect("a file in memory");
    assert!(inspection.account.main.bytes <= total as u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_a_complete_recording_or_file() {
        for (index, seed) in crate::seeds::recordings().iter().enumerate() {
            let mut wires =
                crate::destination::wires(&seed[1..]).into_iter().map(|wire| Box::new(Cursor::new(wire.bytes)) as _);
            let recorded = Recorded { main: wires.next().unwrap(), channels: wires.collect(), preempt: None };
            let inspection = Inspection::of(recorded, None).unwrap();
            assert!(inspection.broken.is_none(), "seed {index}: {:?}", inspection.broken);
        }
        let directory = TempDir::new().unwrap();
        for (index, is_whole) in [(0, true), (1, false)] {
            fs::write(directory.join("file"), &crate::seeds::files()[index]).unwrap();
            let checkpoint = Checkpoint::open(&directory.join("file")).unwrap();
            assert_eq!(checkpoint.blocks().len(), 2);
            assert_eq!(checkpoint.check_whole().is_ok(), is_whole);
        }
    }
}

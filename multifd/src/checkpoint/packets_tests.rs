//! Device-state packets of a QEMU through a checkpoint: the very same ones come out, on the channels they came on.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use multifd_proto::{
    BlockName, ChannelId,
    command::Command,
    device_state::{MAX_OPAQUE, OpaquePacket},
    encoder::MainEncoder,
    packet::{Hello, PacketHeader, header_len},
    ram::BlockEntry,
    stream::{Section, SectionKind},
};
use test_support::{TempDir, time_limit};

use super::{Checkpoint, CheckpointError, CheckpointSource, PacketedDevice, Writer, forged_ends::state, tail::QUIET};
use crate::{
    destination::{self, Destination},
    error::{Error, Mismatch},
    source::{self, Peer, Source},
    testing::memory,
    transport::{Connect, Stream},
};

const LIMIT: Duration = Duration::from_secs(120);
const NIC: &str = "0000:00:02.0/vfio";

/// A packet with a payload that tells it from others.
fn packet(name: &str, instance: u32, len: u32) -> Vec<u8> {
    let mut bytes = OpaquePacket { name, instance, len }.encode().to_vec();
    // What stands behind the name comes back as well.
    bytes[12 + name.len() + 1] = 0xee;
    bytes.extend((0..len).map(|at| (at.wrapping_mul(0x9e37_79b1) >> 13) as u8 ^ instance as u8));
    bytes
}

fn hello(id: u8) -> Vec<u8> {
    Hello { uuid: [0; 16], channel: ChannelId(id), channels: None }.encode().to_vec()
}

fn sync() -> Vec<u8> {
    let mut bytes = vec![0; header_len(4096)];
    PacketHeader::sync_packet(0).encode_into(&mut bytes, 4096);
    bytes
}

fn page(offset: u64) -> Vec<u8> {
    let (offsets, payload_len) = ([offset], 4096);
    let header =
        PacketHeader { block: "ram", normal: &offsets, payload_len, sync: false, ..PacketHeader::sync_packet(0) };
    let mut bytes = vec![0; header_len(4096)];
    header.encode_into(&mut bytes, 4096);
    bytes.extend([0x5a; 4096]);
    bytes
}

/// Main of a QEMU 10.0, with `beside` behind the START section of `ram`.
fn main(beside: &[u8]) -> Vec<u8> {
    let mut main = MainEncoder::default();
    main.header().configuration("pc-q35-10.0").command(&Command::OpenReturnPath).ram_start(1, 8 * 4096);
    main.block(&BlockEntry::new(BlockName::new("ram").unwrap(), 8 * 4096)).flush().eos().footer(1).raw(beside);
    main.ram_part(1, false).flush().eos().footer(1);
    main.command(&Command::SwitchoverStart).ram_part(1, true).flush().eos().footer(1);
    let (sections, description) = state(b"");
    main.raw(&sections).eof().vm_description(&description);
    main.bytes.clone()
}

/// What the channels of a QEMU say until it is answered, and afterwards.
#[derive(Clone, Default)]
struct Peers {
    beside: Vec<u8>,
    channels: Vec<Vec<u8>>,
    late: Vec<Vec<u8>>,
    /// The channels stay open until the receiver has ended.
    stays: bool,
}

impl Peers {
    /// Two channels, with packets in each place where one may come.
    fn good() -> Peers {
        let first = [hello(0), sync(), packet(NIC, 1, 1), page(0), packet(NIC, 2, 2_000), sync(), page(4096)];
        let first = [first.concat(), packet("gpu", 7, 3 << 20), sync(), packet(NIC, 3, 8)].concat();
        let second = [hello(1), sync(), page(8192), sync(), sync(), packet("gpu", 7, 60), packet(NIC, 1, 70_000)];
        Peers { channels: vec![first, second.concat()], ..Peers::default() }
    }

    fn with_late(mut self, late: &[Vec<u8>]) -> Peers {
        self.late = late.to_vec();
        self
    }

    /// Takes them into `writer`. When the source is answered, it goes on with what is late and closes all connections.
    fn receive(self, mut writer: Writer) -> Result<(), Error> {
        let channels = self.channels.len() as u8;
        time_limit(LIMIT, move || {
            let (listener, connector) = memory::listener(1 << 23);
            let (answered, is_answered) = mpsc::channel::<()>();
            let (over, is_over) = mpsc::channel::<()>();
            let source = thread::spawn(move || {
                let mut opened: Vec<Box<dyn Stream>> = Vec::new();
                for bytes in std::iter::once(&main(&self.beside)).chain(&self.channels) {
                    let mut stream = connector.connect().unwrap();
                    // Broken off where it is refused.
                    let _ = stream.write(bytes, &[]);
                    opened.push(stream);
                }
                // SWITCHOVER_ACK, then SHUT(0).
                let mut answer = [0; 12];
                let is_told = opened[0].read_exact(&mut answer).is_ok() && answer == *b"\0\x07\0\0\0\x01\0\x04\0\0\0\0";
                if is_told {
                    drop(answered);
                    for (stream, late) in opened[1..].iter_mut().zip(&self.late) {
                        let _ = stream.write(late, &[]);
                    }
                    if self.stays {
                        opened.remove(0);
                        let _ = is_over.recv();
                    }
                }
            });
            let mut options = destination::Options { channels: Some(channels), ..Default::default() };
            if self.stays {
                options.close_timeout = Duration::from_millis(50);
            }
            let received = writer.receive(Destination::new(options), Box::new(listener), &mut ());
            drop(over);
            source.join().unwrap();
            assert!(received.is_err() || is_answered.try_recv().is_err());
            received.map(drop)
        })
    }
}

fn receive(peers: Peers, path: &Path) -> Result<(), Error> {
    peers.receive(Writer::create(path, false)?)
}

/// The packets in a checkpoint, by channel.
fn packets(path: &Path) -> BTreeMap<u8, Vec<Vec<u8>>> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let Some(kept) = checkpoint.packets() else { return BTreeMap::new() };
    let mut found = BTreeMap::new();
    for channel in 0..=u8::MAX {
        let mut bytes = Vec::new();
        kept.send(ChannelId(channel), u8::MAX, |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })
        .unwrap();
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let len = 276 + OpaquePacket::decode(&bytes[..276]).unwrap().len as usize;
            all.push(bytes.drain(..len).collect());
        }
        if !all.is_empty() {
            found.insert(channel, all);
        }
    }
    found
}

fn good_packets() -> BTreeMap<u8, Vec<Vec<u8>>> {
    let first = vec![packet(NIC, 1, 1), packet(NIC, 2, 2_000), packet("gpu", 7, 3 << 20), packet(NIC, 3, 8)];
    [(0, first), (1, vec![packet("gpu", 7, 60), packet(NIC, 1, 70_000)])].into()
}

fn assert_whole(path: &Path) -> Checkpoint {
    let checkpoint = Checkpoint::open(path).unwrap();
    let (sections, description) = state(b"");
    assert_eq!((checkpoint.sections(), checkpoint.vmdescription()), (&sections[..], &description[..]));
    assert_eq!(checkpoint.blocks()[0].pages_present, 3);
    checkpoint
}

/// Sends the checkpoint at `path` and takes it into another one.
fn send(path: &Path, to: PathBuf, channels: u8, peer: Peer) -> Result<(), Error> {
    let checkpoint = Checkpoint::open(path)?;
    time_limit(LIMIT, move || {
        let (listener, connector) = memory::listener(1 << 16);
        let mut writer = Writer::create(&to, false)?;
        let options = destination::Options { channels: Some(channels), ..Default::default() };
        let receiver =
            thread::spawn(move || writer.receive(Destination::new(options), Box::new(listener), &mut ()).map(drop));
        let mut options = source::Options::default();
        checkpoint.apply_to(&mut options);
        (options.plan.channels, options.peer) = (channels, peer);
        let sent = Source::new(options).run(&mut CheckpointSource::new(&checkpoint)?, &connector, &mut ());
        drop(connector);
        sent.map(drop).and(receiver.join().unwrap())
    })
}

#[test]
fn the_same_packets_come_out_of_a_checkpoint_on_their_channels() {
    let dir = TempDir::new().unwrap();
    let path = dir.join("x");
    receive(Peers::good(), &path).unwrap();
    assert!(packets(&path) == good_packets());
    let device =
        |name: &str, instance, packets, bytes| PacketedDevice { name: name.to_owned(), instance, packets, bytes };
    let devices = [device(NIC, 1, 2, 70_001), device(NIC, 2, 1, 2_000), device(NIC, 3, 1, 8)];
    let checkpoint = assert_whole(&path);
    assert_eq!(checkpoint.packeted_devices(), [&devices[..], &[device("gpu", 7, 2, (3 << 20) + 60)]].concat());
    for peer in [Peer::Qemu, Peer::Multifd] {
        for channels in [1, 2, 3] {
            let to = dir.join(format!("{peer:?}{channels}"));
            send(&path, to.clone(), channels, peer).unwrap();
            assert_whole(&to);
            let expected = match channels {
                1 => [(0, good_packets().into_values().flatten().collect::<Vec<_>>())].into(),
                _ => good_packets(),
            };
            let mut found = packets(&to);
            if channels == 1 {
                // Between channels there is no order: here it is that of the file.
                found.values_mut().for_each(|all| all.sort());
            }
            let mut expected: BTreeMap<u8, Vec<Vec<u8>>> = expected;
            if channels == 1 {
                expected.values_mut().for_each(|all| all.sort());
            }
            assert!(found == expected, "{peer:?}, {channels} channels");
        }
    }
}

#[test]
fn a_checkpoint_without_packets_has_no_section_of_them() {
    let dir = TempDir::new().unwrap();
    let channels = vec![[hello(0), sync(), page(0), page(4096), page(8192), sync(), sync()].concat()];
    receive(Peers { channels, ..Peers::default() }, &dir.join("x")).unwrap();
    assert!(assert_whole(&dir.join("x")).packeted_devices().is_empty());
    let bytes = fs::read(dir.join("x")).unwrap();
    assert!(!bytes.windows(7).any(|part| part == b"multifd"));
}

/// The end of the stream is known by main alone, and channels may be behind it.
#[test]
fn packets_that_come_when_the_source_was_answered_are_kept() {
    let without: Vec<_> =
        (0..2).map(|id| [hello(id), sync(), page(0), sync(), page(4096), page(8192), sync()].concat()).collect();
    let without = Peers { channels: without, ..Peers::default() };
    let late = [packet(NIC, 9, 5_000_000), packet("late", 0, 10)].concat();
    for (case, peers) in [("more", Peers::good()), ("the first", without)] {
        let dir = TempDir::new().unwrap();
        let path = dir.join("x");
        let mut expected = if case == "more" { good_packets() } else { BTreeMap::new() };
        expected.entry(1).or_default().extend([packet(NIC, 9, 5_000_000), packet("late", 0, 10)]);
        receive(peers.with_late(&[Vec::new(), late.clone()]), &path).unwrap();
        assert!(packets(&path) == expected, "{case}");
        assert_whole(&path);
    }
}

/// The file keeps what it had, and the source's VM is paused there: it is an error all the same.
#[test]
fn a_packet_that_is_cut_after_the_answer_is_an_error_and_leaves_the_file_as_it_was() {
    let dir = TempDir::new().unwrap();
    let path = dir.join("x");
    let cut = packet(NIC, 9, 5_000_000)[..4_000_000].to_vec();
    let error = receive(Peers::good().with_late(&[cut]), &path).unwrap_err();
    assert!(matches!(error, Error::StateOnChannels { .. }), "{error}");
    assert!(packets(&path) == good_packets());
    assert_whole(&path);
}

/// Only their end tells that no more comes. It was a warning.
#[test]
fn channels_that_stay_open_leave_it_in_doubt_whether_all_came() {
    let dir = TempDir::new().unwrap();
    let path = dir.join("x");
    let stays = Peers { stays: true, ..Peers::good() }.with_late(&[packet("late", 0, 10)]);
    let error = receive(stays, &path).unwrap_err();
    assert!(matches!(error, Error::StateOnChannels { .. }), "{error}");
    assert!(error.to_string().contains("the source does not close its channels"), "{error}");
    assert!(packets(&path) == good_packets());
    assert_whole(&path);
}

#[test]
fn what_breaks_a_rule_is_refused_while_the_source_has_its_vm() {
    let with = |bytes: Vec<u8>| {
        let mut peers = Peers::good();
        peers.channels[0] = [hello(0), sync(), bytes, sync(), sync()].concat();
        peers
    };
    let header = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = packet(NIC, 1, 8);
        change(&mut bytes);
        with(bytes)
    };
    let mut early = Peers::good();
    early.channels[0] = [hello(0), packet(NIC, 1, 8), sync(), sync(), sync()].concat();
    let (kind, name) = (SectionKind::Full, super::kept_packets::SECTION.to_owned());
    let forged = Section { kind, id: 9, name, instance: 0, version: 1 };
    let mut reserved = Peers::good();
    reserved.beside = MainEncoder::default().section(&forged).raw(&[0; 8]).footer(9).bytes.clone();
    let too_long = format!("device-state packet with {} bytes, expected 1 to {MAX_OPAQUE}", u32::MAX);
    for (rule, peers) in [
        ("device-state packet with 0 bytes", header(&|bytes| bytes[272..276].fill(0))),
        (&too_long, header(&|bytes| bytes[272..276].fill(0xff))),
        ("is not 1 to 255 bytes", header(&|bytes| bytes[12..268].fill(b'n'))),
        ("is not 1 to 255 bytes", header(&|bytes| bytes[12..268].fill(0))),
        ("flags", header(&|bytes| bytes[11] |= 1)),
        ("flags", header(&|bytes| bytes[11] |= 2)),
        ("before its first SYNC", early),
        ("section multifd/device-state", reserved),
    ] {
        let dir = TempDir::new().unwrap();
        let error = receive(peers, &dir.join("x")).unwrap_err();
        assert!(error.to_string().contains(rule) && error.is_peers_fault(), "{rule}: {error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{rule}");
    }
    // libvirt would have a QEMU load the file by itself.
    let dir = TempDir::new().unwrap();
    let writer = Writer::create(&dir.join("x"), false).unwrap().preamble(vec![7; 100]);
    let error = Peers::good().receive(writer).unwrap_err().to_string();
    assert!(
        error.contains("channel 0") && error.contains(&format!("device-state packet for \"{NIC}\" instance 1")),
        "{error}"
    );
}

/// Nothing says where such a part ends, and what is in it belongs to the device. The source has sent no page and paused nothing
/// when it is told.
#[test]
fn a_device_with_a_section_in_parts_beside_its_packets_is_refused_in_the_set_up() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (listener, connector) = memory::listener(1 << 16);
        let start = Section { kind: SectionKind::Start, id: 9, name: NIC.to_owned(), instance: 1, version: 1 };
        let mut set_up = MainEncoder::default();
        set_up.header().configuration("pc-q35-10.0").command(&Command::OpenReturnPath).ram_start(1, 8 * 4096);
        set_up.block(&BlockEntry::new(BlockName::new("ram").unwrap(), 8 * 4096)).flush().eos().footer(1);
        // No more than the head: a body that is waited for never comes.
        set_up.section(&start);
        let source = thread::spawn(move || {
            let mut main = connector.connect().unwrap();
            main.write(&set_up.bytes, &[]).unwrap();
            let mut channel = connector.connect().unwrap();
            channel.write(&[hello(0), sync()].concat(), &[]).unwrap();
            let mut told = Vec::new();
            let mut byte = [0];
            while let Ok(1) = main.read(&mut byte) {
                told.push(byte[0]);
            }
            told
        });
        let mut writer = Writer::create(&dir.join("x"), false).unwrap();
        let options = destination::Options { channels: Some(1), ..Default::default() };
        let error = writer.receive(Destination::new(options), Box::new(listener), &mut ()).unwrap_err();
        drop(writer);
        let message = error.to_string();
        let says = [format!("section \"{NIC}\""), "parts of unknown length".into(), "detach the device".into()];
        assert!(error.is_peers_fault() && says.iter().all(|part| message.contains(part)), "{message}");
        assert_eq!(source.join().unwrap(), *b"\0\x07\0\0\0\x01\0\x04\0\0\0\x01", "SWITCHOVER_ACK, SHUT(1)");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    });
}

#[test]
fn a_packet_that_ends_too_early_is_no_success() {
    let whole = Peers::good();
    for cut in [1, 100, 270] {
        let dir = TempDir::new().unwrap();
        let mut peers = whole.clone();
        let len = peers.channels[1].len();
        peers.channels[1].truncate(len - cut);
        // The channel says no more, and nothing else happens until the limit.
        let mut writer = Writer::create(&dir.join("x"), false).unwrap();
        let (listener, connector) = memory::listener(1 << 23);
        let error = time_limit(LIMIT, move || {
            let opened: Vec<_> = std::iter::once(&main(&[]))
                .chain(&peers.channels)
                .map(|bytes| {
                    let mut stream = connector.connect().unwrap();
                    stream.write(bytes, &[]).unwrap();
                    stream
                })
                .collect();
            let stall_limit = Some(QUIET * 4);
            let options = destination::Options { channels: Some(2), stall_limit, ..Default::default() };
            let received = writer.receive(Destination::new(options), Box::new(listener), &mut ());
            drop(opened);
            received.map(drop).unwrap_err()
        });
        assert!(matches!(error, Error::Stalled { .. }), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_way_without_channels_refuses_them_by_name_before_anything_is_sent() {
    let dir = TempDir::new().unwrap();
    let path = dir.join("x");
    receive(Peers::good(), &path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let mut out = Vec::new();
    let error = checkpoint.write_stream(&mut out).unwrap_err().to_string();
    assert!(out.is_empty() && error.contains(NIC) && error.contains("multifd send with channels"), "{error}");
    let error = checkpoint.save_stream(&dir.join("plain"), false, &[], &Default::default()).unwrap_err();
    assert!(matches!(error, Error::Checkpoint(CheckpointError::NeedsChannels { .. })), "{error}");
    assert!(!dir.join("plain").exists());
    let error = crate::postcopy::Original::new(&checkpoint, Default::default()).err().unwrap();
    assert!(matches!(error, Error::Checkpoint(CheckpointError::NeedsChannels { .. })), "{error}");
    for (channels, compression) in [(0, source::Compression::None), (2, source::Compression::Zlib)] {
        let (_listener, connector) = memory::listener(1 << 16);
        let mut options = source::Options::default();
        checkpoint.apply_to(&mut options);
        (options.plan.channels, options.format.compression) = (channels, compression);
        let error = Source::new(options).run(&mut CheckpointSource::new(&checkpoint).unwrap(), &connector, &mut ());
        let error = error.unwrap_err();
        assert!(
            matches!(&error, Error::Mismatch(Mismatch::PacketsNeedChannels { name, .. }) if name == NIC),
            "{error}"
        );
    }
}

/// Nothing in a file is trusted.
#[test]
fn a_file_with_records_that_do_not_fit_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.join("x");
    receive(Peers::good(), &path).unwrap();
    let whole = fs::read(&path).unwrap();
    let head = whole.windows(20).position(|part| part == super::kept_packets::SECTION.as_bytes()).unwrap();
    // Instance and version, and the length.
    let records = head + 20 + 8 + 8;
    let length = u64::from_be_bytes(whole[records - 8..records].try_into().unwrap());
    for (case, at, bytes) in [
        ("longer than the file", records - 8, u64::MAX.to_be_bytes().to_vec()),
        ("a byte longer", records - 8, (length + 1).to_be_bytes().to_vec()),
        ("a byte shorter", records - 8, (length - 1).to_be_bytes().to_vec()),
        ("no channel", records, vec![0, 0, 1, 0]),
        ("no packet", records + 4, vec![0]),
        ("pages", records + 4 + 8, vec![0; 4]),
        ("no name", records + 4 + 12, vec![0]),
        ("no payload", records + 4 + 272, vec![0; 4]),
        ("a payload behind the end", records + 4 + 272, (MAX_OPAQUE).to_be_bytes().to_vec()),
        ("a newer version", records - 12, vec![0, 0, 0, 2]),
    ] {
        let mut bytes_of_file = whole.clone();
        bytes_of_file[at..at + bytes.len()].copy_from_slice(&bytes);
        fs::write(&path, &bytes_of_file).unwrap();
        let error = Checkpoint::open(&path).err().unwrap_or_else(|| panic!("{case}: it was opened"));
        assert!(Error::from(error).is_peers_fault(), "{case}");
    }
}

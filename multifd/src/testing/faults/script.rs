//! A peer that says exactly what a test tells it to, on as many connections as it likes.

use std::time::Duration;

use multifd_proto::{
    BlockName, ChannelId, Codec, Step,
    encoder::MainEncoder,
    packet::{self, HELLO_LEN, Hello, PacketHeader, header_len},
    ram::BlockEntry,
    return_path::Message,
};

use crate::{
    destination::{Destination, Options, Report},
    error::{Connection, Error, Place},
    ram::Ram,
    sys::guarded,
    testing::memory,
    testing::vm::TestDestination,
    transport::{Connect, Stream},
};

pub(super) const PAGE: usize = 4096;
/// Bytes of a packet's header.
pub(super) const HEADER: usize = 1344;
/// Pages of the blocks `ram` and `rom`.
pub(super) const BLOCKS: [(&str, usize); 2] = [("ram", 8), ("rom", 2)];

/// All that one connection says.
#[derive(Clone, Default)]
pub(super) struct Wire {
    pub(super) bytes: Vec<u8>,
    /// Whether it ends then; otherwise it stays open until the destination has given up or taken over.
    pub(super) ends: bool,
}

impl Wire {
    pub(super) fn raw(bytes: impl Into<Vec<u8>>) -> Wire {
        Wire { bytes: bytes.into(), ends: false }
    }

    /// A channel that has said hello.
    pub(super) fn channel(id: u8) -> Wire {
        Wire::raw(Hello { uuid: [0; 16], channel: ChannelId(id), channels: None }.encode())
    }

    /// Main up to the end of the START section, with the first sync point in it.
    pub(super) fn main() -> Wire {
        Wire::from_encoder(main_start().flush().eos().footer(1))
    }

    pub(super) fn from_encoder(encoder: &MainEncoder) -> Wire {
        Wire::raw(encoder.bytes.as_slice())
    }

    pub(super) fn then(mut self, bytes: impl AsRef<[u8]>) -> Wire {
        self.bytes.extend_from_slice(bytes.as_ref());
        self
    }

    pub(super) fn sync(self) -> Wire {
        self.sync_number(0)
    }

    /// As of a source that says how many channels it has: its numbers have to add up.
    pub(super) fn sync_number(self, number: u64) -> Wire {
        self.then(packet(&PacketHeader::sync_packet(number)))
    }

    pub(super) fn ends(mut self) -> Wire {
        self.ends = true;
        self
    }

    /// Without the last `bytes`, and it ends there.
    pub(super) fn cut_by(mut self, bytes: usize) -> Wire {
        self.bytes.truncate(self.bytes.len() - bytes);
        self.ends()
    }

    pub(super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// Main up to the block list.
pub(super) fn main_start() -> MainEncoder {
    main_start_of("multifd")
}

/// The same for another machine type.
pub(super) fn main_start_of(machine: &str) -> MainEncoder {
    let mut encoder = MainEncoder::default();
    encoder.header().configuration(machine).command(&multifd_proto::command::Command::OpenReturnPath);
    encoder.ram_start(1, BLOCKS.iter().map(|(_, pages)| (pages * PAGE) as u64).sum());
    for (name, pages) in BLOCKS {
        encoder.block(&BlockEntry::new(block(name), (pages * PAGE) as u64));
    }
    encoder
}

/// The rest of a good main behind [`Wire::main`], in which a round has no pages on main.
pub(super) fn main_end() -> MainEncoder {
    let mut encoder = MainEncoder::default();
    encoder.ram_part(1, true).flush().eos().footer(1).eof().vm_description(b"{}");
    encoder
}

/// What a channel of a source says that tells how many it has.
pub(super) fn told_hello(id: u8, channels: u8) -> Hello {
    Hello { uuid: [0; 16], channel: ChannelId(id), channels: std::num::NonZeroU8::new(channels) }
}

pub(super) fn block(name: &str) -> BlockName {
    BlockName::new(name).unwrap()
}

/// A header as it stands on the wire.
pub(super) fn packet(header: &PacketHeader<'_>) -> Vec<u8> {
    let mut bytes = vec![0; header_len(PAGE)];
    header.encode_into(&mut bytes, PAGE);
    bytes
}

/// A packet with the given pages of `ram`, each filled with `0x5a`.
pub(super) fn pages(offsets: &[u64]) -> Vec<u8> {
    let payload_len = (offsets.len() * PAGE) as u32;
    let header = PacketHeader { block: "ram", normal: offsets, payload_len, ..PacketHeader::sync_packet(7) };
    [packet(&PacketHeader { sync: false, ..header }), vec![0x5a; offsets.len() * PAGE]].concat()
}

/// The same with the 32-bit field at `at` of the header overwritten.
pub(super) fn pages_but(offsets: &[u64], at: usize, value: u32) -> Vec<u8> {
    let mut bytes = pages(offsets);
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    bytes
}

/// What became of a destination.
pub(super) struct Received {
    pub(super) outcome: Result<Report, Error>,
    /// What the VM was asked between `prepare` and `abandon`.
    pub(super) calls: Vec<&'static str>,
    pub(super) ram: Ram,
    /// What it said on the return path, where main stayed open.
    pub(super) answers: Vec<Message>,
}

/// Memory with [`BLOCKS`], each between pages that nobody may touch.
pub(super) fn guarded_ram() -> Ram {
    Ram::new(PAGE, BLOCKS.iter().map(|(name, pages)| guarded::block(block(name), pages * PAGE).unwrap()).collect())
        .unwrap()
}

/// Lets a destination hear `wires`, which connect in this order, and waits until it has ended. It is told how many channels
/// there are, as the packets of a script are not numbered.
pub(super) fn receive(wires: &[Wire], options: Options) -> Received {
    let hello = packet::MAGIC.to_be_bytes();
    let channels = wires.iter().filter(|wire| wire.bytes.len() >= HELLO_LEN && wire.bytes.starts_with(&hello)).count();
    let channels = options.channels.or(Some(u8::try_from(channels).unwrap()));
    receive_untold(wires, Options { channels, ..options })
}

/// The same for a destination that has to find out how many channels there are.
pub(super) fn receive_untold(wires: &[Wire], options: Options) -> Received {
    test_support::time_limit(Duration::from_secs(60), || {
        // Everything fits, so the peer never waits and can be gone before the destination listens.
        let (listener, connector) = memory::listener(1 << 24);
        let mut streams: Vec<Box<dyn Stream>> = Vec::new();
        for wire in wires {
            let mut stream = connector.connect().unwrap();
            stream.write(&wire.bytes, &[]).unwrap();
            if !wire.ends {
                streams.push(stream);
            }
        }
        let listening: Vec<_> =
            streams.into_iter().map(|stream| std::thread::spawn(move || answers_on(stream))).collect();
        let ram = guarded_ram();
        let mut vm = TestDestination::new(ram.clone());
        let outcome = Destination::new(options).run(&mut vm, Box::new(listener), &mut ());
        let calls = vm.calls().into_iter().filter(|call| !["prepare", "abandon"].contains(call)).collect();
        drop(vm);
        assert_eq!(ram.handles(), 1, "a thread still has the memory");
        let answers = listening.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        Received { outcome, calls, ram, answers }
    })
}

/// What the destination says on `stream`, up to SHUT or the end. Then the peer closes the connection.
pub(super) fn answers_on(mut stream: Box<dyn Stream>) -> Vec<Message> {
    let (mut answers, mut bytes, mut part) = (Vec::new(), Vec::new(), [0; 512]);
    while let Ok(n @ 1..) = stream.read(&mut part) {
        bytes.extend_from_slice(&part[..n]);
        while let Ok(Step::Item { item, used }) = Message::decode(&bytes) {
            answers.push(item);
            bytes.drain(..used);
        }
        if matches!(answers.last(), Some(Message::Shut(_))) {
            break;
        }
    }
    answers
}

/// Asserts that `wires` end the migration with `message` at `place`, before the VM was started.
#[track_caller]
pub(super) fn refused(rule: &str, wires: &[Wire], options: Options, place: Place, message: &str) -> Received {
    let received = receive(wires, options);
    let error = received.outcome.as_ref().err().unwrap_or_else(|| panic!("{rule}: accepted"));
    assert_eq!(error.to_string(), format!("{place}: {message}"), "{rule}");
    assert!(!received.calls.contains(&"start"), "{rule}: started");
    received
}

pub(super) fn main_at(offset: u64) -> Place {
    Place { connection: Connection::Main, offset }
}

pub(super) fn channel_at(id: u8, offset: usize) -> Place {
    Place { connection: Connection::Channel(ChannelId(id)), offset: offset as u64 }
}

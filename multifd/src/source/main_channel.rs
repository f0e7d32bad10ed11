//! The main channel of a source: what it says besides pages, in the order in which [`Source::run`](super::Source::run)
//! has it said.

use std::{io, os::fd::BorrowedFd};

use multifd_proto::{
    BlockName,
    command::Command,
    encoder::MainEncoder,
    machine::{Dialect, MachineDefaults},
    ram::BlockEntry,
    stream::X_IGNORE_SHARED,
};

use super::Shared;
use crate::{
    dirty_bitmap::DirtyBitmap,
    error::{Connection, Error, Place},
    ram::GuestRange,
    round::{scan::Batch, trace::Step},
    sync::Arc,
    transport::SendHalf,
};

/// The writing half of main.
pub(super) struct MainChannel {
    stream: Box<dyn SendHalf>,
    shared: Arc<Shared>,
    encoder: MainEncoder,
    /// Bytes sent.
    sent: u64,
    vmdescription: Vec<u8>,
}

impl MainChannel {
    pub(super) fn new(stream: Box<dyn SendHalf>, shared: &Arc<Shared>) -> MainChannel {
        MainChannel {
            stream,
            shared: shared.clone(),
            encoder: MainEncoder::default(),
            sent: 0,
            vmdescription: Vec::new(),
        }
    }

    /// What this stream is, and of which machine.
    pub(super) fn header(&mut self) -> Result<(), Error> {
        let options = &self.shared.options;
        self.encoder.header().configuration(&options.qemu.machine);
        if !options.qemu.replay.listed.is_empty() {
            self.encoder.config_capabilities(&[X_IGNORE_SHARED]);
        }
        let offer = options.offer();
        // Where channels say a token, their hellos have no room for it.
        if options.qemu.validate_uuid || (offer.is_some() && options.qemu.uuid != [0; 16]) {
            self.encoder.config_uuid(&options.qemu.uuid);
        }
        if let Some(offer) = offer {
            self.encoder.config_offer(&offer);
        }
        self.send()
    }

    /// Asks the destination to say when it has the VM.
    pub(super) fn open_return_path(&mut self) -> Result<(), Error> {
        self.encoder.command(&Command::OpenReturnPath).command(&Command::Ping(1));
        self.send()
    }

    /// Asks the destination to say when it has taken all that came before this.
    pub(super) fn ping(&mut self, value: u32) -> Result<(), Error> {
        self.encoder.command(&Command::Ping(value));
        self.send()
    }

    /// Tells the destination what to make its VM by: the `len` bytes of `description`.
    pub(super) fn describe(&mut self, len: u32, description: &[u8]) -> Result<(), Error> {
        self.encoder.command(&Command::Describe { len }).raw(description);
        self.send()
    }

    /// Hands memory over: the `list` of blocks, and a descriptor for each.
    pub(super) fn shared_memory(&mut self, list: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let len = u32::try_from(list.len()).expect("a list has a limit");
        let mut message = MainEncoder::default();
        message.command(&Command::SharedMemory { len }).raw(list);
        let (at, bytes) = (self.place(), &message.bytes);
        self.stream.write_with_descriptors(bytes, descriptors).map_err(Error::io(at))?;
        self.count(bytes.len());
        Ok(())
    }

    /// Sends the device state that is needed before the RAM blocks, and lists these. A sync point and the end of the section
    /// follow.
    pub(super) fn ram_start(&mut self) -> Result<(), Error> {
        let replay = &self.shared.options.qemu.replay;
        let blocks = match replay.listed.is_empty() {
            true => {
                let blocks = self.shared.ram.layout().blocks().iter();
                blocks.map(|block| BlockEntry::new(block.name().clone(), block.bytes())).collect()
            }
            false => replay.listed.clone(),
        };
        let total = blocks.iter().map(|block| block.used_len).sum();
        self.encoder.raw(replay.beside_ram.before_ram()).ram_start(replay.ram_section, total);
        blocks.iter().for_each(|block| _ = self.encoder.block(block));
        self.send()
    }

    /// Sends the device state that is needed before the pages, and what an earlier stream had besides.
    pub(super) fn sections_beside_ram(&mut self) -> Result<(), Error> {
        let shared = self.shared.clone();
        let beside_ram = &shared.options.qemu.replay.beside_ram;
        self.encoder.raw(beside_ram.behind_ram_start()).raw(beside_ram.in_parts());
        self.send()
    }

    /// Opens a section of RAM with the guest running.
    pub(super) fn ram_part(&mut self) -> Result<(), Error> {
        self.encoder.ram_part(self.ram_section(), false);
        self.send()
    }

    /// Opens the last section of RAM.
    pub(super) fn ram_end(&mut self) -> Result<(), Error> {
        self.encoder.ram_part(self.ram_section(), true);
        self.send()
    }

    /// Says that the guest is paused, to destinations that know the command.
    pub(super) fn switchover_start(&mut self) -> Result<(), Error> {
        if MachineDefaults::of(&self.shared.options.qemu.machine).is_some_and(|defaults| defaults.switchover_start) {
            self.encoder.command(&Command::SwitchoverStart);
        }
        self.send()
    }

    /// Names pages as zeros.
    pub(super) fn zero_words(&mut self, zeros: &DirtyBitmap) -> Result<(), Error> {
        let shared = self.shared.clone();
        for block in shared.ram.layout().blocks() {
            let pages = block.page_range();
            let mut next = zeros.next(pages.start);
            while let Some(page) = next.filter(|page| pages.contains(page)) {
                self.encoder.zero_page(block.name(), block.offset_of(page));
                if self.encoder.bytes.len() >= BUFFER {
                    self.send()?;
                }
                next = zeros.next(page + 1);
            }
        }
        self.send()
    }

    /// Sends the pages of `batch`, which are of `block`: zeros by name, the others with what `contents` have, in their order.
    pub(super) fn pages(&mut self, block: &BlockName, batch: &Batch, contents: &[GuestRange<'_>]) -> Result<(), Error> {
        debug_assert_eq!(batch.pages.len(), contents.len());
        for &offset in &batch.zeros {
            self.encoder.zero_page(block, offset);
        }
        for (&offset, content) in batch.pages.iter().zip(contents) {
            let bytes = &mut self.encoder.page(block, offset).bytes;
            let begin = bytes.len();
            bytes.resize(begin + content.len(), 0);
            content.read(&mut bytes[begin..]);
        }
        self.shared.live.limiter.take(self.encoder.bytes.len() as u64);
        self.send()
    }

    /// The sync point of the per-round dialect.
    pub(super) fn flush_word(&mut self) -> Result<(), Error> {
        debug_assert_eq!(self.shared.options.qemu.dialect, Dialect::PerRound);
        self.encoder.flush();
        self.send()
    }

    /// Ends a section of RAM: the sync point of the per-section dialect.
    pub(super) fn section_end(&mut self) -> Result<(), Error> {
        let ram_section = self.ram_section();
        self.encoder.eos().footer(ram_section);
        self.send()
    }

    /// Sends what is left of the device state; the vmdescription is kept for [`end`](Self::end).
    pub(super) fn sections(&mut self, rest: &[u8], vmdescription: Vec<u8>) -> Result<(), Error> {
        self.vmdescription = vmdescription;
        self.raw(rest)
    }

    /// Sends `bytes` as they are, without a copy: device state.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.send()?;
        self.write(bytes)
    }

    /// Ends the stream, with `token` behind it where both ends agreed on that.
    pub(super) fn end(&mut self, token: Option<[u8; 16]>) -> Result<(), Error> {
        self.shared.options.trace.step(|| Step::End);
        self.encoder.eof();
        if !self.vmdescription.is_empty() {
            self.encoder.vm_description(&self.vmdescription);
        }
        if let Some(token) = token {
            self.encoder.raw(&token);
        }
        self.send()
    }

    /// Has the destination start the VM.
    pub(super) fn go(&mut self) -> Result<(), Error> {
        self.encoder.command(&Command::Go);
        self.send()
    }

    /// Ends this direction: nothing more is said. What the destination says still arrives.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.stream.finish()
    }

    /// Where the next byte goes.
    pub(super) fn place(&self) -> Place {
        Place { connection: Connection::Main, offset: self.sent }
    }

    fn ram_section(&self) -> u32 {
        self.shared.options.qemu.replay.ram_section
    }

    fn send(&mut self) -> Result<(), Error> {
        let encoder = std::mem::take(&mut self.encoder);
        let written = self.write(&encoder.bytes);
        self.encoder = encoder;
        self.encoder.bytes.clear();
        written
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        let at = self.place();
        self.stream.write(bytes, &[]).map_err(Error::io(at))?;
        self.count(bytes.len());
        Ok(())
    }

    fn count(&mut self, bytes: usize) {
        self.sent += bytes as u64;
        self.shared.pulse.add(bytes);
        self.shared.progress.add_main_bytes(bytes as u64);
    }
}

/// Bytes collected before they are sent.
const BUFFER: usize = 64 << 10;

//! Reads main to the end of the stream: what each of its items means here.

use multifd_proto::{
    Violation,
    command::{BodyLength, Command},
    extension::{Extension, Extensions, Offer},
    machine::Dialect,
    ram::BlockEntry,
    return_path::Message,
    stream::{Item, MAPPED_RAM, Section, SectionKind, X_IGNORE_SHARED},
};

use super::{Body, MainReader, Mode, Run, StreamHead, Target, shared::Pages};
use crate::{
    error::{Error, Mismatch},
    layout::Layout,
    progress::{Observer, Phase},
    round::audit::Audit,
    sync::{Arc, atomic::Ordering, lock},
};

impl Run {
    /// Reads main to the end of the stream.
    pub(super) fn stream(&mut self, target: &mut dyn Target, observer: &mut dyn Observer) -> Result<(), Error> {
        loop {
            let item = match self.main().buffered_item()? {
                Some(item) => item,
                None => {
                    self.place_gathered()?;
                    self.main().next_item()?
                }
            };
            if !self.identified && !is_configuration(&item) {
                self.check_uuid()?;
                self.identified = true;
                self.shared.identified();
            }
            if self.item(item, target, observer)? == Next::End {
                return Ok(());
            }
        }
    }

    /// Does what `item` says.
    fn item(&mut self, item: Item, target: &mut dyn Target, observer: &mut dyn Observer) -> Result<Next, Error> {
        let is_postcopy = self.main().decoder().is_postcopy();
        if !matches!(item, Item::Page { .. }) {
            self.place_gathered()?;
        }
        match item {
            Item::Section(section) => {
                self.prepare_undescribed(target)?;
                return self.section(&section, target, observer);
            }
            Item::Eof => return self.eof(is_postcopy),
            Item::VmDescription { len } => {
                self.main().skip(len)?;
                if !self.main().take_end_token()? {
                    return Err(self.main().no_end_token());
                }
                return self.main().nothing_follows().map(|()| Next::End);
            }
            Item::Command(Command::PostcopyRamDiscard { block, ranges }) => self.discard(&block, &ranges, observer)?,
            Item::Command(Command::Packaged { len }) => self.package(len, observer)?,
            Item::Command(Command::Describe { len }) => self.describe(len, target)?,
            Item::Command(Command::SharedMemory { len }) => self.shared_memory(len, target)?,
            Item::Command(Command::SectionLength(len)) => self.section_length(len)?,
            Item::Command(command) => self.command(&command, &*target)?,
            item if is_configuration(&item) => self.configuration(item, target)?,
            // What the switch has begun goes on.
            Item::RamPart { .. } | Item::Eos if is_postcopy => {}
            Item::ZeroPage { block, offset } if is_postcopy => self.pushed_page(block, offset, None)?,
            Item::Page { block, offset, len } if is_postcopy => self.pushed_page(block, offset, Some(len))?,
            item => self.ram(item, target, observer)?,
        }
        Ok(Next::Item)
    }

    /// Something of the configuration.
    fn configuration(&mut self, item: Item, target: &dyn Target) -> Result<(), Error> {
        match item {
            Item::Configuration { machine } => self.machine(machine)?,
            Item::ConfigCapabilities(names) => {
                if names.iter().any(|name| name == MAPPED_RAM) && !self.main().is_heard() {
                    return Err(Mismatch::AlreadyCheckpoint { peer: self.main().peer() }.into());
                }
                refuse_capabilities(names, target).map_err(Error::protocol(self.main().place()))?
            }
            Item::ConfigUuid(uuid) => {
                lock(&self.shared.seen).main_uuid = Some(uuid);
                self.report.uuid = Some(uuid);
            }
            Item::ConfigOffer(offer) => {
                if offer.channels > 0 {
                    self.refuse_channels()?;
                }
                let (opened, barrier) = (usize::from(offer.channels), &self.shared.barrier);
                if let (Err(_), Some(expected)) = barrier.members(|members| (members.tell(opened), members.channels()))
                {
                    return Err(Mismatch::Channels { opened, expected }.into());
                }
                lock(&self.shared.seen).main_token = offer.token;
                self.shared.opaque.is_of_ours();
                self.offer = Some(offer);
            }
            _ => {}
        }
        Ok(())
    }

    /// Something of the section of RAM, before any switch.
    fn ram(&mut self, item: Item, target: &mut dyn Target, observer: &mut dyn Observer) -> Result<(), Error> {
        match item {
            // POSTCOPY_ADVISE comes before it.
            Item::RamStart { .. } => {
                self.shared.switch.announce(false);
                self.prepare_undescribed(target)?;
            }
            Item::BlocksEnd => self.open_ram(target)?,
            Item::RamPart { end } => self.ram_part(end, observer)?,
            Item::ZeroPage { block, offset } => {
                self.writes(block, &[offset]);
                self.sink().zero(block, &[offset]).map_err(Error::io(self.main().place()))?;
                self.wrote(block, &[offset]);
                self.shared.progress.add_pages_after(self.rounds, 0, 1);
                self.name(block, offset)?;
            }
            Item::Page { block, offset, len } => self.page(block, offset, len)?,
            Item::Xbzrle { block, offset, len } => self.xbzrle(block, offset, len)?,
            Item::CompressPage { block, offset, len } => self.compressed_page(block, offset, len)?,
            Item::Flush => {
                self.refuse_channels()?;
                self.shared.barrier.members(|members| members.expect_channels());
                self.sync_point(observer)?;
            }
            Item::Eos => {
                self.report.dialect = self.main().decoder().dialect();
                if self.report.dialect == Some(Dialect::PerSection) {
                    self.sync_point(observer)?;
                }
                if self.main().decoder().ram_ended() {
                    self.sink().settle(true);
                }
            }
            // A footer, and a block of the list that BLOCKS_END ends.
            _ => {}
        }
        Ok(())
    }

    /// The sections are over.
    fn eof(&mut self, is_postcopy: bool) -> Result<Next, Error> {
        if is_postcopy {
            return self.main().nothing_follows().map(|()| Next::End);
        }
        let place = self.main().place();
        self.shared.state.finish(place)?;
        let decoder = self.main().decoder();
        if decoder.state_ended() && !decoder.ram_ended() {
            self.report.mode = Mode::Snapshot;
        }
        if self.main().end_token().is_some() {
            // Else a description comes first.
            let ends = self.main().take_end_token()?;
            return if ends { self.main().nothing_follows().map(|()| Next::End) } else { Ok(Next::Item) };
        }
        Ok(if self.main().vmdescription_follows()? { Next::Item } else { Next::End })
    }

    /// Compares the uuid of a VM whose channels do not name it with the one that is expected.
    fn check_uuid(&mut self) -> Result<(), Error> {
        let (main_uuid, main_token) = {
            let seen = lock(&self.shared.seen);
            (seen.main_uuid, seen.main_token)
        };
        let found = main_uuid.unwrap_or_default();
        match self.shared.options.uuid {
            Some(expected) if main_token.is_some() && expected != found => {
                Err(Error::protocol(self.main().place())(multifd_proto::Mismatch::Uuid { expected, found }))
            }
            _ => Ok(()),
        }
    }

    fn machine(&mut self, machine: String) -> Result<(), Error> {
        match &self.shared.options.machine {
            Some(ours) if *ours != machine => Err(Mismatch::Machine { theirs: machine, ours: ours.clone() }.into()),
            _ => {
                self.report.machine = machine;
                Ok(())
            }
        }
    }

    fn command(&mut self, command: &Command, target: &dyn Target) -> Result<(), Error> {
        match command {
            Command::OpenReturnPath => {
                self.return_path = true;
                if let Some(offer) = &self.offer {
                    self.extensions = self.agreed(offer, target);
                    let token = offer.token.filter(|_| self.extensions.contains(Extension::EndToken));
                    self.main().expect_end_token(token);
                    if self.extensions.contains(Extension::SharedMemory) {
                        self.main().expect_descriptors();
                    }
                    if self.extensions.contains(Extension::StatePackets) {
                        let state = self.shared.state.clone();
                        state.agree();
                        self.main().expect_state(&state);
                    }
                    let accepted = Message::Accepted(self.extensions.clone());
                    self.main().reply(&accepted)?;
                }
                if self.ack_timing.due_at_once(&self.report.machine) {
                    self.main().reply(&Message::SwitchoverAck)?;
                }
                Ok(())
            }
            Command::PostcopyAdvise(Some(_)) => {
                self.shared.switch.announce(true);
                Ok(())
            }
            Command::Ping(value) => self.main().reply(&Message::Pong(*value)),
            _ => Ok(()),
        }
    }

    /// What of `offer` is taken.
    fn agreed(&self, offer: &Offer, target: &dyn Target) -> Extensions {
        let mut extensions = offer.extensions.and(&self.shared.options.extensions);
        if !target.takes_descriptions() {
            extensions = extensions.without(Extension::Prepare).without(Extension::SectionLength);
        }
        let carries = self.main.as_ref().is_some_and(MainReader::receives_descriptors);
        // Without GO nothing tells when the memory is ours.
        if !target.takes_memory() || !carries || !extensions.contains(Extension::TwoStepCommit) {
            extensions = extensions.without(Extension::SharedMemory);
        }
        // A source that does not hear the answer does not send it.
        let hears = self.main.as_ref().is_some_and(MainReader::is_heard);
        let is_told = offer.token.is_some() && extensions.contains(Extension::TwoStepCommit);
        if !(hears && is_told) {
            extensions = extensions.without(Extension::EndToken);
        }
        if !extensions.contains(Extension::SectionLength) || offer.channels == 0 {
            extensions = extensions.without(Extension::StatePackets);
        }
        extensions
    }

    /// The block list is complete: finds out where its pages go.
    fn open_ram(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        let decoder = self.main().decoder();
        let blocks: Vec<BlockEntry> = decoder.blocks().to_vec();
        let page_size = self.shared.page_size;
        let layout = Layout::new(page_size, blocks.iter().map(|block| (block.name.clone(), block.used_len)))?;
        self.shared.progress.set_pages_total(layout.pages());
        self.report.blocks = blocks.iter().map(|block| (block.name.clone(), block.used_len)).collect();
        let ram_section = self.main().decoder().ram_section().expect("its block list was read");
        // Where there is no way back, a source that waits for our answer does so in vain.
        let (machine, return_path) = (self.report.machine.clone(), self.return_path || !self.main().is_heard());
        let head = StreamHead { machine, return_path, ram_section, blocks, layout };
        let sink = target.open_ram(&head)?;
        let layout = Arc::new(head.layout);
        self.audit = match self.shared.options.audit {
            true => Some(Arc::new(Audit::new(layout.clone())?)),
            false => None,
        };
        let (sink_of_pages, audit, opaque) = (sink.clone(), self.audit.clone(), target.opaque_sink());
        *lock(&self.shared.pages) = Some(Pages { layout, sink: sink_of_pages, audit, opaque });
        self.sink = Some(sink);
        Ok(())
    }

    fn ram_part(&mut self, end: bool, observer: &mut dyn Observer) -> Result<(), Error> {
        if !end && self.return_path {
            let pages = self.main_pages + self.shared.channel_pages.load(Ordering::Relaxed);
            let newer_packets = self.shared.newer_packets.load(Ordering::Relaxed);
            if self.ack_timing.due_in_part(&self.report.machine, pages, newer_packets) {
                tracing::info!("the source goes on without a page left to send: it is told that it may switch over");
                self.main().reply(&Message::SwitchoverAck)?;
            }
        }
        self.paused = end;
        if end {
            self.shared.barrier.is_last();
        }
        // After the switch, parts have pages that are pushed, of no round.
        if self.report.mode != Mode::Postcopy {
            self.enter_once(if end { Phase::Switchover } else { Phase::Rounds }, observer);
        }
        Ok(())
    }

    /// The source says how long the section is that follows.
    fn section_length(&mut self, len: BodyLength) -> Result<(), Error> {
        let place = self.main().place();
        let (extension, element) = match len {
            BodyLength::Packets(_) => (Extension::StatePackets, "SECTION_PACKETS"),
            BodyLength::Bytes(_) | BodyLength::Chunks => (Extension::SectionLength, "SECTION_LENGTH"),
        };
        if !self.extensions.contains(extension) {
            let at = "without being agreed on";
            return Err(Error::protocol(place)(Violation::UnexpectedElement { element, place: at }));
        }
        self.section_length = Some(len);
        Ok(())
    }

    /// The state of one device, or all that is left of the stream.
    fn section(
        &mut self,
        section: &Section,
        target: &mut dyn Target,
        observer: &mut dyn Observer,
    ) -> Result<Next, Error> {
        if section.kind != SectionKind::Full {
            self.ack_timing.more_than_ram();
            return target.section_part(section, self.main()).map(|()| Next::Item);
        }
        let ram_ended = self.main().decoder().ram_ended();
        if ram_ended {
            self.enter_once(Phase::Devices, observer);
        }
        let len = self.section_length.take();
        match target.section(section, len, ram_ended, self.main())? {
            Body::Section => Ok(Next::Item),
            Body::RestOfStream => {
                if !self.main().decoder().ram_ended() {
                    self.report.mode = Mode::Snapshot;
                }
                Ok(Next::End)
            }
        }
    }
}

/// What follows an item of main.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Another one.
    Item,
    /// Nothing: the stream is over.
    End,
}

/// Whether `item` comes before it is known whose migration it is.
fn is_configuration(item: &Item) -> bool {
    matches!(
        item,
        Item::Header
            | Item::Configuration { .. }
            | Item::ConfigPageBits(_)
            | Item::ConfigCapabilities(_)
            | Item::ConfigUuid(_)
            | Item::ConfigOffer(_)
    )
}

/// Refuses streams that leave out a part of the VM which `target` cannot do without, or put it elsewhere.
fn refuse_capabilities(names: Vec<String>, target: &dyn Target) -> Result<(), multifd_proto::Mismatch> {
    // The decoder knows no capabilities that need nothing of us.
    for name in names {
        match name == X_IGNORE_SHARED {
            true if target.takes_devices_alone() => {}
            true => return Err(multifd_proto::Mismatch::MemoryElsewhere),
            false => return Err(multifd_proto::Mismatch::Capability { name }),
        }
    }
    Ok(())
}

//! Takes a migration into a checkpoint file.
//!
//! The block list gives the place of every page, so pages are written as they come. Header, block list, bitmaps and device
//! state are written when all of it is there; then the file is put on disk and gets its name, and after that the source is
//! told that its VM is safe.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use multifd_proto::{
    BlockName, Violation,
    command::{BodyLength, Command},
    encoder::MainEncoder,
    machine::MachineDefaults,
    mapped_ram::BlockHeader,
    ram::BlockEntry,
    stream::{MAPPED_RAM, Section, X_IGNORE_SHARED},
    vmdesc::{self, OpaqueSection, VmDescription},
};

use super::{
    Checkpoint, CheckpointError, DirectWrites, FilePages, MAX_RAM, PAGE_SIZE, Tail,
    kept_packets::{self, PacketsFile},
    output::Output,
    pending::PendingFile,
    tail,
};
use crate::{
    beside_ram::BesideRam,
    destination::{Body, Destination, MainReader, OpaqueSink, PageSink, Report, StreamHead, Target},
    error::Error,
    progress::Observer,
    sync::Arc,
    transport::Listen,
};

/// A checkpoint that is yet to be received.
pub struct Writer {
    file: Output,
    direct: DirectWrites,
    /// What stands in the file before the stream.
    preamble: Vec<u8>,
    whole_only: bool,
    ram: Option<ReceivedRam>,
    beside_ram: BesideRam,
    tail: Tail,
    /// Of the VM, once everything has arrived.
    uuid: Option<[u8; 16]>,
}

/// What came before the first page, and the pages.
struct ReceivedRam {
    machine: String,
    section: u32,
    /// Blocks in the order of the stream, with the place of their pages.
    blocks: Vec<BlockEntry>,
    pages: Arc<FilePages>,
    /// Device-state packets, where the file can have some.
    packets: Option<Arc<PacketsFile>>,
}

impl ReceivedRam {
    /// Whether the source lists where its blocks lie, as it does with `x-ignore-shared`: blocks may be left out.
    fn lists_addresses(&self) -> bool {
        self.blocks.iter().any(|entry| entry.gpa.is_some())
    }

    /// Blocks of which no page came. The source names each page of the others.
    fn elsewhere(&self) -> impl Iterator<Item = &BlockEntry> {
        let blocks = self.blocks.iter().enumerate();
        blocks.filter(|(index, _)| !self.pages.is_named(*index)).map(|(_, entry)| entry)
    }
}

impl Writer {
    /// Prepares a checkpoint that is going to be the file `path`; one that is there is replaced only if `replace` says so,
    /// and not before the new one is complete.
    ///
    /// # Errors
    /// The directory is not there or takes no files; something is in the way.
    pub fn create(path: &Path, replace: bool) -> Result<Writer, CheckpointError> {
        Ok(Writer::into_output(Output::Named(PendingFile::create(path, replace)?)))
    }

    /// The same for a file without a name in `directory`, which goes away with its last user. It is not put on disk, and
    /// [`into_checkpoint`](Self::into_checkpoint) gives it.
    ///
    /// # Errors
    /// The directory is not there or takes no files.
    pub fn unnamed(directory: &Path) -> Result<Writer, CheckpointError> {
        Ok(Writer::into_output(Output::unnamed(directory)?))
    }

    fn into_output(file: Output) -> Writer {
        let (beside_ram, tail) = (BesideRam::default(), Tail::default());
        let direct = DirectWrites::Auto;
        Writer { file, direct, preamble: Vec::new(), whole_only: false, ram: None, beside_ram, tail, uuid: None }
    }

    /// Says whether pages stay out of the page cache; [`DirectWrites::Auto`] where it is not said. Of no effect on a
    /// file without a name.
    #[must_use]
    pub fn direct_writes(self, direct: DirectWrites) -> Writer {
        Writer { direct, ..self }
    }

    /// Has the file begin with `bytes`, behind which the stream begins. Offsets in the stream count from the beginning of the
    /// file, as in a libvirt save image in the format *sparse*.
    #[must_use]
    pub fn preamble(self, bytes: Vec<u8>) -> Writer {
        Writer { preamble: bytes, ..self }
    }

    /// Refuses a VM of which a part of the memory is [elsewhere](Checkpoint::memory_elsewhere), with
    /// [`CheckpointError::MemoryElsewhere`].
    #[must_use]
    pub fn whole_only(self) -> Writer {
        Writer { whole_only: true, ..self }
    }

    /// Where the stream begins in the file.
    pub fn stream_offset(&self) -> u64 {
        self.preamble.len() as u64
    }

    /// The checkpoint that was [received](Self::receive).
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; so before one was received whole, what is in the file is no checkpoint.
    pub fn into_checkpoint(self) -> Result<Checkpoint, CheckpointError> {
        let file = self.file.file().try_clone().map_err(self.file.error("opening it once more"))?;
        Checkpoint::of_file(file, self.file.path(), self.preamble.len() as u64)
    }

    /// Waits for a source at `from` and takes its VM into the file.
    ///
    /// On `Ok` the checkpoint is complete and on disk, and the source was told so if it opened the return path. On `Err`
    /// the source was not told, and there is no file, unless [`is_published`](Self::is_published) says otherwise: then
    /// telling the source failed, or the file's name may not be on disk, and the source may run on; or the source went on
    /// after it was told, and the error says so.
    ///
    /// # Errors
    /// As [`Destination::run`]; [`Error::Checkpoint`].
    pub fn receive(
        &mut self,
        destination: Destination,
        from: Box<dyn Listen>,
        observer: &mut dyn Observer,
    ) -> Result<Report, Error> {
        destination.receive(self, PAGE_SIZE, from, observer)
    }

    /// Whether the file has its name.
    pub fn is_published(&self) -> bool {
        self.file.is_published()
    }

    /// Number of pages with content.
    pub fn pages_with_content(&self) -> u64 {
        self.ram.as_ref().map_or(0, |ram| ram.pages.valid_pages())
    }

    /// Length of the file, and how many bytes of disk it takes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn bytes(&self) -> Result<(u64, u64), CheckpointError> {
        let metadata = self.file.file().metadata().map_err(self.file.error("asking for its length"))?;
        Ok((metadata.len(), metadata.blocks() * 512))
    }

    /// Writes everything but the pages. Returns where it ends.
    fn write_stream(&self, uuid: Option<[u8; 16]>) -> Result<u64, CheckpointError> {
        let Some(ram) = &self.ram else { return Ok(0) };
        let file: &File = self.file.file();
        let write = |bytes: &[u8], at| file.write_all_at(bytes, at).map_err(self.file.error("writing to it"));
        ram.pages.check().map_err(self.file.error("writing pages to disk"))?;
        let is_whole = !ram.lists_addresses() || ram.elsewhere().next().is_none();
        let mut out = self.beginning(&ram.machine, uuid, ram.section, total(&ram.blocks), !is_whole);
        let mut at = 0;
        for (index, entry) in ram.blocks.iter().enumerate() {
            let placed = entry.mapped_ram.expect("placed when the block list came");
            let mut entry = entry.clone();
            if is_whole {
                // Nothing of the memory is elsewhere, so the file is like any other.
                entry.gpa = None;
            } else if !ram.pages.is_named(index) {
                entry.mapped_ram = Some(BlockHeader::elsewhere(PAGE_SIZE as u64));
                out.block(&entry);
                continue;
            }
            let bitmap_offset = at + out.bytes.len() as u64 + entry_len(&entry);
            entry.mapped_ram = Some(BlockHeader { bitmap_offset, ..placed });
            out.block(&entry);
            write(&out.bytes, at)?;
            out.bytes.clear();
            ram.pages.write_bitmap(index, bitmap_offset).map_err(self.file.error("writing to it"))?;
            at = placed.next_entry(entry.used_len);
        }
        out.eos().footer(ram.section);
        if let Some(packets) = &ram.packets
            && let Some(end) = packets.finish().map_err(self.file.error("writing to it"))?
        {
            write(&out.bytes, at)?;
            debug_assert_eq!(at + out.bytes.len() as u64, packets.begin());
            out.bytes.clear();
            at = end;
        }
        out.raw(self.beside_ram.behind_ram_start()).raw(self.beside_ram.in_parts());
        if MachineDefaults::of(&ram.machine).is_some_and(|defaults| defaults.switchover_start) {
            out.command(&Command::SwitchoverStart);
        }
        out.ram_part(ram.section, true).eos().footer(ram.section).raw(&self.tail.to_bytes());
        write(&out.bytes, at)?;
        Ok(at + out.bytes.len() as u64)
    }
}

impl Writer {
    /// Everything up to the block list, of a VM that may have memory `elsewhere`.
    fn beginning(
        &self,
        machine: &str,
        uuid: Option<[u8; 16]>,
        ram_section: u32,
        total: u64,
        elsewhere: bool,
    ) -> MainEncoder {
        let mut out = MainEncoder::default();
        // In QEMU's order.
        let capabilities: &[&str] = if elsewhere { &[X_IGNORE_SHARED, MAPPED_RAM] } else { &[MAPPED_RAM] };
        out.raw(&self.preamble).header().configuration(machine).config_capabilities(capabilities);
        if let Some(uuid) = uuid {
            out.config_uuid(&uuid);
        }
        out.raw(self.beside_ram.before_ram()).ram_start(ram_section, total);
        out
    }

    fn keep_beside_ram(&mut self, section: &Section, main: &mut MainReader) -> Result<(), Error> {
        if section.name == kept_packets::SECTION {
            // In the file it would be read as packets.
            let (element, place) = ("section multifd/device-state", "on main: only a checkpoint file has it");
            return Err(Error::protocol(main.place())(Violation::UnexpectedElement { element, place }));
        }
        let bytes = tail::section_beside_ram(section, main, self.beside_ram.bytes())?;
        self.beside_ram.push(section, &bytes, self.ram.is_some());
        Ok(())
    }
}

impl Target for Writer {
    fn open_ram(&mut self, head: &StreamHead) -> Result<Arc<dyn PageSink>, Error> {
        if !head.return_path {
            tracing::warn!(
                "the source has not opened the return path: it cannot be told of a failure after its last byte, and its VM \
                 does not run on then, unless this is a background snapshot"
            );
        }
        let bytes = head.layout.bytes();
        if bytes > MAX_RAM {
            return Err(CheckpointError::TooMuchRam { bytes, limit: MAX_RAM }.into());
        }
        // Channels may tell the VM's uuid after this: there is room for it in front of the first block's pages.
        let lists_addresses = head.blocks.iter().any(|entry| entry.gpa.is_some());
        let begin = self.beginning(&head.machine, Some([0; 16]), head.ram_section, bytes, lists_addresses);
        let mut at = begin.bytes.len() as u64;
        let mut blocks = Vec::new();
        for entry in &head.blocks {
            let mut entry = BlockEntry { gpa: entry.gpa, ..BlockEntry::new(entry.name.clone(), entry.used_len) };
            let header = BlockHeader::place(at + entry_len(&entry), entry.used_len, PAGE_SIZE as u64);
            entry.mapped_ram = Some(header);
            at = header.next_entry(entry.used_len);
            blocks.push(entry);
        }
        let first = blocks.iter().filter_map(|entry| Some(entry.mapped_ram?.pages_offset)).collect();
        let (file, path) = (self.file.page_file(self.direct)?, self.file.path().to_owned());
        file.reserve(at);
        let pages = Arc::new(FilePages::new(file, path, head.layout.clone(), first)?);
        let (machine, section) = (head.machine.clone(), head.ram_section);
        // libvirt has a QEMU load the file by itself, and the place behind blocks that are left out is not known yet.
        let packets = (self.preamble.is_empty() && !lists_addresses).then(|| {
            let begin = at + MainEncoder::default().eos().footer(section).bytes.len() as u64;
            Arc::new(PacketsFile::new(self.file.file().clone(), self.file.path(), begin, section))
        });
        self.ram = Some(ReceivedRam { machine, section, blocks, pages: pages.clone(), packets });
        Ok(pages)
    }

    fn opaque_sink(&self) -> Option<Arc<dyn OpaqueSink>> {
        let packets = self.ram.as_ref()?.packets.clone()?;
        Some(packets)
    }

    /// They are behind the end of the file, which is complete without them.
    fn late_packets(&mut self, all: bool) -> Result<(), Error> {
        let Some(packets) = self.ram.as_ref().and_then(|ram| ram.packets.clone()) else { return Ok(()) };
        if !all {
            return Ok(packets.forget_late().map_err(self.file.error("leaving out a device-state packet"))?);
        }
        tracing::warn!("device state came on channels after a pause; the checkpoint is completed with it");
        packets.unite().map_err(self.file.error("putting device-state packets into place"))?;
        let end = self.write_stream(self.uuid)?;
        self.file.file().set_len(end).map_err(self.file.error("ending it"))?;
        Ok(self.file.sync()?)
    }

    fn section(
        &mut self,
        section: &Section,
        _len: Option<BodyLength>,
        ram_ended: bool,
        main: &mut MainReader,
    ) -> Result<Body, Error> {
        if ram_ended {
            self.tail = Tail::receive(section, self.beside_ram.early(), main)?;
            return Ok(Body::RestOfStream);
        }
        if main.decoder().may_be_snapshot()
            && let Some(tail) = Tail::ahead(section, self.beside_ram.early(), main)?
        {
            self.tail = tail;
            return Ok(Body::RestOfStream);
        }
        self.keep_beside_ram(section, main)?;
        Ok(Body::Section)
    }

    fn section_part(&mut self, section: &Section, main: &mut MainReader) -> Result<(), Error> {
        self.keep_beside_ram(section, main)
    }

    fn devices(&mut self, sections: &[u8], _page_size: usize) -> Result<(), Error> {
        // In postcopy no source describes them. A QEMU that loads the file waits for a description, of which it uses nothing.
        let all =
            [self.beside_ram.early(), sections].map(|part| vmdesc::cut_by_shape(part).unwrap_or_default()).concat();
        let described = all.iter().map(|section| OpaqueSection {
            name: &section.name,
            instance: section.instance,
            version: section.version,
            len: section.body.len() as u64,
        });
        let vmdescription = VmDescription::opaque(PAGE_SIZE as u64, described).to_json();
        self.tail = Tail { sections: sections.to_vec(), vmdescription };
        Ok(())
    }

    fn takes_snapshots(&self) -> bool {
        true
    }

    fn takes_devices_alone(&self) -> bool {
        true
    }

    fn memory_elsewhere(&self) -> Vec<BlockName> {
        let elsewhere = self.ram.iter().filter(|ram| ram.lists_addresses()).flat_map(ReceivedRam::elsewhere);
        elsewhere.map(|entry| entry.name.clone()).collect()
    }

    fn make_durable(&mut self, uuid: Option<[u8; 16]>) -> Result<(), Error> {
        let blocks = self.memory_elsewhere();
        if self.whole_only && !blocks.is_empty() {
            let path = self.file.path().to_owned();
            return Err(CheckpointError::MemoryElsewhere { path, blocks: blocks.into() }.into());
        }
        self.uuid = uuid;
        let end = self.write_stream(uuid)?;
        if let Some(ram) = &self.ram {
            if let Some(packets) = &ram.packets {
                packets.seal(end);
            }
            ram.pages.punch_holes();
        }
        Ok(self.file.sync()?)
    }

    fn commit(&mut self) -> Result<(), Error> {
        Ok(self.file.publish()?)
    }

    fn start(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// The decision where the stream ends was wrong, as it may be where the connection stalls at a byte that the guest
    /// chose. The file ends with the stream, so it goes on where that does.
    fn rest(&mut self, rest: &[u8]) -> Result<(), Error> {
        if self.ram.is_none() {
            return Err(CheckpointError::BytesBehindTheEnd { bytes: rest.len() }.into());
        }
        tracing::warn!(
            bytes = rest.len(),
            "device state went on after a pause; the checkpoint is completed with the rest"
        );
        let file: &File = self.file.file();
        let len = file.metadata().map_err(self.file.error("asking for its length"))?.len();
        // Kept even if it is wrong: it is all that the source has sent.
        file.write_all_at(rest, len).map_err(self.file.error("writing to it"))?;
        self.file.sync()?;
        self.tail = self.tail.extend(self.beside_ram.early(), rest)?;
        Ok(())
    }

    fn abandon(&mut self) {}
}

/// Length of an entry of the block list with its header.
fn entry_len(entry: &BlockEntry) -> u64 {
    let address = if entry.gpa.is_some() { 8 } else { 0 };
    (1 + entry.name.as_str().len() + 8 + address + BlockHeader::LEN) as u64
}

fn total(blocks: &[BlockEntry]) -> u64 {
    blocks.iter().map(|block| block.used_len).sum()
}

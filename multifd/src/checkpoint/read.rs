//! Reads a checkpoint: of ours, or a mapped-ram file that QEMU wrote.
//!
//! Nothing in the file is trusted. When [`Checkpoint::open`] has returned, every offset lies inside the file, every bitmap
//! was read, and every page that a bitmap names exists.

use std::{
    cmp::Ordering,
    fs::File,
    io::{self, Read},
    num::NonZero,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{Advice, fadvise};

use multifd_proto::{
    BlockName, ProtocolError, Step, Violation,
    bodies::BodyScanner,
    encoder::MainEncoder,
    ram::BlockEntry,
    stream::{Item, MainDecoder, Section, SectionKind, StreamError},
};

use super::{
    CheckpointError, KeptPackets, MAX_DEVICE_STATE, MAX_RAM, PAGE_SIZE, PacketedDevice, Tail, kept_packets, kind,
    tail::check_early_state,
};
use crate::{beside_ram::BesideRam, dirty_bitmap::DirtyBitmap, layout::Layout};

/// A checkpoint that was opened and checked.
pub struct Checkpoint {
    path: PathBuf,
    file: File,
    stamp: Stamp,
    len: u64,
    stream: Stream,
    blocks: Vec<CheckpointBlock>,
    layout: Layout,
    /// Pages with content.
    present: DirtyBitmap,
}

/// One RAM block in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointBlock {
    /// The name.
    pub name: BlockName,
    /// The length in bytes, a multiple of the page size.
    pub bytes: u64,
    /// Where its first page lies in the file; 0 where its memory is elsewhere.
    pub pages_offset: u64,
    /// Pages with content; all others are zeros, unless its memory is elsewhere.
    pub pages_present: u64,
    /// Its memory is not in the file. It was in a file that the QEMU shared (capability `x-ignore-shared`), and nothing here
    /// says in which one, or whether that is still as it was.
    pub elsewhere: bool,
    /// Where it lies in guest physical memory, in a checkpoint that lists that.
    pub gpa: Option<u64>,
}

impl CheckpointBlock {
    /// How a stream of which a part of the memory is elsewhere lists the block.
    pub(super) fn listed(&self) -> BlockEntry {
        BlockEntry { gpa: Some(self.gpa.unwrap_or_default()), ..BlockEntry::new(self.name.clone(), self.bytes) }
    }
}

impl Checkpoint {
    /// Opens the file `path` and checks all of it but the contents of pages and device state.
    ///
    /// # Errors
    /// [`CheckpointError::NotMappedRam`] for a migration stream of another kind, [`CheckpointError::OtherKind`] for what is none, and those
    /// that name the place and the rule which is broken there; [`CheckpointError::Io`].
    pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open_at(path, 0)
    }

    /// The same for a file in which the stream begins at byte `begin`, such as a libvirt save image in the format *sparse*. Its
    /// offsets count from the beginning of the file.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_at(path: &Path, begin: u64) -> Result<Checkpoint, CheckpointError> {
        let io = |doing| move |source| CheckpointError::Io { path: path.to_owned(), doing, source };
        // A FIFO would have us wait until it is written to.
        let file = File::options().read(true).custom_flags(NONBLOCK).open(path).map_err(io("opening it"))?;
        Checkpoint::of_file(file, path, begin)
    }

    /// The same for `file`, which is called `path`.
    pub(super) fn of_file(file: File, path: &Path, begin: u64) -> Result<Checkpoint, CheckpointError> {
        let io = |doing| move |source| CheckpointError::Io { path: path.to_owned(), doing, source };
        let metadata = file.metadata().map_err(io("asking for its length"))?;
        if let Some(kind) = kind::of_special(&metadata) {
            return Err(CheckpointError::Special { path: path.to_owned(), kind });
        }
        let stamp = Stamp::of(&file).map_err(io("asking for its length"))?;
        let stream =
            FileReader { path, file: &file, len: metadata.len(), begin, at: begin, buf: Vec::new() }.stream()?;
        let ram = |source| CheckpointError::Ram { path: path.to_owned(), source };
        let lengths = stream.blocks.iter().map(|entry| (entry.name.clone(), entry.used_len));
        let layout = Layout::new(PAGE_SIZE, lengths).map_err(ram)?;
        if layout.bytes() > MAX_RAM {
            return Err(CheckpointError::TooMuchRam { bytes: layout.bytes(), limit: MAX_RAM });
        }
        let mut present = DirtyBitmap::try_new(&layout).map_err(io("keeping account of its pages"))?;
        let mut blocks = Vec::new();
        for (entry, block) in stream.blocks.iter().zip(layout.blocks()) {
            let header = entry.mapped_ram.expect("every block has one in a mapped-ram file");
            let elsewhere = header.is_elsewhere();
            let pages_present = match elsewhere {
                true => 0,
                false => read_bitmap(&file, header.bitmap_offset, block.page_range(), &mut present)
                    .map_err(io("reading a bitmap"))?,
            };
            let (name, bytes, pages_offset) = (entry.name.clone(), entry.used_len, header.pages_offset);
            blocks.push(CheckpointBlock { name, bytes, pages_offset, pages_present, elsewhere, gpa: entry.gpa });
        }
        let (path, len) = (path.to_owned(), metadata.len());
        Ok(Checkpoint { path, file, stamp, len, stream, blocks, layout, present })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// The machine type.
    pub fn machine(&self) -> &str {
        &self.stream.machine
    }

    /// Capabilities that change the layout of the stream.
    pub fn capabilities(&self) -> &[String] {
        &self.stream.capabilities
    }

    /// The VM's UUID, if it is in the file.
    pub fn uuid(&self) -> Option<[u8; 16]> {
        self.stream.uuid
    }

    /// The id of the `ram` section, which early sections must not collide with.
    pub fn ram_section(&self) -> u32 {
        self.stream.ram_section
    }

    /// The RAM blocks, in the order of the stream.
    pub fn blocks(&self) -> &[CheckpointBlock] {
        &self.blocks
    }

    /// The blocks whose memory is not in the file; none, mostly. A VM that lacks memory is sent only where that memory is:
    /// to a QEMU that maps the same files.
    pub fn memory_elsewhere(&self) -> impl Iterator<Item = &CheckpointBlock> {
        self.blocks.iter().filter(|block| block.elsewhere)
    }

    /// Verifies that all of the VM's memory is in the file.
    ///
    /// # Errors
    /// [`CheckpointError::MemoryElsewhere`].
    pub fn check_whole(&self) -> Result<(), CheckpointError> {
        let blocks: Vec<_> = self.memory_elsewhere().map(|block| block.name.clone()).collect();
        match blocks.is_empty() {
            true => Ok(()),
            false => Err(CheckpointError::MemoryElsewhere { path: self.path.clone(), blocks: blocks.into() }),
        }
    }

    /// The devices of which a part of the state came in packets on channels, opaque to all but the device; none, mostly. Only a way with
    /// channels carries them.
    pub fn packeted_devices(&self) -> &[PacketedDevice] {
        self.stream.packets.as_ref().map_or(&[], KeptPackets::devices)
    }

    /// Verifies that a way without channels can carry all of it.
    ///
    /// # Errors
    /// [`CheckpointError::NeedsChannels`].
    pub fn check_needs_no_channels(&self) -> Result<(), CheckpointError> {
        match self.packeted_devices().first() {
            None => Ok(()),
            Some(PacketedDevice { name, instance, .. }) => {
                Err(CheckpointError::NeedsChannels { path: self.path.clone(), name: name.clone(), instance: *instance })
            }
        }
    }

    pub(super) fn packets(&self) -> Option<&KeptPackets> {
        self.stream.packets.as_ref()
    }

    /// The numbering of all pages.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The pages with content.
    pub fn present(&self) -> &DirtyBitmap {
        &self.present
    }

    /// Sections that belong before the devices' state; mostly none.
    pub fn beside_ram(&self) -> &BesideRam {
        &self.stream.beside_ram
    }

    /// Device state as it stands on the wire, up to the end of state.
    pub fn sections(&self) -> &[u8] {
        &self.stream.tail.sections
    }

    /// The description of the device state, as JSON; empty where there is none.
    pub fn vmdescription(&self) -> &[u8] {
        &self.stream.tail.vmdescription
    }

    /// The contents of block number `block`, zeros included. Where its memory is elsewhere, every read fails.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block_reader(&self, block: usize) -> BlockReader<'_> {
        BlockReader { checkpoint: self, block, offset: 0, announced: 0 }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// What the file was like when it was opened.
    pub(crate) fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// Checks that the file is what it was when it was opened, as far as its length and its time of modification tell.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`], as the source of the error; the kernel's.
    pub(super) fn check_unchanged(&self) -> io::Result<()> {
        match Stamp::of(&self.file)? == self.stamp {
            true => Ok(()),
            false => Err(io::Error::other(CheckpointError::Changed { path: self.path.clone() })),
        }
    }
}

/// What tells that a file was changed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    len: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl Stamp {
    /// What `file` is like now.
    pub(crate) fn of(file: &File) -> io::Result<Stamp> {
        let metadata = file.metadata()?;
        Ok(Stamp { len: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}

/// Reads the contents of one block, front to back. Pages of zeros are not read from the file.
pub struct BlockReader<'a> {
    checkpoint: &'a Checkpoint,
    block: usize,
    offset: u64,
    /// Up to here the kernel was told what is going to be read.
    announced: u64,
}

impl BlockReader<'_> {
    /// How many bytes from here on are of one kind: zeros, or content; 0 at the end. A writer can leave a hole for zeros. A
    /// longer run of content is told in parts.
    pub fn run(&self) -> (u64, bool) {
        let Checkpoint { layout, present, .. } = self.checkpoint;
        let block = &layout.blocks()[self.block];
        if self.offset == block.bytes() {
            return (0, true);
        }
        let (page, end) = (block.page_at(self.offset), block.page_range().end);
        let zeros = !present.contains(page);
        let run_end = match zeros {
            true => present.next(page).map_or(end, |next| next.min(end)),
            // Not to the end of the run: callers ask again for each part that they read.
            false => {
                let end = end.min(page + RUN);
                (page..end).find(|&page| !present.contains(page)).unwrap_or(end)
            }
        };
        let run_end = if run_end == end { block.bytes() } else { block.offset_of(run_end) };
        (run_end - self.offset, zeros)
    }

    /// Has the kernel read what content follows, so that the disk has more than one thing to do. It is told of content alone: to read a
    /// hole takes memory, too.
    fn announce(&mut self) {
        if self.offset + AHEAD / 2 < self.announced {
            return;
        }
        let Checkpoint { layout, blocks, file, .. } = self.checkpoint;
        let end = (self.offset + AHEAD).min(layout.blocks()[self.block].bytes());
        let mut from = self.announced.max(self.offset);
        while let Some(content) = self.content_in(from..end) {
            let at = blocks[self.block].pages_offset + content.start;
            // What it does not do now, it does when it is read.
            let _ = fadvise(file, at, NonZero::new(content.end - content.start), Advice::WillNeed);
            from = content.end;
        }
        self.announced = end;
    }

    /// The first run of content in `bytes` of the block.
    pub(super) fn content_in(&self, bytes: Range<u64>) -> Option<Range<u64>> {
        let Checkpoint { layout, present, .. } = self.checkpoint;
        let block = &layout.blocks()[self.block];
        let place = |page| block.offset_of(page).clamp(bytes.start, bytes.end);
        let from = (bytes.start < bytes.end).then(|| block.page_at(bytes.start))?;
        let first = present.next(from).filter(|&page| block.page_range().contains(&page))?;
        let start = place(first);
        let last = block.page_at((bytes.end - 1).max(start));
        let end = (first..=last).find(|&page| !present.contains(page)).map_or(bytes.end, place);
        (start < end).then_some(start..end)
    }

    /// Passes over the next `bytes`, which lie in one [`run`](Self::run).
    pub fn skip(&mut self, bytes: u64) {
        debug_assert!(bytes <= self.run().0);
        self.offset += bytes;
    }
}

impl Read for BlockReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (run, zeros) = self.run();
        if run > 0 && self.checkpoint.blocks[self.block].elsewhere {
            // Nothing that reads it may take it for zeros.
            return Err(io::Error::other("the memory of this RAM block is not in the checkpoint"));
        }
        let len = into.len().min(usize::try_from(run).unwrap_or(usize::MAX));
        let into = &mut into[..len];
        if zeros {
            into.fill(0);
        } else {
            self.announce();
            let at = self.checkpoint.blocks[self.block].pages_offset + self.offset;
            self.checkpoint.file.read_exact_at(into, at)?;
        }
        self.offset += len as u64;
        Ok(len)
    }
}

/// What a mapped-ram file says besides the contents of RAM.
#[derive(Default)]
struct Stream {
    machine: String,
    capabilities: Vec<String>,
    uuid: Option<[u8; 16]>,
    ram_section: u32,
    /// Each with a mapped-ram header that was checked.
    blocks: Vec<BlockEntry>,
    /// Device-state packets, where there are any.
    packets: Option<KeptPackets>,
    beside_ram: BesideRam,
    tail: Tail,
}

/// Decodes the stream in a file.
struct FileReader<'a> {
    path: &'a Path,
    file: &'a File,
    len: u64,
    /// Where the stream begins.
    begin: u64,
    /// Where `buf` begins.
    at: u64,
    /// Bytes not used yet.
    buf: Vec<u8>,
}

impl FileReader<'_> {
    fn stream(mut self) -> Result<Stream, CheckpointError> {
        let mut decoder = MainDecoder::within_file(PAGE_SIZE, self.begin, self.len);
        let mut stream = Stream::default();
        if self.len == 0 {
            let kind = kind::describe(&[]).expect("an empty file can be told");
            return Err(CheckpointError::OtherKind { path: self.path.to_owned(), kind });
        }
        loop {
            let begin = self.at;
            let item = match decoder.step(&self.buf) {
                Ok(Step::Item { item, used }) => {
                    self.skip((used as u64).saturating_add(item.payload_len()));
                    item
                }
                Ok(Step::Need(total)) => {
                    self.need(total)?;
                    continue;
                }
                Err(StreamError { offset, source }) => return Err(self.of_other_kind(offset, source)),
            };
            match item {
                Item::Configuration { machine } => stream.machine = machine,
                Item::ConfigUuid(uuid) => stream.uuid = Some(uuid),
                Item::ConfigCapabilities(names) => stream.capabilities = names,
                Item::RamStart { section_id, .. } => {
                    if !decoder.layout().mapped_ram {
                        return Err(CheckpointError::NotMappedRam { path: self.path.to_owned() });
                    }
                    stream.ram_section = section_id;
                }
                Item::Block(entry) => stream.blocks.push(entry),
                Item::Section(section) if section.kind == SectionKind::Full && decoder.ram_ended() => {
                    // Everything from its head on; nothing more is decoded.
                    self.at = begin;
                    self.buf.clear();
                    stream.tail = self.tail(stream.beside_ram.early())?;
                    return Ok(stream);
                }
                Item::Section(section) if section.name == kept_packets::SECTION => {
                    let taken = self.packets(begin, &section, &mut stream.packets)?;
                    decoder.body_taken(taken);
                }
                Item::Section(section) => {
                    let ram_section = decoder.ram_section();
                    let scanner = BodyScanner::new(&section, ram_section);
                    let scanner = scanner.map_err(|error| self.refused(begin, error))?;
                    let body = self.body(scanner, stream.beside_ram.bytes())?;
                    decoder.body_taken(body.len() as u64);
                    let mut out = MainEncoder::default();
                    out.section(&section).raw(&body).footer(section.id);
                    stream.beside_ram.push(&section, &out.bytes, ram_section.is_some());
                }
                // A VM without devices.
                Item::Eof if self.at + self.buf.len() as u64 == self.len && self.buf.is_empty() => return Ok(stream),
                // A VM without devices that are described.
                Item::VmDescription { .. } => {
                    return match self.at.cmp(&self.len) {
                        Ordering::Less => Err(self.longer_than(self.at)),
                        Ordering::Equal => Ok(stream),
                        Ordering::Greater => Err(self.truncated()),
                    };
                }
                _ => {}
            }
        }
    }

    /// Device state, which goes on to the end of the file.
    fn tail(&mut self, early: &[u8]) -> Result<Tail, CheckpointError> {
        let len = self.len - self.at;
        if len > MAX_DEVICE_STATE as u64 {
            return Err(CheckpointError::TooMuchDeviceState { limit: MAX_DEVICE_STATE });
        }
        self.need(len as usize)?;
        match Tail::in_file(&self.buf, early) {
            Ok(tail) => Ok(tail),
            Err(Some(end)) => Err(self.longer_than(self.at + end as u64)),
            Err(None) => Err(self.truncated()),
        }
    }

    /// The section of device-state packets, whose head is at `begin`. Returns the length of its body.
    fn packets(
        &mut self,
        begin: u64,
        section: &Section,
        packets: &mut Option<KeptPackets>,
    ) -> Result<u64, CheckpointError> {
        if packets.is_some() || section.kind != SectionKind::Full || section.version != 1 {
            let (element, place) = ("section multifd/device-state", "a second time, in parts, or of a newer version");
            return Err(self.refused(begin, Violation::UnexpectedElement { element, place }));
        }
        self.need(kept_packets::LENGTH_LEN as usize)?;
        let len = u64::from_be_bytes(*self.buf.first_chunk().expect("as many as are needed"));
        self.skip(kept_packets::LENGTH_LEN);
        if len > self.len - self.at {
            return Err(self.truncated());
        }
        *packets = Some(KeptPackets::read(self.file, self.path, self.at, len)?);
        self.skip(len);
        Ok(kept_packets::LENGTH_LEN + len)
    }

    /// The body of a section beside `ram`, whose end `scanner` finds, with `before` bytes of others before it.
    fn body(&mut self, mut scanner: BodyScanner, before: usize) -> Result<Vec<u8>, CheckpointError> {
        let len = loop {
            let found = scanner.scan(&self.buf).map_err(|error| self.refused(self.at, error))?;
            check_early_state(before + found.unwrap_or(self.buf.len()))?;
            match found {
                Some(len) => break len,
                None => self.need(self.buf.len() + 1)?,
            }
        };
        let body = self.buf[..len].to_vec();
        self.skip(len as u64);
        Ok(body)
    }

    /// Has at least `total` bytes in `buf`.
    fn need(&mut self, total: usize) -> Result<(), CheckpointError> {
        let left = self.len.saturating_sub(self.at);
        if total as u64 > left {
            return Err(self.truncated());
        }
        let have = self.buf.len();
        // At least so much at once, where the file has it.
        let want = (total.max(have + READ_SIZE) as u64).min(left) as usize;
        self.buf.resize(want, 0);
        self.file.read_exact_at(&mut self.buf[have..], self.at + have as u64).map_err(|source| CheckpointError::Io {
            path: self.path.to_owned(),
            doing: "reading it",
            source,
        })
    }

    fn skip(&mut self, bytes: u64) {
        let in_buf = usize::try_from(bytes).unwrap_or(usize::MAX).min(self.buf.len());
        self.buf.drain(..in_buf);
        self.at = self.at.saturating_add(bytes);
    }

    /// What the file is, if it breaks a rule with its very first bytes.
    fn of_other_kind(&self, offset: u64, source: ProtocolError) -> CheckpointError {
        let mut beginning = vec![0; self.len.min(kind::LOOKED_AT as u64) as usize];
        if offset == 0
            && self.begin == 0
            && self.file.read_exact_at(&mut beginning, 0).is_ok()
            && let Some(kind) = kind::describe(&beginning)
        {
            return CheckpointError::OtherKind { path: self.path.to_owned(), kind };
        }
        self.refused(offset, source)
    }

    fn longer_than(&self, end: u64) -> CheckpointError {
        CheckpointError::Padded { path: self.path.to_owned(), end, more: self.len - end }
    }

    fn truncated(&self) -> CheckpointError {
        CheckpointError::Truncated { path: self.path.to_owned(), len: self.len }
    }

    fn refused(&self, offset: u64, source: impl Into<ProtocolError>) -> CheckpointError {
        CheckpointError::Stream { path: self.path.to_owned(), offset, source: source.into() }
    }
}

/// Adds the pages of one block to `present`: `pages`, whose bitmap begins at `at` in the file. Returns how many they are: to
/// count all of them after each block would be a look at the whole bitmap for each, and a file may claim terabytes in 4096 blocks.
fn read_bitmap(file: &File, at: u64, pages: Range<u64>, present: &mut DirtyBitmap) -> io::Result<u64> {
    let mut added = 0;
    let words = (pages.end - pages.start).div_ceil(64);
    let mut bytes = vec![0; READ_SIZE];
    for begin in (0..words).step_by(READ_SIZE / 8) {
        let part = &mut bytes[..(words - begin).min(READ_SIZE as u64 / 8) as usize * 8];
        file.read_exact_at(part, at + begin * 8)?;
        for (word, bytes) in (pages.start / 64 + begin..).zip(part.chunks_exact(8)) {
            let mut bits = u64::from_le_bytes(bytes.try_into().expect("chunks of 8"));
            // What lies behind the last page counts for nothing.
            let left = pages.end - word * 64;
            if left < 64 {
                bits &= (1 << left) - 1;
            }
            present.merge_word(word as usize, bits);
            added += u64::from(bits.count_ones());
        }
    }
    Ok(added)
}

/// How far ahead of a reader the kernel is told what will be read, at most: a disk is at its speed with some MiB to read.
const AHEAD: u64 = 16 << 20;
/// The longest run of content that is told at once, in pages: 4 MiB.
const RUN: u64 = 1024;
const NONBLOCK: i32 = libc::O_NONBLOCK;
/// Bytes read at once.
const READ_SIZE: usize = 64 << 10;

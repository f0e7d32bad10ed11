//! Who takes a stream: a VM of the VMM, or a checkpoint file.

use std::io::{self, Read};

use multifd_proto::{
    BlockName, Step,
    bodies::{DIRTY_BITMAP, NO_BITMAPS},
    command::BodyLength,
    ram::BlockEntry,
    stream::{Item, MainDecoder, Section},
};

use super::{
    FirstTouch, MainReader, OpaqueSink, PageSink,
    bounded_body::{BoundedBody, known},
    clean::CleanMemory,
    packeted_body::PacketedBody,
    sink::MemorySink,
};
use crate::{
    error::{Connection, Error, Mismatch, Place},
    layout::Layout,
    memory::shared::{self, Identity, SharedBlock},
    ram::{Access, InUse, Ram, RamBlock},
    stop::StopHandle,
    sync::Arc,
    sys::protection,
    threads::caught,
    vm::{DestinationVm, MAX_DESCRIPTION, SectionId, check_memory},
};

/// What main has said before the first page.
pub(crate) struct StreamHead {
    pub(crate) machine: String,
    /// Whether the source is going to wait for our answer.
    pub(crate) return_path: bool,
    /// The id of the `ram` section.
    pub(crate) ram_section: u32,
    pub(crate) blocks: Vec<BlockEntry>,
    /// The blocks in the source's order; pages are named by the position of their block in it.
    pub(crate) layout: Layout,
}

/// How much of main a section took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// Its body, up to the footer.
    Section,
    /// Everything to the end of the stream.
    RestOfStream,
}

/// Takes RAM and device state. Called by the main thread, in this order.
pub(crate) trait Target {
    /// Whether [`prepare`](Self::prepare) has a use for what a source says of its VM. A source of another one is not asked.
    fn takes_descriptions(&self) -> bool {
        false
    }

    /// Makes the VM by `description`, which is empty where the source has none to give. Returns the answer, of at most
    /// [`MAX_DESCRIPTION`] bytes.
    fn prepare(&mut self, description: &[u8]) -> Result<Vec<u8>, Error> {
        let _ = description;
        Ok(Vec::new())
    }

    /// Whether [`take_memory`](Self::take_memory) has a use for memory that a source hands over.
    fn takes_memory(&self) -> bool {
        false
    }

    /// Takes memory that the source hands over, before anything else: all that belongs to one VM, with what tells it from other
    /// memory.
    fn take_memory(&mut self, blocks: Vec<SharedBlock>, identities: Vec<Identity>) -> Result<(), Error> {
        drop((blocks, identities));
        Err(Mismatch::HandOverRefused.into())
    }

    /// Whether it takes a VM of which a part of the memory is elsewhere: in files that its QEMU and another one map.
    fn takes_devices_alone(&self) -> bool {
        false
    }

    /// The blocks whose memory is elsewhere, of a VM that [was taken so](Self::takes_devices_alone).
    fn memory_elsewhere(&self) -> Vec<BlockName> {
        Vec::new()
    }

    /// Says where the pages of `head` go, or that they do not fit.
    fn open_ram(&mut self, head: &StreamHead) -> Result<Arc<dyn PageSink>, Error>;

    /// Where device-state packets go that nothing here understands. Asked once, when the RAM was opened; `None`: they are refused.
    fn opaque_sink(&self) -> Option<Arc<dyn OpaqueSink>> {
        None
    }

    /// Packets have come since everything was made to last, and the source was told so: `all` that it has sent, or else they are left out.
    fn late_packets(&mut self, all: bool) -> Result<(), Error> {
        let _ = all;
        Ok(())
    }

    /// Takes the body of `section`, which `main` gives next, or also all that follows. All pages are in place if
    /// `ram_ended`. The source says its length `len` only to a target that [takes descriptions](Self::takes_descriptions).
    fn section(
        &mut self,
        section: &Section,
        len: Option<BodyLength>,
        ram_ended: bool,
        main: &mut MainReader,
    ) -> Result<Body, Error>;

    /// Takes the body of `section`, which comes in parts, as `ram` does. `main` gives it next.
    fn section_part(&mut self, section: &Section, main: &mut MainReader) -> Result<(), Error>;

    /// Takes the state of all devices, whole sections that came before their memory was there. All pages are in place now.
    fn devices(&mut self, sections: &[u8], page_size: usize) -> Result<(), Error>;

    /// Whether it takes the VM of a source that runs on: it will not be started here.
    fn takes_snapshots(&self) -> bool {
        false
    }

    /// Everything has arrived: makes it last, up to what may still be taken back. `uuid` is that of the VM, if it has one.
    fn make_durable(&mut self, uuid: Option<[u8; 16]>) -> Result<(), Error>;

    /// The migration can no longer be cancelled. With a source of ours [`start`](Self::start) follows, and the source is told
    /// afterwards; with another one the source is told first.
    fn commit(&mut self) -> Result<(), Error>;

    /// The VM is ours.
    fn start(&mut self) -> Result<(), Error>;

    /// The source has sent `rest` behind what was taken for the end of the stream, and has been told that all is well.
    fn rest(&mut self, rest: &[u8]) -> Result<(), Error> {
        tracing::debug!(bytes = rest.len(), "the source has sent more behind the end of the stream");
        Ok(())
    }

    /// The migration has failed, and the VM will not run here. All threads have ended.
    fn abandon(&mut self);
}

/// A VM of the VMM.
pub(super) struct VmTarget<'a> {
    vm: &'a mut dyn DestinationVm,
    /// What the VM said of its pages.
    page_size: usize,
    first_touch: FirstTouch,
    stop: StopHandle,
    /// The memory of the VM, once that was made: it must not be another later.
    ram: Option<Ram>,
    /// No other migration uses it.
    in_use: Option<InUse>,
    /// The same, once it was [made zero](Self::clean_memory).
    clean: Option<CleanMemory>,
    /// The VM is being made, or was, and does not run: it has to be told if it never will.
    is_made: bool,
    /// Memory that the source hands over.
    taken: Vec<Identity>,
    /// The blocks that are made of it, by index: the source's until its guest starts here.
    lent: Vec<usize>,
}

impl<'a> VmTarget<'a> {
    pub(super) fn new(
        vm: &'a mut dyn DestinationVm,
        page_size: usize,
        first_touch: FirstTouch,
        stop: StopHandle,
    ) -> VmTarget<'a> {
        let (taken, lent) = (Vec::new(), Vec::new());
        VmTarget { vm, page_size, first_touch, stop, ram: None, in_use: None, clean: None, is_made: false, taken, lent }
    }

    /// Finds the blocks that are made of what the source hands over, and sees to it that none of it is written.
    fn protect_memory(&mut self) -> Result<(), Error> {
        let ram = self.vm.ram();
        let lent = shared::find(ram, &self.taken)?;
        for block in lent.iter().map(|&index| &ram.blocks()[index]) {
            block.set_lent(true);
            protection::forbid_writing(block).map_err(|error| not_shared(block, &error))?;
        }
        self.lent = lent;
        Ok(())
    }

    /// Pages went, or are going to go, into the memory that the VM had when it was made.
    fn same_memory(&self) -> Result<(), Error> {
        self.ram.as_ref().map_or(Ok(()), |ram| check_memory(ram, self.vm.ram()))
    }

    /// What the source has handed over is ours.
    fn own_memory(&mut self) -> Result<(), Error> {
        let ram = self.vm.ram();
        for block in self.lent.drain(..).map(|index| &ram.blocks()[index]) {
            protection::permit_writing(block).map_err(|error| not_shared(block, &error))?;
            block.set_lent(false);
        }
        Ok(())
    }

    /// Makes the memory of the VM read as zeros where that is not known: as early as possible, as it may take a while.
    fn clean_memory(&mut self) -> Result<(), Error> {
        let mut clean = CleanMemory::new(self.vm.ram());
        // A block that is read-only will be refused.
        let wanted = |block: &RamBlock| !block.is_fresh() && !block.is_lent() && block.access() == Access::ReadWrite;
        clean.clean(&self.stop, |_, block| wanted(block))?;
        self.clean = Some(clean);
        Ok(())
    }
}

impl Target for VmTarget<'_> {
    fn takes_descriptions(&self) -> bool {
        true
    }

    fn prepare(&mut self, description: &[u8]) -> Result<Vec<u8>, Error> {
        self.is_made = true;
        let answer = self.vm.prepare(description).map_err(Error::vm("be prepared"))?;
        if answer.len() > MAX_DESCRIPTION as usize {
            let text = format!("the answer has {} bytes, at most {MAX_DESCRIPTION} are sent", answer.len());
            return Err(Error::vm("be prepared")(text.into()));
        }
        let ram = self.vm.ram();
        self.ram = Some(ram.clone());
        let (said, found) = (self.page_size, ram.layout().page_size());
        if said != found {
            return Err(Mismatch::PageSizeChanged { said, found }.into());
        }
        // Before a page is asked for. Once more at the three places that write guest memory.
        if let Some(block) = ram.blocks().iter().find(|block| block.access() != Access::ReadWrite) {
            return Err(Mismatch::BlockReadOnly { name: block.name().clone() }.into());
        }
        // Before anything is written there.
        self.in_use = Some(ram.begin_use()?);
        self.protect_memory()?;
        // While the guest runs at the source.
        self.clean_memory()?;
        Ok(answer)
    }

    fn takes_memory(&self) -> bool {
        true
    }

    fn take_memory(&mut self, blocks: Vec<SharedBlock>, identities: Vec<Identity>) -> Result<(), Error> {
        // Even where it fails: there may be something to be freed.
        self.is_made = true;
        self.taken = identities;
        self.vm.take_memory(blocks).map_err(Error::vm("take the source's memory"))
    }

    fn open_ram(&mut self, head: &StreamHead) -> Result<Arc<dyn PageSink>, Error> {
        self.same_memory()?;
        let ram = self.vm.ram();
        let mut order = Vec::new();
        for entry in &head.blocks {
            order.push(matching_block(ram.layout(), &entry.name, entry.used_len)?);
        }
        if let Some(missing) = (0..ram.blocks().len()).find(|index| !order.contains(index)) {
            return Err(Mismatch::BlockMissing { name: ram.blocks()[missing].name().clone() }.into());
        }
        let clean = self.clean.take().filter(|clean| clean.is_of(ram)).unwrap_or_else(|| CleanMemory::new(ram));
        Ok(Arc::new(MemorySink::new(clean, order, self.first_touch, &self.stop)?))
    }

    fn section(
        &mut self,
        section: &Section,
        len: Option<BodyLength>,
        _ram_ended: bool,
        main: &mut MainReader,
    ) -> Result<Body, Error> {
        let mut id = SectionId::new(&section.name, section.instance, section.version);
        let window = main.state_window();
        let mut body = main.body();
        (id.len, id.is_bounded) = (len.and_then(known), len.is_some());
        let loaded = match len {
            None => self.vm.load(&id, &mut body as &mut dyn Read),
            Some(BodyLength::Packets(said)) => {
                let mut packeted = PacketedBody::new(&mut body, &window, section, said);
                let loaded = self.vm.load(&id, &mut packeted as &mut dyn Read).and_then(|()| Ok(packeted.finish()?));
                match packeted.into_failure() {
                    Some(failure) => return Err(failure),
                    None => loaded,
                }
            }
            Some(len) => {
                let mut bounded = BoundedBody::new(&mut body, len);
                self.vm.load(&id, &mut bounded as &mut dyn Read).and_then(|()| Ok(bounded.finish()?))
            }
        };
        match loaded {
            Ok(()) => Ok(Body::Section),
            Err(source) => Err(body.into_failure().unwrap_or(Error::Load { section: id, source })),
        }
    }

    /// A VMM has no use for bitmaps of QEMU's disks, so there must be none.
    fn section_part(&mut self, section: &Section, main: &mut MainReader) -> Result<(), Error> {
        let mut body = [0; NO_BITMAPS.len()];
        if section.name == DIRTY_BITMAP && section.version == 1 {
            let mut reader = main.body();
            if let Err(source) = reader.read_exact(&mut body) {
                let at = reader.place();
                return Err(reader.into_failure().unwrap_or(Error::Io { at, source }));
            }
        }
        match body == NO_BITMAPS {
            true => Ok(()),
            false => Err(Mismatch::IterableSection { name: section.name.clone() }.into()),
        }
    }

    fn devices(&mut self, sections: &[u8], page_size: usize) -> Result<(), Error> {
        let mut decoder = MainDecoder::for_package(page_size);
        let mut rest = sections;
        while !rest.is_empty() {
            let at = Place { connection: Connection::Main, offset: decoder.position() };
            let step = decoder.step(rest).map_err(|error| Error::protocol(at)(error.source))?;
            let Step::Item { item, used } = step else {
                return Err(Error::Io { at, source: io::ErrorKind::UnexpectedEof.into() });
            };
            rest = &rest[used..];
            if let Item::Section(section) = item {
                let id = SectionId::new(&section.name, section.instance, section.version);
                let before = rest.len();
                let loaded = self.vm.load(&id, &mut rest as &mut dyn Read);
                loaded.map_err(|source| Error::Load { section: id, source })?;
                decoder.body_taken((before - rest.len()) as u64);
            }
        }
        Ok(())
    }

    fn make_durable(&mut self, _uuid: Option<[u8; 16]>) -> Result<(), Error> {
        Ok(())
    }

    fn commit(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Error> {
        self.same_memory()?;
        self.own_memory()?;
        self.vm.start().map_err(Error::vm("start"))?;
        self.is_made = false;
        Ok(())
    }

    fn abandon(&mut self) {
        if !std::mem::take(&mut self.is_made) {
            return;
        }
        let abandoned = caught(|| {
            self.vm.abandon();
            Ok(())
        });
        if let Err(error) = abandoned {
            tracing::error!(%error, "while the VM was abandoned");
        }
    }
}

fn not_shared(block: &RamBlock, error: &io::Error) -> Error {
    Mismatch::NotShared { name: block.name().clone(), why: error.to_string() }.into()
}

fn matching_block(ours: &Layout, name: &BlockName, theirs: u64) -> Result<usize, Mismatch> {
    let Some(index) = ours.index_of(name.as_str()) else {
        return Err(Mismatch::BlockUnknown { name: name.clone(), len: theirs });
    };
    match ours.blocks()[index].bytes() {
        len if len == theirs => Ok(index),
        len => Err(Mismatch::BlockLengths { name: name.clone(), theirs, ours: len }),
    }
}

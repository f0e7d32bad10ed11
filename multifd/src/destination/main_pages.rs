//! The pages that main carries, in place of channels or beside them.

use multifd_proto::{packet, rounds::Party, xbzrle};

use super::{Run, Scratch, named::NamedPages, shared::Pages};
use crate::{
    error::{Error, Place},
    round::trace::Step,
    sync::lock,
};

/// Pages with content that came one after the other and are put into place together: a run of them costs less than each by itself.
///
/// They wait for nothing but bytes that are there already: whatever else comes next, and before anything is waited for, they go
/// into place first.
#[derive(Default)]
pub(super) struct Gathered {
    block: usize,
    /// Ascending.
    offsets: Vec<u64>,
    bytes: Scratch,
    /// Where the last of them ended.
    place: Option<Place>,
}

impl Gathered {
    /// Whether the page at `offset` of `block` can be put into place with those that are here, `capacity` at most.
    fn takes(&self, block: usize, offset: u64, capacity: usize) -> bool {
        let Some(&last) = self.offsets.last() else { return true };
        self.block == block && last < offset && self.offsets.len() < capacity
    }
}

impl Run {
    pub(super) fn page(&mut self, block: usize, offset: u64, len: usize) -> Result<(), Error> {
        let capacity = packet::capacity(self.shared.page_size);
        let is_here = self.main().unread().len() >= len;
        if !is_here || !self.gathered.takes(block, offset, capacity) {
            self.place_gathered()?;
        }
        let main = self.main.as_mut().expect("its item was read");
        let payload = main.payload(len)?;
        let gathered = &mut self.gathered;
        gathered.bytes.room(capacity * len)[gathered.offsets.len() * len..][..len].copy_from_slice(payload);
        gathered.block = block;
        gathered.offsets.push(offset);
        gathered.place = Some(main.place());
        Ok(())
    }

    /// Puts those into place that wait for it.
    pub(super) fn place_gathered(&mut self) -> Result<(), Error> {
        let Some(place) = self.gathered.place.take() else { return Ok(()) };
        let mut gathered = std::mem::take(&mut self.gathered);
        let bytes = gathered.bytes.room(gathered.offsets.len() * self.shared.page_size);
        let placed = self.store(gathered.block, &gathered.offsets, bytes, place);
        gathered.offsets.clear();
        self.gathered = gathered;
        placed
    }

    pub(super) fn xbzrle(&mut self, block: usize, offset: u64, len: usize) -> Result<(), Error> {
        let place = self.main().place();
        let diff = self.main().payload(len)?.to_vec();
        let mut page = vec![0; self.shared.page_size];
        self.sink().load(block, offset, &mut page).map_err(Error::io(place))?;
        xbzrle::apply(&diff, &mut page).map_err(Error::protocol(place))?;
        let place = self.main().place();
        self.store(block, &[offset], &page, place)
    }

    pub(super) fn compressed_page(&mut self, block: usize, offset: u64, len: usize) -> Result<(), Error> {
        let place = self.main().place();
        let payload = self.main().payload(len)?.to_vec();
        let mut page = vec![0; self.shared.page_size];
        crate::compress::inflate_page(&payload, &mut page).map_err(Error::payload(place))?;
        let place = self.main().place();
        self.store(block, &[offset], &page, place)
    }

    fn store(&mut self, block: usize, offsets: &[u64], bytes: &[u8], place: Place) -> Result<(), Error> {
        self.writes(block, offsets);
        self.sink().store(block, offsets, bytes).map_err(Error::io(place))?;
        self.wrote(block, offsets);
        self.shared.progress.add_pages_after(self.rounds, offsets.len() as u64, 0);
        for &offset in offsets {
            self.name(block, offset)?;
        }
        if !self.complete {
            self.shared.barrier.members(|members| members.plain_page());
            self.look_at_members();
        }
        Ok(())
    }

    /// Main has named a page.
    pub(super) fn name(&mut self, block: usize, offset: u64) -> Result<(), Error> {
        if self.complete && !self.main().decoder().may_be_snapshot() {
            self.named = None;
            return Ok(());
        }
        let place = self.main().place();
        if let Some(Pages { layout, .. }) = &*lock(&self.shared.pages) {
            if self.named.is_none() {
                self.named = Some(NamedPages::new(layout).map_err(Error::io(place))?);
            }
            let named = self.named.as_mut().expect("made above");
            named.name(layout.blocks()[block].page_at(offset));
        }
        Ok(())
    }

    /// Main is about to write pages.
    pub(super) fn writes(&self, block: usize, offsets: &[u64]) {
        if let Some(audit) = &self.audit {
            audit.writes(block, offsets, Party::Main, self.rounds);
        }
    }

    /// Main has written pages.
    pub(super) fn wrote(&mut self, block: usize, offsets: &[u64]) {
        self.shared.options.trace.step(|| {
            let layout = lock(&self.shared.pages).as_ref().map(|pages| pages.layout.clone());
            let pages = layout.map(|layout| {
                let block = &layout.blocks()[block];
                offsets.iter().map(|&offset| block.page_at(offset)).collect()
            });
            Step::Apply(Party::Main, pages.unwrap_or_default())
        });
        self.count(block, offsets);
    }

    /// Main has brought pages that are in place.
    pub(super) fn count(&mut self, block: usize, offsets: &[u64]) {
        self.main_pages += offsets.len() as u64;
        if let Some(audit) = &self.audit {
            audit.wrote(block, offsets, Party::Main, self.rounds);
        }
    }
}

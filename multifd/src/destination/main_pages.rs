//! The pages that main carries, in place of channels or beside them.

use multifd_proto::{rounds::Party, xbzrle};

use super::{Run, named::NamedPages, shared::Pages};
use crate::{error::Error, round::trace::Step, sync::lock};

impl Run {
    pub(super) fn page(&mut self, block: usize, offset: u64, len: usize) -> Result<(), Error> {
        let payload = self.main().payload(len)?.to_vec();
        self.store(block, offset, &payload)
    }

    pub(super) fn xbzrle(&mut self, block: usize, offset: u64, len: usize) -> Result<(), Error> {
        let place = self.main().place();
        let diff = self.main().payload(len)?.to_vec();
        let mut page = vec![0; self.shared.page_size];
        self.sink().load(block, offset, &mut page).map_err(Error::io(place))?;
        xbzrle::apply(&diff, &mut page).map_err(Error::protocol(place))?;
        self.store(block, offset, &page)
    }

    pub(super) fn compressed_page(&mut self, block: usize, offset: u64, len: usize) -> Result<(), Error> {
        let place = self.main().place();
        let payload = self.main().payload(len)?.to_vec();
        let mut page = vec![0; self.shared.page_size];
        crate::compress::inflate_page(&payload, &mut page).map_err(Error::payload(place))?;
        self.store(block, offset, &page)
    }

    fn store(&mut self, block: usize, offset: u64, page: &[u8]) -> Result<(), Error> {
        self.writes(block, offset);
        self.sink().store(block, &[offset], page).map_err(Error::io(self.main().place()))?;
        self.wrote(block, offset);
        self.shared.progress.add_pages_after(self.rounds, 1, 0);
        self.name(block, offset)?;
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

    /// Main is about to write a page.
    pub(super) fn writes(&self, block: usize, offset: u64) {
        if let Some(audit) = &self.audit {
            audit.writes(block, &[offset], Party::Main, self.rounds);
        }
    }

    /// Main has written a page.
    pub(super) fn wrote(&mut self, block: usize, offset: u64) {
        self.shared.options.trace.step(|| {
            let layout = lock(&self.shared.pages).as_ref().map(|pages| pages.layout.clone());
            let page = layout.map(|layout| layout.blocks()[block].page_at(offset));
            Step::Apply(Party::Main, page.into_iter().collect())
        });
        self.count(block, offset);
    }

    /// Main has brought a page that is in place.
    pub(super) fn count(&mut self, block: usize, offset: u64) {
        self.main_pages += 1;
        if let Some(audit) = &self.audit {
            audit.wrote(block, &[offset], Party::Main, self.rounds);
        }
    }
}

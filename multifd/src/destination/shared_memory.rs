//! Takes memory that the source hands over, before the VM is made.

use multifd_proto::{Violation, extension::Extension, shared_memory};

use super::{Run, Target};
use crate::{
    error::{Error, Mismatch},
    memory::shared::SharedBlock,
};

impl Run {
    /// The source hands the memory over that is listed in the next `len` bytes, whose descriptors came with these.
    pub(super) fn shared_memory(&mut self, len: u32, target: &mut dyn Target) -> Result<(), Error> {
        let place = self.main().place();
        let at = match self.extensions.contains(Extension::SharedMemory) {
            false => Some("without being agreed on"),
            // The decoder does not count sections.
            true if self.prepared => Some("after a section"),
            true => None,
        };
        if let Some(at) = at {
            let element = "SHARED_MEMORY";
            return Err(Error::protocol(place)(Violation::UnexpectedElement { element, place: at }));
        }
        let listed = shared_memory::decode(self.main().payload(len as usize)?).map_err(Error::protocol(place))?;
        let descriptors = self.main().take_descriptors();
        if descriptors.len() != listed.len() {
            return Err(Mismatch::Descriptors { came: descriptors.len(), listed: listed.len() }.into());
        }
        self.report.handed_over = listed.iter().map(|block| block.len).fold(0, u64::saturating_add);
        let received = listed.into_iter().zip(descriptors).map(|(block, file)| SharedBlock::received(block, file));
        let (blocks, identities) = received.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        target.take_memory(blocks, identities)
    }
}

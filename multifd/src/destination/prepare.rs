//! Has the VM made, by what the source says of its own, before there is any memory.

use multifd_proto::{Violation, extension::Extension, return_path::Message};

use super::{Run, Target};
use crate::{error::Error, pulse::Pulse};

impl Run {
    /// The source describes its VM in the next `len` bytes: has one made like it, and says so.
    pub(super) fn describe(&mut self, len: u32, target: &mut dyn Target) -> Result<(), Error> {
        let place = self.main().place();
        if !self.extensions.contains(Extension::Prepare) {
            let (element, at) = ("DESCRIBE", "without being agreed on");
            return Err(Error::protocol(place)(Violation::UnexpectedElement { element, place: at }));
        }
        let description = self.main().payload(len as usize)?.to_vec();
        let answer = self.prepare(&description, target)?;
        let len = u32::try_from(answer.len()).expect("the target keeps it below MAX_DESCRIPTION");
        self.main().reply_with(&Message::Prepared { len }, &answer)
    }

    /// Has the VM of a source made that has said nothing about it, unless it was made.
    pub(super) fn prepare_undescribed(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        if !self.prepared {
            self.prepare(&[], target)?;
        }
        Ok(())
    }

    fn prepare(&mut self, description: &[u8], target: &mut dyn Target) -> Result<Vec<u8>, Error> {
        self.prepared = true;
        drop(self.main().take_descriptors());
        // What it takes to make a VM is not the source's silence.
        Pulse::rest(self.watchdog.timers());
        let answer = target.prepare(description)?;
        self.watch_the_source();
        Ok(answer)
    }

    /// From now on a silent source ends the migration when the limit of silence has passed.
    pub(super) fn watch_the_source(&self) {
        let stall_limit = self.shared.options.stall_limit;
        self.shared.pulse.watch(self.watchdog.timers(), move || stall_limit, &self.shared.stop);
    }
}

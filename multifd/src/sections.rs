//! Writes device state to the main channel, as sections that an inspector can cut apart again.

use std::io;

/// Takes the device state of a VM, one section after the other. Passed to [`SourceVm::save`](crate::vm::SourceVm::save).
pub struct Sections<'a> {
    out: &'a mut dyn SectionSink,
}

impl<'a> Sections<'a> {
    pub(crate) fn new(out: &'a mut dyn SectionSink) -> Sections<'a> {
        Sections { out }
    }

    /// Sends the state of one device: `body` reaches
    /// [`DestinationVm::load`](crate::vm::DestinationVm::load) under the same name, instance and version.
    ///
    /// # Errors
    /// The connection's; a name that is empty or longer than 255 bytes.
    pub fn section(&mut self, name: &str, instance: u32, version: u32, body: &[u8]) -> io::Result<()> {
        self.out.section(name, instance, version, body)
    }

    /// Sends device sections exactly as they were received, with the vmdescription that belongs to them. Nothing else
    /// may be sent before or after.
    ///
    /// # Errors
    /// The connection's.
    pub fn replay(&mut self, sections: &[u8], vmdescription: &[u8]) -> io::Result<()> {
        self.out.replay(sections, vmdescription)
    }
}

/// Where sections go: the main channel of a source.
pub(crate) trait SectionSink {
    fn section(&mut self, name: &str, instance: u32, version: u32, body: &[u8]) -> io::Result<()>;
    fn replay(&mut self, sections: &[u8], vmdescription: &[u8]) -> io::Result<()>;
}

//! Collects device state, as sections that an inspector can cut apart again.

use std::io;

use multifd_proto::{
    BlockName,
    encoder::MainEncoder,
    stream::{Section, SectionKind},
    vmdesc::{OpaqueSection, VmDescription},
};

/// Takes the device state of a VM, one section after the other, in the order in which it is to be loaded. Passed to
/// [`SourceVm::save`](crate::vm::SourceVm::save).
pub struct Sections {
    encoder: MainEncoder,
    /// Id of the next section.
    next_id: u32,
    /// Name, instance, version and body length of each section.
    devices: Vec<(String, u32, u32, u64)>,
    /// Sections and vmdescription of another source, instead of all of the above.
    replayed: Option<(Vec<u8>, Vec<u8>)>,
}

impl Sections {
    pub(crate) fn new() -> Sections {
        Sections { encoder: MainEncoder::new(), next_id: RAM_SECTION + 1, devices: Vec::new(), replayed: None }
    }

    /// Adds the state of one device: `body` reaches
    /// [`DestinationVm::load`](crate::vm::DestinationVm::load) under the same name, instance and version.
    ///
    /// # Errors
    /// A name that is empty or longer than 255 bytes.
    pub fn section(&mut self, name: &str, instance: u32, version: u32, body: &[u8]) -> io::Result<()> {
        // Section names follow the rules of block names.
        BlockName::new(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let id = self.next_id;
        let head = Section { kind: SectionKind::Full, id, name: name.to_owned(), instance, version };
        self.encoder.section(&head).raw(body).footer(id);
        self.next_id += 1;
        self.devices.push((name.to_owned(), instance, version, body.len() as u64));
        Ok(())
    }

    /// Sends device sections exactly as they were received, with the vmdescription that belongs to them, instead of any
    /// added with [`section`](Self::section). An empty description is left out.
    pub fn replay(&mut self, sections: Vec<u8>, vmdescription: Vec<u8>) {
        self.replayed = Some((sections, vmdescription));
    }

    /// The sections as they stand on the wire, and the vmdescription.
    pub(crate) fn into_parts(self, page_size: usize) -> (Vec<u8>, Vec<u8>) {
        if let Some(replayed) = self.replayed {
            return replayed;
        }
        let described = self.devices.iter().map(|(name, instance, version, len)| OpaqueSection {
            name,
            instance: *instance,
            version: *version,
            len: *len,
        });
        let description = VmDescription::opaque(page_size as u64, described).to_json();
        (self.encoder.as_bytes().to_vec(), description)
    }
}

/// The id of the `ram` section in streams that we write.
pub(crate) const RAM_SECTION: u32 = 1;

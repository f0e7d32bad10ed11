//! The JSON at the end of main, which describes the devices' state field by field.
//!
//! In QEMU's format device bodies have no length on the wire. A receiver without the device models keeps everything from the first device
//! section on, finds the end of the stream by its shape ([`TailScanner`]), and then cuts the kept bytes into sections with
//! the lengths that the description gives ([`cut`]). Each section ends with a footer that carries its own id, so a wrong
//! length cannot go unnoticed. Descriptions may be wrong (emulators had errors there): that a blob cannot be cut does not
//! make it invalid.
//!
//! Length of a body: the sum over its fields of `size` × `array_len`, and for each subsection 6 bytes, its name and
//! its own length. The `size` of a field with a `struct` is complete, nested subsections included.

mod tail;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize, Serializer};

pub use self::tail::{TailEnd, TailScanner};
use crate::ids::escape;
use crate::stream::{FOOTER, FULL, SUBSECTION};
use crate::wire::{Reader, Short};

/// The description of all device sections, in the order of the stream. RAM is not described.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDescription {
    /// The page size of the stream.
    pub page_size: u64,
    /// One entry per device section. Devices that were sent before RAM come first.
    pub devices: Vec<Device>,
}

/// The state of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The section's name.
    pub name: String,
    /// The section's instance.
    pub instance_id: u32,
    /// The name of the layout, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmsd_name: Option<String>,
    /// The version of the layout.
    #[serde(default)]
    pub version: u32,
    /// The fields in the order of the bytes.
    #[serde(default)]
    pub fields: Vec<Field>,
    /// What follows the fields, each with a head of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subsections: Vec<Struct>,
}

/// One field, or several equal ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Field {
    /// The field's name.
    pub name: String,
    /// Where the field is an element of an array that is listed one by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u64>,
    /// How many equal elements this is, each of `size` bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub array_len: Option<u64>,
    /// What the bytes mean: `uint32`, `buffer`, `struct`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// The layout of the bytes, where they have fields of their own.
    #[serde(default, rename = "struct", skip_serializing_if = "Option::is_none")]
    pub layout: Option<Struct>,
    /// How many bytes one element has.
    pub size: u64,
}

/// A nested layout: of a field, or of a subsection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Struct {
    /// The name of the layout; of a subsection, also its name on the wire.
    pub vmsd_name: String,
    /// The version of the layout.
    #[serde(default)]
    pub version: u32,
    /// The fields in the order of the bytes.
    #[serde(default)]
    pub fields: Vec<Field>,
    /// What follows the fields.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subsections: Vec<Struct>,
}

impl VmDescription {
    /// The description in `json`, which is the payload of the vmdescription element.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// A description of sections whose content is not described: one buffer each. With it a stream of a VMM that does not
    /// describe its devices can be cut all the same.
    pub fn opaque<'a>(page_size: u64, sections: impl IntoIterator<Item = OpaqueSection<'a>>) -> Self {
        let device = |section: OpaqueSection<'a>| Device {
            name: section.name.to_owned(),
            instance_id: section.instance,
            vmsd_name: None,
            version: section.version,
            fields: vec![Field {
                name: "data".to_owned(),
                index: None,
                array_len: None,
                kind: "buffer".to_owned(),
                layout: None,
                size: section.len,
            }],
            subsections: Vec::new(),
        };
        Self { page_size, devices: sections.into_iter().map(device).collect() }
    }

    /// The description as it stands on the wire.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("maps have string keys and numbers are integers")
    }

    /// The sections in the order of the stream, with the length of their bodies where it can be known.
    #[cfg(test)]
    fn device_sections(&self) -> impl Iterator<Item = (&Device, Option<u64>)> {
        self.devices.iter().map(|device| (device, device.body_len()))
    }
}

/// A section to be described by its length only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpaqueSection<'a> {
    /// The section's name.
    pub name: &'a str,
    /// The section's instance.
    pub instance: u32,
    /// The section's version.
    pub version: u32,
    /// Length of its body.
    pub len: u64,
}

impl Device {
    /// How many bytes the body of this device's section has; nothing when the numbers overflow.
    pub(crate) fn body_len(&self) -> Option<u64> {
        len_of(&self.fields, &self.subsections)
    }

    /// The fields' values in `body`; nothing when the description does not fit it, or has more than [`MAX_VALUES`] values.
    pub fn values(&self, body: &[u8]) -> Option<Value> {
        values(&self.fields, &self.subsections, body, &mut { MAX_VALUES })
    }
}

/// Sum of fields and subsections.
fn len_of(fields: &[Field], subsections: &[Struct]) -> Option<u64> {
    let mut sum = 0u64;
    for field in fields {
        sum = sum.checked_add(field.size.checked_mul(field.array_len.unwrap_or(1))?)?;
    }
    for subsection in subsections {
        let head = 6 + subsection.vmsd_name.len() as u64;
        sum = sum.checked_add(head)?.checked_add(len_of(&subsection.fields, &subsection.subsections)?)?;
    }
    Some(sum)
}

/// A value of a device's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A number without sign; also `bool`.
    Unsigned(u64),
    /// A number with sign.
    Signed(i64),
    /// Bytes without known meaning.
    Bytes(Vec<u8>),
    /// The elements of an array.
    List(Vec<Value>),
    /// Named values in the order of the bytes; names may repeat.
    Fields(Vec<(String, Value)>),
}

/// As JSON: numbers, hex strings, arrays and objects.
impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Unsigned(value) => serializer.serialize_u64(*value),
            Self::Signed(value) => serializer.serialize_i64(*value),
            Self::Bytes(_) => serializer.collect_str(self),
            Self::List(values) => serializer.collect_seq(values),
            Self::Fields(fields) => {
                // The second field of a name gets a number: readers of JSON keep only one of two equal keys.
                let mut seen = HashMap::new();
                serializer.collect_map(fields.iter().map(|(name, value)| {
                    let times = seen.entry(name).and_modify(|times| *times += 1).or_insert(1);
                    (if *times == 1 { name.clone() } else { format!("{name}#{times}") }, value)
                }))
            }
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsigned(value) => write!(f, "{value:#x}"),
            Self::Signed(value) => write!(f, "{value}"),
            Self::Bytes(bytes) => bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
            Self::List(values) => {
                for (i, value) in values.iter().enumerate() {
                    write!(f, "{}{value}", if i == 0 { "[" } else { ", " })?;
                }
                f.write_str(if values.is_empty() { "[]" } else { "]" })
            }
            Self::Fields(fields) => {
                for (i, (name, value)) in fields.iter().enumerate() {
                    write!(f, "{}{}: {value}", if i == 0 { "{" } else { ", " }, name.escape_debug())?;
                }
                f.write_str(if fields.is_empty() { "{}" } else { "}" })
            }
        }
    }
}

/// The values of a body that consists of `fields` and `subsections` and nothing else. `budget` is how many more there may be.
fn values(fields: &[Field], subsections: &[Struct], body: &[u8], budget: &mut usize) -> Option<Value> {
    *budget = budget.checked_sub(fields.len() + subsections.len())?;
    let mut reader = Reader::new(body);
    let mut named = Vec::new();
    for field in fields {
        let len = field.size.checked_mul(field.array_len.unwrap_or(1))?;
        let bytes = reader.bytes(usize::try_from(len).ok()?).ok()?;
        let name = match field.index {
            Some(index) => format!("{}[{index}]", field.name),
            None => field.name.clone(),
        };
        named.push((name, field.value(bytes, budget)));
    }
    for subsection in subsections {
        let head = (reader.u8().ok()?, reader.pstr().ok()?, reader.u32().ok()?);
        if head != (SUBSECTION, subsection.vmsd_name.as_bytes(), subsection.version) {
            return None;
        }
        let len = len_of(&subsection.fields, &subsection.subsections)?;
        let bytes = reader.bytes(usize::try_from(len).ok()?).ok()?;
        named.push((subsection.vmsd_name.clone(), values(&subsection.fields, &subsection.subsections, bytes, budget)?));
    }
    (reader.remaining() == 0).then_some(Value::Fields(named))
}

impl Field {
    /// The value in `bytes`, which are all elements of the field.
    fn value(&self, bytes: &[u8], budget: &mut usize) -> Value {
        // An array of bytes is shown as bytes. An array of nothing must not become a list as long as a peer says.
        if self.array_len.is_none() || self.size == 0 || (self.size == 1 && self.layout.is_none()) {
            return self.element(bytes, budget);
        }
        // The size fits: the elements were taken from a body in memory.
        Value::List(bytes.chunks(self.size as usize).map(|element| self.element(element, budget)).collect())
    }

    fn element(&self, bytes: &[u8], budget: &mut usize) -> Value {
        let bytes_as_they_are = || Value::Bytes(bytes.to_vec());
        if let Some(layout) = &self.layout {
            return values(&layout.fields, &layout.subsections, bytes, budget).unwrap_or_else(bytes_as_they_are);
        }
        let signed = self.kind.starts_with("int") || self.kind == "timer";
        let unsigned = self.kind.starts_with("uint") || self.kind == "bool";
        match (bytes, signed, unsigned) {
            ([a], true, _) => Value::Signed((*a as i8).into()),
            ([a], _, true) => Value::Unsigned((*a).into()),
            ([a, b], true, _) => Value::Signed(i16::from_be_bytes([*a, *b]).into()),
            ([a, b], _, true) => Value::Unsigned(u16::from_be_bytes([*a, *b]).into()),
            ([a, b, c, d], true, _) => Value::Signed(i32::from_be_bytes([*a, *b, *c, *d]).into()),
            ([a, b, c, d], _, true) => Value::Unsigned(u32::from_be_bytes([*a, *b, *c, *d]).into()),
            ([a, b, c, d, e, f, g, h], true, _) => Value::Signed(i64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h])),
            ([a, b, c, d, e, f, g, h], _, true) => {
                Value::Unsigned(u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]))
            }
            _ => bytes_as_they_are(),
        }
    }
}

/// One device section in a blob that was cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSection {
    /// The section's id.
    pub id: u32,
    /// The section's name.
    pub name: String,
    /// The section's instance.
    pub instance: u32,
    /// The section's version.
    pub version: u32,
    /// Where its body lies in the blob.
    pub body: Range<usize>,
    /// Index of its description in [`VmDescription::devices`].
    pub device: usize,
}

/// Cuts `blob`, all bytes from the first device section behind RAM up to the end-of-state byte, into sections.
///
/// Devices that were sent before RAM are described and not in the blob; they are passed over. Every other device must be
/// there, in order, with its name, its instance and a footer with its id exactly where its description ends, and
/// nothing may be left.
pub fn cut(blob: &[u8], description: &VmDescription) -> Result<Vec<DeviceSection>, CutError> {
    cut_devices(blob, &description.devices)
}

fn cut_devices(blob: &[u8], devices: &[Device]) -> Result<Vec<DeviceSection>, CutError> {
    let mut reader = Reader::new(blob);
    let mut sections = Vec::new();
    while reader.remaining() > 0 {
        let at = reader.position();
        let section = section(&mut reader, devices, sections.last())?;
        let end = footer_of(section.id);
        if reader.bytes(end.len()).map_err(|_| CutError::Truncated { at })? != end {
            return Err(CutError::BadFooter { at: section.body.end, name: section.name });
        }
        sections.push(section);
    }
    let first_missing = sections.last().map_or(0, |last| last.device + 1);
    match devices.get(first_missing) {
        Some(device) => Err(CutError::Missing { name: escape(device.name.as_bytes()) }),
        None => Ok(sections),
    }
}

/// Cuts `early`, the device sections before the pages, and `blob`, those behind them, as [`cut`] does. Together they must be
/// exactly what is described.
pub fn cut_all(
    early: &[u8],
    blob: &[u8],
    description: &VmDescription,
) -> Result<(Vec<DeviceSection>, Vec<DeviceSection>), CutError> {
    let sections = cut(blob, description)?;
    let first = sections.first().map_or(description.devices.len(), |section| section.device);
    Ok((cut_devices(early, &description.devices[..first])?, sections))
}

/// The rule of [`WholeScanner`], as it reads.
#[cfg(test)]
pub(crate) fn look_whole(blob: &[u8]) -> bool {
    match head(blob) {
        _ if blob.is_empty() => true,
        Head::Is { id, len } => ends_whole(&blob[len..], id),
        Head::Not | Head::Short => false,
    }
}

/// Cuts `blob` into sections by the rule of [`WholeScanner`]; nothing where it does not look whole.
///
/// This is for states that no description comes with. Bytes inside of a body can look like its end and another section: then there are
/// more sections than devices, and together they are still all of the bytes.
pub fn cut_by_shape(blob: &[u8]) -> Option<Vec<DeviceSection>> {
    let (mut sections, mut begin) = (Vec::new(), 0);
    while begin < blob.len() {
        let Head::Is { id, len } = head(&blob[begin..]) else { return None };
        let (body, footer) = (begin + len, footer_of(id));
        let ends = |at: usize| match &blob[at + footer.len()..] {
            [] => true,
            behind => matches!(head(behind), Head::Is { id: next, .. } if next != id),
        };
        let footers = blob[body..].windows(footer.len()).enumerate().filter(|(_, window)| **window == footer);
        let end = footers.map(|(at, _)| body + at).find(|&at| ends(at))?;
        // The head has been looked at: element, id, name, instance, version.
        let mut reader = Reader::new(&blob[begin..body]);
        let name = reader.bytes(5).and_then(|_| reader.pstr()).ok()?;
        let (instance, version) = (reader.u32().ok()?, reader.u32().ok()?);
        let name = String::from_utf8_lossy(name).into_owned();
        sections.push(DeviceSection { id, name, instance, version, body: body..end, device: sections.len() });
        begin = end + footer.len();
    }
    Some(sections)
}

/// The same, where `rest` begins inside the body of the section `id`.
fn ends_whole(mut rest: &[u8], mut id: u32) -> bool {
    loop {
        let footer = footer_of(id);
        let footers = rest.windows(footer.len()).enumerate().filter(|(_, window)| **window == footer);
        let mut behind = footers.map(|(at, _)| &rest[at + footer.len()..]);
        let next = |behind: &[u8]| match head(behind) {
            Head::Is { id: next, len } if next != id => Some((next, len)),
            _ => None,
        };
        match behind.find_map(|behind| {
            if behind.is_empty() { Some((behind, None)) } else { next(behind).map(|n| (behind, Some(n))) }
        }) {
            Some((_, None)) => return true,
            Some((behind, Some((next, len)))) => (rest, id) = (&behind[len..], next),
            None => return false,
        }
    }
}

/// Whether a buffer that may grow looks like whole device sections, one behind the other, as far as that can be told without a
/// description: behind each head, the first footer with its id that has another head behind it, or the end. No byte is looked at
/// twice, but for some hundred at the end.
#[derive(Debug, Clone, Default)]
pub struct WholeScanner {
    /// Where the section under way begins.
    begin: usize,
    /// Its id, once its head was read.
    id: Option<u32>,
    /// Behind its head; no end of it lies before.
    searched: usize,
    /// Something else began where a section should.
    broken: bool,
}

impl WholeScanner {
    /// Whether `blob` looks whole. The same blob with more behind it is to be passed next.
    pub fn scan(&mut self, blob: &[u8]) -> bool {
        while !self.broken {
            let Some(id) = self.id else {
                match head(&blob[self.begin..]) {
                    Head::Is { id, len } => (self.id, self.searched) = (Some(id), self.begin + len),
                    Head::Short => return self.begin == blob.len(),
                    Head::Not => self.broken = true,
                }
                continue;
            };
            let footer = footer_of(id);
            let Some(skip) = blob[self.searched..].iter().position(|byte| *byte == FOOTER) else {
                self.searched = blob.len();
                return false;
            };
            self.searched += skip;
            let rest = &blob[self.searched..];
            match rest.strip_prefix(&footer) {
                None if rest.len() < footer.len() && footer.starts_with(rest) => return false,
                None => self.searched += 1,
                Some([]) => return true,
                Some(behind) => match head(behind) {
                    Head::Is { id: next, .. } if next != id => {
                        self.begin = self.searched + footer.len();
                        self.id = None;
                    }
                    // More bytes may make it a head; without them, what is left may have another end.
                    Head::Short => return ends_whole(&rest[1..], id),
                    Head::Is { .. } | Head::Not => self.searched += 1,
                },
            }
        }
        false
    }
}

fn footer_of(id: u32) -> [u8; 5] {
    let mut footer = [FOOTER, 0, 0, 0, 0];
    footer[1..].copy_from_slice(&id.to_be_bytes());
    footer
}

/// What bytes begin with, if it may be the head of a section.
enum Head {
    /// A head with this id, and its length.
    Is { id: u32, len: usize },
    /// Something else.
    Not,
    /// It ends before that can be told.
    Short,
}

fn head(bytes: &[u8]) -> Head {
    let mut reader = Reader::new(bytes);
    let mut read = || -> Result<Head, Short> {
        if reader.u8()? != FULL {
            return Ok(Head::Not);
        }
        let (id, name) = (reader.u32()?, reader.pstr()?);
        if name.is_empty() || !name.iter().all(|byte| (0x20..0x7f).contains(byte)) {
            return Ok(Head::Not);
        }
        reader.u64()?; // instance and version
        Ok(Head::Is { id, len: reader.position() })
    };
    read().unwrap_or(Head::Short)
}

/// Head and body of the section behind `previous`.
fn section(
    reader: &mut Reader<'_>,
    devices: &[Device],
    previous: Option<&DeviceSection>,
) -> Result<DeviceSection, CutError> {
    let at = reader.position();
    let truncated = |_: Short| CutError::Truncated { at };
    let byte = reader.u8().map_err(truncated)?;
    if byte != FULL {
        return Err(CutError::NotASection { at, found: byte });
    }
    let id = reader.u32().map_err(truncated)?;
    let name = reader.pstr().map_err(truncated)?;
    let instance = reader.u32().map_err(truncated)?;
    let version = reader.u32().map_err(truncated)?;
    let is_it = |device: &Device| device.name.as_bytes() == name && device.instance_id == instance;
    let index = match previous {
        Some(previous) => Some(previous.device + 1).filter(|next| devices.get(*next).is_some_and(is_it)),
        None => devices.iter().position(is_it),
    };
    let Some(index) = index else {
        return Err(CutError::NotDescribed { at, name: escape(name), instance });
    };
    let device = &devices[index];
    let len = device.body_len().and_then(|len| usize::try_from(len).ok());
    let start = reader.position();
    len.and_then(|len| reader.bytes(len).ok()).ok_or(CutError::Truncated { at })?;
    Ok(DeviceSection {
        id,
        name: device.name.clone(),
        instance,
        version,
        body: start..reader.position(),
        device: index,
    })
}

/// Why a blob of device sections cannot be cut with its description.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CutError {
    /// The blob ends inside a section, or its described length exceeds the blob.
    #[error("section at byte {at} of the device state does not end inside it")]
    Truncated {
        /// Where the section begins.
        at: usize,
    },
    /// Something else begins where a section should.
    #[error("byte {at} of the device state is {found:#04x} and begins no section")]
    NotASection {
        /// Where.
        at: usize,
        /// The byte.
        found: u8,
    },
    /// The section is not the one that the description has next.
    #[error("section \"{name}\" instance {instance} at byte {at} of the device state is not described there")]
    NotDescribed {
        /// Where the section begins.
        at: usize,
        /// Its name, escaped.
        name: String,
        /// Its instance.
        instance: u32,
    },
    /// No footer with the right id stands where the description ends the section.
    #[error("section \"{name}\" does not end at byte {at} of the device state, where its description ends")]
    BadFooter {
        /// Where the footer should stand.
        at: usize,
        /// The section's name.
        name: String,
    },
    /// A described device has no section.
    #[error("described section \"{name}\" is missing from the device state")]
    Missing {
        /// Its name, escaped.
        name: String,
    },
}

/// Where main ends, if `buf` ends with the end of main.
#[cfg(test)]
pub(crate) fn find_end(buf: &[u8]) -> Option<TailEnd> {
    TailScanner::default().scan(buf)
}

/// The most values shown for one device, so that a small description cannot ask for a huge answer. Real devices have some
/// hundreds.
pub(crate) const MAX_VALUES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::tail::HEAD;
    use super::*;
    use crate::stream::VMDESCRIPTION;

    const JSON: &str = r#"{"configuration": {"ignored": []}, "page_size": 4096, "devices": [
        {"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, "fields": [
            {"name": "offset", "type": "int64", "size": 8},
            {"name": "unused", "type": "unused_buffer", "size": 2},
            {"name": "unused", "type": "unused_buffer", "size": 1}]},
        {"name": "dma", "instance_id": 1, "vmsd_name": "dma", "version": 1, "fields": [
            {"name": "regs", "array_len": 2, "type": "struct", "struct": {"vmsd_name": "r", "version": 1, "fields": [
                {"name": "now", "array_len": 2, "type": "uint16", "size": 2},
                {"name": "mode", "type": "bool", "size": 1}]}, "size": 5},
            {"name": "irq", "index": 3, "type": "uint8", "size": 1},
            {"name": "empty", "type": "tmp", "size": 0}],
         "subsections": [{"vmsd_name": "dma/x", "version": 7, "fields": [{"name": "y", "type": "int32 le", "size": 4}]}]}
    ]}"#;

    const TIMER: &[u8] = b"\xff\xff\xff\xff\xff\xff\xff\xfe\xaa\xbb\xcc";
    const DMA: &[u8] = b"\0\x01\0\x02\x01\0\x03\0\x04\0\x09\x05\x05dma/x\0\0\0\x07\0\0\0\x2a";

    fn description() -> VmDescription {
        VmDescription::parse(JSON.as_bytes()).unwrap()
    }

    fn section_bytes(id: u32, name: &str, instance: u32, version: u32, body: &[u8]) -> Vec<u8> {
        let mut out = vec![FULL];
        crate::wire::Writer::new(&mut out).u32(id).pstr(name.as_bytes()).u32(instance).u32(version).bytes(body);
        out.push(FOOTER);
        out.extend_from_slice(&id.to_be_bytes());
        out
    }

    fn blob() -> Vec<u8> {
        [section_bytes(0, "timer", 0, 2, TIMER), section_bytes(40, "dma", 1, 1, DMA)].concat()
    }

    #[test]
    fn body_lengths_count_arrays_and_subsection_heads() {
        let lengths: Vec<_> = description().device_sections().map(|(_, len)| len).collect();
        assert_eq!(lengths, [Some(TIMER.len() as u64), Some(DMA.len() as u64)]);
    }

    #[test]
    fn lengths_that_overflow_are_no_lengths() {
        for (size, array_len) in [(u64::MAX, 2), (1 << 63, 4)] {
            let mut description = description();
            description.devices[0].fields[0].size = size;
            description.devices[0].fields[0].array_len = Some(array_len);
            assert_eq!(description.devices[0].body_len(), None);
            assert_eq!(cut(&blob(), &description), Err(CutError::Truncated { at: 0 }));
        }
    }

    #[test]
    fn a_blob_is_cut_into_its_sections() {
        let blob = blob();
        let sections = cut(&blob, &description()).unwrap();
        assert_eq!(sections.len(), 2);
        assert_eq!(
            (sections[1].id, sections[1].name.as_str(), sections[1].instance, sections[1].version),
            (40, "dma", 1, 1)
        );
        assert_eq!(blob[sections[0].body.clone()], *TIMER);
        assert_eq!(blob[sections[1].body.clone()], *DMA);
    }

    #[test]
    fn devices_that_were_sent_before_ram_are_passed_over() {
        let sections = cut(&section_bytes(40, "dma", 1, 1, DMA), &description()).unwrap();
        assert_eq!((sections.len(), sections[0].device), (1, 1));
    }

    #[test]
    fn a_blob_that_does_not_fit_its_description_is_not_cut() {
        let description = description();
        let good = blob();
        let timer_len = good.len() - section_bytes(40, "dma", 1, 1, DMA).len();
        for len in (1..good.len()).filter(|len| *len != timer_len) {
            assert!(matches!(cut(&good[..len], &description), Err(CutError::Truncated { .. })), "{len}");
        }
        assert_eq!(cut(&good[..timer_len], &description), Err(CutError::Missing { name: "dma".into() }));
        let longer = section_bytes(0, "timer", 0, 2, &[TIMER, b"x"].concat());
        let at = longer.len() - 6;
        assert_eq!(cut(&longer, &description), Err(CutError::BadFooter { at, name: "timer".into() }));
        let twice = [good.clone(), good.clone()].concat();
        let again = CutError::NotDescribed { at: good.len(), name: "timer".into(), instance: 0 };
        assert_eq!(cut(&twice, &description), Err(again));
        let other = section_bytes(0, "timer", 9, 2, TIMER);
        assert_eq!(cut(&other, &description), Err(CutError::NotDescribed { at: 0, name: "timer".into(), instance: 9 }));
        let garbage = [&good[..], b"\x09"].concat();
        assert_eq!(cut(&garbage, &description), Err(CutError::NotASection { at: good.len(), found: 9 }));
    }

    #[test]
    fn sections_that_are_not_described_look_whole_where_one_ends() {
        // The footer of the section that is under way in its own state, and those of others, with heads behind them.
        let state = [b"\x7e\0\0\0\x07x", &section_bytes(40, "dma", 1, 1, DMA)[..]].concat();
        let first = section_bytes(7, "timer", 0, 2, &state);
        let blob = [&first[..], &section_bytes(3, "cpu", 0, 1, b"")].concat();
        let whole: Vec<usize> = (0..=blob.len()).filter(|len| look_whole(&blob[..*len])).collect();
        let own_footer = first.len() - 5 - state.len() + 5;
        // Nothing tells a footer in the state of a section from its footer, when nothing has come behind it.
        assert_eq!(whole, [0, own_footer, first.len(), blob.len()]);
        assert!(!look_whole(&blob[1..]) && !look_whole(b"\x04\0\0\0\x01\x01\x07\0\0\0\0\0\0\0\0\x7e\0\0\0\x01"));
    }

    #[test]
    fn values_are_shown_by_their_types() {
        let description = description();
        let timer = description.devices[0].values(TIMER).unwrap();
        assert_eq!(serde_json::to_string(&timer).unwrap(), r##"{"offset":-2,"unused":"aabb","unused#2":"cc"}"##);
        let dma = description.devices[1].values(DMA).unwrap();
        assert_eq!(
            serde_json::to_string(&dma).unwrap(),
            r#"{"regs":[{"now":[1,2],"mode":1},{"now":[3,4],"mode":0}],"irq[3]":9,"empty":"","dma/x":{"y":42}}"#
        );
        assert_eq!(
            dma.to_string(),
            "{regs: [{now: [0x1, 0x2], mode: 0x1}, {now: [0x3, 0x4], mode: 0x0}], irq[3]: 0x9, empty: , dma/x: {y: 42}}"
        );
        assert_eq!(description.devices[0].values(&TIMER[1..]), None);
    }

    /// A struct of size 1 with many fields of size 0, many times: the answer would have a trillion values.
    #[test]
    fn a_small_description_cannot_ask_for_a_huge_answer() {
        let mut description = description();
        let empty = description.devices[1].fields[2].clone();
        let many = vec![Field { size: 0, ..empty.clone() }; 1000];
        let layout = Some(Struct { vmsd_name: "s".into(), version: 1, fields: many, subsections: vec![] });
        let array = Field { size: 0, array_len: Some(u64::MAX), layout: layout.clone(), ..empty.clone() };
        description.devices[0].fields = vec![array];
        assert!(description.devices[0].values(b"").is_some());
        let array = Field { size: 1, array_len: Some(100_000), layout, ..empty };
        description.devices[0].fields = vec![array];
        assert!(description.devices[0].values(&[0; 100_000]).is_some());
    }

    #[test]
    fn opaque_sections_can_be_cut() {
        let sections = [
            OpaqueSection { name: "cpu", instance: 0, version: 1, len: 3 },
            OpaqueSection { name: "cpu", instance: 1, version: 1, len: 0 },
        ];
        let json = VmDescription::opaque(4096, sections).to_json();
        let description = VmDescription::parse(&json).unwrap();
        let blob = [section_bytes(1, "cpu", 0, 1, b"abc"), section_bytes(2, "cpu", 1, 1, b"")].concat();
        let cut = cut(&blob, &description).unwrap();
        assert_eq!(blob[cut[0].body.clone()], *b"abc");
        assert!(cut[1].body.is_empty());
    }

    fn tail(json: &str) -> Vec<u8> {
        let mut out = vec![0, VMDESCRIPTION];
        out.extend_from_slice(&(json.len() as u32).to_be_bytes());
        out.extend_from_slice(json.as_bytes());
        out
    }

    #[test]
    fn the_end_is_found_at_the_last_byte_whatever_the_pieces() {
        // Device state full of beginnings: overlapping ones, wrong lengths, a whole description in the middle.
        let state =
            [&b"\0\x06\0\x06\0\0\0\x06\0\0\0\x02{"[..], &tail("{}"), b"\x7e\0\0\0\x06\0\0", &tail("{,}")].concat();
        let whole = [&state[..], &tail(JSON)].concat();
        let expected = TailEnd { eof_at: state.len(), json: state.len() + 6..whole.len() };
        assert_eq!(find_end(&whole), Some(expected.clone()));
        for piece in [1, 2, 3, 7, 100] {
            let mut scanner = TailScanner::default();
            let mut found = Vec::new();
            for end in (piece..whole.len()).step_by(piece).chain([whole.len()]) {
                assert!(scanner.live.len() <= 6);
                found.extend(scanner.scan(&whole[..end]).map(|tail| (end, tail)));
            }
            // What looks like the end in the middle is the end as long as nothing follows.
            found.retain(|(end, _)| *end == whole.len());
            assert_eq!(found, [(whole.len(), expected.clone())], "pieces of {piece}");
        }
    }

    #[test]
    fn an_end_with_more_behind_it_is_told_however_it_arrives() {
        let end = tail(JSON);
        for more in [&b"x"[..], b"\0", b"x\0\x06\0", &tail("{}")] {
            let whole = [&b"state"[..], &end, more].concat();
            let expected = TailEnd { eof_at: 5, json: 5 + HEAD..5 + end.len() };
            for first in [0, 3, 10, 5 + end.len() - 1, 5 + end.len()] {
                let mut scanner = TailScanner::default();
                scanner.scan(&whole[..first]);
                assert_eq!(scanner.passed(&whole[..first]).count(), 0, "{first}");
                scanner.scan(&whole);
                assert_eq!(
                    scanner.passed(&whole).collect::<Vec<_>>(),
                    std::slice::from_ref(&expected),
                    "{first}, {more:?}"
                );
                scanner.scan(&whole);
                assert_eq!(scanner.passed(&whole).count(), 0, "told once");
            }
        }
    }

    #[test]
    fn what_only_looks_like_an_end_is_none() {
        for buf in
            [&b""[..], b"\0", b"\0\x06\0\0\0\0", b"\0\x06\0\0\0\x02[]", b"\0\x06\0\0\0\x02{x", b"\0\x06\0\0\0\x03{}"]
        {
            assert_eq!(find_end(buf), None, "{buf:?}");
        }
        assert_eq!(find_end(b"\0\x06\0\0\0\x02{} "), None);
        let long = [&b"\0\x06\x01\0\0\x01{"[..], &vec![b' '; 1 << 24]].concat();
        assert_eq!(find_end(&long), None);
    }
}

//! Describes what is in a checkpoint or a stream: RAM blocks and device state, for a person or as JSON.

use std::io;

use multifd::checkpoint::{Checkpoint, CheckpointBlock};
use multifd_proto::vmdesc::{self, DeviceSection, VmDescription};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::{
    digest, printable,
    table::{self, grouped},
};

/// One RAM block.
pub struct Block {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Bytes in a page.
    pub page_size: u64,
    /// Pages with content; the others are zeros.
    pub normal: u64,
    /// SHA-256 of all bytes, in hexadecimal digits.
    pub digest: Option<String>,
    /// Its memory is not here: nothing is known of its pages.
    pub elsewhere: bool,
}

/// The blocks of `checkpoint`, without digests.
pub fn blocks_of(checkpoint: &Checkpoint) -> Vec<Block> {
    let describe = |block: &CheckpointBlock| Block {
        name: block.name.to_string(),
        size: block.bytes,
        page_size: checkpoint.layout().page_size() as u64,
        normal: block.pages_present,
        digest: None,
        elsewhere: block.elsewhere,
    };
    checkpoint.blocks().iter().map(describe).collect()
}

/// Adds the digests of all `blocks` whose memory is here, which are those of `checkpoint`, until `stopped`.
///
/// # Errors
/// The kernel's, when the file is read; [`io::ErrorKind::Interrupted`] once `stopped`. Blocks before that have theirs.
pub fn add_digests(blocks: &mut [Block], checkpoint: &Checkpoint, stopped: &dyn Fn() -> bool) -> io::Result<()> {
    for (index, block) in blocks.iter_mut().enumerate().filter(|(_, block)| !block.elsewhere) {
        block.digest = Some(digest::of(&mut checkpoint.block_reader(index), stopped)?);
    }
    Ok(())
}

/// SHA-256 of `bytes`.
pub fn digest_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of everything in a checkpoint but the contents of its pages.
pub fn digest_of_all_but_pages(checkpoint: &Checkpoint) -> String {
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    add(checkpoint.machine().as_bytes());
    add(&checkpoint.uuid().unwrap_or_default());
    for block in checkpoint.blocks() {
        add(block.name.as_str().as_bytes());
        add(&block.bytes.to_le_bytes());
        add(&block.pages_offset.to_le_bytes());
    }
    for words in checkpoint.present().words().chunks(1024) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        add(&bytes);
    }
    let beside_ram = checkpoint.beside_ram();
    for bytes in [beside_ram.early(), beside_ram.in_parts(), checkpoint.sections(), checkpoint.vmdescription()] {
        add(bytes);
    }
    hex(&hash.finalize())
}

/// `bytes` in hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The usual text form of a UUID.
pub fn uuid(uuid: &[u8; 16]) -> String {
    let digits = hex(uuid);
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

/// `ram-blocks` of the report.
pub fn blocks_json(blocks: &[Block]) -> Value {
    let describe = |block: &Block| {
        let pages = block.size / block.page_size;
        let known = if block.elsewhere { 0 } else { pages };
        let mut object = Map::new();
        object.insert("name".to_owned(), block.name.clone().into());
        object.insert("size".to_owned(), block.size.into());
        object.insert("pages".to_owned(), pages.into());
        object.insert("normal".to_owned(), block.normal.into());
        object.insert("zero".to_owned(), (known - block.normal).into());
        if block.elsewhere {
            object.insert("elsewhere".to_owned(), true.into());
        }
        if let Some(digest) = &block.digest {
            object.insert("digest".to_owned(), digest.clone().into());
        }
        Value::Object(object)
    };
    Value::Array(blocks.iter().map(describe).collect())
}

/// A table of the blocks.
pub fn blocks_text(blocks: &[Block]) -> String {
    let width = blocks
        .iter()
        .map(|block| printable::line(&block.name).chars().count())
        .max()
        .unwrap_or_default()
        .max("RAM block".len());
    let mut out =
        format!("\n  {:width$}  {:>11}  {:>13}  {:>13}\n", "RAM block", "size", "content pages", "zero pages");
    for block in blocks {
        let zero = block.size / block.page_size - block.normal;
        let [normal, zero] = match block.elsewhere {
            true => ["elsewhere".to_owned(), String::new()],
            false => [block.normal, zero].map(grouped),
        };
        let line = format!(
            "  {:width$}  {:>11}  {normal:>13}  {zero:>13}",
            printable::line(&block.name),
            table::bytes(block.size),
        );
        out.push_str(&format!("{}\n", line.trim_end()));
        if let Some(digest) = &block.digest {
            out.push_str(&format!("    sha256 {digest}\n"));
        }
    }
    out
}

/// The names of `blocks` whose memory is elsewhere, as `memory-elsewhere` of the report; nothing where all of it is here.
pub fn elsewhere_json(blocks: &[Block]) -> Option<Value> {
    let names: Vec<&str> = blocks.iter().filter(|block| block.elsewhere).map(|block| block.name.as_str()).collect();
    (!names.is_empty()).then(|| json!(names))
}

/// What is to be said where the memory of some of `blocks` is elsewhere; empty where all of it is here.
pub fn elsewhere_text(blocks: &[Block]) -> String {
    let names: Vec<String> =
        blocks.iter().filter(|block| block.elsewhere).map(|block| printable::line(&block.name).to_string()).collect();
    if names.is_empty() {
        return String::new();
    }
    let names = names.join(", ");
    format!(
        "\n  This is not a whole VM: the memory of {names} is not in it. The source had x-ignore-shared on, and that memory is in a file\n  \
         that its QEMU shares (memory-backend-file, share=on). Only a QEMU that maps the same file, unchanged since, can run the VM.\n"
    )
}

/// The devices of which a part of the state came in packets on channels, as `packeted-devices` of the report; nothing where there are none.
pub fn packeted_json(checkpoint: &Checkpoint) -> Option<Value> {
    let devices: Vec<Value> = checkpoint
        .packeted_devices()
        .iter()
        .map(|device| {
            json!({
                "name": device.name, "instance": device.instance, "packets": device.packets, "bytes": device.bytes,
            })
        })
        .collect();
    (!devices.is_empty()).then(|| json!(devices))
}

/// The same for people.
pub fn packeted_text(checkpoint: &Checkpoint) -> String {
    let devices = checkpoint.packeted_devices();
    if devices.is_empty() {
        return String::new();
    }
    let lines = devices.iter().map(|device| {
        let name = printable::line(&device.name).to_string();
        format!("    {name} instance {}: {} packets, {}\n", device.instance, device.packets, table::bytes(device.bytes))
    });
    format!(
        "\n  Device state that came in packets on channels; only multifd send and multifd restore, with channels, carry it to a QEMU:\n{}",
        lines.collect::<String>()
    )
}

/// Device state, cut into sections as far as its description allows.
pub struct Devices<'a> {
    early: &'a [u8],
    blob: &'a [u8],
    description_bytes: usize,
    description: Option<VmDescription>,
    /// With their place: early ones first.
    sections: Vec<(bool, DeviceSection)>,
    /// Why it could not be cut.
    problem: Option<String>,
}

impl<'a> Devices<'a> {
    /// The device state of `checkpoint`.
    pub fn of_checkpoint(checkpoint: &'a Checkpoint) -> Devices<'a> {
        Devices::new(checkpoint.beside_ram().early(), checkpoint.sections(), checkpoint.vmdescription())
    }

    /// Sections `early` before the pages, those of `blob` behind them, and what describes them.
    pub fn new(early: &'a [u8], blob: &'a [u8], vmdescription: &[u8]) -> Devices<'a> {
        let mut devices = Devices {
            early,
            blob,
            description_bytes: vmdescription.len(),
            description: None,
            sections: Vec::new(),
            problem: None,
        };
        if vmdescription.is_empty() {
            devices.problem = (!blob.is_empty()).then(|| "the stream has no description of it".to_owned());
            return devices;
        }
        match VmDescription::parse(vmdescription) {
            Ok(description) => {
                if let Err(error) = devices.cut(&description) {
                    devices.problem = Some(error.to_string());
                }
                devices.description = Some(description);
            }
            Err(error) => devices.problem = Some(format!("its description is no JSON of the right shape: {error}")),
        }
        devices
    }

    fn cut(&mut self, description: &VmDescription) -> Result<(), vmdesc::CutError> {
        let (early, sections) = vmdesc::cut_all(self.early, self.blob, description)?;
        self.sections.extend(early.into_iter().map(|section| (true, section)));
        self.sections.extend(sections.into_iter().map(|section| (false, section)));
        Ok(())
    }

    /// Whether the state is exactly what its description says.
    pub fn is_cut(&self) -> bool {
        self.problem.is_none()
    }

    /// Why it could not be cut.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// `devices` of the report; with the values of all fields, if asked for.
    pub fn json(&self, fields: bool) -> Value {
        let describe = |(early, section): &(bool, DeviceSection)| {
            let mut object = Map::new();
            object.insert("name".to_owned(), section.name.clone().into());
            object.insert("instance".to_owned(), section.instance.into());
            object.insert("version".to_owned(), section.version.into());
            object.insert("bytes".to_owned(), section.body.len().into());
            if *early {
                object.insert("early".to_owned(), true.into());
            }
            if fields {
                let values = self.values(*early, section).map_or(Value::Null, |values| json!(values));
                object.insert("fields".to_owned(), values);
            }
            Value::Object(object)
        };
        Value::Array(self.sections.iter().map(describe).collect())
    }

    fn values(&self, early: bool, section: &DeviceSection) -> Option<vmdesc::Value> {
        let blob = if early { self.early } else { self.blob };
        self.description.as_ref()?.devices.get(section.device)?.values(&blob[section.body.clone()])
    }

    /// One line.
    pub fn summary(&self) -> String {
        let size = table::bytes((self.early.len() + self.blob.len()) as u64);
        match &self.problem {
            None => format!("\n  device state: {}, {size}\n", counted(self.sections.len(), "device")),
            Some(problem) => format!("\n  device state: {size}, not cut into devices: {problem}\n"),
        }
    }

    /// All devices, with their fields if asked for.
    pub fn text(&self, fields: bool) -> String {
        let mut out = self.summary();
        if self.description_bytes > 0 {
            out.pop();
            out.push_str(&format!(", described by {}\n", table::bytes(self.description_bytes as u64)));
        }
        for (early, section) in &self.sections {
            let when = if *early { ", sent before the pages" } else { "" };
            let name = section.name.escape_debug();
            let (instance, version) = (section.instance, section.version);
            let bytes = grouped(section.body.len() as u64);
            out.push_str(&format!("  {bytes:>9} bytes  {name} (instance {instance}, version {version}{when})\n"));
            if fields && let Some(vmdesc::Value::Fields(values)) = self.values(*early, section) {
                values.iter().for_each(|(name, value)| field(&mut out, 3, name, value));
            }
        }
        out
    }
}

/// Adds the lines of one field.
fn field(out: &mut String, depth: usize, name: &str, value: &vmdesc::Value) {
    let indent = "    ".repeat(depth);
    let name = name.escape_debug();
    match value {
        vmdesc::Value::Fields(values) if !values.is_empty() => {
            out.push_str(&format!("{indent}{name}:\n"));
            values.iter().for_each(|(name, value)| field(out, depth + 1, name, value));
        }
        vmdesc::Value::List(values) if values.iter().any(|value| matches!(value, vmdesc::Value::Fields(_))) => {
            for (index, value) in values.iter().enumerate() {
                field(out, depth, &format!("{name}[{index}]"), value);
            }
        }
        vmdesc::Value::Bytes(bytes) if bytes.len() > LONG => {
            let (begin, len) = (hex(&bytes[..LONG]), bytes.len());
            out.push_str(&format!("{indent}{name}: {begin}… ({len} bytes)\n"));
        }
        value => out.push_str(&format!("{indent}{name}: {value}\n")),
    }
}

/// `1 channel`, `4 channels`.
pub fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// `4 channels`, or that there are none.
pub fn channels(number: usize) -> String {
    if number == 0 { "without channels".to_owned() } else { counted(number, "channel") }
}

/// Bytes of a field that are shown.
const LONG: usize = 32;

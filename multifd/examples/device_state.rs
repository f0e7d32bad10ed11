//! Moves much device state between two processes through the engine, to measure it.
//!
//! ```text
//! device_state receive URI [main]    with `main` as an older version, which takes no state over channels and none early
//! device_state send URI MIB CHANNELS live|pause
//! ```
//! The state is made while it is written, and verified while it is read, in pieces of 64 KiB: the processes keep none of it. With `live` all of it
//! is sent while the guest runs, in as many rounds as it needs. Each process prints one JSON line: CPU seconds, and how much more
//! memory it had at any time than before, in bytes; the source also seconds, downtime and rounds.

mod figures;

use std::io::Read;

use figures::{cpu_seconds, kib};
use multifd::{
    destination::{self, Destination},
    dirty::{DirtyLog, bitmap::AtomicDirtyBitmap},
    multifd_proto::extension::{Extension, Extensions},
    ram::{BlockName, Ram, RamBlock},
    sections::Sections,
    source::{self, Source},
    transport::uri::Uri,
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};

fn main() -> Result<(), VmError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["receive", uri] => receive(&uri.parse()?, Extensions::known()),
        ["receive", uri, "main"] => {
            let older = Extensions::known().without(Extension::StatePackets).without(Extension::SectionLength);
            receive(&uri.parse()?, older)
        }
        ["send", uri, mib, channels, when @ ("live" | "pause")] => {
            send(&uri.parse()?, mib.parse::<u64>()? << 20, channels.parse()?, when == "live")
        }
        _ => Err("usage: device_state receive URI [main] | send URI MIB CHANNELS live|pause".into()),
    }
}

fn receive(uri: &Uri, extensions: Extensions) -> Result<(), VmError> {
    let mut vm = Device::new(0, false)?;
    let listener = uri.listener()?;
    println!("listening on {}", listener.uri());
    let (cpu, before) = (cpu_seconds(), kib("VmRSS:"));
    let mut options = destination::Options::default();
    options.extensions = extensions;
    Destination::new(options).run(&mut vm, Box::new(listener), &mut ())?;
    println!("{{{},\"state-bytes\":{}}}", used(cpu, before), vm.at);
    Ok(())
}

fn send(uri: &Uri, bytes: u64, channels: u8, is_live: bool) -> Result<(), VmError> {
    let mut vm = Device::new(bytes, is_live)?;
    let mut options = source::Options::default();
    options.plan.channels = channels;
    let (cpu, before) = (cpu_seconds(), kib("VmRSS:"));
    let report = Source::new(options).run(&mut vm, &*uri.connector()?, &mut ())?;
    println!(
        "{{{},\"seconds\":{:.4},\"downtime-ms\":{:.3},\"rounds\":{},\"live-bytes\":{}}}",
        used(cpu, before),
        report.total.as_secs_f64(),
        report.downtime.total.as_secs_f64() * 1e3,
        report.rounds_total,
        report.live_state
    );
    Ok(())
}

fn used(cpu: f64, before: u64) -> String {
    let more = kib("VmHWM:").saturating_sub(before) << 10;
    format!("\"cpu-seconds\":{:.3},\"more-bytes\":{more}", cpu_seconds() - cpu)
}

/// A VM that is a little memory and one device with much state.
struct Device {
    ram: Ram,
    dirty: AtomicDirtyBitmap,
    /// Bytes of state.
    bytes: u64,
    /// Whether it can be written while the guest runs.
    is_live: bool,
    /// How much of it was written, or read.
    at: u64,
}

impl Device {
    fn new(bytes: u64, is_live: bool) -> Result<Device, VmError> {
        let ram = Ram::new(4096, vec![RamBlock::anonymous(BlockName::new("ram")?, 4 << 20)?])?;
        let dirty = AtomicDirtyBitmap::new(ram.layout());
        Ok(Device { ram, dirty, bytes, is_live, at: 0 })
    }

    /// Writes `len` more bytes of the state.
    fn write(&mut self, out: &mut Sections, len: u64) -> Result<(), VmError> {
        let mut at = self.at;
        let end = at + len;
        let mut piece = vec![0; PIECE as usize];
        out.section_from("device", 0, 1, &mut |out| {
            while at < end {
                piece[..8].copy_from_slice(&at.to_le_bytes());
                out.write_all(&piece)?;
                at += PIECE;
            }
            Ok(())
        })?;
        self.at = at;
        Ok(())
    }
}

impl SourceVm for Device {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        &mut self.dirty
    }

    fn save_live(&mut self, out: &mut Sections) -> Result<u64, VmError> {
        if !self.is_live {
            return Ok(0);
        }
        if out.live_rounds() == 0 {
            self.at = 0;
        }
        let len = (self.bytes - self.at).min(out.room());
        self.write(out, len)?;
        Ok(self.bytes - self.at)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        if out.live_rounds() == 0 {
            self.at = 0;
        }
        // In a version without lengths the reader has to know where it ends.
        out.framed("end", 0, 1, &self.bytes.to_le_bytes())?;
        self.write(out, self.bytes - self.at)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

impl DestinationVm for Device {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        if section.name == "end" {
            let body = multifd::sections::read_framed(input, 8)?;
            self.bytes = u64::from_le_bytes(body[..].try_into()?);
            return Ok(());
        }
        let mut piece = vec![0; PIECE as usize];
        while section.is_bounded || self.at < self.bytes {
            match input.read(&mut piece[..1])? {
                0 => break,
                _ => input.read_exact(&mut piece[1..])?,
            }
            if piece[..8] != self.at.to_le_bytes() {
                return Err(format!("the state at {} is that of another place", self.at).into());
            }
            self.at += PIECE;
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), VmError> {
        match self.at == self.bytes {
            true => Ok(()),
            false => Err(format!("{} bytes of {} have come", self.at, self.bytes).into()),
        }
    }
}

const PIECE: u64 = 64 << 10;

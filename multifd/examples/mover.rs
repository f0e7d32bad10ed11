//! Moves static memory between two processes through the engine, to measure it without a guest.
//!
//! ```text
//! mover receive URI MIB MEMORY FIRST_TOUCH     MEMORY: anonymous, memory-file, present (anonymous, touched before)
//! mover send URI MIB CHANNELS                  random pages
//! ```
//! Each prints one JSON line: seconds, CPU seconds of the process, and what it moved. `send` retries until the other
//! listens.

use std::{
    io::Read,
    time::{Duration, Instant},
};

use multifd::{
    destination::{self, Destination, FirstTouch},
    dirty::DirtyLog,
    dirty_bitmap::DirtyBitmap,
    multifd_proto::BlockName,
    ram::{Ram, RamBlock},
    sections::Sections,
    source::{self, Source},
    transport::uri::Uri,
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["receive", uri, mib, memory, first_touch] => receive(uri.parse()?, mib.parse()?, memory, first_touch),
        ["send", uri, mib, channels] => send(uri.parse()?, mib.parse()?, channels.parse()?),
        _ => Err("usage: mover receive URI MIB MEMORY FIRST_TOUCH | mover send URI MIB CHANNELS".into()),
    }
}

fn receive(uri: Uri, mib: usize, memory: &str, first_touch: &str) -> Outcome {
    let first_touch = match first_touch {
        "auto" => FirstTouch::Auto,
        "direct" => FirstTouch::Direct,
        "copy" => FirstTouch::Copy,
        "populate" => FirstTouch::Populate,
        "huge" => FirstTouch::Huge,
        other => return Err(format!("first touch {other}").into()),
    };
    let name = BlockName::new("ram")?;
    let block = match memory {
        "anonymous" | "present" => RamBlock::anonymous(name, mib << 20)?,
        "memory-file" => RamBlock::memory_file(name, mib << 20)?,
        other => return Err(format!("memory {other}").into()),
    };
    let ram = Ram::new(4096, vec![block])?;
    if memory == "present" {
        for page in 0..ram.layout().pages() {
            ram.page(page).ok_or("no such page")?.write(&[1; 4096]);
        }
    }
    let listener = uri.listener()?;
    let cpu = cpu_seconds();
    let mut vm = Static { ram };
    let options = destination::Options { first_touch, ..Default::default() };
    let report = Destination::new(options).run(&mut vm, Box::new(listener), &mut ())?;
    let (seconds, cpu) = (report.total.as_secs_f64(), cpu_seconds() - cpu);
    println!(
        "{{\"side\":\"destination\",\"seconds\":{seconds:.4},\"cpu-seconds\":{cpu:.3},\"normal\":{}}}",
        report.normal
    );
    Ok(())
}

fn send(uri: Uri, mib: usize, channels: u8) -> Outcome {
    let ram = Ram::new(4096, vec![RamBlock::anonymous(BlockName::new("ram")?, mib << 20)?])?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut content = vec![0u8; 4096];
    for page in 0..ram.layout().pages() {
        for word in content.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_ne_bytes());
        }
        ram.page(page).ok_or("no such page")?.write(&content);
    }
    let connector = uri.connector()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let cpu = cpu_seconds();
    let report = loop {
        let mut vm = Static { ram: ram.clone() };
        let options = source::Options { channels, ..Default::default() };
        match Source::new(options).run(&mut vm, &*connector, &mut ()) {
            Err(multifd::error::Error::Io { source, .. })
                if matches!(source.kind(), std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound)
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => break other?,
        }
    };
    let (seconds, cpu) = (report.total.as_secs_f64(), cpu_seconds() - cpu);
    let downtime = report.downtime.total.as_secs_f64() * 1e3;
    println!(
        "{{\"side\":\"source\",\"seconds\":{seconds:.4},\"cpu-seconds\":{cpu:.3},\"gb-per-second\":{:.3},\"downtime-ms\":{downtime:.2}}}",
        report.ram_bytes as f64 / 1e9 / seconds
    );
    Ok(())
}

/// Memory that nobody writes.
struct Static {
    ram: Ram,
}

impl SourceVm for Static {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        self
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn save(&mut self, _out: &mut Sections) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

impl DirtyLog for Static {
    fn name(&self) -> &'static str {
        "none"
    }

    fn start(&mut self, _ram: &Ram) -> std::io::Result<()> {
        Ok(())
    }

    fn drain(&mut self, _into: &mut DirtyBitmap) -> std::io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl DestinationVm for Static {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn load(&mut self, section: &SectionId, _input: &mut dyn Read) -> Result<(), VmError> {
        Err(format!("no device called {}", section.name).into())
    }

    fn start(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// User and system time of this process so far, from the clock ticks in `/proc/self/stat`.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks = stat.rsplit(')').next().unwrap_or("").split_whitespace().skip(11).take(2);
    ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

//! Drives the engine's mover: a source that keeps its memory, and a fresh destination for each migration.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

use super::Bench;

/// A child of one of the mover's verbs, ended when it is dropped.
pub struct Mover {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Mover {
    /// Starts it.
    pub fn start(program: &Path, arguments: &[&str]) -> Result<Mover, String> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
        let output = BufReader::new(child.stdout.take().expect("piped"));
        Ok(Mover { child, output })
    }

    /// The next line that it says.
    pub fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.output.read_line(&mut line) {
            Ok(0) => Err("the mover ended without a word".to_owned()),
            Ok(_) => Ok(line.trim().to_owned()),
            Err(error) => Err(format!("the mover: {error}")),
        }
    }

    /// The next line, which is JSON.
    pub fn json(&mut self) -> Result<Value, String> {
        let line = self.line()?;
        serde_json::from_str(&line).map_err(|_| format!("the mover said `{line}`"))
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A source with filled memory, for any number of migrations.
pub struct Source {
    mover: Mover,
    input: ChildStdin,
    program: PathBuf,
    mib: u32,
    blocks: u32,
}

/// What receives.
#[derive(Clone, Copy)]
pub enum Destination<'a> {
    /// The engine, into this memory, with this strategy for the first touch.
    Engine {
        /// `anonymous`, `memory-file`, `present`, `present-file` or `present-huge`.
        memory: &'a str,
        /// `auto`, `direct`, `huge`, …
        first_touch: &'a str,
    },
    /// The engine, into anonymous memory, with TLS and the certificates in this directory.
    Tls(&'a Path),
    /// The engine, into a checkpoint.
    Checkpoint {
        /// The file.
        file: &'a Path,
        /// Whether pages go past the page cache.
        direct: &'a str,
    },
    /// Plain sockets, into this memory, which is present.
    Raw {
        /// `present`, `present-file` or `present-huge`.
        memory: &'a str,
    },
}

/// One migration, as both sides saw it.
#[derive(Clone, Debug)]
pub struct Moved {
    /// What the source said.
    pub source: Value,
    /// What the destination said.
    pub destination: Value,
}

impl Moved {
    /// Seconds from the first connect to the confirmation.
    pub fn seconds(&self) -> f64 {
        number(&self.source, "seconds")
    }

    /// CPU seconds of both processes.
    pub fn cpu_seconds(&self) -> f64 {
        number(&self.source, "cpu-seconds") + number(&self.destination, "cpu-seconds")
    }
}

impl Source {
    /// Fills `used` of `mib` MiB of `memory` with `content`.
    pub fn start(bench: &Bench, mib: u32, memory: &str, content: &Path, used: u32) -> Result<Source, String> {
        Source::start_blocks(bench, mib, memory, content, used, 1)
    }

    /// The same in `blocks` RAM blocks, all of them filled where there are more than one.
    pub fn start_blocks(
        bench: &Bench,
        mib: u32,
        memory: &str,
        content: &Path,
        used: u32,
        blocks: u32,
    ) -> Result<Source, String> {
        let program = program(bench);
        let [size, used, count] = [mib, used, blocks].map(|number| number.to_string());
        let content = content.display().to_string();
        let mut mover = Mover::start(&program, &["send", &size, memory, &content, &used, &count])?;
        match mover.line()?.as_str() {
            "ready" => {}
            other => return Err(format!("the mover said `{other}`")),
        }
        let input = mover.child.stdin.take().expect("piped");
        Ok(Source { mover, input, program, mib, blocks })
    }

    /// Moves all memory to a new destination that listens at `uri`; `warm` runs when both sides are prepared.
    pub fn move_to(
        &mut self,
        uri: &str,
        channels: u8,
        options: &str,
        destination: Destination<'_>,
        warm: impl FnOnce() -> Result<(), String>,
    ) -> Result<Moved, String> {
        let (mib, count) = (self.mib.to_string(), channels.to_string());
        let tls = match destination {
            Destination::Tls(dir) => format!("tls={}", dir.display()),
            _ => String::new(),
        };
        let file = match destination {
            Destination::Checkpoint { file, .. } => file.display().to_string(),
            _ => String::new(),
        };
        let blocks = format!("blocks={}", self.blocks);
        let (arguments, option) = match destination {
            Destination::Engine { memory, first_touch } => {
                (vec!["receive", uri, &mib, memory, first_touch, &blocks], "")
            }
            Destination::Tls(_) => (vec!["receive", uri, &mib, "anonymous", "auto", &tls], &*tls),
            Destination::Checkpoint { direct, .. } => (vec!["checkpoint", uri, &file, direct], ""),
            Destination::Raw { memory } => (vec!["receive-raw", uri, &mib, &count, memory], "raw"),
        };
        let mut receiver = Mover::start(&self.program, &arguments)?;
        let said = receiver.line()?;
        let uri = said.strip_prefix("listening on ").ok_or_else(|| format!("the mover said `{said}`"))?;
        warm()?;
        writeln!(self.input, "{uri} {channels} {options} {option}").map_err(|error| format!("the mover: {error}"))?;
        Ok(Moved { source: self.mover.json()?, destination: receiver.json()? })
    }
}

/// Sends the checkpoint in `file` over 4 channels into `mib` MiB that are present. Returns the seconds that it took.
pub fn restore(bench: &Bench, mib: u32, file: &Path) -> Result<f64, String> {
    let program = program(bench);
    let mut receiver = Mover::start(&program, &["receive", "tcp:127.0.0.1:0", &mib.to_string(), "present", "direct"])?;
    let said = receiver.line()?;
    let uri = said.strip_prefix("listening on ").ok_or_else(|| format!("the mover said `{said}`"))?;
    let report = Mover::start(&program, &["restore", &file.display().to_string(), uri, "4"])?.json()?;
    receiver.json()?;
    Ok(number(&report, "seconds"))
}

/// Seconds and CPU seconds in which `threads` threads write a new `file` of `mib` MiB directly, until it is on disk.
pub fn write(bench: &Bench, mib: u32, file: &Path, threads: u8) -> Result<(f64, f64), String> {
    let arguments = ["write", &file.display().to_string(), &mib.to_string(), &threads.to_string()];
    let report = Mover::start(&program(bench), &arguments)?.json()?;
    Ok((number(&report, "seconds"), number(&report, "cpu-seconds")))
}

/// CPU seconds and seconds for the first content of `mib` MiB of fresh memory, without a connection.
pub fn touch(bench: &Bench, mib: u32, memory: &str, first_touch: &str, threads: u8) -> Result<(f64, f64), String> {
    let arguments = ["touch", &mib.to_string(), memory, first_touch, &threads.to_string()];
    let report = Mover::start(&program(bench), &arguments)?.json()?;
    Ok((number(&report, "cpu-seconds"), number(&report, "seconds")))
}

/// As [`warm`], with huge pages, so that the kernel has whole ones to give to the next process.
pub fn warm_huge(bench: &Bench, mib: u32) -> Result<(), String> {
    touch(bench, mib, "anonymous", "huge", 2).map(drop)
}

/// Touches and frees `mib` MiB in a process of its own, so that the host has given this much to the next one.
pub fn warm(bench: &Bench, mib: u32) -> Result<(), String> {
    let outcome = Command::new(program(bench)).args(["warm", &mib.to_string()]).status();
    match outcome {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("touching {mib} MiB ended with {status}")),
        Err(error) => Err(format!("the mover: {error}")),
    }
}

/// A number in a report.
pub fn number(report: &Value, name: &str) -> f64 {
    report[name].as_f64().unwrap_or(f64::NAN)
}

fn program(bench: &Bench) -> PathBuf {
    bench.programs.join("examples/mover")
}

//! `cargo xtask bench`: measures the engine beside QEMU and writes `docs/benchmarks.md`.
//!
//! Each section leaves what it found below `target/bench`, raw and as text. A run replaces on the page what it measured, and nothing
//! else: sections of other runs stay as they are, and so does the table in `README.md` unless all that is in it was measured. `page`
//! puts all that is below `target/bench` on the page. With `--quick` everything is small, goes to
//! `target/bench-quick`, and the page in `docs` stays as it is. With `--once` sizes are full and measurements are not
//! repeated, but for throughput and rounds.

mod beside;
mod checkpoint;
mod demo;
mod distance;
mod downtime;
mod faults;
mod findings;
mod growth;
mod inner;
mod link;
mod metrics;
mod mover;
mod pace;
mod page;
mod plot;
mod qemu;
mod resumed;
mod rounds;
mod samples;
mod sparse;
mod state;
mod throughput;
mod tls;
mod upgrade;
mod view;
mod wire;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;
use std::{env, fs};

use qemu_peer::{Installed, Version};

use self::findings::Findings;

/// Everything that sections share.
struct Bench {
    quick: bool,
    /// Every measurement once, at its full size.
    once: bool,
    /// Where the measured programs are.
    programs: PathBuf,
    /// Where content files are kept.
    directory: PathBuf,
    qemu: Installed,
}

impl Bench {
    /// QEMU 11.1, which not every machine can have. A process in a namespace of its own has no network to install it by.
    ///
    /// # Errors
    /// The reason, in a sentence for the page.
    fn newer_qemu(&self) -> Result<Installed, String> {
        Installed::find(Version::V11_1).map_err(|error| format!("QEMU 11.1 is not measured: {error}."))
    }

    /// How often a measurement is repeated that deserves `many`.
    fn repetitions(&self, many: usize) -> usize {
        if self.quick || self.once { 1 } else { many }
    }
}

/// A section of the page: its name, its heading, and what measures it.
type Section = (&'static str, &'static str, fn(&Bench) -> Result<Findings, String>);

/// In the order in which they stand on the page.
const SECTIONS: &[Section] = &[
    ("throughput", "Throughput into fresh memory", throughput::run),
    ("versions", "QEMU 11.1 beside 10.0", beside::versions),
    ("large-pages", "Where the host gives pages of 64 KiB", beside::large_pages),
    ("present", "Memory that is present", beside::present),
    ("backing", "Anonymous memory with huge pages at hand", throughput::backing),
    ("rounds", "The end of a round", rounds::run),
    ("dialects", "A sync point per round, or per section", rounds::dialects),
    ("idle", "Downtime of an idle guest", downtime::idle),
    ("downtime", "Downtime of a guest that writes", downtime::writing),
    ("convergence", "How fast a guest may write", downtime::convergence),
    ("view", "What the guest sees of it", view::run),
    ("sparse", "Memory that was never touched", sparse::run),
    ("upgrade", "A small VMM, copied and handed over", upgrade::run),
    ("state", "Device state of 512 MiB", state::run),
    ("checkpoint", "A checkpoint on disk", checkpoint::run),
    ("compression", "Compression", throughput::compression),
    ("tls", "TLS", tls::run),
    ("metrics", "Metrics", metrics::run),
    ("faults", "Pages that a guest waits for", faults::run),
    ("resumed", "Back at its speed after an instant restore", resumed::run),
    ("link", "A shaped link", link::run),
    ("distance", "Far apart, idle", distance::idle),
    ("distance-writing", "Far apart, writing", distance::writing),
    ("growth", "What grows with what", growth::run),
    ("inner", "Inner parts", inner::run),
];

/// Measures the sections named, or all.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let once = arguments.iter().any(|argument| argument == "--once");
    let names: Vec<&str> =
        arguments.iter().map(String::as_str).filter(|argument| !argument.starts_with("--")).collect();
    let is_section = |name: &&str| SECTIONS.iter().any(|(known, ..)| known == name);
    // What a section runs again in a namespace of its own.
    let inside = names.first().is_some_and(|name| [link::INSIDE, distance::INSIDE, resumed::INSIDE].contains(name));
    let page_only = names == ["page"];
    if !inside && !page_only && !names.iter().all(is_section) {
        let known: Vec<&str> = SECTIONS.iter().map(|(name, ..)| *name).collect();
        return Err(format!(
            "usage: cargo xtask bench [--quick|--once] [SECTION…]\nsections: {}, page",
            known.join(", ")
        ));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("");
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let directory = target.join(if quick { "bench-quick" } else { "bench" });
    fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    if page_only {
        let found = |name: &&str| directory.join(format!("{name}.md")).exists();
        let measured: Vec<&str> = SECTIONS.iter().map(|(name, ..)| *name).filter(found).collect();
        return page::write(&root, &directory, quick, &measured, false).map(|()| ExitCode::SUCCESS);
    }
    if !inside {
        build()?;
    }
    let qemu = Installed::find(Version::V10_0).map_err(|error| error.to_string())?;
    let bench = Bench { quick, once, programs: target.join("release"), directory: directory.clone(), qemu };
    match names[..] {
        [link::INSIDE, rate] => return link::inside(&bench, rate).map(|()| ExitCode::SUCCESS),
        [distance::INSIDE, round_trip, rate, guest] => {
            return distance::inside(&bench, round_trip, rate, guest).map(|()| ExitCode::SUCCESS);
        }
        [resumed::INSIDE] => return resumed::inside(&bench).map(|()| ExitCode::SUCCESS),
        _ => {}
    }

    let (mut code, mut measured) = (ExitCode::SUCCESS, Vec::new());
    for (name, _, measure) in SECTIONS.iter().filter(|(name, ..)| names.is_empty() || names.contains(name)) {
        eprintln!("== {name}");
        let begun = Instant::now();
        match measure(&bench) {
            Ok(mut findings) => {
                if !names.is_empty() {
                    findings.say(&page::alone());
                }
                findings.store(&directory, name)?;
                measured.push(*name);
            }
            Err(message) => {
                eprintln!("{name}: {message}");
                code = ExitCode::FAILURE;
            }
        }
        eprintln!("== {name}: {:.0} s", begun.elapsed().as_secs_f64());
    }
    page::write(&root, &directory, quick, &measured, names.is_empty())?;
    Ok(code)
}

/// Builds what is measured, as users build it.
fn build() -> Result<(), String> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--release", "-p", "multifd", "-p", "multifd-cli", "-p", "vmm", "--examples", "--bins"]);
    cargo.args(["--features", "multifd/__bench,multifd/tls"]);
    match cargo.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("the build ended with {status}")),
        Err(error) => Err(format!("cargo: {error}")),
    }
}

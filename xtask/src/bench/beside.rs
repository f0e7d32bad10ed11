//! The engine beside two QEMUs, taking turns: into fresh memory, and into memory that is present on both sides.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use qemu_peer::{Installed, Memory};
use serde_json::{Value, json};

use super::findings::markdown_table;
use super::mover::{self, Destination};
use super::samples::Samples;
use super::throughput::{content, listen, random};
use super::{Bench, Findings, qemu};

/// Who moves memory in one variant.
enum Side {
    Qemu(Box<qemu::Source>),
    /// Of the engine, or of plain sockets.
    Mover(mover::Source, Destination<'static>),
}

/// One variant and its figures, by transport.
struct Variant {
    name: &'static str,
    side: Side,
    figures: BTreeMap<&'static str, Figures>,
}

#[derive(Clone, Default)]
struct Figures {
    gb_per_second: Samples,
    cpu_seconds_per_gb: Samples,
}

/// All variants of a section, which take turns.
struct Turns {
    mib: u32,
    variants: Vec<Variant>,
}

impl Turns {
    fn new(mib: u32) -> Turns {
        Turns { mib, variants: Vec::new() }
    }

    /// Each QEMU and the engine, into memory that is not there yet.
    fn of_fresh_memory(bench: &Bench, mib: u32, content: &Path, newer: Option<&Installed>) -> Result<Turns, String> {
        let mut turns = Turns::new(mib);
        for (qemu, names) in [
            (Some(&bench.qemu), ["QEMU 10.0, memory file", "QEMU 10.0, anonymous"]),
            (newer, ["QEMU 11.1, memory file", "QEMU 11.1, anonymous"]),
        ] {
            let Some(qemu) = qemu else { continue };
            for (name, memory) in names.into_iter().zip([Memory::SharedFile, Memory::Anonymous]) {
                turns.add(name, Side::Qemu(Box::new(qemu::Source::stopped_of(qemu, mib, memory, content, mib)?)));
            }
        }
        for (name, memory) in [("multifd, memory file", "memory-file"), ("multifd, anonymous", "anonymous")] {
            let source = mover::Source::start(bench, mib, memory, content, mib)?;
            turns.add(name, Side::Mover(source, Destination::Engine { memory, first_touch: "auto" }));
        }
        Ok(turns)
    }

    fn add(&mut self, name: &'static str, side: Side) {
        self.variants.push(Variant { name, side, figures: BTreeMap::new() });
    }

    /// Measures all of them over each transport. `warm`: memory is touched and freed before each run.
    fn measure(&mut self, bench: &Bench, repetitions: usize, warm: bool) -> Result<(), String> {
        for &transport in TRANSPORTS {
            // The first turn has to start and load programs.
            for repetition in 0..=repetitions {
                self.turn(bench, transport, warm, transport, repetition > 0)?;
            }
        }
        Ok(())
    }

    /// Measures each of them once, with 4 channels. What counts goes to `column`.
    fn turn(
        &mut self,
        bench: &Bench,
        transport: &str,
        warm: bool,
        column: &'static str,
        counts: bool,
    ) -> Result<(), String> {
        let (mib, gb) = (self.mib, f64::from(self.mib) * 1048576.0 / 1e9);
        for variant in &mut self.variants {
            let warm = || if warm { mover::warm(bench, mib + mib / 4) } else { Ok(()) };
            let (seconds, cpu) = match &mut variant.side {
                Side::Qemu(source) => {
                    let moved = source.migrate(transport, qemu::Parameters::default(), LIMIT, warm)?;
                    let moved = moved.ok_or("QEMU takes too long")?;
                    (moved.seconds(), moved.cpu_seconds)
                }
                Side::Mover(source, destination) => {
                    let moved = source.move_to(&listen(bench, transport), 4, "", *destination, warm)?;
                    (moved.seconds(), moved.cpu_seconds())
                }
            };
            eprintln!("{column}: {}: {:.2} GB/s, {:.2} CPU s/GB", variant.name, gb / seconds, cpu / gb);
            if counts {
                let figures = variant.figures.entry(column).or_default();
                figures.gb_per_second.push(gb / seconds);
                figures.cpu_seconds_per_gb.push(cpu / gb);
            }
        }
        Ok(())
    }

    fn results(&self) -> Vec<Measured> {
        self.variants.iter().map(|variant| (variant.name, variant.figures.clone())).collect()
    }
}

/// A name, and figures by transport, or by state of the host.
type Measured = (&'static str, BTreeMap<&'static str, Figures>);

/// The figures of the variant `name` in `column`; none where it was not measured.
fn of(results: &[Measured], name: &str, column: &str) -> Figures {
    let found = results.iter().find(|(known, _)| *known == name);
    found.and_then(|(_, figures)| figures.get(column).cloned()).unwrap_or_default()
}

/// The section of the two QEMUs.
pub fn versions(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 256 } else { 2048 };
    let content = content(bench, "random", random)?;
    let newer = bench.newer_qemu();
    let mut turns = Turns::of_fresh_memory(bench, mib, &content, newer.as_ref().ok())?;
    turns.measure(bench, bench.repetitions(4), true)?;
    let results = turns.results();
    let mut findings = Findings::default();
    findings.say(&format!(
        "As above, with QEMU 11.1 (of Debian 13's backports, with its own C library) beside 10.0, both with the machine \
         `pc-i440fx-10.0`: {mib} MiB of random pages into fresh memory, 4 channels. All took turns; the first turn is not \
         counted."
    ));
    newer.err().iter().for_each(|reason| findings.say(reason));
    figures(&mut findings, &results, BY_TRANSPORT);
    findings.say("**As ratios of medians** (goal):");
    ratios(&mut findings, &results, BY_TRANSPORT, VERSIONS);
    findings.raw = raw(mib, "transport", &results);
    Ok(findings)
}

/// The section of a host that gives pages of 64 KiB to memory that asks for them, beside the same host as it is set.
pub fn large_pages(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 256 } else { 2048 };
    let content = content(bench, "random", random)?;
    let newer = bench.newer_qemu();
    let before = Settings::of_host();
    let mut findings = Findings::default();
    findings.say(&format!(
        "As above over TCP, with the host as it is set (`hugepages-64kB/enabled` is `{}`, `hugepages-64kB/shmem_enabled` is `{}`), and with \
         pages of 64 KiB for memory that asks for them (`madvise` and `advise`), which `multifd doctor` tells operators to set. \
         {mib} MiB of random pages into fresh memory, 4 channels, taken turns; the first turn is not counted.",
        before.chosen(0),
        before.chosen(1),
    ));
    newer.as_ref().err().iter().for_each(|reason| findings.say(reason));
    let mut turns = Turns::of_fresh_memory(bench, mib, &content, newer.as_ref().ok())?;
    for repetition in 0..=bench.repetitions(5) {
        turns.turn(bench, "tcp", true, AS_IT_IS, repetition > 0)?;
        let given = before.give_large_pages();
        if let Err(reason) = given {
            findings.say(&format!("Not measured with pages of 64 KiB: {reason}."));
            break;
        }
        turns.turn(bench, "tcp", true, LARGE, repetition > 0)?;
        before.restore();
    }
    let results = turns.results();
    figures(&mut findings, &results, BY_PAGES);
    findings.say("**As ratios of medians** (goal):");
    ratios(&mut findings, &results, BY_PAGES, &VERSIONS[2..]);
    findings.raw = raw(mib, "pages", &results);
    Ok(findings)
}

/// How the host was set before: whether it gives pages of 64 KiB. It is set so again when this is dropped.
struct Settings([Option<String>; 2]);

impl Settings {
    fn of_host() -> Settings {
        Settings(PAGES_OF_64_KIB.map(|(file, _)| {
            let text = fs::read_to_string(file).ok()?;
            let (_, rest) = text.split_once('[')?;
            Some(rest.split_once(']')?.0.to_owned())
        }))
    }

    fn chosen(&self, index: usize) -> &str {
        self.0[index].as_deref().unwrap_or("not there")
    }

    fn give_large_pages(&self) -> Result<(), String> {
        PAGES_OF_64_KIB
            .iter()
            .try_for_each(|(file, word)| fs::write(file, word).map_err(|error| format!("{file}: {error}")))
    }

    fn restore(&self) {
        for ((file, _), word) in PAGES_OF_64_KIB.iter().zip(&self.0) {
            if let Some(word) = word
                && let Err(error) = fs::write(file, word)
            {
                eprintln!("{file}: {error}; it was `{word}`");
            }
        }
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        self.restore();
    }
}

const PAGES_OF_64_KIB: [(&str, &str); 2] = [
    ("/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled", "madvise"),
    ("/sys/kernel/mm/transparent_hugepage/hugepages-64kB/shmem_enabled", "advise"),
];

/// The section of memory that is present.
pub fn present(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 256 } else { 1024 };
    let content = content(bench, "random", random)?;
    let newer = bench.newer_qemu();
    let mut turns = Turns::new(mib);
    let mut huge = Vec::new();
    for (qemu, names) in [
        (Ok(&bench.qemu), ["QEMU 10.0, anonymous", "QEMU 10.0, memory file"]),
        (newer.as_ref(), ["QEMU 11.1, anonymous", "QEMU 11.1, memory file"]),
    ] {
        let Ok(qemu) = qemu else { continue };
        for (name, memory) in names.into_iter().zip([Memory::Anonymous, Memory::SharedFile]) {
            let source = qemu::Source::stopped_present(qemu, mib, memory, &content)?;
            huge.push(format!("{name} {:.0} %", source.huge_share() * 100.0));
            turns.add(name, Side::Qemu(Box::new(source)));
        }
    }
    for (name, memory, present, engine) in [
        ("multifd, huge pages", "huge-pages", "present-huge", true),
        ("multifd, anonymous", "anonymous", "present", true),
        ("multifd, memory file", "memory-file", "present-file", true),
        ("plain sockets, huge pages", "huge-pages", "present-huge", false),
        ("plain sockets, anonymous", "anonymous", "present", false),
        ("plain sockets, memory file", "memory-file", "present-file", false),
    ] {
        let source = mover::Source::start(bench, mib, memory, &content, mib)?;
        let engine_into = Destination::Engine { memory: present, first_touch: "direct" };
        turns.add(name, Side::Mover(source, if engine { engine_into } else { Destination::Raw { memory: present } }));
    }
    turns.measure(bench, bench.repetitions(6), false)?;
    let results = turns.results();
    let mut findings = Findings::default();
    findings.say(&format!(
        "{mib} MiB of random pages from memory into memory that was touched before on both sides, so that nothing but the way \
         between counts; 4 channels. QEMU has `prealloc=on` at source and destination; its anonymous memory asks for huge \
         pages, which the kernel has given it when it began for: {}. The engine has three kinds: anonymous pages of 4 KiB, \
         the same with huge pages, and a memory file. Plain sockets move the same bytes from and into the same kinds of memory \
         without a protocol. All took turns; the first turn is not counted. QEMU gives its time in whole milliseconds, of about \
         {:.0}.",
        huge.join(", "),
        1e3 * f64::from(mib) * 1048576.0 / 1e9 / of(&results, "QEMU 10.0, anonymous", "tcp").gb_per_second.median()
    ));
    newer.err().iter().for_each(|reason| findings.say(reason));
    figures(&mut findings, &results, BY_TRANSPORT);
    findings.say("**As ratios of medians** (goal):");
    ratios(&mut findings, &results, BY_TRANSPORT, PRESENT);
    findings.raw = raw(mib, "transport", &results);
    findings.files.push(("summary-present.md".to_owned(), summary(&results)));
    Ok(findings)
}

/// Both figures of all variants, in each of `columns`.
fn figures(findings: &mut Findings, results: &[Measured], columns: Columns) {
    let rows = |figure: fn(&Figures) -> &Samples, digits| -> Vec<Vec<String>> {
        let row = |(name, _): &Measured| {
            let cells = columns.keys.iter().map(|column| figure(&of(results, name, column)).show(digits));
            std::iter::once((*name).to_owned()).chain(cells).collect()
        };
        results.iter().map(row).collect()
    };
    findings.say("**GB/s:**");
    findings.table(columns.head, &rows(|figures| &figures.gb_per_second, 2));
    findings.say("**CPU seconds per GB, both processes:**");
    findings.table(columns.head, &rows(|figures| &figures.cpu_seconds_per_gb, 2));
}

/// A ratio: what it is of, the figure, whose, and of which others the best; the goal.
type Ratio = (&'static str, Figure, &'static str, &'static [&'static str]);

#[derive(Clone, Copy)]
enum Figure {
    /// GB/s.
    Speed,
    /// CPU seconds per GB.
    Cpu,
}

impl Figure {
    fn ratio(self, results: &[Measured], ours: &str, theirs: &[&str], column: &str) -> f64 {
        let median = |name: &str| {
            let figures = of(results, name, column);
            match self {
                Figure::Speed => figures.gb_per_second.median(),
                Figure::Cpu => figures.cpu_seconds_per_gb.median(),
            }
        };
        let best = theirs.iter().map(|name| median(name)).fold(
            f64::NAN,
            match self {
                Figure::Speed => f64::max,
                Figure::Cpu => f64::min,
            },
        );
        median(ours) / best
    }
}

fn ratios(findings: &mut Findings, results: &[Measured], columns: Columns, of: &[Ratio]) {
    let row = |(what, figure, ours, theirs): &Ratio| {
        let cells = columns.keys.iter().map(|column| format!("{:.2}", figure.ratio(results, ours, theirs, column)));
        std::iter::once((*what).to_owned()).chain(cells).collect()
    };
    findings.table(columns.head, &of.iter().map(row).collect::<Vec<Vec<String>>>());
}

fn raw(mib: u32, column_is: &str, results: &[Measured]) -> Value {
    let each = results.iter().flat_map(|(name, figures)| {
        figures.iter().map(move |(column, figures)| {
            json!({
                "variant": name, column_is: column, "channels": 4, "mib": mib,
                "gb-per-second": figures.gb_per_second.json(),
                "cpu-seconds-per-gb": figures.cpu_seconds_per_gb.json(),
            })
        })
    });
    Value::Array(each.collect())
}

/// Rows for the table in `README.md`: the kinds of memory in which the engine has no first touch to save.
fn summary(results: &[Measured]) -> String {
    let row = |what: &str, ours: &str, theirs: &str| {
        let (ours, theirs) = (of(results, ours, "tcp"), of(results, theirs, "tcp"));
        vec![
            what.to_owned(),
            ours.gb_per_second.show(2),
            theirs.gb_per_second.show(2),
            format!("{:.2} ×", ours.gb_per_second.median() / theirs.gb_per_second.median()),
            format!("{:.2} / {:.2}", ours.cpu_seconds_per_gb.median(), theirs.cpu_seconds_per_gb.median()),
        ]
    };
    let rows = [
        row("memory that is present on both sides, huge pages", "multifd, huge pages", "QEMU 10.0, anonymous"),
        row("memory that is present on both sides, memory file", "multifd, memory file", "QEMU 10.0, memory file"),
    ];
    // Below the head of another table.
    markdown_table(&[], &rows).lines().skip(2).fold(String::new(), |text, line| text + line + "\n")
}

/// What figures are told apart by, and the heads of these columns behind that of the rows.
#[derive(Clone, Copy)]
struct Columns {
    keys: &'static [&'static str],
    head: &'static [&'static str],
}

const TRANSPORTS: &[&str] = &["tcp", "unix"];
const BY_TRANSPORT: Columns = Columns { keys: TRANSPORTS, head: &["", "TCP", "unix"] };
/// As the host gives pages.
const AS_IT_IS: &str = "as it is set";
const LARGE: &str = "64 KiB pages";
const BY_PAGES: Columns = Columns { keys: &[AS_IT_IS, LARGE], head: &["", AS_IT_IS, LARGE] };
/// No migration of this size takes nearly as long.
const LIMIT: Duration = Duration::from_secs(120);

const FILES: &[&str] = &["QEMU 10.0, memory file", "QEMU 11.1, memory file"];
const ANONYMOUS: &[&str] = &["QEMU 10.0, anonymous", "QEMU 11.1, anonymous"];

const VERSIONS: &[Ratio] = &[
    ("GB/s: QEMU 11.1 / 10.0, memory file", Figure::Speed, "QEMU 11.1, memory file", &["QEMU 10.0, memory file"]),
    ("GB/s: QEMU 11.1 / 10.0, anonymous", Figure::Speed, "QEMU 11.1, anonymous", &["QEMU 10.0, anonymous"]),
    ("GB/s: multifd / the faster QEMU, memory file (≥ 2)", Figure::Speed, "multifd, memory file", FILES),
    ("GB/s: multifd / the faster QEMU, anonymous (≥ 2)", Figure::Speed, "multifd, anonymous", ANONYMOUS),
    ("CPU: multifd / the better QEMU, memory file (≤ 0.4)", Figure::Cpu, "multifd, memory file", FILES),
    ("CPU: multifd / the better QEMU, anonymous (≤ 0.4)", Figure::Cpu, "multifd, anonymous", ANONYMOUS),
];

const PRESENT: &[Ratio] = &[
    ("GB/s: multifd / the faster QEMU, huge pages (≥ 1.0)", Figure::Speed, "multifd, huge pages", ANONYMOUS),
    ("GB/s: multifd / the faster QEMU, memory file (≥ 1.0)", Figure::Speed, "multifd, memory file", FILES),
    ("GB/s: multifd with 4 KiB / the faster QEMU with huge pages", Figure::Speed, "multifd, anonymous", ANONYMOUS),
    ("CPU: multifd / the better QEMU, huge pages (≤ 1.0)", Figure::Cpu, "multifd, huge pages", ANONYMOUS),
    ("CPU: multifd / the better QEMU, memory file (≤ 1.0)", Figure::Cpu, "multifd, memory file", FILES),
    ("CPU: multifd with 4 KiB / the better QEMU with huge pages", Figure::Cpu, "multifd, anonymous", ANONYMOUS),
    (
        "GB/s: multifd / plain sockets, huge pages (≥ 0.97)",
        Figure::Speed,
        "multifd, huge pages",
        &["plain sockets, huge pages"],
    ),
    (
        "GB/s: multifd / plain sockets, anonymous (≥ 0.97)",
        Figure::Speed,
        "multifd, anonymous",
        &["plain sockets, anonymous"],
    ),
    (
        "GB/s: multifd / plain sockets, memory file (≥ 0.97)",
        Figure::Speed,
        "multifd, memory file",
        &["plain sockets, memory file"],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Each variant with other figures, over TCP alone.
    fn results(names: &[&'static str]) -> Vec<Measured> {
        let each = names.iter().enumerate().map(|(index, name)| {
            let mut figures = Figures::default();
            figures.gb_per_second.push(f64::from(1 << (2 * index)));
            figures.cpu_seconds_per_gb.push(f64::from(1 << (3 * index)));
            (*name, BTreeMap::from([("tcp", figures)]))
        });
        each.collect()
    }

    #[test]
    fn a_ratio_is_to_the_better_of_those_it_names() {
        let results = results(&["one", "ours", "two"]);
        assert_eq!(Figure::Speed.ratio(&results, "ours", &["one", "two"], "tcp"), 4.0 / 16.0);
        assert_eq!(Figure::Cpu.ratio(&results, "ours", &["one", "two"], "tcp"), 8.0);
        assert!(Figure::Cpu.ratio(&results, "ours", &["one", "two"], "unix").is_nan());
    }

    #[test]
    fn rows_for_another_table_have_no_head() {
        let names = ["QEMU 10.0, anonymous", "QEMU 10.0, memory file", "multifd, huge pages", "multifd, memory file"];
        let rows = summary(&results(&names));
        assert_eq!(rows.lines().count(), 2, "{rows}");
        assert!(rows.lines().next().unwrap().ends_with("| 16.00 | 1.00 | 16.00 × | 64.00 / 1.00 |"), "{rows}");
    }
}

//! How fast static memory moves, beside QEMU and beside plain sockets; the same compressed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use qemu_peer::Memory;
use serde_json::{Value, json};

use super::findings::markdown_table;
use super::mover::{self, Destination, Source};
use super::plot::{Series, bars};
use super::samples::{Samples, named};
use super::{Bench, Findings, page, qemu};

/// What is compared, in the order in which the runs of one repetition follow each other.
const VARIANTS: &[&str] = &[
    "QEMU, memory file",
    "multifd, memory file",
    "QEMU, anonymous",
    "multifd, anonymous",
    "multifd, huge pages",
    "multifd, present",
    "plain sockets, present",
];

/// The figures of one variant over one transport with one number of channels.
#[derive(Clone, Default)]
struct Cell {
    gb_per_second: Samples,
    cpu_seconds_per_gb: Samples,
}

/// Sources that keep their memory, so that a repetition takes no time to fill it.
struct Sources {
    anonymous: Source,
    file: Source,
    qemu_anonymous: qemu::Source,
    qemu_file: qemu::Source,
    mib: u32,
}

impl Sources {
    fn start(bench: &Bench, mib: u32, content: &Path) -> Result<Sources, String> {
        Ok(Sources {
            anonymous: Source::start(bench, mib, "anonymous", content, mib)?,
            file: Source::start(bench, mib, "memory-file", content, mib)?,
            qemu_anonymous: qemu::Source::stopped(bench, mib, Memory::Anonymous, content, mib)?,
            qemu_file: qemu::Source::stopped(bench, mib, Memory::SharedFile, content, mib)?,
            mib,
        })
    }

    /// Seconds and CPU seconds of one migration.
    fn run(&mut self, bench: &Bench, variant: &str, transport: &str, channels: u8) -> Result<(f64, f64), String> {
        let warm = || mover::warm(bench, self.mib + self.mib / 4);
        let engine = |memory, first_touch| Destination::Engine { memory, first_touch };
        let (source, destination) = match variant {
            "QEMU, anonymous" | "QEMU, memory file" => {
                let source = if variant == "QEMU, anonymous" { &mut self.qemu_anonymous } else { &mut self.qemu_file };
                let parameters = qemu::Parameters { channels, ..Default::default() };
                let moved = source.migrate(transport, parameters, LIMIT, warm)?.ok_or("QEMU takes too long")?;
                return Ok((moved.seconds(), moved.cpu_seconds));
            }
            "multifd, memory file" => (&mut self.file, engine("memory-file", "auto")),
            "multifd, anonymous" => (&mut self.anonymous, engine("anonymous", "auto")),
            "multifd, huge pages" => (&mut self.anonymous, engine("anonymous", "huge")),
            "multifd, present" => (&mut self.anonymous, engine("present", "direct")),
            _ => (&mut self.anonymous, Destination::Raw { memory: "present" }),
        };
        let moved = source.move_to(&listen(bench, transport), channels, "", destination, warm)?;
        Ok((moved.seconds(), moved.cpu_seconds()))
    }
}

/// The section of random pages.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 256 } else { 2048 };
    let content = content(bench, "random", random)?;
    let touches = first_touches(bench, mib)?;
    let mut sources = Sources::start(bench, mib, &content)?;
    let gb = f64::from(mib) * 1048576.0 / 1e9;
    let mut cells: BTreeMap<(usize, u8, usize), Cell> = BTreeMap::new();
    let runs: &[(usize, u8)] =
        if bench.quick { &[(0, 4)] } else { &[(0, 4), (1, 2), (0, 8), (0, 2), (0, 1), (1, 4), (1, 1), (1, 8)] };
    for (index, &(transport, channels)) in runs.iter().enumerate() {
        let repetitions = match (bench.quick, index) {
            (true, _) => 1,
            (false, 0..2) => 5,
            (false, _) => 3,
        };
        // One run of each that is not counted: the first has to start and load programs.
        let uncounted = usize::from(index == 0);
        for repetition in 0..repetitions + uncounted {
            for (variant, name) in VARIANTS.iter().enumerate() {
                let (seconds, cpu) = sources.run(bench, name, &TRANSPORTS[transport].to_lowercase(), channels)?;
                eprintln!("{} {channels}: {name}: {:.2} GB/s", TRANSPORTS[transport], gb / seconds);
                if repetition >= uncounted {
                    let cell = cells.entry((transport, channels, variant)).or_default();
                    cell.gb_per_second.push(gb / seconds);
                    cell.cpu_seconds_per_gb.push(cpu / gb);
                }
            }
        }
        // The section takes long; what is there is there.
        describe(mib, &cells, &touches).store(&bench.directory, "throughput")?;
    }
    let mut findings = describe(mib, &cells, &touches);
    automatic(bench, &mut sources, &mut findings)?;
    Ok(findings)
}

fn describe(mib: u32, cells: &BTreeMap<(usize, u8, usize), Cell>, touches: &[Touch]) -> Findings {
    let mut findings = Findings::default();
    findings.say(&format!(
        "{mib} MiB of random pages that nobody writes, from memory to memory, QEMU 10.0 with a guest that never ran. Time \
         is from the first connect to the end, as each side reports it; CPU is of both processes. Before each run another \
         process touched and freed a quarter more memory than the destination needs, for all alike, so the destination's \
         memory is known to the host but fresh to the process (except “present”, which was touched before). Variants took \
         turns; the first turn is not counted. Memory files are 4 KiB pages on both sides. Anonymous memory is what each \
         side takes by default: QEMU asks for huge pages, the engine where they cost less. “Huge pages” is the engine's \
         `FirstTouch::Huge`. Plain sockets move the same bytes without a protocol into present memory. A cell is the \
         median with least and most."
    ));
    for (transport, name) in TRANSPORTS.iter().enumerate() {
        let mut channels: Vec<u8> =
            cells.keys().filter(|(other, ..)| *other == transport).map(|(_, channels, _)| *channels).collect();
        channels.dedup();
        if channels.is_empty() {
            continue;
        }
        let cell =
            |channels: u8, variant: usize| cells.get(&(transport, channels, variant)).cloned().unwrap_or_default();
        let head: Vec<String> = channels.iter().map(|channels| format!("{channels} ch")).collect();
        let head: Vec<&str> = std::iter::once("").chain(head.iter().map(String::as_str)).collect();
        let rows = |figure: fn(&Cell) -> &Samples| -> Vec<Vec<String>> {
            let row = |(variant, name): (usize, &&str)| {
                let cells = channels.iter().map(|&channels| figure(&cell(channels, variant)).show(2));
                std::iter::once((*name).to_owned()).chain(cells).collect()
            };
            VARIANTS.iter().enumerate().map(row).collect()
        };
        findings.say(&format!("**{name}, GB/s:**"));
        findings.table(&head, &rows(|cell| &cell.gb_per_second));
        findings.say(&format!("**{name}, CPU seconds per GB, both processes:**"));
        findings.table(&head, &rows(|cell| &cell.cpu_seconds_per_gb));
        let groups: Vec<String> = channels.iter().map(|channels| format!("{channels} channels")).collect();
        let series: Vec<Series<'_>> = VARIANTS
            .iter()
            .enumerate()
            .map(|(variant, name)| Series {
                name,
                bars: channels.iter().map(|&channels| cell(channels, variant).gb_per_second).collect(),
            })
            .collect();
        let file = format!("throughput-{}", name.to_lowercase());
        findings.plot(
            &file,
            &format!("Throughput over {name}"),
            bars(&format!("Over {name}"), "GB/s", &groups, &series),
        );
        findings.say(&format!("**{name}, as ratios of medians** (goal):"));
        let ratios: Vec<Vec<String>> = RATIOS
            .iter()
            .map(|(what, ours, theirs, goal)| {
                let ratio = |&channels: &u8| {
                    let figure = |name: &str| cell(channels, named(VARIANTS, name)).gb_per_second.median();
                    format!("{:.2}", figure(ours) / figure(theirs))
                };
                std::iter::once(format!("{what} ({goal})")).chain(channels.iter().map(ratio)).collect()
            })
            .chain(std::iter::once({
                let ratio = |&channels: &u8| {
                    let figure = |name: &str| cell(channels, named(VARIANTS, name)).cpu_seconds_per_gb.median();
                    format!("{:.2}", figure("multifd, memory file") / figure("QEMU, memory file"))
                };
                std::iter::once("CPU: multifd / QEMU, memory file (≤ 0.5)".to_owned())
                    .chain(channels.iter().map(ratio))
                    .collect()
            }))
            .collect();
        findings.table(&head, &ratios);
    }
    describe_touches(&mut findings, mib, cells, touches);
    findings.files.push(("summary.md".to_owned(), summary(mib, cells)));
    findings.files.push(("summary-busy.md".to_owned(), page::busy()));
    let raw = cells.iter().map(|((transport, channels, variant), cell)| {
        json!({
            "transport": TRANSPORTS[*transport], "channels": channels, "variant": VARIANTS[*variant], "mib": mib,
            "gb-per-second": cell.gb_per_second.json(), "cpu-seconds-per-gb": cell.cpu_seconds_per_gb.json(),
        })
    });
    findings.raw = Value::Array(raw.collect());
    findings
}

/// Compares the automatic first touch with plain reads into fresh memory.
fn automatic(bench: &Bench, sources: &mut Sources, findings: &mut Findings) -> Result<(), String> {
    let mib = sources.mib;
    let gb = f64::from(mib) * 1048576.0 / 1e9;
    let mut rows = Vec::new();
    for (name, memory) in [("memory file", "memory-file"), ("anonymous", "anonymous")] {
        let mut speeds: [Samples; 2] = Default::default();
        for _ in 0..bench.repetitions(5) {
            for (first_touch, samples) in ["auto", "direct"].into_iter().zip(&mut speeds) {
                let source = if memory == "anonymous" { &mut sources.anonymous } else { &mut sources.file };
                let warm = || mover::warm(bench, mib + mib / 4);
                let engine = Destination::Engine { memory, first_touch };
                let moved = source.move_to(&listen(bench, "tcp"), 4, "", engine, warm)?;
                samples.push(gb / moved.seconds());
            }
        }
        let [auto, direct] = &speeds;
        rows.push(vec![
            name.to_owned(),
            auto.show(2),
            direct.show(2),
            format!("{:.2}", auto.median() / direct.median()),
        ]);
    }
    findings.say(
        "The automatic choice beside plain reads into fresh memory (`FirstTouch::Direct`), 4 channels over TCP, GB/s:",
    );
    findings.table(&["fresh memory", "automatic", "plain reads", "ratio (≥ 1)"], &rows);
    Ok(())
}

/// The section of anonymous memory whose huge pages the host has at hand.
pub fn backing(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 256 } else { 2048 };
    let content = content(bench, "random", random)?;
    let gb = f64::from(mib) * 1048576.0 / 1e9;
    let mut theirs = qemu::Source::stopped(bench, mib, Memory::Anonymous, &content, mib)?;
    let mut ours = Source::start(bench, mib, "anonymous", &content, mib)?;
    let variants =
        [("QEMU, its default", None), ("multifd, its default", Some("auto")), ("multifd, huge pages", Some("huge"))];
    let names = variants.map(|(name, _)| name);
    let mut cells: [Cell; 3] = Default::default();
    for repetition in 0..=bench.repetitions(7) {
        for (variant, first_touch) in variants.map(|(_, first_touch)| first_touch).into_iter().enumerate() {
            let warm = || mover::warm_huge(bench, mib + mib / 4);
            let (seconds, cpu) = match first_touch {
                None => {
                    let moved = theirs.migrate("tcp", qemu::Parameters::default(), LIMIT, warm)?;
                    let moved = moved.ok_or("QEMU takes too long")?;
                    (moved.seconds(), moved.cpu_seconds)
                }
                Some(first_touch) => {
                    let engine = Destination::Engine { memory: "anonymous", first_touch };
                    let moved = ours.move_to(&listen(bench, "tcp"), 4, "", engine, warm)?;
                    (moved.seconds(), moved.cpu_seconds())
                }
            };
            if repetition > 0 {
                cells[variant].gb_per_second.push(gb / seconds);
                cells[variant].cpu_seconds_per_gb.push(cpu / gb);
            }
        }
    }
    let mut findings = Findings::default();
    findings.say(&format!(
        "{mib} MiB of random pages into fresh anonymous memory, 4 channels over TCP, as above, but for what was done before \
         each run: another process touched and freed a quarter more memory than the destination needs with huge pages, not \
         small ones. A host that takes free memory back has those it gave last at hand, so here huge pages are as cheap as \
         they get, and above they are not. QEMU asks for them by default; the engine where they cost less, and not for more than a quarter more than the content. Taken \
         turns; CPU is of both processes."
    ));
    let cell = |name: &str| &cells[named(&names, name)];
    let (ours, theirs) = (cell("multifd, its default"), cell("QEMU, its default"));
    let ratio = |cell: &Cell| cell.gb_per_second.median() / theirs.gb_per_second.median();
    let rows: Vec<Vec<String>> = names
        .iter()
        .map(|name| {
            let cell = cell(name);
            vec![
                (*name).to_owned(),
                cell.gb_per_second.show(2),
                cell.cpu_seconds_per_gb.show(2),
                format!("{:.2}", ratio(cell)),
            ]
        })
        .collect();
    findings.table(&["", "GB/s", "CPU s/GB", "of QEMU's default (goal for ours: ≥ 2.2)"], &rows);
    let row = [
        "anonymous memory, each side's default, huge pages at hand".to_owned(),
        ours.gb_per_second.show(2),
        theirs.gb_per_second.show(2),
        format!("{:.2} ×", ratio(ours)),
        format!("{:.2} / {:.2}", ours.cpu_seconds_per_gb.median(), theirs.cpu_seconds_per_gb.median()),
    ];
    findings.files.push(("summary-rows.md".to_owned(), format!("| {} |\n", row.join(" | "))));
    let raw = names.iter().zip(&cells).map(|(name, cell)| {
        json!({
            "variant": name, "gb-per-second": cell.gb_per_second.json(),
            "cpu-seconds-per-gb": cell.cpu_seconds_per_gb.json(),
        })
    });
    findings.raw = Value::Array(raw.collect());
    Ok(findings)
}

/// What the first touch costs by itself, in one kind of memory.
struct Touch {
    name: &'static str,
    /// The variant that it is a part of.
    variant: Option<&'static str>,
    one_thread: Samples,
    four_threads: Samples,
}

/// Measures each way to fill fresh memory.
fn first_touches(bench: &Bench, mib: u32) -> Result<Vec<Touch>, String> {
    let gb = f64::from(mib) * 1048576.0 / 1e9;
    let mut touches: Vec<_> = TOUCHES
        .iter()
        .map(|&(name, .., variant)| Touch {
            name,
            variant,
            one_thread: Samples::default(),
            four_threads: Samples::default(),
        })
        .collect();
    for _ in 0..bench.repetitions(3) {
        for (touch, (_, memory, strategy, _)) in touches.iter_mut().zip(TOUCHES) {
            for (threads, samples) in [(1, &mut touch.one_thread), (4, &mut touch.four_threads)] {
                mover::warm(bench, mib + mib / 4)?;
                let (cpu, _) = mover::touch(bench, mib, memory, strategy, threads)?;
                samples.push(cpu / gb);
            }
        }
    }
    Ok(touches)
}

/// What bounds the figures: the CPU time of sockets and of the first touch, which nothing above them can save.
fn describe_touches(findings: &mut Findings, mib: u32, cells: &BTreeMap<(usize, u8, usize), Cell>, touches: &[Touch]) {
    let cell = |name: &str| cells.get(&(0, 4, named(VARIANTS, name))).cloned().unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let sockets = cell("plain sockets, present").cpu_seconds_per_gb.median();
    findings.say(&format!(
        "**What bounds it.** The first touch of {mib} MiB by itself, in the ways that a destination has, from the same few \
         pages and without a connection, in CPU seconds per GB; taken turns, each after another process touched and freed as \
         much. The bound is the speed of {cpus} CPUs that do nothing but this, with 4 threads, and what plain sockets take with 4 \
         TCP connections ({sockets:.2} CPU s/GB). The last column is the engine's speed over TCP with 4 channels, of that \
         bound."
    ));
    let rows: Vec<Vec<String>> = touches
        .iter()
        .map(|touch| {
            let bound = cpus / (sockets + touch.four_threads.median());
            let reached = touch.variant.map(|name| cell(name).gb_per_second.median() / bound);
            vec![
                touch.name.to_owned(),
                touch.one_thread.show(2),
                touch.four_threads.show(2),
                format!("{bound:.2}"),
                reached.map_or("–".to_owned(), |reached| format!("{:.0} %", reached * 100.0)),
            ]
        })
        .collect();
    findings.table(&["first touch", "1 thread", "4 threads", "bound, GB/s", "multifd"], &rows);
}

/// Ways to fill fresh memory: memory and strategy of the mover, and the variant that is measured with a connection.
const TOUCHES: &[(&str, &str, &str, Option<&str>)] = &[
    ("memory file, page faults", "memory-file", "direct", None),
    ("memory file, `UFFDIO_COPY` of runs (automatic)", "memory-file", "copy", Some("multifd, memory file")),
    ("anonymous, page faults", "anonymous", "direct", None),
    ("anonymous, `UFFDIO_COPY` of runs (automatic)", "anonymous", "copy", Some("multifd, anonymous")),
    ("anonymous, huge pages", "anonymous", "huge", Some("multifd, huge pages")),
];

/// The table for the README: 4 channels over TCP. [`backing`] adds rows.
fn summary(mib: u32, cells: &BTreeMap<(usize, u8, usize), Cell>) -> String {
    let cell = |name: &str| cells.get(&(0, 4, named(VARIANTS, name))).cloned().unwrap_or_default();
    let row = |name: &str, ours: &str, theirs: &str| {
        let (ours, theirs) = (cell(ours), cell(theirs));
        vec![
            name.to_owned(),
            ours.gb_per_second.show(2),
            theirs.gb_per_second.show(2),
            format!("{:.2} ×", ours.gb_per_second.median() / theirs.gb_per_second.median()),
            format!("{:.2} / {:.2}", ours.cpu_seconds_per_gb.median(), theirs.cpu_seconds_per_gb.median()),
        ]
    };
    let rows = [
        row("memory file, 4 KiB pages on both sides", "multifd, memory file", "QEMU, memory file"),
        row("anonymous memory, each side's default, huge pages not at hand", "multifd, anonymous", "QEMU, anonymous"),
    ];
    let head = ["destination's memory", "multifd GB/s", "QEMU 10.0 GB/s", "", "CPU s/GB, multifd / QEMU"];
    format!(
        "{mib} MiB of random pages into fresh memory, 4 channels over TCP loopback, both ends on the same CPUs, \
         taking turns; median (least–most). [All figures, and how they were measured](docs/benchmarks.md).\n\n{}",
        markdown_table(&head, &rows)
    )
}

/// What the ratio is of, two of [`VARIANTS`], and the goal.
const RATIOS: &[(&str, &str, &str, &str)] = &[
    ("multifd / QEMU, memory file", "multifd, memory file", "QEMU, memory file", "≥ 1.7"),
    ("multifd / QEMU, anonymous", "multifd, anonymous", "QEMU, anonymous", "≥ 2.2"),
    ("multifd anonymous / QEMU memory file", "multifd, anonymous", "QEMU, memory file", "–"),
    ("multifd huge pages / QEMU memory file", "multifd, huge pages", "QEMU, memory file", "≥ 3; unix ≥ 4.5"),
    ("multifd huge pages / QEMU anonymous", "multifd, huge pages", "QEMU, anonymous", "–"),
    ("multifd present / QEMU memory file", "multifd, present", "QEMU, memory file", "≥ 3; unix ≥ 4.5"),
    ("multifd present / plain sockets", "multifd, present", "plain sockets, present", "≥ 0.85"),
    (
        "plain sockets, present / QEMU memory file: the most there is",
        "plain sockets, present",
        "QEMU, memory file",
        "–",
    ),
];

/// The section of compressed pages.
pub fn compression(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 128 } else { 512 };
    let content = content(bench, "compressible", compressible)?;
    let mut ours = Source::start(bench, mib, "memory-file", &content, mib)?;
    let mut theirs = qemu::Source::stopped(bench, mib, Memory::SharedFile, &content, mib)?;
    let bytes = f64::from(mib) * 1048576.0;
    let mut cells: BTreeMap<(usize, usize, usize), (Cell, Samples)> = BTreeMap::new();
    // One run of each that is not counted: the first has to start and load programs.
    for repetition in 0..=bench.repetitions(3) {
        let runs =
            LIMITS.iter().enumerate().flat_map(|limit| METHODS.iter().enumerate().map(move |method| (limit, method)));
        for ((limit, &(limit_name, limit_option)), (method, name)) in runs {
            let mut note = |side: usize, (seconds, cpu, wire): (f64, f64, f64)| {
                eprintln!(
                    "{limit_name}, {name}, {}: {:.2} GB/s, ratio {:.2}",
                    SIDES[side],
                    bytes / 1e9 / seconds,
                    bytes / wire
                );
                if repetition > 0 {
                    let (cell, ratio) = cells.entry((limit, method, side)).or_default();
                    cell.gb_per_second.push(bytes / 1e9 / seconds);
                    cell.cpu_seconds_per_gb.push(cpu / bytes * 1e9);
                    ratio.push(bytes / wire);
                }
            };
            if !limit_option.is_empty() && (repetition == 0 || *name == "zlib") {
                // Nothing new to load, and nothing new to see.
                continue;
            }
            let warm = || mover::warm(bench, mib + mib / 4);
            let engine = Destination::Engine { memory: "memory-file", first_touch: "auto" };
            let option = if *name == "none" { "" } else { name };
            let moved = ours.move_to("tcp:127.0.0.1:0", 4, &format!("{option} {limit_option}"), engine, warm)?;
            note(
                named(SIDES, "multifd"),
                (moved.seconds(), moved.cpu_seconds(), mover::number(&moved.source, "wire-bytes")),
            );
            if limit_option.is_empty() && *name != "auto" {
                let parameters = qemu::Parameters { compression: name, ..Default::default() };
                let moved = theirs.migrate("tcp", parameters, LIMIT, warm)?.ok_or("QEMU takes too long")?;
                note(named(SIDES, "QEMU"), (moved.seconds(), moved.cpu_seconds, moved.ram("transferred")));
            }
        }
    }
    Ok(describe_compression(mib, &cells))
}

fn describe_compression(mib: u32, cells: &BTreeMap<(usize, usize, usize), (Cell, Samples)>) -> Findings {
    let mut findings = Findings::default();
    findings.say(&format!(
        "{mib} MiB of half-compressible pages (three words of four from a table of 64, the fourth random), the same on both \
         sides, 4 channels over TCP, level 1, memory files. Ratio is guest bytes by bytes on all connections. “auto” is \
         zstd on each channel while it takes less time than it saves there; QEMU has nothing like it. Methods took turns."
    ));
    for (limit, (limit_name, _)) in LIMITS.iter().enumerate() {
        let cell = |method: usize, side: usize| cells.get(&(limit, method, side));
        let [ours, theirs] = ["multifd", "QEMU"].map(|side| named(SIDES, side));
        let show = |cell: Option<&(Cell, Samples)>, figure: fn(&(Cell, Samples)) -> String| {
            cell.map_or_else(|| "–".to_owned(), figure)
        };
        let speed = |cell: &(Cell, Samples)| cell.0.gb_per_second.median();
        let rows: Vec<Vec<String>> = METHODS
            .iter()
            .enumerate()
            .filter(|(method, _)| cell(*method, ours).is_some())
            .map(|(method, name)| {
                let (ours, theirs) = (cell(method, ours), cell(method, theirs));
                let of_theirs = ours.zip(theirs).map(|(ours, theirs)| format!("{:.2}", speed(ours) / speed(theirs)));
                vec![
                    (*name).to_owned(),
                    show(ours, |cell| cell.0.gb_per_second.show(2)),
                    show(theirs, |cell| cell.0.gb_per_second.show(2)),
                    of_theirs.unwrap_or_else(|| "–".to_owned()),
                    show(ours, |cell| format!("{:.2}", cell.1.median())),
                    show(theirs, |cell| format!("{:.2}", cell.1.median())),
                    show(ours, |cell| format!("{:.2}", cell.0.cpu_seconds_per_gb.median())),
                    show(theirs, |cell| format!("{:.2}", cell.0.cpu_seconds_per_gb.median())),
                ]
            })
            .collect();
        findings.say(&format!("**{limit_name}:**"));
        findings.table(
            &[
                "method",
                "multifd GB/s",
                "QEMU GB/s",
                "of QEMU",
                "multifd ratio",
                "QEMU ratio",
                "multifd CPU s/GB",
                "QEMU CPU s/GB",
            ],
            &rows,
        );
        let fixed =
            (0..METHODS.len()).filter(|&method| METHODS[method] != "auto").filter_map(|method| cell(method, ours));
        let best = fixed.map(speed).fold(f64::NAN, f64::max);
        let auto = cell(named(METHODS, "auto"), ours).map(speed);
        let auto = auto.unwrap_or(f64::NAN);
        findings.say(&format!("“auto” is {:.2} of the best other method here, by medians.", auto / best));
    }
    let raw = cells.iter().map(|((limit, method, side), (cell, ratio))| {
        json!({
            "limit": LIMITS[*limit].0, "method": METHODS[*method], "side": SIDES[*side],
            "gb-per-second": cell.gb_per_second.json(), "cpu-seconds-per-gb": cell.cpu_seconds_per_gb.json(),
            "ratio": ratio.json(),
        })
    });
    findings.raw = Value::Array(raw.collect());
    findings
}

/// Where a destination of the mover listens.
pub fn listen(bench: &Bench, transport: &str) -> String {
    match transport {
        "unix" => {
            let path = bench.directory.join("socket");
            // Left by the run before.
            let _ = fs::remove_file(&path);
            format!("unix:{}", path.display())
        }
        _ => "tcp:127.0.0.1:0".to_owned(),
    }
}

/// A file of 64 MiB that `generate` makes from random words, made once.
pub fn content(bench: &Bench, name: &str, generate: fn(u64) -> u64) -> Result<PathBuf, String> {
    let path = bench.directory.join(format!("{name}.bin"));
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(CONTENT);
    while bytes.len() < CONTENT {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&generate(state).to_le_bytes());
    }
    let written: io::Result<()> = fs::write(&path, bytes);
    written.map(|()| path.clone()).map_err(|error| format!("{}: {error}", path.display()))
}

/// Pages that do not compress.
pub fn random(word: u64) -> u64 {
    word
}

/// Three words of four are of 64 different ones.
fn compressible(word: u64) -> u64 {
    if word & 3 == 0 { word } else { (word >> 2 & 63).wrapping_mul(0x9e37_79b9_7f4a_7c15) }
}

const TRANSPORTS: &[&str] = &["TCP", "Unix"];
const METHODS: &[&str] = &["none", "zstd", "zlib", "auto"];
/// Limits on the bandwidth of all channels together: a name, and the mover's option.
const LIMITS: &[(&str, &str)] = &[("No limit", ""), ("At most 100 MB/s", "max-bandwidth=100000000")];
const SIDES: &[&str] = &["multifd", "QEMU"];
const CONTENT: usize = 64 << 20;
/// No migration of this size takes nearly as long.
const LIMIT: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    /// Figures went from positions, which move when a variant is added.
    #[test]
    fn each_figure_is_of_the_pair_that_it_names() {
        let mut cells: BTreeMap<(usize, u8, usize), Cell> = BTreeMap::new();
        for (variant, _) in VARIANTS.iter().enumerate() {
            let cell = cells.entry((0, 4, variant)).or_default();
            // No two ratios of these are the same.
            cell.gb_per_second.push(f64::from(1 << (3 * variant)));
            cell.cpu_seconds_per_gb.push(f64::from(1 << (2 * variant)));
        }
        let text = describe(2048, &cells, &[]).text;
        let speed = |name: &str| f64::from(1 << (3 * VARIANTS.iter().position(|known| *known == name).unwrap()));
        for (what, ours, theirs, goal) in RATIOS {
            let row = format!("| {what} ({goal}) | {:.2} |", speed(ours) / speed(theirs));
            assert!(text.contains(&row), "{row} in\n{text}");
        }
        assert!(text.contains("| CPU: multifd / QEMU, memory file (≤ 0.5) | 4.00 |"), "{text}");
        assert!(text.contains("(4096.00 CPU s/GB)"), "of plain sockets: {text}");
        let table = summary(2048, &cells);
        let row = |line: &str| table.lines().find(|row| row.contains(line)).unwrap().to_owned();
        assert!(row("memory file, 4 KiB").contains("| 8.00 | 1.00 | 8.00 × | 4.00 / 1.00 |"), "{table}");
        assert!(row("huge pages not at hand").contains("| 512.00 | 64.00 | 8.00 × | 64.00 / 16.00 |"), "{table}");
    }
}

//! Into a file on disk and back, beside QEMU's own migration to a file.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use qemu_peer::Memory;
use serde_json::{Value, json};

use super::mover::{self, Destination, Source, number};
use super::samples::Samples;
use super::throughput::{content, random};
use super::{Bench, Findings, qemu};

/// What is compared, in the order in which the runs of one repetition follow each other.
const VARIANTS: &[&str] = &[
    "QEMU, file",
    "QEMU, file, direct-io",
    "multifd, --direct auto",
    "multifd, --direct on",
    "multifd, --direct off",
    "multifd, into memory",
    PLAIN,
];
const PLAIN: &str = "plain direct writes";

/// GB/s until all is on disk, CPU seconds per GB, downtime in milliseconds.
#[derive(Default)]
struct Row {
    speed: Samples,
    cpu: Samples,
    downtime: Samples,
}

/// The section.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 256 } else { 2048 };
    let content = content(bench, "random", random)?;
    let mut ours = Source::start(bench, mib, "anonymous", &content, mib)?;
    let mut theirs = qemu::Source::stopped(bench, mib, Memory::Anonymous, &content, mib)?;
    let gb = f64::from(mib) * 1048576.0 / 1e9;
    let file = bench.directory.join("checkpoint");
    let mut rows: Vec<Row> = VARIANTS.iter().map(|_| Row::default()).collect();
    // The first has to start and load programs.
    for repetition in 0..=bench.repetitions(3) {
        for (name, row) in VARIANTS.iter().zip(&mut rows) {
            remove(&file);
            let (seconds, cpu, downtime) = match name.strip_prefix("multifd") {
                None if *name == PLAIN => {
                    let (seconds, cpu) = mover::write(bench, mib, &file, 4)?;
                    (seconds, cpu, None)
                }
                None => {
                    let (seconds, cpu) = theirs.migrate_to_file(&file, 4, name.ends_with("direct-io"))?;
                    (seconds, cpu, None)
                }
                Some(how) => {
                    let direct = how.rsplit(' ').next().expect("a word");
                    let destination = match how {
                        ", into memory" => Destination::Engine { memory: "anonymous", first_touch: "auto" },
                        _ => Destination::Checkpoint { file: &file, direct },
                    };
                    let moved = ours.move_to("tcp:127.0.0.1:0", 4, "", destination, || Ok(()))?;
                    (moved.seconds(), moved.cpu_seconds(), Some(number(&moved.source, "downtime-ms")))
                }
            };
            eprintln!("{name}: {:.2} GB/s, {:.2} CPU s/GB, downtime {downtime:?} ms", gb / seconds, cpu / gb);
            if repetition > 0 {
                row.speed.push(gb / seconds);
                row.cpu.push(cpu / gb);
                downtime.into_iter().for_each(|downtime| row.downtime.push(downtime));
            }
        }
    }
    let cold = cold(bench, mib, &mut ours, &file)?;
    let digests = digests(bench, mib, &file)?;
    remove(&file);
    Ok(describe(mib, &rows, &cold, &digests))
}

/// GB/s from a file that is in no cache: of plain direct reads, and of the engine into memory that is present.
fn cold(bench: &Bench, mib: u32, ours: &mut Source, file: &Path) -> Result<[Samples; 2], String> {
    remove(file);
    ours.move_to("tcp:127.0.0.1:0", 4, "", Destination::Checkpoint { file, direct: "auto" }, || Ok(()))?;
    let gb = f64::from(mib) * 1048576.0 / 1e9;
    let mut speeds = [Samples::default(), Samples::default()];
    for _ in 0..bench.repetitions(3) {
        forget(file)?;
        let begun = Instant::now();
        dd(&[&format!("if={}", file.display()), "of=/dev/null", "bs=4M", "iflag=direct"])?;
        speeds[0].push(gb / begun.elapsed().as_secs_f64());
        forget(file)?;
        speeds[1].push(gb / mover::restore(bench, mib, file)?);
        eprintln!("cold: disk {}, send {}", speeds[0].show(2), speeds[1].show(2));
    }
    Ok(speeds)
}

/// GB/s of `inspect --digest` from a file that is in no cache, from one that is in the page cache, and of plain direct reads.
fn digests(bench: &Bench, mib: u32, file: &Path) -> Result<[Samples; 3], String> {
    let gb = f64::from(mib) * 1048576.0 / 1e9;
    let program = bench.programs.join("multifd");
    let inspect = || {
        let begun = Instant::now();
        let output = Command::new(&program).args(["inspect", "--digest"]).arg(file).output();
        match output {
            Ok(output) if output.status.success() => Ok(gb / begun.elapsed().as_secs_f64()),
            Ok(output) => Err(format!("inspect ended with {}", output.status)),
            Err(error) => Err(format!("{}: {error}", program.display())),
        }
    };
    let mut speeds: [Samples; 3] = Default::default();
    for _ in 0..bench.repetitions(3) {
        forget(file)?;
        speeds[0].push(inspect()?);
        dd(&[&format!("if={}", file.display()), "of=/dev/null", "bs=4M"])?;
        speeds[1].push(inspect()?);
        forget(file)?;
        let begun = Instant::now();
        dd(&[&format!("if={}", file.display()), "of=/dev/null", "bs=4M", "iflag=direct"])?;
        speeds[2].push(gb / begun.elapsed().as_secs_f64());
        eprintln!("digest: cold {}, cached {}, disk {}", speeds[0].show(2), speeds[1].show(2), speeds[2].show(2));
    }
    Ok(speeds)
}

fn describe(
    mib: u32,
    rows: &[Row],
    [disk, send]: &[Samples; 2],
    [digest, cached_digest, digest_disk]: &[Samples; 3],
) -> Findings {
    let mut findings = Findings::default();
    findings.say(&format!(
        "{mib} MiB of random pages that no process writes, with 4 channels to a file on this host's disk, until all of it is on disk: QEMU 10.0 \
         migrates to `file:` with `mapped-ram` and multifd, and its file is synced afterwards; the engine sends over TCP to a receiver \
         that syncs before it answers. CPU is of all processes, without the kernel's own threads. The downtime is the source's, of a VM that \
         has nothing left to send; that into memory is what there would be without a disk. Plain direct writes are the limit of what direct writes of either can be: 4 threads \
         that write as much from memory to a new file, 512 KiB at a time, without a migration. Variants took turns; the first turn is not counted."
    ));
    let table: Vec<Vec<String>> = VARIANTS
        .iter()
        .zip(rows)
        .map(|(name, row)| vec![(*name).to_owned(), row.speed.show(2), row.cpu.show(2), row.downtime.show(0)])
        .collect();
    findings.table(&["", "GB/s", "CPU s/GB", "downtime, ms"], &table);
    let of = |name: &str| &rows[VARIANTS.iter().position(|known| *known == name).expect("a variant")];
    let (auto, memory) = (of("multifd, --direct auto"), of("multifd, into memory"));
    findings.say("**As ratios and differences of medians** (goal):");
    let ratios = [
        ("GB/s: multifd --direct auto / QEMU, the better of both (≥ 1.0)", {
            let best = of("QEMU, file").speed.median().max(of("QEMU, file, direct-io").speed.median());
            auto.speed.median() / best
        }),
        ("GB/s: multifd --direct auto / plain direct writes", auto.speed.median() / of(PLAIN).speed.median()),
        (
            "GB/s: QEMU, file, direct-io / plain direct writes",
            of("QEMU, file, direct-io").speed.median() / of(PLAIN).speed.median(),
        ),
        ("CPU: multifd --direct auto / QEMU, file", auto.cpu.median() / of("QEMU, file").cpu.median()),
        ("downtime on disk - into memory, ms (≤ 50)", auto.downtime.median() - memory.downtime.median()),
        ("GB/s: send from a cold file / plain direct reads (≥ 0.9)", send.median() / disk.median()),
        (
            "GB/s: inspect --digest of a cold file / the slower of plain direct reads and of a cached file (1)",
            digest.median() / digest_disk.median().min(cached_digest.median()),
        ),
    ];
    let ratios: Vec<Vec<String>> =
        ratios.iter().map(|(what, figure)| vec![(*what).to_owned(), format!("{figure:.2}")]).collect();
    findings.table(&["", ""], &ratios);
    findings.say(&format!(
        "From a file that was in no cache: plain direct reads {} GB/s, `send` with 4 channels into memory that was present {} GB/s.",
        disk.show(2),
        send.show(2)
    ));
    findings.say(&format!(
        "`inspect --digest`, one SHA-256 of all that is in a RAM block: of a file that was in no cache {} GB/s, of one in the page cache, so that \
         hashing is all there is to do, {} GB/s; plain direct reads meanwhile {} GB/s.",
        digest.show(2),
        cached_digest.show(2),
        digest_disk.show(2)
    ));
    findings
        .files
        .push(("summary-checkpoint.md".to_owned(), summary(auto, of("QEMU, file"), of("QEMU, file, direct-io"))));
    let raw = VARIANTS.iter().zip(rows).map(|(name, row)| {
        json!({
            "variant": name, "mib": mib, "gb-per-second": row.speed.json(), "cpu-seconds-per-gb": row.cpu.json(),
            "downtime-ms": row.downtime.json(),
        })
    });
    let cold = json!({ "variant": "cold", "mib": mib, "disk": disk.json(), "send": send.json() });
    let digest = json!({
        "variant": "inspect --digest", "mib": mib, "cold": digest.json(), "cached": cached_digest.json(), "disk": digest_disk.json(),
    });
    findings.raw = Value::Array(raw.chain([cold, digest]).collect());
    findings
}

/// A row of the table in `README.md`: ours as it is by default, and the faster way of QEMU.
fn summary(ours: &Row, cached: &Row, direct: &Row) -> String {
    let qemu = if cached.speed.median() > direct.speed.median() { cached } else { direct };
    format!(
        "| a checkpoint on disk, QEMU's own migration to a file | {} | {} | {:.2} × | {:.2} / {:.2} |\n",
        ours.speed.show(2),
        qemu.speed.show(2),
        ours.speed.median() / qemu.speed.median(),
        ours.cpu.median(),
        qemu.cpu.median()
    )
}

/// The file of the run before; there may be none.
fn remove(file: &Path) {
    let _ = fs::remove_file(file);
}

/// Has the kernel forget what it has of `file`, which is on disk.
fn forget(file: &Path) -> Result<(), String> {
    dd(&[&format!("of={}", file.display()), "oflag=nocache", "conv=notrunc,fdatasync", "count=0"])
}

fn dd(arguments: &[&str]) -> Result<(), String> {
    match Command::new("dd").args(arguments).arg("status=none").status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("dd {arguments:?} ended with {status}")),
        Err(error) => Err(format!("dd: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_sets_ours_beside_the_faster_way_of_qemu() {
        let row = |speed, cpu| {
            let mut row = Row::default();
            row.speed.push(speed);
            row.cpu.push(cpu);
            row
        };
        let text = summary(&row(1.5, 0.8), &row(2.0, 0.4), &row(3.0, 0.2));
        assert!(text.starts_with("| a checkpoint on disk") && text.contains("| 0.50 × | 0.80 / 0.20 |"), "{text}");
    }
}

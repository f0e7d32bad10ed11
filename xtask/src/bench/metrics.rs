//! What `--metrics` costs a migration, beside one without.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::Duration;
use std::{fs, thread};

use serde_json::{Value, json};

use super::demo::demo;
use super::samples::{Samples, named};
use super::{Bench, Findings};

/// What is compared, in the order in which the runs of one repetition follow each other.
const VARIANTS: &[&str] = &["without", "tcp, asked ten times a second", "file, written each second"];

/// GB/s of the migration, and CPU seconds of all processes.
#[derive(Clone, Default)]
struct Cell {
    speed: Samples,
    cpu: Samples,
    answers: u32,
}

/// The section.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 64 } else { 1024 };
    let memory = format!("{mib}MiB");
    let guest = ["--guest=process", "--memory", &memory, "--filled=100", "--write-rate=0", "--after=1ms"];
    let gb = f64::from(mib) * 1048576.0 / 1e9;
    let mut cells = vec![Cell::default(); VARIANTS.len()];
    // The first has to load programs.
    for repetition in 0..=bench.repetitions(9) {
        for (cell, name) in cells.iter_mut().zip(VARIANTS) {
            let target = match *name {
                "without" => None,
                name if name.starts_with("tcp") => Some(format!("tcp:127.0.0.1:{}", free_port()?)),
                _ => Some(format!("file:{}", bench.directory.join("metrics.prom").display())),
            };
            let before = cpu_of_children()?;
            let (report, answers) = asked(target.as_deref(), |metrics| {
                let options: Vec<&str> = guest.iter().copied().chain(metrics.iter().copied()).collect();
                demo(bench, &options)
            })?;
            let (cpu, seconds) =
                (cpu_of_children()? - before, report["total-time-us"].as_f64().unwrap_or(f64::NAN) / 1e6);
            eprintln!("metrics {name}: {:.2} GB/s, {cpu:.2} CPU s, {answers} answers", gb / seconds);
            if repetition > 0 {
                cell.speed.push(gb / seconds);
                cell.cpu.push(cpu);
                cell.answers += answers;
            }
        }
    }
    Ok(describe(mib, &cells))
}

/// Runs `demo` with the option that is for `target`, and asks there for metrics meanwhile. Returns how often there was an answer.
fn asked<T>(target: Option<&str>, demo: impl FnOnce(&[&str]) -> Result<T, String>) -> Result<(T, u32), String> {
    let option = target.map(|target| ["--metrics", target]);
    let option = option.as_ref().map_or(&[][..], |option| &option[..]);
    let Some(address) = target.and_then(|target| target.strip_prefix("tcp:")) else { return Ok((demo(option)?, 0)) };
    let (over, answers) = (AtomicBool::new(false), AtomicU32::new(0));
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                answers.fetch_add(u32::from(ask(address)), Relaxed);
                thread::sleep(INTERVAL);
            }
        });
        let result = demo(option);
        over.store(true, Relaxed);
        result
    });
    Ok((result?, answers.into_inner()))
}

/// Whether there are metrics at `address`.
fn ask(address: &str) -> bool {
    let answer = || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    answer().is_ok_and(|answer: String| answer.starts_with("HTTP/1.1 200 "))
}

fn free_port() -> Result<u16, String> {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    port.map(|address| address.port()).map_err(|error| format!("a free port: {error}"))
}

/// CPU seconds of all processes that this one has waited for, and that they have.
fn cpu_of_children() -> Result<f64, String> {
    let stat = fs::read_to_string("/proc/self/stat").map_err(|error| format!("/proc/self/stat: {error}"))?;
    // Behind the name, which may hold spaces: field 3 comes first, cutime and cstime are 16 and 17.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(13).take(2);
    Ok(fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS)
}

fn describe(mib: u32, cells: &[Cell]) -> Findings {
    let mut findings = Findings::default();
    findings.say(&format!(
        "An idle guest with {mib} MiB, all with content, moved by `multifd demo` over TCP, 4 channels. CPU is of all processes of the demo, the guest's \
         start and end included. Variants took turns; the first turn is not counted. The metrics were asked for over HTTP, a connection each time, \
         {} times with an answer.",
        cells.iter().map(|cell| cell.answers).sum::<u32>()
    ));
    let row = |(name, cell): (&&str, &Cell)| vec![(*name).to_owned(), cell.speed.show(2), cell.cpu.show(2)];
    findings.table(&["`--metrics`", "GB/s", "CPU seconds"], &VARIANTS.iter().zip(cells).map(row).collect::<Vec<_>>());
    let without = &cells[named(VARIANTS, "without")];
    let ratios = VARIANTS.iter().zip(cells).skip(1).map(|(name, cell)| {
        let (speed, cpu) = (cell.speed.median() / without.speed.median(), cell.cpu.median() / without.cpu.median());
        format!("{name}: {speed:.2} of the speed, {cpu:.2} of the CPU time")
    });
    findings.say(&format!("By medians, beside a migration without: {}.", ratios.collect::<Vec<_>>().join("; ")));
    let raw = VARIANTS.iter().zip(cells).map(|(name, cell)| {
        json!({ "metrics": name, "mib": mib, "gb-per-second": cell.speed.json(), "cpu-seconds": cell.cpu.json(), "answers": cell.answers })
    });
    findings.raw = Value::Array(raw.collect());
    findings
}

/// Between two scrapes; Prometheus asks once in 15 s or more.
const INTERVAL: Duration = Duration::from_millis(100);
/// Of `/proc/PID/stat` in a second, on all of Linux' architectures that this runs on.
const TICKS: f64 = 100.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_to_a_migration_without_metrics() {
        let cell = |speed: f64, cpu: f64| {
            let mut cell = Cell::default();
            cell.speed.push(speed);
            cell.cpu.push(cpu);
            cell
        };
        let text = describe(64, &[cell(2.0, 4.0), cell(1.0, 5.0), cell(4.0, 2.0)]).text;
        assert!(text.contains("a second: 0.50 of the speed, 1.25 of the CPU time; file"), "{text}");
        assert!(text.contains("each second: 2.00 of the speed, 0.50 of the CPU time."), "{text}");
    }

    #[test]
    fn cpu_time_of_children_grows_with_them() {
        let before = cpu_of_children().unwrap();
        let script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
        assert!(std::process::Command::new("sh").args(["-c", script]).status().unwrap().success());
        assert!(cpu_of_children().unwrap() > before);
    }
}

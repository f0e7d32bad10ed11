//! The inner parts, by Criterion.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use serde_json::{Value, json};

use super::{Bench, Findings};

/// The section: runs `cargo bench` and collects what Criterion left.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["bench", "-p", "multifd", "--features", "__bench", "--bench", "inner", "--"]);
    cargo.args(["--noplot", "--warm-up-time", "0.5", "--measurement-time", if bench.quick { "0.5" } else { "2" }]);
    let status = cargo.status().map_err(|error| format!("cargo: {error}"))?;
    if !status.success() {
        return Err(format!("cargo bench ended with {status}"));
    }
    let criterion = bench.directory.with_file_name("criterion");
    let mut found = Vec::new();
    collect(&criterion, &mut found)?;
    found.sort_by(|(one, ..), (other, ..)| one.cmp(other));
    let mut findings = Findings::default();
    findings.say("`cargo bench -p multifd --features __bench`; median and its 95 % confidence interval, in ns.");
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|(name, [median, low, high])| vec![name.clone(), format!("{median:.1} ({low:.1}–{high:.1})")])
        .collect();
    findings.table(&["", "ns"], &rows);
    findings.raw = found.iter().map(|(name, figures)| json!({ "name": name, "ns": figures })).collect();
    Ok(findings)
}

/// Name, median and interval of each bench below `directory`.
fn collect(directory: &Path, found: &mut Vec<(String, [f64; 3])>) -> Result<(), String> {
    let entries = fs::read_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        let estimates = path.join("new/estimates.json");
        let Ok(text) = fs::read_to_string(&estimates) else {
            collect(&path, found)?;
            continue;
        };
        let name = fs::read_to_string(path.join("new/benchmark.json")).unwrap_or_default();
        let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
        let (name, median) = (parsed(&name), &parsed(&text)["median"]);
        let interval = &median["confidence_interval"];
        let figures = [&median["point_estimate"], &interval["lower_bound"], &interval["upper_bound"]];
        found.push((
            name["full_id"].as_str().unwrap_or("?").to_owned(),
            figures.map(|figure| figure.as_f64().unwrap_or(f64::NAN)),
        ));
    }
    Ok(())
}

//! Regions of source code as llvm-cov counts them, each once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use super::LIBRARIES;

/// The first line and column of a region, and its last.
type Place = (u64, u64, u64, u64);

/// How often each region of each file was run, by the file's path below the root.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Regions {
    files: BTreeMap<String, BTreeMap<Place, u64>>,
}

impl Regions {
    /// From a report of `llvm-cov export`; `read` returns the text of a source file. `None` if it is no such report.
    pub fn of(report: &Value, root: &Path, read: impl Fn(&Path) -> String) -> Option<Self> {
        let mut regions = Self::default();
        let mut tests_from: BTreeMap<String, u64> = BTreeMap::new();
        for function in report.get("data")?.get(0)?.get("functions")?.as_array()? {
            let names = function.get("filenames")?.as_array()?;
            for region in function.get("regions")?.as_array()? {
                let figures: Vec<u64> = region.as_array()?.iter().filter_map(Value::as_u64).collect();
                let &[line, column, last_line, last_column, count, file, _, kind] = figures.get(..8)? else {
                    return None;
                };
                let path = Path::new(names.get(usize::try_from(file).ok()?)?.as_str()?);
                let Some(name) = path.strip_prefix(root).ok().and_then(Path::to_str) else { continue };
                if kind != CODE || !is_library(name) {
                    continue;
                }
                let tests = *tests_from.entry(name.to_owned()).or_insert_with(|| first_line_of_tests(&read(path)));
                if line < tests {
                    let runs = regions.files.entry(name.to_owned()).or_default();
                    // Another instance of the same code.
                    let most = runs.entry((line, column, last_line, last_column)).or_default();
                    *most = (*most).max(count);
                }
            }
        }
        Some(regions)
    }

    /// A row for each folder with its regions, those that were run, and their share.
    pub fn table(&self) -> String {
        let mut folders: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for (name, runs) in &self.files {
            let run = runs.values().filter(|&&count| count > 0).count();
            for folder in [folder(name), "all"] {
                let sum = folders.entry(folder).or_default();
                *sum = (sum.0 + runs.len(), sum.1 + run);
            }
        }
        let mut table = "| folder | regions | run | % |\n|---|---:|---:|---:|\n".to_owned();
        for (folder, (all, run)) in folders {
            let percent = 100.0 * run as f64 / all.max(1) as f64;
            writeln!(table, "| `{folder}` | {all} | {run} | {percent:.1} |").expect("a string");
        }
        table
    }

    /// Every line with a region that was not run: `FILE: LINES`.
    pub fn not_run(&self) -> String {
        let mut list = String::new();
        for (name, runs) in &self.files {
            let lines: BTreeSet<u64> = runs
                .iter()
                .filter(|(_, count)| **count == 0)
                .flat_map(|(&(first, _, last, _), _)| first..=last)
                .collect();
            if !lines.is_empty() {
                writeln!(list, "{name}: {}", ranges(&lines)).expect("a string");
            }
        }
        list
    }
}

/// The folder of a row: the package, or one below its `src`.
fn folder(name: &str) -> &str {
    let inside = name.find("/src/").map_or(0, |at| at + "/src/".len());
    match name[inside..].find('/') {
        Some(at) => &name[..inside + at],
        None => &name[..inside.saturating_sub(1)],
    }
}

/// A source file of a library that has no tests alone.
fn is_library(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    let tests = |part: &&str| ["testing", "tests", "tests.rs", "loom.rs", "shuttle.rs"].contains(part);
    LIBRARIES.contains(&parts[0]) && parts.get(1) == Some(&"src") && !parts.iter().any(tests)
}

/// The line on which a file's module of tests begins; behind every line if it has none.
fn first_line_of_tests(text: &str) -> u64 {
    let begins = |line: &str| !line.starts_with(char::is_whitespace) && line.ends_with("mod tests {");
    text.lines().position(begins).map_or(u64::MAX, |at| at as u64 + 1)
}

/// `1–3, 7` of the lines 1, 2, 3 and 7.
fn ranges(lines: &BTreeSet<u64>) -> String {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for &line in lines {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == line => *last = line,
            _ => ranges.push((line, line)),
        }
    }
    let show = |&(first, last): &(u64, u64)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    ranges.iter().map(show).collect::<Vec<_>>().join(", ")
}

/// What llvm-cov calls a region of code, as opposed to a gap or an expansion.
const CODE: u64 = 0;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample() -> Regions {
        let report = json!({ "data": [{ "functions": [
            { "filenames": ["/r/multifd/src/round/scan.rs"],
              "regions": [[3, 1, 5, 2, 0, 0, 0, 0], [4, 5, 4, 9, 0, 0, 0, 0], [9, 1, 9, 7, 0, 0, 0, 3], [40, 1, 41, 2, 0, 0, 0, 0]] },
            // Another instance, which was run but for one region.
            { "filenames": ["/r/multifd/src/round/scan.rs"], "regions": [[3, 1, 5, 2, 7, 0, 0, 0], [4, 5, 4, 9, 0, 0, 0, 0]] },
            { "filenames": ["/r/multifd/src/testing/shuttle.rs"], "regions": [[1, 1, 2, 2, 0, 0, 0, 0]] },
            { "filenames": ["/r/multifd/tests/names.rs"], "regions": [[1, 1, 2, 2, 0, 0, 0, 0]] },
            { "filenames": ["/elsewhere/src/lib.rs"], "regions": [[1, 1, 2, 2, 0, 0, 0, 0]] },
            { "filenames": ["/r/multifd/src/stop.rs"], "regions": [[1, 1, 2, 2, 1, 0, 0, 0]] },
        ] }] });
        let source = format!("{}#[cfg(test)]\nmod tests {{\n", "\n".repeat(20));
        Regions::of(&report, Path::new("/r"), |_| source.clone()).unwrap()
    }

    #[test]
    fn instances_count_once_and_code_of_tests_does_not_count() {
        let table = sample().table();
        assert!(table.contains("| `multifd/src/round` | 2 | 1 | 50.0 |"), "{table}");
        assert!(table.contains("| `multifd/src` | 1 | 1 | 100.0 |"), "{table}");
        assert!(table.contains("| `all` | 3 | 2 | 66.7 |"), "{table}");
    }

    #[test]
    fn what_was_not_run_is_listed_by_line() {
        assert_eq!(sample().not_run(), "multifd/src/round/scan.rs: 4\n");
        assert_eq!(ranges(&BTreeSet::from([1, 2, 3, 7])), "1-3, 7");
    }

    #[test]
    fn a_report_of_another_kind_is_refused() {
        assert_eq!(Regions::of(&json!({ "data": [] }), Path::new("/r"), |_| String::new()), None);
        let short = json!({ "data": [{ "functions": [{ "filenames": [], "regions": [[1, 2]] }] }] });
        assert_eq!(Regions::of(&short, Path::new("/r"), |_| String::new()), None);
    }
}

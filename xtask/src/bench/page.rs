//! Puts the page together: what a run measured, and of all other sections what the page says already.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::SECTIONS;

/// Puts what the sections `measured` left below `directory` on the page `docs/benchmarks.md`, with its plots, and renews the table in
/// `README.md`; with `quick` only on a page beside the findings. `all`: all sections were to be measured.
pub fn write(root: &Path, directory: &Path, quick: bool, measured: &[&str], all: bool) -> Result<(), String> {
    let docs = if quick { directory.join("page") } else { root.join("docs") };
    let plots = docs.join("benchmarks");
    fs::create_dir_all(&plots).map_err(|error| format!("{}: {error}", plots.display()))?;
    let mut found = BTreeMap::new();
    for name in measured {
        let path = directory.join(format!("{name}.md"));
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        copy_plots(&text, directory, &plots)?;
        found.insert(*name, text);
    }
    let path = docs.join("benchmarks.md");
    let old = fs::read_to_string(&path).unwrap_or_default();
    let page = renewed(&old, &found, all.then(introduction), &notes(root));
    fs::write(&path, page).map_err(|error| format!("{}: {error}", path.display()))?;
    eprintln!("{}", path.display());
    if quick || !IN_README.iter().all(|name| measured.contains(name)) { Ok(()) } else { readme(root, directory) }
}

/// The page `old` with the sections `found` in place of what it had, and another introduction where there is one.
fn renewed(old: &str, found: &BTreeMap<&str, String>, introduction: Option<String>, notes: &str) -> String {
    // What is said of the machine belongs to the sections that stay.
    let before = || old.split_once("\n## ").map(|(before, _)| format!("{}\n\n", before.trim_end()));
    let mut page = introduction.or_else(before).unwrap_or_else(self::introduction);
    for (name, heading, _) in SECTIONS {
        let head = format!("## {heading}\n\n    cargo xtask bench {name}\n\n");
        let text = match (found.get(name), section(old, heading)) {
            (Some(text), _) => head + text,
            (None, Some(text)) => text.to_owned(),
            (None, None) => head + "Not measured.",
        };
        page.push_str(text.trim_end());
        page.push_str("\n\n");
    }
    page.push_str(notes);
    format!("{}\n", page.trim_end())
}

/// The section of the page `old` below `heading`, which it begins with.
fn section<'a>(old: &'a str, heading: &str) -> Option<&'a str> {
    let head = format!("## {heading}\n");
    let begin = if old.starts_with(&head) { 0 } else { old.find(&format!("\n{head}"))? + 1 };
    let rest = &old[begin..];
    Some(rest[1..].find("\n## ").map_or(rest, |end| &rest[..end + 2]))
}

/// Copies the plots that `text` shows.
fn copy_plots(text: &str, directory: &Path, plots: &Path) -> Result<(), String> {
    let names = text.split("(benchmarks/").skip(1).filter_map(|rest| rest.split_once(".svg)"));
    for (name, _) in names {
        let (from, to) = (directory.join(format!("{name}.svg")), plots.join(format!("{name}.svg")));
        fs::copy(&from, &to).map_err(|error| format!("{}: {error}", from.display()))?;
    }
    Ok(())
}

/// When a section was measured by itself, and how busy the machine was.
pub fn alone() -> String {
    let date = Command::new("date").args(["-u", "+%F"]).output();
    let date = date.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    format!("Measured on {date}, by itself and not with the rest of this page (load average {load} at its end).")
}

/// A sentence for a summary that was measured until now, if the machine was busy with other work.
pub fn busy() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').nth(2).and_then(|load| load.parse::<f64>().ok()).unwrap_or(0.0);
    let sentence = "\n\nThe machine was busy with other work meanwhile; look at the spread.";
    if load > 4.0 { sentence.to_owned() } else { String::new() }
}

/// Replaces what stands between the two markers in `README.md`, where it has them.
fn readme(root: &Path, directory: &Path) -> Result<(), String> {
    let path = root.join("README.md");
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    let Ok(table) = fs::read_to_string(directory.join("summary.md")) else { return Ok(()) };
    // Where these sections were measured.
    let [rows, present, checkpoint, sparse, busy] =
        ["summary-rows.md", "summary-present.md", "summary-checkpoint.md", "summary-sparse.md", "summary-busy.md"]
            .map(|name| fs::read_to_string(directory.join(name)).unwrap_or_default());
    let Some((before, rest)) = text.split_once(BEGIN) else { return Ok(()) };
    let Some((_, after)) = rest.split_once(END) else { return Ok(()) };
    let rows = rows + &present + &checkpoint;
    let text = format!("{before}{BEGIN}\n\n{}\n{rows}\n{}{busy}\n\n{END}{after}", table.trim(), sparse.trim());
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn introduction() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let kernel = read("/proc/sys/kernel/osrelease");
    let kernel: String = kernel.trim().chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = read("/proc/meminfo");
    let memory = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1048576.0;
    let chosen = |path: &str| {
        let text = read(path);
        text.split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'))
            .map_or("?".to_owned(), |(word, _)| word.to_owned())
    };
    let virtualised = read("/proc/cpuinfo").contains("hypervisor");
    let load = read("/proc/loadavg");
    format!(
        "# Benchmarks\n\n\
         Written by `cargo xtask bench`, which installs what it needs, measures, and puts this page together; every figure \
         here comes from it, and the single measurements are left as JSON in `target/bench`. `cargo xtask bench SECTION` \
         measures one section again, says so there, and leaves all others as they are.\n\n\
         | | |\n| --- | --- |\n\
         | machine | {cpus} CPUs{}, {memory:.0} GiB; both ends of every migration share them |\n\
         | kernel | Linux {kernel} |\n\
         | transparent huge pages | `{}`; shared memory: `{}` |\n\
         | load average when this page was written | {} |\n\
         | peer | {} |\n\n\
         Absolute figures hold for no other machine; compare only within a table. GB is 10⁹ bytes of guest memory. A \
         load average far above what one migration makes (about 2) says that the machine was busy with other work meanwhile: \
         then the spread is wide, and a median of a few runs is not to be trusted to more than its spread.\n\n",
        if virtualised { " (virtual)" } else { "" },
        chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        load.split(' ').take(3).collect::<Vec<_>>().join(" "),
        "QEMU 10.0 of Debian 12's backports; QEMU 11.1 of Debian 13's where it is named",
    )
}

/// What a person has to say about the figures, kept beside the page.
fn notes(root: &Path) -> String {
    fs::read_to_string(root.join("docs/benchmarks/notes.md")).unwrap_or_default()
}

/// The sections that the table in `README.md` is made of.
const IN_README: &[&str] = &["throughput", "present", "backing", "checkpoint", "sparse"];
const BEGIN: &str = "<!-- written by cargo xtask bench -->";
const END: &str = "<!-- end -->";

#[cfg(test)]
mod tests {
    use super::*;

    const INTRODUCTION: &str = "# Benchmarks\n\nThis machine.\n\n";
    const NOTES: &str = "## What bounds it\n\nThe memory.\n";

    fn all(text: &str) -> BTreeMap<&'static str, String> {
        SECTIONS.iter().map(|(name, ..)| (*name, format!("{text} of {name}\n\n| a | b |\n\n"))).collect()
    }

    fn only(name: &str, text: &str) -> BTreeMap<&'static str, String> {
        all(text).into_iter().filter(|(found, _)| *found == name).collect()
    }

    fn whole() -> String {
        renewed("", &all("first"), Some(INTRODUCTION.to_owned()), NOTES)
    }

    #[test]
    fn a_whole_run_replaces_the_whole_page() {
        let first = whole();
        assert!(first.starts_with(&format!("{INTRODUCTION}## ")), "{first}");
        let second = renewed(&first, &all("second"), Some("# Benchmarks\n\nAnother.\n\n".to_owned()), NOTES);
        assert_eq!(second, first.replace("first", "second").replace("This machine", "Another"));
        assert_eq!(second.matches("\n## ").count(), SECTIONS.len() + 1);
    }

    /// `cargo xtask bench tls` in a fresh checkout wrote "Not measured." over all other sections, or what an older run had left.
    #[test]
    fn a_run_of_one_section_leaves_all_others_as_they_are() {
        let whole = whole();
        for (name, ..) in SECTIONS {
            let changed = renewed(&whole, &only(name, "second"), None, NOTES);
            assert_eq!(changed, whole.replace(&format!("first of {name}\n"), &format!("second of {name}\n")));
            assert_ne!(changed, whole);
            assert_eq!(renewed(&changed, &only(name, "second"), None, NOTES), changed, "{name}, again");
        }
        assert_eq!(renewed(&whole, &BTreeMap::new(), None, NOTES), whole, "nothing was measured");
    }

    #[test]
    fn a_section_that_is_new_finds_its_place() {
        let whole = whole();
        for (name, heading, _) in SECTIONS {
            let old = whole.replace(section(&whole, heading).unwrap(), "");
            assert!(!old.contains(&format!("of {name}\n")), "{old}");
            assert_eq!(renewed(&old, &only(name, "first"), None, NOTES), whole);
            assert_eq!(renewed(&old, &BTreeMap::new(), None, NOTES).matches("Not measured.").count(), 1);
        }
    }

    /// The page of this repository, with its own sections.
    #[test]
    fn the_page_that_is_there_stays_as_it_is_where_nothing_is_measured() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("");
        let old = fs::read_to_string(root.join("docs/benchmarks.md")).unwrap();
        let page = renewed(&old, &BTreeMap::new(), None, &notes(&root));
        // A section that was never measured is named there.
        let lost = old.lines().find(|line| !page.contains(line));
        assert_eq!(lost, None);
        assert_eq!(renewed(&page, &BTreeMap::new(), None, &notes(&root)), page);
    }
}

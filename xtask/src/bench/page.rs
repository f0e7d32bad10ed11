//! Puts the page together from what the sections left.

use std::fs;
use std::path::Path;

use super::SECTIONS;

/// Writes `docs/benchmarks.md`, its plots, and the table in `README.md`; with `quick` only a page beside the findings.
pub fn write(root: &Path, directory: &Path, quick: bool) -> Result<(), String> {
    let docs = if quick { directory.join("page") } else { root.join("docs") };
    let plots = docs.join("benchmarks");
    fs::create_dir_all(&plots).map_err(|error| format!("{}: {error}", plots.display()))?;
    let mut page = introduction();
    for (name, heading, _) in SECTIONS {
        page.push_str(&format!("## {heading}\n\n    cargo xtask bench {name}\n\n"));
        match fs::read_to_string(directory.join(format!("{name}.md"))) {
            Ok(text) => page.push_str(&text),
            Err(_) => page.push_str("Not measured.\n\n"),
        }
    }
    page.push_str(&notes(root));
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "svg") {
            let to = plots.join(entry.file_name());
            fs::copy(entry.path(), &to).map_err(|error| format!("{}: {error}", to.display()))?;
        }
    }
    let path = docs.join("benchmarks.md");
    let mut text = page.trim_end().to_owned();
    text.push('\n');
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    eprintln!("{}", path.display());
    if quick { Ok(()) } else { readme(root, directory) }
}

/// Replaces what stands between the two markers in `README.md`, where it has them.
fn readme(root: &Path, directory: &Path) -> Result<(), String> {
    let path = root.join("README.md");
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    let Ok(table) = fs::read_to_string(directory.join("summary.md")) else { return Ok(()) };
    // Where these sections were measured.
    let [rows, sparse] = ["summary-rows.md", "summary-sparse.md"]
        .map(|name| fs::read_to_string(directory.join(name)).unwrap_or_default());
    let Some((before, rest)) = text.split_once(BEGIN) else { return Ok(()) };
    let Some((_, after)) = rest.split_once(END) else { return Ok(()) };
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').nth(2).and_then(|load| load.parse::<f64>().ok()).unwrap_or(0.0);
    let busy = if load > 4.0 { "\n\nThe machine was busy with other work meanwhile; look at the spread." } else { "" };
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
         measures one section again.\n\n\
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
        "QEMU 10.0 of Debian 12's backports",
    )
}

/// What a person has to say about the figures, kept beside the page.
fn notes(root: &Path) -> String {
    fs::read_to_string(root.join("docs/benchmarks/notes.md")).unwrap_or_default()
}

const BEGIN: &str = "<!-- written by cargo xtask bench -->";
const END: &str = "<!-- end -->";

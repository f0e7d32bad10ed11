//! Developer tasks, one verb per file: `cargo xtask VERB`.

mod bench;
mod coverage;
mod dist;
#[cfg(test)]
mod documents;
mod first_failure;
mod fuzz;
mod json;
mod mutants;
mod proof;
mod sanitize;
mod step;
mod test;
mod tool;
mod totals;

use std::env;
use std::process::ExitCode;

/// A verb: its name, one line of help, and what it does with the arguments after its name.
type Verb = (&'static str, &'static str, fn(&[String]) -> Result<ExitCode, String>);

const VERBS: &[Verb] = &[
    ("test", "every check that a change has to pass; `--quick` leaves out QEMU and packaging", test::run),
    ("bench", "measures beside QEMU and writes docs/benchmarks.md; `--quick` keeps it small", bench::run),
    ("proof", "the checks of the round guarantee, at length; `--quick` is what `test` runs of it", proof::run),
    ("dist", "a static binary, man pages, completions, and a .deb of them, below target/dist", dist::run),
    ("fuzz", "the fuzzers, for `--seconds N` each, or the targets that are named", fuzz::run),
    ("mutants", "changes the code of the guarantee, place by place: which changes no unit test notices", mutants::run),
    (
        "first-failure",
        "what `mutants` runs tests with: ends a test program with the first that fails",
        first_failure::run,
    ),
    ("coverage", "which regions of the libraries their own tests run, and a list of those they do not", coverage::run),
    ("json", "writes docs/json.md, the page about the reports, from the types that are printed", json::run),
    ("sanitize", "the engine's tests under the `address` and the `thread` sanitizer", sanitize::run),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let verb = arguments.first().map(String::as_str);
    let Some((_, _, run)) = VERBS.iter().find(|(name, _, _)| Some(*name) == verb) else {
        eprintln!("usage: cargo xtask VERB\n");
        for (name, help, _) in VERBS {
            eprintln!("    {name:<13} {help}");
        }
        return ExitCode::from(2);
    };
    match run(&arguments[1..]) {
        Ok(code) => code,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(2)
        }
    }
}

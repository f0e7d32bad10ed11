//! Man pages and completions, as packages get them: nothing of the command line is missing there.

mod common;

use std::{collections::BTreeSet, fs, path::Path};

use common::{LIMIT, exit_code, run};
use test_support::{TempDir, time_limit};

/// The words of `multifd --help` at the beginning of the lines below `Commands:`.
fn verbs() -> Vec<String> {
    let help = String::from_utf8(run("--help").stdout).unwrap();
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let verbs = commands.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    verbs.map(|line| line.split_whitespace().next().unwrap().to_owned()).filter(|verb| verb != "help").collect()
}

/// The long options that `multifd VERB --help` has lines for.
fn options(verb: &str) -> BTreeSet<String> {
    let help = String::from_utf8(run(&format!("{verb} --help")).stdout).unwrap();
    // The text about an option stands further to the right.
    let lines =
        help.lines().filter(|line| line.starts_with("      --") || line.starts_with("  -") && line.contains(", --"));
    let name = |line: &str| {
        let rest = &line[line.find("--").unwrap()..];
        rest.split(|end: char| !(end.is_ascii_alphanumeric() || end == '-')).next().unwrap().to_owned()
    };
    lines.map(name).collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn man_pages_and_completions_name_every_verb_and_option() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let made = run(&format!("pages {}", dir.path().display()));
        assert_eq!(exit_code(&made), 0, "{made:?}");
        let verbs = verbs();
        assert!(["demo", "receive", "give-back", "tls-init"].iter().all(|verb| verbs.iter().any(|name| name == verb)));
        let completions: Vec<String> = ["multifd.bash", "_multifd", "multifd.fish"]
            .iter()
            .map(|name| read(&dir.path().join("completions").join(name)))
            .collect();
        let main = read(&dir.path().join("man1/multifd.1")).replace('\\', "");
        for verb in &verbs {
            assert!(main.contains(&format!("multifd-{verb}(1)")), "{verb} in multifd.1");
            let page = read(&dir.path().join(format!("man1/multifd-{verb}.1"))).replace('\\', "");
            let options = options(verb);
            assert!(options.contains("--json") && options.contains("--help"), "{verb}: {options:?}");
            for option in &options {
                assert!(page.contains(option.as_str()), "{option} in multifd-{verb}.1");
                for completion in &completions {
                    // fish has them without hyphens.
                    let bare = format!("-l {}", option.trim_start_matches('-'));
                    assert!(completion.contains(option.as_str()) || completion.contains(&bare), "{verb} {option}");
                }
            }
            assert!(completions.iter().all(|completion| completion.contains(verb.as_str())), "{verb}");
        }
    });
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let output = run("pages /proc/nonesuch/pages");
    assert_eq!(exit_code(&output), 1);
    assert!(String::from_utf8_lossy(&output.stderr).contains("/proc/nonesuch/pages"));
}

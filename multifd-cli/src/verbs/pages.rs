//! `multifd pages`: man pages and completions for shells, for packages.

use std::{fs, io};

use clap::CommandFactory;
use clap_complete::{Shell, generate_to};
use serde_json::{Map, json};

use crate::{
    args::{Cli, PagesArgs},
    exit::Exit,
    report::Outcome,
};

/// Writes them.
pub fn run(args: &PagesArgs) -> Outcome {
    match write(args) {
        Ok(count) => {
            let mut report = Map::new();
            report.insert("files".to_owned(), json!(count));
            Outcome::done(report, format!("wrote {count} files into {}\n", args.dir.display()))
        }
        Err(error) => Outcome::failed(Exit::Failed, format!("{}: {error}", args.dir.display())),
    }
}

/// `man1/multifd-VERB.1`, and `completions/` with a file for each shell. Returns how many.
///
/// # Errors
/// The kernel's.
fn write(args: &PagesArgs) -> io::Result<usize> {
    let (man, completions) = (args.dir.join("man1"), args.dir.join("completions"));
    for dir in [&man, &completions] {
        fs::create_dir_all(dir)?;
    }
    clap_mangen::generate_to(Cli::command(), &man)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut Cli::command(), "multifd", &completions)?;
    }
    Ok(fs::read_dir(man)?.count() + fs::read_dir(completions)?.count())
}

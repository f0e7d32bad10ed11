//! Writes the corpora to begin with into `DIRECTORY/TARGET/`.

use std::{env, fs, path::PathBuf, process::ExitCode};

use fuzz_bodies::TARGETS;

fn main() -> ExitCode {
    let Some(directory) = env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: fuzz-bodies DIRECTORY");
        return ExitCode::from(2);
    };
    for target in TARGETS {
        let corpus = directory.join(target.name);
        let written = fs::create_dir_all(&corpus).and_then(|()| {
            let mut seeds = (target.seeds)().into_iter().enumerate();
            seeds.try_for_each(|(index, seed)| fs::write(corpus.join(format!("seed-{index:03}")), seed))
        });
        if let Err(error) = written {
            eprintln!("{}: {error}", corpus.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

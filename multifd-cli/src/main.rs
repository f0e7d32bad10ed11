//! The `multifd` command: reads the command line, runs the verb, prints its report.

mod child;
mod cli;
mod control;
mod describe;
mod exit;
mod log;
mod progress;
mod report;
mod signals;
mod table;
mod units;
mod verbs;

use std::process::ExitCode;

use self::{cli::Verb, exit::Exit, report::Outcome};

fn main() -> ExitCode {
    let cli = match cli::parse() {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    log::start(cli.verb.output());
    let outcome = verbs::run(&cli.verb);
    let for_parent = matches!(&cli.verb, Verb::Guest(args) if args.child_of.is_some());
    outcome.print(cli.verb.output(), for_parent);
    outcome.exit.into()
}

/// Prints help, or what is wrong with the command line.
fn explain(error: &clap::Error) -> ExitCode {
    // Nobody is left to be told if these cannot be written.
    let _ = error.print();
    if !error.use_stderr() {
        return Exit::Done.into();
    }
    if cli::asks_for_json() {
        let message = error.to_string();
        let message = message.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        let _ = Outcome::failed(Exit::Usage, message).print_json();
    }
    Exit::Usage.into()
}

//! The `multifd` command: reads the command line, runs the verb, prints its report.

mod activation;
mod advice;
mod allow;
mod args;
mod bar;
mod beside;
mod child;
mod connect;
mod current;
mod describe;
mod digest;
mod doctor;
mod exit;
mod extract;
mod files;
mod forecast;
mod html;
mod image;
mod lend;
mod listening;
mod log;
mod metrics;
mod monitor;
mod movable_listener;
mod observe;
mod printable;
mod progress;
mod qmp;
mod replace;
mod report;
mod role;
mod rounds;
mod schema;
mod shell;
mod signals;
mod stdout;
mod stream_out;
mod table;
mod terminal;
mod threads;
mod units;
mod verbs;
mod writes;

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use self::{args::Verb, exit::Exit, report::Outcome};

fn main() -> ExitCode {
    // SAFETY: nothing has been opened yet, and descriptors are passed on as owned values only.
    unsafe { multifd::transport::fd::claim_inherited() };
    // SAFETY: the same, and there is no other thread yet.
    unsafe { activation::claim() };
    // Where that fails, such a write ends the process.
    let _ = signals::survive_file_size_limit();
    let cli = match args::parse() {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    log::start(cli.verb.output());
    let for_parent = matches!(&cli.verb, Verb::Guest(args) if args.child_of.is_some());
    let exit = verbs::run(&cli.verb, for_parent);
    terminal::flush(LAST_WORDS);
    exit.into()
}

/// Prints help, or what is wrong with the command line.
fn explain(error: &clap::Error) -> ExitCode {
    let printed = error.print().and_then(|()| io::stdout().flush());
    if !error.use_stderr() {
        return if printed.is_ok() { Exit::Done.into() } else { Exit::Failed.into() };
    }
    if args::asks_for_json() {
        let message = error.to_string();
        let message = message.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        let _ = Outcome::failed(Exit::Usage, message).print_json();
    }
    Exit::Usage.into()
}

/// How long the process stays for a stderr that takes nothing.
const LAST_WORDS: Duration = Duration::from_secs(2);

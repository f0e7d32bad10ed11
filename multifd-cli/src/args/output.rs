//! What is printed, and how much.

use clap::{ArgAction, Args, ValueEnum};

use super::values::value_name;

/// What is printed, and how much.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Print one JSON object instead of text for a person.
    #[arg(long)]
    pub json: bool,
    /// Log more; twice, still more.
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
    /// Print neither progress nor warnings.
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Show progress: on a terminal, always (a line per round elsewhere), or never.
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto, value_name = "WHEN")]
    pub progress: ProgressMode,
}

impl OutputArgs {
    /// The same as options of a command line, but for `--json`.
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![format!("--progress={}", value_name(&self.progress))];
        args.extend(self.quiet.then(|| "--quiet".to_owned()));
        args.extend((0..self.verbose).map(|_| "--verbose".to_owned()));
        args
    }
}

/// When to show progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// If stderr is a terminal.
    Auto,
    /// Anywhere; a line per round where stderr is no terminal.
    Always,
    /// Nowhere.
    Never,
}

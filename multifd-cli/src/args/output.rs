//! What is printed, and how much.

use clap::{ArgAction, Args, ValueEnum};

use super::values::value_name;

/// What is printed, and how much.
#[derive(Clone, Debug, Default, Args)]
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
    /// How the log is written: a line of text, or a JSON object on a line.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub log_format: LogFormat,
}

impl OutputArgs {
    /// The same as options of a command line, but for `--json`.
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![format!("--progress={}", value_name(&self.progress)), self.log_format_to_arg()];
        args.extend(self.quiet.then(|| "--quiet".to_owned()));
        args.extend((0..self.verbose).map(|_| "--verbose".to_owned()));
        args
    }

    /// The format of the log as an option of a command line.
    pub fn log_format_to_arg(&self) -> String {
        format!("--log-format={}", value_name(&self.log_format))
    }
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For a person.
    #[default]
    Text,
    /// For a program.
    Json,
}

/// When to show progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// If stderr is a terminal.
    #[default]
    Auto,
    /// Anywhere; a line per round where stderr is no terminal.
    Always,
    /// Nowhere.
    Never,
}

//! The options of `multifd doctor`.

use clap::Args;

use super::output::OutputArgs;

/// Options of `multifd doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// End with status 1 unless all is ok.
    #[arg(long)]
    pub strict: bool,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

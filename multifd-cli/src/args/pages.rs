//! The options of `multifd pages`.

use std::path::PathBuf;

use clap::Args;

use super::output::OutputArgs;

/// Options of `multifd pages`.
#[derive(Debug, Args)]
pub struct PagesArgs {
    /// The directory for them; it is made where it is not there.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

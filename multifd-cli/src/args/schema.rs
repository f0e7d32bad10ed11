//! The options of `multifd schema`.

use clap::Args;

use super::output::OutputArgs;

/// Options of `multifd schema`.
#[derive(Debug, Args)]
pub struct SchemaArgs {
    /// The verb whose report is described; without it, one object with the schema of each.
    #[arg(value_name = "VERB")]
    pub verb: Option<String>,
    /// Print a page of documentation instead.
    #[arg(long, hide = true)]
    pub markdown: bool,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

//! The options of `multifd tls-init`.

use std::path::PathBuf;

use clap::Args;

use super::output::OutputArgs;

/// Options of `multifd tls-init`.
#[derive(Debug, Args)]
pub struct TlsInitArgs {
    /// The directory to make. It must not exist, or be empty.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// A host that takes part: the name or the address under which others connect to it.
    #[arg(long = "host", value_name = "NAME", required = true)]
    pub hosts: Vec<String>,
    /// How long the certificates are valid, from an hour ago on.
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub days: u32,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

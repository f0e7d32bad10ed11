//! What looks at a migration from the side: metrics, and a report to read afterwards.

use std::path::PathBuf;

use clap::Args;

use crate::metrics::Target;

/// What looks at a migration from the side.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Output")]
pub struct ObserveArgs {
    /// Serve metrics for Prometheus there: over HTTP at tcp:HOST:PORT or unix:PATH, or in a file that is replaced once a
    /// second, file:PATH.
    #[arg(long, value_name = "TARGET")]
    pub metrics: Option<Target>,
    /// Write a report to read in a browser, one file, when it is over.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

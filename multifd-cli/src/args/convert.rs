//! The options of `multifd convert`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};

use super::output::OutputArgs;
use crate::units::{self, Limit};

/// Options of `multifd convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A checkpoint, a plain migration stream, a libvirt save image (raw, gzip, xz, zstd or sparse), or - for a stream or image
    /// on the standard input.
    #[arg(value_name = "IN", allow_hyphen_values = true)]
    pub input: PathBuf,
    /// The new file; it gets its name when it is complete and on disk. With --format stream also - for the standard output: what is
    /// written there is complete only if the exit status is 0.
    #[arg(value_name = "OUT")]
    pub file: PathBuf,
    /// Write a libvirt save image with this description of the domain, as `virsh dumpxml --migratable` prints it.
    #[arg(long, value_name = "FILE")]
    pub libvirt_xml: Option<PathBuf>,
    /// How to write it: with a place for each page (a checkpoint; with --libvirt-xml the format sparse of libvirt 11.3), or
    /// front to back (as QEMU takes it from exec: and fd:; with --libvirt-xml the format raw)
    /// [default: mapped-ram, with --libvirt-xml stream].
    #[arg(long, value_enum)]
    pub format: Option<OutputFormat>,
    /// Replace OUT if it exists, when the new one is complete.
    #[arg(long)]
    pub force: bool,
    /// Report the SHA-256 of each RAM block.
    #[arg(long)]
    pub digest: bool,
    /// How long the standard input may give nothing; 0 for no limit.
    #[arg(long, value_name = "TIME", default_value = "2min", value_parser = units::time_limit)]
    pub stall_timeout: Limit<Duration>,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

impl ConvertArgs {
    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
        match (self.to_stdout(), self.format()) {
            (true, OutputFormat::MappedRam) => {
                Err("a checkpoint has a place for each page, which only a file has; expected \
                 '--format stream' with - for OUT, or a file, as ./- for one of this name"
                    .to_owned())
            }
            (true, OutputFormat::Stream) if self.output.json => {
                Err("the standard output takes the stream; expected no '--json' with - for OUT".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// Whether the result goes to the standard output.
    pub fn to_stdout(&self) -> bool {
        self.file.as_os_str() == "-"
    }

    /// How the result is kept.
    pub fn format(&self) -> OutputFormat {
        let default = if self.libvirt_xml.is_some() { OutputFormat::Stream } else { OutputFormat::MappedRam };
        self.format.unwrap_or(default)
    }
}

/// How a VM is kept in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// With a place for each page.
    MappedRam,
    /// Front to back.
    Stream,
}

impl OutputFormat {
    /// What reports call such a file.
    pub fn name(self) -> &'static str {
        match self {
            OutputFormat::MappedRam => "checkpoint",
            OutputFormat::Stream => "stream",
        }
    }
}

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
    /// The new file; it gets its name when it is complete and on disk.
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
        match self.file.as_os_str() == "-" {
            true => Err("the result gets its name when it is complete and on disk, which the standard output cannot tell; expected \
                         a file for OUT, as ./- for one of this name"
                .to_owned()),
            false => Ok(()),
        }
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

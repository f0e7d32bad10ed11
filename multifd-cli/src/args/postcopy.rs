//! How a checkpoint is sent to a destination that runs the VM before its memory is there.

use std::{path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};
use multifd::postcopy;

use super::transfer::TransferArgs;
use crate::units::{self, Limit};

/// How a checkpoint is sent to a destination that runs the VM before its memory is there.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Postcopy")]
pub struct PostcopyArgs {
    /// Have the destination run the VM at once and get its memory while it runs. Needs a QEMU with capability postcopy-ram
    /// on and multifd off (restore sets both).
    #[arg(long)]
    pub postcopy: bool,
    /// Go on with a VM that --postcopy has handed over and whose sender died. The QEMU has to listen again
    /// (migrate-recover, which restore tells it); it says which pages it lacks.
    #[arg(long, conflicts_with_all = ["postcopy", "prefetch", "clone"])]
    pub recover: bool,
    /// Send pages that the guest waits for over a connection of their own. Needs capability postcopy-preempt there (restore sets it).
    #[arg(long)]
    pub preempt: bool,
    /// Send the pages that this file lists first, in its order. --record-faults writes one.
    #[arg(long, value_name = "LIST")]
    pub prefetch: Option<PathBuf>,
    /// Whether they are sent before the guest resumes or right after it.
    #[arg(long, value_enum, requires = "prefetch", default_value_t = PrefetchWhen::AfterRun, value_name = "WHEN")]
    pub prefetch_when: PrefetchWhen,
    /// Write the pages that the guest asked for to this file, in the order in which it did.
    #[arg(long, value_name = "LIST")]
    pub record_faults: Option<PathBuf>,
    /// How long to try to go on when the connection breaks after the VM was handed over; 0 to end at once, with exit
    /// status 8 [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    pub recover_timeout: Option<Duration>,
    /// Start one more VM from a checkpoint whose VM was handed over and has not got all of its memory yet.
    #[arg(long)]
    pub clone: bool,
    /// Where to note that the VM was handed over, for --recover; removed when the destination has everything
    /// [default: FILE.postcopy].
    #[arg(long, value_name = "PATH")]
    pub state: Option<PathBuf>,
}

impl PostcopyArgs {
    /// Whether it is a postcopy at all.
    pub fn is_asked_for(&self) -> bool {
        self.postcopy || self.recover
    }

    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self, transfer: &TransferArgs) -> Result<(), String> {
        let PostcopyArgs { preempt, prefetch, record_faults, recover_timeout, clone, state, .. } = self;
        let named = [
            ("--preempt", *preempt),
            ("--prefetch <LIST>", prefetch.is_some()),
            ("--record-faults <LIST>", record_faults.is_some()),
            ("--recover-timeout <TIME>", recover_timeout.is_some()),
            ("--clone", *clone),
            ("--state <PATH>", state.is_some()),
        ];
        if !self.is_asked_for() {
            return named.into_iter().find(|(_, given)| *given).map_or(Ok(()), |(option, _)| {
                Err(format!(
                    "the option '{option}' belongs to a postcopy; expected '--postcopy' or '--recover' with it"
                ))
            });
        }
        let multifd = [
            ("--channels <N>", transfer.channels.is_some()),
            ("--compression <COMPRESSION>", transfer.compression.is_some()),
            ("--zero-copy", transfer.zero_copy),
            ("--zero-pages <ZERO_PAGES>", transfer.zero_pages.is_some()),
            ("--sync <SYNC>", transfer.sync.is_some()),
            ("--token <HEX32>", transfer.link.token.is_some()),
        ];
        multifd.into_iter().find(|(_, given)| *given).map_or(Ok(()), |(option, _)| {
            Err(format!(
                "the option '{option}' has no effect on a postcopy, which has no channels; expected one of the two"
            ))
        })
    }
}

/// When the pages that the guest needs first are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PrefetchWhen {
    /// Before it resumes.
    BeforeRun,
    /// Right after it resumes.
    #[default]
    AfterRun,
}

impl From<PrefetchWhen> for postcopy::Prefetch {
    fn from(when: PrefetchWhen) -> postcopy::Prefetch {
        match when {
            PrefetchWhen::BeforeRun => postcopy::Prefetch::BeforeRun,
            PrefetchWhen::AfterRun => postcopy::Prefetch::AfterRun,
        }
    }
}

impl PostcopyArgs {
    /// How long to try to go on after a break.
    pub fn recovery_limit(&self) -> Limit<Duration> {
        Limit(Some(self.recover_timeout.unwrap_or(RECOVERY)))
    }
}

const RECOVERY: Duration = Duration::from_secs(30);

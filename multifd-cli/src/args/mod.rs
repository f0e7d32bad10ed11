//! The command line: the verbs and their options. What belongs together is in one file: options, their checks, and how a
//! process of the demo is given the same ones.

mod convert;
mod doctor;
mod give_back;
mod link;
mod listen;
mod machine;
mod observe;
mod origin;
mod output;
mod pages;
mod postcopy;
mod qemu;
mod schema;
mod serve;
mod tls;
mod tls_init;
mod transfer;
mod values;
mod verbs;
mod written;

use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};

pub use self::{
    convert::{ConvertArgs, OutputFormat},
    doctor::DoctorArgs,
    give_back::GiveBackArgs,
    link::{TOKEN_VARIABLE, Token},
    listen::AllowArgs,
    observe::ObserveArgs,
    origin::{Incoming, Origin, Ready, origin},
    output::{LogFormat, OutputArgs, ProgressMode},
    pages::PagesArgs,
    qemu::{CheckpointArgs, CheckpointMode, MonitorArgs, RestoreArgs},
    schema::SchemaArgs,
    serve::ServeArgs,
    tls::TlsArgs,
    tls_init::TlsInitArgs,
    transfer::{Compression, TransferArgs},
    values::{SEVERAL, uuid},
    verbs::{DemoArgs, GuestArgs, InspectArgs, Peer, ReceiveArgs, ReturnPathAck, SendArgs, Transport},
};

/// Moves running virtual machines between processes and hosts, in QEMU's multifd format.
#[derive(Debug, Parser)]
#[command(name = "multifd", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Live-migrate a running, self-checking guest between two processes on this machine.
    Demo(DemoArgs),
    /// Run the built-in guest; it can be migrated away, or wait for an incoming migration.
    Guest(GuestArgs),
    /// Receive a VM from QEMU, or from multifd, into a checkpoint file; also from a pipe or a recorded stream.
    Receive(ReceiveArgs),
    /// Send the VM in a checkpoint file to QEMU, or to multifd.
    Send(SendArgs),
    /// Start any number of VMs from one checkpoint: each connection is one, which runs at once.
    Serve(ServeArgs),
    /// Checkpoint the VM of a running QEMU, driven by its monitor.
    Checkpoint(CheckpointArgs),
    /// Restore a checkpoint into a QEMU that waits for it, driven by its monitor.
    Restore(RestoreArgs),
    /// Make a checkpoint, a plain stream or a libvirt save image of any of them.
    Convert(ConvertArgs),
    /// Let a QEMU have its VM back that has switched to postcopy, after receive has failed.
    GiveBack(GiveBackArgs),
    /// Show what is in a checkpoint, a migration stream, or a recorded set of channels.
    Inspect(InspectArgs),
    /// Say what this host permits and how it is set, as far as migrations need it, and what to change.
    Doctor(DoctorArgs),
    /// Print the JSON schema of the reports.
    Schema(SchemaArgs),
    /// Write man pages and completions for shells, for packages.
    #[command(hide = true)]
    Pages(PagesArgs),
    /// Make certificates and keys for hosts that migrate among each other with TLS.
    TlsInit(TlsInitArgs),
}

impl Verb {
    /// What to print.
    pub fn output(&self) -> &OutputArgs {
        match self {
            Verb::Demo(args) => &args.output,
            Verb::Guest(args) => &args.output,
            Verb::Receive(args) => &args.output,
            Verb::Send(args) => &args.output,
            Verb::Serve(args) => &args.output,
            Verb::Checkpoint(args) => &args.output,
            Verb::Restore(args) => &args.output,
            Verb::Convert(args) => &args.output,
            Verb::GiveBack(args) => &args.output,
            Verb::Inspect(args) => &args.output,
            Verb::Doctor(args) => &args.output,
            Verb::TlsInit(args) => &args.output,
            Verb::Schema(args) => &args.output,
            Verb::Pages(args) => &args.output,
        }
    }
}

impl Verb {
    /// The name of a verb that migrates.
    pub fn name(&self) -> &'static str {
        match self {
            Verb::Demo(_) => "demo",
            Verb::Guest(_) => "guest",
            Verb::Receive(_) => "receive",
            Verb::Send(_) => "send",
            Verb::Checkpoint(_) => "checkpoint",
            Verb::Restore(_) => "restore",
            _ => "",
        }
    }

    /// What looks at the migration from the side, of verbs that migrate.
    pub fn observe(&self) -> Option<&ObserveArgs> {
        match self {
            Verb::Demo(args) => Some(&args.observe),
            Verb::Guest(args) => Some(&args.observe),
            Verb::Receive(args) => Some(&args.observe),
            Verb::Send(args) => Some(&args.observe),
            Verb::Checkpoint(args) => Some(&args.observe),
            Verb::Restore(args) => Some(&args.observe),
            _ => None,
        }
    }
}

/// Reads the command line of this process.
///
/// # Errors
/// It makes no sense, or asks for help: clap's error prints the right thing.
pub fn parse() -> Result<Cli, clap::Error> {
    let cli = Cli::try_parse()?;
    let checked = match &cli.verb {
        Verb::Demo(args) => args.check(),
        Verb::Guest(args) => args.check(),
        Verb::Send(args) => args.check(),
        Verb::Serve(args) => args.check(),
        Verb::Checkpoint(args) => args.check(),
        Verb::Restore(args) => args.check(),
        Verb::Receive(args) => args.check(),
        Verb::Convert(args) => args.check(),
        Verb::GiveBack(args) => args.check(),
        Verb::Doctor(_) | Verb::Inspect(_) | Verb::Pages(_) | Verb::Schema(_) | Verb::TlsInit(_) => Ok(()),
    };
    let checked = checked.and_then(|()| written::check(&cli.verb));
    checked.map_err(|message| Cli::command().error(ErrorKind::ValueValidation, message))?;
    Ok(cli)
}

/// Whether one JSON object is wanted of a command line that could not be read.
pub fn asks_for_json() -> bool {
    std::env::args_os().take_while(|arg| arg != "--").any(|arg| arg == "--json")
}

/// The heading of the options that say how to migrate.
const MIGRATION: &str = "Migration";

#[cfg(test)]
mod tests {
    use super::*;

    /// The demo passes its options on to its processes.
    #[test]
    fn the_processes_of_the_demo_get_its_options() {
        let read = |args: &[String]| {
            let Cli { verb } = Cli::try_parse_from(args).unwrap();
            let (Verb::Demo(DemoArgs { machine, transfer, .. }) | Verb::Guest(GuestArgs { machine, transfer, .. })) =
                verb
            else {
                panic!("another verb");
            };
            format!("{machine:?} {transfer:?}")
        };
        for options in [
            "",
            "--max-bandwidth 0 --switchover-bandwidth 10Gbit/s --max-time 0 --connect-timeout 0 --downtime-limit 0",
            "--max-bandwidth 10G --max-time 5m --connect-timeout 1.5s --compression zstd --compression-level 7",
            "--pause-timeout 5s --stall-timeout 0",
            "--tls-dir /etc/pki/qemu --tls-hostname host.example --tls-verify-peer no",
            "--channels 9 --zero-copy --zero-pages legacy --sync per-section --no-throttle --max-rounds 7 --write-rate 128M",
        ] {
            let demo: Vec<String> =
                ["multifd", "demo"].into_iter().chain(options.split_whitespace()).map(str::to_owned).collect();
            let Cli { verb: Verb::Demo(args) } = Cli::try_parse_from(&demo).unwrap() else { panic!("another verb") };
            let head = ["multifd".to_owned(), "guest".to_owned()].into_iter();
            // What is left to chance here is settled there.
            let machine = |text: String| text.replace("working_set: None", "working_set: Some(67108864)");
            let guest: Vec<String> = head.chain(args.machine.to_args()).chain(args.transfer.to_args()).collect();
            assert_eq!(machine(read(&demo)), machine(read(&guest)), "{options}");
        }
    }

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}

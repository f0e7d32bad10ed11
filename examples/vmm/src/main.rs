//! A virtual machine monitor to read in an evening, which migrates with `multifd`.
//!
//! ```text
//! vmm run [OPTIONS]            boots the guest
//! vmm receive URI [OPTIONS]    waits for one to arrive
//!
//! --cpus N --memory MIB --busy MIB --display MIB --backing anonymous|memfd|huge|huge-unreserved --seccomp on|off
//! ```
//! A VM that arrives is made as its source describes it: there, the options say what it may have at most.
//!
//! While a guest runs, commands are read from stdin: `migrate URI` moves it there, `upgrade URI` moves it to a VMM of this host
//! that takes its memory as it is (`--backing memfd` or `huge`, `unix:PATH`), `quit` ends it. What the guest writes
//! to its serial port goes to stdout: a dot for each pass over its memory, `X` if it finds anything wrong.
//!
//! Read `machine.rs` for the VM, and `migration.rs` for all that migration takes.

mod devices;
mod filter;
mod gate;
mod guest;
mod machine;
mod memory;
mod migration;
mod vcpu;

#[cfg(test)]
mod conformance;

use std::{io::BufRead, process::ExitCode, time::Duration};

use machine::{Config, Machine};
use memory::Backing;
use migration::Vm;
use multifd::{source::Downtime, transport::uri::Uri};

/// What goes wrong in a program that only has to say so.
pub type Failure = multifd::vm::VmError;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let verb = arguments.next();
    let from = match verb.as_deref() {
        Some("run") => None,
        Some("receive") => Some(arguments.next().ok_or("receive from where?")?.parse::<Uri>()?),
        _ => return Err("usage: vmm run [OPTIONS] | vmm receive URI [OPTIONS]".into()),
    };
    let (config, is_filtered) = config(arguments)?;
    if is_filtered {
        // The engine's threads inherit it; what each of them calls is a part of this list.
        filter::apply(multifd::threads::system_calls_of_run())?;
    }
    let mut vm = match from {
        None => {
            let mut vm = Vm::new(Machine::new(config)?)?;
            vm.machine.boot()?;
            vm.machine.run();
            vm
        }
        Some(uri) => migration::receive(config, &uri, |uri| eprintln!("listening at {uri}"))?,
    };
    eprintln!("running");
    console(&mut vm)
}

/// What the VM is like, and whether this process has a filter of system calls.
fn config(mut arguments: impl Iterator<Item = String>) -> Result<(Config, bool), Failure> {
    const MIB: usize = 1 << 20;
    let mut config = Config {
        cpus: 2,
        ram_bytes: 256 * MIB,
        busy_bytes: 16 * MIB,
        display_bytes: 8 * MIB,
        backing: Backing::Anonymous,
    };
    let mut is_filtered = false;
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        let mib = || value.parse::<usize>().ok().and_then(|mib| mib.checked_mul(MIB)).ok_or("not a number of MiB");
        match name.as_str() {
            "--cpus" => config.cpus = value.parse()?,
            "--memory" => config.ram_bytes = mib()?,
            "--busy" => config.busy_bytes = mib()?,
            "--display" => config.display_bytes = mib()?,
            "--backing" => config.backing = value.parse()?,
            "--seccomp" => is_filtered = value == "on",
            _ => return Err(format!("{name} is no option").into()),
        }
    }
    Ok((config, is_filtered))
}

/// Does what stdin says, until the guest has gone or is to end.
fn console(vm: &mut Vm) -> Result<(), Failure> {
    for line in std::io::stdin().lock().lines() {
        match line?.split_once(' ') {
            Some((verb @ ("migrate" | "upgrade"), uri)) => match uri.parse::<Uri>().map_err(Failure::from) {
                Ok(uri) => match migration::send(vm, &uri, verb == "upgrade") {
                    Ok(report) => {
                        eprintln!("moved to {uri}: {}", downtime(&report.downtime));
                        return Ok(());
                    }
                    Err(error) => eprintln!("not moved: {error}"),
                },
                Err(error) => eprintln!("not moved: {error}"),
            },
            _ => break,
        }
    }
    Ok(())
}

/// How long the guest was paused, and for what, in milliseconds.
fn downtime(downtime: &Downtime) -> String {
    let ms = |part: Duration| part.as_secs_f64() * 1e3;
    let Downtime { total, pause, drain, last_round, devices, confirm, .. } = *downtime;
    format!(
        "{:.2} ms of downtime (pause {:.2}, drain {:.2}, last-round {:.2}, devices {:.2}, confirm {:.2})",
        ms(total),
        ms(pause),
        ms(drain),
        ms(last_round),
        ms(devices),
        ms(confirm)
    )
}

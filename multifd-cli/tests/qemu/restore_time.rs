//! How soon a guest runs whose checkpoint is small or large: measured where `MULTIFD_RESTORE_TIMES` asks for it.

use std::{
    env, fs,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use qemu_peer::{BootGuest, Installed, Qemu, QemuBuilder, Version};
use serde_json::Value;
use test_support::{TempDir, report, skip, time_limit};

use crate::harness::{LIMIT, Multifd, Settings, migrate_away, receive_uri};

/// A VM with `mib` of memory, of which the guest writes all but the first and last MiB of `filled`.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    mib: u32,
    filled: u32,
}

const SHAPES: [Shape; 3] = [
    Shape { name: "2 GiB, all of it written", mib: 2 << 10, filled: 2 << 10 },
    Shape { name: "2 GiB, 256 MiB of it written", mib: 2 << 10, filled: 256 },
    Shape { name: "64 GiB, 256 MiB of it written", mib: 64 << 10, filled: 256 },
];

impl Shape {
    fn vm(self, installed: &Installed, machine: &str) -> QemuBuilder {
        let guest = BootGuest::filling(self.filled);
        // A host need not have as much as the VM.
        let memory = format!("memory-backend-ram,id=pc.ram,size={}M,reserve=off", self.mib);
        let arguments = ["-object", &memory, "-machine", "memory-backend=pc.ram"];
        let builder = Qemu::builder(installed).machine(machine).memory_mib(self.mib).guest(guest);
        builder.arguments(&arguments).limit(RUN_LIMIT)
    }
}

/// The time of a QEMU's event `name`, with `status` if it has one, in milliseconds since 1970.
fn time_of(qemu: &mut Qemu, name: &str, status: Option<&str>) -> f64 {
    let event = loop {
        let event = qemu.qmp().next_event(LIMIT).unwrap();
        if event.name == name && event.data["status"].as_str() == status {
            break event;
        }
    };
    let part = |name: &str| event.timestamp[name].as_f64().unwrap();
    part("seconds") * 1e3 + part("microseconds") / 1e3
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() * 1e3
}

/// Runs the checkpoint at once, `runs` times. Returns the times until the guest resumed, sorted, since QEMU took the connection
/// and since `multifd send` was started, with what `send` reports of the last one.
fn by_postcopy(
    installed: &Installed,
    machine: &str,
    shape: Shape,
    file: &Path,
    runs: usize,
) -> (Vec<f64>, Vec<f64>, Value) {
    let (mut connected, mut started, mut last) = (Vec::new(), Vec::new(), Value::Null);
    for run in 1..=runs {
        let mut qemu = shape.vm(installed, machine).incoming().start().unwrap();
        qemu.qmp().set_capabilities(&[("postcopy-ram", true), ("events", true)]).unwrap();
        let uri = format!("unix:{}", qemu.path("migration").display());
        qemu.qmp().migrate_incoming(&uri).unwrap();
        let begun = now();
        let sending = Multifd::start(["send", &file.display().to_string(), &uri, "--postcopy", "--clone"]);
        let active = time_of(&mut qemu, "MIGRATION", Some("active"));
        let resumed = time_of(&mut qemu, "RESUME", None);
        connected.push(resumed - active);
        started.push(resumed - begun);
        let output = qemu.wait_passes(2, RUN_LIMIT).unwrap();
        assert!(!output.is_corrupted(), "{output:?}");
        // The others are killed.
        if run == runs {
            last = sending.done_within(RUN_LIMIT);
            let output = qemu.wait_passes(output.passes() + 2, RUN_LIMIT).unwrap();
            assert!(!output.is_corrupted(), "{output:?}");
        }
    }
    connected.sort_by(f64::total_cmp);
    started.sort_by(f64::total_cmp);
    (connected, started, last)
}

/// Has QEMU load the file by itself, which it does before the guest runs. Returns the times until it has, sorted.
fn by_qemu_itself(installed: &Installed, machine: &str, shape: Shape, file: &Path, runs: usize) -> Vec<f64> {
    let mut times = Vec::new();
    for _ in 0..runs {
        let mut qemu = shape.vm(installed, machine).incoming().start().unwrap();
        qemu.qmp().set_capabilities(&[("mapped-ram", true), ("events", true)]).unwrap();
        let begun = now();
        qemu.qmp().migrate_incoming(&format!("file:{}", file.display())).unwrap();
        // The source was paused, so the guest does not run by itself.
        times.push(time_of(&mut qemu, "MIGRATION", Some("completed")) - begun);
    }
    times.sort_by(f64::total_cmp);
    times
}

#[test]
fn how_soon_a_guest_runs() {
    let Ok(runs) = env::var("MULTIFD_RESTORE_TIMES") else {
        return skip("how soon a guest runs is measured where MULTIFD_RESTORE_TIMES says how often");
    };
    let runs: usize = runs.parse().expect("a number");
    for version in Version::ALL {
        let Some(installed) = Installed::require(version) else { continue };
        let machine = format!("pc-q35-{}", version.name());
        for shape in SHAPES {
            time_limit(RUN_LIMIT, || {
                let dir = TempDir::new().unwrap();
                let file = dir.join("checkpoint");
                let mut source = shape.vm(&installed, &machine).start().unwrap();
                Settings::default().apply(&mut source);
                source.wait_passes(2, RUN_LIMIT).unwrap();
                source.qmp().stop().unwrap();
                let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &[]);
                migrate_away(&mut source, &uri);
                receive.done_within(RUN_LIMIT);
                drop(source);
                let line = |how: &str, times: &[f64], more: &str| {
                    let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
                    let row =
                        format!("{} {}, {how} after {median:.0} ms (most {most:.0}){more}", version.name(), shape.name);
                    report("restore times", &row);
                };
                let (connected, started, last) = by_postcopy(&installed, &machine, shape, &file, runs);
                line("--postcopy, from the connection: resumed", &connected, "");
                line(
                    "--postcopy, from the start of send: resumed",
                    &started,
                    &format!("; all there after {} ms", last["total-time"]),
                );
                if version != Version::V7_2 {
                    line("file: by QEMU: loaded", &by_qemu_itself(&installed, &machine, shape, &file, runs), "");
                }
                fs::remove_file(&file).unwrap();
            });
        }
    }
}

const RUN_LIMIT: Duration = Duration::from_secs(900);

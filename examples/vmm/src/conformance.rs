//! Everything goes wrong once while this VM migrates, and exactly one side has the guest each time.

use std::time::Duration;

use multifd::conformance::{Effort, vm_with};
use test_support::{skip, time_limit};

use crate::{
    machine::{Config, Machine},
    memory::Backing,
    migration::{Arrival, Vm},
};

const CONFIG: Config =
    Config { cpus: 2, ram_bytes: 4 << 20, busy_bytes: 64 << 10, display_bytes: 4096, backing: Backing::Anonymous };

#[test]
fn exactly_one_side_runs_whatever_goes_wrong() {
    if let Err(error) = Machine::new(CONFIG) {
        return skip(&format!("no VM can be made here: {error}"));
    }
    let source = || {
        let mut vm = Vm::new(Machine::new(CONFIG).unwrap()).unwrap();
        vm.machine.boot().unwrap();
        vm.machine.run();
        vm
    };
    // A VMM of yours would take `Effort::FULL` in a nightly run.
    let few = Effort { operations: 2 };
    let report = time_limit(Duration::from_secs(300), || {
        vm_with(few, source, || Arrival { most: CONFIG, memory: Vec::new(), vm: None })
    })
    .unwrap();
    assert!(report.at_source > 5 && report.at_destination > 1, "{report:?}");
}

//! Where the VM is when an attempt ends, and the error that says so.

use multifd_proto::channel_end::End;

use crate::{channel_end::end_by, error::Error};

/// Where the VM is, as its source knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Whereabouts {
    /// In the checkpoint only: no destination runs it.
    Here,
    /// The destination was told to run it, and has not said that it loaded the devices.
    InDoubt,
    /// At the destination, which lacks a part of its memory.
    There,
    /// At the destination, with all of its memory.
    Complete,
}

impl Whereabouts {
    /// Where the VM is after an attempt that began or was seen at `self`, whose connections ended like this before the destination had
    /// confirmed that it has everything.
    ///
    /// `loaded`: the destination has answered the PING between the devices and RUN, or asked for a page. An end of the connection
    /// says nothing, however it comes: a proxy may have ended it, and the destination may have RUN already and load the devices.
    /// Only the destination's own word says that it does not run the VM, and only as long as no vCPU ran: not to a source that
    /// `goes_on`, which it may refuse for many reasons.
    pub(super) const fn after(self, goes_on: bool, loaded: bool, end: End) -> Whereabouts {
        match (self, loaded, end) {
            (Whereabouts::InDoubt, true, _) => Whereabouts::There,
            (Whereabouts::InDoubt, false, End::Refused) if !goes_on => Whereabouts::Here,
            (vm, ..) => vm,
        }
    }
}

/// Where the VM is after an attempt that began or was seen at `vm` and failed with `error`, and the error to report.
///
/// `goes_on`: it was a recovery. `loaded`: the destination has answered the PING between the devices and RUN, or asked for a page.
/// `left`: how many pages with content it lacks, if it is known.
pub(super) fn after_failure(
    vm: Whereabouts,
    goes_on: bool,
    loaded: bool,
    left: Option<u64>,
    error: Error,
) -> (Whereabouts, Error) {
    let vm = vm.after(goes_on, loaded, end_by(&error, false));
    let error = match vm {
        Whereabouts::Here | Whereabouts::Complete => error,
        Whereabouts::InDoubt => Error::InDoubt { reason: Box::new(error) },
        Whereabouts::There => Error::Incomplete { left, reason: Box::new(error) },
    };
    (vm, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(vm: Whereabouts, loaded: bool, error: Error) -> (Whereabouts, Error) {
        after_failure(vm, false, loaded, Some(7), error)
    }

    #[test]
    fn before_run_an_error_is_only_an_error() {
        assert!(matches!(after(Whereabouts::Here, true, Error::Unconfirmed), (Whereabouts::Here, Error::Unconfirmed)));
    }

    #[test]
    fn after_run_only_its_own_word_says_that_the_vm_does_not_run_there() {
        let doubt = Whereabouts::InDoubt;
        assert!(matches!(after(doubt, false, Error::Refused { status: 1, reason: None }).0, Whereabouts::Here));
        for error in [Error::Cancelled, Error::Unconfirmed] {
            assert!(matches!(after(doubt, false, error), (Whereabouts::InDoubt, Error::InDoubt { .. })));
        }
        assert!(matches!(
            after(doubt, true, Error::Unconfirmed),
            (Whereabouts::There, Error::Incomplete { left: Some(7), .. })
        ));
        // Even if it says later that it does not have it: vCPUs ran.
        let refused = after(Whereabouts::There, false, Error::Refused { status: 1, reason: None });
        assert!(matches!(refused, (Whereabouts::There, Error::Incomplete { .. })));
    }

    #[test]
    fn only_a_word_of_the_destination_moves_a_vm_that_is_in_doubt() {
        use End::{Clean, Cut, Local, Refused, Reset, Stopped, Unreachable, Violation};
        use Whereabouts::{Complete, Here, InDoubt, There};
        for end in [Clean, Cut, Reset, Unreachable, Violation, Refused, Local, Stopped] {
            for loaded in [false, true] {
                for vm in [Here, There, Complete] {
                    assert_eq!([false, true].map(|goes_on| vm.after(goes_on, loaded, end)), [vm; 2]);
                }
            }
            // Even a refusal: vCPUs ran.
            assert_eq!([false, true].map(|goes_on| InDoubt.after(goes_on, true, end)), [There; 2]);
            assert_eq!(InDoubt.after(false, false, end), if end == Refused { Here } else { InDoubt });
            assert_eq!(InDoubt.after(true, false, end), InDoubt, "a recovery that is refused says nothing of vCPUs");
        }
    }
}

//! Where the VM is when an attempt ends, and the error that says so.

pub use multifd_proto::postcopy::Whereabouts;

use crate::{channel_end::end_by, error::Error};

/// Where the VM is after an attempt that began or was seen at `vm` and failed with `error`, and the error to report.
///
/// `loaded`: the destination has answered the PING between the devices and RUN, or asked for a page. `left`: how many pages
/// with content it lacks, if it is known.
pub(super) fn after_failure(vm: Whereabouts, loaded: bool, left: Option<u64>, error: Error) -> (Whereabouts, Error) {
    let vm = vm.after(loaded, end_by(&error, false));
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
        after_failure(vm, loaded, Some(7), error)
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
}

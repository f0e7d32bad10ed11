//! Where the VM is, by what is known when an attempt ends.

use crate::error::Error;

/// Where the VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Where the VM is after an attempt that began or was seen at `self` and failed with `error`, and the error to report.
    ///
    /// `loaded`: the destination has answered the PING between the devices and RUN, or asked for a page. `left`: how many pages
    /// with content it lacks, if it is known. An end of the connection says nothing, however it comes: a proxy may have
    /// ended it, and the destination may have RUN already and load the devices.
    pub(super) fn after_failure(self, loaded: bool, left: Option<u64>, error: Error) -> (Whereabouts, Error) {
        let vm = match self {
            Whereabouts::InDoubt if loaded => Whereabouts::There,
            Whereabouts::InDoubt if matches!(error, Error::Refused { .. }) => Whereabouts::Here,
            vm => vm,
        };
        let error = match vm {
            Whereabouts::Here | Whereabouts::Complete => error,
            Whereabouts::InDoubt => Error::InDoubt { reason: Box::new(error) },
            Whereabouts::There => Error::Incomplete { left, reason: Box::new(error) },
        };
        (vm, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(vm: Whereabouts, loaded: bool, error: Error) -> (Whereabouts, Error) {
        vm.after_failure(loaded, Some(7), error)
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

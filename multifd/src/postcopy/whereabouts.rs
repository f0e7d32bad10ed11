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

/// What an attempt has shown when it ends.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Evidence {
    /// The destination has answered the PING between the devices and RUN, or asked for a page.
    pub(super) loaded: bool,
    /// The destination ended main after its last answer, and no byte sent to it was refused before that: nothing it said
    /// was lost.
    pub(super) closed: bool,
}

impl Whereabouts {
    /// Where the VM is after an attempt that began or was seen at `self` and failed with `error`, and the error to report.
    /// `left`: how many pages with content the destination lacks, if it is known.
    pub(super) fn after_failure(self, evidence: Evidence, left: Option<u64>, error: Error) -> (Whereabouts, Error) {
        let vm = match (self, evidence) {
            (Whereabouts::InDoubt, Evidence { loaded: true, .. }) => Whereabouts::There,
            // Main carries the answers in their order. It ended without the one that precedes RUN.
            (Whereabouts::InDoubt, Evidence { closed: true, .. }) => Whereabouts::Here,
            (Whereabouts::InDoubt, _) if matches!(error, Error::Refused { .. }) => Whereabouts::Here,
            (vm, _) => vm,
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

    fn after(vm: Whereabouts, evidence: Evidence, error: Error) -> (Whereabouts, Error) {
        vm.after_failure(evidence, Some(7), error)
    }

    #[test]
    fn before_run_an_error_is_only_an_error() {
        let all = Evidence { loaded: true, closed: true };
        assert!(matches!(after(Whereabouts::Here, all, Error::Unconfirmed), (Whereabouts::Here, Error::Unconfirmed)));
    }

    #[test]
    fn after_run_only_evidence_says_that_the_vm_does_not_run_there() {
        let evidence = |loaded, closed| Evidence { loaded, closed };
        let doubt = Whereabouts::InDoubt;
        assert!(matches!(after(doubt, evidence(false, true), Error::Unconfirmed).0, Whereabouts::Here));
        assert!(matches!(
            after(doubt, evidence(false, false), Error::Refused { status: 1, reason: None }).0,
            Whereabouts::Here
        ));
        assert!(matches!(
            after(doubt, evidence(false, false), Error::Cancelled),
            (Whereabouts::InDoubt, Error::InDoubt { .. })
        ));
        for closed in [false, true] {
            assert!(matches!(
                after(doubt, evidence(true, closed), Error::Unconfirmed),
                (Whereabouts::There, Error::Incomplete { left: Some(7), .. })
            ));
        }
        // Even if it says later that it does not have it: vCPUs ran.
        let refused = after(Whereabouts::There, evidence(false, true), Error::Refused { status: 1, reason: None });
        assert!(matches!(refused, (Whereabouts::There, Error::Incomplete { .. })));
    }
}

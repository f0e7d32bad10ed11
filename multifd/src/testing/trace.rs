//! Records the steps of a migration, and holds those of a destination to the round law.

// Loom's tests are of parts, which take no steps.
#![cfg_attr(loom, allow(dead_code))]

use std::fmt;

use crate::{
    round::trace::Step,
    sync::{Arc, Mutex, lock},
};

/// Records the steps of one migration, of both sides if both have the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace(Option<Arc<Mutex<Vec<Step>>>>);

impl Trace {
    pub(crate) fn recording() -> Trace {
        Trace(Some(Arc::new(Mutex::new(Vec::new()))))
    }

    pub(crate) fn step(&self, step: impl FnOnce() -> Step) {
        if let Some(steps) = &self.0 {
            lock(steps).push(step());
        }
    }

    /// The steps so far.
    pub(crate) fn steps(&self) -> Vec<Step> {
        self.0.as_ref().map(|steps| lock(steps).clone()).unwrap_or_default()
    }
}

/// A step that the machine does not allow, with all that led to it.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) prefix: Vec<Step>,
    /// The guard that it breaks.
    pub(crate) guard: &'static str,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} is not allowed ({}):", self.prefix.len(), self.guard)?;
        self.prefix.iter().try_for_each(|step| write!(f, "\n    {step:?}"))
    }
}

/// The guard that is the round law.
pub(super) const BEHIND_BARRIER: &str = "all connections have passed the barrier behind its last sync point";

/// Checks the steps of a destination whose source may do anything: behind the set-up, no connection goes on before every connection that
/// takes part has passed the sync point.
#[cfg(any(all(test, not(any(loom, shuttle))), feature = "__fuzzing"))]
pub(crate) fn check_destination(steps: &[Step]) -> Result<(), Refused> {
    use std::collections::BTreeMap;

    use multifd_proto::rounds::Party;

    let mut taken: BTreeMap<Option<u8>, u64> = BTreeMap::new();
    let connection = |party: &Party| match party {
        Party::Main => None,
        Party::Channel(id) => Some(id.0),
    };
    for step in steps {
        if let Step::Arrive(party) | Step::Apply(party, _) = step {
            taken.insert(connection(party), 0);
        }
    }
    for (index, step) in steps.iter().enumerate() {
        let (Step::Arrive(party) | Step::Apply(party, _)) = step else { continue };
        let ours = taken[&connection(party)];
        if ours > 1 && taken.values().any(|&others| others < ours) {
            return Err(Refused { prefix: steps[..=index].to_vec(), guard: BEHIND_BARRIER });
        }
        if let Step::Arrive(_) = step {
            taken.insert(connection(party), ours + 1);
        }
    }
    Ok(())
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::{ChannelId, rounds::Party};

    use super::*;

    #[test]
    fn a_destination_alone_is_held_to_the_barrier() {
        use Step::*;
        let [a, b] = [0, 1].map(|id| Party::Channel(ChannelId(id)));
        let main = Party::Main;
        let steps =
            [Arrive(a), Arrive(main), Apply(a, vec![1]), Arrive(a), Arrive(b), Arrive(main), Apply(main, vec![2])];
        check_destination(&steps[..6]).unwrap();
        let refused = check_destination(&steps).unwrap_err();
        assert_eq!((refused.guard, refused.prefix.len()), (BEHIND_BARRIER, 7));
        check_destination(&[&steps[..6], &[Arrive(b)], &steps[6..]].concat()).unwrap();
    }
}

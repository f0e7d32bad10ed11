//! What both ends agree on before the first page: the extensions of a destination of ours, and what the VMMs tell each other.

use multifd_proto::extension::Extension;

use super::{Peer, Run};
use crate::{
    error::Error,
    vm::{MAX_DESCRIPTION, SourceVm},
};

impl Run {
    /// Waits for what a destination of ours takes of the offer, hands memory over, and has it make its VM. A QEMU is asked nothing.
    pub(super) fn propose(&mut self, vm: &mut dyn SourceVm) -> Result<(), Error> {
        if self.shared.options.peer == Peer::Multifd {
            self.extensions = self.return_path().wait_for_agreement()?;
        }
        self.hand_over()?;
        if !self.extensions.contains(Extension::Prepare) {
            return Ok(());
        }
        let description = vm.describe().map_err(Error::vm("describe itself"))?;
        let Some(len) = u32::try_from(description.len()).ok().filter(|len| *len <= MAX_DESCRIPTION) else {
            let text = format!("the description has {} bytes, at most {MAX_DESCRIPTION} are sent", description.len());
            return Err(Error::vm("describe itself")(text.into()));
        };
        self.return_path().expect_prepared();
        self.main().describe(len, &description)
    }

    /// Waits until the destination has made its VM, and tells `vm` its answer.
    pub(super) fn agree(&mut self, vm: &mut dyn SourceVm) -> Result<(), Error> {
        if !self.extensions.contains(Extension::Prepare) {
            return Ok(());
        }
        let answer = self.return_path().wait_for_prepared()?;
        vm.agreed(&answer).map_err(Error::vm("take the destination's answer"))
    }
}

//! What a guest says of itself in the end.

use multifd_guest::{guest::Status, pattern::CheckReport};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Session, State};
use crate::{
    exit::Exit,
    report::{Outcome, fields, millis},
    table,
};

/// What the guest found out about itself while it was here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Account {
    /// Passes over its memory when it came, or when the last attempt to migrate it ended.
    pub guest_passes_before: u64,
    /// The same at the end.
    pub guest_passes_after: u64,
    /// What the guest found wrong itself.
    pub guest_errors: u64,
    /// Pages compared with what they have to be, at the end.
    pub pages_checked: u64,
    /// How many of them were different.
    pub pages_wrong: u64,
    /// The pause as the guest saw it, in milliseconds: from the moment at which it stopped at the source until each of its CPUs had
    /// written a page here, without `verify-time`. Of a guest that came and writes, by the clocks of both hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_pause: Option<f64>,
    /// The longest that one of its CPUs took for a few pages in the first second here, waiting included, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_longest_wait: Option<f64>,
}

/// The comparison with the source's digests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Compared {
    /// All pages of all blocks.
    pub pages_compared: u64,
    /// How many of them were different.
    pub pages_different: u64,
    /// The first of those.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<(String, u64)>,
}

impl Session<'_> {
    /// Stops the guest, where it is ours, looks at all of its memory, and reports.
    pub(super) fn finish(mut self) -> Outcome {
        let mut text = String::new();
        if self.state == State::Migrated {
            text.push_str("The guest has left.\n");
            self.details.iter().for_each(|line| text.push_str(&format!("  {line}\n")));
        }
        let mut outcome = Outcome::done(std::mem::take(&mut self.report), text);
        if let Some((exit, message)) = self.failure.take() {
            outcome.exit = exit;
            outcome.error = Some(message);
        }
        if matches!(self.state, State::Running | State::Stopped) {
            match self.account() {
                Ok((account, check)) => {
                    outcome.report.extend(fields(&account));
                    self.judge(&account, &check, &mut outcome);
                }
                Err(message) => {
                    outcome.exit = Exit::Failed;
                    outcome.error = Some(message);
                }
            }
        }
        if let Some(compared) = &self.compared {
            outcome.report.extend(fields(compared));
        }
        outcome
    }

    /// What became of the guest.
    fn account(&mut self) -> Result<(Account, CheckReport), String> {
        let guest = self.guest.as_mut().ok_or("a migration has the guest")?;
        guest.stop().map_err(|error| error.to_string())?;
        let check = guest.check_all().map_err(|error| error.to_string())?;
        let registers = guest.registers_agree().map_err(|error| error.to_string())?;
        let status: Status = self.monitor.status();
        if let Some(failure) = status.failure {
            return Err(format!("a CPU of the guest has ended: {failure}"));
        }
        let account = Account {
            guest_passes_before: self.passes_before,
            guest_passes_after: status.passes,
            guest_errors: status.guest_errors() + u64::from(!registers),
            pages_checked: check.pages_compared,
            pages_wrong: check.pages_different,
            guest_pause: guest.view().map(|view| millis(view.pause)),
            guest_longest_wait: guest.view().map(|view| millis(view.longest_wait)),
        };
        Ok((account, check))
    }

    /// Says in words what the figures mean, and whether they are bad.
    fn judge(&self, account: &Account, check: &CheckReport, outcome: &mut Outcome) {
        let Account { guest_passes_before, guest_passes_after, guest_errors, .. } = account;
        outcome.text.push_str(&format!(
            "The guest went over its memory in passes {guest_passes_before} to {guest_passes_after} here and found {guest_errors} \
             errors; {} of {} pages have wrong contents.\n",
            table::grouped(account.pages_wrong),
            table::grouped(account.pages_checked),
        ));
        if let (Some(pause), Some(wait)) = (account.guest_pause, account.guest_longest_wait) {
            outcome.text.push_str(&format!(
                "It saw a pause of {} on its way here, and waited for {} at most in the second after.\n",
                table::milliseconds(pause),
                table::milliseconds(wait)
            ));
        }
        let mut wrong = Vec::new();
        if *guest_errors > 0 {
            wrong.push(format!("the guest found {guest_errors} errors in its memory or registers"));
        }
        if account.pages_wrong > 0 {
            wrong.push(check.to_string());
        }
        if let Some(compared) = self.compared.as_ref().filter(|compared| compared.pages_different > 0) {
            let Compared { pages_compared, pages_different, differences } = compared;
            wrong.push(format!(
                "{pages_different} of {pages_compared} pages differ from the source, the first of them {differences:?}"
            ));
        }
        if let Some(audit) = &self.audit {
            outcome.text.push_str(&format!("{}.\n", audit.text()));
            wrong.extend((audit.stale_writes > 0).then(|| audit.text()));
        }
        if !wrong.is_empty() {
            outcome.exit = Exit::Different;
            outcome.error = Some(wrong.join("; "));
        }
    }
}

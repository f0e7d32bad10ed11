//! What a host permits and how it is set, as far as migrations need it: one [`Check`] for each thing that the engine uses.
//!
//! Settings are read from files below a root, which a test replaces; what only the kernel can say is [`Asked`] before. A file that
//! cannot be read, or says something unexpected, makes its check [`NotKnown`](State::NotKnown) and never ok.

mod asked;
mod limits;
mod memory;
mod network;
mod settings;
mod tracking;

use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;

pub use self::asked::Asked;
use self::settings::Settings;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Check {
    /// Its name, which stays the same.
    pub name: &'static str,
    /// What came out.
    pub state: State,
    /// What was found, in words.
    pub found: String,
    /// What to do, where it is not ok.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// What came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// As migrations need it.
    Ok,
    /// Something is slower, or does not work.
    Warning,
    /// It could not be found out.
    NotKnown,
}

impl Check {
    /// All is well.
    pub fn ok(name: &'static str, found: impl Into<String>) -> Check {
        Check { name, state: State::Ok, found: found.into(), advice: None }
    }

    /// Something should be changed.
    pub fn warning(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Check {
        Check { name, state: State::Warning, found: found.into(), advice: Some(advice.into()) }
    }

    /// It could not be found out.
    pub fn not_known(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Check {
        Check { name, state: State::NotKnown, found: found.into(), advice: Some(advice.into()) }
    }

    /// For a person.
    pub fn line(&self) -> String {
        let state = match self.state {
            State::Ok => "ok",
            State::Warning => "warning",
            State::NotKnown => "not known",
        };
        let advice = self.advice.iter().map(|advice| format!("; {advice}")).collect::<String>();
        format!("{state:<9}  {:<22} {}{advice}\n", self.name, self.found)
    }
}

/// Looks at a host whose files are below `root`, and which answered as in `asked`.
pub fn checks(root: &Path, asked: &Asked) -> Vec<Check> {
    let settings = Settings::below(root);
    vec![
        tracking::kvm(asked),
        tracking::userfaultfd(asked),
        tracking::pagemap_scan(asked),
        memory::private(&settings),
        memory::shared(&settings),
        memory::mappings(&settings),
        limits::open_files(asked),
        limits::zero_copy(&settings, asked),
        network::tcp_buffers(&settings),
        network::local_buffers(&settings),
        network::listen_queue(&settings),
        network::vsock(asked),
    ]
}

#[cfg(test)]
mod tests;

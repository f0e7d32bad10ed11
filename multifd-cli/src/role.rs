//! Which side of a migration this process is.

/// Which side of a migration this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The guest leaves.
    Source,
    /// The guest comes.
    Destination,
}

impl Role {
    /// The word for it in metrics, the log and reports.
    pub fn name(self) -> &'static str {
        match self {
            Role::Source => "source",
            Role::Destination => "destination",
        }
    }
}

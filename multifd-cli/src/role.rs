//! Which side of a migration this process is.

/// Which side of a migration this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The guest leaves.
    Source,
    /// The guest comes.
    Destination,
}

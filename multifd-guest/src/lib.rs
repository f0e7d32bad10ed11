//! Self-checking guests.

//! The guarantee in one room: what ends a round, what hands its pages out, what checks that no round overtakes another.

pub(crate) mod audit;
pub(crate) mod barrier;
pub(crate) mod device_trace;
pub(crate) mod discarded;
pub(crate) mod scan;
pub(crate) mod trace;

//! What only tests need: connections that stay in the process or fail as planned, a VM without a CPU, defects to be found.
//!
//! Authors of VMMs get [`memory`] and [`faulty`] for tests of their own, with the feature `conformance`.

/// Implements [`RecvHalf`](crate::transport::RecvHalf) for a connection of a test by the one in its field `inner`.
#[cfg(all(test, not(loom)))]
macro_rules! receives_as_inner {
    ($type:ty $(, $($parameter:tt)+)?) => {
        impl$(<$($parameter)+>)? crate::transport::RecvHalf for $type {
            fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
                self.inner.read(buf)
            }

            fn read_pages(&mut self, pages: &[crate::ram::GuestRange<'_>]) -> std::io::Result<()> {
                self.inner.read_pages(pages)
            }

            fn interrupter(&mut self) -> std::io::Result<Box<dyn crate::transport::Stopper>> {
                self.inner.interrupter()
            }
        }
    };
}

#[cfg(feature = "__bench")]
#[doc(hidden)]
pub mod bench;
#[cfg(any(test, feature = "__broken-variants"))]
pub mod broken;
#[cfg(any(test, feature = "conformance"))]
pub mod faulty;
#[cfg(all(feature = "__fuzzing", not(any(loom, shuttle))))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(any(test, feature = "conformance", feature = "__fuzzing"))]
pub mod memory;
#[cfg(any(test, feature = "__fuzzing"))]
pub(crate) mod trace;

#[cfg(all(test, feature = "tls", not(any(loom, shuttle))))]
pub(crate) mod certificates;
#[cfg(all(test, not(any(loom, shuttle))))]
mod close_order;
#[cfg(all(test, not(any(loom, shuttle))))]
mod convergence;
#[cfg(all(test, not(loom)))]
mod device_machine;
#[cfg(all(test, not(any(loom, shuttle))))]
mod distance;
#[cfg(all(test, not(any(loom, shuttle))))]
mod excluded;
#[cfg(all(test, not(loom)))]
mod far;
#[cfg(all(test, not(any(loom, shuttle))))]
mod faults;
#[cfg(all(test, not(loom)))]
mod hand_over;
#[cfg(all(test, not(loom)))]
mod handed_over;
#[cfg(all(test, not(any(loom, shuttle))))]
mod live_state;
#[cfg(all(test, loom))]
pub(crate) mod loom;
#[cfg(all(test, not(loom)))]
mod machine;
#[cfg(all(test, not(any(loom, shuttle))))]
mod main_alone;
#[cfg(all(test, not(any(loom, shuttle))))]
mod migrations;
#[cfg(all(test, not(any(loom, shuttle))))]
mod openings;
#[cfg(all(test, not(any(loom, shuttle))))]
mod postponed;
#[cfg(all(test, not(any(loom, shuttle))))]
pub(crate) mod registered;
#[cfg(all(test, shuttle))]
mod shuttle;
#[cfg(all(test, shuttle))]
mod shuttle_postcopy;
#[cfg(all(test, not(any(loom, shuttle))))]
mod spread;
#[cfg(all(test, not(any(loom, shuttle))))]
mod state_packets;
#[cfg(all(test, not(any(loom, shuttle))))]
mod steering;
#[cfg(all(test, not(any(loom, shuttle))))]
mod transports;
#[cfg(all(test, not(loom)))]
pub(crate) mod vm;
#[cfg(all(test, not(any(loom, shuttle))))]
mod written;

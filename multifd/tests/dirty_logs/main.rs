//! The dirty logs of the kernel, under the suite that all logs pass.

mod memory;
mod uffd;
mod untouched;

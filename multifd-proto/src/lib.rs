//! The wire format of QEMU multifd migration streams.

//! A real QEMU as test peer.

//! Fuzzes `save_image` of `fuzz-bodies`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz_bodies::run("save_image", input));

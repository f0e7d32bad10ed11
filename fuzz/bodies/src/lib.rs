//! What each fuzz target does with its input.
//!
//! A target is a plain function that panics when a property does not hold, so that it runs under a fuzzer and in an
//! ordinary test alike. Each has a corpus to begin with, made from recorded QEMU streams and by our own encoders.

#![deny(unsafe_code)]

mod codecs;
mod destination;
mod files;
mod mutate;
mod postcopy;
mod save_image;
mod seeds;

pub use self::mutate::Mutator;

/// A target: its name, what it does, and its corpus.
pub struct Target {
    /// The name, which is also that of the fuzzer's binary.
    pub name: &'static str,
    /// Panics where the input shows a defect.
    pub body: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// How many mutated inputs a plain test tries.
    pub tries: usize,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "packet", body: codecs::packet, seeds: seeds::packets, tries: 20_000 },
    Target { name: "main_stream", body: codecs::main_stream, seeds: seeds::mains, tries: 3_000 },
    Target { name: "return_path", body: codecs::return_path, seeds: seeds::return_paths, tries: 20_000 },
    Target { name: "postcopy", body: postcopy::postcopy, seeds: postcopy::seeds, tries: 20_000 },
    Target { name: "vmdesc", body: codecs::vmdesc, seeds: seeds::vmdescs, tries: 1_000 },
    Target { name: "mapped_ram", body: files::mapped_ram, seeds: seeds::files, tries: 2_000 },
    Target { name: "save_image", body: save_image::save_image, seeds: save_image::seeds, tries: 20_000 },
    Target { name: "decompress", body: codecs::decompress, seeds: seeds::payloads, tries: 3_000 },
    Target { name: "inspect", body: files::inspect, seeds: seeds::recordings, tries: 3_000 },
    Target { name: "destination", body: destination::destination, seeds: seeds::scripts, tries: 1_500 },
];

/// Runs the target called `name`, for the fuzzer's binaries.
///
/// # Panics
/// If there is no such target, and where the input shows a defect.
pub fn run(name: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of that name");
    (target.body)(input);
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use test_support::{report, time_limit};

    use super::*;

    /// The same inputs on every machine: what a fuzzer once finds belongs here as a seed.
    fn run_without_fuzzer(name: &str) {
        let target = TARGETS.iter().find(|target| target.name == name).unwrap();
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty());
        for seed in &seeds {
            (target.body)(seed);
        }
        let mut mutator = Mutator::new(1, &seeds);
        let (begin, mut tries) = (Instant::now(), 0);
        while tries < target.tries && begin.elapsed() < LONGEST {
            let input = mutator.input();
            time_limit(Duration::from_secs(60), || (target.body)(&input));
            tries += 1;
        }
        report("fuzz bodies", &format!("{name}: {} seeds, {tries} mutated inputs, no finding", seeds.len()));
        assert!(tries > 50, "only {tries} in {LONGEST:?}");
    }

    const LONGEST: Duration = Duration::from_secs(20);

    #[test]
    fn packet() {
        run_without_fuzzer("packet");
    }

    #[test]
    fn main_stream() {
        run_without_fuzzer("main_stream");
    }

    #[test]
    fn return_path() {
        run_without_fuzzer("return_path");
    }

    #[test]
    fn postcopy() {
        run_without_fuzzer("postcopy");
    }

    #[test]
    fn vmdesc() {
        run_without_fuzzer("vmdesc");
    }

    #[test]
    fn mapped_ram() {
        run_without_fuzzer("mapped_ram");
    }

    #[test]
    fn save_image() {
        run_without_fuzzer("save_image");
    }

    #[test]
    fn decompress() {
        run_without_fuzzer("decompress");
    }

    #[test]
    fn inspect() {
        run_without_fuzzer("inspect");
    }

    #[test]
    fn destination() {
        run_without_fuzzer("destination");
    }

    #[test]
    fn every_target_is_run_by_a_test_of_its_name() {
        assert_eq!(TARGETS.len(), 10, "a new target needs a test above");
    }
}

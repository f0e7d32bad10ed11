//! Decides for one channel, packet by packet, whether compressing pays.
//!
//! It pays while compressing and sending what comes out takes less time than sending the pages as they are. Both are
//! measured, in seconds per byte of guest memory, with what bytes cost below a bandwidth limit. The cost of the way in use
//! follows each packet. That of the other way is learnt in trials, and a trial has to be paid for before the next: what it
//! took longer than the way in use would have, or what the compressor took, is at most [`BUDGET`] of the time of all
//! packets.
//!
//! Nothing is concluded from the speed of the connection in one way about the other: where the packets are compressed,
//! buffers take what comes because little comes, or a destination that decompresses slowly makes the connection look slow.
//! So a trial is several packets, and only the second half of them counts.

use std::time::Duration;

use multifd_proto::ChannelId;

/// The decision of one channel.
#[derive(Clone, Debug, Default)]
pub(super) struct AutoCompression {
    compressing: bool,
    trial: Option<Trial>,
    /// Whether a trial has ended since the way changed.
    tried: bool,
    /// Packets since the last trial ended or the way changed.
    settled: u32,
    /// Seconds that trials have cost, as far as they are not yet paid for.
    debt: f64,
    /// Seconds per guest byte that is sent as it is.
    plain: Mean,
    /// Seconds per guest byte that is compressed, the compressor's among them.
    packed: Mean,
    /// Seconds of the compressor per guest byte.
    compressor: Mean,
    /// Bytes that come out per guest byte.
    ratio: Mean,
    counts: Counts,
}

/// What a packet took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    /// Bytes of its pages.
    pub(super) guest_bytes: usize,
    /// What compressing them took, and how many bytes came out.
    pub(super) compressed: Option<(Duration, usize)>,
    /// What sending took, with its part of the bandwidth limit.
    pub(super) link: Duration,
}

/// Packets that are sent the other way, to see what that takes.
#[derive(Clone, Copy, Debug, Default)]
struct Trial {
    packets: u32,
    guest_bytes: f64,
    seconds: f64,
    /// Seconds per byte of the fastest packet, and of the compressor where it was fastest.
    least: f64,
    least_compress: f64,
    /// Of the second half.
    counted_bytes: f64,
    counted_seconds: f64,
}

/// An average in which old measurements fade.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    value: f64,
    samples: u32,
    /// Values far above it, one after the other.
    outliers: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    packets_plain: u64,
    packets_compressed: u64,
    guest_bytes: u64,
    compressed_bytes: u64,
    compress_seconds: f64,
    switches: u64,
}

impl AutoCompression {
    /// Whether to compress the next packet, which has `guest_bytes` of pages.
    pub(super) fn compresses(&mut self, guest_bytes: usize) -> bool {
        if guest_bytes < LEAST {
            return self.compressing;
        }
        if self.trial.is_none() && self.trial_is_due() {
            self.trial = Some(Trial::default());
        }
        self.compressing != self.trial.is_some()
    }

    /// Takes note of what the packet took, and decides.
    pub(super) fn sent(&mut self, sent: Sent) {
        self.counts.add(&sent);
        if sent.guest_bytes < LEAST {
            return;
        }
        let bytes = sent.guest_bytes as f64;
        let link = sent.link.as_secs_f64();
        let compress = sent.compressed.map_or(0.0, |(took, _)| took.as_secs_f64());
        if let Some(trial) = &mut self.trial {
            trial.add(bytes, compress, link);
            match sent.compressed {
                Some((_, out)) => {
                    self.packed = trial.cost();
                    self.compressor = Mean::of(compress / bytes);
                    self.ratio = Mean::of(out as f64 / bytes);
                }
                None => self.plain = trial.cost(),
            }
            self.end_trial();
        } else {
            match sent.compressed {
                Some((_, out)) => {
                    self.packed.add((compress + link) / bytes);
                    self.compressor.add(compress / bytes);
                    self.ratio.add(out as f64 / bytes);
                }
                None => self.plain.add(link / bytes),
            }
            self.settled = self.settled.saturating_add(1);
            self.debt = (self.debt - BUDGET * (compress + link)).max(0.0);
        }
        if self.compressing && self.trial.is_none() && self.packed.value > KEEP * self.plain.value {
            self.change();
        }
    }

    /// What it did, and why.
    pub(super) fn report(&self, channel: ChannelId) -> ChannelCompression {
        let counts = self.counts;
        let compressed = counts.packets_compressed > 0;
        ChannelCompression {
            channel,
            packets_plain: counts.packets_plain,
            packets_compressed: counts.packets_compressed,
            switches: counts.switches,
            ratio: (compressed && counts.compressed_bytes > 0)
                .then(|| counts.guest_bytes as f64 / counts.compressed_bytes as f64),
            compressor_speed: (compressed && counts.compress_seconds > 0.0)
                .then(|| counts.guest_bytes as f64 / counts.compress_seconds),
            plain_speed: (self.plain.value > 0.0).then(|| 1.0 / self.plain.value),
            compresses: self.compressing,
            reason: self.reason(),
        }
    }

    /// Whether the other way is to be tried now.
    fn trial_is_due(&self) -> bool {
        let paid = self.debt == 0.0;
        match (self.compressing, self.packed.samples) {
            // The first packets fill the buffers.
            (_, 0) => self.settled >= FIRST,
            // A change may have been an error.
            (true, _) => paid && self.settled >= if self.tried { BETWEEN } else { SOON },
            (false, _) => paid && self.settled >= BETWEEN || self.settled >= SOON && self.packed_is_faster(),
        }
    }

    /// Ends the trial, if it is over, and takes the other way where it was faster.
    fn end_trial(&mut self) {
        let Some(trial) = self.trial else { return };
        let expected = if self.compressing { self.packed.value } else { self.plain.value };
        let mean = trial.guest_bytes / f64::from(trial.packets);
        // Longer than most of it would have taken the other way: no need to see the rest.
        let is_worse = trial.seconds > expected * mean * f64::from(TRIAL / 2);
        if trial.packets < TRIAL && !(is_worse && (self.compressing || trial.packets > 1)) {
            return;
        }
        // A packet that waited for a processor says nothing about the next trial, so the fastest counts for all. A
        // compressor may cost no time where it runs while the buffers empty themselves, but never no processor.
        self.debt += (trial.least - expected).max(trial.least_compress) * trial.guest_bytes;
        self.trial = None;
        self.tried = true;
        self.settled = 0;
        if !self.compressing && self.packed_is_faster() {
            self.change();
        }
    }

    fn change(&mut self) {
        self.compressing = !self.compressing;
        self.counts.switches += 1;
        self.settled = 0;
        self.tried = false;
    }

    fn packed_is_faster(&self) -> bool {
        self.packed_cost() < GAIN * self.plain.value
    }

    /// What compressing costs: as measured, and no less than the connection needs now.
    fn packed_cost(&self) -> f64 {
        self.packed.value.max(self.ratio.value * self.plain.value)
    }

    fn reason(&self) -> String {
        if self.packed.samples == 0 {
            return "too few pages to try: sent as they are".to_owned();
        }
        let millis = |seconds_per_byte: f64| format!("{:.2} ms", seconds_per_byte * 1e3 * MIB);
        // The last packet may have been slower than the fastest trial.
        let compressor = millis(self.compressor.value.min(self.packed.value));
        match self.compressing {
            true => format!(
                "compressed in the end: a MiB takes {} ({compressor} of them to compress), as it is {}",
                millis(self.packed.value),
                millis(self.plain.value)
            ),
            false => format!(
                "sent as they are in the end: a MiB takes {}, compressed {} ({compressor} of them to compress)",
                millis(self.plain.value),
                millis(self.packed_cost())
            ),
        }
    }
}

impl Trial {
    fn add(&mut self, guest_bytes: f64, compress: f64, link: f64) {
        let seconds = compress + link;
        self.packets += 1;
        self.guest_bytes += guest_bytes;
        self.seconds += seconds;
        self.least = if self.packets > 1 { self.least.min(seconds / guest_bytes) } else { seconds / guest_bytes };
        let compress = compress / guest_bytes;
        self.least_compress = if self.packets > 1 { self.least_compress.min(compress) } else { compress };
        if self.packets > TRIAL / 2 {
            self.counted_bytes += guest_bytes;
            self.counted_seconds += seconds;
        }
    }

    /// Seconds per byte: of the second half, or of the fastest packet where it did not get that far.
    fn cost(&self) -> Mean {
        let counted = self.counted_bytes > 0.0;
        Mean::of(if counted { self.counted_seconds / self.counted_bytes } else { self.least })
    }
}

impl Mean {
    fn of(value: f64) -> Mean {
        Mean { value, samples: 1, outliers: 0 }
    }

    /// A packet that waited for a processor says little about the connection, so values far above the average count
    /// only if several follow each other, and then alone.
    fn add(&mut self, value: f64) {
        self.samples = self.samples.saturating_add(1);
        self.outliers = if value > OUTLIER * self.value { self.outliers + 1 } else { 0 };
        if self.samples <= FIRST || self.outliers == 0 {
            self.value += (value - self.value) * (1.0 / f64::from(self.samples)).max(WEIGHT);
        } else if self.outliers == OUTLIERS {
            *self = Mean::of(value);
        }
    }
}

impl Counts {
    fn add(&mut self, sent: &Sent) {
        match sent.compressed {
            Some((took, out)) => {
                self.packets_compressed += 1;
                self.guest_bytes += sent.guest_bytes as u64;
                self.compressed_bytes += out as u64;
                self.compress_seconds += took.as_secs_f64();
            }
            None => self.packets_plain += 1,
        }
    }
}

/// What a channel made of the choice to compress, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelCompression {
    /// Which channel.
    pub channel: ChannelId,
    /// Packets whose pages were sent as they are.
    pub packets_plain: u64,
    /// Packets whose pages were compressed.
    pub packets_compressed: u64,
    /// How often it changed from one way to the other. Trials are not counted.
    pub switches: u64,
    /// Bytes of guest memory for a byte that came out of the compressor; none where nothing was compressed.
    pub ratio: Option<f64>,
    /// Bytes of guest memory that the compressor took per second.
    pub compressor_speed: Option<f64>,
    /// Bytes per second that the connection took when pages were last sent as they are, with what they cost below
    /// the bandwidth limit.
    pub plain_speed: Option<f64>,
    /// Whether it compressed in the end.
    pub compresses: bool,
    /// Why, as a sentence with the speeds that decided.
    pub reason: String,
}

/// Which part of the time trials may cost.
const BUDGET: f64 = 0.02;
/// Packets between two trials, at least.
const BETWEEN: u32 = 16;
/// The same where there is a reason.
const SOON: u32 = 4;
/// Packets before the first trial.
const FIRST: u32 = 2;
/// Packets of a trial: 4 MiB, more than the buffers of a connection within this machine.
const TRIAL: u32 = 8;
/// Compressing begins where it takes less than this part of the time, so that noise does not decide.
const GAIN: f64 = 0.95;
/// It ends where it takes more than this part. Where both take the same time, not compressing leaves the processor alone.
const KEEP: f64 = 0.98;
/// Smaller packets are not measured: what they take is mostly the calls.
const LEAST: usize = 128 << 10;
/// What the newest measurement counts for.
const WEIGHT: f64 = 1.0 / 8.0;
/// Far above the average.
const OUTLIER: f64 = 4.0;
/// So many in a row are no outliers.
const OUTLIERS: u32 = 3;
const MIB: f64 = 1048576.0;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const PACKET: usize = 512 << 10;

    /// A compressor and a connection with a buffer, in time that nobody waits for. Speeds in bytes per second.
    #[derive(Clone, Copy)]
    struct World {
        compressor: f64,
        ratio: f64,
        link: f64,
        buffer: f64,
        /// What is in the buffer.
        queued: f64,
    }

    const FAST_LINK: f64 = 2e9;
    const SLOW_LINK: f64 = 50e6;
    const INCOMPRESSIBLE: World = World { compressor: 1e9, ratio: 1.0, link: FAST_LINK, buffer: 2e6, queued: 0.0 };
    const COMPRESSIBLE: World = World { compressor: 5e8, ratio: 0.4, link: SLOW_LINK, buffer: 2e6, queued: 0.0 };

    impl World {
        /// Sends a packet.
        fn send(&mut self, compress: bool) -> Sent {
            let (took, out) = match compress {
                true => (PACKET as f64 / self.compressor, PACKET as f64 * self.ratio),
                false => (0.0, PACKET as f64),
            };
            self.queued = (self.queued - took * self.link).max(0.0);
            let copy = out / MEMORY;
            let wait = ((self.queued + out - self.buffer) / self.link).max(0.0).max(copy);
            self.queued = (self.queued + out - wait * self.link).max(0.0);
            let compressed = compress.then(|| (Duration::from_secs_f64(took), out as usize));
            Sent { guest_bytes: PACKET, compressed, link: Duration::from_secs_f64(wait) }
        }

        /// Sends `packets`, as `auto` decides. Returns the seconds, and how many packets were compressed.
        fn run(&mut self, auto: &mut AutoCompression, packets: u32) -> (f64, u32) {
            let (mut seconds, mut compressed) = (0.0, 0);
            for _ in 0..packets {
                let compress = auto.compresses(PACKET);
                let sent = self.send(compress);
                seconds += sent.seconds();
                compressed += u32::from(compress);
                auto.sent(sent);
            }
            (seconds, compressed)
        }

        /// The seconds of `packets` that are all sent one way.
        fn always(mut self, compress: bool, packets: u32) -> f64 {
            (0..packets).map(|_| self.send(compress).seconds()).sum()
        }
    }

    impl Sent {
        fn seconds(&self) -> f64 {
            (self.compressed.map_or(Duration::ZERO, |(took, _)| took) + self.link).as_secs_f64()
        }
    }

    const MEMORY: f64 = 8e9;

    #[test]
    fn what_does_not_compress_is_sent_as_it_is_on_a_fast_link() {
        let mut auto = AutoCompression::default();
        let (_, compressed) = INCOMPRESSIBLE.clone().run(&mut auto, 1000);
        assert!((2..=40).contains(&compressed), "{compressed}");
        let report = auto.report(ChannelId(0));
        assert!(!report.compresses && report.reason.starts_with("sent as they are in the end"), "{report:?}");
        assert_eq!(report.packets_compressed + report.packets_plain, 1000);
        assert_eq!((report.switches, report.ratio), (0, Some(1.0)));
    }

    #[test]
    fn what_compresses_is_compressed_on_a_slow_link() {
        let mut auto = AutoCompression::default();
        let (_, compressed) = COMPRESSIBLE.clone().run(&mut auto, 1000);
        assert!(compressed >= 950, "{compressed}");
        let report = auto.report(ChannelId(0));
        assert!(report.compresses && report.reason.starts_with("compressed in the end"), "{report:?}");
        assert!((report.ratio.unwrap() - 2.5).abs() < 0.01, "{report:?}");
        assert!((report.plain_speed.unwrap() / SLOW_LINK - 1.0).abs() < 0.2, "{report:?}");
    }

    #[test]
    fn each_change_of_content_or_link_is_followed() {
        let mut auto = AutoCompression::default();
        let worlds = [
            ("fast link", World { link: FAST_LINK, ..COMPRESSIBLE }, false),
            ("the link becomes slow", COMPRESSIBLE, true),
            ("the content no longer compresses", World { ratio: 1.0, ..COMPRESSIBLE }, false),
            ("it does again", COMPRESSIBLE, true),
            ("the link becomes fast", World { link: FAST_LINK, ..COMPRESSIBLE }, false),
        ];
        for (what, mut world, compresses) in worlds {
            world.run(&mut auto, 300);
            let (_, compressed) = world.run(&mut auto, 200);
            let expected = if compresses { 150..=200 } else { 0..=40 };
            assert!(expected.contains(&compressed), "{what}: {compressed} of 200 packets, {}", auto.reason());
        }
    }

    #[test]
    fn it_is_never_much_slower_than_the_better_way() {
        let mut worst: (f64, String) = (0.0, String::new());
        for compressor in [1e8, 3e8, 1e9, 3e9] {
            for ratio in [0.02, 0.2, 0.5, 0.8, 1.0] {
                for link in [1e7, 1e8, 3e8, 1e9, 3e9] {
                    for buffer in [5e5, 6e6] {
                        let world = World { compressor, ratio, link, buffer, queued: 0.0 };
                        let (seconds, _) = world.clone().run(&mut AutoCompression::default(), 2000);
                        let best = world.always(false, 2000).min(world.always(true, 2000));
                        // What the buffer takes before anybody can know the link, and the first trials.
                        let cost = (seconds - (buffer + 16.0 * PACKET as f64) / link) / best - 1.0;
                        if cost > worst.0 {
                            let name =
                                format!("compressor {compressor:e}, ratio {ratio}, link {link:e}, buffer {buffer:e}");
                            worst = (cost, name);
                        }
                    }
                }
            }
        }
        assert!(worst.0 < 0.05, "{worst:?}");
    }

    #[test]
    fn noise_on_a_fast_link_does_not_decide() {
        let mut auto = AutoCompression::default();
        let (mut world, mut noise, mut compressed) = (World { ratio: 0.6, ..INCOMPRESSIBLE }, 1u64, 0);
        for _ in 0..2000 {
            let compress = auto.compresses(PACKET);
            compressed += u32::from(compress);
            let mut sent = world.send(compress);
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // One packet of 16 waits for a processor, for as long as ten packets take.
            if noise >> 60 == 0 {
                sent.link *= 10;
            }
            auto.sent(sent);
        }
        assert!(compressed < 200, "{compressed} of 2000, {} switches", auto.counts.switches);
    }

    #[test]
    fn small_packets_start_no_trial_and_are_not_measured() {
        let mut auto = AutoCompression::default();
        for _ in 0..100 {
            assert!(!auto.compresses(4096));
            auto.sent(Sent { guest_bytes: 4096, compressed: None, link: Duration::from_secs(1) });
        }
        assert_eq!(auto.report(ChannelId(3)).reason, "too few pages to try: sent as they are");
        assert_eq!(auto.plain.samples, 0);
    }
}

//! When a source is told that it may switch over.
//!
//! Nothing in the stream says whether a source waits for the message, and three kinds of source answer it differently (all
//! of this was observed, see `docs/qemu.md`):
//!
//! | machine type | capability `switchover-ack` off        | capability on                                |
//! |--------------|----------------------------------------|----------------------------------------------|
//! | ≥ 11.1       | the message fails the migration        | waits only if a device asked; else it fails  |
//! | 8.1 to 11.0  | the message is ignored                 | sends rounds until the message comes         |
//! | ≤ 8.0        | QEMU before 8.1 fails, newer ignore it | sends rounds until the message comes         |
//!
//! So the machine types in the middle are told at once. For older ones, and for those whose name says no version, the message
//! is the remedy for a source that shows that it waits: it goes on with PART sections although it has no page left. A source
//! that does not wait switches over instead, and has at most one such section in a row. There are exceptions, and to them the
//! message could do harm, so it is not sent
//!
//! - without channels: with XBZRLE, a page that was written and did not change is not named;
//! - beside another section in parts: its pending bytes keep a source from switching over, and it does not send them before;
//! - if the SYNC packets are those of QEMU 7.2, which does not know the message.

use multifd_proto::machine::MachineDefaults;

use super::SwitchoverAck;

/// Decides for one migration when to send the message: once, or not at all.
#[derive(Debug)]
pub(super) struct AckTiming {
    option: SwitchoverAck,
    sent: bool,
    /// Pages named on all connections when the last PART section began.
    pages: u64,
    /// PART sections in a row that began without a page since the one before.
    idle_parts: u32,
    /// There is a section in parts beside `ram`.
    more_than_ram: bool,
}

impl AckTiming {
    pub(super) fn new(option: SwitchoverAck) -> AckTiming {
        AckTiming { option, sent: false, pages: 0, idle_parts: 0, more_than_ram: false }
    }

    /// Whether to send it now that a source of this machine type has opened the return path.
    pub(super) fn due_at_once(&mut self, machine: &str) -> bool {
        let due = match self.option {
            SwitchoverAck::Auto => takes_ack(machine) == Some(true),
            SwitchoverAck::Never => false,
            SwitchoverAck::Always => true,
        };
        self.sent |= due;
        due
    }

    /// A section in parts beside `ram` has begun.
    pub(super) fn more_than_ram(&mut self) {
        self.more_than_ram = true;
    }

    /// Whether to send it now that another PART section begins and `pages` pages were named so far. `newer_packets` says
    /// whether a channel has shown that the source is newer than QEMU 7.2.
    pub(super) fn due_in_part(&mut self, machine: &str, pages: u64, newer_packets: bool) -> bool {
        self.idle_parts = if pages == self.pages { self.idle_parts + 1 } else { 0 };
        self.pages = pages;
        let waits = self.idle_parts >= IDLE_PARTS && newer_packets && !self.more_than_ram;
        let may_be_due = self.option == SwitchoverAck::Auto && takes_ack(machine).is_none();
        let due = waits && may_be_due && !self.sent;
        self.sent |= due;
        due
    }
}

/// What the machine type says of a source that does not wait for the message, if anything.
fn takes_ack(machine: &str) -> Option<bool> {
    MachineDefaults::of(machine)?.takes_switchover_ack
}

/// So many PART sections without a page are a source that waits. One that waits has a thousand of them in less than a
/// second; QEMU 7.2, 10.0 and 11.1 were not seen to have two in a row before they switch over, at any bandwidth limit.
const IDLE_PARTS: u32 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_type_decides_where_it_can() {
        for (machine, at_once) in [
            ("pc-i440fx-8.1", true),
            ("pc-q35-10.0", true),
            ("pc-q35-11.0", true),
            ("pc-i440fx-11.1", false),
            ("pc-q35-12.0", false),
            ("pc-q35-8.0", false),
            ("pc-q35-rhel9.4.0", false),
        ] {
            assert_eq!(AckTiming::new(SwitchoverAck::Auto).due_at_once(machine), at_once, "{machine}");
            assert!(!AckTiming::new(SwitchoverAck::Never).due_at_once(machine));
            assert!(AckTiming::new(SwitchoverAck::Always).due_at_once(machine));
        }
    }

    /// The number of PART sections without pages behind which the message is sent.
    fn idle_parts(option: SwitchoverAck, machine: &str) -> Option<u32> {
        let mut timing = AckTiming::new(option);
        timing.due_at_once(machine);
        let due: Vec<u32> = (0..1000).filter(|_| timing.due_in_part(machine, 7, true)).collect();
        assert!(due.len() <= 1, "sent more than once");
        due.first().copied()
    }

    #[test]
    fn a_source_that_waits_is_told_where_the_machine_type_says_nothing() {
        for machine in ["pc-i440fx-7.2", "pc-q35-8.0", "pc-q35-rhel9.4.0"] {
            assert_eq!(idle_parts(SwitchoverAck::Auto, machine), Some(IDLE_PARTS), "{machine}");
            assert_eq!(idle_parts(SwitchoverAck::Never, machine), None);
            assert_eq!(idle_parts(SwitchoverAck::Always, machine), None, "it was sent at once");
        }
        for machine in ["pc-i440fx-10.0", "pc-i440fx-11.1"] {
            assert_eq!(idle_parts(SwitchoverAck::Auto, machine), None, "{machine}");
        }
    }

    #[test]
    fn a_source_that_still_has_pages_is_not_told() {
        let mut timing = AckTiming::new(SwitchoverAck::Auto);
        // A page in every section, or in every other one, however many there are.
        assert!(!(1..10_000).any(|part| timing.due_in_part("pc-i440fx-7.2", part, true)));
        assert!(!(1..10_000).any(|part| timing.due_in_part("pc-i440fx-7.2", 10_000 + part / 2, true)));
    }

    /// QEMU 7.2 with a bitmap of a disk has hundreds of sections without a page, and failed when it was told.
    #[test]
    fn a_source_that_may_wait_for_something_else_is_not_told() {
        let mut with_bitmaps = AckTiming::new(SwitchoverAck::Auto);
        with_bitmaps.more_than_ram();
        assert!(!(0..10_000).any(|_| with_bitmaps.due_in_part("pc-i440fx-7.2", 7, true)));
        let mut old = AckTiming::new(SwitchoverAck::Auto);
        assert!(!(0..10_000).any(|_| old.due_in_part("pc-i440fx-7.2", 7, false)));
    }
}

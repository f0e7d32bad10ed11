//! What the version of a machine type decides about the stream.
//!
//! Nothing of this is negotiated. QEMU ties it to the machine type, which both sides share, so that a guest can migrate
//! between different versions of QEMU. A user can override each by hand, so a machine type gives a default, not proof.

use std::fmt;

/// Which words on main end a round, together with one SYNC packet on every channel.
///
/// Both dialects have a first sync point in the START section of `ram`, where they can be told apart: if FLUSH comes before
/// its end-of-section the stream is per-round, else per-section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Dialect {
    /// Every FLUSH word; end-of-section means nothing. QEMU ≥ 8.1 with a machine type ≥ 8.1.
    #[default]
    PerRound,
    /// Every end-of-section of the `ram` section; there is no FLUSH, and a receiver of this dialect refuses it.
    PerSection,
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PerRound => "per-round",
            Self::PerSection => "per-section",
        })
    }
}

/// Where a source that uses channels puts pages of zeros. A receiver accepts all three, even mixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ZeroPages {
    /// In the second part of a packet's offset list.
    ///
    /// QEMU does not write such a page when it is the first thing it hears of it: its memory must be zeros already. QEMU 7.2
    /// and other versions before 9.0 ignore the list altogether.
    Multifd,
    /// As ZERO words on main.
    Legacy,
    /// Nowhere: as pages with content.
    None,
}

impl fmt::Display for ZeroPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Multifd => "multifd",
            Self::Legacy => "legacy",
            Self::None => "none",
        })
    }
}

/// What a source of a machine type does, unless its user says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MachineDefaults {
    /// How rounds end.
    pub dialect: Dialect,
    /// Where pages of zeros go.
    pub zero_pages: ZeroPages,
    /// Whether the source announces the switchover with a command. Receivers before QEMU 10.0 refuse it.
    pub switchover_start: bool,
    /// Whether the source ignores a SWITCHOVER_ACK that it does not wait for (8.1 to 11.0), or fails (11.1 and newer). Nothing
    /// before 8.1, where the version of QEMU decides: before 8.1 the message is unknown.
    pub takes_switchover_ack: Option<bool>,
}

impl MachineDefaults {
    /// The defaults of a versioned machine type such as `pc-i440fx-10.0`; nothing for an alias or a vendor's own version.
    pub fn of(machine: &str) -> Option<MachineDefaults> {
        let version = version(machine)?;
        Some(MachineDefaults {
            dialect: if version >= (8, 1) { Dialect::PerRound } else { Dialect::PerSection },
            zero_pages: if version >= (9, 0) { ZeroPages::Multifd } else { ZeroPages::Legacy },
            switchover_start: version >= (10, 0),
            takes_switchover_ack: (version >= (8, 1)).then_some(version < (11, 1)),
        })
    }
}

/// The `X.Y` at the end of `pc-i440fx-X.Y`, `pc-q35-X.Y.Z`, `virt-X.Y`.
fn version(machine: &str) -> Option<(u32, u32)> {
    let (_, version) = machine.rsplit_once('-')?;
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().ok());
    let version = (numbers.next()??, numbers.next()??);
    numbers.all(|number| number.is_some()).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_version_decides() {
        for (machine, dialect, zero_pages, switchover_start) in [
            ("pc-i440fx-2.12", Dialect::PerSection, ZeroPages::Legacy, false),
            ("pc-q35-4.0.1", Dialect::PerSection, ZeroPages::Legacy, false),
            ("pc-i440fx-7.2", Dialect::PerSection, ZeroPages::Legacy, false),
            ("pc-i440fx-8.0", Dialect::PerSection, ZeroPages::Legacy, false),
            ("pc-i440fx-8.1", Dialect::PerRound, ZeroPages::Legacy, false),
            ("pc-q35-8.2", Dialect::PerRound, ZeroPages::Legacy, false),
            ("pc-q35-9.0", Dialect::PerRound, ZeroPages::Multifd, false),
            ("pc-q35-9.2", Dialect::PerRound, ZeroPages::Multifd, false),
            ("pc-q35-10.0", Dialect::PerRound, ZeroPages::Multifd, true),
            ("pc-i440fx-11.1", Dialect::PerRound, ZeroPages::Multifd, true),
        ] {
            let defaults = MachineDefaults::of(machine).unwrap();
            let found = (defaults.dialect, defaults.zero_pages, defaults.switchover_start);
            assert_eq!(found, (dialect, zero_pages, switchover_start), "{machine}");
        }
        for (machine, takes_ack) in [
            ("pc-q35-8.0", None),
            ("pc-q35-8.1", Some(true)),
            ("pc-q35-11.0", Some(true)),
            ("pc-q35-11.1", Some(false)),
        ] {
            assert_eq!(MachineDefaults::of(machine).unwrap().takes_switchover_ack, takes_ack, "{machine}");
        }
    }

    #[test]
    fn aliases_and_vendor_versions_decide_nothing() {
        for machine in
            ["", "pc", "q35", "microvm", "pc-i440fx-", "pc-q35-rhel9.4.0", "pc-i440fx-10", "pc-q35-9.0-x", "x-9.0.y"]
        {
            assert_eq!(MachineDefaults::of(machine), None, "{machine}");
        }
    }
}

//! What is asked of the model: the protocol in each dialect, and what becomes of it when one part is missing.

use std::time::Duration;

use crate::{
    protocol::{Config, Defect, Dialect, Event, Flush, Harm, Membership, Order, Protocol, Wait},
    search::explore,
};

/// One question.
#[derive(Clone, Debug)]
pub struct Variant {
    /// What is asked, as a row of the table.
    pub name: &'static str,
    /// How the protocol is spoken; the answer has to be the same for each.
    pub dialects: Vec<Config>,
    /// The answer that is known.
    pub expected: Option<Harm>,
    /// Whether something can go wrong at any moment, too.
    pub faults: bool,
}

/// The answer to one question.
#[derive(Debug)]
pub struct Verdict {
    /// States visited, in all searches together.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// States in which both sides had ended.
    pub ends: usize,
    /// Those of them in which the source is in doubt, because it has no answer to the end of its stream.
    pub in_doubt: usize,
    /// How long it took.
    pub took: Duration,
    /// The largest searches: channels, rounds, pages.
    pub sizes: Vec<Size>,
    /// By dialect, the nearest harm.
    pub harms: Vec<Option<Counterexample>>,
}

/// A way to harm.
#[derive(Debug)]
pub struct Counterexample {
    /// What happens in the end.
    pub harm: Harm,
    /// The smallest size at which it happens.
    pub size: Size,
    /// The steps that lead there.
    pub trace: Vec<Event>,
}

/// Channels, rounds with pages, pages.
pub type Size = (usize, u8, usize);

impl Variant {
    /// Searches at all sizes from the smallest to those of `effort`; stops a dialect's searches at the first harm.
    pub fn verdict(&self, effort: Effort) -> Verdict {
        let mut verdict = Verdict {
            states: 0,
            steps: 0,
            ends: 0,
            in_doubt: 0,
            took: Duration::ZERO,
            sizes: Vec::new(),
            harms: Vec::new(),
        };
        for dialect in &self.dialects {
            let mut counterexample = None;
            for (size, faults, order) in effort.sizes(self.faults) {
                let (channels, rounds, pages) = size;
                // States that differ in names are all visited there, and packets have numbers.
                if dialect.membership != Membership::Known && channels * usize::from(rounds) * pages > effort.late() {
                    continue;
                }
                let mut config = Config { channels, rounds, pages, faults, order, ..dialect.clone() };
                if !Protocol::is_possible(&config) {
                    config.order = Order::Arrivals;
                }
                let outcome = explore(&config);
                verdict.states += outcome.states;
                verdict.steps += outcome.steps;
                verdict.ends += outcome.ends;
                verdict.in_doubt += outcome.in_doubt;
                verdict.took += outcome.took;
                if !verdict.sizes.contains(&size) {
                    verdict.sizes.push(size);
                }
                if let Some((harm, trace)) = outcome.harm {
                    counterexample = Some(Counterexample { harm, size, trace });
                    break;
                }
            }
            verdict.harms.push(counterexample);
        }
        verdict
    }
}

impl Verdict {
    /// Whether every dialect gave the answer `expected`.
    pub fn is(&self, expected: Option<Harm>) -> bool {
        self.harms.iter().all(|harm| harm.as_ref().map(|counterexample| counterexample.harm) == expected)
    }

    /// The shortest counterexample in the first dialect that has one.
    pub fn counterexample(&self) -> Option<&Counterexample> {
        self.harms.iter().flatten().next()
    }
}

/// How large the largest searches are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Seconds, also without optimisation: for tests.
    Smallest,
    /// Half a minute.
    Quick,
    /// Minutes, and a few gigabytes of memory.
    Full,
}

impl Effort {
    /// Sizes in the order of search, each with whether faults are tried and which interleavings are left out.
    fn sizes(self, faults: bool) -> Vec<(Size, bool, Order)> {
        // The nearest harm is nearest only if neither side has to go first.
        let small: &[Size] = &[(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)];
        let large: &[Size] = match self {
            Effort::Smallest => &[],
            Effort::Quick => &[(2, 3, 2), (3, 2, 2), (3, 3, 2)],
            Effort::Full => &[(2, 3, 2), (3, 2, 2), (3, 3, 2), (2, 3, 3), (3, 2, 3), (2, 4, 2), (3, 4, 2)],
        };
        let with_faults: &[Size] = match self {
            _ if !faults => &[],
            Effort::Smallest => &[(2, 2, 1)],
            Effort::Quick => &[(2, 2, 2), (3, 2, 2)],
            Effort::Full => &[(2, 3, 2), (3, 2, 2), (3, 3, 1)],
        };
        let all = [(small, false, Order::Arrivals), (large, false, Order::SourceFirst)];
        let all = all.into_iter().chain([(with_faults, true, Order::Arrivals)]);
        all.flat_map(|(sizes, faults, order)| sizes.iter().map(move |&size| (size, faults, order))).collect()
    }

    /// The largest product of channels, rounds and pages where channels come late.
    const fn late(self) -> usize {
        match self {
            Effort::Smallest | Effort::Quick => 8,
            Effort::Full => 12,
        }
    }

    /// The largest sizes, for people.
    pub fn largest(self) -> &'static str {
        match self {
            Effort::Smallest => "2×2×2; 2×2×1 with faults",
            Effort::Quick => "2×3×2, 3×3×2; 2×2×2, 3×2×2 with faults",
            Effort::Full => "2×3×3, 3×2×3, 3×4×2; 2×3×2, 3×2×2, 3×3×1 with faults",
        }
    }
}

/// The protocol as it is; no harm can come of it.
pub fn protocols() -> Vec<Variant> {
    let protocol = |name, config| Variant { name, dialects: vec![config], expected: None, faults: true };
    let [late, early, per_section, carrying, legacy] = dialects();
    vec![
        protocol("FLUSH per round, behind the last SYNC (late)", late.clone()),
        protocol("FLUSH per round, when the round opens (early)", early.clone()),
        protocol("sync point at each end of section", per_section.clone()),
        protocol("sync point at each end of section, SYNC packets carry pages", carrying),
        protocol("FLUSH per round, SYNC packets carry pages", Config { sync_carries_pages: true, ..late.clone() }),
        protocol("FLUSH per round, zero pages named on main", legacy.clone()),
        protocol(
            "sync point at each end of section, zero pages named on main",
            Config { zeros_on_main: true, ..per_section.clone() },
        ),
        Variant {
            name: "pages that are written again wait for the next round",
            dialects: [&early, &legacy].map(|dialect| Config { postpones: true, ..dialect.clone() }).to_vec(),
            expected: None,
            faults: true,
        },
        protocol("connections that hold one packet", Config { capacity: 1, ..early.clone() }),
        protocol("rounds overlap: a channel goes on after its own SYNC", Config { rounds_overlap: true, ..late }),
    ]
}

/// The protocol with a part left out, or done wrong.
pub fn removals() -> Vec<Variant> {
    let [late, early, per_section, carrying, legacy] = dialects();
    let all = vec![late.clone(), early.clone(), per_section.clone(), carrying.clone(), legacy.clone()];
    let no_pages_on_main = vec![late.clone(), early.clone(), per_section.clone(), carrying.clone()];
    let without = |name, waits: &[Wait], dialects: &[Config], expected| {
        let dialects = dialects.iter().map(|dialect| Config { without: waits.to_vec(), ..dialect.clone() }).collect();
        Variant { name, dialects, expected, faults: false }
    };
    let defect = |name, defect, dialects: &[Config], expected| {
        let dialects = dialects.iter().map(|dialect| Config { defect: Some(defect), ..dialect.clone() }).collect();
        Variant { name, dialects, expected, faults: false }
    };
    let overtaken = Some(Harm::Overtaken);
    let stale = Some(Harm::StartedStale);
    let hangs = Some(Harm::WaitsForEver);
    let postponing = [&early, &per_section].map(|dialect| Config { postpones: true, ..dialect.clone() });
    let both = vec![carrying.clone(), Config { sync_carries_pages: true, ..late.clone() }];
    vec![
        without("source main does not wait for the channels when a round opens", &[Wait::SourceMainAtOpen], &all, None),
        without(
            "source main does not wait for the channels' SYNCs",
            &[Wait::SourceMainAtClose],
            &no_pages_on_main,
            overtaken,
        ),
        without("source channels do not wait for a round to open", &[Wait::SourceChannelsAtOpen], &all, stale),
        without("destination main does not wait for the SYNCs", &[Wait::DestinationMain], &all, stale),
        without(
            "destination main waits at the last sync point only",
            &[Wait::DestinationMainButLast],
            &no_pages_on_main,
            None,
        ),
        without(
            "the same, zero pages named on main",
            &[Wait::DestinationMainButLast],
            std::slice::from_ref(&legacy),
            overtaken,
        ),
        without("destination channels do not wait behind SYNC", &[Wait::DestinationChannels], &all, overtaken),
        without(
            "destination channels wait for each other, not for main",
            &[Wait::DestinationChannelsForMain],
            &no_pages_on_main,
            None,
        ),
        without(
            "the same, zero pages named on main",
            &[Wait::DestinationChannelsForMain],
            std::slice::from_ref(&legacy),
            overtaken,
        ),
        defect("one sync point left out on main", Defect::NoFlush, &all, stale),
        defect("one SYNC left out on one channel", Defect::NoSync, &all, hangs),
        defect("no barrier behind the last round", Defect::NoLastBarrier, &all, stale),
        defect(
            "a page that waited is in the next round only if it was written again",
            Defect::PostponedIsForgotten,
            &postponing,
            stale,
        ),
        defect("pages of the last round wait, too", Defect::PostponedInTheLast, &postponing, stale),
        defect("pages in SYNC packets not taken (QEMU 9.2.0)", Defect::SyncPagesDropped, &both, stale),
        defect("SYNC handled before the pages of its packet", Defect::SyncBeforeItsPages, &both, stale),
        Variant {
            name: "FLUSH early although main has zero pages to name",
            dialects: vec![Config { flush: Flush::Early, ..legacy }],
            expected: overtaken,
            faults: false,
        },
        Variant {
            name: "FLUSH per round sent to a destination that syncs per section",
            dialects: vec![Config { destination: Dialect::PerSection, ..late }],
            expected: hangs,
            faults: false,
        },
        Variant {
            name: "sync points per section sent to a destination that wants FLUSH",
            dialects: vec![Config { destination: Dialect::PerRound, ..per_section }],
            expected: stale,
            faults: false,
        },
    ]
}

/// Channels that come late, in any order: the protocol as it is, and with a part done wrong.
pub fn late_channels() -> Vec<Variant> {
    let [late, early, per_section, _, legacy] = dialects();
    let legacy_per_section = Config { zeros_on_main: true, ..per_section.clone() };
    // Where the source says how many channels there are, a sync point that is a FLUSH waits for all of them.
    let sections = [per_section.clone(), legacy_per_section.clone()];
    let all = [late, early, per_section, legacy, legacy_per_section];
    let variant = |name, membership, defect, expected| Variant {
        name,
        dialects: all.iter().map(|dialect| Config { membership, defect, ..dialect.clone() }).collect(),
        expected,
        faults: false,
    };
    let stale = Some(Harm::StartedStale);
    vec![
        variant("channels come late, the source says how many there are", Membership::Told, None, None),
        variant("channels come late, the numbers of SYNC packets prove how many", Membership::Numbers, None, None),
        variant(
            "those that have come at the first sync point are taken for all",
            Membership::Numbers,
            Some(Defect::GuessedAtSyncPoint(0)),
            stale,
        ),
        variant(
            "those that have come at the second sync point are taken for all",
            Membership::Numbers,
            Some(Defect::GuessedAtSyncPoint(1)),
            stale,
        ),
        Variant {
            name: "the first SYNC of a late channel counts for the current round",
            dialects: sections
                .map(|dialect| Config {
                    membership: Membership::Told,
                    defect: Some(Defect::FirstSyncCounts),
                    ..dialect
                })
                .to_vec(),
            // The packet numbers show that pages are missing: without them the VM would start stale.
            expected: Some(Harm::GaveUp),
            faults: false,
        },
    ]
}

/// FLUSH late, FLUSH early, per section, per section with pages in SYNC packets, zero pages on main.
fn dialects() -> [Config; 5] {
    let late = Config {
        channels: 0,
        rounds: 0,
        pages: 0,
        source: Dialect::PerRound,
        destination: Dialect::PerRound,
        flush: Flush::Late,
        sync_carries_pages: false,
        zeros_on_main: false,
        capacity: 16,
        faults: false,
        order: Order::Arrivals,
        symmetric: true,
        postpones: false,
        rounds_overlap: false,
        membership: Membership::Known,
        without: Vec::new(),
        defect: None,
    };
    let per_section = Config { source: Dialect::PerSection, destination: Dialect::PerSection, ..late.clone() };
    [
        late.clone(),
        Config { flush: Flush::Early, ..late.clone() },
        per_section.clone(),
        Config { sync_carries_pages: true, ..per_section },
        Config { zeros_on_main: true, ..late },
    ]
}

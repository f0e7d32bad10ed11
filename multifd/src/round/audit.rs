//! Remembers in which round each page was last written, and tells of writes that come from an older one.
//!
//! This checks the round law on a running migration, without trusting the barrier: a round here is what each connection
//! says of itself, the number of SYNCs (on main: sync points) it has passed. A write is recorded before it begins, and looked
//! up when it is done: an older one is found whether it begins after the later one or is overtaken by it half-way. In a
//! run that keeps the law no write of a later round begins before an older one is done, so whatever is found is a broken law. A
//! page that comes twice within one round is none: QEMU 7.2 sends some so, and either copy will do
//! (docs/migration/multifd.rst, What can go wrong between two rounds).

use std::fmt;

use multifd_proto::{BlockName, ChannelId, rounds::Party};

use crate::{
    error::{Connection, Error, Mismatch},
    layout::Layout,
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{Relaxed, SeqCst},
            fence,
        },
        lock,
    },
    sys::zeroed::zeroed_atomics,
};

/// The account of one migration.
pub(crate) struct Audit {
    layout: Arc<Layout>,
    /// By page number the latest round that has begun to write it: [`Write`] as a number; 0 where there is none.
    latest: Vec<AtomicU32>,
    stale: AtomicU64,
    /// The first [`KEPT`] of them.
    first: Mutex<Vec<StaleWrite>>,
}

/// What the audit of a migration found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Writes that came from an older round than the page already held. 0 in a migration that kept the round law.
    pub stale_writes: u64,
    /// The first of them.
    pub first: Vec<StaleWrite>,
}

/// A page that was written from an older round than it already held, or was being given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleWrite {
    /// The page's RAM block.
    pub block: BlockName,
    /// The page's offset in it, in bytes.
    pub offset: u64,
    /// Which connection wrote it.
    pub writer: Connection,
    /// That connection's round.
    pub round: u64,
    /// Which connection had begun to write it before this one was done.
    pub before: Connection,
    /// That connection's round.
    pub before_round: u64,
}

impl fmt::Display for StaleWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StaleWrite { block, offset, writer, round, before, before_round } = self;
        write!(
            f,
            "page at {offset:#x} of {:?}: {writer} wrote round {round} over round {before_round} from {before}",
            block.as_str()
        )
    }
}

impl Audit {
    /// No page of `layout` is written yet.
    ///
    /// # Errors
    /// [`Mismatch::TooMuchToAudit`]: it takes four bytes for each page that a peer claims to have and names.
    pub(crate) fn new(layout: Arc<Layout>) -> Result<Audit, Error> {
        let bytes = layout.bytes();
        let refused = || Error::Mismatch(Mismatch::TooMuchToAudit { bytes, limit: MAX_AUDITED });
        if bytes > MAX_AUDITED {
            return Err(refused());
        }
        let pages = usize::try_from(layout.bits()).map_err(|_| refused())?;
        let latest = zeroed_atomics(pages).map_err(|_| refused())?;
        Ok(Audit { latest, stale: AtomicU64::new(0), first: Mutex::new(Vec::new()), layout })
    }

    /// `writer` is about to write the pages at `offsets` of block `block` in its round `round`.
    pub(crate) fn writes(&self, block: usize, offsets: &[u64], writer: Party, round: u64) {
        let block = &self.layout.blocks()[block];
        let now = Write::new(writer, round);
        for &offset in offsets {
            self.latest[block.page_at(offset) as usize].fetch_max(now.0, Relaxed);
        }
        // Before the first byte is written: of two writers of a page, the one that ends later sees both.
        fence(SeqCst);
    }

    /// `writer` has written them.
    pub(crate) fn wrote(&self, block: usize, offsets: &[u64], writer: Party, round: u64) {
        fence(SeqCst);
        let block = &self.layout.blocks()[block];
        let now = Write::new(writer, round);
        for &offset in offsets {
            let latest = Write(self.latest[block.page_at(offset) as usize].load(Relaxed));
            if latest.round() > now.round() {
                self.found(block.name(), offset, now, latest);
            }
        }
    }

    /// What was found so far.
    pub(crate) fn findings(&self) -> Findings {
        Findings { stale_writes: self.stale.load(Relaxed), first: lock(&self.first).clone() }
    }

    #[cold]
    fn found(&self, block: &BlockName, offset: u64, now: Write, latest: Write) {
        self.stale.fetch_add(1, Relaxed);
        let mut first = lock(&self.first);
        if first.len() < KEPT {
            first.push(StaleWrite {
                block: block.clone(),
                offset,
                writer: now.connection(),
                round: now.round(),
                before: latest.connection(),
                before_round: latest.round(),
            });
        }
    }
}

/// Round and connection in one number, so that the larger one is the later round: `(round + 1) << 9 | connection`.
#[derive(Clone, Copy)]
struct Write(u32);

impl Write {
    fn new(writer: Party, round: u64) -> Write {
        let party = match writer {
            Party::Main => 0,
            Party::Channel(id) => u32::from(id.0) + 1,
        };
        // Four million rounds are more than a migration has; from there on they all count as one.
        let round = u32::try_from(round + 1).unwrap_or(u32::MAX).min(u32::MAX >> PARTY_BITS);
        Write((round << PARTY_BITS) | party)
    }

    fn round(self) -> u64 {
        u64::from(self.0 >> PARTY_BITS) - 1
    }

    fn connection(self) -> Connection {
        match (self.0 & ((1 << PARTY_BITS) - 1)).checked_sub(1) {
            None => Connection::Main,
            Some(id) => Connection::Channel(ChannelId(u8::try_from(id).expect("made from one"))),
        }
    }
}

/// 0 for main, 1 to 256 for channels.
const PARTY_BITS: u32 = 9;
/// The most guest memory of a migration that can be audited: its account takes 1 GiB.
const MAX_AUDITED: u64 = 1 << 40;
/// A broken barrier makes thousands; these are enough to see how.
const KEPT: usize = 16;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const A: Party = Party::Channel(ChannelId(0));
    const B: Party = Party::Channel(ChannelId(255));

    fn layout() -> Arc<Layout> {
        let blocks = [("a", 4), ("b", 4)].map(|(name, pages)| (BlockName::new(name).unwrap(), pages * 4096));
        Arc::new(Layout::new(4096, blocks).unwrap())
    }

    /// A write that nothing comes between.
    fn write(audit: &Audit, block: usize, offsets: &[u64], writer: Party, round: u64) {
        audit.writes(block, offsets, writer, round);
        audit.wrote(block, offsets, writer, round);
    }

    #[test]
    fn later_rounds_and_the_same_round_are_fine() {
        let audit = Audit::new(layout()).unwrap();
        for (party, round) in [(Party::Main, 0), (A, 0), (B, 0), (A, 0), (B, 1), (Party::Main, 1), (A, 7)] {
            write(&audit, 1, &[0, 4096], party, round);
        }
        // Other pages are not concerned.
        write(&audit, 0, &[0, 4096], A, 0);
        assert_eq!(audit.findings(), Findings::default());
    }

    #[test]
    fn an_older_round_is_told_with_page_connections_and_rounds() {
        let audit = Audit::new(layout()).unwrap();
        write(&audit, 1, &[8192], B, 5);
        write(&audit, 1, &[4096, 8192], A, 4);
        write(&audit, 1, &[8192], Party::Main, 3);
        let findings = audit.findings();
        assert_eq!(findings.stale_writes, 2);
        let told: Vec<String> = findings.first.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "page at 0x2000 of \"b\": channel 0 wrote round 4 over round 5 from channel 255",
                "page at 0x2000 of \"b\": main wrote round 3 over round 5 from channel 255"
            ]
        );
    }

    /// The older write begins first and ends last, so that it overwrites what it is overtaken by.
    #[test]
    fn a_write_that_is_overtaken_half_way_is_told() {
        let audit = Audit::new(layout()).unwrap();
        audit.writes(1, &[0, 4096], A, 0);
        write(&audit, 1, &[4096], B, 1);
        audit.wrote(1, &[0, 4096], A, 0);
        let findings = audit.findings();
        let told: Vec<String> = findings.first.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["page at 0x1000 of \"b\": channel 0 wrote round 0 over round 1 from channel 255"]);
    }

    #[test]
    fn only_the_first_findings_are_kept_and_all_are_counted() {
        let audit = Audit::new(layout()).unwrap();
        write(&audit, 0, &[0], A, 9);
        (0..100).for_each(|_| write(&audit, 0, &[0], B, 2));
        let findings = audit.findings();
        assert_eq!((findings.stale_writes, findings.first.len()), (100, KEPT));
    }

    #[test]
    fn rounds_beyond_four_million_count_as_one() {
        let audit = Audit::new(layout()).unwrap();
        write(&audit, 0, &[0], B, u64::from(u32::MAX));
        write(&audit, 0, &[0], A, 1 << 23);
        assert_eq!(audit.findings().stale_writes, 0);
    }
}

#[cfg(all(test, not(any(loom, shuttle)), feature = "zlib", feature = "zstd"))]
mod recorded_audit_tests {
    use std::{
        collections::BTreeMap,
        io::{Read, Write as _},
        net::Shutdown,
        os::unix::net::UnixStream,
        thread,
    };

    use test_support::TempDir;

    use super::*;
    use crate::{
        checkpoint::Writer,
        compress,
        destination::{Destination, Options},
        transport::uri::Uri,
    };

    /// The command, and the message, as they stand on the wire.
    const OPEN_RETURN_PATH: [u8; 5] = [8, 0, 1, 0, 0];
    const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

    /// QEMU 7.2 sends some pages twice in a round, on two channels: that is no finding.
    #[test]
    fn recorded_streams_of_qemu_are_silent() {
        let mut streams: BTreeMap<String, Vec<(String, Vec<u8>)>> = BTreeMap::new();
        for (path, bytes) in compress::tests::recordings() {
            if let Some((stream, connection)) = path.rsplit_once('/').filter(|(_, name)| name.ends_with(".bin")) {
                streams.entry(stream.to_owned()).or_default().push((connection.to_owned(), bytes));
            }
        }
        streams.retain(|_, connections| connections.len() > 1);
        assert!(streams.len() >= 5, "{:?}", streams.keys());
        for (stream, mut connections) in streams {
            let dir = TempDir::new().unwrap();
            let socket = dir.join("socket");
            let uri: Uri = format!("unix:{}", socket.display()).parse().unwrap();
            let listener = Box::new(uri.listener().unwrap());
            // Main is opened first.
            connections.sort_by_key(|(name, _)| (name != "main.bin", name.clone()));
            let source = thread::spawn(move || {
                // As a source does, all are opened before main says anything of a round.
                let opened: Vec<_> =
                    connections.into_iter().map(|(_, bytes)| (UnixStream::connect(&socket).unwrap(), bytes)).collect();
                let senders: Vec<_> = opened
                    .into_iter()
                    .map(|(mut connection, bytes)| {
                        thread::spawn(move || {
                            connection.write_all(&bytes).unwrap();
                            // A source with return path waits for SHUT. The connection stays open until the destination
                            // ends it, in whichever way.
                            if !bytes[..100.min(bytes.len())].windows(5).any(|part| part == OPEN_RETURN_PATH) {
                                connection.shutdown(Shutdown::Write).unwrap();
                            }
                            let mut said = Vec::new();
                            let mut part = [0; 512];
                            while let Ok(n @ 1..) = connection.read(&mut part) {
                                said.extend_from_slice(&part[..n]);
                                if said.ends_with(&SHUT) {
                                    return;
                                }
                            }
                        })
                    })
                    .collect();
                senders.into_iter().for_each(|sender| sender.join().unwrap());
            });
            let destination = Destination::new(Options { audit: true, ..Options::default() });
            let mut checkpoint = Writer::create(&dir.join("checkpoint"), false).unwrap();
            let report = checkpoint.receive(destination, listener, &mut ()).unwrap_or_else(|e| panic!("{stream}: {e}"));
            source.join().unwrap();
            assert!(report.normal > 0, "{stream}");
            assert_eq!(report.audit, Some(Findings::default()), "{stream}");
        }
    }
}

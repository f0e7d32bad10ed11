//! The beginning of a postcopy, up to the moment at which the destination runs the VM.

use std::time::Instant;

use multifd_proto::{
    command::{Command, PostcopyAdvice},
    machine::MachineDefaults,
    postcopy::{DiscardRange, Package},
    ram::BlockEntry,
};

use super::{Claims, Options, Prefetch, Whereabouts, figures::Reason, link::Link, pages::FilePages, trace::HandOver};
use crate::{
    beside_ram::BesideRam, checkpoint::Checkpoint, error::Error, layout::BlockLayout, progress::Phase, sync::Deadline,
    vm::VmError,
};

/// What is sent before any request can come.
#[derive(Default)]
pub(super) struct Opening {
    machine: String,
    ram_section: u32,
    beside_ram: BesideRam,
    /// The sections of all devices.
    devices: Vec<u8>,
    before_run: Vec<u64>,
    after_run: Vec<u64>,
}

impl Opening {
    pub(super) fn of(checkpoint: &Checkpoint, options: &Options, pages: &FilePages) -> Opening {
        let prefetch = prefetched(options, pages);
        let (before_run, after_run) = match options.prefetch_when {
            Prefetch::BeforeRun => (prefetch, Vec::new()),
            Prefetch::AfterRun => (Vec::new(), prefetch),
        };
        Opening {
            machine: checkpoint.machine().to_owned(),
            ram_section: checkpoint.ram_section(),
            beside_ram: checkpoint.beside_ram().clone(),
            devices: checkpoint.sections().to_vec(),
            before_run,
            after_run,
        }
    }

    /// The pages to be sent first once the guest runs.
    pub(super) fn after_run(&self) -> &[u64] {
        &self.after_run
    }
}

/// The pages that the options name and the VM has with content, in their order. Of no block all pages: QEMU 10.0 needs a
/// RAM_DISCARD for each, and there has to be something to discard.
fn prefetched(options: &Options, pages: &FilePages) -> Vec<u64> {
    let layout = pages.layout();
    let numbers = options.prefetch.iter().filter_map(|page| page.number(layout));
    let named: Vec<u64> = numbers.filter(|&page| pages.present().contains(page)).collect();
    if named.len() < options.prefetch.len() {
        let others = options.prefetch.len() - named.len();
        tracing::info!(others, "pages to be sent first are zeros here, or do not exist");
    }
    let whole = |block: &BlockLayout| {
        let named = named.iter().filter(|page| block.page_range().contains(page));
        named.count() as u64 >= block.pages()
    };
    let last: Vec<u64> =
        layout.blocks().iter().filter(|block| whole(block)).map(|block| block.page_range().end - 1).collect();
    named.into_iter().filter(|page| !last.contains(page)).collect()
}

impl Link<'_> {
    /// Sends everything up to and with RUN, in two writes: all that comes before RUN, and RUN. Waits for nothing but, for a
    /// moment, for the sign that the destination has taken the block list: what it refuses is then known to be refused.
    pub(super) fn hand_over(
        &mut self,
        opening: &Opening,
        about_to_run: &mut dyn FnMut() -> Result<(), VmError>,
    ) -> Result<(), Error> {
        let begun = Instant::now();
        self.connect_main()?;
        self.set_phase(Phase::Setup);
        // The destination takes the first connection that says what it is for main.
        self.begin(opening)?;
        self.connect_preempt()?;
        self.blocks(opening);
        self.prefetch(opening)?;
        let run = self.discard_and_package(opening);
        self.main().send()?;
        let limit = self.job().options.set_up_limit;
        self.inbox().wait(Deadline::after(limit), |mail| mail.is_set_up)?;
        self.job().pages.check_unchanged()?;
        about_to_run().map_err(Error::vm("be noted as handed over"))?;
        // From the first byte of RUN on the destination may run the VM.
        self.vm = Whereabouts::InDoubt;
        self.job().step(|| HandOver::Give);
        self.inbox().update(|mail| mail.run_sent = true);
        self.answer_on_preempt()?;
        self.main().encoder().raw(&run).command(&Command::Ping(4));
        self.main().send()?;
        self.job().figures.set_resume(begun.elapsed());
        self.hold_until_loaded()
    }

    fn begin(&mut self, opening: &Opening) -> Result<(), Error> {
        let uuid = self.job().options.uuid;
        let encoder = self.main().encoder();
        encoder.header().configuration(&opening.machine);
        if let Some(uuid) = uuid {
            encoder.config_uuid(&uuid);
        }
        self.main().send()
    }

    /// Commands, and the block list.
    fn blocks(&mut self, opening: &Opening) {
        let job = self.job().clone();
        let layout = job.pages.layout();
        let page_size = layout.page_size() as u64;
        let advice = PostcopyAdvice { page_size_summary: page_size, page_size };
        let encoder = self.main().encoder();
        encoder
            .command(&Command::OpenReturnPath)
            .command(&Command::Ping(1))
            .command(&Command::PostcopyAdvise(Some(advice)))
            .raw(opening.beside_ram.before_ram())
            .ram_start(opening.ram_section, layout.bytes());
        for block in layout.blocks() {
            encoder.block(&BlockEntry::new(block.name().clone(), block.bytes()));
        }
        encoder
            .eos()
            .footer(opening.ram_section)
            .raw(opening.beside_ram.behind_ram_start())
            .raw(opening.beside_ram.in_parts());
    }

    /// Sends the pages that the guest is to have when it resumes.
    fn prefetch(&mut self, opening: &Opening) -> Result<(), Error> {
        if opening.before_run.is_empty() {
            return Ok(());
        }
        let job = self.job().clone();
        self.main().encoder().ram_part(opening.ram_section, false);
        for pages in opening.before_run.chunks(PREFETCHED_AT_ONCE) {
            let claimed: Vec<u64> = pages.iter().copied().filter(|&page| job.claims.claim(page)).collect();
            job.step(|| HandOver::Final(claimed.clone()));
            self.main().send_claimed(&claimed, Reason::Prefetch)?;
        }
        self.main().encoder().eos().footer(opening.ram_section);
        Ok(())
    }

    /// Has all pages discarded that were not sent, and encodes the package up to RUN. Returns RUN.
    fn discard_and_package(&mut self, opening: &Opening) -> Vec<u8> {
        let job = self.job().clone();
        let encoder = self.main().encoder();
        if MachineDefaults::of(&opening.machine).is_some_and(|defaults| defaults.switchover_start) {
            encoder.command(&Command::SwitchoverStart);
        }
        for block in job.pages.layout().blocks() {
            let ranges = discarded(block, &job.claims);
            DiscardRange::commands(block.name(), &ranges).for_each(|command| _ = encoder.command(&command));
        }
        encoder.command(&Command::Ping(PING_DISCARDED));
        let mut bytes = Vec::new();
        let before_run = Package::encode(&opening.devices, &mut bytes);
        let run = bytes.split_off(before_run);
        encoder.raw(&bytes);
        run
    }

    /// Waits until the destination has loaded the devices, for a while, and answers what is asked for meanwhile. Pages in the
    /// background would gain little, and cost something: a destination that ends with bytes unread resets the
    /// connection, and its last words may be lost.
    fn hold_until_loaded(&mut self) -> Result<(), Error> {
        let limit = self.job().options.loading_limit;
        self.serve(Deadline::after(Some(limit)), |mail| mail.is_loaded)
    }
}

/// What is left of `block` without the pages that are claimed: those were sent. Guests of 64 GiB have 16 million pages, so this
/// looks at 64 of them at a time.
fn discarded(block: &BlockLayout, claims: &Claims) -> Vec<DiscardRange> {
    let pages = block.page_range();
    let offset = |page: u64| if page == pages.end { block.bytes() } else { block.offset_of(page) };
    let (mut ranges, mut from) = (Vec::new(), pages.start);
    while let Some(first) = claims.first(from..pages.end, false) {
        from = claims.first(first..pages.end, true).unwrap_or(pages.end);
        ranges.push(DiscardRange { start: offset(first), len: offset(from) - offset(first) });
    }
    ranges
}

/// The values of PINGs, which are QEMU's.
pub(super) const PING_DISCARDED: u32 = 2;
pub(super) const PING_LOADED: u32 = Package::PING;

/// 256 KiB.
const PREFETCHED_AT_ONCE: usize = 64;

#[cfg(test)]
mod tests {
    use multifd_proto::BlockName;

    use super::*;
    use crate::layout::Layout;

    #[test]
    fn all_but_what_was_sent_is_discarded() {
        let layout =
            Layout::new(4096, [("a", 1), ("b", 6)].map(|(name, pages)| (BlockName::new(name).unwrap(), pages * 4096)));
        let layout = layout.unwrap();
        let range = |start: u64, pages: u64| DiscardRange { start: start * 4096, len: pages * 4096 };
        let [a, b] = layout.blocks() else { panic!("two blocks") };
        let claims = Claims::new(&layout).unwrap();
        assert_eq!(discarded(a, &claims), [range(0, 1)]);
        assert_eq!(discarded(b, &claims), [range(0, 6)]);
        for page in [64, 66, 67] {
            claims.claim(page);
        }
        assert_eq!(discarded(b, &claims), [range(1, 1), range(4, 2)]);
        for page in b.page_range() {
            claims.claim(page);
        }
        assert_eq!(discarded(b, &claims), []);
        assert_eq!(discarded(a, &claims), [range(0, 1)]);
    }
}

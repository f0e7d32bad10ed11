//! One connection that carries pages, and the thread that writes to it.

use multifd_proto::encoder::MainEncoder;

use super::{
    Attempt,
    figures::Reason,
    inbox::Urgent,
    trace::{HandOver, Via},
};
use crate::{
    error::{Connection, Error, Place},
    sync::{Arc, atomic::Ordering::Relaxed},
    transport::SendHalf,
};

/// The writing half of main, or of the preempt connection.
pub(super) struct PageConnection {
    stream: Box<dyn SendHalf>,
    connection: Connection,
    attempt: Arc<Attempt>,
    encoder: MainEncoder,
    /// Contents of pages, to be used again.
    contents: Vec<u8>,
    /// Bytes sent.
    sent: u64,
}

impl PageConnection {
    pub(super) fn new(stream: Box<dyn SendHalf>, connection: Connection, attempt: &Arc<Attempt>) -> PageConnection {
        PageConnection {
            stream,
            connection,
            attempt: attempt.clone(),
            encoder: MainEncoder::default(),
            contents: Vec::new(),
            sent: 0,
        }
    }

    /// Bytes to be sent next.
    pub(super) fn encoder(&mut self) -> &mut MainEncoder {
        &mut self.encoder
    }

    /// Sends what the encoder has.
    pub(super) fn send(&mut self) -> Result<(), Error> {
        let bytes = &self.encoder.bytes;
        if bytes.is_empty() {
            return Ok(());
        }
        let place = Place { connection: self.connection, offset: self.sent };
        if let Err(source) = self.stream.write(bytes, &[]) {
            self.attempt.refused.store(true, Relaxed);
            return Err(Error::Io { at: place, source });
        }
        let job = &self.attempt.job;
        self.sent += bytes.len() as u64;
        self.attempt.pulse.add(bytes.len());
        job.figures.add_bytes(self.connection == Connection::Preempt, bytes.len() as u64);
        job.progress.add_main_bytes(bytes.len() as u64);
        self.encoder.bytes.clear();
        Ok(())
    }

    /// Answers a request with all of its pages that are not on their way.
    pub(super) fn answer(&mut self, urgent: &Urgent) -> Result<(), Error> {
        let job = self.attempt.job.clone();
        let mut answered = false;
        for batch in batches(urgent.pages.clone(), ANSWER) {
            let claimed: Vec<u64> = batch.filter(|&page| job.claim(page)).collect();
            self.sends(&claimed);
            self.send_claimed(&claimed, Reason::Asked)?;
            answered |= !claimed.is_empty();
        }
        job.go_on_from(urgent.pages.end);
        if answered {
            job.figures.add_latency(urgent.asked.elapsed());
        }
        Ok(())
    }

    /// Tells that `pages` are about to be sent.
    pub(super) fn sends(&self, pages: &[u64]) {
        self.attempt.job.step(|| HandOver::Send(Via::of(self.connection), pages.to_vec()));
    }

    /// Sends `pages`, which this thread has claimed, in order.
    pub(super) fn send_claimed(&mut self, pages: &[u64], reason: Reason) -> Result<(), Error> {
        let (mut rest, mut zeros) = (pages, 0);
        while let Some(&first) = rest.first() {
            let (run, after) = rest.split_at(self.run(rest));
            rest = after;
            zeros += self.encode(first, run.len() as u64)?;
        }
        self.send()?;
        let (job, sent) = (&self.attempt.job, pages.len() as u64);
        job.figures.add_pages(reason, sent, zeros);
        job.progress.add_pages(sent - zeros, zeros);
        Ok(())
    }

    /// How many of `pages` at its beginning follow each other in one block and are of one kind.
    fn run(&self, pages: &[u64]) -> usize {
        let (first, present) = (pages[0], self.attempt.job.pages.present());
        let block = self.attempt.job.pages.layout().block_of(first);
        let is_like_first = |&(index, &page): &(usize, &u64)| {
            page == first + index as u64
                && present.contains(page) == present.contains(first)
                && self.attempt.job.pages.layout().block_of(page) == block
        };
        pages.iter().enumerate().take_while(is_like_first).count()
    }

    /// Encodes `count` pages from `first` on, all zeros or all with content. Returns how many are zeros.
    fn encode(&mut self, first: u64, count: u64) -> Result<u64, Error> {
        let job = self.attempt.job.clone();
        let layout = job.pages.layout();
        let index = layout.block_of(first).expect("only pages of a block are claimed");
        let block = &layout.blocks()[index];
        let pages = first..first + count;
        if !job.pages.present().contains(first) {
            for page in pages {
                self.encoder.zero_page(block.name(), block.offset_of(page));
            }
            return Ok(count);
        }
        job.pages.read(index, first, count as usize, &mut self.contents)?;
        for (page, content) in pages.zip(self.contents.chunks_exact(layout.page_size())) {
            self.encoder.page(block.name(), block.offset_of(page)).raw(content);
        }
        Ok(0)
    }

    /// Ends the connection: the destination reads to its end.
    pub(super) fn finish(&mut self) {
        if let Err(error) = self.stream.finish() {
            tracing::debug!(%error, "at the end of a connection");
        }
    }
}

/// `pages` in parts of at most `most`.
fn batches(pages: std::ops::Range<u64>, most: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    pages.clone().step_by(most as usize).map(move |first| first..pages.end.min(first + most))
}

/// Pages of one request that are sent at once.
const ANSWER: u64 = 64;

//! Lets a QEMU that has switched to postcopy have its VM back, after the destination that it switched to has failed.
//!
//! Such a QEMU keeps its guest paused and refuses to let it run: it waits for its migration to be continued. Here it is told, on a new
//! connection, that every page was received. It sends nothing more, its migration is completed, and its guest can be resumed by
//! the operator. This is only right where nothing runs on the memory that was sent, as with a checkpoint that was not completed.

use std::{
    io,
    time::{Duration, Instant},
};

use multifd_proto::{
    BlockName, Codec, Step, Violation,
    command::Command,
    postcopy::{Beginning, received},
    return_path::Message,
    stream,
};

use super::greeting::LOGGED_STRANGERS;
use crate::{
    error::{Connection, Error, Mismatch, Place},
    stop::StopHandle,
    transport::{Listen, Stream, end_if_untaken},
};

/// Waits at `from` for the source of a VM with these `blocks` (name and length in bytes) to continue its migration, and completes that.
///
/// On `Ok` the source was told that its migration is completed: its guest is paused there and can be resumed. On `Err` it was not, and
/// this can be done again.
///
/// # Errors
/// The source has another block, or sends pages; the connection's; [`Error::Cancelled`] where `stop` says so. A connection that does not
/// continue a migration is dropped, and the next one is waited for.
pub fn give_back(from: &mut dyn Listen, blocks: &[(BlockName, u64)], stop: &StopHandle) -> Result<(), Error> {
    let at = Place { connection: Connection::Unknown(0), offset: 0 };
    let _listening = stop.register_for_now(from.stopper().map_err(Error::io(at))?);
    let given = accept(from, blocks, stop);
    // What stops it is the reason, not what the stopped connection says.
    match (given, stop.is_stopped()) {
        (Err(_), true) => Err(stop.take_first().unwrap_or(Error::Cancelled)),
        (given, _) => given,
    }
}

fn accept(from: &mut dyn Listen, blocks: &[(BlockName, u64)], stop: &StopHandle) -> Result<(), Error> {
    for number in 0.. {
        let at = Place { connection: Connection::Unknown(number), offset: 0 };
        let pending = from.accept(None).map_err(Error::io(at))?;
        let _pending = stop.register_for_now(pending.stopper().map_err(Error::io(at))?);
        let peer = pending.peer();
        let mut stream = match pending.establish(Some(PATIENCE)) {
            Ok(stream) => stream,
            Err(_) if stop.is_stopped() => return Err(Error::Stopped),
            Err(error) => {
                drops(number, &peer, &format!("is not established: {error}"));
                continue;
            }
        };
        end_if_untaken(&mut *stream, Some(PATIENCE));
        let _stream = stop.register_for_now(stream.stopper().map_err(Error::io(at))?);
        let mut main = Continued { stream: &mut *stream, buf: Vec::new(), used: 0, since: Instant::now() };
        main.stream.set_read_timeout(Some(PATIENCE)).map_err(Error::io(at))?;
        let begins = main.fill(Beginning::LEN).map(|()| Beginning::of(*main.buf.first_chunk().expect("so many bytes")));
        match begins {
            Ok(Beginning::Recovery) => return main.complete(blocks),
            _ if stop.is_stopped() => return Err(Error::Stopped),
            Ok(_) => drops(number, &peer, "does not continue a migration"),
            Err(error) => drops(number, &peer, &format!("does not say what it is: {error}")),
        }
    }
    unreachable!("there are fewer connections")
}

/// Says that connection `number` is dropped, and why. One that comes again and again must not fill the log.
fn drops(number: usize, peer: &str, what: &str) {
    if (number as u64) < LOGGED_STRANGERS {
        tracing::warn!(peer, what, "drops a connection that is none of this migration");
    } else {
        tracing::debug!(peer, what, number, "drops a connection that is none of this migration");
    }
}

/// The new main connection.
struct Continued<'a> {
    stream: &'a mut dyn Stream,
    /// What was received and not used.
    buf: Vec<u8>,
    used: u64,
    since: Instant,
}

impl Continued<'_> {
    fn complete(&mut self, blocks: &[(BlockName, u64)]) -> Result<(), Error> {
        while !self.command(blocks)? {}
        let mut ended = false;
        loop {
            self.fill(1)?;
            match self.buf[0] {
                stream::EOF if ended => break,
                PART | END => {
                    ended |= self.buf[0] == END;
                    self.empty_section()?;
                }
                _ => return Err(self.refused("anything but empty sections of ram")),
            }
        }
        self.reply(&Message::Shut(0), &[])?;
        // It was told. It closes the connection when it has read that; what else happens on it changes nothing.
        while self.since.elapsed() <= LONGEST && self.stream.read(&mut [0; 512]).is_ok_and(|n| n > 0) {}
        Ok(())
    }

    /// Answers one command; whether it was the last.
    fn command(&mut self, blocks: &[(BlockName, u64)]) -> Result<bool, Error> {
        self.fill(1)?;
        if self.buf[0] != COMMAND {
            return Err(self.refused("anything but commands"));
        }
        let command = loop {
            match Command::decode(&self.buf[1..]).map_err(Error::protocol(self.place()))? {
                Step::Item { item, used } => {
                    self.use_up(1 + used);
                    break item;
                }
                Step::Need(total) => self.fill(1 + total)?,
            }
        };
        match command {
            Command::RecvBitmap { block } => {
                let Some((_, len)) = blocks.iter().find(|(name, _)| *name == block) else {
                    return Err(Mismatch::BlockSizeUnknown { name: block }.into());
                };
                let mut bitmap = Vec::new();
                received::encode_all(len / PAGE_SIZE, &mut bitmap);
                self.reply(&Message::RecvBitmap { block }, &bitmap)?;
                Ok(false)
            }
            Command::PostcopyResume => {
                self.reply(&Message::ResumeAck(1), &[])?;
                Ok(true)
            }
            _ => Err(self.refused("other commands than those of a recovery")),
        }
    }

    /// A section of ram without pages: its id, the end of its body, its footer.
    fn empty_section(&mut self) -> Result<(), Error> {
        self.fill(SECTION)?;
        let (id, body, footer) = (&self.buf[1..5], &self.buf[5..13], &self.buf[13..SECTION]);
        if *body != EOS || footer[0] != stream::FOOTER || footer[1..] != *id {
            return Err(self.refused("pages, all of which were said to be here"));
        }
        self.use_up(SECTION);
        Ok(())
    }

    fn reply(&mut self, message: &Message, behind: &[u8]) -> Result<(), Error> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        bytes.extend_from_slice(behind);
        let at = Place { connection: Connection::ReturnPath, offset: 0 };
        self.stream.write(&bytes, &[]).map_err(Error::io(at))
    }

    fn fill(&mut self, total: usize) -> Result<(), Error> {
        let mut more = [0; 512];
        while self.buf.len() < total {
            // A byte now and then, or commands without end, are no recovery.
            if self.since.elapsed() > LONGEST {
                return Err(Error::Stalled { limit: LONGEST });
            }
            let n = self.stream.read(&mut more).map_err(Error::io(self.place()))?;
            if n == 0 {
                return Err(Error::Io { at: self.place(), source: io::ErrorKind::UnexpectedEof.into() });
            }
            self.buf.extend_from_slice(&more[..n]);
        }
        Ok(())
    }

    fn use_up(&mut self, len: usize) {
        self.buf.drain(..len);
        self.used += len as u64;
    }

    fn refused(&self, what: &'static str) -> Error {
        let place = "where a source takes its VM back";
        Error::protocol(self.place())(Violation::UnexpectedElement { element: what, place })
    }

    fn place(&self) -> Place {
        Place { connection: Connection::Main, offset: self.used }
    }
}

const COMMAND: u8 = 0x08;
const PART: u8 = 0x02;
const END: u8 = 0x03;
/// The word that ends the body of a section of ram.
const EOS: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 0x10];
/// Bytes of a section of ram without pages.
const SECTION: usize = 1 + 4 + 8 + 5;
/// The page size of everything that is migrated.
const PAGE_SIZE: u64 = 4096;
/// How long a connection may say nothing.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long all that it has to say may take: some hundred bytes.
const LONGEST: Duration = Duration::from_secs(60);

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::thread;

    use super::*;
    use crate::{testing::memory, transport::Connect};

    fn blocks() -> Vec<(BlockName, u64)> {
        [("ram", 70), ("rom", 1)].map(|(name, pages)| (BlockName::new(name).unwrap(), pages * PAGE_SIZE)).into()
    }

    fn encoded(commands: &[Command]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for command in commands {
            bytes.push(COMMAND);
            command.encode(&mut bytes);
        }
        bytes
    }

    fn recovery(names: &[&str]) -> Vec<u8> {
        let mut commands: Vec<_> =
            names.iter().map(|name| Command::RecvBitmap { block: BlockName::new(name).unwrap() }).collect();
        commands.push(Command::PostcopyResume);
        encoded(&commands)
    }

    const ENDS: &[u8] = b"\x03\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\0";

    /// Lets each of `wires` connect, say its bytes and listen until the other end closes; returns what was said to each.
    fn given(wires: Vec<Vec<u8>>) -> (Result<(), Error>, Vec<Vec<u8>>) {
        test_support::time_limit(Duration::from_secs(60), move || {
            let (mut listener, connector) = memory::listener(1 << 20);
            let source = thread::spawn(move || {
                let mut heard = Vec::new();
                for wire in wires {
                    let mut stream = connector.connect().unwrap();
                    stream.write(&wire, &[]).unwrap();
                    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
                    let shut = [0, 1, 0, 4, 0, 0, 0, 0];
                    while let Ok(n @ 1..) = stream.read(&mut part) {
                        bytes.extend_from_slice(&part[..n]);
                        if bytes.ends_with(&shut) {
                            break;
                        }
                    }
                    heard.push(bytes);
                }
                heard
            });
            let given = give_back(&mut listener, &blocks(), &StopHandle::new());
            drop(listener);
            (given, source.join().unwrap())
        })
    }

    #[test]
    fn a_source_is_told_that_every_page_is_here_and_that_it_is_done() {
        let (given, heard) =
            given(vec![b"QEVM\0\0\0\x03".to_vec(), [recovery(&["ram", "rom"]), ENDS.to_vec()].concat()]);
        given.unwrap();
        assert!(heard[0].is_empty(), "the first connection is none that continues a migration");
        let mut expected = Vec::new();
        for (name, bitmap) in [
            ("ram", &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x3f, 0, 0, 0, 0, 0, 0, 0][..]),
            ("rom", &[1, 0, 0, 0, 0, 0, 0, 0]),
        ] {
            Message::RecvBitmap { block: BlockName::new(name).unwrap() }.encode(&mut expected);
            expected.extend_from_slice(&(bitmap.len() as u64).to_be_bytes());
            expected.extend_from_slice(bitmap);
            expected.extend_from_slice(&0x0123_4567_89ab_cdefu64.to_be_bytes());
        }
        Message::ResumeAck(1).encode(&mut expected);
        Message::Shut(0).encode(&mut expected);
        assert_eq!(heard[1], expected);
    }

    #[test]
    fn a_source_with_another_block_or_with_pages_is_not_told_that_it_is_done() {
        let page = b"\x02\0\0\0\x02\0\0\0\0\0\0\0\x08\x03ram";
        for (wire, message) in [
            (recovery(&["ram", "vga"]), "the source has RAM block \"vga\", whose size was not given"),
            ([recovery(&["ram"]), page.to_vec(), vec![7; 4096]].concat(), "pages, all of which were said to be here"),
            ([recovery(&["ram"]), b"\x04".to_vec()].concat(), "anything but empty sections of ram"),
            ([recovery(&["ram"]), b"\0".to_vec()].concat(), "anything but empty sections of ram"),
            (
                [encoded(&[Command::RecvBitmap { block: blocks()[0].0.clone() }]), encoded(&[Command::PostcopyRun])]
                    .concat(),
                "other commands",
            ),
        ] {
            let (given, heard) = given(vec![wire]);
            let error = given.unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
            assert!(!heard[0].ends_with(&[0, 1, 0, 4, 0, 0, 0, 0]), "{message}: told that it is done");
        }
    }

    /// The result said that it was not told.
    #[test]
    fn a_source_that_was_told_was_told_whatever_happens_then() {
        test_support::time_limit(Duration::from_secs(60), || {
            let (mut listener, connector) = memory::listener(1 << 20);
            let stop = StopHandle::new();
            let cancel = stop.clone();
            let source = thread::spawn(move || {
                let mut stream = connector.connect().unwrap();
                stream.write(&[recovery(&["ram", "rom"]), ENDS.to_vec()].concat(), &[]).unwrap();
                let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
                while !bytes.ends_with(&[0, 1, 0, 4, 0, 0, 0, 0]) {
                    let n = stream.read(&mut part).unwrap();
                    bytes.extend_from_slice(&part[..n]);
                }
                cancel.cancel();
                stream
            });
            give_back(&mut listener, &blocks(), &stop).unwrap();
            source.join().unwrap();
        });
    }

    #[test]
    fn a_cancel_ends_the_wait() {
        test_support::time_limit(Duration::from_secs(60), || {
            let (mut listener, _connector) = memory::listener(1 << 10);
            let stop = StopHandle::new();
            let cancel = stop.clone();
            let waiting = thread::spawn(move || give_back(&mut listener, &blocks(), &stop));
            cancel.cancel();
            assert!(matches!(waiting.join().unwrap(), Err(Error::Cancelled)));
        });
    }
}

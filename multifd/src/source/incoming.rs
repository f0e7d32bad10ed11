//! The bytes of the return path, as they come: messages, and what follows one outside of it.

use multifd_proto::{
    Codec, Step,
    extension::MAX_DESCRIPTION,
    return_path::{MAX_PAYLOAD, Message},
};

use crate::{
    error::{Connection, Error, Place},
    pulse::Pulse,
    transport::RecvHalf,
};

/// A small buffer in front of the decoder of messages.
pub(super) struct Incoming<'a> {
    stream: &'a mut dyn RecvHalf,
    pulse: &'a Pulse,
    buf: [u8; 4 + MAX_PAYLOAD as usize],
    /// `filled <= buf.len()`: received, and not yet used.
    filled: usize,
    /// Bytes before `buf`.
    position: u64,
}

impl<'a> Incoming<'a> {
    pub(super) fn new(stream: &'a mut dyn RecvHalf, pulse: &'a Pulse) -> Incoming<'a> {
        Incoming { stream, pulse, buf: [0; 4 + MAX_PAYLOAD as usize], filled: 0, position: 0 }
    }

    /// The next message, and where it began.
    ///
    /// # Errors
    /// Not a message; the connection's; [`Error::Unconfirmed`] at its end.
    pub(super) fn next(&mut self) -> Result<(Message, Place), Error> {
        loop {
            let place = self.place();
            match Message::decode(&self.buf[..self.filled]).map_err(Error::protocol(place))? {
                Step::Item { item, used } => {
                    self.consume(used);
                    return Ok((item, place));
                }
                Step::Need(_) => self.filled += receive(self.stream, self.pulse, place, &mut self.buf[self.filled..])?,
            }
        }
    }

    /// The `len` bytes that follow the message before outside of it: at most [`MAX_DESCRIPTION`].
    ///
    /// # Errors
    /// The connection's; [`Error::Unconfirmed`] at its end.
    pub(super) fn take(&mut self, len: u32) -> Result<Vec<u8>, Error> {
        debug_assert!(len <= MAX_DESCRIPTION, "checked where it was read");
        let mut bytes = vec![0; len as usize];
        let mut done = bytes.len().min(self.filled);
        bytes[..done].copy_from_slice(&self.buf[..done]);
        self.consume(done);
        while done < bytes.len() {
            let place = self.place();
            let n = receive(self.stream, self.pulse, place, &mut bytes[done..])?;
            done += n;
            self.position += n as u64;
        }
        Ok(bytes)
    }

    fn place(&self) -> Place {
        Place { connection: Connection::ReturnPath, offset: self.position }
    }

    fn consume(&mut self, used: usize) {
        self.buf.copy_within(used..self.filled, 0);
        self.filled -= used;
        self.position += used as u64;
    }
}

/// Receives at least one byte into `into`.
fn receive(stream: &mut dyn RecvHalf, pulse: &Pulse, at: Place, into: &mut [u8]) -> Result<usize, Error> {
    match stream.read(into) {
        Ok(0) => Err(Error::Unconfirmed),
        Ok(n) => {
            pulse.add(n);
            Ok(n)
        }
        Err(source) => Err(Error::Io { at, source }),
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::io;

    use super::*;
    use crate::{ram::GuestRange, transport::Stopper};

    /// A connection that gives so many bytes at a time.
    struct Parts {
        bytes: Vec<u8>,
        size: usize,
    }

    impl RecvHalf for Parts {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = self.size.min(buf.len()).min(self.bytes.len());
            buf[..n].copy_from_slice(&self.bytes[..n]);
            self.bytes.drain(..n);
            Ok(n)
        }

        fn read_pages(&mut self, _pages: &[GuestRange<'_>]) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    #[test]
    fn what_follows_a_message_outside_of_it_ends_where_it_says() {
        for len in [0, 1, 511, 512, 5000] {
            for size in [1, 7, 516, 10_000] {
                let answer: Vec<u8> = (0..len).map(|n| n as u8).collect();
                let mut bytes = Vec::new();
                Message::Prepared { len }.encode(&mut bytes);
                bytes.extend_from_slice(&answer);
                Message::Ready.encode(&mut bytes);
                let total = bytes.len() as u64;
                let mut stream = Parts { bytes, size };
                let pulse = Pulse::default();
                let mut incoming = Incoming::new(&mut stream, &pulse);
                assert_eq!(incoming.next().unwrap().0, Message::Prepared { len });
                assert!(incoming.take(len).unwrap() == answer, "{len} bytes in parts of {size}");
                let (message, place) = incoming.next().unwrap();
                assert_eq!((message, place.offset), (Message::Ready, total - 4));
                assert!(matches!(incoming.next(), Err(Error::Unconfirmed)));
            }
        }
    }

    #[test]
    fn an_answer_that_is_cut_off_is_the_end_of_the_connection() {
        let mut bytes = Vec::new();
        Message::Prepared { len: 600 }.encode(&mut bytes);
        bytes.resize(bytes.len() + 599, 1);
        let pulse = Pulse::default();
        let mut stream = Parts { bytes, size: 100 };
        let mut incoming = Incoming::new(&mut stream, &pulse);
        assert_eq!(incoming.next().unwrap().0, Message::Prepared { len: 600 });
        assert!(matches!(incoming.take(600), Err(Error::Unconfirmed)));
    }
}

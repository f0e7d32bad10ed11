//! Postcopy: the guest runs at the destination before its memory is there.
//!
//! ```text
//!  source                                                            destination
//!  OPEN_RETURN_PATH · PING 1 · ADVISE · START ram · [PART ram …]
//!  RAM_DISCARD for every block · PING 2
//!  PACKAGED { LISTEN · FULL device … · PING 3 · RUN } · PING 4        the guest runs
//!  PART ram: pages as they are asked for, then all others    ◀────    REQ_PAGES_ID, REQ_PAGES
//!  END ram · EOF                                             ◀────    SHUT(0)
//! ```
//!
//! Commands are in [`crate::command`], messages in [`crate::return_path`]. Here is what belongs to no single one of them: the
//! ranges of RAM_DISCARD ([`DiscardRange`]), the contents of a package ([`Package`]), a destination's requests with their memory of the
//! last block ([`Requests`]), the bare words of a preempt connection ([`PreemptDecoder`]), and what a recovery exchanges
//! ([`received`]): a recovery connection has no header, it begins with RECV_BITMAP for each block, and each answer has a bitmap
//! outside of its message.

mod connection_end;
pub(crate) mod discard;
mod package;
mod preempt;
pub mod received;
mod request;

pub use self::{
    connection_end::{MeaningAfterSwitch, ReachedAfterSwitch, meaning_after_switch},
    discard::DiscardRange,
    package::Package,
    preempt::{PreemptDecoder, PreemptItem},
    request::{Request, Requests},
};
use crate::packet;
use crate::stream;

/// What the first bytes of a connection say it is, where postcopy is possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// Main, with the header of a stream.
    Main,
    /// A multifd channel.
    Channel,
    /// Main of a recovery: no header, the command RECV_BITMAP.
    Recovery,
    /// Something without a magic number: a preempt connection, if there is one.
    Bare,
}

impl Beginning {
    /// How many bytes are looked at.
    pub const LEN: usize = 4;

    /// What a connection is that begins with `bytes`.
    ///
    /// No page of a preempt connection is mistaken for something else: the first four bytes of its first word are the
    /// upper half of an offset, and a block with such an offset would have petabytes.
    pub const fn of(bytes: [u8; Self::LEN]) -> Self {
        match u32::from_be_bytes(bytes) {
            stream::MAGIC => Self::Main,
            packet::MAGIC => Self::Channel,
            // The byte of a command, its number, and the upper half of a length that is at most 256.
            0x0800_0a00 | 0x0800_0a01 => Self::Recovery,
            _ => Self::Bare,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;
    use crate::encoder::MainEncoder;
    use crate::ids::BlockName;

    fn beginning(encoder: &MainEncoder) -> Beginning {
        Beginning::of(*encoder.bytes.first_chunk().unwrap())
    }

    #[test]
    fn connections_are_told_by_their_first_bytes() {
        let block = |len| BlockName::new(&"x".repeat(len)).unwrap();
        assert_eq!(beginning(MainEncoder::default().header()), Beginning::Main);
        for len in [1, 6, 254, 255] {
            let command = Command::RecvBitmap { block: block(len) };
            assert_eq!(beginning(MainEncoder::default().command(&command)), Beginning::Recovery);
        }
        assert_eq!(Beginning::of(*b"\x11\x22\x33\x44"), Beginning::Channel);
        for offset in [0, 0x1000, 1 << 45] {
            assert_eq!(beginning(MainEncoder::default().page(&block(1), offset)), Beginning::Bare);
        }
        assert_eq!(beginning(MainEncoder::default().eos()), Beginning::Bare);
    }
}

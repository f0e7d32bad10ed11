//! What the destination asks for: REQ_PAGES_ID names a block, REQ_PAGES means the block of the request before.

use crate::ids::BlockName;
use crate::ram::BlockEntry;
use crate::return_path::Message;
use crate::violation::Violation;

/// Pages of one block that the guest waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The index of the block in the block list.
    pub block: usize,
    /// The offset of the first page inside it, a multiple of the page size.
    pub start: u64,
    /// How many bytes: whole pages, at least one, all inside the block.
    pub len: u32,
}

/// Reads the requests of one connection.
#[derive(Debug, Default)]
pub struct Requests {
    /// The block of the request before.
    last: Option<usize>,
}

impl Requests {
    /// The request in `message`; `None` for a message of another kind.
    ///
    /// # Errors
    /// [`Violation::UnknownBlock`], [`Violation::FirstRequestWithoutBlock`], and [`Violation::BadRequest`] for a request that
    /// is not for whole pages inside the block. After an error the next request has to name its block.
    pub fn accept(
        &mut self,
        message: &Message,
        blocks: &[BlockEntry],
        page_size: u64,
    ) -> Result<Option<Request>, Violation> {
        let last = self.last.take();
        let (block, start, len) = match message {
            Message::ReqPagesId { start, len, block: name } => {
                let block = blocks.iter().position(|block| block.name == *name);
                let block = block.ok_or_else(|| Violation::UnknownBlock { name: name.clone() })?;
                (block, *start, *len)
            }
            Message::ReqPages { start, len } => {
                let block = last.ok_or(Violation::FirstRequestWithoutBlock { start: *start })?;
                (block, *start, *len)
            }
            _ => {
                self.last = last;
                return Ok(None);
            }
        };
        let (name, block_len) = (&blocks[block].name, blocks[block].used_len);
        check(name, block_len, start, len, page_size)?;
        self.last = Some(block);
        Ok(Some(Request { block, start, len }))
    }

    /// What a request that names no block may mean, where the one before is not known: these pages of every block that has them.
    ///
    /// A destination that goes on over a new connection may mean the block that it named on the one before, which perhaps went to
    /// another process.
    pub fn of_any_block(message: &Message, blocks: &[BlockEntry], page_size: u64) -> Vec<Request> {
        let Message::ReqPages { start, len } = *message else { return Vec::new() };
        let has_them = |entry: &BlockEntry| check(&entry.name, entry.used_len, start, len, page_size).is_ok();
        let having = blocks.iter().enumerate().filter(|(_, entry)| has_them(entry));
        having.map(|(block, _)| Request { block, start, len }).collect()
    }

    /// The message that asks for `request` after those asked for before on this connection.
    ///
    /// # Panics
    /// If there is no such block.
    #[cfg(test)]
    pub(crate) fn ask(&mut self, request: Request, blocks: &[BlockEntry]) -> Message {
        let Request { block, start, len } = request;
        if self.last.replace(block) == Some(block) {
            return Message::ReqPages { start, len };
        }
        Message::ReqPagesId { start, len, block: blocks[block].name.clone() }
    }
}

fn check(block: &BlockName, block_len: u64, start: u64, len: u32, page_size: u64) -> Result<(), Violation> {
    let inside = start.checked_add(len.into()).is_some_and(|end| end <= block_len);
    let whole = start.is_multiple_of(page_size) && u64::from(len).is_multiple_of(page_size);
    match len > 0 && inside && whole {
        true => Ok(()),
        false => Err(Violation::BadRequest { block: block.clone(), start, len, block_len }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks() -> Vec<BlockEntry> {
        [("pc.ram", 0x4000), ("pc.bios", 0x2000)]
            .map(|(name, len)| BlockEntry::new(BlockName::new(name).unwrap(), len))
            .to_vec()
    }

    #[test]
    fn a_request_without_a_name_is_for_the_block_before() {
        let (blocks, mut source, mut destination) = (blocks(), Requests::default(), Requests::default());
        for (block, start, len, named) in
            [(1, 0, 0x1000, true), (1, 0x1000, 0x1000, false), (0, 0x3000, 0x1000, true), (0, 0, 0x4000, false)]
        {
            let request = Request { block, start, len };
            let message = destination.ask(request, &blocks);
            assert_eq!(matches!(message, Message::ReqPagesId { .. }), named);
            assert_eq!(source.accept(&Message::Pong(1), &blocks, 0x1000), Ok(None));
            assert_eq!(source.accept(&message, &blocks, 0x1000), Ok(Some(request)));
        }
    }

    #[test]
    fn a_request_for_what_does_not_exist_is_refused() {
        let blocks = blocks();
        let accept = |message: &Message| Requests::default().accept(message, &blocks, 0x1000);
        let first = Violation::FirstRequestWithoutBlock { start: 0x1000 };
        assert_eq!(accept(&Message::ReqPages { start: 0x1000, len: 0x1000 }), Err(first));
        let name = BlockName::new("vga.vram").unwrap();
        let unknown = Message::ReqPagesId { start: 0, len: 0x1000, block: name.clone() };
        assert_eq!(accept(&unknown), Err(Violation::UnknownBlock { name }));
        for (start, len) in [
            (0, 0),
            (0, 1),
            (0x800, 0x1000),
            (0x4000, 0x1000),
            (0x3000, 0x2000),
            (0, u32::MAX),
            (u64::MAX - 0xfff, 0x1000),
        ] {
            let block = blocks[0].name.clone();
            let refused = Violation::BadRequest { block: block.clone(), start, len, block_len: 0x4000 };
            assert_eq!(accept(&Message::ReqPagesId { start, len, block }), Err(refused));
        }
    }

    #[test]
    fn after_a_refusal_a_block_has_to_be_named() {
        let (blocks, mut requests) = (blocks(), Requests::default());
        let block = blocks[0].name.clone();
        assert!(requests.accept(&Message::ReqPagesId { start: 0, len: 0x1000, block }, &blocks, 0x1000).is_ok());
        assert!(requests.accept(&Message::ReqPages { start: 1, len: 0x1000 }, &blocks, 0x1000).is_err());
        let first = Violation::FirstRequestWithoutBlock { start: 0 };
        assert_eq!(requests.accept(&Message::ReqPages { start: 0, len: 0x1000 }, &blocks, 0x1000), Err(first));
    }
}

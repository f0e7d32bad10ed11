//! Compresses page contents. Refuses to, so far: the zlib and zstd codecs replace this.

use std::io;

use multifd_proto::packet::Compression;

use crate::ram::GuestRange;

pub(crate) struct Compressor;

impl Compressor {
    pub(crate) fn new(_method: Compression, _level: i32) -> io::Result<Compressor> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn compress(&mut self, _pages: &[GuestRange<'_>], _out: &mut Vec<u8>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

pub(crate) struct Decompressor;

impl Decompressor {
    pub(crate) fn new(_method: Compression) -> io::Result<Decompressor> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn decompress(&mut self, _payload: &[u8], _out: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// One page from a complete zlib stream.
pub(crate) fn inflate_page(_payload: &[u8], _page: &mut [u8]) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

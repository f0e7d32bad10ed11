//! Unpacks streams, with bounds for the memory that it takes.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use liblzma::read::XzDecoder;

/// How a stream is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// It is not.
    None,
    /// With gzip.
    Gzip,
    /// With xz.
    Xz,
    /// With zstd.
    Zstd,
}

impl Packing {
    /// What `bytes` are when they are unpacked. Damaged ones give [`io::ErrorKind::InvalidData`], those that are cut short
    /// [`io::ErrorKind::UnexpectedEof`].
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn unpack(self, bytes: impl Read + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
        let bytes = BufReader::with_capacity(1 << 16, bytes);
        let (name, inner): (_, Box<dyn Read + Send>) = match self {
            Packing::None => return Ok(Box::new(bytes)),
            Packing::Gzip => ("gzip", Box::new(MultiGzDecoder::new(bytes))),
            Packing::Xz => ("xz", xz(bytes)?),
            Packing::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(bytes)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                ("zstd", Box::new(decoder))
            }
        };
        Ok(Box::new(Unpacked { name, inner }))
    }
}

/// Unpacks xz.
///
/// # Errors
/// There is no memory for it.
pub fn xz(bytes: impl BufRead + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
    let decoder = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, liblzma::stream::CONCATENATED)?;
    Ok(Box::new(XzDecoder::new_stream(bytes, decoder)))
}

/// Errors of a decoder say what it is, and that the bytes are at fault.
struct Unpacked {
    name: &'static str,
    inner: Box<dyn Read + Send>,
}

impl Read for Unpacked {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.inner.read(into).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::Interrupted => error,
            _ => io::Error::new(io::ErrorKind::InvalidData, format!("cannot be unpacked with {}: {error}", self.name)),
        })
    }
}

/// The most memory that unpacking xz may take: `xz -9` needs 65 MiB, and a file can ask for 4 GiB.
const XZ_MEMORY: u64 = 128 << 20;
/// The longest window of zstd, as the exponent of 2: what `zstd -d` takes without being told.
const ZSTD_WINDOW_LOG: u32 = 27;

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use super::*;

    fn packed(packing: Packing, bytes: &[u8]) -> Vec<u8> {
        match packing {
            Packing::None => bytes.to_vec(),
            Packing::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Packing::Xz => {
                let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Packing::Zstd => zstd::encode_all(bytes, 1).unwrap(),
        }
    }

    fn unpacked(packing: Packing, bytes: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        packing.unpack(Cursor::new(bytes))?.read_to_end(&mut out).map(|_| out)
    }

    #[test]
    fn each_packing_is_undone_also_in_several_pieces() {
        let bytes: Vec<u8> = (0..300_000u32).map(|index| (index.wrapping_mul(index) >> 7) as u8).collect();
        for packing in [Packing::None, Packing::Gzip, Packing::Xz, Packing::Zstd] {
            let pieces = [packed(packing, &bytes[..100_000]), packed(packing, &bytes[100_000..])].concat();
            assert!(unpacked(packing, pieces).unwrap() == bytes, "{packing:?}");
        }
    }

    #[test]
    fn damaged_and_cut_bytes_are_told_apart() {
        let bytes: Vec<u8> = (0..300_000u32).map(|index| (index.wrapping_mul(index) >> 7) as u8).collect();
        for packing in [Packing::Gzip, Packing::Xz, Packing::Zstd] {
            let good = packed(packing, &bytes);
            let cut = unpacked(packing, good[..good.len() / 2].to_vec()).unwrap_err();
            assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof, "{packing:?}: {cut}");
            let mut damaged = good.clone();
            damaged[0] ^= 0xff;
            let error = unpacked(packing, damaged).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{packing:?}: {error}");
        }
    }

    /// A frame that asks for a window of 2 GiB.
    #[test]
    fn a_window_that_would_cost_much_memory_is_refused() {
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x09, 0, 0, 0];
        let error = unpacked(Packing::Zstd, frame.to_vec()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    }
}

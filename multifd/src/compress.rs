//! Compresses the pages of a packet, and puts them back.
//!
//! We make each packet decodable by itself (a zlib full flush, a zstd frame of its own): it is faster than a stream per
//! channel and QEMU accepts it. QEMU's own packets continue one stream per channel, with references into earlier ones,
//! so a [`Decompressor`] belongs to one channel and has to see each payload of it, in order.

use std::io;

use multifd_proto::packet::Compression;

use crate::{
    ram::GuestRange,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// Compresses the packets of one channel.
pub(crate) struct Compressor {
    encoder: Box<dyn Encode>,
    /// The pages of the current packet: the guest writes to its memory meanwhile, and compressors read twice.
    pages: Vec<u8>,
}

impl Compressor {
    /// A compressor at `level`: 0 to 9 for zlib; for zstd up to 22, and below 0 for more speed.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a level that the method does not have; [`io::ErrorKind::Unsupported`] for no
    /// method at all, and for one that was left out of this build.
    pub(crate) fn new(method: Compression, level: i32) -> io::Result<Compressor> {
        Ok(Compressor { encoder: encoder(method, level)?, pages: Vec::new() })
    }

    /// Puts the payload of a packet with `pages` behind what is in `out`.
    ///
    /// # Errors
    /// The compressor's, for lack of memory.
    pub(crate) fn compress(&mut self, pages: &[GuestRange<'_>], out: &mut Vec<u8>) -> io::Result<()> {
        self.pages.resize(pages.iter().map(GuestRange::len).sum(), 0);
        let mut rest = &mut self.pages[..];
        for page in pages {
            let (copy, after) = rest.split_at_mut(page.len());
            page.read(copy);
            rest = after;
        }
        self.encoder.encode(&self.pages, out)
    }
}

/// Puts the packets of one channel back. Needs a bounded amount of memory, whatever the peer sends.
pub(crate) struct Decompressor {
    decoder: Box<dyn Decode>,
    shared: Arc<Windows>,
    /// What was counted there.
    counted: usize,
}

/// The memory that the decompressors of one migration have together: a peer chooses the windows of each channel.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    bytes: AtomicUsize,
}

impl Windows {
    /// One decompressor that had `before` bytes has `now`.
    fn changed(&self, before: usize, now: usize) -> io::Result<()> {
        // A count that only one thread changes at a time by its own part.
        let all = match now.checked_sub(before) {
            Some(more) => self.bytes.fetch_add(more, Relaxed) + more,
            None => self.bytes.fetch_sub(before - now, Relaxed) - (before - now),
        };
        if now > before && all > MAX_WINDOWS {
            return Err(damaged(format!("the decompressors of all channels need more than {MAX_WINDOWS} bytes")));
        }
        Ok(())
    }
}

impl Drop for Decompressor {
    fn drop(&mut self) {
        // Less is never refused.
        let _ = self.shared.changed(self.counted, 0);
    }
}

impl Decompressor {
    /// A decompressor for the first packet of a channel and those after it.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] for no method at all, and for one that was left out of this build.
    pub(crate) fn new(method: Compression, shared: &Arc<Windows>) -> io::Result<Decompressor> {
        Ok(Decompressor { decoder: decoder(method)?, shared: shared.clone(), counted: 0 })
    }

    /// Fills `out` from the payload of the next packet.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] where the payload is damaged, ends the stream, or has more or fewer bytes than `out`
    /// takes. The channel cannot go on after an error.
    pub(crate) fn decompress(&mut self, mut payload: &[u8], out: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        // One byte too many shows that there is more than `out` takes.
        let mut surplus = [0];
        loop {
            let room = if filled < out.len() { &mut out[filled..] } else { &mut surplus[..] };
            let (consumed, produced) = self.decoder.step(payload, room)?;
            payload = &payload[consumed..];
            if produced > 0 && filled == out.len() {
                return Err(damaged(format!("the payload decompresses to more than {} bytes", out.len())));
            }
            filled += produced;
            if (consumed, produced) == (0, 0) {
                break;
            }
        }
        let before = std::mem::replace(&mut self.counted, self.decoder.memory());
        self.shared.changed(before, self.counted)?;
        if !payload.is_empty() {
            return Err(damaged(format!("{} bytes of the payload are left over", payload.len())));
        }
        if filled < out.len() {
            return Err(damaged(format!("the payload decompresses to {filled} bytes, not {}", out.len())));
        }
        Ok(())
    }
}

/// Fills `page` from a complete zlib stream, as QEMU's old per-page compression sends it.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] where it is anything else; [`io::ErrorKind::Unsupported`] without zlib in this build.
pub(crate) fn inflate_page(payload: &[u8], page: &mut [u8]) -> io::Result<()> {
    #[cfg(feature = "zlib")]
    return zlib::inflate_page(payload, page);
    #[cfg(not(feature = "zlib"))]
    {
        let _ = (payload, page);
        Err(unsupported(Compression::Zlib))
    }
}

fn encoder(method: Compression, level: i32) -> io::Result<Box<dyn Encode>> {
    match method {
        #[cfg(feature = "zlib")]
        Compression::Zlib => Ok(Box::new(zlib::Encoder::new(level)?)),
        #[cfg(feature = "zstd")]
        Compression::Zstd => Ok(Box::new(zstandard::Encoder::new(level)?)),
        other => {
            // Unused where no method is part of the build.
            let _ = level;
            Err(unsupported(other))
        }
    }
}

fn decoder(method: Compression) -> io::Result<Box<dyn Decode>> {
    match method {
        #[cfg(feature = "zlib")]
        Compression::Zlib => Ok(Box::new(zlib::Decoder::new())),
        #[cfg(feature = "zstd")]
        Compression::Zstd => Ok(Box::new(zstandard::Decoder::new()?)),
        other => Err(unsupported(other)),
    }
}

trait Encode: Send {
    /// Appends `input` to `out` so that it can be decoded with nothing after it.
    fn encode(&mut self, input: &[u8], out: &mut Vec<u8>) -> io::Result<()>;
}

trait Decode: Send {
    /// Goes on with the stream: bytes consumed of `input`, and bytes written to `out`, which is not empty. Both are 0 only
    /// where there is nothing left to do.
    fn step(&mut self, input: &[u8], out: &mut [u8]) -> io::Result<(usize, usize)>;

    /// How much memory it has of which the peer decides.
    fn memory(&self) -> usize {
        0
    }
}

#[cfg(feature = "zlib")]
mod zlib {
    //! One zlib stream per channel, never finished.

    use std::io;

    use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

    use super::{Decode, Encode, check_level, damaged};

    pub(super) struct Encoder(Compress);

    impl Encoder {
        pub(super) fn new(level: i32) -> io::Result<Encoder> {
            let level = check_level("zlib", level, 0..=9)?;
            Ok(Encoder(Compress::new(Compression::new(level.unsigned_abs()), true)))
        }
    }

    impl Encode for Encoder {
        fn encode(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
            // The worst case of the fast levels, which may spend nine bits on a byte.
            out.reserve(input.len() + input.len() / 8 + 64);
            loop {
                let before = self.0.total_in();
                self.0.compress_vec(input, out, FlushCompress::Full).map_err(io::Error::other)?;
                let consumed = self.0.total_in() - before;
                input = &input[usize::try_from(consumed).expect("part of a slice")..];
                // Room left over is how the compressor says that the flush is complete.
                if input.is_empty() && out.len() < out.capacity() {
                    return Ok(());
                }
                out.reserve(4096);
            }
        }
    }

    pub(super) struct Decoder(Decompress);

    impl Decoder {
        pub(super) fn new() -> Decoder {
            Decoder(Decompress::new(true))
        }
    }

    impl Decode for Decoder {
        fn step(&mut self, input: &[u8], out: &mut [u8]) -> io::Result<(usize, usize)> {
            let (consumed, produced, status) = inflate(&mut self.0, input, out, FlushDecompress::Sync)?;
            match status {
                Status::StreamEnd => Err(damaged("the zlib stream ends within the migration".to_owned())),
                Status::Ok | Status::BufError => Ok((consumed, produced)),
            }
        }
    }

    pub(super) fn inflate_page(payload: &[u8], page: &mut [u8]) -> io::Result<()> {
        let end = inflate(&mut Decompress::new(true), payload, page, FlushDecompress::Finish)?;
        if end != (payload.len(), page.len(), Status::StreamEnd) {
            return Err(damaged(format!("a compressed page that does not give {} bytes", page.len())));
        }
        Ok(())
    }

    fn inflate(
        stream: &mut Decompress,
        input: &[u8],
        out: &mut [u8],
        flush: FlushDecompress,
    ) -> io::Result<(usize, usize, Status)> {
        let before = (stream.total_in(), stream.total_out());
        let status = stream.decompress(input, out, flush).map_err(|error| damaged(format!("zlib: {error}")))?;
        let moved = |now: u64, before: u64| usize::try_from(now - before).expect("part of a slice");
        Ok((moved(stream.total_in(), before.0), moved(stream.total_out(), before.1), status))
    }
}

#[cfg(feature = "zstd")]
mod zstandard {
    //! One zstd frame per packet when sending; frames of any length when receiving.

    use std::io::{self, Cursor};

    use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

    use super::{Decode, Encode, check_level, damaged};

    pub(super) struct Encoder(zstd::bulk::Compressor<'static>);

    impl Encoder {
        pub(super) fn new(level: i32) -> io::Result<Encoder> {
            let level = check_level("zstd", level, zstd::compression_level_range())?;
            Ok(Encoder(zstd::bulk::Compressor::new(level)?))
        }
    }

    impl Encode for Encoder {
        fn encode(&mut self, input: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
            out.reserve(zstd::zstd_safe::compress_bound(input.len()));
            // A cursor, because a vector alone would be written from its beginning.
            let mut end = Cursor::new(std::mem::take(out));
            end.set_position(end.get_ref().len() as u64);
            self.0.compress_to_buffer(input, &mut end)?;
            *out = end.into_inner();
            Ok(())
        }
    }

    pub(super) struct Decoder(DCtx<'static>);

    impl Decoder {
        pub(super) fn new() -> io::Result<Decoder> {
            let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
            let set = context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX));
            set.map_err(|code| io::Error::other(get_error_name(code)))?;
            Ok(Decoder(context))
        }
    }

    impl Decode for Decoder {
        fn step(&mut self, input: &[u8], out: &mut [u8]) -> io::Result<(usize, usize)> {
            let (mut input, mut out) = (InBuffer::around(input), OutBuffer::around(out));
            let status = self.0.decompress_stream(&mut out, &mut input);
            status.map_err(|code| damaged(format!("zstd: {}", get_error_name(code))))?;
            Ok((input.pos(), out.pos()))
        }

        fn memory(&self) -> usize {
            self.0.sizeof()
        }
    }

    /// 32 MiB for each channel at most: the window of level 20, the highest that QEMU takes, in a stream of unknown length.
    const WINDOW_LOG_MAX: u32 = 25;
}

#[cfg(any(feature = "zlib", feature = "zstd"))]
fn check_level(method: &str, level: i32, range: std::ops::RangeInclusive<i32>) -> io::Result<i32> {
    if range.contains(&level) {
        return Ok(level);
    }
    let message = format!("{method} has levels from {} to {}, not {level}", range.start(), range.end());
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

/// What the decompressors of one migration may have together: 1 GiB, windows of 32 MiB for 32 channels, or of 4 MiB for 255.
const MAX_WINDOWS: usize = 1 << 30;

fn damaged(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

fn unsupported(method: Compression) -> io::Error {
    let message = match method {
        Compression::None => "pages without compression have no compressor".to_owned(),
        method => format!("compression {method} was left out of this build"),
    };
    io::Error::new(io::ErrorKind::Unsupported, message)
}

#[cfg(all(test, not(any(loom, shuttle)), feature = "zlib", feature = "zstd"))]
pub(crate) mod tests {
    use std::io::Read;

    use fastrand::Rng;
    /// The largest payload that a receiver takes.
    const MAX_COMPRESSED: usize = 1 << 20;

    use super::*;
    use crate::ram::Ram;

    const METHODS: [Compression; 2] = [Compression::Zlib, Compression::Zstd];
    const PAGE: usize = 4096;

    #[test]
    fn packets_come_back_one_by_one_and_out_of_order() {
        for method in METHODS {
            for level in [0, 1, 9] {
                let mut compressor = Compressor::new(method, level).unwrap();
                let contents = [text(3), random(1), vec![0; 5 * PAGE], text(128), random(128)];
                let payloads: Vec<_> = contents.iter().map(|content| compress(&mut compressor, content)).collect();
                let mut in_order = Decompressor::new(method, &Default::default()).unwrap();
                for (content, payload) in contents.iter().zip(&payloads) {
                    assert_eq!(
                        decompress(&mut in_order, payload, content.len()).unwrap(),
                        *content,
                        "{method} {level}"
                    );
                    assert!(payload.len() <= MAX_COMPRESSED, "{method} {level}: {}", payload.len());
                }
                // A zlib stream has its header in the first packet only.
                let mut other = Decompressor::new(method, &Default::default()).unwrap();
                for index in [0, 3, 1, 4, 2] {
                    let content = &contents[index];
                    assert_eq!(decompress(&mut other, &payloads[index], content.len()).unwrap(), *content);
                }
            }
        }
    }

    #[test]
    fn text_shrinks() {
        for method in METHODS {
            let payload = compress(&mut Compressor::new(method, 1).unwrap(), &text(128));
            assert!(payload.len() < 128 * PAGE / 2, "{method}: {}", payload.len());
        }
    }

    #[test]
    fn one_stream_for_the_whole_channel_is_taken() {
        let contents: Vec<_> = [2, 128, 1, 1, 77].into_iter().map(text).collect();
        let mut deflate = flate2::Compress::new(flate2::Compression::new(1), true);
        let mut frame = zstd::stream::raw::Encoder::new(1).unwrap();
        let mut inflate = Decompressor::new(Compression::Zlib, &Default::default()).unwrap();
        let mut unzstd = Decompressor::new(Compression::Zstd, &Default::default()).unwrap();
        for content in &contents {
            let mut payload = Vec::with_capacity(2 * content.len() + 64);
            deflate.compress_vec(content, &mut payload, flate2::FlushCompress::Sync).unwrap();
            assert_eq!(decompress(&mut inflate, &payload, content.len()).unwrap(), *content);

            use zstd::stream::raw::{InBuffer, Operation, OutBuffer};
            let mut payload = vec![0; 2 * content.len() + 64];
            let mut out = OutBuffer::around(&mut payload[..]);
            let mut input = InBuffer::around(content);
            while input.pos() < content.len() {
                frame.run(&mut input, &mut out).unwrap();
            }
            assert_eq!(frame.flush(&mut out).unwrap(), 0);
            let len = out.pos();
            assert_eq!(decompress(&mut unzstd, &payload[..len], content.len()).unwrap(), *content);
        }
    }

    /// The payloads of a channel, decoded packet by packet, against the same bytes as one stream.
    #[test]
    fn channels_recorded_from_qemu_are_decoded() {
        let mut channels = 0;
        for (method, recording) in [(Compression::Zlib, "zlib"), (Compression::Zstd, "zstd")] {
            for (name, bytes) in
                recordings().iter().filter(|(name, _)| name.contains(recording) && name.contains("/ch"))
            {
                let payloads = payloads(bytes);
                assert!(payloads.len() > 3, "{name}");
                let whole: Vec<u8> = payloads.iter().flat_map(|(payload, _)| payload.iter().copied()).collect();
                let total: usize = payloads.iter().map(|(_, len)| len).sum();
                let mut expected = vec![0; total];
                match method {
                    Compression::Zlib => flate2::read::ZlibDecoder::new(&whole[..]).read_exact(&mut expected).unwrap(),
                    _ => zstd::stream::read::Decoder::new(&whole[..]).unwrap().read_exact(&mut expected).unwrap(),
                }
                let mut decompressor = Decompressor::new(method, &Default::default()).unwrap();
                let mut decoded = Vec::new();
                for (payload, len) in &payloads {
                    decoded.extend(decompress(&mut decompressor, payload, *len).unwrap());
                }
                assert!(decoded == expected, "{name}");
                channels += 1;
            }
        }
        assert!(channels >= 4, "{channels} channels with compression among the recordings");
    }

    #[test]
    fn more_or_fewer_bytes_than_the_pages_are_refused() {
        for method in METHODS {
            let payload = compress(&mut Compressor::new(method, 1).unwrap(), &text(2));
            for (len, says) in [(PAGE, "more than 4096"), (3 * PAGE, "8192 bytes, not 12288"), (0, "more than 0")] {
                let error = decompress(&mut Decompressor::new(method, &Default::default()).unwrap(), &payload, len)
                    .unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                assert!(error.to_string().contains(says), "{method}: {error}");
            }
            let cut = &payload[..payload.len() - 10];
            assert!(
                decompress(&mut Decompressor::new(method, &Default::default()).unwrap(), cut, 2 * PAGE).is_err(),
                "{method}"
            );
            let error =
                decompress(&mut Decompressor::new(method, &Default::default()).unwrap(), &[], PAGE).unwrap_err();
            assert!(error.to_string().contains("0 bytes, not 4096"), "{error}");
        }
    }

    #[test]
    fn the_end_of_the_zlib_stream_is_refused() {
        let mut payload = Vec::with_capacity(10_000);
        let mut deflate = flate2::Compress::new(flate2::Compression::new(1), true);
        deflate.compress_vec(&text(1), &mut payload, flate2::FlushCompress::Finish).unwrap();
        let error = decompress(&mut Decompressor::new(Compression::Zlib, &Default::default()).unwrap(), &payload, PAGE)
            .unwrap_err();
        assert!(error.to_string().contains("stream ends"), "{error}");
    }

    #[test]
    fn a_window_that_would_cost_much_memory_is_refused() {
        use zstd::stream::raw::CParameter;
        for (log, taken) in [(25, true), (26, false)] {
            let mut compressor = zstd::stream::raw::Encoder::new(1).unwrap();
            compressor.set_parameter(CParameter::WindowLog(log)).unwrap();
            use zstd::stream::raw::{InBuffer, Operation, OutBuffer};
            let content = text(1);
            let mut payload = vec![0; 2 * PAGE];
            let mut out = OutBuffer::around(&mut payload[..]);
            let mut input = InBuffer::around(&content);
            compressor.run(&mut input, &mut out).unwrap();
            compressor.flush(&mut out).unwrap();
            let len = out.pos();
            let result = decompress(
                &mut Decompressor::new(Compression::Zstd, &Default::default()).unwrap(),
                &payload[..len],
                PAGE,
            );
            assert_eq!(result.is_ok(), taken, "{log}: {:?}", result.err());
        }
    }

    /// Each channel may have a window of 32 MiB: with 255 of them, 8 GiB.
    #[test]
    fn the_windows_of_all_channels_have_a_limit_together() {
        use zstd::stream::raw::{CParameter, InBuffer, Operation, OutBuffer};
        let mut compressor = zstd::stream::raw::Encoder::new(1).unwrap();
        compressor.set_parameter(CParameter::WindowLog(25)).unwrap();
        let content = text(1);
        let mut payload = vec![0; 2 * PAGE];
        let mut out = OutBuffer::around(&mut payload[..]);
        compressor.run(&mut InBuffer::around(&content), &mut out).unwrap();
        compressor.flush(&mut out).unwrap();
        let len = out.pos();
        let payload = &payload[..len];
        let shared = Arc::new(Windows::default());
        let mut channels = Vec::new();
        let error = loop {
            assert!(channels.len() <= MAX_WINDOWS >> 25, "no limit");
            let mut channel = Decompressor::new(Compression::Zstd, &shared).unwrap();
            if let Err(error) = decompress(&mut channel, payload, PAGE) {
                break error;
            }
            channels.push(channel);
        };
        assert!(error.to_string().contains("decompressors of all channels"), "{error}");
        assert!(channels.len() >= 30, "{}", channels.len());
        channels.clear();
        assert_eq!(shared.bytes.load(Relaxed), 0);
    }

    #[test]
    fn hostile_bytes_are_errors_or_pages_but_never_a_panic() {
        for method in METHODS {
            let good = compress(&mut Compressor::new(method, 1).unwrap(), &text(4));
            let mut refused = 0;
            for seed in 0..2000 {
                let mut payload = if seed % 4 == 0 { random(1)[..seed % 300].to_vec() } else { good.clone() };
                let mut random = Rng::with_seed(seed as u64 + 1);
                for _ in 0..1 + seed % 3 {
                    if !payload.is_empty() {
                        let at = random.usize(..payload.len());
                        payload[at] ^= 1 << random.u8(..8);
                    }
                }
                let mut decompressor = Decompressor::new(method, &Default::default()).unwrap();
                // Twice, because a stream that was left in the middle is what the next packet meets.
                for _ in 0..2 {
                    match decompress(&mut decompressor, &payload, 4 * PAGE) {
                        Ok(pages) => assert_eq!(pages.len(), 4 * PAGE),
                        Err(error) => {
                            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
                            refused += 1;
                        }
                    }
                }
            }
            assert!(refused > 1000, "{method}: {refused}");
        }
    }

    #[test]
    fn a_level_out_of_range_is_named_with_the_range() {
        let error = |method, level| Compressor::new(method, level).err().unwrap().to_string();
        assert_eq!(error(Compression::Zlib, 10), "zlib has levels from 0 to 9, not 10");
        assert_eq!(error(Compression::Zlib, -1), "zlib has levels from 0 to 9, not -1");
        assert!(error(Compression::Zstd, 23).ends_with("to 22, not 23"));
        assert!(Compressor::new(Compression::Zstd, -5).is_ok());
        assert_eq!(error(Compression::None, 1), "pages without compression have no compressor");
        assert!(Decompressor::new(Compression::None, &Default::default()).is_err());
    }

    #[test]
    fn a_single_page_is_one_complete_stream() {
        let content = text(1);
        let mut payload = Vec::with_capacity(2 * PAGE);
        let mut deflate = flate2::Compress::new(flate2::Compression::new(1), true);
        deflate.compress_vec(&content, &mut payload, flate2::FlushCompress::Finish).unwrap();
        let mut page = vec![0; PAGE];
        inflate_page(&payload, &mut page).unwrap();
        assert_eq!(page, content);
        assert!(inflate_page(&payload[..payload.len() - 1], &mut page).is_err());
        assert!(inflate_page(&payload, &mut page[..PAGE - 8]).is_err());
        assert!(inflate_page(&payload, &mut vec![0; 2 * PAGE]).is_err());
        payload.push(0);
        assert!(inflate_page(&payload, &mut page).is_err());
        assert!(inflate_page(b"rubbish", &mut page).is_err());
    }

    fn compress(compressor: &mut Compressor, content: &[u8]) -> Vec<u8> {
        let ram = Ram::for_test(&[("a", content.len() / PAGE)]);
        let pages: Vec<_> = (0..content.len() / PAGE).map(|page| ram.page(page as u64).unwrap()).collect();
        for (page, content) in pages.iter().zip(content.chunks(PAGE)) {
            page.write(content);
        }
        let mut out = b"header".to_vec();
        compressor.compress(&pages, &mut out).unwrap();
        assert_eq!(&out[..6], b"header", "the payload goes behind what is there");
        out.split_off(6)
    }

    fn decompress(decompressor: &mut Decompressor, payload: &[u8], len: usize) -> io::Result<Vec<u8>> {
        let mut out = vec![0; len];
        decompressor.decompress(payload, &mut out)?;
        Ok(out)
    }

    /// Pages of words, some of which repeat.
    fn text(pages: usize) -> Vec<u8> {
        let mut random = Rng::with_seed(pages as u64 + 99);
        let words = std::iter::repeat_with(|| format!("word{} ", random.u16(..1000)));
        words.flat_map(String::into_bytes).take(pages * PAGE).collect()
    }

    fn random(pages: usize) -> Vec<u8> {
        let mut random = Rng::with_seed(pages as u64);
        (0..pages * PAGE / 8).flat_map(|_| random.u64(..).to_le_bytes()).collect()
    }

    /// Payload and length of the pages of each packet that has any.
    fn payloads(channel: &[u8]) -> Vec<(&[u8], usize)> {
        let word = |at: usize| u32::from_be_bytes(channel[at..at + 4].try_into().unwrap()) as usize;
        let (mut at, mut payloads) = (64, Vec::new());
        while at < channel.len() {
            let (pages, len) = (word(at + 16), word(at + 20));
            at += 1344;
            if pages > 0 {
                payloads.push((&channel[at..at + len], pages * PAGE));
                at += len;
            }
        }
        payloads
    }

    /// Name and content of the recorded connections.
    pub(crate) fn recordings() -> Vec<(String, Vec<u8>)> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../multifd-proto/tests/captures/streams.tar.xz");
        test_support::untar(liblzma::read::XzDecoder::new(std::fs::File::open(path).unwrap()))
    }
}

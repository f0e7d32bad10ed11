//! A file with a VM in it: a checkpoint, a plain migration stream, or a libvirt save image with one of these.
//!
//! Nothing in the file is trusted: the description in an image is read up to a bound, and what unpacks it has a bound for its
//! memory. A plain stream becomes a checkpoint by the same rules as one that is received.

mod libvirt;
mod unpack;

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use multifd::{
    checkpoint::{Checkpoint, CheckpointError, Writer},
    destination::{self, Destination},
    error::Error,
    stop::StopHandle,
    transport::one_way::OneWayListener,
};

use crate::{
    args::OutputArgs,
    progress::{self, Display},
    role::Role,
};

pub use self::{
    libvirt::{DomainXml, LibvirtImage},
    unpack::Packing,
};

/// What is in a file.
pub struct Image {
    /// What libvirt has written before it, if it is one of libvirt's.
    pub libvirt: Option<LibvirtImage>,
    /// The VM.
    pub content: Content,
}

/// How the VM is kept.
pub enum Content {
    /// Each page has its place.
    Checkpoint(Box<Checkpoint>),
    /// Front to back.
    Stream(Stream),
}

/// A plain stream that is yet to be read.
pub struct Stream {
    /// What it is called.
    pub name: String,
    bytes: Box<dyn Read + Send>,
}

impl Image {
    /// Finds out what is in the file `path`.
    ///
    /// # Errors
    /// It is something else, or cannot be read; [`CheckpointError::OtherKind`] says what to do with it.
    pub fn open(path: &Path) -> Result<Image, CheckpointError> {
        let io = |doing| move |source| CheckpointError::Io { path: path.to_owned(), doing, source };
        // A FIFO would have us wait until it is written to.
        let mut file = File::options().read(true).custom_flags(NONBLOCK).open(path).map_err(io("opening it"))?;
        let regular = file.metadata().map_err(io("asking for its length"))?.is_file();
        if regular && let Some(image) = LibvirtImage::read(&mut file).map_err(|error| error.about(path))? {
            return Image::of_libvirt(image, file, path);
        }
        match Checkpoint::open(path) {
            Ok(checkpoint) => Ok(Image { libvirt: None, content: Content::Checkpoint(Box::new(checkpoint)) }),
            Err(CheckpointError::NotMappedRam { .. }) => {
                file.seek(SeekFrom::Start(0)).map_err(io("reading it"))?;
                let stream = Stream { name: path.display().to_string(), bytes: Box::new(buffered(file)) };
                Ok(Image { libvirt: None, content: Content::Stream(stream) })
            }
            Err(error) => Err(error),
        }
    }

    /// Finds out what `bytes` are, the first of which tell. They are called `name`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of_reader(mut bytes: Box<dyn Read + Send>, name: &str) -> Result<Image, CheckpointError> {
        let (libvirt, begin) = LibvirtImage::read_front(&mut *bytes).map_err(|error| error.about(Path::new(name)))?;
        let bytes = io::Cursor::new(begin).chain(bytes);
        let packing = match &libvirt {
            Some(image) => image.packing(Path::new(name))?,
            None => Packing::None,
        };
        let bytes = packing.unpack(bytes).map_err(unpacking(Path::new(name)))?;
        Ok(Image { libvirt, content: Content::Stream(Stream { name: name.to_owned(), bytes }) })
    }

    fn of_libvirt(image: LibvirtImage, mut file: File, path: &Path) -> Result<Image, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), doing: "reading it", source };
        let (packing, begin) = (image.packing(path)?, image.header.stream_offset());
        if packing == Packing::None {
            match Checkpoint::open_at(path, begin) {
                Ok(checkpoint) => {
                    return Ok(Image { libvirt: Some(image), content: Content::Checkpoint(Box::new(checkpoint)) });
                }
                Err(CheckpointError::NotMappedRam { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        file.seek(SeekFrom::Start(begin)).map_err(io)?;
        let bytes = packing.unpack(buffered(file)).map_err(unpacking(path))?;
        let name = path.display().to_string();
        Ok(Image { libvirt: Some(image), content: Content::Stream(Stream { name, bytes }) })
    }

    /// The VM with a place for each page: a plain stream is read into a file without a name in `directory` first.
    ///
    /// # Errors
    /// As [`Stream::receive`].
    pub fn into_checkpoint(self, directory: &Path, stop: &Stop, output: &OutputArgs) -> Result<Box<Checkpoint>, Error> {
        match self.content {
            Content::Checkpoint(checkpoint) => Ok(checkpoint),
            Content::Stream(stream) => {
                let mut writer = Writer::unnamed(directory)?;
                stream.receive(&mut writer, stop, output)?;
                Ok(Box::new(writer.into_checkpoint()?))
            }
        }
    }
}

impl Stream {
    /// A stream that is written by another thread.
    pub fn new(name: String, bytes: Box<dyn Read + Send>) -> Stream {
        Stream { name, bytes }
    }

    /// What it says, unpacked.
    pub fn into_bytes(self) -> Box<dyn Read + Send> {
        self.bytes
    }

    /// Takes its VM into `writer`, and shows the progress as `output` says.
    ///
    /// # Errors
    /// It is incomplete, damaged or none; [`Error::Cancelled`].
    pub fn receive(self, writer: &mut Writer, stop: &Stop, output: &OutputArgs) -> Result<destination::Report, Error> {
        let destination = Destination::new(destination::Options::default());
        stop.set(destination.stop_handle());
        let listener = OneWayListener::of_reader(self.bytes, self.name.clone());
        let listener = listener.map_err(|source| CheckpointError::Io {
            path: PathBuf::from(self.name),
            doing: "preparing to read it",
            source,
        })?;
        let mut display = Display::new(Role::Destination, output, &destination.progress());
        writer.receive(destination, Box::new(listener), &mut display)
    }
}

/// Ends what is under way, whatever that is at the moment.
#[derive(Clone, Default)]
pub struct Stop {
    state: std::sync::Arc<std::sync::Mutex<(bool, Option<StopHandle>)>>,
}

impl Stop {
    /// Cancels what is under way, and what would follow.
    pub fn cancel(&self) {
        let mut state = progress::lock(&self.state);
        state.0 = true;
        if let Some(handle) = &state.1 {
            handle.cancel();
        }
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        progress::lock(&self.state).0
    }

    /// A reader of `bytes` that fails once this was cancelled.
    pub fn reader(&self, bytes: Box<dyn Read + Send>) -> Box<dyn Read + Send> {
        Box::new(Stoppable { bytes, stop: self.clone() })
    }

    /// What is under way from now on.
    pub fn set(&self, handle: StopHandle) {
        let mut state = progress::lock(&self.state);
        if state.0 {
            handle.cancel();
        }
        state.1 = Some(handle);
    }
}

/// What [`Stop::reader`] makes.
struct Stoppable {
    bytes: Box<dyn Read + Send>,
    stop: Stop,
}

impl Read for Stoppable {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() {
            // Not `Interrupted`, after which readers try again.
            return Err(io::Error::other(Error::Cancelled));
        }
        self.bytes.read(into)
    }
}

fn buffered(file: File) -> BufReader<File> {
    BufReader::with_capacity(READ_SIZE, file)
}

fn unpacking(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io { path, doing: "unpacking it", source }
}

const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;
/// Bytes read at once.
const READ_SIZE: usize = 1 << 20;

//! `multifd convert`: makes a checkpoint, a plain stream or a libvirt save image of any of them.

use std::{
    io::{self, Read, Write},
    path::Path,
    thread,
    time::Instant,
};

use multifd::inspect::libvirt::SaveFormat;
use multifd::{
    checkpoint::{Checkpoint, CheckpointError, Writer},
    error::Error,
    stop::StopHandle,
    transport::{Listen, fd::FdListener},
};
use serde_json::{Map, json};

use crate::{
    args::{ConvertArgs, OutputFormat},
    describe,
    exit::Exit,
    image::{Content, DomainXml, Image, Stop, Stream},
    printable,
    report::{Outcome, whole_millis},
    signals,
    stream_out::StreamOut,
    table, terminal,
};

/// Converts.
pub fn run(args: &ConvertArgs) -> Outcome {
    match convert(args) {
        Ok(outcome) => outcome,
        Err(Failure::Engine(error)) => Outcome::failed(Exit::from(&error), error),
        Err(Failure::Other(error)) => Outcome::failed(Exit::Failed, error),
    }
}

/// Why there is no result.
enum Failure {
    Engine(Error),
    Other(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Checkpoint(CheckpointError::Exists { path }) => {
                Failure::Other(format!("{path:?} exists; --force replaces it"))
            }
            error => Failure::Engine(error),
        }
    }
}

impl From<CheckpointError> for Failure {
    fn from(error: CheckpointError) -> Failure {
        Failure::from(Error::from(error))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Other(error.to_string())
    }
}

impl From<String> for Failure {
    fn from(error: String) -> Failure {
        Failure::Other(error)
    }
}

fn convert(args: &ConvertArgs) -> Result<Outcome, Failure> {
    let begun = Instant::now();
    super::check_replaceable(&args.file, args.force).map_err(|error| error.to_string())?;
    let domain = args.libvirt_xml.as_deref().map(DomainXml::read).transpose()?;
    let stop = Stop::default();
    let input = Input::open(args, &stop)?;
    let libvirt = input.image.libvirt.as_ref();
    let kind = input.kind();
    let running = libvirt.is_none_or(|image| image.header.was_running);
    let mut report = Map::new();
    report.insert("input".to_owned(), json!({ "path": args.input.display().to_string(), "kind": kind }));
    let format = args.format();
    let preamble = domain.as_ref().map_or_else(Vec::new, |domain| {
        let format = if format == OutputFormat::Stream { SaveFormat::Raw } else { SaveFormat::Sparse };
        domain.preamble(running, format)
    });
    let begin = preamble.len() as u64;
    let made = match format {
        OutputFormat::MappedRam => mapped_ram(args, input.image, preamble, &stop),
        OutputFormat::Stream => stream(args, input.image, &preamble, &stop),
    };
    // What an interrupted read makes of it is a consequence.
    let (checkpoint, length) =
        made.map_err(|failure| if stop.is_cancelled() { Failure::Engine(Error::Cancelled) } else { failure })?;
    remark_on_machine(domain.as_ref(), &checkpoint);
    let output = if domain.is_some() { "libvirt-image" } else { format.name() };
    report.insert(
        "output".to_owned(),
        json!({ "path": args.file.display().to_string(), "kind": output, "bytes": length, "stream-offset": begin }),
    );
    report.insert("machine".to_owned(), checkpoint.machine().into());
    let mut blocks = describe::blocks_of(&checkpoint);
    if args.digest {
        // The file is complete, so this is no failure.
        if let Err(missing) = describe::add_digests(&mut blocks, &checkpoint, &|| stop.is_cancelled()) {
            report.insert("report-incomplete".to_owned(), format!("the digests are missing: {missing}").into());
        }
    }
    report.insert("ram-blocks".to_owned(), describe::blocks_json(&blocks));
    if let Some(elsewhere) = describe::elsewhere_json(&blocks) {
        report.insert("memory-elsewhere".to_owned(), elsewhere);
    }
    report.insert("total-time".to_owned(), json!(whole_millis(begun.elapsed())));
    let text = format!(
        "converted {} ({}) to {} ({}), {}, machine {}\n{}{}",
        args.input.display(),
        kind,
        args.file.display(),
        output,
        table::bytes(length),
        printable::line(checkpoint.machine()),
        describe::blocks_text(&blocks),
        describe::elsewhere_text(&blocks),
    );
    if args.to_stdout() {
        if !args.output.quiet {
            terminal::say(text.trim_end());
        }
        return Ok(Outcome::done(report, String::new()));
    }
    Ok(Outcome::done(report, text))
}

/// What is to be converted.
struct Input {
    image: Image,
}

impl Input {
    /// Opens the input. An interrupt ends what is under way from now on.
    fn open(args: &ConvertArgs, stop: &Stop) -> Result<Input, Failure> {
        let interrupted = stop.clone();
        if args.input != Path::new("-") {
            signals::on_interrupt(signals::Hangup::Interrupts, move || interrupted.cancel())?;
            return Ok(Input { image: Image::open(&args.input)? });
        }
        let mut stream = FdListener::standard_input()?.accept(None)?.establish(None)?;
        let stopper = stream.stopper()?;
        signals::on_interrupt(signals::Hangup::Interrupts, move || {
            interrupted.cancel();
            stopper.stop();
        })?;
        stream.set_read_timeout(args.stall_timeout.0)?;
        let image = Image::of_reader(Box::new(StreamReader(stream)), "standard input");
        match image {
            Err(_) if stop.is_cancelled() => Err(Error::Cancelled.into()),
            image => Ok(Input { image: image? }),
        }
    }

    fn kind(&self) -> &'static str {
        match (&self.image.libvirt, &self.image.content) {
            (Some(_), _) => "libvirt-image",
            (None, Content::Checkpoint(_)) => "checkpoint",
            (None, Content::Stream(_)) => "stream",
        }
    }
}

/// A connection that is read.
struct StreamReader(Box<dyn multifd::transport::Stream>);

impl Read for StreamReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

/// What was converted, with a place for each page, and how long the result is.
type Made = (Box<Checkpoint>, u64);

/// Makes a file with a place for each page.
fn mapped_ram(args: &ConvertArgs, image: Image, preamble: Vec<u8>, stop: &Stop) -> Result<Made, Failure> {
    let mut writer = Writer::create(&args.file, args.force)?.preamble(preamble);
    if args.libvirt_xml.is_some() {
        // libvirt has QEMU take nothing else.
        writer = writer.whole_only();
    }
    let begin = writer.stream_offset();
    if let Content::Checkpoint(checkpoint) = &image.content {
        // It goes through a plain stream.
        checkpoint.check_needs_no_channels()?;
    }
    match image.content {
        Content::Stream(stream) => receive(args, stream, &mut writer, stop)?,
        Content::Checkpoint(checkpoint) => copy(args, &checkpoint, &mut writer, stop)?,
    }
    let length = std::fs::metadata(&args.file).map_or(0, |metadata| metadata.len());
    Ok((Box::new(Checkpoint::open_at(&args.file, begin)?), length))
}

fn receive(args: &ConvertArgs, stream: Stream, writer: &mut Writer, stop: &Stop) -> Result<(), Error> {
    stream.receive(writer, stop, &args.output).map(drop)
}

/// Goes through a plain stream: what is written is checked as if it had been received.
fn copy(args: &ConvertArgs, checkpoint: &Checkpoint, writer: &mut Writer, stop: &Stop) -> Result<(), Failure> {
    let (read, mut write) = io::pipe()?;
    let stream = Stream::new(checkpoint.path().display().to_string(), Box::new(read));
    thread::scope(|scope| {
        // It ends when the stream is complete, or when its reader has gone.
        let from = thread::Builder::new().name("checkpoint".to_owned());
        let from = from.spawn_scoped(scope, move || checkpoint.write_stream(&mut write))?;
        let received = receive(args, stream, writer, stop);
        let sent = from.join().map_err(|_| "the thread that reads the checkpoint panicked".to_owned())?;
        match (received, sent) {
            (Ok(()), _) => Ok(()),
            // Its reader was not the first to fail.
            (Err(_), Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::from(error)),
            (Err(error), _) => Err(error.into()),
        }
    })
}

/// Makes a plain stream.
fn stream(args: &ConvertArgs, image: Image, preamble: &[u8], stop: &Stop) -> Result<Made, Failure> {
    if args.to_stdout() {
        let mut out = StreamOut::new(stop)?;
        let checkpoint = image.into_checkpoint(&std::env::temp_dir(), stop, &args.output)?;
        whole_for_libvirt(args, &checkpoint)?;
        checkpoint.check_needs_no_channels()?;
        let written = out.write_all(preamble).and_then(|()| checkpoint.write_stream(&mut out));
        written.map_err(|error| format!("writing to the standard output: {error}"))?;
        let length = out.written();
        return Ok((checkpoint, length));
    }
    // Better known now than when all of it was read.
    match args.file.symlink_metadata() {
        Ok(there) if !there.is_file() => return Err(CheckpointError::NotAFile { path: args.file.clone() }.into()),
        Ok(_) if !args.force => return Err(CheckpointError::Exists { path: args.file.clone() }.into()),
        _ => {}
    }
    let checkpoint = image.into_checkpoint(&std::env::temp_dir(), stop, &args.output)?;
    whole_for_libvirt(args, &checkpoint)?;
    let handle = StopHandle::new();
    stop.set(handle.clone());
    let length = checkpoint.save_stream(&args.file, args.force, preamble, &handle)?;
    Ok((checkpoint, length))
}

/// libvirt has QEMU take a whole VM only.
fn whole_for_libvirt(args: &ConvertArgs, checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
    if args.libvirt_xml.is_some() { checkpoint.check_whole() } else { Ok(()) }
}

/// libvirt starts a QEMU by the description, and QEMU refuses a stream of another machine type.
fn remark_on_machine(domain: Option<&DomainXml>, checkpoint: &Checkpoint) {
    let Some(described) = domain.and_then(DomainXml::machine) else { return };
    let machine = checkpoint.machine();
    // An alias, such as `pc`, is the newest of its kind.
    let is_versioned = described.contains(|digit: char| digit.is_ascii_digit()) && described.contains('.');
    if described != machine && is_versioned {
        terminal::say(&format!(
            "warning: the VM has machine type {machine}, and the description says {described}: QEMU will refuse it"
        ));
    }
}

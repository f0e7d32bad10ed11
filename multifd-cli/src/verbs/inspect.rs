//! `multifd inspect`: what is in a checkpoint, in a migration stream, or in a recorded set of channels.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
};

use multifd::{
    checkpoint::{Checkpoint, CheckpointError},
    error::Error,
    inspect::{Account, Inspection, Recorded},
};
use multifd_proto::{command::Command, machine::ZeroPages};
use serde_json::{Map, Value, json};

use crate::{
    args::InspectArgs,
    describe::{self, Block, Devices, counted},
    digest,
    exit::Exit,
    extract::extract,
    image::{Content, Image, LibvirtImage, Packing, Stop},
    printable,
    report::{Outcome, compression_name, dialect_name},
    signals::{self, Hangup},
    table::{self, grouped},
};

/// Describes what is at the path.
pub fn run(args: &InspectArgs) -> Outcome {
    let stop = Stop::default();
    let interrupted = stop.clone();
    if let Err(error) = signals::on_interrupt(Hangup::Interrupts, move || interrupted.cancel()) {
        tracing::warn!(%error, "an interrupt ends the process at once");
    }
    let described = if args.path.is_dir() {
        recording(args, &stop)
    } else {
        Image::open(&args.path).map_err(Failure::from).and_then(|image| file(args, image, &stop))
    };
    described.unwrap_or_else(|failure| match failure {
        // What an interrupt makes of a read is a consequence.
        _ if stop.is_cancelled() => Outcome::failed(Exit::Cancelled, Error::Cancelled),
        Failure::Engine(error) => Outcome::failed(Exit::from(&error), error),
        Failure::Other(error) => Outcome::failed(Exit::Failed, error),
    })
}

/// Why nothing can be said.
enum Failure {
    Engine(Error),
    Other(String),
}

impl From<CheckpointError> for Failure {
    fn from(error: CheckpointError) -> Failure {
        Failure::Engine(error.into())
    }
}

impl From<String> for Failure {
    fn from(error: String) -> Failure {
        Failure::Other(error)
    }
}

/// A single file.
fn file(args: &InspectArgs, image: Image, stop: &Stop) -> Result<Outcome, Failure> {
    let mut outcome = match image.content {
        Content::Checkpoint(checkpoint) => inspect_checkpoint(args, &checkpoint, stop)?,
        // Main of a migration without channels.
        Content::Stream(stream) => inspect_recorded(
            args,
            "stream",
            Recorded { main: stop.reader(stream.into_bytes()), channels: Vec::new(), preempt: None },
            stop,
        )?,
    };
    if let Some(libvirt) = &image.libvirt {
        outcome.text = format!("{}{}", libvirt_text(args, libvirt), outcome.text);
        if let Some(content) = outcome.report.insert("kind".to_owned(), "libvirt-image".into()) {
            outcome.report.insert("content".to_owned(), content);
        }
        outcome.report.insert("libvirt".to_owned(), libvirt_json(libvirt));
    }
    Ok(outcome)
}

fn libvirt_json(image: &LibvirtImage) -> Value {
    let header = &image.header;
    json!({
        "version": header.version, "format": header.format.name(), "was-running": header.was_running,
        "domain": image.domain(), "xml-bytes": image.xml.len(), "cookie-bytes": image.cookie.len(),
        "stream-offset": header.stream_offset(),
    })
}

fn libvirt_text(args: &InspectArgs, image: &LibvirtImage) -> String {
    let header = &image.header;
    let domain = image.domain().map_or_else(|| "without a name".to_owned(), |name| format!("{name:?}"));
    format!(
        "{}: libvirt save image, version {}, format {}\n  domain {}, {} when it was saved; description of {}; the stream begins at \
         byte {}\n",
        args.path.display(),
        header.version,
        header.format.name(),
        printable::line(&domain),
        if header.was_running { "running" } else { "paused" },
        table::bytes(image.xml.len() as u64),
        grouped(header.stream_offset()),
    )
}

fn inspect_checkpoint(args: &InspectArgs, checkpoint: &Checkpoint, stop: &Stop) -> Result<Outcome, Failure> {
    let reading = |error: io::Error| format!("{}: {error}", args.path.display());
    let mut blocks = describe::blocks_of(checkpoint);
    if args.digest {
        describe::add_digests(&mut blocks, checkpoint, &|| stop.is_cancelled()).map_err(reading)?;
    }
    let devices = Devices::of_checkpoint(checkpoint);
    let extracted = match wanted(args, checkpoint.blocks().iter().map(|block| block.name.as_str()))? {
        Some((index, _)) if blocks[index].elsewhere => return Err(nothing_to_extract(&blocks[index]).into()),
        Some((index, to)) => Some(extract(&mut checkpoint.block_reader(index), to, stop)?),
        None => None,
    };
    let disk =
        std::fs::metadata(&args.path).map_or(0, |metadata| std::os::unix::fs::MetadataExt::blocks(&metadata) * 512);
    let mut report = Map::new();
    report.insert("kind".to_owned(), "checkpoint".into());
    report.insert("path".to_owned(), args.path.display().to_string().into());
    report.insert("bytes".to_owned(), checkpoint.bytes().into());
    report.insert("disk-bytes".to_owned(), disk.into());
    report.insert("machine".to_owned(), checkpoint.machine().into());
    report.insert("page-size".to_owned(), checkpoint.layout().page_size().into());
    report.insert("capabilities".to_owned(), json!(checkpoint.capabilities()));
    report.insert("uuid".to_owned(), json!(checkpoint.uuid().as_ref().map(describe::uuid)));
    add_state(&mut report, args, &blocks, &devices, (checkpoint.sections(), checkpoint.vmdescription()));
    if let Some(packeted) = describe::packeted_json(checkpoint) {
        report.insert("packeted-devices".to_owned(), packeted);
    }
    let mut text = format!(
        "{}: checkpoint (mapped-ram migration file), {}, {} on disk\n  machine {}\n",
        args.path.display(),
        table::bytes(checkpoint.bytes()),
        table::bytes(disk),
        printable::line(checkpoint.machine()),
    );
    if let Some(uuid) = checkpoint.uuid() {
        text.push_str(&format!("  uuid {}\n", describe::uuid(&uuid)));
    }
    text.push_str(&describe::blocks_text(&blocks));
    text.push_str(&describe::elsewhere_text(&blocks));
    text.push_str(&describe::packeted_text(checkpoint));
    text.push_str(&devices.text(args.devices));
    text.push_str(&extracted.unwrap_or_default());
    Ok(Outcome::done(report, text))
}

/// A directory with a file for each connection.
fn recording(args: &InspectArgs, stop: &Stop) -> Result<Outcome, Failure> {
    let find = |name: &str| {
        let path = args.path.join(name);
        let packed = args.path.join(format!("{name}.xz"));
        [path, packed].into_iter().find(|path| path.is_file())
    };
    let Some(main) = find("main.bin") else {
        return Err(format!("{}: there is no main.bin or main.bin.xz in it", args.path.display()).into());
    };
    let channels = (0..=u8::MAX).map_while(|id| find(&format!("ch{id}.bin")));
    let open = |path: &Path| open(path).map(|bytes| stop.reader(bytes));
    let channels = channels.map(|path| open(&path)).collect::<Result<_, String>>()?;
    let preempt = find("preempt.bin").map(|path| open(&path)).transpose()?;
    inspect_recorded(args, "recording", Recorded { main: open(&main)?, channels, preempt }, stop)
}

fn open(path: &Path) -> Result<Box<dyn Read + Send>, String> {
    let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let file = BufReader::with_capacity(1 << 20, file);
    Ok(match path.extension() {
        Some(extension) if extension == "xz" => {
            Packing::Xz.unpack(file).map_err(|error| format!("{}: {error}", path.display()))?
        }
        _ => Box::new(file),
    })
}

fn inspect_recorded(args: &InspectArgs, kind: &str, recorded: Recorded, stop: &Stop) -> Result<Outcome, Failure> {
    let needs_contents = args.digest || args.extract.is_some();
    let directory = std::env::temp_dir();
    let Inspection { account, broken, contents, .. } =
        Inspection::of(recorded, needs_contents.then_some(directory.as_path()))?;
    if stop.is_cancelled() {
        return Err(Failure::Engine(Error::Cancelled));
    }
    let mut blocks = Vec::new();
    for (index, (name, size, normal)) in account.blocks.iter().enumerate() {
        let elsewhere = account.memory_elsewhere.contains(name);
        let digest = match &contents {
            Some(contents) if args.digest && !elsewhere => {
                let digest = digest::of(&mut contents.block_reader(index), &|| stop.is_cancelled());
                Some(digest.map_err(|error| format!("{}: {error}", directory.display()))?)
            }
            _ => None,
        };
        let (name, size, normal) = (name.to_string(), *size, *normal);
        blocks.push(Block { name, size, page_size: PAGE_SIZE, normal, digest, elsewhere });
    }
    let extracted = match wanted(args, account.blocks.iter().map(|(name, ..)| name.as_str()))? {
        Some((index, _)) if blocks[index].elsewhere => return Err(nothing_to_extract(&blocks[index]).into()),
        Some((index, to)) => {
            let contents = contents.as_ref().ok_or_else(|| "the stream ends before the RAM blocks".to_owned())?;
            Some(extract(&mut contents.block_reader(index), to, stop)?)
        }
        None => None,
    };
    let devices = Devices::new(account.beside_ram.early(), account.sections(), account.vmdescription());
    let mut report = Map::new();
    report.insert("kind".to_owned(), kind.into());
    report.insert("path".to_owned(), args.path.display().to_string().into());
    report.extend(stream_json(&account));
    add_state(&mut report, args, &blocks, &devices, (account.sections(), account.vmdescription()));
    let rule = broken.as_ref().map(|error| match error {
        Error::Protocol { at, source } => json!({
            "connection": at.connection.to_string(), "offset": at.offset, "rule": source.to_string(),
        }),
        Error::Io { at, .. } => json!({
            "connection": at.connection.to_string(), "offset": at.offset, "rule": error.to_string(),
        }),
        other => json!({ "rule": other.to_string() }),
    });
    report.insert("broken-rule".to_owned(), rule.unwrap_or_default());
    let mut text = stream_text(args, &account);
    text.push_str(&describe::blocks_text(&blocks));
    text.push_str(&describe::elsewhere_text(&blocks));
    if account.complete {
        text.push_str(&devices.text(args.devices));
    }
    text.push_str(&extracted.unwrap_or_default());
    Ok(match broken {
        None => Outcome::done(report, text + "\n  no rule was broken\n"),
        Some(error) => {
            text.push_str(&format!("\n  first broken rule, with everything before it counted above:\n    {error}\n"));
            Outcome { exit: Exit::Peer, error: Some(error.to_string()), report, text }
        }
    })
}

/// Blocks and devices.
fn add_state(
    report: &mut Map<String, Value>,
    args: &InspectArgs,
    blocks: &[Block],
    devices: &Devices<'_>,
    (sections, vmdescription): (&[u8], &[u8]),
) {
    report.insert("ram-blocks".to_owned(), describe::blocks_json(blocks));
    if let Some(elsewhere) = describe::elsewhere_json(blocks) {
        report.insert("memory-elsewhere".to_owned(), elsewhere);
    }
    report.insert("device-state-bytes".to_owned(), sections.len().into());
    if args.digest {
        report.insert("device-state-digest".to_owned(), describe::digest_of(sections).into());
    }
    report.insert("vmdescription-bytes".to_owned(), vmdescription.len().into());
    report.insert("devices-cut".to_owned(), devices.is_cut().into());
    if let Some(problem) = devices.problem() {
        report.insert("devices-problem".to_owned(), problem.into());
    }
    report.insert("devices".to_owned(), devices.json(args.devices));
}

fn stream_json(account: &Account) -> Map<String, Value> {
    let main = &account.main;
    let commands: Vec<String> = main.commands.iter().map(command_text).collect();
    let channels: Vec<Value> = account
        .channels
        .iter()
        .map(|channel| {
            json!({
                "id": channel.id.0, "bytes": channel.bytes, "packets": channel.packets, "sync": channel.sync,
                "sync-with-pages": channel.sync_with_pages, "empty": channel.empty, "device-state": channel.state,
                "stale-size": channel.stale_size,
                "normal": channel.normal, "duplicate": channel.zero, "payload": channel.payload,
                "compression": channel.compression.map(compression_name),
            })
        })
        .collect();
    let rounds: Vec<Value> = account
        .rounds
        .iter()
        .map(|round| {
            json!({
                "round": round.round, "normal": round.normal, "duplicate": round.zero, "repeated": round.repeated,
                "channel-pages": round.channel_pages,
            })
        })
        .collect();
    let report = json!({
        "machine": main.machine,
        "page-size": PAGE_SIZE,
        "capabilities": main.capabilities,
        "uuid": main.uuid.as_ref().map(describe::uuid),
        "channel-uuid": account.channels.first().filter(|channel| channel.uuid != [0; 16]).map(|channel| describe::uuid(&channel.uuid)),
        "return-path": main.commands.contains(&Command::OpenReturnPath),
        "commands": commands,
        "complete": account.complete,
        "mode": match &account.postcopy {
            Some(_) => "postcopy",
            None if account.snapshot => "snapshot",
            None => "live",
        },
        "postcopy": account.postcopy.as_ref().map(|postcopy| json!({
            "discarded-pages": postcopy.discarded, "package-bytes": postcopy.package,
            "package-pings": postcopy.package_pings, "main-pages": postcopy.main_pages,
            "preempt-pages": postcopy.preempt_pages, "preempt-ended": postcopy.preempt_ended,
        })),
        "dialect": account.dialect.map(dialect_name),
        "zero-pages": zero_pages(account).map(|zero_pages| zero_pages.to_string()),
        "main": {
            "bytes": main.bytes, "parts": main.parts, "zero": main.zero, "page": main.page, "xbzrle": main.xbzrle,
            "compressed": main.compressed, "flush": main.flush, "end-of-section": main.end_of_section,
            "sync-points": main.sync_points,
        },
        "channels": channels,
        "rounds": rounds,
        "rounds-left-out": account.rounds_left_out,
        "commands-left-out": main.commands_left_out,
        "pages-repeated-in-round": account.repeated_in_round,
        "pages-sent-again": account.sent_again,
    });
    match report {
        Value::Object(report) => report,
        _ => unreachable!("an object was written above"),
    }
}

fn stream_text(args: &InspectArgs, account: &Account) -> String {
    let main = &account.main;
    let mut out = format!("{}: migration stream", args.path.display());
    match account.channels.len() {
        0 => out.push_str(" without channels\n"),
        channels => out.push_str(&format!(" with {}\n", counted(channels, "channel"))),
    }
    if account.snapshot {
        out.push_str("  background snapshot: the state of one instant; the guest ran on at the source\n");
    }
    if let Some(postcopy) = &account.postcopy {
        out.push_str(&format!(
            "  postcopy: {} pages discarded at the switch, package of {} bytes; {} pages pushed on main, {} on the preempt connection\n",
            grouped(postcopy.discarded),
            grouped(postcopy.package),
            grouped(postcopy.main_pages),
            grouped(postcopy.preempt_pages),
        ));
    }
    let machine = if main.machine.is_empty() { "unknown" } else { &main.machine };
    out.push_str(&format!("  machine {}", printable::line(machine)));
    if let Some(dialect) = account.dialect {
        out.push_str(&format!(", sync {}", dialect_name(dialect)));
    }
    if let Some(zero_pages) = zero_pages(account) {
        out.push_str(&format!(", zero pages {zero_pages}"));
    }
    out.push('\n');
    for (what, list) in [
        ("capabilities", main.capabilities.clone()),
        ("commands", main.commands.iter().map(command_text).collect()),
        ("uuid", main.uuid.iter().map(describe::uuid).collect()),
    ] {
        if !list.is_empty() {
            out.push_str(&format!("  {what} {}\n", printable::line(&list.join(", "))));
        }
    }
    out.push_str(&format!(
        "\n  main: {} bytes, {} of ram, {}\n",
        grouped(main.bytes),
        counted(usize::try_from(main.parts).unwrap_or(usize::MAX), "section"),
        counted(usize::try_from(main.sync_points).unwrap_or(usize::MAX), "sync point"),
    ));
    let words = [
        (main.page, "with content"),
        (main.zero, "zero"),
        (main.xbzrle, "as XBZRLE differences"),
        (main.compressed, "compressed"),
    ];
    let words: Vec<String> =
        words.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{} {what}", grouped(*n))).collect();
    if !words.is_empty() {
        out.push_str(&format!("    pages: {}\n", words.join(", ")));
    }
    if account.channels.is_empty() && main.flush > 0 {
        out.push_str("    it has sync points for channels, which are not here: their pages are missing below\n");
    }
    channels_text(&mut out, account);
    rounds_text(&mut out, account);
    out
}

fn channels_text(out: &mut String, account: &Account) {
    if account.channels.is_empty() {
        return;
    }
    out.push_str(&format!(
        "\n  {:>7} {:>15} {:>9} {:>6} {:>11} {:>7} {:>11} {:>13} {:>11}  {}\n",
        "channel",
        "bytes",
        "packets",
        "SYNC",
        "with pages",
        "empty",
        "stale size",
        "content pages",
        "zero pages",
        "compression"
    ));
    for channel in &account.channels {
        out.push_str(&format!(
            "  {:>7} {:>15} {:>9} {:>6} {:>11} {:>7} {:>11} {:>13} {:>11}  {}\n",
            channel.id.0,
            grouped(channel.bytes),
            grouped(channel.packets),
            grouped(channel.sync),
            grouped(channel.sync_with_pages),
            grouped(channel.empty),
            grouped(channel.stale_size),
            grouped(channel.normal),
            grouped(channel.zero),
            channel.compression.map_or("", compression_name),
        ));
    }
}

fn rounds_text(out: &mut String, account: &Account) {
    let rounds: Vec<_> = account.rounds.iter().filter(|round| round.normal + round.zero > 0).collect();
    if rounds.is_empty() {
        return;
    }
    out.push_str(&format!(
        "\n  {:>7} {:>13} {:>11} {:>15}  {}\n",
        "round", "content pages", "zero pages", "twice in round", "pages on each channel"
    ));
    for round in &rounds {
        let each: Vec<String> = round.channel_pages.iter().map(|pages| grouped(*pages)).collect();
        out.push_str(&format!(
            "  {:>7} {:>13} {:>11} {:>15}  {}\n",
            round.round,
            grouped(round.normal),
            grouped(round.zero),
            grouped(round.repeated),
            each.join(" "),
        ));
    }
    let empty = account.rounds.len() - rounds.len();
    if empty > 0 {
        out.push_str(&format!("  and {} without pages\n", counted(empty, "round")));
    }
    out.push_str(&format!(
        "  {} pages were sent again in a later round, {} twice within one\n",
        grouped(account.sent_again),
        grouped(account.repeated_in_round)
    ));
}

/// Where zero pages were sent, if there were any and it can be told.
fn zero_pages(account: &Account) -> Option<ZeroPages> {
    let on_channels = account.channels.iter().any(|channel| channel.zero > 0);
    match (account.channels.is_empty(), on_channels, account.main.zero > 0) {
        (false, true, false) => Some(ZeroPages::Multifd),
        (false, false, true) => Some(ZeroPages::Legacy),
        _ => None,
    }
}

fn command_text(command: &Command) -> String {
    match command {
        Command::Ping(value) => format!("{command} {value}"),
        command => command.to_string(),
    }
}

/// The block to extract, and where to.
fn wanted<'a>(
    args: &'a InspectArgs,
    mut names: impl Iterator<Item = &'a str>,
) -> Result<Option<(usize, &'a PathBuf)>, String> {
    let (Some(block), Some(to)) = (&args.extract, &args.file) else { return Ok(None) };
    match names.position(|name| name == block) {
        Some(index) => Ok(Some((index, to))),
        None => Err(format!("there is no RAM block {block:?}")),
    }
}

/// Why `block` cannot be extracted.
fn nothing_to_extract(block: &Block) -> String {
    format!("the memory of {:?} is not here: it is in the file that the QEMU shared (x-ignore-shared)", block.name)
}

/// The page size of everything that is inspected.
const PAGE_SIZE: u64 = 4096;

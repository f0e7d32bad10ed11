//! Every recorded switch to postcopy of real QEMUs: decoded, compared with what an independent decoder found, applied to memory.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use multifd_proto::command::Command;
use multifd_proto::postcopy::{Package, PreemptDecoder, PreemptItem, Requests};
use multifd_proto::ram::BlockEntry;
use multifd_proto::return_path::Message;
use multifd_proto::stream::{Item, MainDecoder};
use multifd_proto::vmdesc::cut_by_shape;
use multifd_proto::{Codec, Step};
use serde::Deserialize;
use sha2::{Digest, Sha256};

const PAGE: usize = 4096;

#[derive(Deserialize)]
struct Capture {
    name: String,
    qemu: String,
    machine: String,
    preempt: bool,
    channels: usize,
    /// Digest of each file of the recording.
    files: HashMap<String, String>,
    expect: Expect,
}

#[derive(Deserialize)]
struct Expect {
    blocks: Vec<(String, u64)>,
    /// The numbers of the commands.
    commands: Vec<u16>,
    discarded: usize,
    package: usize,
    package_pings: Vec<u32>,
    devices: usize,
    devices_sha256: String,
    main_pages: usize,
    preempt_pages: usize,
    preempt_ended: Option<bool>,
    requests: usize,
    pongs: Vec<u32>,
    shut: u32,
    /// Nothing where channels have brought a part of it.
    ram_sha256: Option<HashMap<String, String>>,
    source_low_sha256: Option<String>,
    source_high_sha256: Option<String>,
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn captures() -> (Vec<Capture>, HashMap<String, Vec<u8>>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures/postcopy.tar.xz");
    let archive = std::fs::File::open(path).expect("the archive is in the repository");
    let files = test_support::untar(liblzma::read::XzDecoder::new(archive)).into_iter().collect();
    (serde_json::from_str(include_str!("captures/postcopy.json")).expect("the manifest is JSON"), files)
}

/// What was found in a recording.
#[derive(Default)]
struct Found {
    ram: HashMap<String, Vec<u8>>,
    blocks: Vec<BlockEntry>,
    commands: Vec<u16>,
    /// Pages that were discarded and have not come again.
    missing: HashSet<(usize, u64)>,
    discarded: usize,
    package: Vec<u8>,
    main_pages: usize,
}

impl Found {
    fn main(bytes: &[u8]) -> Found {
        let (mut decoder, mut found, mut at) = (MainDecoder::new(PAGE), Found::default(), 0);
        while at < bytes.len() {
            let Step::Item { item, used } = decoder.step(&bytes[at..]).unwrap() else { panic!("cut at {at}") };
            at += used;
            let payload = &bytes[at..at + item.payload_len() as usize];
            at += payload.len();
            found.take(&decoder, item, payload);
        }
        assert!(decoder.finished() && decoder.is_postcopy() && decoder.ram_ended());
        found
    }

    fn take(&mut self, decoder: &MainDecoder, item: Item, payload: &[u8]) {
        match item {
            Item::BlocksEnd => {
                self.blocks = decoder.blocks().to_vec();
                for block in decoder.blocks() {
                    self.ram.insert(block.name.as_str().to_owned(), vec![0; block.used_len as usize]);
                }
            }
            Item::Command(command) => {
                let mut bytes = Vec::new();
                command.encode(&mut bytes);
                self.commands.push(u16::from_be_bytes([bytes[0], bytes[1]]));
                match command {
                    Command::PostcopyRamDiscard { block, ranges } => {
                        let index = decoder.blocks().iter().position(|known| known.name == block).unwrap();
                        for range in ranges {
                            let len = decoder.blocks()[index].used_len;
                            for offset in range.check(&block, len, PAGE as u64).unwrap().step_by(PAGE) {
                                assert!(self.missing.insert((index, offset)), "discarded twice");
                                self.page(index, offset, &[0; PAGE]);
                                self.discarded += 1;
                            }
                        }
                    }
                    Command::Packaged { .. } => self.package = payload.to_vec(),
                    _ => {}
                }
            }
            Item::ZeroPage { block, offset } => self.arrives(decoder.is_postcopy(), block, offset, &[0; PAGE]),
            Item::Page { block, offset, .. } => self.arrives(decoder.is_postcopy(), block, offset, payload),
            _ => {}
        }
    }

    fn arrives(&mut self, pushed: bool, block: usize, offset: u64, content: &[u8]) {
        if pushed {
            assert!(self.missing.remove(&(block, offset)), "page {offset:#x} is not one that is missing");
            self.main_pages += 1;
        }
        self.page(block, offset, content);
    }

    fn page(&mut self, block: usize, offset: u64, content: &[u8]) {
        let ram = self.ram.get_mut(self.blocks[block].name.as_str()).unwrap();
        ram[offset as usize..][..PAGE].copy_from_slice(content);
    }

    /// Pages on the preempt connection, and whether it came to its last word.
    fn preempt(&mut self, mut bytes: &[u8]) -> (usize, bool) {
        let (mut decoder, mut pages) = (PreemptDecoder::default(), 0);
        while !bytes.is_empty() {
            let step = decoder.step(bytes, &self.blocks, PAGE).unwrap();
            let Step::Item { item, used } = step else { panic!("{} bytes are left", bytes.len()) };
            bytes = &bytes[used..];
            let (block, offset, content) = match item {
                PreemptItem::Page { block, offset } => {
                    let (content, rest) = bytes.split_at(PAGE);
                    bytes = rest;
                    (block, offset, content)
                }
                PreemptItem::Zero { block, offset } => (block, offset, &[0; PAGE][..]),
                PreemptItem::End => continue,
            };
            assert!(self.missing.remove(&(block, offset)), "page {offset:#x} is not one that is missing");
            self.page(block, offset, content);
            pages += 1;
        }
        (pages, decoder.ended())
    }
}

#[test]
fn the_recordings_cover_each_version_with_and_without_preempt() {
    let (captures, _) = captures();
    for qemu in ["7.2", "10.0", "11.1"] {
        for preempt in [false, true] {
            assert!(captures.iter().any(|capture| capture.qemu == qemu && capture.preempt == preempt));
        }
    }
    assert!(captures.iter().any(|capture| capture.channels > 0));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures/postcopy.tar.xz");
    assert!(std::fs::metadata(path).unwrap().len() < 300_000);
}

#[test]
fn every_switch_decodes_to_what_is_expected_and_every_discarded_page_comes_once() {
    let (captures, files) = captures();
    for Capture { name, machine, preempt, files: digests, expect, .. } in captures {
        let file = |part: &str| {
            let bytes = files.get(&format!("{name}/{part}"))?;
            assert_eq!(sha256(bytes), digests[part], "{name}/{part} is not the recorded file");
            Some(bytes.as_slice())
        };
        let mut found = Found::main(file("main.bin").unwrap());
        assert!(machine.starts_with("pc-i440fx-"));
        let blocks: Vec<_> = found.blocks.iter().map(|block| (block.name.to_string(), block.used_len)).collect();
        assert_eq!(blocks, expect.blocks, "{name}");
        assert_eq!(found.commands, expect.commands, "{name}");
        assert_eq!((found.discarded, found.main_pages), (expect.discarded, expect.main_pages), "{name}");
        let spoken = file("preempt.bin").map(|bytes| found.preempt(bytes));
        assert_eq!(spoken.is_some(), preempt, "{name}");
        assert_eq!(spoken.map_or(0, |(pages, _)| pages), expect.preempt_pages, "{name}");
        assert_eq!(spoken.map(|(_, ended)| ended), expect.preempt_ended, "{name}");
        assert_eq!(found.missing.len(), 0, "{name}: every page that was discarded came again");

        let package = Package::of(&found.package).unwrap();
        assert_eq!((found.package.len(), &package.pings), (expect.package, &expect.package_pings), "{name}");
        let devices = &found.package[package.devices];
        assert_eq!((devices.len(), sha256(devices)), (expect.devices, expect.devices_sha256), "{name}");
        let names: Vec<_> = cut_by_shape(devices).unwrap().into_iter().map(|section| section.name).collect();
        assert!(names.iter().any(|name| name == "cpu") && names.iter().any(|name| name == "globalstate"), "{names:?}");

        for (block, digest) in expect.ram_sha256.iter().flatten() {
            assert_eq!(sha256(&found.ram[block]), *digest, "{name} {block}");
        }
        if expect.ram_sha256.is_some() {
            let ram = &found.ram["pc.ram"];
            let [low, high] = [&ram[..0xa_0000], &ram[0x10_0000..]].map(|part| Some(sha256(part)));
            assert!(expect.source_low_sha256.is_none() || low == expect.source_low_sha256, "{name}");
            assert!(expect.source_high_sha256.is_none() || high == expect.source_high_sha256, "{name}");
        }
    }
}

#[test]
fn the_destination_asks_as_its_codec_says_and_every_message_encodes_back() {
    let (captures, files) = captures();
    for capture in captures {
        let blocks = Found::main(&files[&format!("{}/main.bin", capture.name)]).blocks;
        let bytes = &files[&format!("{}/main.return.bin", capture.name)];
        let (mut requests, mut asked, mut pongs, mut shut) = (Requests::default(), 0, Vec::new(), None);
        let mut rest = bytes.as_slice();
        let mut back = Vec::new();
        while let Ok(Step::Item { item, used }) = Message::decode(rest) {
            rest = &rest[used..];
            item.encode(&mut back);
            match &item {
                Message::Pong(value) => pongs.push(*value),
                Message::Shut(status) => shut = Some(*status),
                _ => {}
            }
            if let Some(request) = requests.accept(&item, &blocks, PAGE as u64).unwrap() {
                assert_eq!(request.len as usize, PAGE);
                asked += 1;
            }
        }
        assert!(rest.is_empty() && back == *bytes, "{}", capture.name);
        let expect = capture.expect;
        assert_eq!((asked, pongs, shut), (expect.requests, expect.pongs, Some(expect.shut)), "{}", capture.name);
    }
}

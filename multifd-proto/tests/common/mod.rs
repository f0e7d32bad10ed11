//! The recorded streams and what is expected of them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::LazyLock;

use serde::Deserialize;

/// One recorded migration with what a decoder must find in it.
#[derive(Debug, Deserialize)]
pub struct Capture {
    pub name: String,
    pub qemu: String,
    pub machine: String,
    pub channels: usize,
    pub compression: String,
    /// Digest of each file of the recording.
    pub files: HashMap<String, String>,
    pub expect: Expect,
    pub per_channel: Vec<ExpectChannel>,
}

#[derive(Debug, Deserialize)]
pub struct Expect {
    pub config: Vec<(String, u32, String)>,
    pub blocks: Vec<(String, u64)>,
    pub sync_mode: String,
    pub sync_points_on_main: usize,
    pub main: ExpectMain,
    /// Name, payload in hex, and offset of the element.
    pub commands: Vec<(String, String, u64)>,
    /// Packets on all channels, without those that carry nothing.
    pub packets: usize,
    pub device_blob: usize,
    pub vmdesc: usize,
    pub devices: usize,
    pub devices_sha256: String,
    pub ram_sha256: HashMap<String, String>,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ExpectMain {
    pub zero: usize,
    pub page: usize,
    pub xbzrle: usize,
    pub cpage: usize,
    pub eos: usize,
    pub flush: usize,
    pub flags_seen: Vec<String>,
    pub parts: usize,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ExpectChannel {
    pub id: u8,
    pub packets: usize,
    pub sync: usize,
    pub sync_with_data: usize,
    pub empty: usize,
    pub stale_size: usize,
    pub normal: usize,
    pub zero: usize,
    pub bytes: usize,
    pub payload: usize,
}

impl Capture {
    /// All recordings.
    pub fn all() -> Vec<Self> {
        serde_json::from_str(include_str!("../captures/manifest.json")).expect("the manifest is JSON")
    }

    /// What went over the main connection.
    pub fn main(&self) -> &'static [u8] {
        self.file("main.bin")
    }

    /// What went over the channel with this id.
    pub fn channel(&self, id: u8) -> &'static [u8] {
        self.file(&format!("ch{id}.bin"))
    }

    fn file(&self, name: &str) -> &'static [u8] {
        let bytes = &FILES[&format!("{}/{name}", self.name)];
        assert_eq!(sha256(bytes), self.files[name], "{}/{name} is not the recorded file", self.name);
        bytes
    }
}

/// The digest in the form of the manifest.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All files of the archive by name.
static FILES: LazyLock<HashMap<String, Vec<u8>>> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures/streams.tar.xz");
    let archive = std::fs::File::open(path).expect("the archive is in the repository");
    test_support::untar(liblzma::read::XzDecoder::new(archive)).into_iter().collect()
});

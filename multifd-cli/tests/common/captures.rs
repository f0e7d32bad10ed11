//! The recorded streams of real QEMUs.

use std::{fs::File, io::Read};

const CAPTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../multifd-proto/tests/captures/streams.tar.xz");

/// The recording `name`, a plain migration.
pub fn recorded(name: &str) -> Vec<u8> {
    let mut tar = liblzma::read::XzDecoder::new(File::open(CAPTURES).unwrap());
    let mut head = [0; 512];
    loop {
        tar.read_exact(&mut head).unwrap();
        let size = std::str::from_utf8(&head[124..135]).unwrap();
        let size = usize::from_str_radix(size.trim_matches(['\0', ' ']), 8).unwrap();
        let mut bytes = vec![0; size.next_multiple_of(512)];
        tar.read_exact(&mut bytes).unwrap();
        let path = format!("{name}/main.bin");
        if head.windows(path.len()).any(|window| window == path.as_bytes()) {
            bytes.truncate(size);
            return bytes;
        }
    }
}

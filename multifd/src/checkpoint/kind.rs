//! What a file is that is no checkpoint, so that an operator is told what to do with it.

use std::{fs::Metadata, os::unix::fs::FileTypeExt};

use multifd_proto::{encoder::MainEncoder, packet};

/// Bytes at the beginning of a file that are looked at: libvirt's description of a VM is shorter.
pub(super) const LOOKED_AT: usize = 1 << 20;

/// What a file with this beginning is, as the end of the sentence "FILE is …"; nothing where it cannot be told.
pub(super) fn describe(beginning: &[u8]) -> Option<String> {
    if beginning.is_empty() {
        return Some("empty".to_owned());
    }
    if beginning.starts_with(b"LibvirtQemudSave") || beginning.starts_with(b"LibvirtQemudPart") {
        return Some(libvirt(beginning));
    }
    if let Some((_, what)) = KINDS.iter().find(|(magic, _)| beginning.starts_with(magic)) {
        return Some((*what).to_owned());
    }
    if beginning.starts_with(&packet::MAGIC.to_be_bytes()) {
        let what =
            "what one channel of a migration carried, without its main: inspect the directory with main.bin in it";
        return Some(what.to_owned());
    }
    if beginning.iter().all(|byte| *byte == 0) {
        return Some(
            "no migration stream: it begins with zeros, as a file does that was not written to its end".to_owned(),
        );
    }
    let stream = position_of_stream(beginning)?;
    Some(format!(
        "no migration stream, but a stream may begin at byte {stream}: `tail -c +{} FILE` gives all from there on",
        stream + 1
    ))
}

/// What is to be said of an image that `virsh save` wrote.
fn libvirt(beginning: &[u8]) -> String {
    if beginning.starts_with(b"LibvirtQemudPart") {
        return "an incomplete libvirt save image: the `virsh save` that wrote it did not come to its end".to_owned();
    }
    match position_of_stream(beginning) {
        Some(stream) => format!(
            "a libvirt save image (`virsh save`), to be started with `virsh restore`; the migration stream in it begins at \
             byte {stream}: `tail -c +{} FILE` gives it",
            stream + 1
        ),
        None => {
            "a libvirt save image (`virsh save`), to be started with `virsh restore`; the migration stream in it is \
                 compressed"
                .to_owned()
        }
    }
}

fn position_of_stream(bytes: &[u8]) -> Option<usize> {
    let begin = MainEncoder::default().header().bytes.clone();
    bytes.windows(begin.len()).position(|window| window == begin)
}

/// What something is that is no regular file, and what would work; nothing for a regular file.
pub(super) fn of_special(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    Some(match () {
        () if kind.is_file() => return None,
        () if kind.is_dir() => "a directory, where a file is expected",
        () if kind.is_fifo() => {
            "a FIFO, and a checkpoint is read in several places: `cat FIFO > FILE` makes a file of it"
        }
        () if kind.is_socket() => "a socket: `multifd receive` takes a VM from a socket into a file",
        () if kind.is_block_device() => {
            "a block device, whose end says nothing about the checkpoint's: copy as many bytes as it has to a file \
             (`head -c BYTES DEVICE > FILE`)"
        }
        () => "a device, where a file is expected",
    })
}

/// Beginnings of files, and what those files are.
const KINDS: [(&[u8], &str); 12] = [
    (
        b"\x7fELF",
        "an ELF file, such as the memory that `dump-guest-memory` writes: it has no device state to go on from",
    ),
    (b"KDUMP   ", "a kdump of guest memory: it has no device state to go on from"),
    (b"QFI\xfb", "a qcow2 disk image, not a VM's state"),
    (b"KDMV", "a VMDK disk image, not a VM's state"),
    (b"vhdxfile", "a VHDX disk image, not a VM's state"),
    (b"\x1f\x8b", "compressed with gzip: `gunzip -c FILE` unpacks it"),
    (b"\xfd7zXZ\0", "compressed with xz: `xz -dc FILE` unpacks it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: `zstd -dc FILE` unpacks it"),
    (b"BZh", "compressed with bzip2: `bunzip2 -c FILE` unpacks it"),
    (b"\x04\x22\x4d\x18", "compressed with lz4: `lz4 -dc FILE` unpacks it"),
    (b"\x89LZO\0\r\n\x1a\n", "compressed with lzop: `lzop -dc FILE` unpacks it"),
    (b"PK\x03\x04", "a ZIP archive"),
];

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn files_of_other_kinds_are_named() {
        let described = |bytes: &[u8]| describe(bytes).unwrap_or_default();
        assert_eq!(described(b""), "empty");
        assert!(described(b"\x1f\x8b\x08\0").starts_with("compressed with gzip"));
        assert!(described(b"\x7fELF\x02\x01").starts_with("an ELF file"));
        assert!(described(b"QFI\xfb\0\0\0\x03").starts_with("a qcow2 disk image"));
        assert!(described(b"LibvirtQemudPart\0").starts_with("an incomplete libvirt save image"));
        let image = [&b"LibvirtQemudSave"[..], &[2; 100], b"<domain>QEVM</domain>\0", b"QEVM\0\0\0\x03\x07"].concat();
        assert!(
            described(&image).ends_with("begins at byte 138: `tail -c +139 FILE` gives it"),
            "{}",
            described(&image)
        );
        assert!(described(&image[..130]).ends_with("compressed"));
        assert!(described(&[0; 4096]).contains("begins with zeros"));
        assert!(described(b"\x11\x22\x33\x44\0\0\0\x01").contains("one channel"));
        let padded = [&[0xff; 512][..], b"QEVM\0\0\0\x03"].concat();
        assert!(described(&padded).contains("may begin at byte 512"));
        assert_eq!(describe(b"GET / HTTP/1.1\r\n"), None);
    }
}

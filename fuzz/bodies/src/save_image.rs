//! Headers of libvirt's save images.

use multifd::inspect::libvirt::{MAX_DATA, SaveFormat, SaveHeader};

/// What decodes is within bounds, is encoded to what decodes the same, and cuts its data inside of it.
pub(crate) fn save_image(input: &[u8]) {
    let Some((header, data)) = input.split_first_chunk() else { return };
    let Ok(header) = SaveHeader::decode(header) else { return };
    assert!(header.data_len <= MAX_DATA && header.cookie_offset <= header.data_len);
    let again = SaveHeader::decode(&header.encode()).expect("what we encode decodes");
    assert_eq!(again, header);
    let data = &data[..data.len().min(header.data_len as usize)];
    if let Ok((xml, cookie)) = header.split(data) {
        assert!(!xml.is_empty() && xml.len() + cookie.len() < 2 * data.len());
        assert!(!xml.contains(&0) && !cookie.contains(&0));
    }
}

/// An image of each format.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let formats = [SaveFormat::Raw, SaveFormat::Gzip, SaveFormat::Zstd, SaveFormat::Sparse, SaveFormat::Other(99)];
    let image = |format| {
        let mut header = SaveHeader::new(40, true, format);
        header.cookie_offset = 10;
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(b"<domain/>\0<cookie/>\0");
        bytes.resize(SaveHeader::LEN + 40, 0);
        bytes.extend_from_slice(b"QEVM\0\0\0\x03");
        bytes
    };
    formats.map(image).to_vec()
}

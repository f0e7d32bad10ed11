//! Lists of pages: the order in which a guest asked for them, to be sent in that order to the next one.
//!
//! A line for each page, `0xOFFSET BLOCK`; lines that begin with `#` say something to people.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    path::Path,
};

use multifd::postcopy::PageAddress;

use crate::{beside::Beside, replace};

/// Reads the list at `path`.
///
/// # Errors
/// The kernel's, or which line is no page.
pub fn read(path: &Path) -> Result<Vec<PageAddress>, String> {
    let failed = |error: io::Error| format!("{path:?}: {error}");
    let (mut pages, mut line) = (Vec::new(), Vec::new());
    let mut list = BufReader::new(Beside::open(path).map_err(failed)?);
    for number in 1.. {
        line.clear();
        // A device has no end, and neither may a line of it.
        list.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).map_err(failed)?;
        if line.is_empty() {
            break;
        }
        let of_line = |what: &str| format!("{path:?}, line {number}: {what}");
        let text = str::from_utf8(&line).map_err(|_| of_line("expected '0xOFFSET BLOCK'"))?;
        let text = match text.strip_suffix('\n') {
            None if line.len() as u64 == MAX_LINE => return Err(of_line("longer than the name of any page")),
            stripped => stripped.unwrap_or(text),
        };
        let text = text.strip_suffix('\r').unwrap_or(text);
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        if pages.len() == MAX_PAGES {
            return Err(format!("{path:?} lists more than {MAX_PAGES} pages"));
        }
        let page = text.parse().map_err(|error: String| of_line(&error))?;
        pages.push(page);
    }
    Ok(pages)
}

/// Writes `pages` to `path`, each where it comes first.
///
/// # Errors
/// The kernel's.
pub fn write(path: &Path, pages: &[PageAddress], machine: &str) -> io::Result<()> {
    let mut seen = std::collections::HashSet::new();
    let machine: String = machine.chars().filter(|c| !c.is_control()).collect();
    replace::with(path, |out| {
        writeln!(
            out,
            "# Pages in the order in which a guest asked for them (multifd send --record-faults), machine {machine}"
        )?;
        let mut listed = pages.iter().filter(|page| seen.insert((&page.block, page.offset)));
        listed.try_for_each(|page| writeln!(out, "{page}"))
    })
}

/// A guest with 64 GiB has as many.
const MAX_PAGES: usize = 16 << 20;
/// In bytes: an offset, a name of up to 255, and room.
const MAX_LINE: u64 = 512;

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use test_support::TempDir;

    use super::*;

    #[test]
    fn a_list_is_read_as_it_was_written_with_each_page_once() {
        let dir = TempDir::new().unwrap();
        let path = dir.join("list");
        let page = |text: &str| text.parse::<PageAddress>().unwrap();
        let pages = [page("0x3000 pc.ram"), page("0x0 /rom@etc/a b"), page("0x3000 pc.ram"), page("0x1000 pc.ram")];
        write(&path, &pages, "pc-q35-10.0\n0x0 x").unwrap();
        let expected = [pages[0].clone(), pages[1].clone(), pages[3].clone()];
        assert_eq!(read(&path).unwrap(), expected);
        fs::write(&path, "# x\n\n0x1000 pc.ram\npc.ram 0\n").unwrap();
        assert!(read(&path).unwrap_err().contains("line 4"));
        assert!(read(&dir.join("none")).unwrap_err().contains("none"));
    }
    /// A device, written to, was replaced by a file for the whole system; read, it took all memory.
    #[test]
    fn a_device_is_no_list() {
        let dir = TempDir::new().unwrap();
        symlink("/dev/zero", dir.join("list")).unwrap();
        let error = write(&dir.join("list"), &[], "pc").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(read(&dir.join("list")).unwrap_err().contains("line 1: longer"));
        assert!(fs::symlink_metadata(dir.join("list")).unwrap().is_symlink());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
        fs::write(dir.join("bytes"), b"0x1000 pc.ram\n\xff\n").unwrap();
        assert!(read(&dir.join("bytes")).unwrap_err().contains("line 2"));
        fs::write(dir.join("no-end"), b"0x1000 pc.ram\r\n0x2000 pc.ram").unwrap();
        assert_eq!(read(&dir.join("no-end")).unwrap().len(), 2);
    }
}

//! Lists of pages: the order in which a guest asked for them, to be sent in that order to the next one.
//!
//! A line for each page, `0xOFFSET BLOCK`; lines that begin with `#` say something to people.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, Write},
    path::Path,
};

use multifd::postcopy::PageAddress;

/// Reads the list at `path`.
///
/// # Errors
/// The kernel's, or which line is no page.
pub fn read(path: &Path) -> Result<Vec<PageAddress>, String> {
    let failed = |error: io::Error| format!("{path:?}: {error}");
    let mut pages = Vec::new();
    for (number, line) in (1..).zip(BufReader::new(File::open(path).map_err(failed)?).lines()) {
        let line = line.map_err(failed)?;
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if pages.len() == MAX_PAGES {
            return Err(format!("{path:?} lists more than {MAX_PAGES} pages"));
        }
        pages.push(line.parse().map_err(|error| format!("{path:?}, line {number}: {error}"))?);
    }
    Ok(pages)
}

/// Writes `pages` to `path`, each where it comes first.
///
/// # Errors
/// The kernel's.
pub fn write(path: &Path, pages: &[PageAddress], machine: &str) -> io::Result<()> {
    let mut seen = std::collections::HashSet::new();
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    let part = Path::new(&name);
    let mut out = BufWriter::new(File::create(part)?);
    let machine: String = machine.chars().filter(|c| !c.is_control()).collect();
    writeln!(
        out,
        "# Pages in the order in which a guest asked for them (multifd send --record-faults), machine {machine}"
    )?;
    for page in pages {
        if seen.insert((&page.block, page.offset)) {
            writeln!(out, "{page}")?;
        }
    }
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_data()?;
    fs::rename(part, path)
}

/// A guest with 64 GiB has as many.
const MAX_PAGES: usize = 16 << 20;

#[cfg(test)]
mod tests {
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
}

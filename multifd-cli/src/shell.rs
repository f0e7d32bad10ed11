//! Words of a command that a person or a script copies into a shell.

use std::{borrow::Cow, ffi::OsStr, os::unix::ffi::OsStrExt};

/// `text` as one word of a shell, which reads nothing else into it. What no line can show is written as bash, zsh and newer shells read it
/// (`$'\n'`), so that the word is one for every file name.
pub fn word<'a>(text: &'a (impl AsRef<OsStr> + ?Sized)) -> Cow<'a, str> {
    let text = text.as_ref();
    match text.to_str() {
        Some(text) if !text.is_empty() && text.bytes().all(is_plain) => Cow::Borrowed(text),
        Some(text) if !text.chars().any(char::is_control) => format!("'{}'", text.replace('\'', r"'\''")).into(),
        _ => {
            let bytes = text.as_bytes().iter().map(|byte| match byte {
                b'\'' | b'\\' => format!("\\{}", char::from(*byte)),
                0x20..=0x7e => char::from(*byte).to_string(),
                _ => format!("\\x{byte:02x}"),
            });
            format!("$'{}'", bytes.collect::<String>()).into()
        }
    }
}

/// Whether no shell makes anything of it, wherever it stands in a word. (A tilde at its beginning is a home.)
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"/._-+:,@%=".contains(&byte)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_shell_reads_each_name_as_it_is() {
        assert_eq!(word("/a/b-1.ckpt"), "/a/b-1.ckpt");
        assert_eq!(word("my vm"), "'my vm'");
        let odd: [&[u8]; 9] = [
            b"",
            b"a b",
            b"it's",
            b"~",
            b"$HOME `id` \"x\" \\ *;&|#!",
            b"a\nb",
            b"\xff' \\",
            "Gr\u{fc}n".as_bytes(),
            b"\x1b[2J9",
        ];
        for name in odd.map(OsStr::from_bytes) {
            // No hexadecimal digit that follows an escaped byte belongs to it: all of them have two.
            let shown = word(name);
            assert!(!shown.chars().any(char::is_control), "{shown:?}");
            let Ok(read) = Command::new("bash").args(["-c", &format!("printf %s {shown}")]).output() else {
                println!("there is no bash");
                return;
            };
            assert_eq!(read.stdout, name.as_bytes(), "{shown}");
        }
    }
}

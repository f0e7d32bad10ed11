//! Text from elsewhere, made fit for a terminal.
//!
//! A machine type, the name of a block and the message of a peer are the peer's text. Characters that a terminal obeys
//! (escape sequences) or that rearrange a line (bidirectional controls) are shown as `\u{1b}`. JSON keeps all text exact.

use std::borrow::Cow;

/// `text` as one line: line ends and tabs are escaped too.
pub fn line(text: &str) -> Cow<'_, str> {
    escaped(text, is_command)
}

/// `text` with its lines.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && is_command(c))
}

/// JSON text that means the same and is safe to show: such characters stand only in its strings, where `\u001b` is the
/// same character.
pub fn json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_command(c) {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
        } else {
            out.push(c);
        }
    }
    out
}

fn escaped(text: &str, is_unfit: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(&is_unfit) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            _ if !is_unfit(c) => out.push(c),
            '\n' | '\r' | '\t' => out.extend(c.escape_default()),
            _ => out.extend(c.escape_unicode()),
        }
    }
    Cow::Owned(out)
}

/// Whether `c` is a command to the terminal, or changes how the characters around it are shown.
fn is_command(c: char) -> bool {
    let changes_others = matches!(c,
        '\u{061c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
    c.is_control() || changes_others
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_character_that_a_terminal_obeys_is_left() {
        let hostile = "pc\u{1b}]0;owned\u{7}\u{9b}31m\r\n\u{202e}txt\u{7f}\u{200f}\u{e0041}";
        let shown = r"pc\u{1b}]0;owned\u{7}\u{9b}31m\r\n\u{202e}txt\u{7f}\u{200f}\u{e0041}";
        assert_eq!(line(hostile), shown);
        assert_eq!(lines("a\nb\tc\u{1b}"), "a\nb\\tc\\u{1b}");
        assert!(lines("a\nb").into_owned() == "a\nb" && matches!(line("Grüße, 機械"), Cow::Borrowed(_)));
        for c in (0..=char::MAX as u32).filter_map(char::from_u32).filter(|c| is_command(*c)) {
            assert!(!line(&c.to_string()).chars().any(is_command), "{c:?}");
        }
    }

    #[test]
    fn json_stays_exact() {
        let text = "a\u{1b}[2J\u{7f}\u{9b}\u{202e}\u{e0041}\"\\ü";
        let shown = json(&serde_json::to_string(text).unwrap());
        assert!(!shown.chars().any(is_command), "{shown}");
        assert_eq!(serde_json::from_str::<String>(&shown).unwrap(), text);
    }
}

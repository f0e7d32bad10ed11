//! Splits a stream of bytes into JSON values, as both sides of QMP send them.
//!
//! QEMU writes one value a line, and reads values wherever they end: clients need not send a newline, and people paste
//! commands over several lines. So the end of a value is found by its brackets.

use serde_json::Value;

/// Splits bytes into JSON values and bounds how long one may be.
#[derive(Debug)]
pub struct Splitter {
    buffer: Vec<u8>,
    /// Where the value begins that is not complete yet; `begin <= at <= buffer.len()`.
    begin: usize,
    /// The next byte to look at.
    at: usize,
    /// Brackets that are open at `at`.
    depth: usize,
    in_string: bool,
    /// The byte before `at` was a backslash within a string.
    escaped: bool,
    longest: usize,
}

/// Bytes that are not what they have to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Not a JSON object; the splitter goes on after it.
    #[error("not a JSON object: {text:?}")]
    NotJson {
        /// The beginning of it.
        text: String,
    },
    /// The value has more bytes than allowed. No more is read.
    #[error("a message has more than {longest} bytes")]
    TooLong {
        /// The bytes that are allowed.
        longest: usize,
    },
}

impl Splitter {
    /// Splits values of at most `longest` bytes, give or take what one [`push`](Splitter::push) brings.
    pub fn new(longest: usize) -> Splitter {
        Splitter { buffer: Vec::new(), begin: 0, at: 0, depth: 0, in_string: false, escaped: false, longest }
    }

    /// Takes more bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.begin);
        self.at -= self.begin;
        self.begin = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next value that is complete; `None` where more bytes are needed.
    ///
    /// # Errors
    /// [`CodecError::NotJson`] for bytes that are skipped, [`CodecError::TooLong`] at a value after which nothing is read.
    pub fn next_value(&mut self) -> Option<Result<Value, CodecError>> {
        if self.depth == 0 {
            let blank = self.rest().iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            self.skip_to(self.begin + blank);
            if self.rest().first().is_some_and(|&byte| byte != b'{') {
                return Some(Err(self.garbage()));
            }
        }
        while let Some(&byte) = self.buffer.get(self.at) {
            self.at += 1;
            if self.is_last(byte) {
                let (value, end) = (serde_json::from_slice(&self.buffer[self.begin..self.at]), self.at);
                return Some(match value {
                    Ok(value) => {
                        self.skip_to(end);
                        Ok(value)
                    }
                    Err(_) => Err(self.not_json(end)),
                });
            }
            // A string does not go over a line: one that was never closed must not swallow the commands after it.
            if self.in_string && byte == b'\n' {
                return Some(Err(self.not_json(self.at)));
            }
        }
        let waits = self.buffer.len() - self.begin;
        (waits > self.longest).then_some(Err(CodecError::TooLong { longest: self.longest }))
    }

    /// Whether `byte` ends the value.
    fn is_last(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth -= 1;
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }

    /// Skips what does not begin like a message: the rest of its line, as far as it is here.
    fn garbage(&mut self) -> CodecError {
        let line = self.rest().iter().position(|&byte| byte == b'\n').map_or(self.rest().len(), |end| end + 1);
        self.not_json(self.begin + line)
    }

    /// Skips to `end`.
    fn not_json(&mut self, end: usize) -> CodecError {
        let text = &self.buffer[self.begin..end];
        let text = String::from_utf8_lossy(&text[..text.len().min(SHOWN)]).trim_end().to_owned();
        self.skip_to(end);
        CodecError::NotJson { text }
    }

    fn skip_to(&mut self, at: usize) {
        (self.begin, self.at, self.depth, self.in_string, self.escaped) = (at, at, 0, false, false);
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.begin..]
    }
}

/// How much of wrong bytes an error shows.
const SHOWN: usize = 120;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// All that comes out when `bytes` arrive in pieces of `size`.
    fn split(bytes: &[u8], size: usize) -> Vec<Result<Value, CodecError>> {
        let mut splitter = Splitter::new(1000);
        let mut values = Vec::new();
        for piece in bytes.chunks(size) {
            splitter.push(piece);
            values.extend(std::iter::from_fn(|| splitter.next_value()));
        }
        values
    }

    #[test]
    fn values_end_with_their_brackets_and_not_with_the_line() {
        let bytes = b" {\"a\": [1, {\"b\": \"}\\\"]{\"}]}{}\r\n{\n \"c\":\n 2}\n";
        let expected = [json!({ "a": [1, { "b": "}\"]{" }] }), json!({}), json!({ "c": 2 })].map(Ok);
        for size in 1..=bytes.len() {
            assert_eq!(split(bytes, size), expected, "in pieces of {size}");
        }
    }

    #[test]
    fn what_is_not_json_is_skipped_and_the_next_value_is_read() {
        let all = |text: &str| split(text.as_bytes(), text.len());
        for wrong in ["hello\n", "{nonsense}", "[1]\n", "{\"a]\n", "{]", "}\n", "\"text\"\n", "\u{ff}\n"] {
            let values = all(&format!("{wrong}{{\"b\": 1}}"));
            assert!(matches!(values[0], Err(CodecError::NotJson { .. })), "{wrong:?}: {values:?}");
            assert_eq!(values.last(), Some(&Ok(json!({ "b": 1 }))), "{wrong:?}: {values:?}");
        }
    }

    #[test]
    fn a_value_that_does_not_end_is_bounded() {
        for endless in ["{\"a\": \"", "{\"a\": [", "[", "{\"a\": 1, "] {
            let mut splitter = Splitter::new(1000);
            splitter.push(endless.as_bytes());
            let mut pushed = 0;
            while splitter.next_value().is_none_or(|value| matches!(value, Err(CodecError::NotJson { .. }))) {
                splitter.push(&[b' '; 100]);
                pushed += 100;
                assert!(splitter.buffer.len() <= 1200, "{endless}");
                if pushed > 10_000 {
                    // Skipped piece by piece.
                    assert_eq!(endless, "[");
                    break;
                }
            }
        }
    }

    /// Deeper than the parser goes, which would be a stack that overflows.
    #[test]
    fn deep_nesting_is_refused() {
        let deep = format!("{{\"a\": {}{}}}", "[".repeat(400), "]".repeat(400));
        assert!(matches!(split(deep.as_bytes(), 64)[..], [Err(CodecError::NotJson { .. })]));
    }

    #[test]
    fn no_input_panics_or_is_kept_forever() {
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..2000 {
            let mut splitter = Splitter::new(200);
            for _ in 0..20 {
                let bytes: Vec<u8> = (0..40)
                    .map(|_| {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        b"{}[]\"\\\n a1,:\xff\0"[(random >> 32) as usize % 14]
                    })
                    .collect();
                splitter.push(&bytes);
                while let Some(value) = splitter.next_value() {
                    if matches!(value, Err(CodecError::TooLong { .. })) {
                        break;
                    }
                }
                assert!(splitter.rest().len() <= 240 || splitter.next_value().is_some());
                if splitter.rest().len() > 200 {
                    break;
                }
            }
        }
    }
}

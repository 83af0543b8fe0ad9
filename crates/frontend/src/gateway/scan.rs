//! Finds where a JSON value ends, and what is wrong with one, as Go's `encoding/json` does: its words are in the errors
//! that etcd's gateway answers with.

use std::fmt::Write;

/// The deepest nesting of objects and arrays (Go's `maxNestingDepth`).
const DEPTH_MAX: usize = 10_000;

/// Reads one JSON value, byte by byte, in whatever pieces it comes.
#[derive(Debug)]
pub(crate) struct Scanner {
    state: State,
    /// The objects and arrays that are open, the outermost first.
    open: Vec<Open>,
    /// How many bytes were read, those before the value included.
    read: usize,
    /// Where the value began; `None` while there was nothing but white space.
    start: Option<usize>,
}

#[derive(Debug, Clone, Copy)]
enum Open {
    ObjectKey,
    ObjectValue,
    Array,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Value,
    ValueOrEnd,
    KeyOrEnd,
    Key,
    EndValue,
    String,
    Escape,
    /// So many hexadecimal digits are to come.
    Unicode(u8),
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    /// In a word, of which so many bytes are read.
    Word(&'static str, usize),
}

/// What a scanner has found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scan {
    /// The value goes on beyond what was read.
    More,
    /// A whole value: it begins and ends so many bytes after the scanner began.
    Whole(usize, usize),
}

/// What the next byte means.
enum Step {
    More,
    /// The value ended with this byte.
    Ends,
    /// The value ended before this byte.
    Ended,
}

impl Scanner {
    pub(crate) fn new() -> Self {
        Scanner {
            state: State::Value,
            open: Vec::new(),
            read: 0,
            start: None,
        }
    }

    /// Whether there was nothing but white space yet.
    pub(crate) fn is_blank(&self) -> bool {
        self.start.is_none()
    }

    /// Reads on.
    ///
    /// # Errors
    /// Go's text for what is no JSON.
    pub(crate) fn read(&mut self, piece: &[u8]) -> Result<Scan, String> {
        for &byte in piece {
            if self.start.is_none() && !is_space(byte) {
                self.start = Some(self.read);
            }
            let step = self.step(byte)?;
            let start = self.start.unwrap_or(self.read);
            match step {
                Step::More => self.read += 1,
                Step::Ends => return Ok(Scan::Whole(start, self.read + 1)),
                Step::Ended => return Ok(Scan::Whole(start, self.read)),
            }
        }
        Ok(Scan::More)
    }

    /// Says that nothing follows. `None` if there was no value at all.
    ///
    /// # Errors
    /// Go's text for a value that is cut off.
    pub(crate) fn finish(mut self) -> Result<Option<(usize, usize)>, String> {
        let Some(start) = self.start else { return Ok(None) };
        match self.step(b' ') {
            Ok(Step::Ended) => Ok(Some((start, self.read))),
            _ => Err("unexpected EOF".to_owned()),
        }
    }

    fn step(&mut self, byte: u8) -> Result<Step, String> {
        let fail = |context: &str| Err(invalid(byte, context));
        self.state = match (self.state, byte) {
            (State::Value | State::ValueOrEnd | State::KeyOrEnd | State::Key, b' ' | b'\t' | b'\r' | b'\n') => {
                return Ok(Step::More);
            }
            (State::ValueOrEnd, b']') => return self.end_value(byte),
            (State::Value | State::ValueOrEnd, _) => match byte {
                b'{' => self.enter(Open::ObjectKey, State::KeyOrEnd, byte)?,
                b'[' => self.enter(Open::Array, State::ValueOrEnd, byte)?,
                b'"' => State::String,
                b'-' => State::Minus,
                b'0' => State::Zero,
                b'1'..=b'9' => State::Digits,
                b't' => State::Word("true", 1),
                b'f' => State::Word("false", 1),
                b'n' => State::Word("null", 1),
                _ => return fail("looking for beginning of value"),
            },
            (State::KeyOrEnd, b'}') => {
                if let Some(last) = self.open.last_mut() {
                    *last = Open::ObjectValue;
                }
                return self.end_value(byte);
            }
            (State::KeyOrEnd | State::Key, b'"') => State::String,
            (State::KeyOrEnd | State::Key, _) => return fail("looking for beginning of object key string"),
            (State::EndValue, _) => return self.end_value(byte),
            (State::String, b'"') => State::EndValue,
            (State::String, b'\\') => State::Escape,
            (State::String, 0..0x20) => return fail("in string literal"),
            (State::String, _) => State::String,
            (State::Escape, b'b' | b'f' | b'n' | b'r' | b't' | b'\\' | b'/' | b'"') => State::String,
            (State::Escape, b'u') => State::Unicode(4),
            (State::Escape, _) => return fail("in string escape code"),
            (State::Unicode(left), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => match left {
                1 => State::String,
                _ => State::Unicode(left - 1),
            },
            (State::Unicode(_), _) => return fail("in \\u hexadecimal character escape"),
            (State::Minus, b'0') => State::Zero,
            (State::Minus, b'1'..=b'9') => State::Digits,
            (State::Minus, _) => return fail("in numeric literal"),
            (State::Digits, b'0'..=b'9') => State::Digits,
            (State::Zero | State::Digits, b'.') => State::Point,
            (State::Zero | State::Digits | State::Fraction, b'e' | b'E') => State::Exponent,
            (State::Point | State::Fraction, b'0'..=b'9') => State::Fraction,
            (State::Point, _) => return fail("after decimal point in numeric literal"),
            (State::Exponent, b'+' | b'-') => State::ExponentSign,
            (State::Exponent | State::ExponentSign | State::ExponentDigits, b'0'..=b'9') => State::ExponentDigits,
            (State::Exponent | State::ExponentSign, _) => return fail("in exponent of numeric literal"),
            (State::Zero | State::Digits | State::Fraction | State::ExponentDigits, _) => return self.end_value(byte),
            (State::Word(word, read), _) => {
                let expected = word.as_bytes()[read];
                if byte != expected {
                    return fail(&format!("in literal {word} (expecting {:?})", char::from(expected)));
                }
                match word.len() - read {
                    1 => State::EndValue,
                    _ => State::Word(word, read + 1),
                }
            }
        };
        Ok(Step::More)
    }

    fn enter(&mut self, what: Open, state: State, byte: u8) -> Result<State, String> {
        self.open.push(what);
        match self.open.len() <= DEPTH_MAX {
            true => Ok(state),
            false => Err(invalid(byte, "exceeded max depth")),
        }
    }

    /// A byte after a whole value, which may be a part of another.
    fn end_value(&mut self, byte: u8) -> Result<Step, String> {
        let Some(innermost) = self.open.last_mut() else {
            return Ok(Step::Ended);
        };
        self.state = match (*innermost, byte) {
            (_, b' ' | b'\t' | b'\r' | b'\n') => State::EndValue,
            (Open::ObjectKey, b':') => {
                *innermost = Open::ObjectValue;
                State::Value
            }
            (Open::ObjectKey, _) => return Err(invalid(byte, "after object key")),
            (Open::ObjectValue, b',') => {
                *innermost = Open::ObjectKey;
                State::Key
            }
            (Open::Array, b',') => State::Value,
            (Open::ObjectValue, b'}') | (Open::Array, b']') => {
                self.open.pop();
                if self.open.is_empty() {
                    return Ok(Step::Ends);
                }
                State::EndValue
            }
            (Open::ObjectValue, _) => return Err(invalid(byte, "after object key:value pair")),
            (Open::Array, _) => return Err(invalid(byte, "after array element")),
        };
        Ok(Step::More)
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

fn invalid(byte: u8, context: &str) -> String {
    let quoted = match byte {
        b'\'' => "\\'".to_owned(),
        b'"' => "\"".to_owned(),
        _ => go_quoted(&char::from(byte).to_string()),
    };
    format!("invalid character '{quoted}' {context}")
}

/// A text as Go's `strconv.Quote` writes it, without the quotes around it.
pub(crate) fn go_quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '"' | '\\' => quoted.extend(['\\', char]),
            '\x07' => quoted.push_str("\\a"),
            '\x08' => quoted.push_str("\\b"),
            '\x0c' => quoted.push_str("\\f"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\x0b' => quoted.push_str("\\v"),
            '\0'..' ' | '\x7f' => write!(quoted, "\\x{:02x}", u32::from(char)).expect("a String grows"),
            '\u{80}'..='\u{a0}' | '\u{ad}' => {
                write!(quoted, "\\u{:04x}", u32::from(char)).expect("a String grows");
            }
            _ => quoted.push(char),
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scans `text` in pieces of each size, which must not matter, and says what is found.
    fn scan(text: &str) -> Result<Option<(usize, usize)>, String> {
        let run = |size: usize| {
            let mut scanner = Scanner::new();
            for piece in text.as_bytes().chunks(size) {
                if let Scan::Whole(start, end) = scanner.read(piece)? {
                    return Ok(Some((start, end)));
                }
            }
            scanner.finish()
        };
        let result = run(text.len().max(1));
        for size in 1..text.len() {
            assert_eq!(run(size), result, "{text:?} in pieces of {size}");
        }
        result
    }

    #[test]
    fn values_are_found() {
        for (text, found) in [
            ("", None),
            (" \n", None),
            ("{}", Some((0, 2))),
            ("  {\"a\":[1,-2.5e+3,true,null,{}]}x", Some((2, 32))),
            ("{}{}", Some((0, 2))),
            ("\"a\\\"\\u00e9\" ", Some((0, 11))),
            ("12", Some((0, 2))),
            ("12x", Some((0, 2))),
            ("null", Some((0, 4))),
            ("0.1", Some((0, 3))),
        ] {
            assert_eq!(scan(text), Ok(found), "{text:?}");
        }
    }

    /// What Go 1.26 says.
    #[test]
    fn errors_are_in_go_words() {
        for (text, error) in [
            ("x", "invalid character 'x' looking for beginning of value"),
            ("{", "unexpected EOF"),
            ("tru", "unexpected EOF"),
            ("-", "unexpected EOF"),
            ("{x", "invalid character 'x' looking for beginning of object key string"),
            (
                "{\"a\":1,}",
                "invalid character '}' looking for beginning of object key string",
            ),
            ("[1,]", "invalid character ']' looking for beginning of value"),
            ("{\"a\" 1}", "invalid character '1' after object key"),
            ("{\"a\":1 2}", "invalid character '2' after object key:value pair"),
            ("[1 2]", "invalid character '2' after array element"),
            ("\"\n\"", "invalid character '\\n' in string literal"),
            ("\"\x01\"", "invalid character '\\x01' in string literal"),
            ("\"\\x\"", "invalid character 'x' in string escape code"),
            (
                "\"\\u12g\"",
                "invalid character 'g' in \\u hexadecimal character escape",
            ),
            ("-x", "invalid character 'x' in numeric literal"),
            ("1.x", "invalid character 'x' after decimal point in numeric literal"),
            ("1ex", "invalid character 'x' in exponent of numeric literal"),
            ("nul1", "invalid character '1' in literal null (expecting 'l')"),
            ("'", "invalid character '\\'' looking for beginning of value"),
            ("\u{e9}", "invalid character 'Ã' looking for beginning of value"),
        ] {
            assert_eq!(scan(text), Err(error.to_owned()), "{text:?}");
        }
        let deep = "[".repeat(DEPTH_MAX + 1);
        let mut scanner = Scanner::new();
        assert_eq!(
            scanner.read(deep.as_bytes()),
            Err("invalid character '[' exceeded max depth".to_owned())
        );
    }
}

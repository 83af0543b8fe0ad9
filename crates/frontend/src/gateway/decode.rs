//! From JSON to protobuf, by the rules of Go's `protojson`, which etcd's gateway uses, and with its errors.
//!
//! The text is one whole JSON value, as [`super::scan`] finds it, so its syntax is known to be right, except inside
//! strings. Fields go to the wire in the order in which they come.

use std::borrow::Cow;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::scan::go_quoted;
use super::schema::{Field, Kind, Message};

/// How deep messages may be nested: what our gRPC decoder takes (prost's recursion limit).
const DEPTH_MAX: usize = 100;

/// The longest integer that fits into 64 bits, in digits.
const DIGITS_MAX: i64 = 20;

type Result<T> = std::result::Result<T, String>;

/// Encodes the message that a JSON text describes.
///
/// # Errors
/// Go's text for what does not fit the message.
pub(crate) fn decode(text: &[u8], message: &'static Message) -> Result<Vec<u8>> {
    let mut decoder = Decoder {
        text,
        at: 0,
        wire: Vec::with_capacity(text.len()),
    };
    decoder.message(message, DEPTH_MAX)?;
    Ok(decoder.wire)
}

struct Decoder<'a> {
    text: &'a [u8],
    at: usize,
    wire: Vec<u8>,
}

/// A part of the text, and where it begins.
struct Token<'a> {
    at: usize,
    text: &'a [u8],
}

impl<'a> Decoder<'a> {
    fn message(&mut self, message: &'static Message, depth: usize) -> Result<()> {
        let depth = depth.checked_sub(1).ok_or("proto: exceeded max recursion depth")?;
        if self.peek() != b'{' {
            return Err(self.unexpected());
        }
        self.at += 1;
        let (mut seen, mut oneofs) = (0_u64, Vec::new());
        loop {
            match self.peek() {
                b'}' => {
                    self.at += 1;
                    return Ok(());
                }
                b',' => {
                    self.at += 1;
                    continue;
                }
                _ => {}
            }
            let (name, token) = self.string()?;
            // The colon.
            self.peek();
            self.at += 1;
            let Some((index, field)) = message.by_name(&name) else {
                self.skip()?;
                continue;
            };
            if seen & (1 << index) != 0 {
                return Err(self.error(token.at, &format!("duplicate field {}", lossy(token.text))));
            }
            seen |= 1 << index;
            if self.peek() == b'n' {
                self.token();
                continue;
            }
            if field.repeated {
                self.list(field, depth)?;
                continue;
            }
            if let Some(oneof) = field.oneof {
                if oneofs.contains(&oneof) {
                    let name = lossy(token.text);
                    return Err(self.error(token.at, &format!("error parsing {name}, oneof {oneof} is already set")));
                }
                oneofs.push(oneof);
            }
            self.value(field, depth)?;
        }
    }

    fn list(&mut self, field: &'static Field, depth: usize) -> Result<()> {
        if self.peek() != b'[' {
            return Err(self.unexpected());
        }
        self.at += 1;
        loop {
            match self.peek() {
                b']' => {
                    self.at += 1;
                    return Ok(());
                }
                b',' => self.at += 1,
                _ => self.value(field, depth)?,
            }
        }
    }

    fn value(&mut self, field: &'static Field, depth: usize) -> Result<()> {
        if let Kind::Message(message) = field.kind {
            self.key(field, 2);
            // Most messages are short: one byte for the length, and more if need be.
            let start = self.wire.len() + 1;
            self.wire.push(0);
            self.message(message, depth)?;
            let length = self.wire.len() - start;
            if length < 0x80 {
                self.wire[start - 1] = length as u8;
            } else {
                let mut bytes = Vec::with_capacity(5);
                varint(&mut bytes, length as u64);
                self.wire.splice(start - 1..start, bytes);
            }
            return Ok(());
        }
        let text = self.peek();
        let (string, token) = match text {
            b'"' => {
                let (string, token) = self.string()?;
                (Some(string), token)
            }
            _ => (None, self.token()),
        };
        let invalid = |decoder: &Self| {
            let (kind, name, raw) = (field.kind.name(), field.json_name, lossy(token.text));
            decoder.error(token.at, &format!("invalid value for {kind} field {name}: {raw}"))
        };
        let number = match &string {
            Some(text) => leading_number(text),
            None => Some(token.text),
        };
        let signed = |bits| number.and_then(integer).and_then(|text| parse_signed(&text, bits));
        let unsigned = |bits| number.and_then(integer).and_then(|text| parse_unsigned(&text, bits));
        let value = match field.kind {
            Kind::Bool if token.text == b"true" => Some(1),
            Kind::Bool if token.text == b"false" => Some(0),
            Kind::Bool => None,
            Kind::Int32 => signed(32),
            Kind::Int64 => signed(64),
            Kind::Uint32 => unsigned(32),
            Kind::Uint64 => unsigned(64),
            Kind::Enum(values) => match &string {
                Some(name) => match values.number(name) {
                    Some(number) => Some(i64::from(number) as u64),
                    // A name that a later release may know.
                    None => return Ok(()),
                },
                None => signed(32),
            },
            Kind::String | Kind::Bytes => {
                let bytes = match (field.kind, string) {
                    (Kind::String, Some(text)) => Some(Cow::Owned(text.into_owned().into_bytes())),
                    (_, Some(text)) => base64_decoded(&text).map(Cow::Owned),
                    (_, None) => None,
                };
                let bytes: Cow<'_, [u8]> = bytes.ok_or_else(|| invalid(self))?;
                self.key(field, 2);
                varint(&mut self.wire, bytes.len() as u64);
                self.wire.extend_from_slice(&bytes);
                return Ok(());
            }
            Kind::Message(_) => unreachable!("it is returned from above"),
        };
        let value = value.ok_or_else(|| invalid(self))?;
        self.key(field, 0);
        varint(&mut self.wire, value);
        Ok(())
    }

    /// Passes over a value that nobody knows, however deep it is.
    fn skip(&mut self) -> Result<()> {
        let mut open = 0_usize;
        loop {
            match self.peek() {
                b'{' | b'[' => {
                    self.at += 1;
                    open += 1;
                }
                b'}' | b']' => {
                    self.at += 1;
                    open -= 1;
                }
                b',' | b':' => {
                    self.at += 1;
                    continue;
                }
                b'"' => drop(self.string()?),
                _ => drop(self.token()),
            }
            if open == 0 {
                return Ok(());
            }
        }
    }

    fn key(&mut self, field: &Field, wire_type: u32) {
        varint(&mut self.wire, u64::from(field.number << 3 | wire_type));
    }

    /// The next byte that is not white space; 0 at the end, which only a bug in the scanner lets one reach.
    fn peek(&mut self) -> u8 {
        while let Some(b' ' | b'\t' | b'\r' | b'\n') = self.text.get(self.at) {
            self.at += 1;
        }
        self.text.get(self.at).copied().unwrap_or(0)
    }

    /// A number or a word, or else one byte.
    fn token(&mut self) -> Token<'a> {
        let at = self.at;
        let rest = &self.text[at.min(self.text.len())..];
        let word = rest.iter().take_while(|byte| in_word(**byte)).count();
        let length = word.max(1).min(rest.len());
        self.at += length;
        Token {
            at,
            text: &rest[..length],
        }
    }

    /// A string, and how it was written.
    fn string(&mut self) -> Result<(Cow<'a, str>, Token<'a>)> {
        let start = self.at;
        let text = self.text;
        let syntax = |decoder: &Self, what: &str| decoder.syntax_error(start, what);
        // Whoever calls has seen the quote.
        let mut at = start + 1;
        let mut unescaped: Option<Vec<u8>> = None;
        loop {
            let rest = text.get(at..).unwrap_or_default();
            let plain = rest.iter().take_while(|byte| !matches!(byte, b'"' | b'\\')).count();
            let piece = &rest[..plain];
            if std::str::from_utf8(piece).is_err() {
                return Err(syntax(self, "invalid UTF-8 in string"));
            }
            if let Some(unescaped) = &mut unescaped {
                unescaped.extend_from_slice(piece);
            }
            at += plain;
            if text.get(at) != Some(&b'\\') {
                break;
            }
            let unescaped = unescaped.get_or_insert_with(|| piece_before(text, start, at));
            let (char, length) = match text.get(at + 1) {
                Some(b'b') => ('\x08', 2),
                Some(b'f') => ('\x0c', 2),
                Some(b'n') => ('\n', 2),
                Some(b'r') => ('\r', 2),
                Some(b't') => ('\t', 2),
                Some(b'u') => match unicode_escape(&text[at..]) {
                    Ok(found) => found,
                    Err(Some(code)) => {
                        let code = go_quoted(&lossy(code));
                        return Err(syntax(self, &format!("invalid escape code \"{code}\" in string")));
                    }
                    Err(None) => return Err("proto: unexpected EOF".to_owned()),
                },
                Some(&other) => (char::from(other), 2),
                None => return Err("proto: unexpected EOF".to_owned()),
            };
            let mut buffer = [0; 4];
            unescaped.extend_from_slice(char.encode_utf8(&mut buffer).as_bytes());
            at += length;
        }
        // The closing quote.
        let end = (at + 1).min(text.len());
        self.at = end;
        let token = Token {
            at: start,
            text: &text[start..end],
        };
        let string = match unescaped {
            Some(bytes) => String::from_utf8(bytes).map(Cow::Owned).ok(),
            None => std::str::from_utf8(&text[start + 1..at]).map(Cow::Borrowed).ok(),
        };
        match string {
            Some(string) => Ok((string, token)),
            None => Err(syntax(self, "invalid UTF-8 in string")),
        }
    }

    fn unexpected(&mut self) -> String {
        let token = match self.peek() {
            b'"' => match self.string() {
                Ok((_, token)) => token,
                Err(error) => return error,
            },
            _ => self.token(),
        };
        self.syntax_error(token.at, &format!("unexpected token {}", lossy(token.text)))
    }

    fn error(&self, at: usize, what: &str) -> String {
        let (line, column) = self.position(at);
        format!("proto: (line {line}:{column}): {what}")
    }

    fn syntax_error(&self, at: usize, what: &str) -> String {
        let (line, column) = self.position(at);
        format!("proto: syntax error (line {line}:{column}): {what}")
    }

    /// Line and column, in characters, from 1.
    fn position(&self, at: usize) -> (usize, usize) {
        let before = &self.text[..at];
        let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
        let start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        (line, lossy(&before[start..]).chars().count() + 1)
    }
}

fn lossy(text: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(text)
}

fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.' | b'_')
}

fn piece_before(text: &[u8], start: usize, at: usize) -> Vec<u8> {
    text[start + 1..at].to_vec()
}

/// The character that an escape such as `\u00e9` stands for, and the escape's length: two escapes for what is beyond the
/// basic plane. The error is the escape that stands for none, or nothing if the text ends in it.
fn unicode_escape(text: &[u8]) -> std::result::Result<(char, usize), Option<&[u8]>> {
    let unit = |text: &[u8]| {
        let digits = std::str::from_utf8(text.get(2..6)?).ok()?;
        u16::from_str_radix(digits, 16).ok()
    };
    let first = unit(text).ok_or(None)?;
    if let Some(char) = char::from_u32(u32::from(first)) {
        return Ok((char, 6));
    }
    let rest = &text[6..];
    let code = rest.get(..6).ok_or(None)?;
    let pair = match code {
        [b'\\', b'u', ..] => unit(code).map(|second| [first, second]),
        _ => None,
    };
    let decoded = pair.and_then(|pair| char::decode_utf16(pair).next()?.ok());
    decoded.map(|char| (char, 12)).ok_or(Some(code))
}

/// The number that a string begins with; what follows it does not count, unless it could be a part of it.
fn leading_number(text: &str) -> Option<&[u8]> {
    if text.trim().len() != text.len() {
        return None;
    }
    let text = text.as_bytes();
    let length = text.iter().take_while(|byte| in_word(**byte)).count();
    Some(&text[..length])
}

/// A JSON number as an integer in plain digits, if it is one: `1.5e1` is 15.
fn integer(text: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mantissa, exponent) = match digits.find(['e', 'E']) {
        Some(at) => (&digits[..at], Some(&digits[at + 1..])),
        None => (digits, None),
    };
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((_, "")) => return None,
        Some((whole, fraction)) => (whole, fraction),
        None => (mantissa, ""),
    };
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let leading_zero = whole.len() > 1 && whole.starts_with('0');
    if whole.is_empty() || leading_zero || !all_digits(whole) || !all_digits(fraction) {
        return None;
    }
    let exponent: i64 = match exponent {
        Some(text) => {
            let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
            if unsigned.is_empty() || !all_digits(unsigned) {
                return None;
            }
            i64::from(text.parse::<i32>().ok()?)
        }
        None => 0,
    };
    let whole = if whole == "0" { "" } else { whole };
    let fraction = fraction.trim_end_matches('0');
    if whole.is_empty() && fraction.is_empty() {
        return Some("0".to_owned());
    }
    let (whole_len, fraction_len) = (whole.len() as i64, fraction.len() as i64);
    let mut number = String::new();
    if negative {
        number.push('-');
    }
    if exponent >= 0 {
        if fraction_len > exponent || whole_len + exponent > DIGITS_MAX {
            return None;
        }
        number.push_str(whole);
        number.push_str(fraction);
        (fraction_len..exponent).for_each(|_| number.push('0'));
    } else {
        let kept = usize::try_from(whole_len + exponent).ok()?;
        if fraction_len > 0 || whole[kept..].bytes().any(|byte| byte != b'0') {
            return None;
        }
        number.push_str(&whole[..kept]);
    }
    Some(number)
}

/// A signed integer of so many bits, as it goes into a varint.
fn parse_signed(text: &str, bits: u32) -> Option<u64> {
    let number: i64 = match bits {
        32 => i64::from(text.parse::<i32>().ok()?),
        _ => text.parse().ok()?,
    };
    Some(number as u64)
}

fn parse_unsigned(text: &str, bits: u32) -> Option<u64> {
    match bits {
        32 => text.parse::<u32>().ok().map(u64::from),
        _ => text.parse().ok(),
    }
}

/// Either alphabet, padded or not, as Go takes it: line breaks and what is left over in the last character do not count.
fn base64_decoded(text: &str) -> Option<Vec<u8>> {
    const fn engine(alphabet: &alphabet::Alphabet, padding: DecodePaddingMode) -> GeneralPurpose {
        let config = GeneralPurposeConfig::new()
            .with_decode_allow_trailing_bits(true)
            .with_decode_padding_mode(padding);
        GeneralPurpose::new(alphabet, config)
    }
    const PADDED: DecodePaddingMode = DecodePaddingMode::RequireCanonical;
    const BARE: DecodePaddingMode = DecodePaddingMode::RequireNone;
    static STANDARD: GeneralPurpose = engine(&alphabet::STANDARD, PADDED);
    static STANDARD_BARE: GeneralPurpose = engine(&alphabet::STANDARD, BARE);
    static URL: GeneralPurpose = engine(&alphabet::URL_SAFE, PADDED);
    static URL_BARE: GeneralPurpose = engine(&alphabet::URL_SAFE, BARE);
    let engine = match (text.contains(['-', '_']), text.len().is_multiple_of(4)) {
        (false, true) => &STANDARD,
        (false, false) => &STANDARD_BARE,
        (true, true) => &URL,
        (true, false) => &URL_BARE,
    };
    if text.contains(['\r', '\n']) {
        return engine.decode(text.replace(['\r', '\n'], "")).ok();
    }
    engine.decode(text).ok()
}

fn varint(wire: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        wire.push(value as u8 | 0x80);
        value >>= 7;
    }
    wire.push(value as u8);
}

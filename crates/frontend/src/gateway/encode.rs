//! From protobuf to JSON, by the rules of Go's `protojson`: names of the .proto file, no zero values, bytes in base64,
//! 64-bit integers as strings, enumerations by name, no white space.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::schema::{Kind, Message};

/// Bytes that are no message of the given kind. Ours always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a reply does not decode")]
pub(crate) struct Malformed;

/// Writes messages as JSON.
pub(crate) struct Encoder {
    json: Vec<u8>,
    /// Escape what HTML gives a meaning to, as Go's `encoding/json` does, which etcd's streams go through.
    html_safe: bool,
}

impl Encoder {
    pub(crate) fn new(html_safe: bool) -> Self {
        Encoder {
            json: Vec::new(),
            html_safe,
        }
    }

    /// Writes what is JSON already.
    pub(crate) fn raw(&mut self, json: &str) {
        self.json.extend_from_slice(json.as_bytes());
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.json
    }

    /// Writes a message. Its fields must be in order of their numbers, as prost writes them.
    pub(crate) fn message(&mut self, mut wire: &[u8], message: &'static Message) -> Result<(), Malformed> {
        self.json.push(b'{');
        let mut first = true;
        // The number of the list that is being written.
        let mut list = None;
        while !wire.is_empty() {
            let key = varint(&mut wire)?;
            let (number, wire_type) = ((key >> 3) as u32, key & 7);
            let (mut value, mut bytes) = (0, &[][..]);
            match wire_type {
                0 => value = varint(&mut wire)?,
                1 => drop(take(&mut wire, 8)?),
                2 => {
                    let length = usize::try_from(varint(&mut wire)?).map_err(|_| Malformed)?;
                    bytes = take(&mut wire, length)?;
                }
                5 => drop(take(&mut wire, 4)?),
                _ => return Err(Malformed),
            }
            let Some(field) = message.by_number(number) else {
                continue;
            };
            let is_length_delimited = matches!(field.kind, Kind::String | Kind::Bytes | Kind::Message(_));
            if (wire_type == 2) != is_length_delimited {
                return Err(Malformed);
            }
            if list != Some(number) {
                if list.take().is_some() {
                    self.json.push(b']');
                }
                if !first {
                    self.json.push(b',');
                }
                self.json.push(b'"');
                self.raw(field.name);
                self.raw("\":");
                if field.repeated {
                    self.json.push(b'[');
                    list = Some(number);
                }
            } else {
                self.json.push(b',');
            }
            first = false;
            match field.kind {
                Kind::Bool => self.raw(if value == 0 { "false" } else { "true" }),
                Kind::Int32 => self.integer(value as i32),
                Kind::Uint32 => self.integer(value as u32),
                Kind::Int64 => self.quoted(|json| json.integer(value as i64)),
                Kind::Uint64 => self.quoted(|json| json.integer(value)),
                Kind::Enum(values) => match values.name(value as i32) {
                    Some(name) => self.quoted(|json| json.raw(name)),
                    None => self.integer(value as i32),
                },
                Kind::String => self.text(std::str::from_utf8(bytes).map_err(|_| Malformed)?),
                Kind::Bytes => self.quoted(|json| json.base64(bytes)),
                Kind::Message(inner) => self.message(bytes, inner)?,
            }
        }
        if list.is_some() {
            self.json.push(b']');
        }
        self.json.push(b'}');
        Ok(())
    }

    pub(crate) fn integer(&mut self, value: impl itoa::Integer) {
        self.json
            .extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    }

    fn quoted(&mut self, write: impl FnOnce(&mut Self)) {
        self.json.push(b'"');
        write(self);
        self.json.push(b'"');
    }

    fn base64(&mut self, bytes: &[u8]) {
        let start = self.json.len();
        // Four characters for every three bytes.
        self.json.resize(start + bytes.len().div_ceil(3) * 4, 0);
        let written = STANDARD.encode_slice(bytes, &mut self.json[start..]);
        self.json
            .truncate(start + written.expect("the room is exactly what it takes"));
    }

    /// Writes a text between quotes.
    pub(crate) fn text(&mut self, text: &str) {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        self.json.push(b'"');
        for char in text.chars() {
            let escape = match char {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\x08' => "\\b",
                '\x0c' => "\\f",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                '\0'..' ' => "",
                '<' | '>' | '&' | '\u{2028}' | '\u{2029}' if self.html_safe => "",
                _ => {
                    self.json.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes());
                    continue;
                }
            };
            self.raw(escape);
            if escape.is_empty() {
                let unit = char as u32;
                self.raw("\\u");
                let digits = [12, 8, 4, 0].map(|shift| HEX[(unit >> shift) as usize & 15]);
                self.json.extend_from_slice(&digits);
            }
        }
        self.json.push(b'"');
    }
}

fn take<'a>(wire: &mut &'a [u8], length: usize) -> Result<&'a [u8], Malformed> {
    let (taken, rest) = wire.split_at_checked(length).ok_or(Malformed)?;
    *wire = rest;
    Ok(taken)
}

fn varint(wire: &mut &[u8]) -> Result<u64, Malformed> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let [byte] = take(wire, 1)? else { return Err(Malformed) };
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Malformed)
}

//! Headers of gRPC calls in HPACK (RFC 7541): ours written once and named by their numbers from then on, the server's
//! read for the three that matter.

use loona_hpack::Decoder;

use super::grpc::Method;

/// Size of the table of headers that both sides begin with, in bytes (RFC 9113, 6.5.2).
pub(crate) const TABLE_BYTES: usize = 4096;
/// What the table counts for an entry besides its text, in bytes (RFC 7541, 4.1).
const ENTRY_BYTES: usize = 32;
/// Entries of the static table: the dynamic one's numbers begin after them.
const STATIC_ENTRIES: usize = 61;

/// Names that have a number in the static table.
const AUTHORITY: u8 = 1;
const PATH: u8 = 4;
const CONTENT_TYPE: u8 = 31;
/// Whole headers that have one.
const METHOD_POST: u8 = 0x83;
const SCHEME_HTTP: u8 = 0x86;
const SCHEME_HTTPS: u8 = 0x87;

/// The name of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Static(u8),
    Text(&'static str),
}

/// Writes the headers of calls on one connection.
#[derive(Debug)]
pub(crate) struct Encoder {
    tls: bool,
    authority: String,
    token: Option<String>,
    /// What the server's table holds, in the order in which it came. Nothing is ever put out of it.
    table: Vec<(Name, String)>,
    table_bytes: usize,
    /// Whether the server has a table of the usual size.
    has_table: bool,
    /// Whether the next block is to tell the server that its table is empty from now on.
    tell: bool,
    /// Each method's block as it is while the table has so many entries.
    blocks: [(usize, Vec<u8>); Method::ALL.len()],
}

impl Encoder {
    /// `authority` is `host:port`.
    pub(crate) fn new(tls: bool, authority: String) -> Self {
        Encoder {
            tls,
            authority,
            token: None,
            table: Vec::new(),
            table_bytes: 0,
            has_table: true,
            tell: false,
            blocks: Default::default(),
        }
    }

    /// From now on calls have this token.
    pub(crate) fn set_token(&mut self, token: String) {
        self.token = Some(token);
        self.blocks = Default::default();
    }

    /// The server says how large its table may be, in bytes.
    pub(crate) fn limit_table(&mut self, bytes: u32) {
        if self.has_table && (bytes as usize) < TABLE_BYTES {
            // What would have to leave the table need not be followed if nothing is in it.
            self.has_table = false;
            self.tell = true;
            self.table.clear();
            self.blocks = Default::default();
        }
    }

    /// The block of a call's headers. Each one that is asked for must be sent, in this order.
    pub(crate) fn block(&mut self, method: Method) -> &[u8] {
        let slot = method as usize;
        let (entries, block) = &self.blocks[slot];
        if block.is_empty() || *entries != self.table.len() || self.tell {
            let before = self.table.len();
            let mut block = self.blocks[slot].1.split_off(0);
            block.clear();
            self.write(method, &mut block);
            // One that changes the table is not the same a second time.
            let good_for = if self.table.len() == before && !self.tell {
                before
            } else {
                usize::MAX
            };
            self.tell = false;
            self.blocks[slot] = (good_for, block);
        }
        &self.blocks[slot].1
    }

    fn write(&mut self, method: Method, out: &mut Vec<u8>) {
        if self.tell {
            out.push(0x20); // The table's size is 0.
        }
        out.push(METHOD_POST);
        out.push(if self.tls { SCHEME_HTTPS } else { SCHEME_HTTP });
        self.field(Name::Static(PATH), method.path(), out);
        let authority = std::mem::take(&mut self.authority);
        self.field(Name::Static(AUTHORITY), &authority, out);
        self.authority = authority;
        self.field(Name::Static(CONTENT_TYPE), "application/grpc", out);
        self.field(Name::Text("te"), "trailers", out);
        if let Some(token) = self.token.take() {
            self.field(Name::Text("token"), &token, out);
            self.token = Some(token);
        }
    }

    fn field(&mut self, name: Name, value: &str, out: &mut Vec<u8>) {
        let place = self.table.iter().position(|(n, v)| *n == name && v == value);
        if let Some(place) = place {
            integer(0x80, 7, STATIC_ENTRIES + self.table.len() - place, out);
            return;
        }
        let text = match name {
            Name::Static(_) => 16, // The longest of them is not longer.
            Name::Text(text) => text.len(),
        };
        let bytes = text + value.len() + ENTRY_BYTES;
        let (flag, bits) = if self.has_table && self.table_bytes + bytes <= TABLE_BYTES {
            self.table_bytes += bytes;
            self.table.push((name, value.to_owned()));
            (0x40, 6)
        } else {
            (0x00, 4)
        };
        match name {
            Name::Static(number) => integer(flag, bits, usize::from(number), out),
            Name::Text(text) => {
                out.push(flag);
                string(text, out);
            }
        }
        string(value, out);
    }
}

/// A number of which the first byte has room for `bits` bits beside its flags (RFC 7541, 5.1).
fn integer(flags: u8, bits: u8, mut number: usize, out: &mut Vec<u8>) {
    let room = (1 << bits) - 1;
    if number < room {
        out.push(flags | number as u8);
        return;
    }
    out.push(flags | room as u8);
    number -= room;
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn string(text: &str, out: &mut Vec<u8>) {
    integer(0, 7, text.len(), out);
    out.extend_from_slice(text.as_bytes());
}

/// What a block of the server's headers says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// `:status`; 0 in trailers, which have none.
    pub(crate) http_status: u16,
    pub(crate) grpc_status: Option<Vec<u8>>,
    pub(crate) grpc_message: Vec<u8>,
}

/// Reads a block. An error says that the connection can't be followed any more.
pub(crate) fn read(decoder: &mut Decoder<'_>, block: &[u8]) -> Result<Heard, String> {
    let mut heard = Heard::default();
    decoder
        .decode_with_cb(block, |name, value| match &*name {
            b":status" => {
                heard.http_status = std::str::from_utf8(&value)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .unwrap_or_default();
            }
            b"grpc-status" => heard.grpc_status = Some(value.into_owned()),
            b"grpc-message" => heard.grpc_message = value.into_owned(),
            _ => {}
        })
        .map_err(|error| format!("headers that can't be read: {error:?}"))?;
    Ok(heard)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Fields = Vec<(String, String)>;

    fn decoded(decoder: &mut Decoder<'_>, block: &[u8]) -> Fields {
        let fields = decoder.decode(block).unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        fields
            .into_iter()
            .map(|(name, value)| (text(name), text(value)))
            .collect()
    }

    fn expected(path: &str, token: Option<&str>) -> Fields {
        let fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "host:1"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ];
        let fields = fields.into_iter().chain(token.map(|token| ("token", token)));
        fields
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    #[test]
    fn headers_are_what_they_are_each_time_and_short_from_the_second_on() {
        let mut encoder = Encoder::new(false, "host:1".to_owned());
        let mut decoder = Decoder::new();
        for round in 0..3 {
            for method in Method::ALL {
                let block = encoder.block(method).to_vec();
                assert!(round == 0 || block.len() == 6, "{block:?}");
                assert_eq!(decoded(&mut decoder, &block), expected(method.path(), None));
            }
        }
        // As long as one of a JWT may be: more than the table has room for.
        for token in ["short".to_owned(), "x".repeat(200), "y".repeat(5000)] {
            encoder.set_token(token.clone());
            for method in [Method::Put, Method::Range, Method::Put] {
                let block = encoder.block(method).to_vec();
                assert_eq!(decoded(&mut decoder, &block), expected(method.path(), Some(&token)));
            }
        }
    }

    #[test]
    fn a_server_without_a_table_is_told_everything_each_time() {
        let mut encoder = Encoder::new(false, "host:1".to_owned());
        let mut decoder = Decoder::new();
        let block = encoder.block(Method::Put).to_vec();
        assert_eq!(decoded(&mut decoder, &block), expected(Method::Put.path(), None));
        encoder.limit_table(100);
        for round in 0..3 {
            let block = encoder.block(Method::Put).to_vec();
            assert_eq!(block[0] == 0x20, round == 0);
            assert_eq!(decoded(&mut decoder, &block), expected(Method::Put.path(), None));
        }
    }

    #[test]
    fn what_a_server_says_is_heard() {
        let mut encoder = loona_hpack::Encoder::new();
        let mut decoder = Decoder::new();
        let mut said = |fields: &[(&[u8], &[u8])]| read(&mut decoder, &encoder.encode(fields.iter().copied())).unwrap();
        for _ in 0..2 {
            let head = said(&[(b":status", b"200"), (b"content-type", b"application/grpc")]);
            assert_eq!((head.http_status, head.grpc_status), (200, None));
            let trailers = said(&[(b"grpc-status", b"8"), (b"grpc-message", b"no room")]);
            assert_eq!(trailers.http_status, 0);
            assert_eq!(trailers.grpc_status.as_deref(), Some(&b"8"[..]));
            assert_eq!(trailers.grpc_message, b"no room");
        }
        read(&mut Decoder::new(), &[0xff, 0xff]).unwrap_err();
    }
}

//! Reads the one Go `encoding/gob` value that old logs hold: `struct{ Key, Val string }`.
//!
//! The format is the one documented at <https://pkg.go.dev/encoding/gob>: a stream of messages, each a byte count and
//! then a type id (negative: a type definition follows; positive: a value of that type). Unsigned integers are one
//! byte if below 128, else a negated byte count and then big-endian bytes; signed ones are folded into unsigned ones,
//! with the sign in the lowest bit. A struct's fields come as (delta of the field number, value) pairs, fields with
//! their zero value left out, ended by a delta of 0.

use bytes::Bytes;

/// The longest stream of type definitions that is read, in messages; Go writes one for this struct.
const DEFINITIONS_MAX: usize = 1;

/// Reads the key and the value. Both are slices of `data`.
pub(super) fn decode_put(data: &Bytes) -> Result<(Bytes, Bytes), &'static str> {
    let mut stream = Reader { data, at: 0 };
    let mut defined = false;
    for _ in 0..=DEFINITIONS_MAX {
        let length = stream.length()?;
        let end = stream
            .at
            .checked_add(length)
            .filter(|end| *end <= data.len())
            .ok_or("a message is cut off")?;
        let type_id = stream.signed()?;
        if stream.at > end {
            return Err("a message is shorter than its type id");
        }
        if type_id < 0 {
            check_definition(&data[stream.at..end])?;
            stream.at = end;
            defined = true;
            continue;
        }
        if !defined || type_id < 64 {
            // Ids below 64 are Go's predeclared types: a bare string, say, and no struct.
            return Err("the value is not a struct that was defined before it");
        }
        let put = stream.key_and_val(end)?;
        if end != data.len() {
            return Err("bytes follow the value");
        }
        return Ok(put);
    }
    Err("too many type definitions")
}

/// How the definition of the struct ends: two fields, `Key` and `Val` in this order, both strings (type id 6).
const FIELDS: &[u8] = b"\x00\x01\x02\x01\x03Key\x01\x0c\x00\x01\x03Val\x01\x0c\x00\x00\x00";

/// The definition must be that of the one struct that was ever written. Go itself would match fields by name and skip
/// what it does not know; here anything else means that we do not know what was meant.
fn check_definition(definition: &[u8]) -> Result<(), &'static str> {
    if definition.ends_with(FIELDS) {
        Ok(())
    } else {
        Err("the type is not struct{ Key, Val string }")
    }
}

struct Reader<'a> {
    data: &'a Bytes,
    at: usize,
}

impl Reader<'_> {
    fn byte(&mut self) -> Result<u8, &'static str> {
        let byte = *self.data.get(self.at).ok_or("the stream is cut off")?;
        self.at += 1;
        Ok(byte)
    }

    fn unsigned(&mut self) -> Result<u64, &'static str> {
        let first = self.byte()?;
        if first < 0x80 {
            return Ok(u64::from(first));
        }
        let count = usize::from(first.wrapping_neg());
        if count > 8 {
            return Err("an integer is longer than 8 bytes");
        }
        let mut value = 0;
        for _ in 0..count {
            value = value << 8 | u64::from(self.byte()?);
        }
        Ok(value)
    }

    fn signed(&mut self) -> Result<i64, &'static str> {
        let folded = self.unsigned()?;
        let magnitude = (folded >> 1) as i64;
        Ok(if folded & 1 == 1 { !magnitude } else { magnitude })
    }

    fn length(&mut self) -> Result<usize, &'static str> {
        usize::try_from(self.unsigned()?).map_err(|_| "a length is out of range")
    }

    fn key_and_val(&mut self, end: usize) -> Result<(Bytes, Bytes), &'static str> {
        let mut fields = [Bytes::new(), Bytes::new()];
        let mut field = 0;
        loop {
            let delta = self.length()?;
            if self.at > end {
                return Err("the value is cut off");
            }
            if delta == 0 {
                break;
            }
            field += delta.min(3);
            let slot = fields.get_mut(field - 1).ok_or("the value has more than two fields")?;
            let length = self.length()?;
            let stop = self
                .at
                .checked_add(length)
                .filter(|stop| *stop <= end)
                .ok_or("a string is cut off")?;
            *slot = self.data.slice(self.at..stop);
            self.at = stop;
        }
        if self.at != end {
            return Err("bytes are left in the value's message");
        }
        let [key, value] = fields;
        Ok((key, value))
    }
}

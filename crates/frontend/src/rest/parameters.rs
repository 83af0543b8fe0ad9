//! Query parameters: what each operation takes, and nothing else.
//!
//! The same tables check requests and describe them in the OpenAPI document, so neither can know more than the other.

use std::borrow::Cow;
use std::time::Duration;

use api::{LeaseId, Revision};
use bytes::Bytes;

use super::problem::{INVALID_PARAMETER, INVALID_PATH, Problem, UNKNOWN_PARAMETER};

/// A query parameter.
#[derive(Debug)]
pub(super) struct Parameter {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) about: &'static str,
    pub(super) required: bool,
}

/// What a parameter's value may be.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Bytes, percent-encoded.
    Bytes,
    /// `true` or `false`.
    Flag,
    /// A whole number within these bounds.
    Integer { min: i64, max: i64 },
    /// A lease's id: up to 16 hexadecimal digits.
    Lease,
    /// A time such as `30s`, within these bounds, in milliseconds.
    Time { min_ms: u64, max_ms: u64 },
    /// One of these.
    Choice(&'static [&'static str]),
}

#[derive(Debug, Clone)]
enum Value {
    Bytes(Bytes),
    Flag(bool),
    Integer(i64),
    Time(Duration),
    Choice(&'static str),
}

/// The parameters of one request, checked.
#[derive(Debug, Default, Clone)]
pub(super) struct Parameters(Vec<(&'static str, Value)>);

impl Parameters {
    /// Reads a query as HTML forms write it: `+` is a space.
    pub(super) fn parse(query: &str, allowed: &'static [Parameter]) -> Result<Self, Problem> {
        let mut values: Vec<(&'static str, Value)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let shown = String::from_utf8_lossy(name.as_bytes());
            let name = decode(name, true)
                .map_err(|reason| Problem::parameter(INVALID_PARAMETER, &shown, reason))
                .map(|name| String::from_utf8_lossy(&name).into_owned())?;
            let Some(parameter) = allowed.iter().find(|parameter| parameter.name == name) else {
                let names: Vec<_> = allowed.iter().map(|parameter| parameter.name).collect();
                let known = match names.is_empty() {
                    true => "there are none".to_owned(),
                    false => format!("there are {}", names.join(", ")),
                };
                let shown: String = name.chars().take(100).collect();
                let detail = format!("{shown:?} is not a parameter of this operation: {known}");
                return Err(Problem::parameter(UNKNOWN_PARAMETER, &name, detail));
            };
            let wrong = |reason: String| Problem::parameter(INVALID_PARAMETER, parameter.name, reason);
            if values.iter().any(|(known, _)| *known == parameter.name) {
                return Err(wrong(format!("{} is given more than once", parameter.name)));
            }
            let value = decode(value, true).map_err(&wrong)?;
            let value = parameter
                .kind
                .read(value)
                .map_err(|reason| wrong(format!("{} {reason}", parameter.name)))?;
            values.push((parameter.name, value));
        }
        Ok(Parameters(values))
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    pub(super) fn bytes(&self, name: &str) -> Option<Bytes> {
        match self.get(name) {
            Some(Value::Bytes(bytes)) => Some(bytes.clone()),
            _ => None,
        }
    }

    /// Whether a flag is set; `false` where it is not given.
    pub(super) fn flag(&self, name: &str) -> bool {
        matches!(self.get(name), Some(Value::Flag(true)))
    }

    pub(super) fn integer(&self, name: &str) -> Option<i64> {
        match self.get(name) {
            Some(Value::Integer(number)) => Some(*number),
            _ => None,
        }
    }

    pub(super) fn time(&self, name: &str) -> Option<Duration> {
        match self.get(name) {
            Some(Value::Time(time)) => Some(*time),
            _ => None,
        }
    }

    pub(super) fn choice(&self, name: &str) -> Option<&'static str> {
        match self.get(name) {
            Some(Value::Choice(choice)) => Some(choice),
            _ => None,
        }
    }

    /// The revision to read at; 0 for the newest.
    pub(super) fn revision(&self) -> Revision {
        self.integer("revision").unwrap_or(0)
    }

    /// The lease; 0 for none.
    pub(super) fn lease(&self) -> LeaseId {
        self.integer("lease").unwrap_or(0)
    }
}

impl Kind {
    fn read(self, value: Bytes) -> Result<Value, String> {
        if let Kind::Bytes = self {
            return Ok(Value::Bytes(value));
        }
        let text = std::str::from_utf8(&value).map_err(|_| "is not text".to_owned())?;
        match self {
            Kind::Bytes => unreachable!("bytes are taken as they are"),
            Kind::Flag => match text {
                "true" => Ok(Value::Flag(true)),
                "false" => Ok(Value::Flag(false)),
                _ => Err("is true or false".to_owned()),
            },
            Kind::Integer { min, max } => number(text)
                .filter(|number| (min..=max).contains(number))
                .map(Value::Integer)
                .ok_or_else(|| format!("is a whole number from {min} to {max}")),
            Kind::Lease => lease(text)
                .map(Value::Integer)
                .ok_or_else(|| "is a lease's id: 1 to 16 hexadecimal digits, as etcdctl writes it, not 0".to_owned()),
            Kind::Time { min_ms, max_ms } => time(text)
                .filter(|time| (min_ms..=max_ms).contains(&(time.as_millis() as u64)))
                .map(Value::Time)
                .ok_or_else(|| {
                    format!(
                        "is a time from {min_ms}ms to {max_ms}ms, such as 30s, 500ms or 2m (a bare number is seconds)"
                    )
                }),
            Kind::Choice(choices) => choices
                .iter()
                .find(|choice| **choice == text)
                .map(|choice| Value::Choice(choice))
                .ok_or_else(|| format!("is one of {}", choices.join(", "))),
        }
    }
}

/// A number in decimal, as JSON writes whole numbers: no plus, no leading zeros.
pub(super) fn number(text: &str) -> Option<i64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = text == "0"
        || (!digits.is_empty() && !digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit()));
    if plain { text.parse().ok() } else { None }
}

/// A lease's id, in hexadecimal as etcdctl writes it. Ids are positive 63-bit numbers; etcd takes any 64 bits but 0.
pub(super) fn lease(text: &str) -> Option<LeaseId> {
    let plain = (1..=16).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = u64::from_str_radix(text, 16).ok().filter(|_| plain)?;
    Some(id.cast_signed()).filter(|&id| id != 0)
}

/// A time such as `30s`, `500ms` or `2m`; a bare number is seconds.
fn time(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if digits > 9 {
        return None;
    }
    let number = self::number(number)?.cast_unsigned();
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "" | "s" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_secs(number * 60)),
        _ => None,
    }
}

/// Undoes percent-encoding, strictly: a `%` without two hexadecimal digits behind it is an error, not a character.
fn decode(text: &str, plus_is_space: bool) -> Result<Bytes, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        match first {
            b'%' => {
                let digit = |byte: &u8| char::from(*byte).to_digit(16);
                let [high, low, tail @ ..] = tail else {
                    return Err("a % has fewer than two digits behind it".to_owned());
                };
                let (Some(high), Some(low)) = (digit(high), digit(low)) else {
                    return Err("the two characters behind a % are no hexadecimal digits".to_owned());
                };
                bytes.push((high * 16 + low) as u8);
                rest = tail;
            }
            b'+' if plus_is_space => bytes.push(b' '),
            byte => bytes.push(*byte),
        }
    }
    Ok(bytes.into())
}

/// The bytes that a part of a path stands for.
pub(super) fn decode_path(text: &str) -> Result<Bytes, Problem> {
    decode(text, false).map_err(|reason| Problem::new(INVALID_PATH, reason))
}

/// Writes bytes so that [`Parameters::parse`] and [`decode_path`] read them back. Slashes stay.
pub(super) fn encode(bytes: &[u8]) -> Cow<'_, str> {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
    const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
        .remove(b'-')
        .remove(b'.')
        .remove(b'_')
        .remove(b'~')
        .remove(b'/');
    percent_encode(bytes, ESCAPED).into()
}

/// All keys that begin with `prefix` are below this one; `\0` where there is no such key, which etcd reads as "all".
pub(super) fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::from_static(&[0])
}

/// A set of keys, in etcd's notation, that the parameters `key`, `prefix`, `start` and `end` choose: what all of those
/// that are given have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Selection {
    pub(super) key: Bytes,
    pub(super) range_end: Bytes,
    /// Nothing narrows it down: it is the whole store.
    pub(super) is_all: bool,
    /// No key can be in it.
    pub(super) is_empty: bool,
}

impl Selection {
    /// The keys that are meant.
    pub(super) fn of(
        key: Option<Bytes>,
        prefix: Option<Bytes>,
        start: Option<Bytes>,
        end: Option<Bytes>,
    ) -> Result<Self, Problem> {
        if let Some(key) = key {
            if key.is_empty() {
                return Err(Problem::parameter(INVALID_PARAMETER, "key", "key is not empty"));
            }
            if prefix.is_some() || start.is_some() || end.is_some() {
                let detail = "key names one key: leave prefix, start and end out";
                return Err(Problem::parameter(INVALID_PARAMETER, "key", detail));
            }
            return Ok(Selection {
                key,
                range_end: Bytes::new(),
                is_all: false,
                is_empty: false,
            });
        }
        let prefix = prefix.unwrap_or_default();
        let start = start.unwrap_or_default().max(prefix.clone());
        let prefix_end = Some(prefix_end(&prefix)).filter(|end| **end != [0]);
        let end = match (end.filter(|end| !end.is_empty()), prefix_end) {
            (Some(end), Some(prefix_end)) => Some(end.min(prefix_end)),
            (end, prefix_end) => end.or(prefix_end),
        };
        let is_empty = end.as_ref().is_some_and(|end| *end <= start) || end.as_deref() == Some(&[0]);
        if is_empty {
            // Somewhere among the keys that are spoken of, which the client may have rights to; and written so that etcd's
            // notation cannot mean anything else.
            let place = if prefix.is_empty() { start } else { prefix };
            let place = Some(place).filter(|place| !matches!(&place[..], [] | [0]));
            let place = place.unwrap_or(Bytes::from_static(&[1]));
            return Ok(Selection {
                key: place.clone(),
                range_end: place,
                is_all: false,
                is_empty,
            });
        }
        Ok(Selection {
            is_all: start.is_empty() && end.is_none(),
            is_empty,
            // No key is empty, so the least one stands for "from the beginning".
            key: if start.is_empty() {
                Bytes::from_static(&[0])
            } else {
                start
            },
            range_end: end.unwrap_or(Bytes::from_static(&[0])),
        })
    }

    pub(super) fn of_parameters(parameters: &Parameters) -> Result<Self, Problem> {
        Selection::of(
            parameters.bytes("key"),
            parameters.bytes("prefix"),
            parameters.bytes("start"),
            parameters.bytes("end"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Parameter] = &[
        Parameter {
            name: "prefix",
            kind: Kind::Bytes,
            about: "",
            required: false,
        },
        Parameter {
            name: "limit",
            kind: Kind::Integer { min: 1, max: 10 },
            about: "",
            required: false,
        },
        Parameter {
            name: "all",
            kind: Kind::Flag,
            about: "",
            required: false,
        },
        Parameter {
            name: "lease",
            kind: Kind::Lease,
            about: "",
            required: false,
        },
        Parameter {
            name: "wait",
            kind: Kind::Time {
                min_ms: 0,
                max_ms: 60_000,
            },
            about: "",
            required: false,
        },
        Parameter {
            name: "sort",
            kind: Kind::Choice(&["key", "-key"]),
            about: "",
            required: false,
        },
    ];

    #[test]
    fn values_are_read() {
        let read = |query| Parameters::parse(query, TABLE).expect("it is right");
        assert_eq!(
            read("prefix=a%2Fb%ff+c").bytes("prefix").as_deref(),
            Some(&b"a/b\xff c"[..])
        );
        assert_eq!(read("prefix=").bytes("prefix").as_deref(), Some(&b""[..]));
        assert_eq!(read("&&limit=10&all=true").integer("limit"), Some(10));
        assert!(read("all=true").flag("all") && !read("all=false").flag("all") && !read("").flag("all"));
        assert_eq!(read("lease=ff").lease(), 255);
        assert_eq!(read("wait=500ms").time("wait"), Some(Duration::from_millis(500)));
        assert_eq!(read("wait=1m").time("wait"), read("wait=60").time("wait"));
        assert_eq!(read("sort=-key").choice("sort"), Some("-key"));
    }

    #[test]
    fn whatever_is_wrong_is_named() {
        for (query, slug, name) in [
            ("prefx=a", "unknown-parameter", "prefx"),
            ("Prefix=a", "unknown-parameter", "Prefix"),
            ("prefix=a&prefix=b", "invalid-parameter", "prefix"),
            ("prefix=%f", "invalid-parameter", "prefix"),
            ("prefix=%zz", "invalid-parameter", "prefix"),
            ("%zz=1", "invalid-parameter", "%zz"),
            ("limit=0", "invalid-parameter", "limit"),
            ("limit=11", "invalid-parameter", "limit"),
            ("limit=+1", "invalid-parameter", "limit"),
            ("limit=01", "invalid-parameter", "limit"),
            ("limit", "invalid-parameter", "limit"),
            ("limit=99999999999999999999", "invalid-parameter", "limit"),
            ("all=yes", "invalid-parameter", "all"),
            ("all=%ff", "invalid-parameter", "all"),
            ("lease=0", "invalid-parameter", "lease"),
            ("lease=xyz", "invalid-parameter", "lease"),
            ("lease=11112222333344445", "invalid-parameter", "lease"),
            ("wait=61s", "invalid-parameter", "wait"),
            ("wait=s", "invalid-parameter", "wait"),
            ("wait=1h", "invalid-parameter", "wait"),
            ("sort=value", "invalid-parameter", "sort"),
        ] {
            let problem = Parameters::parse(query, TABLE).expect_err(query);
            let body: serde_json::Value = serde_json::from_slice(&problem.body()).expect("JSON");
            assert_eq!(body["type"], format!("urn:metastore:problem:{slug}"), "{query}");
            assert_eq!(body["parameter"], name, "{query}");
        }
    }

    #[test]
    fn selections_are_what_all_have_in_common() {
        let of = |prefix: &[u8], start: &[u8], end: &[u8]| {
            let given = |bytes: &[u8]| (!bytes.is_empty()).then(|| Bytes::copy_from_slice(bytes));
            let selection = Selection::of(None, given(prefix), given(start), given(end)).expect("it is right");
            (selection.key.to_vec(), selection.range_end.to_vec(), selection.is_empty)
        };
        assert_eq!(of(b"", b"", b""), (vec![0], vec![0], false));
        assert_eq!(of(b"a", b"", b""), (b"a".to_vec(), b"b".to_vec(), false));
        assert_eq!(of(b"a\xff", b"", b""), (b"a\xff".to_vec(), b"b".to_vec(), false));
        assert_eq!(of(b"\xff\xff", b"", b""), (b"\xff\xff".to_vec(), vec![0], false));
        assert_eq!(of(b"a", b"ab", b""), (b"ab".to_vec(), b"b".to_vec(), false));
        assert_eq!(of(b"a", b"", b"ab"), (b"a".to_vec(), b"ab".to_vec(), false));
        assert_eq!(of(b"b", b"a", b"z"), (b"b".to_vec(), b"c".to_vec(), false));
        assert_eq!(of(b"", b"", b"m"), (vec![0], b"m".to_vec(), false));
        assert!(of(b"a", b"c", b"").2 && of(b"", b"b", b"a").2 && of(b"", b"a", b"a").2);
        // An end of one zero byte would mean "everything" to etcd, and here it means "below the least key".
        assert!(of(b"", b"", b"\0").2);
    }

    #[test]
    fn what_is_encoded_is_read_back() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&all), true).expect("it is right"), all);
        assert_eq!(decode_path(&encode(&all)).expect("it is right"), all);
    }
}

//! Values of flags: what Go's `flag` package accepts as a boolean, a number and a duration, and sizes in bytes.

use crate::url::Url;

/// What a flag holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`; the only kind whose value must follow an `=` and may be left out.
    Bool,
    /// A whole number from 0 up to this maximum.
    Number(u64),
    /// A size in bytes: a number with an optional KiB, MiB, GiB or TiB. May be negative, where that means "no limit".
    Bytes,
    /// Go's form: `100ms`, `1m30s`.
    Duration,
    /// Any text.
    Text,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Texts between commas.
    List,
    /// URLs between commas.
    Urls,
    /// `Name=true,Other=false`, of the feature gates that etcd knows.
    Gates,
}

/// A parsed value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Of [`Kind::Bool`].
    Bool(bool),
    /// Of [`Kind::Number`] and [`Kind::Bytes`].
    Number(i128),
    /// Of [`Kind::Duration`], in nanoseconds.
    Duration(i64),
    /// Of [`Kind::Text`], [`Kind::Choice`].
    Text(String),
    /// Of [`Kind::List`].
    List(Vec<String>),
    /// Of [`Kind::Urls`].
    Urls(Vec<Url>),
    /// Of [`Kind::Gates`]: the gates that were named, with what they were set to.
    Gates(Vec<(String, bool)>),
}

/// A feature gate of etcd.
#[derive(Debug, PartialEq, Eq)]
pub struct Gate {
    /// Its name.
    pub name: &'static str,
    /// ALPHA or BETA.
    pub stage: &'static str,
    /// What it is unless it is set.
    pub default: bool,
    /// Why setting it changes nothing here, if so.
    pub no_effect: Option<&'static str>,
}

const fn gate(name: &'static str, stage: &'static str, default: bool, no_effect: Option<&'static str>) -> Gate {
    Gate {
        name,
        stage,
        default,
        no_effect,
    }
}

const COMPARES: Option<&str> = Some("members compare their states all the time");
const CHECKPOINTS: Option<&str> = Some("what leases have left is always replicated");

/// The feature gates of the etcd release that we follow. Any other name is an error, as it is there.
#[rustfmt::skip]
pub const GATES: &[Gate] = &[
    gate("AllAlpha", "ALPHA", false, None),
    gate("AllBeta", "BETA", false, None),
    gate("CompactHashCheck", "ALPHA", false, COMPARES),
    gate("FastLeaseKeepAlive", "BETA", true, Some("a lease is kept alive as soon as a quorum confirms the leader")),
    gate("InitialCorruptCheck", "ALPHA", false, COMPARES),
    gate("LeaseCheckpoint", "ALPHA", false, CHECKPOINTS),
    gate("LeaseCheckpointPersist", "ALPHA", false, CHECKPOINTS),
    gate("PriorityRequest", "ALPHA", false, Some("revoking leases has no queue of its own to overtake")),
    gate("SetMemberLocalAddr", "ALPHA", false, None),
    gate("StopGRPCServiceOnDefrag", "ALPHA", false, Some("defragmentation stops nothing")),
    gate("TxnModeWriteWithSharedBuffer", "BETA", true, Some("reads in transactions see what was written before them without a copy")),
];

impl Kind {
    /// Reads a value of this kind from the text of a flag or an environment variable.
    pub fn parse(self, text: &str) -> Result<Value, String> {
        match self {
            Kind::Bool => parse_bool(text).map(Value::Bool),
            Kind::Number(max) => match parse_integer(text)? {
                n if n < 0 => Err("must not be negative".to_owned()),
                n if n > i128::from(max) => Err(format!("must be at most {max}")),
                n => Ok(Value::Number(n)),
            },
            Kind::Bytes => parse_bytes(text).map(Value::Number),
            Kind::Duration => parse_duration(text).map(Value::Duration),
            Kind::Text => Ok(Value::Text(text.to_owned())),
            Kind::Choice(words) if words.contains(&text) => Ok(Value::Text(text.to_owned())),
            Kind::Choice(words) => Err(format!("invalid value {text:?}: must be one of {}", words.join(", "))),
            Kind::List if text.is_empty() => Ok(Value::List(Vec::new())),
            Kind::List => Ok(Value::List(
                text.split(',').map(|part| part.trim().to_owned()).collect(),
            )),
            Kind::Urls if text.is_empty() => Ok(Value::Urls(Vec::new())),
            Kind::Urls => Url::parse_list(text).map(Value::Urls),
            Kind::Gates => parse_gates(text).map(Value::Gates),
        }
    }

    /// What stands for the value in the help.
    pub fn placeholder(self) -> &'static str {
        match self {
            Kind::Bool => "true|false",
            Kind::Number(_) => "n",
            Kind::Bytes => "bytes",
            Kind::Duration => "duration",
            Kind::Text | Kind::Choice(_) => "text",
            Kind::List => "a,b,...",
            Kind::Urls => "url,url,...",
            Kind::Gates => "Gate=true|false,...",
        }
    }
}

fn parse_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("must be true or false".to_owned()),
    }
}

/// Go reads numbers with a base prefix and with underscores between digits.
fn parse_integer(text: &str) -> Result<i128, String> {
    let error = || "must be a whole number".to_owned();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let (base, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    if !digits.starts_with(|c: char| c.is_digit(base)) {
        return Err(error());
    }
    let number = i128::from(u64::from_str_radix(&digits.replace('_', ""), base).map_err(|_| error())?);
    Ok(if negative { -number } else { number })
}

fn parse_bytes(text: &str) -> Result<i128, String> {
    for (suffix, shift) in [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)] {
        if let Some(number) = text.strip_suffix(suffix) {
            let bytes = parse_integer(number.trim_end())? << shift;
            return if i64::try_from(bytes).is_ok() {
                Ok(bytes)
            } else {
                Err("is too large".to_owned())
            };
        }
    }
    let bytes = parse_integer(text)
        .map_err(|_| "must be a number of bytes, with KiB, MiB, GiB or TiB behind it or nothing".to_owned())?;
    if i64::try_from(bytes).is_ok() {
        Ok(bytes)
    } else {
        Err("is too large".to_owned())
    }
}

/// A duration as Go writes it: a sign, then numbers with a unit each; a bare `0` needs none. In nanoseconds.
pub fn parse_duration(text: &str) -> Result<i64, String> {
    let error = || "must be a duration such as 100ms, 5s or 1m30s".to_owned();
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(error());
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| c != '.' && !c.is_ascii_digit()).ok_or_else(error)?;
        let (number, after) = rest.split_at(number_end);
        let unit_end = after
            .find(|c: char| c == '.' || c.is_ascii_digit())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let unit_ns: i128 = match unit {
            "ns" => 1,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return Err(error()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || whole.len() > 18 || fraction.contains('.') {
            return Err(error());
        }
        let whole: i128 = if whole.is_empty() {
            0
        } else {
            whole.parse().map_err(|_| error())?
        };
        total += whole * unit_ns;
        let mut digit_ns = unit_ns;
        for digit in fraction.bytes().take(18) {
            digit_ns /= 10;
            total += i128::from(digit - b'0') * digit_ns;
        }
        rest = after;
    }
    i64::try_from(total * sign).map_err(|_| "is too long a duration".to_owned())
}

fn parse_gates(text: &str) -> Result<Vec<(String, bool)>, String> {
    let mut gates = Vec::new();
    for part in text.split(',').filter(|part| !part.trim().is_empty()) {
        let (name, value) = part
            .split_once('=')
            .ok_or_else(|| format!("has no value for {}", part.trim()))?;
        let (name, value) = (name.trim(), value.trim());
        if !GATES.iter().any(|gate| gate.name == name) {
            return Err(format!("names a feature gate that does not exist: {name}"));
        }
        gates.push((
            name.to_owned(),
            parse_bool(value).map_err(|error| format!("is wrong for {name}: it {error}"))?,
        ));
    }
    Ok(gates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        for (text, ns) in [
            ("0", 0),
            ("0s", 0),
            ("100ms", 100_000_000),
            ("1m30s", 90_000_000_000),
            ("1.5h", 5_400_000_000_000),
            (".5s", 500_000_000),
            ("2h45m0.25s", 9_900_250_000_000),
            ("-1s", -1_000_000_000),
            ("3us", 3_000),
            ("3\u{b5}s", 3_000),
            ("7ns", 7),
        ] {
            assert_eq!(parse_duration(text), Ok(ns), "{text}");
        }
        for text in [
            "",
            "5",
            "s",
            "1.s.",
            "1d",
            "ms100",
            "9999999h999999999999999999h",
            "1..2s",
            ".s",
            "-",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_those_of_go() {
        for (text, number) in [
            ("10", 10),
            ("0x1F", 31),
            ("0b11", 3),
            ("0o17", 15),
            ("017", 15),
            ("1_000", 1000),
        ] {
            assert_eq!(Kind::Number(u64::MAX).parse(text), Ok(Value::Number(number)), "{text}");
        }
        for text in ["", "x", "-1", "1.5", "0x", "_1", "18446744073709551616"] {
            assert!(Kind::Number(u64::MAX).parse(text).is_err(), "{text}");
        }
        assert_eq!(
            Kind::Number(u64::MAX).parse("18446744073709551615"),
            Ok(Value::Number(i128::from(u64::MAX)))
        );
        assert!(Kind::Number(5).parse("6").is_err());
    }

    #[test]
    fn bytes_take_binary_suffixes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64MiB", 64 << 20),
            ("1 GiB", 1 << 30),
            ("2KiB", 2048),
        ] {
            assert_eq!(Kind::Bytes.parse(text), Ok(Value::Number(bytes)), "{text}");
        }
        for text in ["MiB", "1MB", "1.5GiB", "99999999999TiB", "x"] {
            assert!(Kind::Bytes.parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn booleans_are_those_of_go() {
        assert_eq!(Kind::Bool.parse("T"), Ok(Value::Bool(true)));
        assert_eq!(Kind::Bool.parse("0"), Ok(Value::Bool(false)));
        assert!(Kind::Bool.parse("yes").is_err());
    }

    #[test]
    fn gates_must_exist() {
        let gates = Kind::Gates.parse("LeaseCheckpoint=true, AllBeta=false").unwrap();
        assert_eq!(
            gates,
            Value::Gates(vec![("LeaseCheckpoint".into(), true), ("AllBeta".into(), false)])
        );
        assert!(Kind::Gates.parse("Nope=true").unwrap_err().contains("Nope"));
        assert!(Kind::Gates.parse("AllBeta").is_err());
    }
}

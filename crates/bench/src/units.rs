//! Sizes, counts and times, as people write and read them.

use std::time::Duration;

/// Splits `12.5ms` into the number and what follows.
fn number_and_unit(text: &str) -> Result<(f64, &str), String> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number = text[..end]
        .parse()
        .map_err(|_| format!("{text:?} does not start with a number"))?;
    Ok((number, text[end..].trim()))
}

/// Reads a length of time: `250ms`, `10s`, `1.5m`, `2h`; a bare number is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = number_and_unit(text)?;
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unknown unit {unit:?}: us, ms, s, m or h")),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|error| error.to_string())
}

/// Reads a count: `1000`, `10k`, `1M`.
pub(crate) fn parse_count(text: &str) -> Result<u64, String> {
    let (number, unit) = number_and_unit(text)?;
    let scale = match unit {
        "" => 1.0,
        "k" | "K" => 1e3,
        "m" | "M" => 1e6,
        "G" => 1e9,
        _ => return Err(format!("unknown unit {unit:?}: k, M or G")),
    };
    whole(number * scale)
}

/// Reads a size in bytes: `256`, `1KiB`, `64k`, `1MiB`; all units are powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<usize, String> {
    let (number, unit) = number_and_unit(text)?;
    let scale = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" | "kib" => 1024.0,
        "m" | "mb" | "mib" => 1024.0 * 1024.0,
        "g" | "gb" | "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("unknown unit {unit:?}: KiB, MiB or GiB")),
    };
    whole(number * scale).map(|bytes| bytes as usize)
}

fn whole(number: f64) -> Result<u64, String> {
    if number.fract() == 0.0 && number <= 1e15 {
        Ok(number as u64)
    } else {
        Err(format!("{number} is not a whole number below 1e15"))
    }
}

/// Writes nanoseconds with three significant digits: `1.23 ms`.
pub(crate) fn nanos(nanos: f64) -> String {
    let (value, unit) = match nanos {
        n if n < 1e3 => (n, "ns"),
        n if n < 1e6 => (n / 1e3, "us"),
        n if n < 1e9 => (n / 1e6, "ms"),
        n => (n / 1e9, "s"),
    };
    format!("{} {unit}", three_digits(value))
}

/// Writes a number of bytes: `12.3 MiB`.
pub(crate) fn bytes(bytes: f64) -> String {
    let (value, unit) = match bytes {
        b if b < 1024.0 => (b, "B"),
        b if b < 1024.0 * 1024.0 => (b / 1024.0, "KiB"),
        b if b < 1024.0 * 1024.0 * 1024.0 => (b / (1024.0 * 1024.0), "MiB"),
        b => (b / (1024.0 * 1024.0 * 1024.0), "GiB"),
    };
    format!("{} {unit}", three_digits(value))
}

/// Three significant digits, more only before the point.
pub(crate) fn three_digits(value: f64) -> String {
    match value.abs() {
        v if v < 0.0005 => "0".to_owned(),
        v if v < 9.995 => format!("{value:.2}"),
        v if v < 99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("10"), Ok(Duration::from_secs(10)));
        assert!(parse_duration("10 days").is_err());
        assert!(parse_duration("-1s").is_err());
    }

    #[test]
    fn sizes_and_counts() {
        assert_eq!(parse_bytes("256"), Ok(256));
        assert_eq!(parse_bytes("1.5KiB"), Ok(1536));
        assert_eq!(parse_bytes("1MB"), Ok(1 << 20));
        assert!(parse_bytes("0.3").is_err());
        assert_eq!(parse_count("10k"), Ok(10_000));
        assert_eq!(parse_count("1M"), Ok(1_000_000));
        assert!(parse_count("many").is_err());
    }

    #[test]
    fn written() {
        assert_eq!(nanos(999.0), "999 ns");
        assert_eq!(nanos(1_234_567.0), "1.23 ms");
        assert_eq!(nanos(12_000.0), "12.0 us");
        assert_eq!(bytes(1536.0), "1.50 KiB");
    }
}

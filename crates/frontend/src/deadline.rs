//! How long clients want to wait: the header `grpc-timeout`.
//!
//! gRPC and its gateway have readings of their own, and both are here.

use std::time::Duration;

use http::HeaderMap;
use tokio::time::Instant;
use tonic::Status;

/// Most characters that gRPC lets it have: eight digits and a unit.
const GRPC_CHARACTERS_MAX: usize = 9;

/// The end of a call that ran out of time, in Go's words.
pub(crate) fn exceeded() -> Status {
    Status::deadline_exceeded("context deadline exceeded")
}

/// Completes when the time is over, if there is an end to it.
pub(crate) async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn text(headers: &HeaderMap) -> Option<std::borrow::Cow<'_, str>> {
    let value = headers.get("grpc-timeout")?;
    Some(String::from_utf8_lossy(value.as_bytes()))
}

fn duration(number: u64, unit: &str) -> Option<Duration> {
    Some(match unit {
        "H" => Duration::from_secs(number.saturating_mul(3600)),
        "M" => Duration::from_secs(number.saturating_mul(60)),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// How long the client of a gRPC call wants to wait, if it says so, as grpc-go reads it: nothing is no time at all.
pub(crate) fn of_grpc(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(text) = text(headers) else {
        return Ok(None);
    };
    match read_grpc(&text) {
        Ok(timeout) => Ok(Some(timeout)),
        Err(error) => Err(Status::internal(format!("malformed grpc-timeout: {error}"))),
    }
}

fn read_grpc(text: &str) -> Result<Duration, String> {
    if text.len() < 2 {
        return Err(format!("transport: timeout string is too short: {text:?}"));
    }
    if text.len() > GRPC_CHARACTERS_MAX {
        return Err(format!("transport: timeout string is too long: {text:?}"));
    }
    let unknown = || format!("transport: timeout unit is not recognized: {text:?}");
    let (digits, unit) = text.split_at_checked(text.len() - 1).ok_or_else(unknown)?;
    let one = duration(1, unit).ok_or_else(unknown)?;
    let invalid = || format!("strconv.ParseUint: parsing {digits:?}: invalid syntax");
    // Rust would take a sign as well.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(invalid());
    }
    let number: u32 = digits.parse().map_err(|_| invalid())?;
    Ok(one.saturating_mul(number))
}

/// The same of a call over the JSON gateway, as grpc-gateway reads it.
pub(crate) fn of_gateway(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(text) = text(headers) else {
        return Ok(None);
    };
    let parse = || {
        let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        // Go's integers may have a sign. No time at all stands for no limit, less for one that has passed.
        let number = number.parse::<i64>().ok()?;
        let timeout = duration(u64::try_from(number).unwrap_or(0), unit)?;
        Some((number != 0).then_some(timeout))
    };
    match parse() {
        Some(timeout) => Ok(timeout),
        None => Err(Status::invalid_argument(format!("invalid grpc-timeout: {text}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_read_as_in_grpc_go() {
        for (text, expected) in [
            ("300m", Ok(Duration::from_millis(300))),
            ("0n", Ok(Duration::ZERO)),
            ("7u", Ok(Duration::from_micros(7))),
            ("2S", Ok(Duration::from_secs(2))),
            ("3M", Ok(Duration::from_secs(180))),
            ("99999999H", Ok(Duration::from_secs(99_999_999 * 3600))),
            ("S", Err("transport: timeout string is too short: \"S\"")),
            (
                "123456789S",
                Err("transport: timeout string is too long: \"123456789S\""),
            ),
            ("1x", Err("transport: timeout unit is not recognized: \"1x\"")),
            ("+1S", Err("strconv.ParseUint: parsing \"+1\": invalid syntax")),
            ("1.5S", Err("strconv.ParseUint: parsing \"1.5\": invalid syntax")),
            ("1\u{e9}", Err("transport: timeout unit is not recognized: \"1\u{e9}\"")),
        ] {
            assert_eq!(read_grpc(text), expected.map_err(str::to_owned), "{text}");
        }
        assert_eq!(of_grpc(&HeaderMap::new()).expect("none is fine"), None);
    }
}

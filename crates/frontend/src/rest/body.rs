//! Request bodies, read with a bound on their size and on how long they may take.

use std::time::Duration;

use api::{Error, Limits};
use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, EXPECT};
use hyper::body::Body as _;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::problem::{BODY_TIMEOUT, INVALID_BODY, Problem, UNSUPPORTED_MEDIA_TYPE};

/// How long a client may pause while it sends a body.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// How much of a body that is too large is still read, so that a client that sends it all before it looks for an answer
/// finds the refusal and not a reset connection.
const DRAINED_BYTES_MAX: u64 = 8 << 20;

/// How long that may take.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// How much larger than the request that it stands for a body of JSON may be: base64 takes a third more, and escapes
/// of text more again.
const JSON_FACTOR: usize = 2;

/// What JSON may take beside keys and values, in bytes.
const JSON_OVERHEAD_BYTES: usize = 64 << 10;

/// How many bytes of a body come in a second at least, once [`PAUSE_MAX`] has passed.
const BYTES_PER_SECOND_MIN: u64 = 4 << 10;

/// Takes what a client still sends of a request that is refused, within bounds.
pub(super) async fn forgo(headers: &HeaderMap, mut body: Body) {
    // Who asked whether to send it at all, and has not been told to, hears no instead.
    if body.is_end_stream() || headers.contains_key(EXPECT) {
        return;
    }
    if announced(headers).is_none_or(|announced| announced <= DRAINED_BYTES_MAX) {
        drain(&mut body).await;
    }
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Reads the raw bytes of a value.
pub(super) async fn value(headers: &HeaderMap, body: Body, limits: &Limits) -> Result<Bytes, Problem> {
    if let Err(problem) = check_value(headers) {
        forgo(headers, body).await;
        return Err(problem);
    }
    read(headers, body, limits.request_bytes_max).await
}

fn check_value(headers: &HeaderMap) -> Result<(), Problem> {
    if headers.contains_key(CONTENT_RANGE) {
        return Err(Problem::header("content-range", "a part of a value cannot be written"));
    }
    check_encoding(headers)
}

/// Reads JSON.
pub(super) async fn json<T: DeserializeOwned>(headers: &HeaderMap, body: Body, limits: &Limits) -> Result<T, Problem> {
    if let Err(problem) = check_json(headers) {
        forgo(headers, body).await;
        return Err(problem);
    }
    let bytes_max = limits
        .request_bytes_max
        .saturating_mul(JSON_FACTOR)
        .saturating_add(JSON_OVERHEAD_BYTES);
    let bytes = read(headers, body, bytes_max).await.map_err(|mut problem| {
        if problem.error() == Some(Error::RequestTooLarge) {
            problem.explain(format!(
                "{}: the body is larger than {bytes_max} bytes; what JSON escapes is shorter in base64",
                Error::RequestTooLarge.message()
            ));
        }
        problem
    })?;
    // serde would take a list for a struct, its items for the fields in order.
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Err(Problem::new(INVALID_BODY, "the body is not a JSON object"));
    }
    serde_json::from_slice(&bytes).map_err(|error| Problem::new(INVALID_BODY, error.to_string()))
}

fn check_json(headers: &HeaderMap) -> Result<(), Problem> {
    check_encoding(headers)?;
    let media_type = headers.get(CONTENT_TYPE).map(|value| value.as_bytes());
    let is_json = media_type.is_some_and(|value| {
        let value = value.split(|byte| *byte == b';').next().unwrap_or_default();
        value.trim_ascii().eq_ignore_ascii_case(b"application/json")
    });
    if !is_json {
        // Not taken for granted: a browser would send other types on behalf of any page, without asking first.
        let detail = "the header field Content-Type must say application/json (curl --json does)";
        return Err(Problem::new(UNSUPPORTED_MEDIA_TYPE, detail));
    }
    Ok(())
}

/// Takes the body of a request that needs none, and wants it to be empty.
pub(super) async fn none(headers: &HeaderMap, body: Body) -> Result<(), Problem> {
    if body.is_end_stream() {
        return Ok(());
    }
    match read(headers, body, 0).await {
        Ok(_) => Ok(()),
        Err(problem) if problem.error() == Some(Error::RequestTooLarge) => {
            Err(Problem::new(INVALID_BODY, "this request takes no body"))
        }
        Err(problem) => Err(problem),
    }
}

fn check_encoding(headers: &HeaderMap) -> Result<(), Problem> {
    let mut encodings = headers.get_all(CONTENT_ENCODING).iter();
    match encodings.all(|encoding| encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        true => Ok(()),
        false => {
            let detail = "the header field Content-Encoding is not supported: send the bytes as they are";
            Err(Problem::new(UNSUPPORTED_MEDIA_TYPE, detail))
        }
    }
}

async fn read(headers: &HeaderMap, mut body: Body, bytes_max: usize) -> Result<Bytes, Problem> {
    let announced = announced(headers);
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    if announced.is_none_or(|announced| announced <= bytes_max as u64) {
        let begun = Instant::now();
        loop {
            let length = first.len() + all.len();
            let due = begun + PAUSE_MAX + Duration::from_secs(length as u64 / BYTES_PER_SECOND_MIN);
            let Some(data) = next(&mut body, due).await? else {
                if announced.is_some_and(|announced| announced != length as u64) {
                    return Err(Problem::new(INVALID_BODY, "the body broke off"));
                }
                return Ok(if all.is_empty() { first } else { all.freeze() });
            };
            if length + data.len() > bytes_max {
                break;
            }
            if length == 0 {
                // Most bodies come in one piece, which then is not copied.
                first = data;
            } else {
                if all.is_empty() {
                    all.extend_from_slice(&std::mem::take(&mut first));
                }
                all.extend_from_slice(&data);
            }
        }
        drop((first, all));
        drain(&mut body).await;
    } else {
        forgo(headers, body).await;
    }
    let mut problem = Problem::from(Error::RequestTooLarge);
    problem.explain(format!(
        "{}: the body is larger than {bytes_max} bytes",
        Error::RequestTooLarge.message()
    ));
    Err(problem)
}

/// Whatever comes of it, the answer is the same.
async fn drain(body: &mut Body) {
    let due = Instant::now() + DRAIN_TIMEOUT;
    let mut drained = 0;
    while let Ok(Some(data)) = next(body, due).await {
        drained += data.len() as u64;
        if drained > DRAINED_BYTES_MAX {
            return;
        }
    }
}

/// The next piece with data in it; `None` at the end.
async fn next(body: &mut Body, due: Instant) -> Result<Option<Bytes>, Problem> {
    loop {
        let frame = std::future::poll_fn(|context| std::pin::Pin::new(&mut *body).poll_frame(context));
        let frame = match tokio::time::timeout_at(due.min(Instant::now() + PAUSE_MAX), frame).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(error))) => {
                return Err(Problem::new(INVALID_BODY, format!("the body broke off: {error}")));
            }
            Ok(None) => return Ok(None),
            Err(_) => {
                let detail = format!(
                    "nothing came for {} s, or less than {BYTES_PER_SECOND_MIN} bytes a second",
                    PAUSE_MAX.as_secs()
                );
                return Err(Problem::new(BODY_TIMEOUT, detail));
            }
        };
        // Trailers say nothing that we read.
        match frame.into_data() {
            Ok(data) if !data.is_empty() => return Ok(Some(data)),
            _ => {}
        }
    }
}

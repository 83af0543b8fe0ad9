//! `request stats`: a line in the log for each KV request that took longer than it should (etcd's
//! `--warning-unary-request-duration`), with the fields that etcd gives it. Values are never shown. Other unary calls
//! are noted by the observer, without what they asked for.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use api::kv::{DeleteRangeRequest, PutRequest, RangeRequest, TxnRequest};
use bytes::Bytes;
use prost::Message as _;

/// Bytes of a key that are shown.
const SHOWN_BYTES_MAX: usize = 256;

/// A request under way. Dropped late, it is noted; what costs more than an instant and two counts happens only then.
pub(super) struct Slow {
    limit: Duration,
    begun: Instant,
    response_type: &'static str,
    key: Bytes,
    end: Bytes,
    what: What,
    request_bytes: usize,
}

enum What {
    Range {
        limit: i64,
        revision: i64,
        keys_only: bool,
        count_only: bool,
    },
    Put {
        value_bytes: usize,
        lease: i64,
    },
    DeleteRange,
    Txn {
        compares: usize,
        then: usize,
        otherwise: usize,
    },
}

impl Slow {
    fn start(limit: Duration, response_type: &'static str, key: &Bytes, end: &Bytes, what: What, bytes: usize) -> Self {
        Slow {
            limit,
            begun: Instant::now(),
            response_type,
            key: key.clone(),
            end: end.clone(),
            what,
            request_bytes: bytes,
        }
    }

    pub(super) fn range(limit: Duration, request: &RangeRequest) -> Self {
        let what = What::Range {
            limit: request.limit,
            revision: request.revision,
            keys_only: request.keys_only,
            count_only: request.count_only,
        };
        let bytes = request.encoded_len();
        Slow::start(
            limit,
            "/etcdserverpb.KV/Range",
            &request.key,
            &request.range_end,
            what,
            bytes,
        )
    }

    pub(super) fn put(limit: Duration, request: &PutRequest) -> Self {
        let what = What::Put {
            value_bytes: request.value.len(),
            lease: request.lease,
        };
        let bytes = request.encoded_len();
        Slow::start(limit, "/etcdserverpb.KV/Put", &request.key, &Bytes::new(), what, bytes)
    }

    pub(super) fn delete_range(limit: Duration, request: &DeleteRangeRequest) -> Self {
        let bytes = request.encoded_len();
        let (key, end) = (&request.key, &request.range_end);
        Slow::start(
            limit,
            "/etcdserverpb.KV/DeleteRange",
            key,
            end,
            What::DeleteRange,
            bytes,
        )
    }

    pub(super) fn txn(limit: Duration, request: &TxnRequest) -> Self {
        let key = request
            .compare
            .first()
            .map(|compare| compare.key.clone())
            .unwrap_or_default();
        let what = What::Txn {
            compares: request.compare.len(),
            then: request.success.len(),
            otherwise: request.failure.len(),
        };
        let bytes = request.encoded_len();
        Slow::start(limit, "/etcdserverpb.KV/Txn", &key, &Bytes::new(), what, bytes)
    }

    /// What was asked for, in the form of protobuf's text.
    fn content(&self) -> String {
        let mut text = String::new();
        // Writing into a string cannot fail.
        let _ = match &self.what {
            What::Txn {
                compares,
                then,
                otherwise,
            } => write!(
                text,
                "compare:{compares} first_key:{} success:{then} failure:{otherwise}",
                shown(&self.key)
            ),
            _ => write!(text, "key:{}", shown(&self.key)),
        };
        if !self.end.is_empty() {
            let _ = write!(text, " range_end:{}", shown(&self.end));
        }
        match self.what {
            What::Range {
                limit,
                revision,
                keys_only,
                count_only,
            } => {
                for (name, value) in [("limit", limit), ("revision", revision)] {
                    if value != 0 {
                        let _ = write!(text, " {name}:{value}");
                    }
                }
                for (name, on) in [("keys_only", keys_only), ("count_only", count_only)] {
                    if on {
                        let _ = write!(text, " {name}:true");
                    }
                }
            }
            What::Put { value_bytes, lease } => {
                let _ = write!(text, " value_size:{value_bytes}");
                if lease != 0 {
                    let _ = write!(text, " lease:{lease}");
                }
            }
            What::DeleteRange | What::Txn { .. } => {}
        }
        text
    }
}

/// A key as a quoted text of bounded length.
fn shown(key: &[u8]) -> String {
    let cut = &key[..key.len().min(SHOWN_BYTES_MAX)];
    let dots = if cut.len() < key.len() { "..." } else { "" };
    format!("\"{}{dots}\"", cut.escape_ascii())
}

impl Drop for Slow {
    fn drop(&mut self) {
        let took = self.begun.elapsed();
        if took <= self.limit {
            return;
        }
        tracing::warn!(
            "time spent" = ?took,
            "response type" = self.response_type,
            "request size" = self.request_bytes,
            "request content" = self.content(),
            "request stats"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_was_asked_for_and_no_value() {
        let put = PutRequest {
            key: Bytes::from_static(b"a\n\xff"),
            value: Bytes::from_static(b"secret"),
            lease: 7,
            ..Default::default()
        };
        let slow = Slow::put(Duration::MAX, &put);
        assert_eq!(slow.content(), r#"key:"a\n\xff" value_size:6 lease:7"#);
        let range = RangeRequest {
            key: vec![b'k'; 300].into(),
            range_end: Bytes::from_static(b"l"),
            limit: 3,
            keys_only: true,
            ..Default::default()
        };
        let content = Slow::range(Duration::MAX, &range).content();
        assert!(
            content.ends_with(r#"kkk..." range_end:"l" limit:3 keys_only:true"#),
            "{content}"
        );
        assert!(content.len() < 350, "{content}");
        let txn = Slow::txn(Duration::MAX, &TxnRequest::default());
        assert_eq!(txn.content(), r#"compare:0 first_key:"" success:0 failure:0"#);
    }
}

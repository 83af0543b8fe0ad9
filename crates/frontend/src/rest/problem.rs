//! Refusals, as `application/problem+json` (RFC 9457).

use api::error::ErrorKind;
use api::{Code, Error, Revision};
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, ETAG, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::Serialize;
use utoipa::ToSchema;

use super::headers::etag;
use super::json::{HolderBody, hex};
use crate::observer::CODE_NAMES;

/// The media type of a refusal.
pub(super) const MEDIA_TYPE: &str = "application/problem+json";

/// What every problem's `type` begins with. A name and not an address: it stays the same wherever a server runs.
pub(super) const TYPE_PREFIX: &str = "urn:metastore:problem:";

/// One thing that can be wrong. Its slug never changes once released: clients compare it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ProblemType {
    pub(super) slug: &'static str,
    pub(super) status: u16,
    pub(super) title: &'static str,
    /// etcd's code for it, unless the store's own error says another.
    pub(super) code: Code,
    pub(super) kind: ErrorKind,
    /// What the client should do next.
    pub(super) next: &'static str,
}

macro_rules! problem_types {
    ($($name:ident = $slug:literal, $status:literal, $code:ident, $kind:ident, $title:literal, $next:literal;)*) => {
        $(
            pub(super) const $name: &ProblemType = &ProblemType {
                slug: $slug,
                status: $status,
                title: $title,
                code: Code::$code,
                kind: ErrorKind::$kind,
                next: $next,
            };
        )*

        /// Every type there is, for the document, the page and the tests.
        pub(super) const ALL: &[&ProblemType] = &[$($name,)*];
    };
}

problem_types! {
    INVALID_PARAMETER = "invalid-parameter", 400, InvalidArgument, Fix, "A query parameter has no such value",
        "Correct the parameter that `parameter` names.";
    UNKNOWN_PARAMETER = "unknown-parameter", 400, InvalidArgument, Fix, "There is no such query parameter here",
        "Remove the parameter that `parameter` names, or correct its spelling.";
    INVALID_PATH = "invalid-path", 400, InvalidArgument, Fix, "The path cannot be read",
        "Percent-encode the key, name or id as RFC 3986 says; a key is not empty.";
    INVALID_HEADER = "invalid-header", 400, InvalidArgument, Fix, "A header field cannot be read",
        "Correct the header field that `header` names.";
    INVALID_BODY = "invalid-body", 400, InvalidArgument, Fix, "The body cannot be read",
        "Correct the body as `detail` says; /api/v1/openapi.json has its schema.";
    INVALID_REQUEST = "invalid-request", 400, InvalidArgument, Fix, "The request contradicts itself",
        "Change the request as `detail` says.";
    FUTURE_REVISION = "future-revision", 400, OutOfRange, Fix, "The revision has not happened yet",
        "Ask for a revision up to the store's current one, or for none.";
    UNAUTHENTICATED = "unauthenticated", 401, Unauthenticated, Fix, "It is not known who asks",
        "Send user and password (Basic), or a valid token (Bearer) from POST /api/v1/auth/token.";
    PERMISSION_DENIED = "permission-denied", 403, PermissionDenied, Fix, "The user may not do this",
        "Have an administrator grant the user a role that allows it.";
    FOREIGN_ORIGIN = "foreign-origin", 403, PermissionDenied, Fix, "Pages of that origin may not do this",
        "Have an operator add the origin to --cors, and send POST by a script that sets Content-Type: application/json.";
    NO_SUCH_PATH = "no-such-path", 404, NotFound, Fix, "There is nothing at this path",
        "Look the path up in /api/v1/docs.";
    KEY_NOT_FOUND = "key-not-found", 404, NotFound, Fix, "There is no such key",
        "Write the key first, or take its absence for the answer.";
    LEASE_NOT_FOUND = "lease-not-found", 404, NotFound, Fix, "There is no such lease",
        "Its time is over or it was revoked: create a new lease and write its keys again.";
    LOCK_NOT_HELD = "lock-not-held", 404, NotFound, Fix, "The lease does not hold or wait for this lock",
        "Nothing is left to release. If you relied on the lock, its lease had ended before.";
    NOT_FOUND = "not-found", 404, NotFound, Fix, "There is no such thing", "Correct what the request names.";
    METHOD_NOT_ALLOWED = "method-not-allowed", 405, Unimplemented, Fix, "This path does not take this method",
        "Use a method that the header field Allow names.";
    NOT_ACCEPTABLE = "not-acceptable", 406, InvalidArgument, Fix, "No representation fits the header field Accept",
        "Accept one of the media types that `detail` names, or leave Accept out.";
    BODY_TIMEOUT = "body-timeout", 408, DeadlineExceeded, Retry, "The body did not arrive in time",
        "Send the request again, the body without long pauses.";
    CONFLICT = "conflict", 409, FailedPrecondition, Fix, "The state of the store does not allow it",
        "Look at the state that `detail` speaks of, then decide anew.";
    LOCK_HELD = "lock-held", 409, FailedPrecondition, Retry, "Somebody else holds the lock",
        "Try again, with `wait` to stand in line; `holder` says who holds it.";
    PLACE_GIVEN_UP = "place-given-up", 409, FailedPrecondition, Retry, "The place in line was given up",
        "A release, or another call with the same lease, gave it up: try again if you still want the lock.";
    REVISION_COMPACTED = "revision-compacted", 410, OutOfRange, Fix, "The history at this revision is gone",
        "Read the present state, then go on from its revision. Nothing before `compact_revision` can be read.";
    PRECONDITION_FAILED = "precondition-failed", 412, FailedPrecondition, Fix, "The key is not as the condition says",
        "Read the key, decide anew, and write with its new ETag in If-Match. `mod_revision` is 0 if the key is gone.";
    TOO_LARGE = "too-large", 413, InvalidArgument, Fix, "The request is too large",
        "Send less at once; the server's --max-request-bytes is the limit.";
    UNSUPPORTED_MEDIA_TYPE = "unsupported-media-type", 415, InvalidArgument, Fix, "The body's form is not understood",
        "Send application/json where JSON is expected, and no Content-Encoding.";
    MISDIRECTED = "misdirected", 421, InvalidArgument, Fix, "This server does not go by that name",
        "Use a name of --host-whitelist, or TLS.";
    TOO_MANY_REQUESTS = "too-many-requests", 429, Unknown, Retry, "The server has too much to do",
        "Wait for the time in Retry-After, twice as long each time, and send the request again.";
    INTERNAL = "internal", 500, Internal, GiveUp, "The server failed",
        "Look into the server's log.";
    CORRUPT = "corrupt", 500, DataLoss, GiveUp, "The data of this cluster is damaged",
        "An operator must compare the members and end the alarm.";
    NOT_SUPPORTED = "not-supported", 501, Unimplemented, GiveUp, "This cluster does not offer it",
        "Do without, or upgrade all members.";
    UNAVAILABLE = "unavailable", 503, Unavailable, Retry, "The cluster cannot answer now",
        "Send the request again after the time in Retry-After, here or to another member. A write may have been carried out: read, or use If-Match.";
    NOT_A_VOTER = "not-a-voter", 503, FailedPrecondition, Retry, "This member does not serve such requests",
        "Ask a member that votes; of this one read with serializable=true.";
    TIMEOUT = "timeout", 504, Unavailable, Retry, "The cluster did not answer in time",
        "A write may have been carried out or may yet be: read before you send it again, or use If-Match.";
    NO_SPACE = "no-space", 507, ResourceExhausted, Retry, "The store is full",
        "An operator must free space: compact, delete, or raise the limit. Reads and deletions still work.";
}

impl ProblemType {
    /// The problem that an error of the store is.
    pub(super) fn of(error: Error) -> &'static ProblemType {
        match error {
            Error::Compacted => REVISION_COMPACTED,
            Error::FutureRevision => FUTURE_REVISION,
            Error::RequestTooLarge => TOO_LARGE,
            Error::NoSpace => NO_SPACE,
            Error::TooManyRequests => TOO_MANY_REQUESTS,
            Error::KeyNotFound => KEY_NOT_FOUND,
            Error::LeaseNotFound => LEASE_NOT_FOUND,
            Error::UserEmpty | Error::AuthFailed | Error::NoPasswordUser | Error::PasswordTooLong => UNAUTHENTICATED,
            // Users or roles changed while the request was on its way.
            Error::AuthOldRevision => UNAVAILABLE,
            Error::VerifyOnly => NOT_SUPPORTED,
            Error::NotCapable => NOT_SUPPORTED,
            Error::NotSupportedForLearner => NOT_A_VOTER,
            Error::NotLeader => UNAVAILABLE,
            Error::Timeout
            | Error::TimeoutLeaderFail
            | Error::TimeoutConnectionLost
            | Error::TimeoutWaitAppliedIndex
            | Error::TimeoutLeaderTransfer => TIMEOUT,
            _ => match error.code() {
                Code::InvalidArgument | Code::OutOfRange => INVALID_REQUEST,
                Code::NotFound => NOT_FOUND,
                Code::PermissionDenied => PERMISSION_DENIED,
                Code::Unauthenticated => UNAUTHENTICATED,
                Code::ResourceExhausted => TOO_MANY_REQUESTS,
                Code::FailedPrecondition => CONFLICT,
                Code::Unimplemented => NOT_SUPPORTED,
                Code::DeadlineExceeded => TIMEOUT,
                Code::Unavailable | Code::Canceled => UNAVAILABLE,
                Code::DataLoss => CORRUPT,
                Code::Internal => INTERNAL,
                Code::Unknown if error.kind() == ErrorKind::Fix => CONFLICT,
                Code::Unknown => UNAVAILABLE,
            },
        }
    }

    pub(super) fn uri(&self) -> String {
        format!("{TYPE_PREFIX}{}", self.slug)
    }
}

/// A refusal on its way to the client.
#[derive(Debug)]
pub(super) struct Problem(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: &'static ProblemType,
    detail: String,
    error: Option<Error>,
    more: More,
    headers: HeaderMap,
}

/// What some problems say beside the members that all have.
#[derive(Debug, Default, Clone, Serialize, ToSchema)]
struct More {
    /// The query parameter that is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    parameter: Option<String>,
    /// The header field that is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    header: Option<&'static str>,
    /// The revision below which nothing can be read any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    compact_revision: Option<Revision>,
    /// The revision that the key was last written at; 0 if there is no such key.
    #[serde(skip_serializing_if = "Option::is_none")]
    mod_revision: Option<Revision>,
    /// Who holds the lock.
    #[serde(skip_serializing_if = "Option::is_none")]
    holder: Option<HolderBody>,
    /// The member that answered, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    member_id: Option<String>,
}

/// Why a request was not carried out (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct ProblemBody {
    /// What is wrong, as a name that never changes: compare this.
    #[schema(example = "urn:metastore:problem:revision-compacted")]
    r#type: String,
    /// What is wrong, for people.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// What is wrong with this very request. Where the store refused it: etcd's own text.
    detail: String,
    /// etcd's (gRPC's) code.
    #[schema(minimum = 1, maximum = 16)]
    code: i32,
    /// The code's name.
    code_name: &'static str,
    /// Whether the same request can succeed later (`retry`), must be changed first (`fix`), or neither (`give up`).
    action: &'static str,
    /// What to do next.
    next: &'static str,
    #[serde(flatten)]
    #[schema(inline)]
    more: More,
}

impl Problem {
    pub(super) fn new(kind: &'static ProblemType, detail: impl Into<String>) -> Self {
        Problem(Box::new(Inner {
            kind,
            detail: detail.into(),
            error: None,
            more: More::default(),
            headers: HeaderMap::new(),
        }))
    }

    pub(super) fn parameter(kind: &'static ProblemType, name: &str, detail: impl Into<String>) -> Self {
        let mut problem = Problem::new(kind, detail);
        // What a client sent is repeated to it, but not without end.
        problem.0.more.parameter = Some(name.chars().take(100).collect());
        problem
    }

    pub(super) fn header(name: &'static str, detail: impl Into<String>) -> Self {
        let mut problem = Problem::new(INVALID_HEADER, detail);
        problem.0.more.header = Some(name);
        problem
    }

    /// History is gone; up to where, if that is known.
    pub(super) fn compacted(compact_revision: Option<Revision>) -> Self {
        let mut problem = Problem::from(Error::Compacted);
        problem.0.more.compact_revision = compact_revision;
        problem
    }

    /// A condition did not hold for a key that was last written at `mod_revision`, 0 if it does not exist.
    pub(super) fn precondition_failed(mod_revision: Revision) -> Self {
        let detail = match mod_revision {
            0 => "the key does not exist".to_owned(),
            revision => format!("the key was last written at revision {revision}"),
        };
        let mut problem = Problem::new(PRECONDITION_FAILED, detail);
        problem.0.more.mod_revision = Some(mod_revision);
        if mod_revision > 0 {
            problem.0.headers.insert(ETAG, etag(mod_revision));
        }
        problem
    }

    pub(super) fn lock_held(holder: Option<HolderBody>) -> Self {
        let mut problem = Problem::new(LOCK_HELD, "the lock was not free within the time to wait");
        problem.0.more.holder = holder;
        problem
    }

    pub(super) fn method_not_allowed(allow: &str) -> Self {
        let mut problem = Problem::new(METHOD_NOT_ALLOWED, format!("the methods of this path are {allow}"));
        problem.set(ALLOW, allow);
        problem
    }

    pub(super) fn of_member(mut self, member_id: u64) -> Self {
        self.0.more.member_id = Some(hex(member_id));
        self
    }

    /// Says more of what is wrong than the store's own text does.
    pub(super) fn explain(&mut self, detail: String) {
        self.0.detail = detail;
    }

    pub(super) fn error(&self) -> Option<Error> {
        self.0.error
    }

    fn set(&mut self, name: HeaderName, value: &str) {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.0.headers.insert(name, value);
        }
    }

    /// The document itself, as sent in the body of a refusal, or at the end of an event stream.
    pub(super) fn body(&self) -> Vec<u8> {
        let Inner {
            kind,
            detail,
            error,
            more,
            ..
        } = &*self.0;
        let code = error.map_or(kind.code, Error::code);
        let action = match error.map_or(kind.kind, Error::kind) {
            ErrorKind::Retry => "retry",
            ErrorKind::Fix => "fix",
            ErrorKind::GiveUp => "give up",
        };
        let body = ProblemBody {
            r#type: kind.uri(),
            title: kind.title,
            status: kind.status,
            detail: detail.clone(),
            code: code as i32,
            code_name: CODE_NAMES.get(code as usize).copied().unwrap_or("Unknown"),
            action,
            next: kind.next,
            more: more.clone(),
        };
        serde_json::to_vec(&body).unwrap_or_else(|_| b"{}".to_vec())
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let mut problem = Problem::new(ProblemType::of(error), error.message());
        problem.0.error = Some(error);
        problem
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = self.body();
        let Inner { kind, headers, .. } = *self.0;
        let status = StatusCode::from_u16(kind.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let fields = response.headers_mut();
        *fields = headers;
        fields.insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if matches!(kind.status, 429 | 503) {
            fields.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if kind.status == 401 {
            // Two challenges; most clients want each in a line of its own.
            let basic = HeaderValue::from_static(r#"Basic realm="metastore", charset="UTF-8""#);
            fields.append(WWW_AUTHENTICATE, basic);
            fields.append(
                WWW_AUTHENTICATE,
                HeaderValue::from_static(r#"Bearer realm="metastore""#),
            );
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slugs_are_unique_and_statuses_are_errors() {
        let mut seen = std::collections::HashSet::new();
        for kind in ALL {
            assert!(seen.insert(kind.slug), "{} comes twice", kind.slug);
            assert!((400..600).contains(&kind.status), "{}", kind.slug);
        }
    }

    /// Clients compare these: what is here stays as it is, and new ones are added.
    #[test]
    fn types_are_the_released_ones() {
        let types: Vec<_> = ALL
            .iter()
            .map(|kind| format!("{} {} {}", kind.slug, kind.status, kind.code as i32))
            .collect();
        let released = [
            "invalid-parameter 400 3",
            "unknown-parameter 400 3",
            "invalid-path 400 3",
            "invalid-header 400 3",
            "invalid-body 400 3",
            "invalid-request 400 3",
            "future-revision 400 11",
            "unauthenticated 401 16",
            "permission-denied 403 7",
            "foreign-origin 403 7",
            "no-such-path 404 5",
            "key-not-found 404 5",
            "lease-not-found 404 5",
            "lock-not-held 404 5",
            "not-found 404 5",
            "method-not-allowed 405 12",
            "not-acceptable 406 3",
            "body-timeout 408 4",
            "conflict 409 9",
            "lock-held 409 9",
            "place-given-up 409 9",
            "revision-compacted 410 11",
            "precondition-failed 412 9",
            "too-large 413 3",
            "unsupported-media-type 415 3",
            "misdirected 421 3",
            "too-many-requests 429 2",
            "internal 500 13",
            "corrupt 500 15",
            "not-supported 501 12",
            "unavailable 503 14",
            "not-a-voter 503 9",
            "timeout 504 14",
            "no-space 507 8",
        ];
        assert_eq!(types, released);
    }

    /// A status tells a client whose fault it was, and the store's own word on that must agree.
    #[test]
    fn statuses_agree_with_what_to_do() {
        for &error in Error::ALL {
            let kind = ProblemType::of(error);
            match error.kind() {
                ErrorKind::Fix => assert!(kind.status < 500, "{error:?} is {}", kind.status),
                ErrorKind::GiveUp => assert!(kind.status >= 500, "{error:?} is {}", kind.status),
                ErrorKind::Retry => assert!(
                    kind.status >= 500 || matches!(kind.status, 409 | 429),
                    "{error:?} is {}",
                    kind.status
                ),
            }
        }
    }
}

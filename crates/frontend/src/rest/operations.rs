//! What there is: every operation once, with what it takes and what it answers.
//!
//! Requests are routed and checked by this table, and the OpenAPI document is made of it.

use http::Method;

use super::parameters::{Kind, Parameter};
use super::problem::*;
use super::txn::Sort;
use super::watch;

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resource {
    Keys,
    Key,
    Watch,
    Txn,
    Leases,
    Lease,
    LeaseKeepAlive,
    Lock,
    Members,
    Status,
    Token,
    Document,
    Page,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    GetKey,
    PutKey,
    DeleteKey,
    ListKeys,
    DeleteKeys,
    Watch,
    Txn,
    GrantLease,
    ListLeases,
    GetLease,
    KeepLeaseAlive,
    RevokeLease,
    AcquireLock,
    GetLock,
    ReleaseLock,
    Members,
    Status,
    Token,
    Document,
    Page,
}

/// A body that a request carries.
#[derive(Debug, Clone, Copy)]
pub(super) enum RequestBody {
    None,
    /// A value's raw bytes.
    Raw,
    /// JSON of this schema.
    Json(&'static str),
}

/// An answer other than a problem.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) about: &'static str,
    pub(super) content: &'static [Content],
    /// Header fields that it carries, see [`FIELDS`].
    pub(super) fields: &'static [&'static str],
}

/// A form of an answer's body.
#[derive(Debug, Clone, Copy)]
pub(super) enum Content {
    /// JSON of this schema.
    Json(&'static str),
    /// Anything else of this media type.
    Other(&'static str),
}

/// What members without a vote do, by etcd's rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Learner {
    /// They refuse.
    Refuses,
    /// They answer from their own state, if the request is content with that.
    Serializable,
    /// They answer.
    Answers,
}

/// A header field of requests.
#[derive(Debug)]
pub(super) struct RequestField {
    pub(super) name: &'static str,
    pub(super) about: &'static str,
    pub(super) pattern: &'static str,
}

/// One operation.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) action: Action,
    pub(super) id: &'static str,
    pub(super) method: Method,
    pub(super) resource: Resource,
    pub(super) tag: &'static str,
    pub(super) summary: &'static str,
    pub(super) about: &'static str,
    pub(super) parameters: &'static [Parameter],
    pub(super) fields: &'static [&'static RequestField],
    pub(super) body: RequestBody,
    pub(super) answers: &'static [Answer],
    /// What can be wrong beside [`COMMON_PROBLEMS`] and, of requests with a body, [`BODY_PROBLEMS`].
    pub(super) problems: &'static [&'static ProblemType],
    pub(super) learner: Learner,
    /// Needs no user, whether auth is on or not.
    pub(super) open: bool,
}

impl Resource {
    pub(super) const ALL: &[Resource] = &[
        Resource::Keys,
        Resource::Key,
        Resource::Watch,
        Resource::Txn,
        Resource::Leases,
        Resource::Lease,
        Resource::LeaseKeepAlive,
        Resource::Lock,
        Resource::Members,
        Resource::Status,
        Resource::Token,
        Resource::Document,
        Resource::Page,
    ];

    /// Its path below [`super::BASE`], as OpenAPI writes it.
    pub(super) fn template(self) -> &'static str {
        match self {
            Resource::Keys => "/kv",
            Resource::Key => "/kv/{key}",
            Resource::Watch => "/watch",
            Resource::Txn => "/txn",
            Resource::Leases => "/leases",
            Resource::Lease => "/leases/{id}",
            Resource::LeaseKeepAlive => "/leases/{id}/keep-alive",
            Resource::Lock => "/locks/{name}",
            Resource::Members => "/members",
            Resource::Status => "/status",
            Resource::Token => "/auth/token",
            Resource::Document => "/openapi.json",
            Resource::Page => "/docs",
        }
    }

    /// What a path below [`super::BASE`] names, with the part that stands for the template's variable, still encoded.
    pub(super) fn of(path: &str) -> Option<(Resource, &str)> {
        if let Some(key) = path.strip_prefix("/kv/") {
            return Some((Resource::Key, key));
        }
        if let Some(name) = path.strip_prefix("/locks/") {
            return Some((Resource::Lock, name));
        }
        if let Some(id) = path.strip_prefix("/leases/") {
            return match id.strip_suffix("/keep-alive") {
                Some(id) if !id.contains('/') => Some((Resource::LeaseKeepAlive, id)),
                None if !id.contains('/') => Some((Resource::Lease, id)),
                _ => None,
            };
        }
        let plain = Resource::ALL.iter().find(|resource| resource.template() == path)?;
        Some((*plain, ""))
    }

    /// The variable of its path, and what it says of it.
    pub(super) fn variable(self) -> Option<(&'static str, &'static str)> {
        match self {
            Resource::Key => Some((
                "key",
                "The key: any bytes, percent-encoded. Slashes may stand as they are, and clients that normalise paths \
                 make `%2F` necessary around `.` and `..`.",
            )),
            Resource::Lease | Resource::LeaseKeepAlive => Some((
                "id",
                "The lease's id, 1 to 16 hexadecimal digits, as etcdctl writes it.",
            )),
            Resource::Lock => Some((
                "name",
                "The lock's name: any bytes, percent-encoded; slashes may stand as they are.",
            )),
            _ => None,
        }
    }
}

const fn parameter(name: &'static str, kind: Kind, about: &'static str) -> Parameter {
    Parameter {
        name,
        kind,
        about,
        required: false,
    }
}

const KEY: Parameter = parameter("key", Kind::Bytes, "One key. Excludes `prefix`, `start` and `end`.");
const PREFIX: Parameter = parameter("prefix", Kind::Bytes, "Only keys that begin with this.");
const START: Parameter = parameter("start", Kind::Bytes, "Only keys from this one on.");
const END: Parameter = parameter("end", Kind::Bytes, "Only keys before this one.");
const REVISION: Parameter = parameter(
    "revision",
    Kind::Integer { min: 0, max: i64::MAX },
    "The revision to read at; 0, as when left out, for the newest.",
);
const SERIALIZABLE: Parameter = parameter(
    "serializable",
    Kind::Flag,
    "Answer from this member's own state at once, which may be old. Works without a quorum.",
);
const LEASE: Parameter = parameter(
    "lease",
    Kind::Lease,
    "The id of the lease to attach the key to, in hexadecimal as etcdctl writes it.",
);
const PREV: Parameter = parameter("prev", Kind::Flag, "Say what was there before.");
const ENCODING: Parameter = parameter(
    "encoding",
    Kind::Choice(&["auto", "base64"]),
    "How keys and values stand in JSON: `auto` as text (`key`, `value`) where they are UTF-8, else in base64 \
     (`key_base64`, `value_base64`); `base64` always so.",
);

pub(super) const IF_MATCH: &RequestField = &RequestField {
    name: "If-Match",
    about: "Only if the key is at the version with this ETag; `*`: only if it exists.",
    pattern: ETAG_PATTERN,
};
pub(super) const IF_NONE_MATCH: &RequestField = &RequestField {
    name: "If-None-Match",
    about: "Only if the key is not at a version with this ETag; `*`: only if it does not exist.",
    pattern: ETAG_PATTERN,
};
pub(super) const LAST_EVENT_ID: &RequestField = &RequestField {
    name: "Last-Event-ID",
    about: "The id of the last event that was received; what comes after it is sent. Counts before `from_revision` and \
            `after_revision`; an empty one does not.",
    pattern: "^(0|[1-9][0-9]{0,18})?$",
};
const ETAG_PATTERN: &str = r#"^(\*|(W/)?"[!#-~]{1,30}")$"#;

/// What header fields of answers mean.
pub(super) const FIELDS: &[(&str, &str)] = &[
    ("ETag", "The version of the key: the revision that wrote it, in quotes."),
    ("Metastore-Create-Revision", "The revision that created the key."),
    ("Metastore-Mod-Revision", "The revision that last wrote the key."),
    (
        "Metastore-Version",
        "How often the key was written since it was created.",
    ),
    (
        "Metastore-Lease",
        "The lease that the key is attached to, in hexadecimal; not there if there is none.",
    ),
    ("Metastore-Revision", "The store's revision when it answered."),
    ("Retry-After", "After how many seconds to send the request again."),
    ("WWW-Authenticate", "How to say who asks: Basic or Bearer."),
    (
        "Link",
        "The following page (rel=next), where it is known before the list is sent.",
    ),
    ("Location", "Where the lease is."),
];

const VERSION_FIELDS: &[&str] = &[
    "ETag",
    "Metastore-Create-Revision",
    "Metastore-Mod-Revision",
    "Metastore-Version",
    "Metastore-Lease",
    "Metastore-Revision",
];

/// What can be wrong with every request.
pub(super) const COMMON_PROBLEMS: &[&ProblemType] = &[
    INVALID_PARAMETER,
    UNKNOWN_PARAMETER,
    INVALID_HEADER,
    UNAUTHENTICATED,
    PERMISSION_DENIED,
    FOREIGN_ORIGIN,
    MISDIRECTED,
    TOO_MANY_REQUESTS,
    INTERNAL,
    CORRUPT,
    UNAVAILABLE,
    NOT_A_VOTER,
    TIMEOUT,
];

/// What can be wrong with a request's body, or with there being one.
pub(super) const BODY_PROBLEMS: &[&ProblemType] = &[INVALID_BODY, BODY_TIMEOUT, TOO_LARGE, UNSUPPORTED_MEDIA_TYPE];

macro_rules! answers {
    ($($status:literal $about:literal $([$($content:expr),*])? $({$fields:expr})?;)*) => {
        &[$(Answer {
            status: $status,
            about: $about,
            content: &[$($($content),*)?],
            fields: { const NONE: &[&str] = &[]; let fields = NONE; $(let fields = { let _ = fields; $fields };)? fields },
        }),*]
    };
}

use Content::{Json, Other};

/// All operations.
pub(super) static OPERATIONS: &[Operation] = &[
    Operation {
        action: Action::GetKey,
        id: "getKey",
        method: Method::GET,
        resource: Resource::Key,
        tag: "keys",
        summary: "Read a key",
        about: "Returns the value's bytes as they are: as text/plain if they are UTF-8 text, else as \
                application/octet-stream; with `Accept: application/json` the whole key as JSON. `If-None-Match` with \
                the ETag of a copy answers 304 while that is current.",
        parameters: &[REVISION, SERIALIZABLE, ENCODING],
        fields: &[IF_MATCH, IF_NONE_MATCH],
        body: RequestBody::None,
        answers: answers! {
            200 "The value." [Other("text/plain"), Other("application/octet-stream"), Json("KeyValue")] {VERSION_FIELDS};
            304 "The client's copy is current." {VERSION_FIELDS};
        },
        problems: &[
            INVALID_PATH,
            FUTURE_REVISION,
            KEY_NOT_FOUND,
            NOT_ACCEPTABLE,
            REVISION_COMPACTED,
            PRECONDITION_FAILED,
        ],
        learner: Learner::Serializable,
        open: false,
    },
    Operation {
        action: Action::PutKey,
        id: "putKey",
        method: Method::PUT,
        resource: Resource::Key,
        tag: "keys",
        summary: "Write a key",
        about: "The body is the value, byte for byte; its Content-Type is not kept. `If-Match` with an ETag makes it a \
                compare-and-swap, `If-None-Match: *` creates the key or fails.",
        parameters: &[
            LEASE,
            parameter(
                "keep_lease",
                Kind::Flag,
                "Keep the lease that the key is attached to; the key must exist. \
                Otherwise a write without `lease` detaches it.",
            ),
            PREV,
            ENCODING,
        ],
        fields: &[IF_MATCH, IF_NONE_MATCH],
        body: RequestBody::Raw,
        answers: answers! {
            200 "The key was written." [Json("Written")] {&["ETag"]};
            201 "The key was created (with `If-None-Match: *`)." [Json("Written")] {&["ETag"]};
        },
        problems: &[
            INVALID_PATH,
            INVALID_REQUEST,
            KEY_NOT_FOUND,
            LEASE_NOT_FOUND,
            PRECONDITION_FAILED,
            NO_SPACE,
        ],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::DeleteKey,
        id: "deleteKey",
        method: Method::DELETE,
        resource: Resource::Key,
        tag: "keys",
        summary: "Delete a key",
        about: "`If-Match` with an ETag deletes only that version.",
        parameters: &[PREV, ENCODING],
        fields: &[IF_MATCH, IF_NONE_MATCH],
        body: RequestBody::None,
        answers: answers! { 200 "The key was deleted." [Json("Deleted")]; },
        problems: &[INVALID_PATH, KEY_NOT_FOUND, PRECONDITION_FAILED],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::ListKeys,
        id: "listKeys",
        method: Method::GET,
        resource: Resource::Keys,
        tag: "keys",
        summary: "List keys",
        about: "Keys that all of `prefix`, `start` and `end` let through, in key order, read at one revision; all keys \
                if none is given. A list may be of any length: it is sent as it is read. With `limit`, `next` leads to \
                the following page at the same revision, until that is compacted.",
        parameters: &[
            KEY,
            PREFIX,
            START,
            END,
            parameter("limit", Kind::Integer { min: 1, max: i64::MAX }, "Most keys to return."),
            REVISION,
            SERIALIZABLE,
            parameter("keys_only", Kind::Flag, "Leave the values out."),
            parameter(
                "count_only",
                Kind::Flag,
                "Return how many keys there are, and none of them.",
            ),
            parameter(
                "sort",
                Kind::Choice(Sort::NAMES),
                "What to sort by, `-` in front for the highest first. Other \
                orders than `key` are made in memory, and only `key` and `-key` have a `next`.",
            ),
            ENCODING,
        ],
        fields: &[],
        body: RequestBody::None,
        answers: answers! {
            200 "The keys, or with `count_only` how many there are." [Json("ListOrCount")] {&["Link"]};
        },
        problems: &[FUTURE_REVISION, REVISION_COMPACTED],
        learner: Learner::Serializable,
        open: false,
    },
    Operation {
        action: Action::DeleteKeys,
        id: "deleteKeys",
        method: Method::DELETE,
        resource: Resource::Keys,
        tag: "keys",
        summary: "Delete many keys",
        about: "Deletes the keys that all of `prefix`, `start` and `end` let through, at one revision, and says how \
                many there were. To delete all keys, say so with `all=true`.",
        parameters: &[
            KEY,
            PREFIX,
            START,
            END,
            parameter("all", Kind::Flag, "Delete all keys, if nothing chooses fewer."),
            PREV,
            ENCODING,
        ],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "The keys are gone." [Json("Deleted")]; },
        problems: &[],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::Watch,
        id: "watch",
        method: Method::GET,
        resource: Resource::Watch,
        tag: "watch",
        summary: "Watch for changes",
        about: "Sends server-sent events: each is everything that changed at one revision, of the keys that `key`, or \
                `prefix`, `start` and `end`, choose, and its id is that revision. A client that comes back with \
                `Last-Event-ID` misses nothing and sees nothing twice. An event `progress` says up to where everything \
                was told; an event `error`, whose data is a problem, ends the stream. With `wait` the answer is not a \
                stream but the next changes as JSON, or none once the time is up: a long poll.",
        parameters: &[
            KEY,
            PREFIX,
            START,
            END,
            parameter(
                "from_revision",
                Kind::Integer { min: 1, max: i64::MAX },
                "The first revision that is wanted; \
                what comes next if left out.",
            ),
            parameter(
                "after_revision",
                Kind::Integer {
                    min: 0,
                    max: i64::MAX - 1,
                },
                "The last revision that is known; \
                what comes after it is sent.",
            ),
            parameter(
                "wait",
                Kind::Time {
                    min_ms: 0,
                    max_ms: 300_000,
                },
                "Answer once something changed, or after this \
                time, instead of streaming. Looking through much history that has nothing for it may take 20 s more.",
            ),
            PREV,
            parameter(
                "only",
                Kind::Choice(&["put", "delete"]),
                "Leave the other kind of change out.",
            ),
            parameter(
                "heartbeat",
                Kind::Time {
                    min_ms: 100,
                    max_ms: 300_000,
                },
                "How often a stream without changes \
                says that it lives; 15s if left out.",
            ),
            ENCODING,
        ],
        fields: &[LAST_EVENT_ID],
        body: RequestBody::None,
        answers: answers! {
            200 "The changes." [Other(watch::EVENT_STREAM), Json("Changes")];
        },
        problems: &[NOT_ACCEPTABLE, REVISION_COMPACTED],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::Txn,
        id: "txn",
        method: Method::POST,
        resource: Resource::Txn,
        tag: "keys",
        summary: "Compare and write atomically",
        about: "If all compares hold then `then`, else `else`, as one step at one revision.",
        parameters: &[ENCODING],
        fields: &[],
        body: RequestBody::Json("Txn"),
        answers: answers! { 200 "What came of it." [Json("TxnResult")]; },
        problems: &[
            INVALID_REQUEST,
            FUTURE_REVISION,
            KEY_NOT_FOUND,
            LEASE_NOT_FOUND,
            REVISION_COMPACTED,
            NO_SPACE,
        ],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::GrantLease,
        id: "grantLease",
        method: Method::POST,
        resource: Resource::Leases,
        tag: "leases",
        summary: "Create a lease",
        about: "Keys that are attached to it are deleted when it ends.",
        parameters: &[],
        fields: &[],
        body: RequestBody::Json("LeaseGrant"),
        answers: answers! { 201 "The lease." [Json("Lease")] {&["Location"]}; },
        problems: &[INVALID_REQUEST, CONFLICT, NO_SPACE],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::ListLeases,
        id: "listLeases",
        method: Method::GET,
        resource: Resource::Leases,
        tag: "leases",
        summary: "List the leases",
        about: "As this member knows them.",
        parameters: &[],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "Their ids." [Json("Leases")]; },
        problems: &[],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::GetLease,
        id: "getLease",
        method: Method::GET,
        resource: Resource::Lease,
        tag: "leases",
        summary: "How long a lease has left",
        about: "",
        parameters: &[
            parameter("keys", Kind::Flag, "Name the keys that are attached to it."),
            ENCODING,
        ],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "The lease." [Json("Lease")]; },
        problems: &[INVALID_PATH, LEASE_NOT_FOUND],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::RevokeLease,
        id: "revokeLease",
        method: Method::DELETE,
        resource: Resource::Lease,
        tag: "leases",
        summary: "End a lease",
        about: "Its keys are deleted with it, at one revision; a lock that it holds is released.",
        parameters: &[],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "The lease is gone." [Json("Done")]; },
        problems: &[INVALID_PATH, LEASE_NOT_FOUND],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::KeepLeaseAlive,
        id: "keepLeaseAlive",
        method: Method::POST,
        resource: Resource::LeaseKeepAlive,
        tag: "leases",
        summary: "Keep a lease alive",
        about: "It then lives for its whole time again. A third of that time is a good pause.",
        parameters: &[],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "The lease lives on." [Json("Lease")]; },
        problems: &[INVALID_PATH, LEASE_NOT_FOUND],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::AcquireLock,
        id: "acquireLock",
        method: Method::POST,
        resource: Resource::Lock,
        tag: "locks",
        summary: "Acquire a lock",
        about: "Whoever locks by etcd's lock service under the same name takes part. Without `wait` it is tried once. \
                The lock is held until it is released or its lease ends: keep the lease alive. A lease has one place in \
                line, which a later call with it takes over.",
        parameters: &[
            parameter(
                "wait",
                Kind::Time {
                    min_ms: 0,
                    max_ms: 300_000,
                },
                "How long to stand in line if somebody else \
                holds it.",
            ),
            LEASE,
            parameter(
                "ttl",
                Kind::Integer {
                    min: 1,
                    max: 9_000_000_000,
                },
                "Without `lease`: how long the lease that is \
                granted for it lives without being kept alive, in seconds; 60 if left out.",
            ),
            ENCODING,
        ],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "The lock is held." [Json("Acquired")]; },
        problems: &[
            INVALID_PATH,
            INVALID_REQUEST,
            LEASE_NOT_FOUND,
            LOCK_HELD,
            PLACE_GIVEN_UP,
            NO_SPACE,
        ],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::GetLock,
        id: "getLock",
        method: Method::GET,
        resource: Resource::Lock,
        tag: "locks",
        summary: "Who holds a lock",
        about: "And who waits for it.",
        parameters: &[SERIALIZABLE],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "How it stands." [Json("Lock")]; },
        problems: &[INVALID_PATH],
        learner: Learner::Serializable,
        open: false,
    },
    Operation {
        action: Action::ReleaseLock,
        id: "releaseLock",
        method: Method::DELETE,
        resource: Resource::Lock,
        tag: "locks",
        summary: "Release a lock",
        about: "Or leave the line that waits for it. The lease lives on; to end both at once, end the lease.",
        parameters: &[Parameter {
            name: "lease",
            kind: Kind::Lease,
            about: "The lease that holds it, in hexadecimal.",
            required: true,
        }],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "The lock is released." [Json("Done")]; },
        problems: &[INVALID_PATH, LOCK_NOT_HELD],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::Members,
        id: "listMembers",
        method: Method::GET,
        resource: Resource::Members,
        tag: "cluster",
        summary: "List the members",
        about: "",
        parameters: &[SERIALIZABLE],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "The members." [Json("Members")]; },
        problems: &[],
        learner: Learner::Refuses,
        open: false,
    },
    Operation {
        action: Action::Status,
        id: "getStatus",
        method: Method::GET,
        resource: Resource::Status,
        tag: "cluster",
        summary: "How this member is",
        about: "",
        parameters: &[],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "How it is." [Json("Status")]; },
        problems: &[],
        learner: Learner::Answers,
        open: false,
    },
    Operation {
        action: Action::Token,
        id: "getToken",
        method: Method::POST,
        resource: Resource::Token,
        tag: "auth",
        summary: "Exchange user and password for a token",
        about: "Send `Authorization: Basic`; the token then goes into `Authorization: Bearer`. Checking a password is \
                slow on purpose, and a token is not.",
        parameters: &[],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "The token." [Json("Token")]; },
        problems: &[CONFLICT, NOT_SUPPORTED],
        learner: Learner::Refuses,
        open: true,
    },
    Operation {
        action: Action::Document,
        id: "getOpenApi",
        method: Method::GET,
        resource: Resource::Document,
        tag: "about",
        summary: "This API as an OpenAPI document",
        about: "",
        parameters: &[],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "The document." [Other("application/json")]; },
        problems: &[],
        learner: Learner::Answers,
        open: true,
    },
    Operation {
        action: Action::Page,
        id: "getDocs",
        method: Method::GET,
        resource: Resource::Page,
        tag: "about",
        summary: "This API as a page",
        about: "",
        parameters: &[],
        fields: &[],
        body: RequestBody::None,
        answers: answers! { 200 "The page." [Other("text/html")]; },
        problems: &[],
        learner: Learner::Answers,
        open: true,
    },
];

/// The operation that a method asks for, of those that a resource has. HEAD is GET without the body, except of a watch,
/// which has nothing to say of itself before it begins.
pub(super) fn find(resource: Resource, method: &Method) -> Result<&'static Operation, Problem> {
    let of_resource = || {
        OPERATIONS
            .iter()
            .filter(move |operation| operation.resource == resource)
    };
    let method_meant = match *method {
        Method::HEAD if has_head(resource) => &Method::GET,
        _ => method,
    };
    if let Some(operation) = of_resource().find(|operation| operation.method == *method_meant) {
        return Ok(operation);
    }
    let mut allow: Vec<&str> = of_resource().map(|operation| operation.method.as_str()).collect();
    if has_head(resource) {
        allow.push("HEAD");
    }
    Err(Problem::method_not_allowed(&allow.join(", ")))
}

/// Whether a resource takes HEAD.
pub(super) fn has_head(resource: Resource) -> bool {
    resource != Resource::Watch
        && OPERATIONS
            .iter()
            .any(|operation| operation.resource == resource && operation.method == Method::GET)
}

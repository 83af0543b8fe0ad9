//! The OpenAPI 3.1 document, made of the table of operations and the types of the bodies.

use std::collections::BTreeMap;

use api::limits::METASTORE_VERSION;
use serde_json::{Map, Value, json};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::json::{
    AcquiredBody, ChangeBody, ChangesBody, CountBody, DeletedBody, DoneBody, KeyValueBody, LeaseBody, LeaseGrantBody,
    LeasesBody, ListBody, LockBody, MembersBody, OpResultBody, StatusBody, TokenBody, TxnResultBody, WrittenBody,
};
use super::operations::{
    Answer, BODY_PROBLEMS, COMMON_PROBLEMS, Content, FIELDS, OPERATIONS, Operation, RequestBody, Resource, has_head,
};
use super::parameters::{Kind, Parameter};
use super::problem::{INVALID_BODY, MEDIA_TYPE, ProblemBody, ProblemType};
use super::txn::{OpBody, TxnBody};
use super::{BASE, JSON};

/// What the whole of it says about itself.
pub(super) const ABOUT: &str = "A metadata store over plain HTTP: keys, watches, transactions, leases and locks, on the \
    same data, at the same revisions and under the same users and roles as etcd's API on the same port. Keys and values \
    are bytes; in JSON they stand as text where they are UTF-8 (`key`, `value`) and in base64 otherwise (`key_base64`, \
    `value_base64`), never both. Revisions are numbers; ids of leases and members are in hexadecimal, as etcdctl writes \
    them. Query parameters are percent-encoded, `+` is a space, and one that an operation does not know is refused.";

/// The document.
pub(super) fn document() -> Value {
    let mut paths = Map::new();
    for resource in Resource::ALL {
        let mut item = Map::new();
        if let Some((name, about)) = resource.variable() {
            let schema = match name {
                "id" => lease_schema(),
                _ => json!({"type": "string", "minLength": 1}),
            };
            let variable =
                json!({"name": name, "in": "path", "required": true, "description": about, "schema": schema});
            item.insert("parameters".to_owned(), json!([variable]));
        }
        for operation in OPERATIONS.iter().filter(|operation| operation.resource == *resource) {
            let method = operation.method.as_str().to_lowercase();
            if method == "get" && has_head(*resource) {
                item.insert("head".to_owned(), head(operation));
            }
            item.insert(method, describe(operation));
        }
        paths.insert(format!("{BASE}{}", resource.template()), Value::Object(item));
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "MetaStore HTTP API",
            "version": METASTORE_VERSION,
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"basic": []}, {"bearer": []}],
        "tags": [
            {"name": "keys", "description": "Keys and their values."},
            {"name": "watch", "description": "What changes."},
            {"name": "leases", "description": "What keys live as long as."},
            {"name": "locks", "description": "One holder at a time, shared with etcd's lock service."},
            {"name": "cluster", "description": "Members and how they are."},
            {"name": "auth", "description": "Who asks."},
            {"name": "about", "description": "This API itself."},
        ],
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "headers": headers(),
            "securitySchemes": {
                "basic": {"type": "http", "scheme": "basic", "description": "A user and its password."},
                "bearer": {"type": "http", "scheme": "bearer", "description": "A token, from POST /api/v1/auth/token or from etcd's Authenticate."},
            },
        },
    })
}

fn describe(operation: &Operation) -> Value {
    let mut described = Map::new();
    let mut set = |name: &str, value: Value| described.insert(name.to_owned(), value);
    set("operationId", operation.id.into());
    set("tags", json!([operation.tag]));
    set("summary", operation.summary.into());
    if !operation.about.is_empty() {
        set("description", operation.about.into());
    }
    if operation.open {
        set("security", json!([]));
    }
    let parameters = operation.parameters.iter().map(parameter);
    let fields = operation.fields.iter().map(|field| {
        json!({
            "name": field.name,
            "in": "header",
            "description": field.about,
            "schema": {"type": "string", "pattern": field.pattern},
        })
    });
    let parameters: Vec<_> = parameters.chain(fields).collect();
    if !parameters.is_empty() {
        set("parameters", parameters.into());
    }
    match operation.body {
        RequestBody::None => {}
        RequestBody::Raw => {
            let content = json!({"*/*": {"schema": {}}});
            set(
                "requestBody",
                json!({"required": true, "description": "The value.", "content": content}),
            );
        }
        RequestBody::Json(schema) => {
            let content = json!({JSON: {"schema": reference(schema)}});
            set("requestBody", json!({"required": true, "content": content}));
        }
    }
    set("responses", Value::Object(responses(operation, true)));
    Value::Object(described)
}

/// HEAD: the same without bodies.
fn head(operation: &Operation) -> Value {
    let mut described = describe(operation);
    described["operationId"] = format!("{}Head", operation.id).into();
    described["summary"] = format!("{}: the header alone", operation.summary).into();
    described["responses"] = Value::Object(responses(operation, false));
    described
}

/// The problems that an operation can answer with.
pub(super) fn problems(operation: &Operation) -> Vec<&'static ProblemType> {
    let of_body: &[&ProblemType] = match operation.body {
        // A body where none belongs is one of them.
        RequestBody::None if matches!(operation.method.as_str(), "POST" | "DELETE") => &[INVALID_BODY],
        RequestBody::None => &[],
        _ => BODY_PROBLEMS,
    };
    let all = COMMON_PROBLEMS.iter().chain(of_body).chain(operation.problems);
    let mut all: Vec<_> = all.copied().collect();
    all.sort_by_key(|problem| (problem.status, problem.slug));
    all.dedup();
    all
}

fn responses(operation: &Operation, with_bodies: bool) -> Map<String, Value> {
    let mut responses = Map::new();
    for answer in operation.answers {
        responses.insert(answer.status.to_string(), describe_answer(answer, with_bodies));
    }
    let mut by_status: BTreeMap<u16, Vec<&ProblemType>> = BTreeMap::new();
    for problem in problems(operation) {
        by_status.entry(problem.status).or_default().push(problem);
    }
    for (status, problems) in by_status {
        let lines: Vec<_> = problems
            .iter()
            .map(|problem| format!("`{}`: {}.", problem.slug, problem.title))
            .collect();
        let mut described = Map::new();
        described.insert("description".to_owned(), lines.join(" ").into());
        let field = match status {
            401 => Some("WWW-Authenticate"),
            412 => Some("ETag"),
            429 | 503 => Some("Retry-After"),
            _ => None,
        };
        if let Some(field) = field {
            let reference = json!({"$ref": format!("#/components/headers/{field}")});
            described.insert("headers".to_owned(), json!({field: reference}));
        }
        if with_bodies {
            described.insert(
                "content".to_owned(),
                json!({MEDIA_TYPE: {"schema": reference("Problem")}}),
            );
        }
        responses.insert(status.to_string(), Value::Object(described));
    }
    responses
}

fn describe_answer(answer: &Answer, with_bodies: bool) -> Value {
    let mut described = Map::new();
    described.insert("description".to_owned(), answer.about.into());
    if !answer.fields.is_empty() {
        let fields = answer.fields.iter().map(|field| {
            let reference = json!({"$ref": format!("#/components/headers/{field}")});
            ((*field).to_owned(), reference)
        });
        described.insert("headers".to_owned(), Value::Object(fields.collect()));
    }
    if with_bodies && !answer.content.is_empty() {
        let content = answer.content.iter().map(|content| match content {
            Content::Json(schema) => (JSON.to_owned(), json!({"schema": reference(schema)})),
            Content::Other(media_type) => ((*media_type).to_owned(), json!({"schema": {}})),
        });
        described.insert("content".to_owned(), Value::Object(content.collect()));
    }
    Value::Object(described)
}

fn parameter(parameter: &Parameter) -> Value {
    json!({
        "name": parameter.name,
        "in": "query",
        "required": parameter.required,
        "description": parameter.about,
        "schema": kind_schema(parameter.kind),
    })
}

fn lease_schema() -> Value {
    json!({"type": "string", "pattern": "^0*[1-9a-fA-F][0-9a-fA-F]*$", "maxLength": 16})
}

pub(super) fn kind_schema(kind: Kind) -> Value {
    match kind {
        Kind::Bytes => json!({"type": "string"}),
        Kind::Flag => json!({"type": "boolean"}),
        Kind::Integer { min, max } => json!({"type": "integer", "format": "int64", "minimum": min, "maximum": max}),
        Kind::Lease => lease_schema(),
        // All times end at five minutes; `times_are_described_exactly` holds this against what is taken.
        Kind::Time { min_ms: 0, .. } => json!({"type": "string", "pattern":
            "^((0|[1-9][0-9]{0,4}|[12][0-9]{5}|300000)ms|(0|[1-9][0-9]?|[12][0-9]{2}|300)s?|[0-5]m)$"}),
        Kind::Time { .. } => json!({"type": "string", "pattern":
            "^(([1-9][0-9]{2,4}|[12][0-9]{5}|300000)ms|([1-9][0-9]?|[12][0-9]{2}|300)s?|[1-5]m)$"}),
        Kind::Choice(choices) => json!({"type": "string", "enum": choices}),
    }
}

fn reference(schema: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{schema}")})
}

fn headers() -> Map<String, Value> {
    let describe = |(name, about): &(&str, &str)| {
        let schema = match *name {
            "ETag" => json!({"type": "string", "pattern": "^\"[1-9][0-9]*\"$"}),
            "Metastore-Lease" => lease_schema(),
            "Link" | "Location" | "WWW-Authenticate" => json!({"type": "string"}),
            _ => json!({"type": "integer", "format": "int64", "minimum": 1}),
        };
        ((*name).to_owned(), json!({"description": about, "schema": schema}))
    };
    FIELDS.iter().map(describe).collect()
}

fn add<T: ToSchema>(all: &mut BTreeMap<String, Value>) {
    let mut found: Vec<(String, RefOr<Schema>)> = Vec::new();
    T::schemas(&mut found);
    found.push((T::name().into_owned(), <T as PartialSchema>::schema()));
    for (name, schema) in found {
        let schema = serde_json::to_value(schema).unwrap_or_default();
        all.insert(name, schema);
    }
}

/// The schemas of all bodies, by name.
pub(super) fn schemas() -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    macro_rules! add_all {
        ($($body:ty),* $(,)?) => { $(add::<$body>(&mut all);)* };
    }
    add_all!(
        AcquiredBody<'_>,
        ChangeBody<'_>,
        ChangesBody<'_>,
        CountBody,
        DeletedBody<'_>,
        DoneBody,
        KeyValueBody<'_>,
        LeaseBody<'_>,
        LeaseGrantBody,
        LeasesBody,
        ListBody<'_>,
        LockBody,
        MembersBody,
        OpBody,
        OpResultBody<'_>,
        ProblemBody,
        StatusBody,
        TokenBody,
        TxnBody,
        TxnResultBody<'_>,
        WrittenBody<'_>,
    );
    let either = json!({"anyOf": [reference("List"), reference("Count")]});
    all.insert("ListOrCount".to_owned(), either);
    all
}

#[cfg(test)]
mod tests {
    use super::super::parameters::Parameters;
    use super::*;
    use regex::Regex;
    use std::collections::BTreeSet;

    /// Every reference leads somewhere, every id and every path is there once.
    #[test]
    fn the_document_holds_together() {
        let document = document();
        let mut references = BTreeSet::new();
        collect(&document, &mut references);
        for reference in &references {
            let pointer = reference.strip_prefix('#').expect("references are local");
            assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
        }
        let mut ids = BTreeSet::new();
        for operation in OPERATIONS {
            assert!(ids.insert(operation.id), "{} comes twice", operation.id);
            let path = format!("{BASE}{}", operation.resource.template());
            let described = &document["paths"][&path][operation.method.as_str().to_lowercase()];
            assert_eq!(described["operationId"], operation.id);
            for answer in operation.answers {
                for field in answer.fields {
                    assert!(FIELDS.iter().any(|(name, _)| name == field), "{field} is not described");
                }
            }
        }
        assert!(references.len() > 10, "{references:?}");
    }

    fn collect(value: &Value, references: &mut BTreeSet<String>) {
        match value {
            Value::Object(members) => {
                for (name, value) in members {
                    match (name.as_str(), value) {
                        ("$ref", Value::String(reference)) => {
                            references.insert(reference.clone());
                        }
                        _ => collect(value, references),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| collect(item, references)),
            _ => {}
        }
    }

    #[test]
    fn times_are_described_exactly() {
        for operation in OPERATIONS {
            for parameter in operation.parameters {
                if let Kind::Time { min_ms, max_ms } = parameter.kind {
                    assert!(matches!(min_ms, 0 | 100) && max_ms == 300_000, "{}", parameter.name);
                    let pattern = kind_schema(parameter.kind)["pattern"].as_str().map(Regex::new);
                    let pattern = pattern.expect("a pattern").expect("it is well formed");
                    let numbers = (0..=300_002).map(|ms| format!("{ms}ms"));
                    let numbers = numbers.chain((0..=302).flat_map(|s| [format!("{s}s"), s.to_string()]));
                    let numbers = numbers.chain((0..=7).map(|m| format!("{m}m")));
                    let odd = [
                        "", "s", "ms", "01s", "00", "1h", "1 s", "-1s", "1.5s", "+1s", "1S", "0x1s",
                    ];
                    for text in numbers.chain(odd.map(str::to_owned)) {
                        let query = format!("{}={}", parameter.name, text.replace('+', "%2B").replace(' ', "%20"));
                        let taken = Parameters::parse(&query, operation.parameters).is_ok();
                        assert_eq!(taken, pattern.is_match(&text), "{query}");
                    }
                }
            }
        }
    }
}

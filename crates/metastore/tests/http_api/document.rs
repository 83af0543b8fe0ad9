//! Holds what a server answers against what its own OpenAPI document says: every answer of these tests that belongs to an
//! operation must have a status, a media type and a kind of problem that are described there.

use http::{HeaderMap, Method};
use serde_json::Value;

/// The document of a server. It is made from the code, so all of these tests have the same.
pub(crate) struct Document(Value);

impl Document {
    pub(crate) fn new(document: Value) -> Document {
        assert!(document["paths"].as_object().is_some_and(|paths| paths.len() > 10));
        Document(document)
    }

    /// The paths, each with its operations by method in lower case.
    fn paths(&self) -> impl Iterator<Item = (&str, &Value)> {
        let paths = self.0["paths"].as_object().expect("paths");
        paths.iter().map(|(path, item)| (path.as_str(), item))
    }

    /// All operations: method, path with its variable in braces, description.
    pub(crate) fn operations(&self) -> impl Iterator<Item = (Method, &str, &Value)> {
        self.paths().flat_map(|(path, item)| {
            let item = item.as_object().expect("operations");
            let operations = item.iter().filter(|(name, _)| *name != "parameters");
            operations.map(move |(method, operation)| {
                let method = method.to_uppercase().parse().expect("a method");
                (method, path, operation)
            })
        })
    }

    /// What a path can do; the longest description that it fits, since a key has slashes.
    fn item(&self, path: &str) -> Option<&Value> {
        let fits = |template: &str| match template.split_once('{') {
            None => path == template,
            Some((before, variable)) => {
                let after = variable.split_once('}').map_or("", |(_, after)| after);
                let value = path.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
                let one_segment = template.contains("/leases/");
                value.is_some_and(|value| !(value.is_empty() || one_segment && value.contains('/')))
            }
        };
        let fitting = self.paths().filter(|(template, _)| fits(template));
        fitting.max_by_key(|(template, _)| template.len()).map(|(_, item)| item)
    }

    /// Checks an answer.
    #[track_caller]
    pub(crate) fn check(&self, method: &str, target: &str, status: u16, headers: &HeaderMap, body: Option<&[u8]>) {
        let path = target.split_once('?').map_or(target, |(path, _)| path);
        // What browsers ask is answered for all of it.
        let is_preflight = method == "OPTIONS" && status == 200;
        if !path.starts_with("/api/v1") || is_preflight {
            return;
        }
        let operation = self.item(path).map(|item| &item[method.to_lowercase()]);
        let Some(operation) = operation.filter(|operation| !operation.is_null()) else {
            // No operation: only that can be said, or that the path cannot be read.
            assert!(matches!(status, 303 | 400 | 404 | 405), "{method} {target}: {status}");
            return;
        };
        let described = &operation["responses"][status.to_string()];
        assert!(described.is_object(), "{method} {target}: {status} is not described");
        let media_type = headers.get("content-type").map(|value| {
            let value = value.to_str().expect("text");
            value.split_once(';').map_or(value, |(media_type, _)| media_type)
        });
        if method != "HEAD" {
            let content = described["content"].as_object();
            match media_type {
                None => assert!(content.is_none(), "{method} {target}: {status} has no content-type"),
                Some(media_type) => assert!(
                    content.is_some_and(|content| content.contains_key(media_type)),
                    "{method} {target}: {status} as {media_type} is not described"
                ),
            }
        }
        for name in described["headers"]
            .as_object()
            .into_iter()
            .flat_map(|fields| fields.keys())
        {
            // These depend on the key and the list.
            let may_lack = matches!(name.as_str(), "Metastore-Lease" | "Link") || status == 412 && name == "ETag";
            let is_there = headers.contains_key(name) || may_lack;
            assert!(is_there, "{method} {target}: {status} lacks {name}");
        }
        let problem = (media_type == Some("application/problem+json"))
            .then_some(body)
            .flatten();
        if let Some(problem) = problem.filter(|problem| !problem.is_empty()) {
            let problem: Value = serde_json::from_slice(problem).expect("a problem is JSON");
            let slug = problem["type"]
                .as_str()
                .and_then(|name| name.strip_prefix("urn:metastore:problem:"));
            let slug = format!("`{}`:", slug.expect("a type"));
            let about = described["description"].as_str().expect("a description");
            assert!(
                about.contains(&slug),
                "{method} {target}: {status} {slug} is not in {about}"
            );
        }
    }
}

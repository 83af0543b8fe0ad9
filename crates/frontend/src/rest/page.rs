//! The API as a page for people. It needs no script and nothing from elsewhere.

use std::fmt::Write as _;

use api::limits::METASTORE_VERSION;

use super::BASE;
use super::openapi::{ABOUT, kind_schema, problems, schemas};
use super::operations::{Content, OPERATIONS, Operation, RequestBody};
use super::problem::{ALL, TYPE_PREFIX};

const STYLE: &str = "\
:root{color-scheme:light dark;--line:#8884;--soft:#8882}\
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.6rem}h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}h3{margin-top:2rem;font-size:1.05rem}\
code,pre{font:14px/1.5 ui-monospace,monospace}code{background:var(--soft);padding:.1em .3em;border-radius:.2em}\
pre{background:var(--soft);padding:.8rem;overflow-x:auto;border-radius:.3rem}pre code{background:none;padding:0}\
table{border-collapse:collapse;width:100%;margin:.5rem 0}th,td{border:1px solid var(--line);padding:.3rem .5rem;\
text-align:left;vertical-align:top}.method{font-weight:700;margin-right:.5em}summary{cursor:pointer}";

/// Text with the characters that HTML gives a meaning, and `code` in backquotes as code.
fn text(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for (index, part) in text.split('`').enumerate() {
        if index > 0 {
            html.push_str(if index % 2 == 1 { "<code>" } else { "</code>" });
        }
        for character in part.chars() {
            match character {
                '&' => html.push_str("&amp;"),
                '<' => html.push_str("&lt;"),
                '>' => html.push_str("&gt;"),
                '"' => html.push_str("&quot;"),
                _ => html.push(character),
            }
        }
    }
    html
}

/// The page.
pub(super) fn render() -> String {
    let mut html = String::with_capacity(64 << 10);
    write(&mut html).expect("a string takes whatever is written to it");
    html
}

fn write(html: &mut String) -> std::fmt::Result {
    write!(
        html,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>MetaStore HTTP API</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\
         <h1>MetaStore HTTP API</h1><p>Version {METASTORE_VERSION} · <a href=\"{BASE}/openapi.json\">OpenAPI 3.1 \
         document</a></p><p>{}</p><nav><ul>",
        text(ABOUT)
    )?;
    for operation in OPERATIONS {
        write!(
            html,
            "<li><a href=\"#{}\"><code>{} {BASE}{}</code></a> {}</li>",
            operation.id,
            operation.method,
            operation.resource.template(),
            text(operation.summary)
        )?;
    }
    html.push_str("</ul></nav><h2>Operations</h2>");
    for operation in OPERATIONS {
        write_operation(html, operation)?;
    }
    write!(
        html,
        "<h2 id=\"problems\">Problems</h2><p>Every refusal is <code>application/problem+json</code> (RFC 9457). Its \
         <code>type</code> is <code>{TYPE_PREFIX}</code> with one of these names behind it, which never change.</p>\
         <table><tr><th>Name</th><th>Status</th><th>What</th><th>What to do next</th></tr>"
    )?;
    for problem in ALL {
        write!(
            html,
            "<tr id=\"{}\"><td><code>{}</code></td><td>{}</td><td>{}</td><td>{}</td></tr>",
            problem.slug,
            problem.slug,
            problem.status,
            text(problem.title),
            text(problem.next)
        )?;
    }
    html.push_str("</table><h2>Bodies</h2>");
    for (name, schema) in schemas() {
        let schema = serde_json::to_string_pretty(&schema).unwrap_or_default();
        write!(
            html,
            "<details id=\"schema-{name}\"><summary><code>{name}</code></summary><pre><code>{}</code></pre></details>",
            text(&schema).replace("<code>", "`").replace("</code>", "`")
        )?;
    }
    html.push_str("</body></html>\n");
    Ok(())
}

fn schema_link(name: &str) -> String {
    format!("<a href=\"#schema-{name}\">{name}</a>")
}

fn write_operation(html: &mut String, operation: &Operation) -> std::fmt::Result {
    write!(
        html,
        "<h3 id=\"{}\"><code><span class=\"method\">{}</span>{BASE}{}</code> {}</h3>",
        operation.id,
        operation.method,
        operation.resource.template(),
        text(operation.summary)
    )?;
    if !operation.about.is_empty() {
        write!(html, "<p>{}</p>", text(operation.about))?;
    }
    if let Some((name, about)) = operation.resource.variable() {
        write!(html, "<p><code>{{{name}}}</code>: {}</p>", text(about))?;
    }
    match operation.body {
        RequestBody::None => {}
        RequestBody::Raw => html.push_str("<p>Body: the value's bytes.</p>"),
        RequestBody::Json(schema) => write!(html, "<p>Body: JSON, {}.</p>", schema_link(schema))?,
    }
    if !operation.parameters.is_empty() || !operation.fields.is_empty() {
        html.push_str("<table><tr><th>Parameter</th><th>Value</th><th>Meaning</th></tr>");
        for parameter in operation.parameters {
            let schema = kind_schema(parameter.kind);
            let value = match (&schema["enum"], schema["type"].as_str()) {
                (serde_json::Value::Array(choices), _) => {
                    let choices = choices.iter().filter_map(|choice| choice.as_str());
                    choices
                        .map(|choice| format!("`{choice}`"))
                        .collect::<Vec<_>>()
                        .join(" ")
                }
                (_, Some(kind)) => kind.to_owned(),
                (_, None) => String::new(),
            };
            write!(
                html,
                "<tr><td><code>{}</code></td><td>{}</td><td>{}</td></tr>",
                parameter.name,
                text(&value),
                text(parameter.about)
            )?;
        }
        for field in operation.fields {
            write!(
                html,
                "<tr><td>header <code>{}</code></td><td>string</td><td>{}</td></tr>",
                field.name,
                text(field.about)
            )?;
        }
        html.push_str("</table>");
    }
    html.push_str("<p>Answers: ");
    for answer in operation.answers {
        write!(html, "{} {} ", answer.status, text(answer.about))?;
        for content in answer.content {
            match content {
                Content::Json(schema) => write!(html, "({}) ", schema_link(schema))?,
                Content::Other(media_type) => write!(html, "(<code>{media_type}</code>) ")?,
            }
        }
    }
    html.push_str("</p><p>Problems: ");
    for problem in problems(operation) {
        write!(
            html,
            "<a href=\"#{}\">{} {}</a> ",
            problem.slug, problem.status, problem.slug
        )?;
    }
    html.push_str("</p>");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_comes_from_elsewhere_and_nothing_is_unescaped() {
        let page = render();
        assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script"));
        assert_eq!(text("a `b<c>` & d"), "a <code>b&lt;c&gt;</code> &amp; d");
        for operation in OPERATIONS {
            assert!(page.contains(&format!("id=\"{}\"", operation.id)));
        }
    }
}

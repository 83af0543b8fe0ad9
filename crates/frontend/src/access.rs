//! What every HTTP request goes through before it is answered: who may ask at all, and by which path.

use std::collections::HashSet;

use axum::body::Body;
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN, CONTENT_TYPE, HOST,
    LOCATION, ORIGIN,
};
use http::uri::{PathAndQuery, Uri};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};

/// Which web pages and host names are let in.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// The origins of web pages whose scripts may read replies (`--cors`); empty, or with `*` in it, for all.
    pub origins: HashSet<String>,
    /// The host names that requests over plaintext may be for (`--host-whitelist`); empty, or with `*` in it, for all.
    pub hosts: HashSet<String>,
}

/// Stands for all.
const ANY: &str = "*";

fn allows(set: &HashSet<String>, name: &str) -> bool {
    set.is_empty() || set.contains(ANY) || set.contains(name)
}

impl Access {
    /// Whether a request that came over plaintext may be for this host: a page that an attacker has let resolve to us
    /// (DNS rebinding, CVE-2018-5702) names its own.
    ///
    /// # Errors
    /// What to tell the client, with the status 421.
    pub(crate) fn check_host<B>(&self, request: &Request<B>) -> Result<(), String> {
        let host = host(request);
        if allows(&self.hosts, host) {
            return Ok(());
        }
        tracing::warn!(host, "rejecting HTTP request to prevent DNS rebinding attacks");
        Err(format!(
            "metastore: this server does not go by the name {host:?}. Over plaintext it answers only for the hosts \
             of --host-whitelist, so that no web page can reach it under a name of its own (DNS rebinding, \
             CVE-2018-5702). Add the name to --host-whitelist, or use TLS."
        ))
    }

    /// The foreign origin of a write that a browser makes for a page that may not have it made. Browsers ask first
    /// (`OPTIONS`) before a page's PUT or DELETE, and before a POST whose type no form could have. Any other POST they just
    /// send, and show who their user is.
    pub(crate) fn forger<'a, B>(&self, request: &'a Request<B>) -> Option<&'a HeaderValue> {
        if request.method().is_safe() {
            return None;
        }
        let headers = request.headers();
        let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let origin = headers.get(ORIGIN)?;
        let is_own = || {
            let own = text(&HOST).or(request.uri().authority().map(|authority| authority.as_str()));
            let (scheme, authority) = origin.to_str().ok()?.split_once("://")?;
            Some(without_port_of(scheme, authority) == without_port_of(scheme, own?))
        };
        let site = text(&HeaderName::from_static("sec-fetch-site"));
        if matches!(site, Some("same-origin" | "none")) || is_own() == Some(true) {
            return None;
        }
        let is_allowed = origin.to_str().is_ok_and(|origin| allows(&self.origins, origin));
        let is_asked = request.method() != Method::POST || !is_form_type(text(&CONTENT_TYPE));
        (!is_allowed || !is_asked).then_some(origin)
    }

    /// Whether the answer to a request depends on its origin.
    pub(crate) fn names_origins(&self) -> bool {
        !allows(&self.origins, ANY)
    }

    /// The origin that a reply to this request names as allowed, if any.
    pub(crate) fn allowed_origin<B>(&self, request: &Request<B>) -> Option<HeaderValue> {
        if allows(&self.origins, ANY) {
            return Some(HeaderValue::from_static(ANY));
        }
        let origin = request.headers().get(ORIGIN)?;
        self.origins.contains(origin.to_str().ok()?).then(|| origin.clone())
    }
}

/// A host, in lower case, without the port that goes without saying.
fn without_port_of(scheme: &str, authority: &str) -> String {
    let port = match scheme {
        "https" => ":443",
        _ => ":80",
    };
    authority.strip_suffix(port).unwrap_or(authority).to_ascii_lowercase()
}

/// Whether a request of this type is sent for any page (the Fetch standard's safelist).
fn is_form_type(content_type: Option<&str>) -> bool {
    let Some(content_type) = content_type else {
        return true;
    };
    let essence = content_type
        .split_once(';')
        .map_or(content_type, |(essence, _)| essence);
    ["application/x-www-form-urlencoded", "multipart/form-data", "text/plain"]
        .iter()
        .any(|simple| essence.trim().eq_ignore_ascii_case(simple))
}

/// Says to a browser which origin may read a reply, and what it may ask for.
pub(crate) fn add_cors(response: &mut Response<Body>, origin: HeaderValue) {
    let headers = response.headers_mut();
    headers.insert(
        ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("POST, GET, OPTIONS, PUT, DELETE"),
    );
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(
        ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("accept, content-type, authorization"),
    );
}

/// The host that a request is for, without its port.
fn host<B>(request: &Request<B>) -> &str {
    let header = request.headers().get(HOST).and_then(|host| host.to_str().ok());
    let authority = header.or(request.uri().authority().map(|authority| authority.as_str()));
    let authority = authority.unwrap_or_default();
    match authority.rsplit_once(':') {
        Some((host, _)) if !host.contains(':') => host,
        // An IPv6 address in brackets, which without a port stay, as in etcd.
        Some((host, _)) => host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(authority),
        None => authority,
    }
}

/// Refuses a path with a percent sign that begins no escape, as Go's parser does.
pub(crate) fn check_path<B>(request: &Request<B>) -> Result<(), Box<Response<Body>>> {
    let mut after_percents = request.uri().path().split('%').skip(1);
    let is_escape = |rest: &str| rest.len() >= 2 && rest.as_bytes()[..2].iter().all(u8::is_ascii_hexdigit);
    if after_percents.all(is_escape) {
        return Ok(());
    }
    let mut response = Response::new(Body::from("400 Bad Request"));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, text);
    Err(Box::new(response))
}

/// Puts the path of today in the place of the one that an earlier etcd had.
pub(crate) fn modernise<B>(request: &mut Request<B>) {
    let path = request.uri().path_and_query().map_or("", PathAndQuery::as_str);
    if let Some(rest) = path.strip_prefix("/v3beta/") {
        set_path(request, &format!("/v3/{rest}"));
    }
}

/// Writes out the escapes in a path that stand for what needs none, so that it is found in whichever way it is written.
/// Go's router looks at one name after another, so an escaped slash is a part of a name and stays what it is.
pub(crate) fn unescape_names<B>(request: &mut Request<B>) {
    let path = request.uri().path();
    if !path.contains('%') {
        return;
    }
    let mut parts = path.split('%');
    let mut written = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let byte = part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match byte {
            Some(byte) if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => {
                written.push(char::from(byte));
                written.push_str(&part[2..]);
            }
            _ => {
                written.push('%');
                written.push_str(part);
            }
        }
    }
    if let Some(query) = request.uri().query() {
        written = format!("{written}?{query}");
    }
    set_path(request, &written);
}

fn set_path<B>(request: &mut Request<B>, path_and_query: &str) {
    let mut parts = request.uri().clone().into_parts();
    let Ok(path_and_query) = PathAndQuery::try_from(path_and_query) else {
        return;
    };
    parts.path_and_query = Some(path_and_query);
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
}

/// Sends the client to the clean form of its path, if it is not clean: one slash between names, no `.` and `..`.
/// `subtrees` are paths that end in a slash; without it they are sent there too.
pub(crate) fn redirect<B>(request: &Request<B>, subtrees: &[&str]) -> Option<Response<Body>> {
    let path = request.uri().path();
    let mut clean = clean(path);
    if subtrees.iter().any(|subtree| subtree.strip_suffix('/') == Some(&clean)) {
        clean.push('/');
    }
    if clean == path || request.method() == Method::CONNECT {
        return None;
    }
    if let Some(query) = request.uri().query() {
        clean = format!("{clean}?{query}");
    }
    let location = HeaderValue::try_from(&clean).ok()?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    response.headers_mut().insert(LOCATION, location);
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        let link = clean.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let link = link.replace('"', "&#34;").replace('\'', "&#39;");
        *response.body_mut() = Body::from(format!("<a href=\"{link}\">Temporary Redirect</a>.\n\n"));
        let html = HeaderValue::from_static("text/html; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, html);
    }
    Some(response)
}

/// A path in its shortest form, by the rules of Go's `path.Clean`, with the slash at its end if it has one.
fn clean(path: &str) -> String {
    let mut names = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => drop(names.pop()),
            _ => names.push(name),
        }
    }
    let mut clean = format!("/{}", names.join("/"));
    if path.ends_with('/') && !names.is_empty() {
        clean.push('/');
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_clean() {
        for (path, expected) in [
            ("/", "/"),
            ("", "/"),
            ("//", "/"),
            ("/a//b/", "/a/b/"),
            ("/a/./b/../c", "/a/c"),
            ("/../..", "/"),
            ("/a/..", "/"),
            ("/a/../", "/"),
        ] {
            assert_eq!(clean(path), expected, "{path:?}");
        }
    }

    #[test]
    fn names_are_written_out() {
        for (path, expected) in [
            ("/a?%61", "/a?%61"),
            ("/%76ersion?%61", "/version?%61"),
            ("/%7E%2d/%2Fx%2e%c3%A9", "/~-/%2Fx.%c3%A9"),
            ("/%2576", "/%2576"),
        ] {
            let mut request = Request::builder().uri(path).body(()).expect("whole");
            unescape_names(&mut request);
            assert_eq!(request.uri(), expected, "{path:?}");
        }
    }

    #[test]
    fn escapes_are_checked() {
        for (path, is_right) in [
            ("/a", true),
            ("/%2F%aa", true),
            ("/%zz", false),
            ("/%", false),
            ("/%4", false),
        ] {
            let request = Request::builder().uri(path).body(()).expect("whole");
            assert_eq!(check_path(&request).is_ok(), is_right, "{path}");
        }
    }

    #[test]
    fn hosts_are_read_without_ports() {
        for (header, expected) in [
            ("localhost:2379", "localhost"),
            ("example.com", "example.com"),
            ("[::1]:2379", "::1"),
            ("[::1]", "[::1]"),
        ] {
            let request = Request::builder().header(HOST, header).body(()).expect("whole");
            assert_eq!(host(&request), expected);
        }
    }
}

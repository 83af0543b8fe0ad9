//! Header fields: ETags and conditions, content negotiation, who asks.

use api::Revision;
use api::kv::{Compare, CompareResult, CompareTarget, TargetUnion};
use bytes::Bytes;
use http::header::{ACCEPT, IF_MATCH, IF_NONE_MATCH};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::operations::{Operation, RequestField};
use super::problem::{NOT_ACCEPTABLE, Problem};

/// The ETag of a key's version: the revision that wrote it, which is unique in the store.
pub(super) fn etag(mod_revision: Revision) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{mod_revision}\"")).expect("digits and quotes are allowed in header fields")
}

/// One entity tag of a client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag {
    /// The revision it stands for; `None` if it is no tag that we would give out, so that no key has it.
    revision: Option<Revision>,
    weak: bool,
}

/// What a conditional header field asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Tags {
    /// `*`: whether the key exists.
    Any,
    Some(Vec<Tag>),
}

/// A request's `If-Match` and `If-None-Match`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Conditions {
    if_match: Option<Tags>,
    if_none_match: Option<Tags>,
}

impl Conditions {
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        Ok(Conditions {
            if_match: tags(headers, &IF_MATCH, "if-match")?,
            if_none_match: tags(headers, &IF_NONE_MATCH, "if-none-match")?,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.if_match.is_none() && self.if_none_match.is_none()
    }

    /// Whether a write that they allow creates the key.
    pub(super) fn is_create_only(&self) -> bool {
        self.if_none_match == Some(Tags::Any)
    }

    /// The same conditions for a transaction, all of which must hold for the key to be written. Of several ETags that may
    /// match, it is that of `seen`, if that is one of them: a transaction asks for one.
    pub(super) fn compares(&self, key: &Bytes, seen: Option<Revision>) -> Vec<Compare> {
        let compare = |result: CompareResult, revision| Compare {
            result: result as i32,
            target: CompareTarget::Mod as i32,
            key: key.clone(),
            target_union: Some(TargetUnion::ModRevision(revision)),
            range_end: Bytes::new(),
        };
        let mut compares = Vec::new();
        match &self.if_match {
            None => {}
            Some(Tags::Any) => compares.push(compare(CompareResult::Greater, 0)),
            // A weak tag never matches here (RFC 9110, 13.1.1), nor does one that is not ours; no key has revision -1.
            Some(Tags::Some(tags)) => {
                let mut strong = tags.iter().filter(|tag| !tag.weak).filter_map(|tag| tag.revision);
                let first = strong.clone().next();
                let revision = strong.find(|revision| Some(*revision) == seen).or(first);
                compares.push(compare(CompareResult::Equal, revision.unwrap_or(-1)));
            }
        }
        match &self.if_none_match {
            None => {}
            Some(Tags::Any) => compares.push(compare(CompareResult::Equal, 0)),
            Some(Tags::Some(tags)) => {
                let ours = tags.iter().filter_map(|tag| tag.revision);
                compares.extend(ours.map(|revision| compare(CompareResult::NotEqual, revision)));
            }
        }
        compares
    }

    /// What they say of a read of a version.
    pub(super) fn of_read(&self, mod_revision: Revision) -> Read {
        let has = |tags: &Tags, weakly: bool| match tags {
            Tags::Any => true,
            Tags::Some(tags) => tags
                .iter()
                .any(|tag| tag.revision == Some(mod_revision) && (weakly || !tag.weak)),
        };
        if self.if_match.as_ref().is_some_and(|tags| !has(tags, false)) {
            Read::Failed
        } else if self.if_none_match.as_ref().is_some_and(|tags| has(tags, true)) {
            Read::NotModified
        } else {
            Read::Wanted
        }
    }

    /// Whether they fail where there is no key.
    pub(super) fn need_key(&self) -> bool {
        self.if_match.is_some()
    }
}

/// Refuses conditions on a write that does not look at them: whoever states one relies on it.
pub(super) fn check_conditions(operation: &Operation, headers: &HeaderMap) -> Result<(), Problem> {
    if operation.method == http::Method::GET {
        return Ok(());
    }
    for (name, shown) in [(IF_MATCH, "if-match"), (IF_NONE_MATCH, "if-none-match")] {
        let takes = |field: &&RequestField| field.name.eq_ignore_ascii_case(shown);
        if headers.contains_key(&name) && !operation.fields.iter().any(takes) {
            let detail = "this operation takes no conditions: use PUT or DELETE of one key, or a transaction";
            return Err(Problem::header(shown, detail));
        }
    }
    Ok(())
}

/// What becomes of a conditional read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    Wanted,
    NotModified,
    Failed,
}

/// The most tags in one condition, so that the transaction that it becomes stays small.
const TAGS_MAX: usize = 32;

fn tags(headers: &HeaderMap, name: &HeaderName, shown: &'static str) -> Result<Option<Tags>, Problem> {
    let mut tags = Vec::new();
    let mut any = false;
    for value in headers.get_all(name) {
        let wrong = |what: &str| {
            Problem::header(
                shown,
                format!("{what}; an ETag is written with its quotes, as in {name}: \"42\""),
            )
        };
        let text = value.to_str().map_err(|_| wrong("it is not text"))?;
        // Lists may have empty elements (RFC 9110, 5.6.1.2), but not be empty.
        let skip = |text: &str| -> usize { text.len() - text.trim_start_matches([',', ' ', '\t']).len() };
        let mut rest = text.trim();
        if rest == "*" {
            any = true;
            continue;
        }
        rest = &rest[skip(rest)..];
        loop {
            let (weak, quoted) = match rest.strip_prefix("W/") {
                Some(quoted) => (true, quoted),
                None => (false, rest),
            };
            let Some((tag, after)) = quoted.strip_prefix('"').and_then(|quoted| quoted.split_once('"')) else {
                return Err(wrong("there is something that is no ETag"));
            };
            if tag.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
                return Err(wrong("there is a character that no ETag has"));
            }
            // Exactly as we write it: "042" is another tag than "42".
            let revision = tag
                .parse()
                .ok()
                .filter(|revision: &i64| revision.to_string() == tag && *revision > 0);
            tags.push(Tag { revision, weak });
            rest = after.trim_start();
            if !rest.is_empty() && !rest.starts_with(',') {
                return Err(wrong("there is something behind an ETag"));
            }
            rest = &rest[skip(rest)..];
            if rest.is_empty() {
                break;
            }
        }
        if tags.len() > TAGS_MAX {
            return Err(Problem::header(shown, format!("there are more than {TAGS_MAX} ETags")));
        }
    }
    match (any, tags.is_empty()) {
        (true, true) => Ok(Some(Tags::Any)),
        (true, false) => Err(Problem::header(shown, "* stands alone")),
        (false, false) => Ok(Some(Tags::Some(tags))),
        (false, true) => Ok(None),
    }
}

/// Chooses the media type that the client likes best among those offered, the first of equals. `Accept` is read as RFC
/// 9110 says, 12.5.1; parameters of media types other than `q` are not looked at.
pub(super) fn negotiate(headers: &HeaderMap, offers: &[&'static str]) -> Result<&'static str, Problem> {
    let mut ranges: Vec<(String, f32)> = Vec::new();
    for value in headers.get_all(ACCEPT) {
        let text = value
            .to_str()
            .map_err(|_| Problem::header("accept", "it is not text"))?;
        for range in text.split(',').map(str::trim).filter(|range| !range.is_empty()) {
            let mut parts = range.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default().to_ascii_lowercase();
            let well_formed = name.split_once('/').is_some_and(|(kind, subtype)| {
                let token =
                    |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
                token(kind) && token(subtype) && (kind != "*" || subtype == "*")
            });
            // A lone * is what some old clients send for */*.
            if !well_formed && name != "*" {
                return Err(Problem::header("accept", format!("{range:?} is no media type")));
            }
            let mut quality = 1.0;
            for parameter in parts {
                let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
                if key.trim().eq_ignore_ascii_case("q") {
                    quality = value
                        .trim()
                        .parse()
                        .ok()
                        .filter(|quality| (0.0..=1.0).contains(quality))
                        .ok_or_else(|| Problem::header("accept", format!("{parameter:?} is no quality from 0 to 1")))?;
                }
            }
            ranges.push((name, quality));
        }
    }
    if ranges.is_empty() {
        return Ok(offers[0]);
    }
    // For each offer the most exact range that fits it counts.
    let quality = |offer: &str| {
        let (offer, _) = offer.split_once(';').unwrap_or((offer, ""));
        let kind = offer.split('/').next().unwrap_or_default();
        let exactness = |range: &str| match range {
            _ if range == offer => Some(3),
            _ if range.strip_suffix("/*") == Some(kind) => Some(2),
            "*/*" | "*" => Some(1),
            _ => None,
        };
        let fitting = ranges
            .iter()
            .filter_map(|(range, quality)| Some((exactness(range)?, *quality)));
        fitting
            .max_by_key(|(exactness, _)| *exactness)
            .map_or(0.0, |(_, quality)| quality)
    };
    let mut best = (0.0, None);
    for offer in offers {
        let quality = quality(offer);
        if quality > best.0 {
            best = (quality, Some(*offer));
        }
    }
    best.1
        .ok_or_else(|| Problem::new(NOT_ACCEPTABLE, format!("this can be had as {}", offers.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_str(value).expect("it fits"),
            )
        });
        pairs.collect()
    }

    #[test]
    fn conditions_become_compares() {
        let key = Bytes::from_static(b"k");
        let compares = |pairs: &[(&'static str, &str)]| {
            let conditions = Conditions::of(&headers(pairs)).expect("they are well formed");
            let compares = conditions.compares(&key, Some(9));
            let plain = |compare: Compare| match compare.target_union {
                Some(TargetUnion::ModRevision(revision)) => (compare.result, revision),
                other => panic!("it compares {other:?}"),
            };
            compares.into_iter().map(plain).collect::<Vec<_>>()
        };
        let (equal, greater, not_equal) = (0, 1, 3);
        assert_eq!(compares(&[]), []);
        assert_eq!(compares(&[("if-match", "\"7\"")]), [(equal, 7)]);
        assert_eq!(compares(&[("if-match", "*")]), [(greater, 0)]);
        assert_eq!(compares(&[("if-match", "W/\"7\"")]), [(equal, -1)]);
        assert_eq!(compares(&[("if-match", "\"07\"")]), [(equal, -1)]);
        assert_eq!(compares(&[("if-match", "\"else\"")]), [(equal, -1)]);
        assert_eq!(compares(&[("if-none-match", "*")]), [(equal, 0)]);
        assert_eq!(
            compares(&[("if-none-match", "\"7\", W/\"8\" ,\"x\"")]),
            [(not_equal, 7), (not_equal, 8)]
        );
        assert_eq!(
            compares(&[("if-match", "\"7\""), ("if-none-match", "\"8\"")]),
            [(equal, 7), (not_equal, 8)]
        );
        // Of several the one that the key was seen to have; the first if it has none of them.
        assert_eq!(compares(&[("if-match", "\"7\", \"9\", W/\"8\"")]), [(equal, 9)]);
        assert_eq!(compares(&[("if-match", "\"7\", \"8\", W/\"9\"")]), [(equal, 7)]);
        assert_eq!(compares(&[("if-match", " ,, \"7\" ,")]), [(equal, 7)]);
    }

    #[test]
    fn malformed_conditions_are_refused() {
        for value in ["7", "\"7", "\"7\" \"8\"", "*, \"7\"", "\"7 8\"", "w/\"7\"", ",", ""] {
            assert!(Conditions::of(&headers(&[("if-match", value)])).is_err(), "{value}");
        }
        let many = vec!["\"7\""; TAGS_MAX + 1].join(",");
        assert!(Conditions::of(&headers(&[("if-none-match", &many)])).is_err());
    }

    #[test]
    fn reads_are_conditional() {
        let read = |pairs: &[(&'static str, &str)]| Conditions::of(&headers(pairs)).expect("well formed").of_read(7);
        assert_eq!(read(&[]), Read::Wanted);
        assert_eq!(read(&[("if-none-match", "\"6\"")]), Read::Wanted);
        assert_eq!(read(&[("if-none-match", "\"6\", \"7\"")]), Read::NotModified);
        assert_eq!(read(&[("if-none-match", "W/\"7\"")]), Read::NotModified);
        assert_eq!(read(&[("if-none-match", "*")]), Read::NotModified);
        assert_eq!(read(&[("if-match", "\"6\"")]), Read::Failed);
        assert_eq!(read(&[("if-match", "W/\"7\"")]), Read::Failed);
        assert_eq!(read(&[("if-match", "*")]), Read::Wanted);
    }

    #[test]
    fn the_best_media_type_is_chosen() {
        const OFFERS: &[&str] = &[
            "text/plain; charset=utf-8",
            "application/octet-stream",
            "application/json",
        ];
        let choose = |accept: &str| negotiate(&headers(&[("accept", accept)]), OFFERS).ok();
        assert_eq!(negotiate(&HeaderMap::new(), OFFERS).ok(), Some(OFFERS[0]));
        assert_eq!(choose("*/*"), Some(OFFERS[0]));
        assert_eq!(choose("*"), Some(OFFERS[0]));
        assert_eq!(choose("application/json"), Some(OFFERS[2]));
        assert_eq!(choose("application/*"), Some(OFFERS[1]));
        assert_eq!(choose("text/html, application/xhtml+xml, */*;q=0.8"), Some(OFFERS[0]));
        assert_eq!(choose("text/plain;q=0.5, application/json;q=0.6"), Some(OFFERS[2]));
        assert_eq!(choose("text/plain;q=0, */*;q=0.1"), Some(OFFERS[1]));
        assert_eq!(choose("Application/JSON; indent=2"), Some(OFFERS[2]));
        for refused in [
            "image/png",
            "application/json;q=0",
            "application/json;q=2",
            "json",
            "*/json",
            "a/b/c",
        ] {
            assert_eq!(choose(refused), None, "{refused}");
        }
    }
}

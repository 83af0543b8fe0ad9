//! The URLs that members are reached at, held against what etcd takes (`types.NewURLs`, on Go's `net/url`).
//!
//! A member's id is a hash of its URLs' text, so what is taken and how it is written then must be as in etcd. What no
//! peer's URL has a use for, a user and a fragment, is written as it came, where Go would escape it anew.

use std::net::Ipv6Addr;

/// The URLs as etcd writes them, in the order of their text; `None` if there are none or etcd refuses one of them.
pub(super) fn sorted(given: &[String]) -> Option<Vec<String>> {
    let mut urls: Vec<String> = given.iter().map(|url| canonical(url.trim())).collect::<Option<_>>()?;
    urls.sort_unstable();
    (!urls.is_empty()).then_some(urls)
}

fn canonical(text: &str) -> Option<String> {
    if text.bytes().any(|byte| byte.is_ascii_control()) {
        return None;
    }
    let (text, fragment) = text.split_once('#').unwrap_or((text, ""));
    let (scheme, rest) = text.split_once(':')?;
    let scheme = scheme.to_ascii_lowercase();
    let mut url = match &*scheme {
        "http" | "https" => {
            let (authority, query) = match rest.find('?') {
                Some(at) => rest.split_at(at),
                None => (rest, ""),
            };
            format!("{scheme}://{}{query}", authority_of(authority.strip_prefix("//")?)?)
        }
        // A path or a name, whichever: Go passes both through.
        "unix" | "unixs" if are_escapes_whole(rest) => format!("{scheme}:{rest}"),
        _ => return None,
    };
    if !are_escapes_whole(fragment) {
        return None;
    }
    if !fragment.is_empty() {
        url.push('#');
        url.push_str(fragment);
    }
    Some(url)
}

/// `[user@]host:port`, and nothing after it: the path of a peer's URL must be empty.
fn authority_of(authority: &str) -> Option<String> {
    let (user, address) = match authority.rsplit_once('@') {
        Some((user, address)) => (Some(user), address),
        None => (None, authority),
    };
    // The port may be missing, its colon not. Go does not ask whether the number is one of a port.
    let (host, port) = address.rsplit_once(':')?;
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let host = match host.strip_prefix('[') {
        Some(bracketed) => ipv6(bracketed.strip_suffix(']')?)?,
        None if host.contains(['[', ']', ':']) => return None,
        None => host_name(host)?,
    };
    let user = match user {
        Some(user) if !user.bytes().all(is_of_user) || !are_escapes_whole(user) => return None,
        Some(user) => format!("{user}@"),
        None => String::new(),
    };
    Some(format!("{user}{host}:{port}"))
}

fn ipv6(text: &str) -> Option<String> {
    let (address, zone) = text.split_once("%25").unwrap_or((text, "some"));
    address.parse::<Ipv6Addr>().ok()?;
    (!zone.is_empty()).then(|| format!("[{text}]"))
}

/// A host name with all that is not ASCII escaped, as Go writes it.
fn host_name(text: &str) -> Option<String> {
    let mut name = String::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                let escaped = u8::try_from(digit()? << 4 | digit()?).ok()?;
                // Of ASCII only the percent sign itself may be escaped.
                if escaped.is_ascii() && escaped != b'%' {
                    return None;
                }
                escaped
            }
            byte if byte.is_ascii() && !is_of_host(byte) => return None,
            byte => byte,
        };
        if is_of_host(byte) {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    Some(name)
}

/// Whether two hexadecimal digits follow every percent sign.
fn are_escapes_whole(text: &str) -> bool {
    let is_whole = |rest: &str| matches!(rest.as_bytes(), [a, b, ..] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit());
    text.split('%').skip(1).all(is_whole)
}

fn is_of_host(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=<>\"".contains(&byte)
}

fn is_of_user(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:%@".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(url: &str) -> Option<String> {
        sorted(&[url.to_owned()]).map(|urls| urls[0].clone())
    }

    #[test]
    fn takes_and_writes_what_etcd_does() {
        for (given, written) in [
            ("http://10.0.0.1:2380", "http://10.0.0.1:2380"),
            ("  https://a.example:2380\t", "https://a.example:2380"),
            ("HTTP://Host:1", "http://Host:1"),
            ("http://:2380", "http://:2380"),
            ("http://a:", "http://a:"),
            ("http://a:99999", "http://a:99999"),
            ("http://[::1]:2380", "http://[::1]:2380"),
            ("http://[fe80::1%25en0]:2380", "http://[fe80::1%25en0]:2380"),
            ("http://u:p@a:1", "http://u:p@a:1"),
            ("http://a:1?x=y", "http://a:1?x=y"),
            ("http://a:1?", "http://a:1?"),
            ("http://a:1#", "http://a:1"),
            ("http://é:1", "http://%C3%A9:1"),
            ("http://%c3%a9:1", "http://%C3%A9:1"),
            ("unix://localhost:12345", "unix://localhost:12345"),
            ("unixs:/tmp/socket", "unixs:/tmp/socket"),
            ("http://[::ffff:1.2.3.4]:1", "http://[::ffff:1.2.3.4]:1"),
            ("http://a%25b:1", "http://a%25b:1"),
            ("http://a:1#f", "http://a:1#f"),
        ] {
            assert_eq!(one(given).as_deref(), Some(written), "{given}");
        }
    }

    #[test]
    fn refuses_what_etcd_does() {
        for given in [
            "",
            "nonsense",
            "10.0.0.1:2380",
            "a:2380",
            "http:",
            "http:a:1",
            "http:/a:1",
            "http://",
            "http://a",
            "http://a:1/",
            "http://a:1/path",
            "http://a:b",
            "http://a:-1",
            "http://::1:2380",
            "http://[::1]",
            "http://[::1:2380",
            "http://[name]:1",
            "http://[1.2.3.4]:1",
            "http://[::1%25]:1",
            "http://[]:1",
            "http://a]:1",
            "http://u%zz@a:1",
            "http://a:1#%zz",
            "unix://%zz",
            "http://a b:1",
            "http://a%20b:1",
            "http://a%zz:1",
            "http://a\u{7f}:1",
            "http://a|b@c:1",
            "ftp://a:1",
            "://a:1",
        ] {
            assert_eq!(one(given), None, "{given}");
        }
        assert_eq!(sorted(&[]), None);
        assert_eq!(
            sorted(&["http://a:1".into(), "http://a".into()]),
            None,
            "one bad is all bad"
        );
    }

    #[test]
    fn orders_by_text() {
        let given = ["http://b:1", "https://a:1", "http://a:2", "http://a:10"].map(str::to_owned);
        let sorted = sorted(&given).expect("good");
        assert_eq!(sorted, ["http://a:10", "http://a:2", "http://b:1", "https://a:1"]);
    }
}

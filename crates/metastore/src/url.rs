//! Listen and advertise URLs, in the forms that etcd takes.

use std::fmt;

/// How a URL is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scheme {
    /// TCP, plaintext.
    Http,
    /// TCP with TLS.
    Https,
    /// A Unix socket, plaintext.
    Unix,
    /// A Unix socket with TLS.
    Unixs,
}

impl Scheme {
    /// The scheme as it is written in a URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
            Scheme::Unix => "unix",
            Scheme::Unixs => "unixs",
        }
    }

    /// Whether connections are encrypted.
    pub fn is_tls(self) -> bool {
        matches!(self, Scheme::Https | Scheme::Unixs)
    }
}

/// One URL. It prints as it was written, since clients compare what a member advertises as text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Url {
    text: String,
    scheme: Scheme,
    host: String,
    port: u16,
    path: String,
}

impl Url {
    /// Parses `scheme://host:port`, `unix://path` or `unix:path`.
    pub fn parse(text: &str) -> Result<Url, String> {
        let text = text.trim();
        // Else an error would not be one line, which the fuzzer found.
        if text.contains(char::is_control) {
            return Err(format!("URL holds a control character: {text:?}"));
        }
        let wrong_scheme = || format!("URL scheme must be http, https, unix or unixs: {text}");
        let (scheme, rest) = text.split_once(':').ok_or_else(wrong_scheme)?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            "unix" => Scheme::Unix,
            "unixs" => Scheme::Unixs,
            _ => return Err(wrong_scheme()),
        };
        if matches!(scheme, Scheme::Unix | Scheme::Unixs) {
            let path = rest.strip_prefix("//").unwrap_or(rest);
            if path.is_empty() {
                return Err(format!("URL names no socket file: {text}"));
            }
            let (host, port) = (String::new(), 0);
            return Ok(Url {
                text: text.to_owned(),
                scheme,
                host,
                port,
                path: path.to_owned(),
            });
        }
        let wrong_address = || format!("URL address must have the form \"host:port\": {text}");
        let address = rest.strip_prefix("//").ok_or_else(wrong_address)?;
        if address.contains(['/', '?', '#', '@']) {
            return Err(format!("URL must be scheme, host and port, and nothing more: {text}"));
        }
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong_address)?;
        let host = match host.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']').ok_or_else(wrong_address)?,
            None if host.contains(':') => return Err(wrong_address()),
            None => host,
        };
        let port = port.parse().map_err(|_| wrong_address())?;
        Ok(Url {
            text: text.to_owned(),
            scheme,
            host: host.to_owned(),
            port,
            path: String::new(),
        })
    }

    /// Parses a comma-separated list, sorts it and drops doubles, as etcd does before it shows the list to clients.
    pub fn parse_list(text: &str) -> Result<Vec<Url>, String> {
        let mut urls = text.split(',').map(Url::parse).collect::<Result<Vec<_>, _>>()?;
        urls.sort();
        urls.dedup();
        Ok(urls)
    }

    /// How the URL is reached.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The host, without the brackets of an IPv6 address; empty for a Unix socket.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port; 0 for a Unix socket.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `host:port` as it is dialled and bound, an IPv6 address in its brackets; empty for a Unix socket.
    pub fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false if self.path.is_empty() => format!("{}:{}", self.host, self.port),
            false => String::new(),
        }
    }

    /// The file of a Unix socket, relative to the working directory unless it starts with a slash; empty for TCP.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The URL as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Checks that one can listen here: names are not resolved for listening, so that what is bound is never a
    /// surprise.
    pub fn check_bind(&self) -> Result<(), String> {
        let tcp = matches!(self.scheme, Scheme::Http | Scheme::Https);
        if !tcp || self.host == "localhost" || self.host.parse::<std::net::IpAddr>().is_ok() {
            Ok(())
        } else {
            Err(format!("expected an IP address or localhost to listen on, got {self}"))
        }
    }

    /// Checks that others can be told this address.
    pub fn check_advertise(&self) -> Result<(), String> {
        let tcp = matches!(self.scheme, Scheme::Http | Scheme::Https);
        if tcp && self.host.is_empty() {
            Err(format!("the host is empty in {self}"))
        } else {
            Ok(())
        }
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_etcd_takes() {
        let url = Url::parse(" http://[::1]:2379 ").unwrap();
        assert_eq!((url.scheme(), url.host(), url.port()), (Scheme::Http, "::1", 2379));
        assert_eq!(url.as_str(), "http://[::1]:2379");
        assert_eq!(url.authority(), "[::1]:2379");
        assert_eq!(Url::parse("http://localhost:1").unwrap().authority(), "localhost:1");
        let unix = Url::parse("unix://localhost:20000").unwrap();
        assert_eq!((unix.scheme(), unix.path()), (Scheme::Unix, "localhost:20000"));
        assert_eq!(Url::parse("unixs:/run/metastore").unwrap().path(), "/run/metastore");
    }

    #[test]
    fn refuses_the_rest() {
        for (text, part) in [
            ("localhost:2379", "scheme"),
            ("ftp://localhost:1", "scheme"),
            ("http://localhost", "host:port"),
            ("http://localhost:99999", "host:port"),
            ("http://::1:2379", "host:port"),
            ("http://localhost:1/x", "nothing more"),
            ("unix://", "socket file"),
            ("unix://a\nb", "control character"),
            (":a\r\n:b", "control character"),
        ] {
            let error = Url::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn lists_are_sorted_and_unique() {
        let urls = Url::parse_list("http://b:1, http://a:2,http://b:1").unwrap();
        assert_eq!(
            urls.iter().map(Url::as_str).collect::<Vec<_>>(),
            ["http://a:2", "http://b:1"]
        );
    }

    #[test]
    fn listens_on_addresses_only() {
        assert!(Url::parse("http://0.0.0.0:1").unwrap().check_bind().is_ok());
        assert!(Url::parse("http://example.com:1").unwrap().check_bind().is_err());
        assert!(Url::parse("http://:1").unwrap().check_bind().is_err());
        assert!(Url::parse("http://:1").unwrap().check_advertise().is_err());
    }
}

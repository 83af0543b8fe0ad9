//! Where a server is: `host:port`, `http://host:port` or `https://host:port`.

use std::fmt;

/// One server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) tls: bool,
    /// Without the brackets of an IPv6 address.
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl Endpoint {
    /// Reads one endpoint; without a scheme it is TLS if `tls` says so.
    pub(crate) fn parse(text: &str, tls: bool) -> Result<Self, String> {
        let (tls, rest) = match text.split_once("://") {
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            Some((scheme, _)) => return Err(format!("endpoint {text:?}: unknown scheme {scheme:?}: http or https")),
            None => (tls, text),
        };
        let authority: http::uri::Authority = rest
            .trim_end_matches('/')
            .parse()
            .map_err(|error| format!("endpoint {text:?}: {error}"))?;
        let host = authority.host().trim_matches(['[', ']']);
        if host.is_empty() {
            return Err(format!("endpoint {text:?} names no host"));
        }
        Ok(Endpoint {
            tls,
            host: host.to_owned(),
            port: authority.port_u16().unwrap_or(2379),
        })
    }

    /// Reads a list divided by commas, of at least one.
    pub(crate) fn parse_list(text: &str, tls: bool) -> Result<Vec<Self>, String> {
        text.split(',').map(|one| Endpoint::parse(one.trim(), tls)).collect()
    }

    /// `host:port`, as requests name it.
    pub(crate) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme(), self.authority())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        let written = |text, tls| Endpoint::parse(text, tls).map(|endpoint| endpoint.to_string());
        assert_eq!(written("localhost:2379", false).unwrap(), "http://localhost:2379");
        assert_eq!(written("localhost", true).unwrap(), "https://localhost:2379");
        assert_eq!(written("http://[::1]:1/", true).unwrap(), "http://[::1]:1");
        assert!(written("ftp://x", false).is_err());
        assert!(written("", false).is_err());
        assert!(written("a b", false).is_err());
        assert_eq!(Endpoint::parse_list("a:1, b:2", false).unwrap().len(), 2);
        assert!(Endpoint::parse_list("a:1,", false).is_err());
    }
}

//! The configuration file: YAML with etcd's keys, which are the flags' names but for a few maps.

use serde_norway::Value as Yaml;

use super::table::{self, Flag};
use super::{Failure, Kind, Settings, Source};

/// Flags that etcd does not read from the file. Its own sample sets the one to a value that the flag refuses.
const NOT_IN_FILE: [&str; 3] = ["discovery-fallback", "config-file", "version"];

/// Reads the file into settings of its own: flags and environment variables play no part.
pub(super) fn load(path: &str) -> Result<Settings, Failure> {
    let text =
        std::fs::read_to_string(path).map_err(|error| Failure::config(format!("config file {path}: {error}")))?;
    let mut settings = parse(&text).map_err(|error| Failure::config(format!("config file {path}: {error}")))?;
    settings.inform(format!(
        "loaded server configuration from {path}; all flags and environment variables are ignored if there are any"
    ));
    Ok(settings)
}

pub(crate) fn parse(text: &str) -> Result<Settings, String> {
    let mut settings = Settings::default();
    match serde_norway::from_str(text).map_err(|error| error.to_string().replace('\n', " "))? {
        Yaml::Null => {}
        Yaml::Mapping(map) => keys(&mut settings, "", &map)?,
        _ => return Err("must hold keys and values".to_owned()),
    }
    Ok(settings)
}

/// Reads one map; `outer` is the key that holds it, with a dot behind, or nothing.
fn keys(settings: &mut Settings, outer: &str, map: &serde_norway::Mapping) -> Result<(), String> {
    for (key, value) in map {
        let key = key.as_str().ok_or("every key must be a text")?;
        let path = format!("{outer}{key}");
        if let Yaml::Mapping(inner) = value
            && is_map(&path)
        {
            keys(settings, &format!("{path}."), inner)?;
        } else if path == "client-transport-security.allowed-cn" {
            let text = text_of(Kind::List, value).map_err(|error| format!("{path} {error}"))?;
            let names = text.iter().flat_map(|text| text.split(',')).map(str::trim);
            settings.client_allowed_cn = names.filter(|name| !name.is_empty()).map(str::to_owned).collect();
        } else if let Some(flag) = flag_of(&path) {
            if let Some(text) = text_of(flag.kind, value).map_err(|error| format!("{path} {error}"))? {
                let parsed = flag
                    .kind
                    .parse(&text)
                    .map_err(|error| format!("{path} {error}, not {text:?}"))?;
                settings.set(flag, parsed, Source::File(path));
            }
        } else if !(is_map(&path) && value.is_null()) {
            if is_map(&path) {
                return Err(format!("{path} must hold keys and values"));
            }
            let nearest = table::nearest(key)
                .map(|near| format!("; the nearest one is {near}"))
                .unwrap_or_default();
            settings.warn(format!("unknown key {path} in the config file is ignored{nearest}"));
        }
    }
    Ok(())
}

fn is_map(path: &str) -> bool {
    matches!(
        path,
        "client-transport-security"
            | "peer-transport-security"
            | "socket-options"
            | "discovery-config"
            | "discovery-config.client"
            | "discovery-config.client.secure"
            | "discovery-config.client.auth"
    )
}

/// The flag that a key means.
fn flag_of(path: &str) -> Option<&'static Flag> {
    let name = match path.split_once('.') {
        None if NOT_IN_FILE.contains(&path) => return None,
        None => path.to_owned(),
        Some(("client-transport-security", "allowed-hostname")) => "client-cert-allowed-hostname".into(),
        Some(("client-transport-security", key)) => key.to_owned(),
        Some(("peer-transport-security", "allowed-cn")) => "peer-cert-allowed-cn".into(),
        Some(("peer-transport-security", "allowed-hostname")) => "peer-cert-allowed-hostname".into(),
        Some(("peer-transport-security", key)) => format!("peer-{key}"),
        Some(("socket-options", key)) => format!("socket-{key}"),
        Some(("discovery-config", "token")) => "discovery-token".into(),
        Some(("discovery-config", key)) => match key.strip_prefix("client.")? {
            "auth.username" => "discovery-user".into(),
            "auth.password" => "discovery-password".into(),
            key => match key.strip_prefix("secure.") {
                Some(key @ ("cert" | "key" | "cacert" | "insecure-transport" | "insecure-skip-tls-verify")) => {
                    format!("discovery-{key}")
                }
                None if matches!(
                    key,
                    "endpoints" | "dial-timeout" | "request-timeout" | "keepalive-time" | "keepalive-timeout"
                ) =>
                {
                    format!("discovery-{key}")
                }
                _ => return None,
            },
        },
        Some(_) => return None,
    };
    table::find(&name)
}

/// The value as it would be written on a command line; nothing for null, which leaves the default.
fn text_of(kind: Kind, value: &Yaml) -> Result<Option<String>, String> {
    Ok(Some(match (kind, value) {
        (_, Yaml::Null) => return Ok(None),
        (Kind::Duration, Yaml::Number(nanoseconds)) => format!("{nanoseconds}ns"),
        (_, Yaml::Bool(value)) => value.to_string(),
        (_, Yaml::Number(value)) => value.to_string(),
        (_, Yaml::String(value)) => value.clone(),
        (Kind::List | Kind::Urls, Yaml::Sequence(items)) => {
            let texts: Result<Vec<_>, _> = items.iter().map(|item| text_of(Kind::Text, item)).collect();
            texts?.into_iter().flatten().collect::<Vec<_>>().join(",")
        }
        (_, Yaml::Sequence(_) | Yaml::Mapping(_) | Yaml::Tagged(_)) => return Err("must be a single value".to_owned()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_form_of_value() {
        let settings = parse(
            "name: 7\n\
             data-dir:\n\
             heartbeat-interval: 50\n\
             pre-vote: false\n\
             warning-apply-duration: 250000000\n\
             grpc-keepalive-timeout: 1m30s\n\
             listen-client-urls: http://127.0.0.1:2, http://127.0.0.1:1\n\
             log-outputs: [stderr, /tmp/x]\n\
             auto-compaction-retention: 1\n\
             rocksdb-block-cache-bytes: 1GiB\n\
             socket-options: {reuse-port: true}\n",
        )
        .unwrap();
        assert_eq!(settings.text("name"), "7");
        assert!(!settings.is_set("data-dir"));
        assert_eq!(settings.number("heartbeat-interval"), 50);
        assert!(!settings.boolean("pre-vote") && settings.boolean("socket-reuse-port"));
        assert_eq!(settings.duration_ns("warning-apply-duration"), 250_000_000);
        assert_eq!(settings.duration_ns("grpc-keepalive-timeout"), 90_000_000_000);
        assert_eq!(settings.urls("listen-client-urls").len(), 2);
        assert_eq!(settings.list("log-outputs"), ["stderr", "/tmp/x"]);
        assert_eq!(settings.text("auto-compaction-retention"), "1");
        assert_eq!(settings.number("rocksdb-block-cache-bytes"), 1 << 30);
        assert_eq!(
            settings.source("socket-reuse-port"),
            &Source::File("socket-options.reuse-port".into())
        );
        assert!(settings.notes.is_empty());
    }

    #[test]
    fn transport_security_becomes_flags() {
        let settings = parse(
            "client-transport-security: {cert-file: c, client-cert-auth: true, key-file: , allowed-cn: [x, y]}\n\
             peer-transport-security: {cert-file: p, allowed-cn: [a, b]}\n\
             discovery-config: {token: t, client: {endpoints: [e], dial-timeout: 1500000000,\n\
             \x20 secure: {cert: dc, insecure-transport: false, server-name: s}, auth: {username: u, password: p}}}\n",
        )
        .unwrap();
        assert_eq!(
            (settings.text("cert-file"), settings.text("peer-cert-file")),
            ("c", "p")
        );
        assert!(settings.boolean("client-cert-auth"));
        assert_eq!(settings.list("peer-cert-allowed-cn"), ["a", "b"]);
        assert_eq!(settings.client_allowed_cn, ["x", "y"]);
        assert_eq!(
            (
                settings.text("discovery-token"),
                settings.list("discovery-endpoints").len()
            ),
            ("t", 1)
        );
        assert_eq!(settings.duration_ns("discovery-dial-timeout"), 1_500_000_000);
        assert!(!settings.boolean("discovery-insecure-transport"));
        let texts = ["cert", "user", "password"].map(|name| settings.text(&format!("discovery-{name}")));
        assert_eq!(texts, ["dc", "u", "p"]);
        assert_eq!(settings.notes.len(), 1, "{:?}", settings.notes);
        assert!(
            settings.notes[0]
                .message
                .contains("discovery-config.client.secure.server-name")
        );
    }

    #[test]
    fn unknown_keys_warn_and_name_the_nearest() {
        let settings = parse("data-dri: x\nproxy: 'off'\ndiscovery-fallback: proxy\n").unwrap();
        assert_eq!(settings.notes.len(), 3);
        assert!(settings.notes[0].message.contains("data-dri") && settings.notes[0].message.contains("data-dir"));
    }

    #[test]
    fn wrong_values_name_their_key() {
        for (text, part) in [
            ("heartbeat-interval: x", "heartbeat-interval"),
            ("name: {a: b}", "name"),
            ("peer-transport-security: 3", "peer-transport-security"),
            ("pre-vote: 2", "pre-vote"),
            ("- a", "keys and values"),
            ("a: b: c", "line 1"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part) && !error.contains('\n'), "{text}: {error}");
        }
        assert!(parse("").is_ok());
    }
}

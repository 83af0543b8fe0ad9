//! Holds docs/etcd-compatibility.md to the code: every flag with what becomes of it, every method and every metric.

use std::collections::BTreeSet;
use std::path::PathBuf;

use metastore::flags::{FLAGS, Status};

/// From the package's folder, in which cargo runs tests. A path that is compiled in could be that of another checkout, whose
/// target folder this one shares.
fn root() -> PathBuf {
    PathBuf::from("../..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn page() -> String {
    read("docs/etcd-compatibility.md")
}

/// The texts between quotes in a source file.
fn quoted(source: &str) -> impl Iterator<Item = &str> {
    source.split('"').skip(1).step_by(2)
}

#[test]
fn every_flag_is_on_the_page_with_what_becomes_of_it() {
    let page = page();
    for flag in FLAGS {
        let name = format!("| `--{}` |", flag.name);
        let row = page.lines().find(|line| line.starts_with(&name));
        let row = row.unwrap_or_else(|| panic!("--{} has no row", flag.name));
        match flag.status {
            Status::Works => assert!(!row.contains("no effect") && !row.contains("refused if set"), "{row}"),
            Status::NoEffect(reason) => assert!(row.contains("no effect") && row.contains(reason), "{row}: {reason}"),
            Status::Refused(reason) => assert!(row.contains("refused") && row.contains(reason), "{row}: {reason}"),
        }
    }
    let names: BTreeSet<_> = FLAGS.iter().map(|flag| flag.name).collect();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("| `--") {
            let name = rest.split('`').next().unwrap_or_default();
            assert!(names.contains(name), "there is no flag --{name}");
        }
    }
}

#[test]
fn every_method_is_on_the_page() {
    let page = page();
    for proto in ["rpc.proto", "v3lock.proto", "v3election.proto", "health.proto"] {
        let source = read(&format!("crates/frontend/proto/{proto}"));
        let mut package = "";
        let mut service = "";
        let mut methods = 0;
        for line in source.lines().map(str::trim) {
            let word = |line: &str| line.split([' ', '(', '{', ';']).next().unwrap_or_default().to_owned();
            if let Some(rest) = line.strip_prefix("package ") {
                package = rest.trim_end_matches(';');
            } else if let Some(rest) = line.strip_prefix("service ") {
                service = rest.split([' ', '{']).next().unwrap_or_default();
            } else if let Some(rest) = line.strip_prefix("rpc ") {
                methods += 1;
                let row = format!("| `{package}.{service}/{}` |", word(rest));
                assert!(page.contains(&row), "{row} is missing");
            }
        }
        assert!(methods > 0, "{proto} has methods");
    }
}

#[test]
fn every_metric_is_on_the_page() {
    let page = page();
    let mut names = BTreeSet::new();
    for path in ["crates/server/src/metrics.rs", "crates/server/src/metrics/absent.rs"] {
        let source = read(path);
        let prefixes = ["etcd_", "grpc_server_", "go_", "os_fd_", "promhttp_"];
        let is_metric = |text: &&str| {
            prefixes.iter().any(|prefix| text.starts_with(prefix))
                && text
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        };
        names.extend(quoted(&source).filter(is_metric).map(str::to_owned));
    }
    assert!(names.len() > 100, "only {} metrics were found", names.len());
    let missing: Vec<_> = names
        .iter()
        .filter(|name| !page.contains(&format!("`{name}`")))
        .collect();
    assert!(missing.is_empty(), "not on the page: {missing:?}");
}

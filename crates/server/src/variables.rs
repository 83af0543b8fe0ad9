//! What `/debug/vars` says of the process.

use serde_json::{Value, json};

/// All that is known, by the names that etcd has for it.
pub(crate) fn all() -> Vec<(&'static str, Value)> {
    let mut variables = vec![("cmdline", std::env::args().collect())];
    if let Some(limit) = file_descriptors_max() {
        variables.push(("file_descriptor_limit", json!(limit)));
    }
    // Go's runtime knows more, but this is what there is without one: the bytes that the process holds.
    if let Some(bytes) = resident_bytes() {
        variables.push(("memstats", json!({ "Sys": bytes })));
    }
    variables
}

fn file_descriptors_max() -> Option<u64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_those_of_this_process() {
        let all = all();
        let value = |name: &str| &all.iter().find(|(known, _)| *known == name).expect(name).1;
        assert!(value("cmdline")[0].as_str().expect("text").contains("metastore_server"));
        assert!(value("file_descriptor_limit").as_u64().expect("a number") > 2);
        assert!(value("memstats")["Sys"].as_u64().expect("a number") > 1 << 20);
    }
}

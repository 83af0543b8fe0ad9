//! The real binary's answers to a command line: exit codes, and what it prints where.

use std::process::{Command, Output};

fn metastore(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metastore"));
    command.args(args).env_clear().envs(env.iter().copied());
    command.output().expect("the binary runs")
}

/// Checks that the binary ends with this code, nothing on standard output and one line, which holds `part`.
fn refuses(args: &[&str], env: &[(&str, &str)], code: i32, part: &str) {
    let output = metastore(args, env);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty());
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.starts_with("metastore: ") && stderr.contains(part),
        "{args:?}: {stderr}"
    );
}

#[test]
fn an_unknown_flag_exits_2_and_names_the_nearest() {
    refuses(&["--data-dri=/tmp/x"], &[], 2, "nearest one is --data-dir");
    refuses(
        &["--experimental-corrupt-check-time=1s"],
        &[],
        2,
        "--corrupt-check-time",
    );
}

#[test]
fn what_does_not_parse_exits_2_and_what_cannot_be_used_1() {
    refuses(&["--heartbeat-interval=fast"], &[], 2, "-heartbeat-interval");
    refuses(&["--name"], &[], 2, "needs a value");
    refuses(&["start"], &[], 1, "\"start\"");
    refuses(&["--pre-vote", "false"], &[], 1, "\"false\"");
    refuses(&["--heartbeat-interval=1000"], &[], 1, "--election-timeout");
    refuses(&["--cert-file=c"], &[], 1, "KeyFile and CertFile must both be present");
    refuses(
        &["--initial-cluster=a=http://a:1,b=http://b:1"],
        &[],
        1,
        "does not include",
    );
    refuses(&["--config-file=/nonexistent/file"], &[], 1, "/nonexistent/file");
    refuses(&["--log-outputs=/nonexistent/file"], &[], 1, "/nonexistent/file");
}

#[test]
fn variables_conflict_with_flags_and_with_each_other() {
    refuses(&["--name=a"], &[("ETCD_NAME", "a")], 1, "ETCD_NAME");
    refuses(&[], &[("METASTORE_NAME", "a"), ("ETCD_NAME", "b")], 1, "METASTORE_NAME");
    refuses(
        &[],
        &[("ETCD_DISCOVERY_FALLBACK", "proxy")],
        1,
        "ETCD_DISCOVERY_FALLBACK (--discovery-fallback)",
    );
}

#[test]
fn the_file_wins_and_names_its_key() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "batch-ops-max: 0\n").unwrap();
    let path = file.path().to_str().unwrap();
    refuses(
        &["--config-file", path, "--auth-token=simple"],
        &[],
        1,
        "batch-ops-max in the config file",
    );
    refuses(
        &[],
        &[("ETCD_CONFIG_FILE", path), ("ETCD_NAME", "x")],
        1,
        "batch-ops-max in the config file",
    );
}

#[test]
fn help_and_version_exit_0() {
    for args in [&["help"][..], &["-h"], &["--help"], &["--name=x", "--help"]] {
        let output = metastore(args, &[]);
        assert!(output.status.success() && output.stderr.is_empty());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("--listen-client-urls") && text.contains("--rocksdb-block-cache-bytes"));
    }
    for args in [&["version"][..], &["--version"]] {
        let output = metastore(args, &[]);
        assert!(output.status.success());
        assert!(
            String::from_utf8(output.stdout)
                .unwrap()
                .starts_with("etcd Version: 3.")
        );
    }
}

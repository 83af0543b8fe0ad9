//! The command line, in the syntax of Go's `flag` package, and the environment.

use std::collections::HashSet;

use super::table::{self, FLAGS, Flag, IGNORED};
use super::{Command, Failure, Kind, Settings, Source, file, help, version};

/// The prefixes of our environment variables. For one flag, variables of both must agree.
const PREFIXES: [&str; 2] = ["METASTORE_", "ETCD_"];

/// Variables that etcd reads for other ends than setting a flag.
const NOT_FLAGS: [&str; 1] = ["ETCD_UNSUPPORTED_ARCH"];

/// Reads the arguments (without the program's name) and those environment variables that bear one of our prefixes.
///
/// As with etcd: the last of several equal flags wins; a variable for a flag that is also on the command line is an
/// error; a configuration file puts all flags and variables out of force.
pub fn load(args: &[String], env: &[(String, String)]) -> Result<Command, Failure> {
    match args.first().map(String::as_str) {
        Some("help") => return Ok(Command::Print(help())),
        Some("version") => return Ok(Command::Print(version())),
        Some(name @ ("gateway" | "grpc-proxy")) => {
            return Err(Failure::config(format!(
                "the subcommand {name} comes later; see 'metastore help'"
            )));
        }
        _ => {}
    }
    let mut settings = Settings::default();
    if !command_line(args, &mut settings)? {
        return Ok(Command::Print(help()));
    }
    if settings.boolean("version") {
        return Ok(Command::Print(version()));
    }
    let config_file = match settings.text("config-file") {
        "" => from_environment("config-file", env)?.map(|(_, value)| value.to_owned()),
        path => Some(path.to_owned()),
    };
    match config_file {
        Some(path) => file::load(&path).map(Command::Start),
        None => {
            environment(env, &mut settings)?;
            Ok(Command::Start(settings))
        }
    }
}

/// Returns false when the help was asked for.
fn command_line(args: &[String], settings: &mut Settings) -> Result<bool, Failure> {
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if arg == "--" {
            break;
        }
        let Some(text) = arg.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
            return Err(stray(arg));
        };
        let text = text.strip_prefix('-').unwrap_or(text);
        if text.is_empty() || text.starts_with(['-', '=']) {
            return Err(Failure::syntax(format!("bad flag syntax: {arg}")));
        }
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        let Some(flag) = table::find(name) else {
            if matches!(name, "h" | "help") {
                return Ok(false);
            }
            if IGNORED.contains(&name) {
                settings.warn(format!("flag --{name} is no longer supported: it is ignored"));
                continue;
            }
            return Err(unknown(name));
        };
        let value = match (value, flag.kind) {
            (Some(value), _) => value,
            (None, Kind::Bool) => "true",
            (None, _) => match args.next() {
                Some(value) => value,
                None => return Err(Failure::syntax(format!("flag --{name} needs a value"))),
            },
        };
        let parsed = flag.kind.parse(value).map_err(|error| {
            Failure::syntax(format!(
                // Go's words, dash included.
                "invalid value {value:?} for flag -{name}: {}",
                explain(flag, &error)
            ))
        })?;
        settings.set(flag, parsed, Source::CommandLine);
    }
    match args.next() {
        Some(arg) => Err(stray(arg)),
        None => Ok(true),
    }
}

fn explain(flag: &Flag, error: &str) -> String {
    match flag.unit {
        "" => error.to_owned(),
        unit => format!("{error} (unit: {unit})"),
    }
}

fn stray(arg: &str) -> Failure {
    Failure::config(format!(
        "{arg:?} is neither a flag nor a subcommand; a boolean flag takes its value after '='"
    ))
}

fn unknown(name: &str) -> Failure {
    let nearest = table::nearest(name)
        .map(|near| format!("; the nearest one is --{near}"))
        .unwrap_or_default();
    Failure::syntax(format!("unknown flag --{name}{nearest} ('metastore --help' lists all)"))
}

fn variable(prefix: &str, flag: &str) -> String {
    format!("{prefix}{}", flag.to_ascii_uppercase().replace('-', "_"))
}

/// The variable that sets a flag, with its value. An empty one counts as absent, as it does in etcd.
fn from_environment<'a>(flag: &str, env: &'a [(String, String)]) -> Result<Option<(String, &'a str)>, Failure> {
    let mut found: Option<(String, &str)> = None;
    for prefix in PREFIXES {
        let key = variable(prefix, flag);
        let Some((_, value)) = env.iter().find(|(name, value)| *name == key && !value.is_empty()) else {
            continue;
        };
        match &found {
            Some((other, kept)) if kept != value => {
                return Err(Failure::config(format!(
                    "{other} and {key} are both set, and to different values"
                )));
            }
            Some(_) => {}
            None => found = Some((key, value)),
        }
    }
    Ok(found)
}

fn environment(env: &[(String, String)], settings: &mut Settings) -> Result<(), Failure> {
    let mut known: HashSet<String> = NOT_FLAGS.iter().map(|&name| name.to_owned()).collect();
    for flag in FLAGS {
        let keys = PREFIXES.map(|prefix| variable(prefix, flag.name));
        if settings.is_set(flag.name) {
            // Even an empty variable is a conflict to etcd.
            if let Some(key) = keys.iter().find(|key| env.iter().any(|(name, _)| name == *key)) {
                return Err(Failure::config(format!(
                    "conflicting environment variable {key} is shadowed by flag --{}: unset the one or leave out the \
                     other",
                    flag.name
                )));
            }
        }
        let found = from_environment(flag.name, env)?;
        known.extend(keys);
        let Some((key, value)) = found else { continue };
        if flag.name == "version" {
            // Kubernetes and others set this one for their own ends.
            settings.warn(format!("environment variable {key} is ignored: it is no setting"));
            continue;
        }
        let parsed = flag.kind.parse(value).map_err(|error| {
            Failure::config(format!("invalid value {value:?} for {key}: {}", explain(flag, &error)))
        })?;
        settings.inform(format!("recognized and used environment variable {key}"));
        settings.set(flag, parsed, Source::Environment(key));
    }
    for (name, _) in env {
        if PREFIXES.iter().any(|prefix| name.starts_with(prefix)) && !known.contains(name) {
            settings.warn(format!("unrecognized environment variable {name}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(args: &[&str]) -> Vec<String> {
        args.iter().map(|&arg| arg.to_owned()).collect()
    }

    fn vars(env: &[(&str, &str)]) -> Vec<(String, String)> {
        env.iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    fn settings(args: &[&str], env: &[(&str, &str)]) -> Settings {
        match load(&strings(args), &vars(env)) {
            Ok(Command::Start(settings)) => settings,
            other => panic!("{args:?}: {other:?}"),
        }
    }

    fn failure(args: &[&str], env: &[(&str, &str)]) -> Failure {
        load(&strings(args), &vars(env)).expect_err("must fail")
    }

    #[test]
    fn takes_every_form_that_go_takes() {
        for args in [
            &["-name", "a", "--pre-vote=false"][..],
            &["--name=a", "-pre-vote=0"],
            &["-name=b", "--name", "a", "-pre-vote=F", "--"],
        ] {
            let settings = settings(args, &[]);
            assert_eq!(settings.text("name"), "a");
            assert!(!settings.boolean("pre-vote"));
        }
        assert!(settings(&["--force-new-cluster"], &[]).boolean("force-new-cluster"));
        // A value may look like a flag, and may hold an equals sign.
        assert_eq!(settings(&["--name", "--x"], &[]).text("name"), "--x");
        assert_eq!(
            settings(&["--initial-cluster=a=http://b:1"], &[]).text("initial-cluster"),
            "a=http://b:1"
        );
        assert_eq!(settings(&["--name="], &[]).text("name"), "");
    }

    #[test]
    fn every_flag_has_its_default() {
        let settings = settings(&[], &[]);
        assert_eq!(settings.number("max-request-bytes"), 1_572_864);
        assert_eq!(settings.number("rocksdb-block-cache-bytes"), 128 << 20);
        assert!(
            FLAGS
                .iter()
                .all(|flag| !settings.differs(flag) && !settings.is_set(flag.name))
        );
    }

    #[test]
    fn refuses_what_does_not_parse_with_2_and_stray_arguments_with_1() {
        for (args, code, part) in [
            (&["--nam", "x"][..], 2, "nearest one is --name"),
            (
                &["--experimental-compaction-batch-limit=1"],
                2,
                "--compaction-batch-limit",
            ),
            (&["--discovery=http://x"], 2, "unknown flag --discovery;"),
            (&["---name"], 2, "bad flag syntax"),
            (&["--=x"], 2, "bad flag syntax"),
            (&["--name"], 2, "needs a value"),
            (&["--pre-vote=maybe"], 2, "true or false"),
            (&["--heartbeat-interval=x"], 2, "milliseconds"),
            (&["--listen-client-urls=localhost:1"], 2, "scheme"),
            (&["--pre-vote", "false"], 1, "\"false\""),
            (&["-"], 1, "\"-\""),
            (&["--", "x"], 1, "\"x\""),
            (&["gateway", "start"], 1, "gateway"),
        ] {
            let failure = failure(args, &[]);
            assert_eq!(failure.exit_code, code, "{args:?}: {failure}");
            assert!(failure.message.contains(part), "{args:?}: {failure}");
            assert!(!failure.message.contains('\n'));
        }
    }

    #[test]
    fn help_and_version_print() {
        for args in [&["-h"][..], &["--help"], &["help"], &["--name=x", "-help"]] {
            assert!(matches!(load(&strings(args), &[]), Ok(Command::Print(text)) if text.contains("Usage")));
        }
        for args in [&["--version"][..], &["version"], &["--name=x", "-version"]] {
            assert!(
                matches!(load(&strings(args), &[]), Ok(Command::Print(text)) if text.starts_with("etcd Version: 3.7"))
            );
        }
    }

    #[test]
    fn ignored_flags_are_named() {
        let settings = settings(&["--vv", "-snapshot=3", "--name=a"], &[]);
        assert_eq!(settings.notes.len(), 2);
        assert!(settings.notes[1].message.contains("--snapshot"));
    }

    #[test]
    fn variables_of_both_prefixes_set_flags() {
        let settings = settings(
            &[],
            &[
                ("ETCD_NAME", "a"),
                ("METASTORE_STORAGE", "memory"),
                ("ETCD_PRE_VOTE", ""),
            ],
        );
        assert_eq!((settings.text("name"), settings.text("storage")), ("a", "memory"));
        assert_eq!(settings.source("name"), &Source::Environment("ETCD_NAME".into()));
        assert!(settings.notes.iter().all(|note| !note.warning));
    }

    #[test]
    fn variables_conflict_as_in_etcd() {
        let shadowed = failure(&["--name=a"], &[("ETCD_NAME", "a")]);
        assert_eq!(shadowed.exit_code, 1);
        assert!(shadowed.message.contains("ETCD_NAME") && shadowed.message.contains("--name"));
        assert!(
            failure(&["--name=a"], &[("METASTORE_NAME", "")])
                .message
                .contains("METASTORE_NAME")
        );
        assert!(
            failure(&[], &[("METASTORE_NAME", "a"), ("ETCD_NAME", "b")])
                .message
                .contains("different values")
        );
        assert_eq!(
            settings(&[], &[("METASTORE_NAME", "a"), ("ETCD_NAME", "a")]).text("name"),
            "a"
        );
        let invalid = failure(&[], &[("ETCD_MAX_WALS", "x")]);
        assert_eq!(invalid.exit_code, 1);
        assert!(invalid.message.contains("ETCD_MAX_WALS"));
    }

    #[test]
    fn unknown_variables_warn() {
        let settings = settings(
            &[],
            &[
                ("ETCD_SERVICE_HOST", "x"),
                ("ETCD_VERSION", "v3"),
                ("ETCD_UNSUPPORTED_ARCH", "x"),
            ],
        );
        let warnings: Vec<_> = settings.notes.iter().filter(|note| note.warning).collect();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].message.contains("ETCD_VERSION") && warnings[1].message.contains("ETCD_SERVICE_HOST"));
    }

    #[test]
    fn a_file_puts_flags_and_variables_out_of_force() {
        let path = std::env::temp_dir().join(format!("metastore-flags-{}.yaml", std::process::id()));
        std::fs::write(&path, "name: of-file\n").unwrap();
        let path_text = path.to_str().unwrap();
        for (args, env) in [
            (
                &["--config-file", path_text, "--max-wals=1"][..],
                &[("ETCD_MAX_WALS", "2")][..],
            ),
            (&["--name=x"], &[("ETCD_CONFIG_FILE", path_text)]),
        ] {
            let settings = settings(args, env);
            assert_eq!((settings.text("name"), settings.number("max-wals")), ("of-file", 5));
        }
        std::fs::remove_file(path).unwrap();
        assert_eq!(failure(&["--config-file=/nonexistent/x"], &[]).exit_code, 1);
    }

    #[test]
    fn empty_urls_leave_the_default() {
        let settings = settings(&["--listen-client-urls="], &[]);
        assert_eq!(settings.urls("listen-client-urls")[0].as_str(), "http://localhost:2379");
        assert!(settings.list("discovery-endpoints").is_empty());
    }
}

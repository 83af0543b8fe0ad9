//! What `--help` and `--version` print.

use std::fmt::Write;

use super::table::{FLAGS, Group, IGNORED, Status};
use super::value::Kind;

/// Columns that the help may take.
const WIDTH: usize = 100;

/// The text of `--version`: etcd's lines, which scripts read, and our own.
pub fn version() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!(
        "etcd Version: {}\n\
         Git SHA: {}\n\
         Go Version: none (MetaStore is written in Rust)\n\
         Go OS/Arch: {}/{arch}\n\
         MetaStore Version: {}\n",
        api::limits::ETCD_VERSION,
        option_env!("METASTORE_GIT_SHA").unwrap_or("not provided"),
        std::env::consts::OS,
        api::limits::METASTORE_VERSION,
    )
}

/// The text of `--help`.
pub fn help() -> String {
    let mut out = String::from(
        "MetaStore, a metadata store that speaks the etcd v3 API.\n\
         \n\
         Usage:\n\
         \x20 metastore [flags]    Start a node. Without flags: one member, data in ./default.metastore,\n\
         \x20                      clients at http://localhost:2379.\n\
         \x20 metastore bench      Put load on a store that speaks the etcd API; see metastore bench --help.\n\
         \x20 metastore help       Show this text (also -h, --help).\n\
         \x20 metastore version    Show the version (also --version).\n\
         \n\
         Flags are written -flag value, --flag value or --flag=value; the last one wins. A boolean takes\n\
         its value only after '='. A flag --some-flag can also be set by the environment variable\n\
         METASTORE_SOME_FLAG or ETCD_SOME_FLAG, but not by flag and variable at once.\n\
         Durations: 100ms, 5s, 1m30s. Bytes: a number, or one with KiB, MiB, GiB or TiB.\n",
    );
    for &group in Group::ALL {
        let _ = write!(out, "\n{}:\n", group.title());
        for flag in FLAGS.iter().filter(|flag| flag.group == group) {
            let _ = write!(out, "  --{}", flag.name);
            if flag.kind == Kind::Bool {
                out.push_str("[=true|false]");
            } else {
                let _ = write!(out, " {}", flag.kind.placeholder());
            }
            let unit = if flag.unit.is_empty() {
                String::new()
            } else {
                format!(" {}", flag.unit)
            };
            // A default too long for the line goes to a line of its own.
            let default = match flag.default {
                "" => "(default: empty)".to_owned(),
                default if flag.kind == Kind::Bytes && default.ends_with('B') => format!("(default: {default})"),
                default => format!("(default: {default}{unit})"),
            };
            let column = out.len() - out.rfind('\n').map_or(0, |at| at + 1);
            if column + 2 + default.len() <= WIDTH {
                let _ = writeln!(out, "  {default}");
            } else {
                out.push('\n');
                wrap(&mut out, &default);
            }
            let status = match flag.status {
                Status::Works => String::new(),
                Status::NoEffect(reason) => format!(" Taken without effect: {reason}."),
                Status::Refused(reason) => format!(" Not supported: {reason}."),
            };
            let choices = match flag.kind {
                Kind::Choice(words) if words.len() > 1 => {
                    let words: Vec<_> = words.iter().filter(|word| !word.is_empty()).copied().collect();
                    format!(" One of: {}.", words.join(", "))
                }
                _ => String::new(),
            };
            wrap(&mut out, &format!("{}{choices}{status}", flag.help));
        }
    }
    out.push_str("\nNo longer supported, by etcd either, and ignored with a warning:\n");
    wrap(
        &mut out,
        &IGNORED
            .iter()
            .map(|name| format!("--{name}"))
            .collect::<Vec<_>>()
            .join(" "),
    );
    out
}

/// Appends a paragraph, indented by six, no line longer than [`WIDTH`].
fn wrap(out: &mut String, text: &str) {
    let mut column = 0;
    for word in text.split(' ') {
        if column > 0 && column + 1 + word.len() > WIDTH {
            out.push('\n');
            column = 0;
        }
        if column == 0 {
            out.push_str("      ");
            column = 6;
        } else {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += word.len();
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_every_flag_within_the_width() {
        let help = help();
        for flag in FLAGS {
            assert!(help.contains(&format!("  --{}", flag.name)), "{}", flag.name);
        }
        for line in help.lines() {
            assert!(line.len() <= WIDTH, "{line}");
        }
    }

    #[test]
    fn version_has_the_lines_that_scripts_read() {
        let version = version();
        let starts = [
            "etcd Version: 3.7.",
            "Git SHA: ",
            "Go Version: ",
            "Go OS/Arch: linux/",
            "MetaStore Version: ",
        ];
        for (line, start) in version.lines().zip(starts) {
            assert!(line.starts_with(start), "{line}");
        }
        assert_eq!(version.lines().count(), starts.len());
    }
}

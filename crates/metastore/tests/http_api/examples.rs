//! The examples of the documentation, run as they stand there: in blocks of ` ```console `, what follows `$ ` is run and
//! the lines below it are what must come out. `...` stands for anything within a line, or alone for any lines.

use std::process::Command;

use crate::nodes::enable_auth;
use crate::support::{Storage, fresh};

/// What the documentation calls the server.
const SERVER: &str = "localhost:2379";

struct Example {
    command: String,
    expected: Vec<String>,
}

fn examples(text: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    let mut within = false;
    for line in text.lines() {
        match line {
            "```console" => within = true,
            "```" => within = false,
            _ if !within => {}
            _ => match (line.strip_prefix("$ "), examples.last_mut()) {
                (Some(command), _) => examples.push(Example {
                    command: command.to_owned(),
                    expected: Vec::new(),
                }),
                (None, Some(example)) => example.expected.push(line.to_owned()),
                (None, None) => panic!("a block begins with a command, not with {line:?}"),
            },
        }
    }
    examples
}

/// Whether a line is what is expected, `...` being anything.
fn fits(line: &str, expected: &str) -> bool {
    let mut parts = expected.split("...");
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = line.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<_> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn all_fit(lines: &[&str], expected: &[String]) -> bool {
    match expected.split_first() {
        None => lines.is_empty(),
        Some((wanted, more)) if wanted == "..." => (0..=lines.len()).any(|skipped| all_fit(&lines[skipped..], more)),
        Some((wanted, more)) => lines
            .split_first()
            .is_some_and(|(line, rest)| fits(line, wanted) && all_fit(rest, more)),
    }
}

/// For how many seconds watches are looked at, until what they show is what is expected: on a busy machine that may take
/// longer than the document says. Less than the time of a heartbeat, which is not in it.
const WATCHED_S: [u32; 7] = [2, 4, 8, 13, 13, 13, 13];

/// Runs it and returns what it printed, and what it complained of.
fn run(command: &str) -> (String, String) {
    let ran = Command::new("bash").args(["-c", command]).output().expect("bash runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (text(ran.stdout), text(ran.stderr))
}

fn run_all(file: &str, storage: Storage, at_least: usize) {
    let (_dir, node) = fresh(storage);
    // From the package's folder, in which cargo runs tests.
    let text = std::fs::read_to_string(format!("../../{file}")).expect("the file is there");
    let address = node.url().strip_prefix("http://").expect("the URL is http");
    let examples = examples(&text);
    assert!(examples.len() >= at_least, "{file} has {} examples", examples.len());
    let mut has_users = false;
    for Example { command, expected } in examples {
        assert!(command.contains("curl"), "{command}");
        if command.contains("--user") && !std::mem::replace(&mut has_users, true) {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime starts");
            runtime.block_on(async { enable_auth(&mut crate::support::client(node.url()).await).await });
        }
        let command = command.replace(SERVER, address);
        let (mut output, mut complaint) = run(&command);
        let fit = |output: &str| all_fit(&output.lines().collect::<Vec<_>>(), &expected);
        if command.contains("/api/v1/watch") {
            for seconds in WATCHED_S {
                if fit(&output) {
                    break;
                }
                (output, complaint) = run(&command.replace("timeout 2 ", &format!("timeout {seconds} ")));
            }
        }
        assert!(
            fit(&output),
            "{file}: $ {command}\n{output}\nand not\n{}\n{complaint}",
            expected.join("\n"),
        );
    }
}

#[test]
fn of_the_page_about_http() {
    run_all("docs/http-api.md", Storage::RocksDb, 35);
}

#[test]
fn of_the_page_about_http_in_memory() {
    run_all("docs/http-api.md", Storage::Memory, 35);
}

#[test]
fn of_the_readme() {
    run_all("README.md", Storage::RocksDb, 4);
}

#[test]
fn of_the_readme_in_memory() {
    run_all("README.md", Storage::Memory, 4);
}

#[test]
fn patterns_fit_what_they_should() {
    assert!(fits("abc", "abc") && fits("abc", "a...c") && fits("abc", "...") && fits("abc", "abc..."));
    assert!(!fits("abc", "ab") && !fits("abc", "b...") && !fits("abc", "a...b") && !fits("aXbYc", "a...Y...b...c"));
    let expected = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert!(all_fit(&["a", "b", "c"], &expected("a\n...\nc")) && all_fit(&["a"], &expected("a\n...")));
    assert!(!all_fit(&["a", "b"], &expected("a")) && !all_fit(&["a"], &expected("a\nb")));
}

//! The examples of the documentation, run as they stand there: in blocks of ` ```console `, what follows `$ ` is run and
//! the lines below it are what must come out. `...` stands for anything within a line, or alone for any lines.

use std::process::Command;

use crate::support::{Setup, Storage, fresh, temp_dir};

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

fn run_all(file: &str, url: &str, at_least: usize) {
    let path = format!("{}/../../{file}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).expect("the file is there");
    let address = url.strip_prefix("http://").expect("the URL is http");
    let examples = examples(&text);
    assert!(examples.len() >= at_least, "{file} has {} examples", examples.len());
    for Example { command, expected } in examples {
        assert!(command.contains("curl"), "{command}");
        let command = command.replace(SERVER, address);
        let ran = Command::new("bash").args(["-c", &command]).output().expect("bash runs");
        let output = String::from_utf8(ran.stdout).expect("text");
        let lines: Vec<_> = output.lines().collect();
        assert!(
            all_fit(&lines, &expected),
            "{file}: $ {command}\n{output}\nand not\n{}\n{}",
            expected.join("\n"),
            String::from_utf8_lossy(&ran.stderr)
        );
    }
}

#[test]
fn of_the_page_about_http() {
    let (_dir, node) = fresh(Storage::RocksDb);
    run_all("docs/http-api.md", node.url(), 30);
}

#[test]
fn of_the_readme() {
    let dir = temp_dir();
    let node = Setup::new(dir.path(), Storage::Memory).start();
    run_all("README.md", node.url(), 4);
}

#[test]
fn patterns_fit_what_they_should() {
    assert!(fits("abc", "abc") && fits("abc", "a...c") && fits("abc", "...") && fits("abc", "abc..."));
    assert!(!fits("abc", "ab") && !fits("abc", "b...") && !fits("abc", "a...b") && !fits("aXbYc", "a...Y...b...c"));
    let expected = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert!(all_fit(&["a", "b", "c"], &expected("a\n...\nc")) && all_fit(&["a"], &expected("a\n...")));
    assert!(!all_fit(&["a", "b"], &expected("a")) && !all_fit(&["a"], &expected("a\nb")));
}

//! ARCHITECTURE.md holds what it says: the arrows between the crates, and the paths it names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// From the package's folder, in which cargo runs tests. A path that is compiled in could be that of another checkout, whose
/// target folder this one shares.
fn root() -> PathBuf {
    Path::new("../..").canonicalize().unwrap()
}

fn document() -> String {
    std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap()
}

/// What a crate may depend on, as the table in the document says or as cargo says it is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Arrows {
    uses: BTreeSet<String>,
    /// What only tests use besides.
    tests_use: BTreeSet<String>,
}

type Graph = BTreeMap<String, Arrows>;

/// Reads the table whose first columns are `Crate`, `Room for` and `May use`.
fn graph_of_table(text: &str) -> Graph {
    let cells = |line: &str| -> Vec<String> {
        line.trim()
            .trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().to_owned())
            .collect()
    };
    let mut lines = text.lines().skip_while(|line| !line.starts_with("| Crate |"));
    let header = cells(lines.next().expect("ARCHITECTURE.md has the table of crates"));
    assert_eq!(header[..3], ["Crate", "Room for", "May use"]);
    let tests_column = header.iter().position(|cell| cell == "Tests may also use");
    let names = |cell: Option<&String>| -> BTreeSet<String> {
        let cell = cell.map(String::as_str).unwrap_or_default();
        if matches!(cell, "" | "nothing of ours") {
            return BTreeSet::new();
        }
        cell.split(',')
            .map(|name| name.trim().trim_matches('`').to_owned())
            .collect()
    };
    lines
        .skip(1)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells = cells(line);
            let uses = names(cells.get(2));
            let tests_use = names(tests_column.and_then(|column| cells.get(column)));
            (cells[0].trim_matches('`').to_owned(), Arrows { uses, tests_use })
        })
        .collect()
}

/// The arrows that the manifests have. Crates are called after their folders.
fn graph_of_cargo() -> Graph {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages = metadata["packages"].as_array().unwrap();
    let folders: BTreeMap<String, String> = packages
        .iter()
        .map(|package| {
            let manifest = PathBuf::from(text(&package["manifest_path"]));
            let folder = manifest.parent().and_then(Path::file_name).unwrap();
            (text(&package["name"]), folder.to_string_lossy().into_owned())
        })
        .collect();
    packages
        .iter()
        .map(|package| {
            let mut arrows = Arrows::default();
            for dependency in package["dependencies"].as_array().unwrap() {
                if let Some(folder) = folders.get(&text(&dependency["name"])) {
                    // Build dependencies count like any other.
                    let only_tests = dependency["kind"] == "dev";
                    let set = if only_tests {
                        &mut arrows.tests_use
                    } else {
                        &mut arrows.uses
                    };
                    set.insert(folder.clone());
                }
            }
            (folders[&text(&package["name"])].clone(), arrows)
        })
        .collect()
}

#[test]
fn the_crates_depend_on_each_other_as_the_table_says() {
    let table = graph_of_table(&document());
    let real = graph_of_cargo();
    assert_eq!(
        table.keys().collect::<Vec<_>>(),
        real.keys().collect::<Vec<_>>(),
        "the table and the workspace have the same crates"
    );
    for (name, arrows) in &real {
        let allowed = &table[name];
        for used in &arrows.uses {
            assert!(
                allowed.uses.contains(used),
                "{name} depends on {used}, which ARCHITECTURE.md does not allow"
            );
        }
        for used in &arrows.tests_use {
            let allowed = allowed.uses.contains(used) || allowed.tests_use.contains(used);
            assert!(
                allowed,
                "the tests of {name} depend on {used}, which ARCHITECTURE.md does not allow"
            );
        }
    }
}

#[test]
fn the_table_has_no_circle() {
    let table = graph_of_table(&document());
    let mut left: BTreeSet<&String> = table.keys().collect();
    while !left.is_empty() {
        let leaf = left
            .iter()
            .find(|name| table[**name].uses.iter().all(|used| !left.contains(used)))
            .copied();
        left.remove(leaf.unwrap_or_else(|| panic!("these crates use each other in a circle: {left:?}")));
    }
}

#[test]
fn the_table_is_read_as_meant() {
    let table = graph_of_table(
        "text\n| Crate | Room for | May use | Tests may also use |\n|---|---|---|---|\n\
         | `a` | x | nothing of ours | |\n| `b` | y | `a` | `c`, `d` |\n\n| `e` | | | |\n",
    );
    let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(table.len(), 2);
    assert_eq!(table["a"], Arrows::default());
    assert_eq!(
        table["b"],
        Arrows {
            uses: set(&["a"]),
            tests_use: set(&["c", "d"])
        }
    );
}

/// Whether a text in backticks is meant as a path in this repository.
fn looks_like_a_path(text: &str) -> bool {
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
    let folders = ["crates/", "compat/", "scripts/", ".ci/"];
    plain && (folders.iter().any(|folder| text.starts_with(folder)) || text.ends_with(".md") || text.ends_with(".toml"))
}

#[test]
fn every_path_in_the_document_exists() {
    let document = document();
    let missing: Vec<_> = document
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|text| looks_like_a_path(text) && !root().join(text).exists())
        .collect();
    assert!(
        missing.is_empty(),
        "ARCHITECTURE.md names what does not exist: {missing:?}"
    );
}

//! The tables that a run ends with.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::warnings::warnings;
use crate::load::Load;
use crate::result::{COMPARED, Figures, Outcome, RunResult, SystemOutcome};
use crate::stats::{Ratio, median, ratio};
use crate::units::{bytes, nanos, three_digits};

/// All there is to say about a workload, ready to print.
pub(crate) fn table(outcome: &Outcome) -> String {
    let mut text = format!("\n{}\n", describe(&outcome.load));
    for system in &outcome.systems {
        system_table(&mut text, &outcome.load, system);
    }
    if let [a, b] = &outcome.systems[..] {
        comparison(&mut text, &outcome.load, a, b);
    }
    text
}

/// The load in one line.
pub(crate) fn describe(load: &Load) -> String {
    let mut text = format!(
        "{}: {} clients on {} connections, {}",
        load.workload.name(),
        load.clients,
        load.connections,
        match load.rate {
            Some(rate) => format!("open loop at {rate}/s"),
            None => "closed loop".to_owned(),
        }
    );
    // Writing to a string cannot fail, here and below.
    let _ = write!(text, ", {} keys, values of {} B", load.keys.count, load.value_bytes);
    if load.watchers > 0 {
        let _ = write!(
            text,
            ", {} watchers on {} streams",
            load.watchers,
            load.watch_streams.min(load.watchers)
        );
    }
    text
}

/// The figures of each row, as medians over the rounds; rows keep the order of the first round that has them.
pub(crate) fn medians(load: &Load, rounds: &[RunResult]) -> Vec<(&'static str, Figures)> {
    let labels = load.workload.labels();
    let mut names = Vec::new();
    let mut found: BTreeMap<&str, Vec<Figures>> = BTreeMap::new();
    for (name, figures) in rounds.iter().flat_map(|round| round.figures(labels)) {
        if !names.contains(&name) {
            names.push(name);
        }
        found.entry(name).or_default().push(figures);
    }
    let middle = |name: &str, of: fn(&Figures) -> f64| {
        let values: Vec<f64> = found[name].iter().map(of).collect();
        median(&values).unwrap_or(0.0)
    };
    names
        .into_iter()
        .map(|name| {
            let figures = Figures {
                done: middle(name, |f| f.done),
                per_second: middle(name, |f| f.per_second),
                items_per_second: middle(name, |f| f.items_per_second),
                mean: middle(name, |f| f.mean),
                p50: middle(name, |f| f.p50),
                p90: middle(name, |f| f.p90),
                p99: middle(name, |f| f.p99),
                p999: middle(name, |f| f.p999),
                max: middle(name, |f| f.max),
                errors: middle(name, |f| f.errors),
            };
            (name, figures)
        })
        .collect()
}

fn system_table(text: &mut String, load: &Load, system: &SystemOutcome) {
    let rounds = &system.rounds;
    let seconds: Vec<f64> = rounds.iter().map(|round| round.seconds).collect();
    let Some(seconds) = median(&seconds) else {
        let _ = writeln!(text, "\n{} ({}): no round was finished", system.name, system.endpoints);
        return;
    };
    let many = if rounds.len() > 1 {
        format!(", medians of {} rounds", rounds.len())
    } else {
        String::new()
    };
    let _ = writeln!(text, "\n{} ({}), {seconds:.1} s{many}", system.name, system.endpoints);
    let _ = writeln!(
        text,
        "{:<17}{:>10}{:>11}{:>11}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>8}",
        "operation", "ops", "ops/s", "items/s", "mean", "p50", "p90", "p99", "p99.9", "max", "errors"
    );
    for (name, figures) in medians(load, rounds) {
        let _ = write!(
            text,
            "{name:<17}{:>10.0}{:>11}{:>11}",
            figures.done,
            three_digits(figures.per_second),
            three_digits(figures.items_per_second)
        );
        for time in [
            figures.mean,
            figures.p50,
            figures.p90,
            figures.p99,
            figures.p999,
            figures.max,
        ] {
            let _ = write!(text, "{:>10}", nanos(time));
        }
        let _ = writeln!(text, "{:>8.0}", figures.errors);
    }
    usage_lines(text, load, rounds);
    error_lines(text, load, rounds);
    // Rounds mostly have the same to say: the last one speaks for all. The JSON has every round's.
    for warning in rounds.last().map(|round| warnings(load, round)).unwrap_or_default() {
        let _ = writeln!(text, "warning: {warning}");
    }
}

fn usage_lines(text: &mut String, load: &Load, rounds: &[RunResult]) {
    let labels = load.workload.labels();
    let middle = |of: &dyn Fn(&RunResult) -> Option<f64>| {
        let values: Vec<f64> = rounds.iter().filter_map(of).collect();
        median(&values)
    };
    let cpu = middle(&|round| round.server_cpu_per_op(labels));
    let memory = middle(&|round| round.server.as_ref().map(|server| server.peak_resident_bytes));
    let cores = middle(&|round| round.server.as_ref().map(|server| server.cpu_seconds / round.seconds));
    let source = rounds
        .iter()
        .find_map(|round| round.server.as_ref())
        .map(|server| server.source);
    if let (Some(cores), Some(memory), Some(source)) = (cores, memory, source) {
        let cpu = cpu.map_or("no operation".to_owned(), |cpu| {
            format!("{} CPU per operation", nanos(cpu))
        });
        let _ = writeln!(
            text,
            "server:    {cpu}, {cores:.2} cores, peak memory {} (from {source})",
            bytes(memory)
        );
    }
    let cpu = middle(&|round| round.generator_cpu_per_op(labels));
    let busy = middle(&|round| round.generator.busy.iter().copied().reduce(f64::max));
    let waiting = middle(&|round| round.generator.waiting.iter().copied().reduce(f64::max));
    if let (Some(cpu), Some(busy), Some(waiting)) = (cpu, busy, waiting) {
        let _ = writeln!(
            text,
            "generator: {} CPU per operation; {} thread(s), busiest {:.0} % running and {:.0} % waiting for a processor",
            nanos(cpu),
            load.threads,
            busy * 100.0,
            waiting * 100.0
        );
    }
}

fn error_lines(text: &mut String, load: &Load, rounds: &[RunResult]) {
    let labels = load.workload.labels();
    for (index, label) in labels.iter().enumerate() {
        let mut all = crate::record::Row::new();
        rounds.iter().for_each(|round| all.merge(&round.rows[index]));
        for error in &all.errors {
            let _ = writeln!(
                text,
                "errors:    {} x {} in {}: {}",
                error.count, error.kind, label.name, error.example
            );
        }
    }
}

/// One line of a comparison: its name, the ratio, and how to write its values.
pub(crate) struct Compared {
    pub(crate) row: &'static str,
    pub(crate) figure: &'static str,
    pub(crate) ratio: Ratio,
    pub(crate) write: fn(f64) -> String,
}

/// All figures that both systems have in the same rounds.
pub(crate) fn compare(load: &Load, a: &SystemOutcome, b: &SystemOutcome) -> Vec<Compared> {
    let labels = load.workload.labels();
    let rounds = a.rounds.len().min(b.rounds.len());
    let (a, b) = (&a.rounds[..rounds], &b.rounds[..rounds]);
    let mut compared = Vec::new();
    let mut push = |row, figure, of: &dyn Fn(&RunResult) -> Option<f64>, write| {
        let values = |rounds: &[RunResult]| rounds.iter().map(of).collect::<Option<Vec<f64>>>();
        if let (Some(a), Some(b)) = (values(a), values(b))
            && let Some(ratio) = ratio(&a, &b)
        {
            compared.push(Compared {
                row,
                figure,
                ratio,
                write,
            });
        }
    };
    for (row, _) in medians(load, a) {
        for figure in &COMPARED {
            let of = |round: &RunResult| {
                let rows = round.figures(labels);
                rows.iter()
                    .find(|(name, _)| *name == row)
                    .map(|(_, figures)| (figure.of)(figures))
            };
            push(row, figure.name, &of, if figure.is_time { nanos } else { three_digits });
        }
    }
    push("server", "CPU per op", &|round| round.server_cpu_per_op(labels), nanos);
    let memory = |round: &RunResult| round.server.as_ref().map(|server| server.peak_resident_bytes);
    push("server", "memory", &memory, bytes);
    push(
        "generator",
        "CPU per op",
        &|round| round.generator_cpu_per_op(labels),
        nanos,
    );
    compared
}

fn comparison(text: &mut String, load: &Load, a: &SystemOutcome, b: &SystemOutcome) {
    let compared = compare(load, a, b);
    if compared.is_empty() {
        return;
    }
    let _ = writeln!(
        text,
        "\n{} / {}: ratio of the medians, and lowest to highest ratio within a round",
        a.name, b.name
    );
    let _ = writeln!(text, "{:<29}{:>11}{:>11}{:>8}    spread", "", a.name, b.name, "ratio");
    for Compared {
        row,
        figure,
        ratio,
        write,
    } in compared
    {
        let _ = writeln!(
            text,
            "{row:<17}{figure:<12}{:>11}{:>11}{:>8}    {} to {}",
            write(ratio.a),
            write(ratio.b),
            three_digits(ratio.ratio),
            three_digits(ratio.low),
            three_digits(ratio.high)
        );
    }
}

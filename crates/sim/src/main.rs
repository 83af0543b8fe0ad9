//! `metastore-sim`: runs seeds, and tells of those that find something.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use metastore_sim::bugs::Bug;
use metastore_sim::run::{self, Report};
use metastore_sim::trace::MARKS;

const USAGE: &str = "usage: metastore-sim [options]
  --seed S       run one seed and print its timeline
  --lines N      how many of its last lines to print (default 400)
  --from S       the first seed (default 1)
  --seeds N      how many seeds (default 1000)
  --seconds T    stop after so many seconds
  --jobs J       how many seeds at once (default: one a core)
  --keep-going   do not stop at the first finding
  --bug NAME     plant a deliberate bug
  --mutants      plant one deliberate bug after the other; each must be found within --seeds seeds
  --bugs         list the deliberate bugs";

#[derive(Clone)]
struct Arguments {
    seed: Option<u64>,
    from: u64,
    seeds: u64,
    seconds: u64,
    jobs: usize,
    keep_going: bool,
    lines: usize,
    bug: Option<Bug>,
    mutants: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut arguments = Arguments {
        seed: None,
        from: 1,
        seeds: 1000,
        seconds: u64::MAX,
        jobs: std::thread::available_parallelism().map_or(1, usize::from),
        keep_going: false,
        lines: 400,
        bug: None,
        mutants: false,
    };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let mut value = || given.next().ok_or_else(|| format!("{name} needs a value"));
        let number = |value: String| -> Result<u64, String> {
            value.parse().map_err(|_| format!("{name} needs a number, not {value}"))
        };
        match name.as_str() {
            "--seed" => arguments.seed = Some(number(value()?)?),
            "--from" => arguments.from = number(value()?)?,
            "--seeds" => arguments.seeds = number(value()?)?,
            "--seconds" => arguments.seconds = number(value()?)?,
            "--jobs" => arguments.jobs = number(value()?)?.max(1) as usize,
            "--lines" => arguments.lines = number(value()?)? as usize,
            "--keep-going" => arguments.keep_going = true,
            "--mutants" => arguments.mutants = true,
            "--bug" => {
                let name = value()?;
                arguments.bug = Some(Bug::of_name(&name).ok_or_else(|| format!("there is no bug {name}"))?);
            }
            "--bugs" => {
                Bug::ALL.iter().for_each(|bug| say(&format!("{bug:?}")));
                std::process::exit(0);
            }
            _ => return Err(format!("unknown argument {name}")),
        }
    }
    Ok(arguments)
}

fn say(text: &str) {
    // Whoever closed the pipe has read enough.
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn describe(report: &Report) -> String {
    let Report { seed, hash, .. } = report;
    let end = report.failure.as_deref().unwrap_or("ok");
    format!(
        "seed {seed}: {end}; hash {hash:016x}, {:.1} s, {} events, {}/{} answered, {} terms, settled in {:.1} s",
        report.time as f64 / 1e6,
        report.events,
        report.answered.0,
        report.answered.1,
        report.terms,
        report.settled as f64 / 1e6
    )
}

fn main() -> std::process::ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            say(&format!("{error}\n{USAGE}"));
            return 2.into();
        }
    };
    run::catch_panics();
    if let Some(seed) = arguments.seed {
        let report = run::run(seed, true, arguments.bug);
        let skip = report.lines.len().saturating_sub(arguments.lines);
        for line in &report.lines[skip..] {
            say(line);
        }
        say(&describe(&report));
        return u8::from(report.failure.is_some()).into();
    }
    if arguments.mutants {
        return u8::from(!mutants(&arguments)).into();
    }
    let totals = run_many(&arguments, true);
    for (mark, (seeds, times)) in &totals.marks {
        say(&format!("  {mark}: {times} times in {seeds} seeds"));
    }
    let never = MARKS.iter().filter(|mark| !totals.marks.contains_key(*mark));
    never.for_each(|mark| say(&format!("  never reached: {mark}")));
    u8::from(totals.findings > 0).into()
}

/// Runs seeds on all cores until the seeds or the time are over, or something is found.
fn run_many(arguments: &Arguments, talk: bool) -> Totals {
    let begun = Instant::now();
    let (next, stop) = (AtomicU64::new(arguments.from), AtomicBool::new(false));
    let end = arguments.from.saturating_add(arguments.seeds);
    let totals = Mutex::new(Totals::default());
    std::thread::scope(|scope| {
        for _ in 0..arguments.jobs {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) && begun.elapsed() < Duration::from_secs(arguments.seconds) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        break;
                    }
                    let report = run::run(seed, false, arguments.bug);
                    let mut totals = totals.lock().expect("nobody panics here");
                    totals.add(&report);
                    if report.failure.is_some() {
                        if talk {
                            say(&describe(&report));
                        }
                        if !arguments.keep_going {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    if talk && totals.seeds.is_multiple_of(500) {
                        say(&totals.describe(begun.elapsed()));
                    }
                }
            });
        }
    });
    let totals = totals.into_inner().expect("nobody panics here");
    if talk {
        say(&totals.describe(begun.elapsed()));
    }
    totals
}

/// Plants every deliberate bug; `true` if all were found.
fn mutants(arguments: &Arguments) -> bool {
    let bugs: Vec<Bug> = arguments.bug.map_or_else(|| Bug::ALL.to_vec(), |bug| vec![bug]);
    let mut missed = Vec::new();
    for &bug in &bugs {
        let begun = Instant::now();
        let totals = run_many(
            &Arguments {
                bug: Some(bug),
                keep_going: false,
                ..arguments.clone()
            },
            false,
        );
        let took = begun.elapsed().as_secs_f64();
        match totals.first {
            Some((seed, failure)) => {
                let failure: String = failure.chars().take(150).collect();
                say(&format!(
                    "{bug:?}: found in seed {seed} after {} seeds, {took:.1} s: {failure}",
                    totals.seeds
                ));
            }
            None => {
                say(&format!("{bug:?}: NOT FOUND in {} seeds, {took:.1} s", totals.seeds));
                missed.push(bug);
            }
        }
    }
    say(&format!(
        "{} of {} deliberate bugs found; missed: {missed:?}",
        bugs.len() - missed.len(),
        bugs.len()
    ));
    missed.is_empty()
}

#[derive(Default)]
struct Totals {
    seeds: u64,
    findings: u64,
    first: Option<(u64, String)>,
    time: u64,
    events: u64,
    answered: u64,
    requests: u64,
    settled_max: (u64, u64),
    marks: BTreeMap<&'static str, (u64, u64)>,
}

impl Totals {
    fn add(&mut self, report: &Report) {
        self.seeds += 1;
        self.time += report.time;
        self.events += report.events;
        self.answered += report.answered.0;
        self.requests += report.answered.1;
        match &report.failure {
            None => self.settled_max = self.settled_max.max((report.settled, report.seed)),
            Some(failure) => {
                self.findings += 1;
                self.first.get_or_insert((report.seed, failure.clone()));
            }
        }
        for (mark, times) in &report.marks {
            let mark = self.marks.entry(mark).or_default();
            mark.0 += 1;
            mark.1 += times;
        }
    }

    fn describe(&self, took: Duration) -> String {
        let seconds = took.as_secs_f64().max(1e-9);
        format!(
            "{} seeds ({:.1}/s), {} findings, {:.0} virtual s ({:.0} times real time), {:.0} events/s, {}/{} answered, slowest to settle: {:.1} s in seed {}",
            self.seeds,
            self.seeds as f64 / seconds,
            self.findings,
            self.time as f64 / 1e6,
            self.time as f64 / 1e6 / seconds,
            self.events as f64 / seconds,
            self.answered,
            self.requests,
            self.settled_max.0 as f64 / 1e6,
            self.settled_max.1
        )
    }
}

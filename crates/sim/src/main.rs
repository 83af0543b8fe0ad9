//! `metastore-sim`: runs seeds, and tells of those that find something.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use metastore_sim::bugs::Bug;
use metastore_sim::run::{self, Report};
use metastore_sim::scenario::Scenario;
use metastore_sim::shorten::shorten;
use metastore_sim::trace::{Detail, MARKS};

const USAGE: &str = "usage: metastore-sim [options]
  --seed S       run one seed; if it fails, look for a shorter way to the failure and print its timeline
  --as-is        with --seed: print the timeline as it is
  --all          with --seed: heartbeats as well
  --lines N      how many of its last lines to print (default 400)
  --from S       the first seed (default: 1 with --seeds or --mutants, else one that was not run before)
  --seeds N      how many seeds (default: no end)
  --time T       stop after so long: 90s, 10m, 2h
  --sizes A,B    only clusters that begin with so many members
  --jobs J       how many seeds at once (default: one a core)
  --keep-going   do not stop at the first finding
  --bug NAME     plant a deliberate bug
  --mutants      plant one deliberate bug after the other; each must be found within --seeds seeds (default 5000)
  --bugs         list the deliberate bugs";

/// Seeds within which every deliberate bug must be found.
const MUTANT_SEEDS: u64 = 5000;

#[derive(Clone)]
struct Arguments {
    seed: Option<u64>,
    as_is: bool,
    detail: Detail,
    from: Option<u64>,
    seeds: Option<u64>,
    time: Duration,
    sizes: Vec<usize>,
    jobs: usize,
    keep_going: bool,
    lines: usize,
    bug: Option<Bug>,
    mutants: bool,
}

/// "90s", "10m" or "2h"; seconds if there is no unit.
fn duration(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(['s', 'm', 'h']);
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return None,
    };
    Some(Duration::from_secs(digits.parse::<u64>().ok()?.checked_mul(unit)?))
}

fn arguments() -> Result<Arguments, String> {
    let mut arguments = Arguments {
        seed: None,
        as_is: false,
        detail: Detail::Story,
        from: None,
        seeds: None,
        time: Duration::MAX,
        sizes: Vec::new(),
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
            "--as-is" => arguments.as_is = true,
            "--all" => arguments.detail = Detail::Everything,
            "--from" => arguments.from = Some(number(value()?)?),
            "--seeds" => arguments.seeds = Some(number(value()?)?),
            "--time" => {
                let text = value()?;
                arguments.time =
                    duration(&text).ok_or_else(|| format!("{name} needs a time such as 10m, not {text}"))?;
            }
            "--sizes" => {
                let sizes = value()?;
                let sizes = sizes.split(',').map(|size| number(size.to_owned()));
                arguments.sizes = sizes.map(|size| Ok(size? as usize)).collect::<Result<_, String>>()?;
                if !arguments.sizes.iter().all(|size| (1..=7).contains(size)) {
                    return Err("clusters begin with 1 to 7 members".to_owned());
                }
            }
            "--jobs" => arguments.jobs = number(value()?)?.max(1) as usize,
            "--lines" => arguments.lines = number(value()?)? as usize,
            "--keep-going" => arguments.keep_going = true,
            "--mutants" => arguments.mutants = true,
            "--bug" => {
                let name = value()?;
                arguments.bug = Some(Bug::of_name(&name).ok_or_else(|| format!("there is no bug {name}"))?);
            }
            "--help" | "-h" => {
                say(USAGE);
                std::process::exit(0);
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

/// The first seed. A run without an end is to find what no run found before, so it begins where the clock says: a second
/// has fewer seeds than numbers between two of its.
fn first_seed(arguments: &Arguments) -> u64 {
    arguments.from.unwrap_or_else(|| {
        if arguments.mutants || arguments.seeds.is_some() {
            return 1;
        }
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        since.as_secs() * 10_000
    })
}

fn say(text: &str) {
    // Whoever closed the pipe has read enough.
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn describe(report: &Report) -> String {
    let Report { seed, hash, .. } = report;
    let end = report.failure.as_deref().unwrap_or("ok");
    format!(
        "seed {seed}: {end}; hash {hash:016x}, {} first members, {:.1} s, {} events, {} faults, {}/{} answered, {} terms, settled in {:.1} s",
        report.members,
        report.time as f64 / 1e6,
        report.events,
        report.faults.0,
        report.answered.0,
        report.answered.1,
        report.terms,
        report.settled as f64 / 1e6
    )
}

/// Runs one seed and tells its story.
fn tell(seed: u64, arguments: &Arguments) -> bool {
    let mut scenario = Scenario::draw(&mut fastrand::Rng::with_seed(seed));
    let shorter = (!arguments.as_is)
        .then(|| shorten(seed, &scenario, arguments.bug, SHORTEN_TIME))
        .flatten();
    let mut told = Vec::new();
    if let Some(shorter) = shorter {
        let whole = run::run(seed, Detail::Nothing, arguments.bug);
        told.push(format!("as it is: {}", describe(&whole)));
        told.push(format!(
            "shortened in {} tries to {} events and {} faults; without: {}",
            shorter.tries,
            shorter.report.events,
            shorter.report.faults.0,
            shorter.without.join(", ")
        ));
        scenario = shorter.scenario;
    }
    let report = run::run_scenario(seed, scenario, arguments.detail, arguments.bug);
    let skip = report.lines.len().saturating_sub(arguments.lines);
    if skip > 0 {
        say(&format!("({skip} lines before these: --lines)"));
    }
    report.lines[skip..].iter().for_each(|line| say(line));
    for (mark, times) in &report.marks {
        say(&format!("  {mark}: {times} times"));
    }
    told.iter().for_each(|line| say(line));
    say(&describe(&report));
    report.failure.is_none()
}

/// How long a shorter way to a failure is looked for.
const SHORTEN_TIME: Duration = Duration::from_secs(60);

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
        return u8::from(!tell(seed, &arguments)).into();
    }
    if arguments.mutants {
        return u8::from(!mutants(&arguments)).into();
    }
    let totals = run_many(&arguments, true);
    for (members, seeds) in &totals.by_members {
        say(&format!("  {members} first members: {seeds} seeds"));
    }
    for (mark, (seeds, times)) in &totals.marks {
        say(&format!("  {mark}: {times} times in {seeds} seeds"));
    }
    let never = MARKS.iter().filter(|mark| !totals.marks.contains_key(*mark));
    never.for_each(|mark| say(&format!("  never reached: {mark}")));
    u8::from(totals.findings > 0).into()
}

/// How often progress is told.
const PROGRESS: Duration = Duration::from_secs(10);

/// Runs seeds on all cores until the seeds or the time are over, or something is found.
fn run_many(arguments: &Arguments, talk: bool) -> Totals {
    let begun = Instant::now();
    let first = first_seed(arguments);
    if talk {
        say(&format!("seeds from {first} on"));
    }
    let (next, started, stop) = (AtomicU64::new(first), AtomicU64::new(0), AtomicBool::new(false));
    let wanted = arguments.seeds.unwrap_or(u64::MAX);
    let totals = Mutex::new((Totals::default(), begun));
    std::thread::scope(|scope| {
        for _ in 0..arguments.jobs {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) && begun.elapsed() < arguments.time {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let scenario = Scenario::draw(&mut fastrand::Rng::with_seed(seed));
                    let members = scenario.voters + scenario.learners;
                    if !arguments.sizes.is_empty() && !arguments.sizes.contains(&members) {
                        continue;
                    }
                    if started.fetch_add(1, Ordering::Relaxed) >= wanted {
                        break;
                    }
                    let report = run::run_scenario(seed, scenario, Detail::Nothing, arguments.bug);
                    let (totals, told) = &mut *totals.lock().expect("nobody panics here");
                    totals.add(&report);
                    if report.failure.is_some() {
                        if talk {
                            say(&describe(&report));
                        }
                        if !arguments.keep_going {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    if talk && told.elapsed() >= PROGRESS {
                        *told = Instant::now();
                        say(&totals.describe(begun.elapsed()));
                    }
                }
            });
        }
    });
    let (totals, _) = totals.into_inner().expect("nobody panics here");
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
                seeds: Some(arguments.seeds.unwrap_or(MUTANT_SEEDS)),
                ..arguments.clone()
            },
            false,
        );
        let took = begun.elapsed().as_secs_f64();
        match totals.first {
            Some((seed, failure)) => {
                let failure: String = failure.chars().take(150).collect();
                say(&format!(
                    "{bug:?}: found after {} seeds, in seed {seed}, {took:.1} s: {failure}",
                    seed - first_seed(arguments) + 1
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
    by_members: BTreeMap<usize, u64>,
    time: u64,
    events: u64,
    faults: u64,
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
        self.faults += report.faults.0;
        *self.by_members.entry(report.members).or_default() += 1;
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
            "{} seeds ({:.1}/s), {} findings, {:.0} steps/s, {:.0} virtual s ({:.0} times real time), {} faults, {} of {} marks, {}/{} answered, slowest to settle: {:.1} s in seed {}",
            self.seeds,
            self.seeds as f64 / seconds,
            self.findings,
            self.events as f64 / seconds,
            self.time as f64 / 1e6,
            self.time as f64 / 1e6 / seconds,
            self.faults,
            self.marks.len(),
            MARKS.len(),
            self.answered,
            self.requests,
            self.settled_max.0 as f64 / 1e6,
            self.settled_max.1
        )
    }
}

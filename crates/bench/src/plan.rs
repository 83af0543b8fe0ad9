//! Takes systems and workloads in turn, round by round, and has the results reported.

use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::LocalSet;

use crate::interrupt::Interrupt;
use crate::load::Load;
use crate::measure::{System, measure, pause};
use crate::prepare::Helpers;
use crate::progress::Progress;
use crate::report;
use crate::result::{Outcome, RunResult, SystemOutcome};
use crate::workload::lease::LeaseIds;

/// What a command line asks for.
pub(crate) struct Plan {
    /// One after the other.
    pub(crate) loads: Vec<Load>,
    /// One, or two to compare.
    pub(crate) systems: Vec<System>,
    pub(crate) rounds: usize,
    /// Between two runs.
    pub(crate) pause: Duration,
    /// Write the keys that a workload reads before it starts.
    pub(crate) fill: bool,
    /// Leave everything there in the end.
    pub(crate) keep: bool,
    pub(crate) progress: bool,
    pub(crate) json: Option<PathBuf>,
    pub(crate) plot: Option<PathBuf>,
    pub(crate) html: Option<PathBuf>,
}

/// Carries a plan out; false if nothing succeeded.
pub(crate) fn run(plan: Plan) -> Result<bool, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))?;
    LocalSet::new().block_on(&runtime, carry_out(plan))
}

async fn carry_out(plan: Plan) -> Result<bool, String> {
    let interrupt = Interrupt::listen();
    let progress = Rc::new(Progress::new(plan.progress));
    let mut outcomes = Vec::new();
    for load in &plan.loads {
        if interrupt.is_pressed() {
            break;
        }
        let outcome = run_load(&plan, load, &progress, &interrupt).await?;
        print(&report::table::table(&outcome))?;
        outcomes.push(outcome);
    }
    report::write_files(
        &outcomes,
        plan.json.as_deref(),
        plan.plot.as_deref(),
        plan.html.as_deref(),
    )?;
    Ok(outcomes.iter().any(|outcome| {
        let labels = outcome.load.workload.labels();
        outcome
            .systems
            .iter()
            .flat_map(|system| &system.rounds)
            .any(|round| !round.primary(labels).latency.is_empty())
    }))
}

fn print(text: &str) -> Result<(), String> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| format!("cannot write the result: {error}"))
}

/// Runs one workload against all systems, A B A B.
async fn run_load(plan: &Plan, load: &Load, progress: &Rc<Progress>, interrupt: &Interrupt) -> Result<Outcome, String> {
    let load = Arc::new(load.clone());
    let mut systems: Vec<SystemOutcome> = plan
        .systems
        .iter()
        .map(|system| SystemOutcome {
            name: system.name.clone(),
            endpoints: system
                .endpoints
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(","),
            rounds: Vec::new(),
        })
        .collect();
    'rounds: for round in 0..plan.rounds {
        for (index, system) in plan.systems.iter().enumerate() {
            if round + index > 0 && pause(plan.pause, interrupt).await.is_err() {
                break 'rounds;
            }
            let fill = plan.fill && load.workload.needs_keys() && (round == 0 || load.workload.uses_keys_up());
            let in_system = |error: String| format!("{} {}: {error}", load.workload.name(), system.name);
            match run_once(&load, system, fill, progress, interrupt).await {
                Ok(result) => systems[index].rounds.push(result),
                Err(_) if interrupt.is_pressed() => break 'rounds,
                Err(error) => return Err(in_system(error)),
            }
            if interrupt.is_pressed() {
                break 'rounds;
            }
        }
    }
    if !plan.keep {
        for system in &plan.systems {
            let helpers = Helpers::connect(&load, &system.endpoints, &system.security).await;
            let cleared = match helpers {
                Ok(helpers) => helpers.clear().await.map(drop),
                Err(failure) => Err(failure),
            };
            if let Err(failure) = cleared {
                let _ = writeln!(
                    std::io::stderr(),
                    "metastore bench: keys under {:?} are left in {}: {failure}",
                    load.prefix,
                    system.name
                );
            }
        }
    }
    Ok(Outcome { load, systems })
}

async fn run_once(
    load: &Arc<Load>,
    system: &System,
    fill: bool,
    progress: &Rc<Progress>,
    interrupt: &Interrupt,
) -> Result<RunResult, String> {
    let connect = async || {
        Helpers::connect(load, &system.endpoints, &system.security)
            .await
            .map_err(|failure| failure.to_string())
    };
    if fill {
        progress.begin(&format!("writing keys to {}", system.name), Some(load.keys.count));
        let bar = Rc::clone(progress);
        let filling = async {
            let helpers = connect().await?;
            helpers
                .fill(move |written| bar.position(written))
                .await
                .map_err(|failure| format!("writing the keys: {failure}"))
        };
        interrupt.or(filling).await?;
        progress.end();
    }
    let ids = Arc::new(LeaseIds::new());
    let result = measure(load, system, &ids, progress, interrupt).await;
    progress.end();
    let leases = ids.taken();
    if !leases.is_empty() {
        progress.begin(&format!("revoking leases of {}", system.name), None);
        // Should this fail, the leases end by themselves.
        if let Ok(helpers) = connect().await {
            let _ = helpers.revoke(leases).await;
        }
        progress.end();
    }
    result
}

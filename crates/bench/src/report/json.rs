//! All figures for programs. Times are in nanoseconds, sizes in bytes, rates per second.

use serde_json::{Value, json};

use super::table::{compare, describe};
use super::warnings::warnings;
use crate::load::Load;
use crate::record::{Course, Row};
use crate::result::{Figures, Outcome, RunResult};

/// The whole result.
pub(crate) fn document(outcomes: &[Outcome]) -> Value {
    json!({
        "version": 1,
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "workloads": outcomes.iter().map(outcome).collect::<Vec<_>>(),
    })
}

fn outcome(outcome: &Outcome) -> Value {
    let load = &outcome.load;
    let compared = match &outcome.systems[..] {
        [a, b] => compare(load, a, b)
            .iter()
            .map(|line| {
                json!({
                    "row": line.row,
                    "figure": line.figure,
                    "a": line.ratio.a,
                    "b": line.ratio.b,
                    "ratio": line.ratio.ratio,
                    "lowest": line.ratio.low,
                    "highest": line.ratio.high,
                })
            })
            .collect(),
        _ => Vec::new(),
    };
    let systems: Vec<Value> = outcome
        .systems
        .iter()
        .map(|system| {
            json!({
                "name": system.name,
                "endpoints": system.endpoints,
                "rounds": system.rounds.iter().map(|round| run(load, round)).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({
        "workload": load.workload.name(),
        "description": describe(load),
        "settings": settings(load),
        "systems": systems,
        "compared": compared,
    })
}

fn settings(load: &Load) -> Value {
    json!({
        "clients": load.clients,
        "connections": load.connections,
        "threads": load.threads,
        "rate": load.rate,
        "duration_seconds": load.duration.map(|duration| duration.as_secs_f64()),
        "warmup_seconds": load.warmup.as_secs_f64(),
        "total": load.total,
        "timeout_seconds": load.timeout.as_secs_f64(),
        "keys": load.keys.count,
        "value_bytes": load.value_bytes,
        "values": format!("{:?}", load.values).to_lowercase(),
        "key_order": format!("{:?}", load.order).to_lowercase(),
        "range_size": load.range_size,
        "page": load.page,
        "serializable": load.serializable,
        "watchers": load.watchers,
        "watch_streams": load.watch_streams,
        "seed": load.seed,
    })
}

fn run(load: &Load, run: &RunResult) -> Value {
    let labels = load.workload.labels();
    let figures = run.figures(labels);
    let rows: Vec<Value> = run
        .named_rows(labels)
        .iter()
        .zip(&figures)
        .map(|((name, row), (_, figures))| row_json(name, row, figures))
        .collect();
    json!({
        "seconds": run.seconds,
        "rows": rows,
        "course": course(&run.course),
        "server": run.server.as_ref().map(|server| json!({
            "cpu_seconds": server.cpu_seconds,
            "cpu_per_op": run.server_cpu_per_op(labels),
            "peak_resident_bytes": server.peak_resident_bytes,
            "source": server.source,
        })),
        "generator": {
            "cpu_seconds": run.generator.cpu_seconds,
            "cpu_per_op": run.generator_cpu_per_op(labels),
            "busy": run.generator.busy,
            "waiting": run.generator.waiting,
            "lag_p99": run.generator.lag_p99,
            "pace_lag_p99": run.generator.pace_lag_p99,
        },
        "unsent": run.unsent,
        "reconnects": run.reconnects,
        "warnings": warnings(load, run),
    })
}

fn row_json(name: &str, row: &Row, figures: &Figures) -> Value {
    let percentiles: Vec<Value> = row
        .latency
        .iter_quantiles(2)
        .map(|value| json!([value.quantile_iterated_to(), value.value_iterated_to()]))
        .collect();
    let errors: serde_json::Map<String, Value> = row
        .errors
        .iter()
        .map(|error| {
            (
                error.kind.to_string(),
                json!({ "count": error.count, "example": error.example }),
            )
        })
        .collect();
    json!({
        "name": name,
        "done": row.done,
        "items": row.items,
        "per_second": figures.per_second,
        "items_per_second": figures.items_per_second,
        "latency": {
            "count": row.latency.len(),
            "mean": figures.mean,
            "min": if row.latency.is_empty() { 0 } else { row.latency.min() },
            "p50": figures.p50,
            "p90": figures.p90,
            "p99": figures.p99,
            "p99.9": figures.p999,
            "max": figures.max,
            "quantiles": percentiles,
        },
        "errors": errors,
    })
}

fn course(course: &Course) -> Value {
    let slots: Vec<Value> = course
        .slots
        .iter()
        .map(|slot| {
            json!({
                "done": slot.len(),
                "p50": slot.value_at_quantile(0.5),
                "p99": slot.value_at_quantile(0.99),
            })
        })
        .collect();
    json!({ "slot_nanoseconds": course.width, "slots": slots })
}

//! How much virtual time a second of one core buys, for clusters of three: `cargo bench -p metastore-sim`.

#![allow(clippy::print_stdout, reason = "a benchmark prints")]

use std::time::{Duration, Instant};

use metastore_sim::run::{catch_panics, run_scenario};
use metastore_sim::scenario::Scenario;
use metastore_sim::trace::Detail;

fn main() {
    catch_panics();
    let begun = Instant::now();
    let (mut seeds, mut time, mut events, mut answered) = (0, 0, 0, 0);
    while begun.elapsed() < Duration::from_secs(10) {
        seeds += 1;
        let mut rng = fastrand::Rng::with_seed(seeds);
        let scenario = Scenario {
            voters: 3,
            clients: 3,
            changes_members: false,
            ..Scenario::draw(&mut rng)
        };
        let report = run_scenario(seeds, scenario, Detail::Nothing, None);
        assert_eq!(report.failure, None, "seed {seeds}");
        time += report.time;
        events += report.events;
        answered += report.answered.0;
    }
    let took = begun.elapsed().as_secs_f64();
    println!(
        "{seeds} seeds of three members on one core: {:.0} virtual seconds a second, {:.0} events a second, {:.0} requests answered a second",
        time as f64 / 1e6 / took,
        events as f64 / took,
        answered as f64 / took
    );
}

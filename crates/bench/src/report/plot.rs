//! Plots, as SVG written by hand: latency by percentile, and throughput and latency over time.

use std::fmt::Write;

use super::table::describe;
use crate::clock::SECOND;
use crate::record::Course;
use crate::result::{Outcome, SystemOutcome};
use crate::units::{nanos, three_digits};

/// Size of one chart, with room for its axes, in pixels.
const WIDTH: f64 = 620.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 36.0;
/// Charts side by side for each workload.
const CHARTS: usize = 3;
/// Height of the line that says what the load was.
const HEADING: f64 = 26.0;
/// One for each system.
const COLOURS: [&str; 2] = ["#1f6fb4", "#d1622b"];
/// The quantiles of the first chart, as 1 - 10^-x; the steps between them are even on its axis.
const NINES_MAX: f64 = 4.0;

/// A line of a chart.
struct Line {
    name: String,
    colour: &'static str,
    dashed: bool,
    points: Vec<(f64, f64)>,
}

/// A chart whose axes both start at 0, or, for logarithmic latency, at the lowest power of ten that is needed.
struct Chart {
    title: &'static str,
    lines: Vec<Line>,
    /// Places and texts on the x axis.
    x_marks: Vec<(f64, String)>,
    x_max: f64,
    y_logarithmic: bool,
    y_text: fn(f64) -> String,
}

/// All workloads, one below the other.
pub(crate) fn svg(outcomes: &[Outcome]) -> String {
    let row = HEIGHT + HEADING;
    let (width, height) = (WIDTH * CHARTS as f64, row * outcomes.len() as f64);
    // Writing to a string cannot fail, here and below.
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" \
         fill=\"white\"/>\n"
    );
    for (index, outcome) in outcomes.iter().enumerate() {
        let top = index as f64 * row;
        let _ = writeln!(
            text,
            "<text x=\"12\" y=\"{}\" font-size=\"14\" font-weight=\"bold\">{}</text>",
            top + 18.0,
            escape(&describe(&outcome.load))
        );
        for (column, chart) in charts(outcome).iter().enumerate() {
            let _ = writeln!(
                text,
                "<g transform=\"translate({},{})\">",
                column as f64 * WIDTH,
                top + HEADING
            );
            draw(&mut text, chart);
            text.push_str("</g>\n");
        }
    }
    text.push_str("</svg>\n");
    text
}

/// Makes text fit for SVG and HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn charts(outcome: &Outcome) -> [Chart; CHARTS] {
    let labels = outcome.load.workload.labels();
    let systems = || outcome.systems.iter().zip(COLOURS);
    let percentiles = systems()
        .map(|(system, colour)| {
            let mut all = crate::record::Row::new();
            for round in &system.rounds {
                all.merge(&round.primary(labels));
            }
            let steps = (NINES_MAX * 20.0) as usize;
            let points = (0..=steps)
                .filter(|_| !all.latency.is_empty())
                .map(|step| {
                    let nines = step as f64 / 20.0;
                    let value = all.latency.value_at_quantile(1.0 - 10f64.powf(-nines));
                    (nines, value as f64)
                })
                .collect();
            Line {
                name: system.name.clone(),
                colour,
                dashed: false,
                points,
            }
        })
        .collect();
    let over_time = |quantiles: &[Option<f64>]| -> Vec<Line> {
        systems()
            .flat_map(|(system, colour)| {
                let course = last_course(system);
                quantiles
                    .iter()
                    .filter_map(|quantile| Some(course_line(&system.name, colour, course?, *quantile)))
                    .collect::<Vec<_>>()
            })
            .collect()
    };
    let throughput = over_time(&[None]);
    let latency = over_time(&[Some(0.5), Some(0.99)]);
    let seconds = throughput
        .iter()
        .chain(&latency)
        .flat_map(|line| &line.points)
        .fold(0.0, |most: f64, point| most.max(point.0));
    let time_marks = || {
        let step = round_step(seconds / 6.0);
        (0..)
            .map(|n| f64::from(n) * step)
            .take_while(|second| *second <= seconds)
            .map(|second| (second, format!("{} s", trim(second))))
            .take(20)
            .collect()
    };
    [
        Chart {
            title: "latency by percentile, all rounds",
            lines: percentiles,
            x_marks: ["0", "90 %", "99 %", "99.9 %", "99.99 %"]
                .iter()
                .enumerate()
                .map(|(nines, text)| (nines as f64, (*text).to_owned()))
                .collect(),
            x_max: NINES_MAX,
            y_logarithmic: true,
            y_text: nanos,
        },
        Chart {
            title: "operations a second, last round",
            lines: throughput,
            x_marks: time_marks(),
            x_max: seconds,
            y_logarithmic: false,
            y_text: three_digits,
        },
        Chart {
            title: "latency over time, last round: p50, and p99 dashed",
            lines: latency,
            x_marks: time_marks(),
            x_max: seconds,
            y_logarithmic: true,
            y_text: nanos,
        },
    ]
}

fn last_course(system: &SystemOutcome) -> Option<&Course> {
    system.rounds.last().map(|round| &round.course)
}

/// A quantile of latency over time, or without one the throughput.
fn course_line(name: &str, colour: &'static str, course: &Course, quantile: Option<f64>) -> Line {
    let width = course.width as f64 / SECOND as f64;
    // The last slot is cut off somewhere, so its throughput says nothing.
    let whole = course
        .slots
        .len()
        .saturating_sub(usize::from(quantile.is_none() && course.slots.len() > 1));
    let points = course.slots[..whole]
        .iter()
        .enumerate()
        .filter(|(_, slot)| quantile.is_none() || !slot.is_empty())
        .map(|(index, slot)| {
            let y = match quantile {
                Some(quantile) => slot.value_at_quantile(quantile) as f64,
                None => slot.len() as f64 / width,
            };
            ((index as f64 + 0.5) * width, y)
        })
        .collect();
    Line {
        name: name.to_owned(),
        colour,
        dashed: quantile.is_some_and(|quantile| quantile > 0.5),
        points,
    }
}

/// The least of 1, 2, 5 times a power of ten that is not below `step`.
fn round_step(step: f64) -> f64 {
    if step <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .iter()
        .map(|factor| factor * power)
        .find(|candidate| *candidate >= step * 0.999_999)
        .unwrap_or(10.0 * power)
}

fn trim(number: f64) -> String {
    let text = format!("{number:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn draw(text: &mut String, chart: &Chart) {
    let values = || chart.lines.iter().flat_map(|line| &line.points).map(|point| point.1);
    let highest = values().fold(0.0, f64::max);
    let (low, high, marks) = if chart.y_logarithmic {
        let lowest = values().fold(f64::INFINITY, f64::min).clamp(1.0, highest.max(1.0));
        let low = lowest.log10().floor();
        let high = highest.max(1.0).log10().ceil().max(low + 1.0);
        let marks: Vec<f64> = (low as i32..=high as i32).map(|power| 10f64.powi(power)).collect();
        (low, high, marks)
    } else {
        let step = round_step(highest / 5.0);
        let high = (highest / step).ceil().max(1.0) * step;
        let count = (high / step).round() as i32;
        (0.0, high, (0..=count).map(|n| f64::from(n) * step).collect())
    };
    let x = |value: f64| LEFT + value / chart.x_max.max(f64::MIN_POSITIVE) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| {
        let value = if chart.y_logarithmic {
            value.max(1.0).log10()
        } else {
            value
        };
        HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
    };
    let _ = writeln!(text, "<text x=\"{LEFT}\" y=\"14\">{}</text>", escape(chart.title));
    for mark in marks {
        let at = y(mark);
        let _ = writeln!(
            text,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" \
             text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            escape(&(chart.y_text)(mark))
        );
    }
    for (place, mark) in &chart.x_marks {
        let at = x(*place);
        let _ = writeln!(
            text,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{}\" stroke=\"#eee\"/><text x=\"{at:.1}\" \
             y=\"{}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - BOTTOM,
            HEIGHT - BOTTOM + 16.0,
            escape(mark)
        );
    }
    let mut named: Vec<&str> = Vec::new();
    for line in &chart.lines {
        let points: Vec<String> = line
            .points
            .iter()
            .map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1)))
            .collect();
        let dashes = if line.dashed { " stroke-dasharray=\"4 3\"" } else { "" };
        let _ = writeln!(
            text,
            "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\"{dashes} points=\"{}\"/>",
            line.colour,
            points.join(" ")
        );
        if !named.contains(&&line.name[..]) {
            let _ = writeln!(
                text,
                "<text x=\"{}\" y=\"30\" fill=\"{}\">{}</text>",
                LEFT + 90.0 * named.len() as f64,
                line.colour,
                escape(&line.name)
            );
            named.push(&line.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        assert_eq!([0.7, 1.0, 1.2, 3.0, 60.0].map(round_step), [1.0, 1.0, 2.0, 5.0, 100.0]);
        assert_eq!((trim(2.50), trim(10.0)), ("2.5".to_owned(), "10".to_owned()));
    }
}

//! The network between members: which links are cut, how long messages take, which are lost or come twice.

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;

use crate::scenario::Scenario;
use crate::{MS, Micros};

/// The state of all links.
#[derive(Default)]
pub struct Network {
    /// Directions that let nothing through.
    cut: BTreeSet<(usize, usize)>,
    /// Directions that are slow, and by how much.
    slow: BTreeMap<(usize, usize), Micros>,
    /// When the last message of each direction arrives.
    last: BTreeMap<(usize, usize), Micros>,
    /// No loss, no duplicates any more.
    calm: bool,
}

impl Network {
    /// Whether messages get from one node to another.
    pub fn is_open(&self, from: usize, to: usize) -> bool {
        !self.cut.contains(&(from, to))
    }

    /// Cuts one direction.
    pub fn cut(&mut self, from: usize, to: usize) {
        self.cut.insert((from, to));
    }

    /// Makes one direction slow.
    pub fn slow_down(&mut self, from: usize, to: usize, by: Micros) {
        self.slow.insert((from, to), by);
    }

    /// Mends all links.
    pub fn heal(&mut self) {
        self.cut.clear();
        self.slow.clear();
    }

    /// From now on nothing is lost or doubled.
    pub fn calm_down(&mut self) {
        self.heal();
        self.calm = true;
    }

    /// When a message that leaves now arrives: never, once or twice.
    pub fn arrivals(&mut self, from: usize, to: usize, now: Micros, scenario: &Scenario, rng: &mut Rng) -> Vec<Micros> {
        if !self.is_open(from, to) || (!self.calm && rng.f64() < scenario.loss) {
            return Vec::new();
        }
        let copies = 1 + usize::from(!self.calm && rng.f64() < scenario.duplicates);
        let extra = self.slow.get(&(from, to)).copied().unwrap_or(0);
        (0..copies)
            .map(|_| {
                let mut delay = rng.u64(scenario.delay.clone()) + extra;
                if !self.calm && rng.f64() < scenario.slow {
                    delay += rng.u64(..3000) * MS;
                }
                let mut at = now + delay;
                if scenario.ordered {
                    let last = self.last.entry((from, to)).or_default();
                    at = at.max(*last + 1);
                    *last = at;
                }
                at
            })
            .collect()
    }
}

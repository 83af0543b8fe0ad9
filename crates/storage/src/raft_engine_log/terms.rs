//! Which entries have which term: terms never fall along a log, so a few runs say it all.

use std::collections::VecDeque;

/// Runs of entries of one term. The first run begins at the base, the entry right before the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TermRuns {
    /// First index and term of each run; never empty.
    runs: VecDeque<(u64, u64)>,
}

impl TermRuns {
    /// A log that holds nothing after the entry `base_index` of `base_term`.
    pub(super) fn new(base_index: u64, base_term: u64) -> TermRuns {
        TermRuns {
            runs: VecDeque::from([(base_index, base_term)]),
        }
    }

    /// Finds the runs of a log that holds `base_index + 1 ..= last`, asking for few terms.
    pub(super) fn find<E>(
        base_index: u64,
        base_term: u64,
        last: u64,
        mut term_of: impl FnMut(u64) -> Result<u64, E>,
    ) -> Result<TermRuns, E> {
        let mut runs = TermRuns::new(base_index, base_term);
        let mut index = base_index + 1;
        while index <= last {
            let term = term_of(index)?;
            runs.push(index, term);
            // The run ends in `held..=beyond`, where `held` has its term.
            let (mut held, mut beyond) = (index, last + 1);
            if term_of(last)? == term {
                held = last;
            }
            while held + 1 < beyond {
                let middle = held + (beyond - held) / 2;
                if term_of(middle)? == term {
                    held = middle;
                } else {
                    beyond = middle;
                }
            }
            index = held + 1;
        }
        Ok(runs)
    }

    pub(super) fn base(&self) -> (u64, u64) {
        self.runs[0]
    }

    pub(super) fn base_index(&self) -> u64 {
        self.base().0
    }

    /// The term of an entry that is in the log, or of the base; `None` before.
    pub(super) fn term(&self, index: u64) -> Option<u64> {
        let after = self.runs.partition_point(|&(first, _)| first <= index);
        after.checked_sub(1).map(|run| self.runs[run].1)
    }

    /// Adds the entry after the last one.
    pub(super) fn push(&mut self, index: u64, term: u64) {
        if self.runs.back().is_none_or(|&(_, last_term)| last_term != term) {
            self.runs.push_back((index, term));
        }
    }

    /// Forgets the entries at and after `index`, which lies after the base.
    pub(super) fn truncate(&mut self, index: u64) {
        while self.runs.len() > 1 && self.runs.back().is_some_and(|&(first, _)| first >= index) {
            self.runs.pop_back();
        }
    }

    /// Makes the entry at `index` the base.
    pub(super) fn trim(&mut self, index: u64) {
        while self.runs.len() > 1 && self.runs[1].0 <= index {
            self.runs.pop_front();
        }
        self.runs[0].0 = index;
    }
}

#[cfg(test)]
mod tests {
    use super::TermRuns;

    #[test]
    fn finds_runs_with_few_questions() {
        let terms = [1, 1, 1, 2, 5, 5, 5, 5, 5, 9];
        let mut asked = 0;
        let runs = TermRuns::find(10, 1, 20, |index| {
            asked += 1;
            Ok::<_, ()>(terms[(index - 11) as usize])
        })
        .unwrap();
        for (index, term) in (11..).zip(terms) {
            assert_eq!(runs.term(index), Some(term));
        }
        assert_eq!((runs.term(10), runs.term(9)), (Some(1), None));
        assert!(asked < 24, "{asked}");
    }

    #[test]
    fn follows_appends_overwrites_and_trims() {
        let mut runs = TermRuns::new(0, 0);
        for (index, term) in [(1, 1), (2, 1), (3, 2), (4, 2)] {
            runs.push(index, term);
        }
        runs.truncate(3);
        runs.push(3, 4);
        assert_eq!((runs.term(2), runs.term(3)), (Some(1), Some(4)));
        runs.trim(2);
        assert_eq!((runs.base(), runs.term(1), runs.term(3)), ((2, 1), None, Some(4)));
        runs.trim(3);
        assert_eq!(runs, TermRuns::new(3, 4));
    }
}

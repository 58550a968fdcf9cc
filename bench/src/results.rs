//! What was measured, and how repetitions become one figure.

use std::{collections::BTreeMap, time::Duration};

use crate::usage::Usage;

/// One measurement: a load for a while.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    /// Calls a second.
    pub rate: f64,
    /// Latencies in milliseconds.
    pub median: Option<f64>,
    pub p99: Option<f64>,
    /// CPU time of a call in microseconds.
    pub service: f64,
    pub database: f64,
    pub generator: f64,
}

impl Cell {
    /// `None` if there were no calls.
    pub fn new(mut latencies: Vec<Duration>, elapsed: Duration, used: Usage) -> Option<Self> {
        latencies.sort_unstable();
        let calls = latencies.len();
        let at = |share: f64| Some(latencies.get((calls as f64 * share) as usize)?.as_secs_f64() * 1e3);
        Some(Self {
            median: Some(at(0.5)?),
            p99: Some(at(0.99)?),
            ..Self::without_latencies(calls as f64 / elapsed.as_secs_f64(), calls as f64, used)
        })
    }

    /// What pgbench tells.
    pub fn without_latencies(rate: f64, calls: f64, used: Usage) -> Self {
        let per_call = |time: Duration| time.as_secs_f64() * 1e6 / calls;
        Self {
            rate,
            median: None,
            p99: None,
            service: per_call(used.service),
            database: per_call(used.database),
            generator: per_call(used.generator),
        }
    }

    /// CPU time of a call without what it takes to make it.
    pub fn cpu(&self) -> f64 {
        self.service + self.database
    }

    pub fn p99(&self) -> f64 {
        self.p99.unwrap_or(f64::NAN)
    }

    /// How much of its one thread the load generator used.
    pub fn generator_share(&self) -> f64 {
        self.generator * self.rate / 1e6
    }
}

/// Measurements by what was measured, each with its repetitions.
#[derive(Debug)]
pub struct Results<K>(BTreeMap<K, Vec<Cell>>);

impl<K> Default for Results<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Copy> Results<K> {
    pub fn push(&mut self, key: K, cell: Cell) {
        self.0.entry(key).or_default().push(cell);
    }

    /// A figure of each repetition.
    pub fn each(&self, key: K, figure: impl Fn(&Cell) -> f64) -> Vec<f64> {
        self.0.get(&key).into_iter().flatten().map(figure).collect()
    }

    /// The median of all repetitions, figure by figure.
    pub fn median(&self, key: K) -> Option<Cell> {
        self.0.get(&key).map(|cells| median_cell(cells))
    }

    /// All medians.
    pub fn medians(&self) -> impl Iterator<Item = (K, Cell)> {
        self.0.iter().map(|(key, cells)| (*key, median_cell(cells)))
    }
}

fn median_cell(cells: &[Cell]) -> Cell {
    let median = |figure: fn(&Cell) -> f64| Summary::of(cells.iter().map(figure).collect()).median;
    let median_if_any = |figure: fn(&Cell) -> Option<f64>| {
        let figures: Option<Vec<f64>> = cells.iter().map(figure).collect();
        figures.map(|figures| Summary::of(figures).median)
    };
    Cell {
        rate: median(|cell| cell.rate),
        median: median_if_any(|cell| cell.median),
        p99: median_if_any(|cell| cell.p99),
        service: median(|cell| cell.service),
        database: median(|cell| cell.database),
        generator: median(|cell| cell.generator),
    }
}

/// One by one, so that a ratio is of measurements made next to one another.
pub fn ratios(above: &[f64], below: &[f64]) -> Vec<f64> {
    above.iter().zip(below).map(|(above, below)| above / below).collect()
}

/// Several repetitions of one figure.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Summary {
    /// Of nothing, it is not a number.
    pub fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_unstable_by(f64::total_cmp);
        let at = |index: usize| figures.get(index).copied().unwrap_or(f64::NAN);
        let last = figures.len().saturating_sub(1);
        Self { median: (at(last / 2) + at(last.div_ceil(2))) / 2.0, min: at(0), max: at(last) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one_or_between_the_two_in_the_middle() {
        let summary = Summary::of(vec![3.0, 1.0, 2.0]);
        assert_eq!((summary.min, summary.median, summary.max), (1.0, 2.0, 3.0));
        assert_eq!(Summary::of(vec![4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert!(Summary::of(vec![]).median.is_nan());
    }
}

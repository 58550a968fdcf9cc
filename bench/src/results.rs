//! Measurements, and how repetitions become one figure.

use std::{collections::BTreeMap, time::Duration};

use crate::{plan::Variant, requests::Work, usage::Usage};

/// One measurement under load.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    /// Calls per second.
    pub rate: f64,
    /// Latencies in milliseconds; NaN from pgbench, which does not report them.
    pub median: f64,
    pub p99: f64,
    /// CPU time per call in microseconds.
    pub service: f64,
    pub database: f64,
    pub generator: f64,
}

impl Cell {
    pub fn new(calls: f64, rate: f64, latencies: Option<Quantiles>, used: Usage) -> Self {
        let Quantiles { median, p99 } = latencies.unwrap_or(Quantiles { median: f64::NAN, p99: f64::NAN });
        let per_call = |time: Duration| time.as_secs_f64() * 1e6 / calls;
        let (service, database) = (per_call(used.service), per_call(used.database));
        Self { rate, median, p99, service, database, generator: per_call(used.generator) }
    }

    /// The median of several cells, figure by figure.
    fn median_of(cells: &[Self]) -> Self {
        let median =
            |figure: fn(&Self) -> f64| Summary::of(&cells.iter().map(figure).collect::<Vec<_>>()).median;
        Self {
            rate: median(|cell| cell.rate),
            median: median(|cell| cell.median),
            p99: median(|cell| cell.p99),
            service: median(|cell| cell.service),
            database: median(|cell| cell.database),
            generator: median(|cell| cell.generator),
        }
    }

    /// The same with users per second, and CPU time per user.
    pub fn per_user(self, users: f64) -> Self {
        let [service, database, generator] =
            [self.service, self.database, self.generator].map(|time| time / users);
        Self { rate: self.rate * users, service, database, generator, ..self }
    }

    /// CPU time of the service and the database per call.
    pub fn cpu(&self) -> f64 {
        self.service + self.database
    }

    /// How much of its one thread the load generator used.
    pub fn generator_share(&self) -> f64 {
        self.generator * self.rate / 1e6
    }
}

/// Latencies in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Quantiles {
    pub median: f64,
    pub p99: f64,
}

impl Quantiles {
    /// `None` without latencies.
    pub fn of(mut latencies: Vec<f64>) -> Option<Self> {
        latencies.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| latencies.get((latencies.len() as f64 * share) as usize).copied();
        Some(Self { median: at(0.5)?, p99: at(0.99)? })
    }
}

/// The part of the report that a cell belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    Calls,
    /// Coalescing on and off at the same rate.
    SameRate,
    /// The same calls on tables of different sizes.
    TableSize,
    /// One user per call beside a thousand users per call.
    ManyUsers,
    Baseline,
}

/// What a cell measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub section: Section,
    pub work: Work,
    pub variant: Variant,
    /// Users in the database at the start.
    pub users: u64,
    /// Calls in flight, or sessions of pgbench.
    pub load: usize,
}

impl Section {
    pub fn key(self, work: Work, variant: Variant, load: usize, users: u64) -> Key {
        Key { section: self, work, variant, users, load }
    }
}

/// A measurement that is not a load: its name and unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Figure {
    pub name: &'static str,
    pub unit: &'static str,
}

impl Figure {
    pub const fn new(name: &'static str, unit: &'static str) -> Self {
        Self { name, unit }
    }
}

/// Measurements, each with its repetitions.
#[derive(Debug, Default)]
pub struct Results {
    cells: BTreeMap<Key, Vec<Cell>>,
    figures: BTreeMap<Figure, Vec<f64>>,
}

impl Results {
    pub fn push(&mut self, key: Key, cell: Cell) {
        self.cells.entry(key).or_default().push(cell);
    }

    pub fn push_figure(&mut self, figure: Figure, value: f64) {
        self.figures.entry(figure).or_default().push(value);
    }

    /// A figure of each repetition.
    pub fn each(&self, key: Key, figure: impl Fn(&Cell) -> f64) -> Vec<f64> {
        self.cells.get(&key).into_iter().flatten().map(figure).collect()
    }

    /// The repetitions of a figure.
    pub fn figure(&self, figure: Figure) -> &[f64] {
        self.figures.get(&figure).map_or(&[], Vec::as_slice)
    }

    /// The median cell, if there is one.
    pub fn median(&self, key: Key) -> Option<Cell> {
        self.cells.get(&key).map(|cells| Cell::median_of(cells))
    }

    /// The median cells of a table.
    pub fn medians(&self, section: Section) -> impl Iterator<Item = (Key, Cell)> {
        let cells = self.cells.iter().filter(move |(key, _)| key.section == section);
        cells.map(|(key, cells)| (*key, Cell::median_of(cells)))
    }
}

/// Divides repetition by repetition, so that a ratio compares measurements that were made
/// next to each other.
pub fn ratios(numerators: &[f64], denominators: &[f64]) -> Vec<f64> {
    numerators.iter().zip(denominators).map(|(numerator, denominator)| numerator / denominator).collect()
}

/// Several repetitions of one figure; NaN if there are none.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Summary {
    pub fn of(figures: &[f64]) -> Self {
        let mut sorted = figures.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let last = sorted.len().saturating_sub(1);
        Self { median: (at(last / 2) + at(last.div_ceil(2))) / 2.0, min: at(0), max: at(last) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_or_the_mean_of_the_two_middle_figures() {
        let summary = Summary::of(&[3.0, 1.0, 2.0]);
        assert_eq!((summary.min, summary.median, summary.max), (1.0, 2.0, 3.0));
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert!(Summary::of(&[]).median.is_nan());
    }
}

//! Measurements, and how repetitions become one figure.

use std::{collections::BTreeMap, ops::Div};

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
    pub fn new(calls: f64, rate: f64, [median, p99]: [f64; 2], used: Usage) -> Self {
        let [service, database, generator] = used.map(|time| time.as_secs_f64() * 1e6 / calls);
        Self { rate, median, p99, service, database, generator }
    }

    /// The median of several cells, figure by figure.
    fn median_of(cells: &[Self]) -> Self {
        let median = |figure: fn(&Self) -> f64| cells.iter().map(figure).collect::<Samples>().median();
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

/// The median and the 99th percentile; `None` without values.
pub fn quantiles(mut values: Vec<f64>) -> Option<[f64; 2]> {
    values.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| values.get((values.len() as f64 * share) as usize).copied();
    Some([at(0.5)?, at(0.99)?])
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
pub struct Figure(pub &'static str, pub &'static str);

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

    /// A figure of the cells of each repetition.
    pub fn each(&self, key: Key, figure: impl Fn(&Cell) -> f64) -> Samples {
        self.cells.get(&key).into_iter().flatten().map(figure).collect()
    }

    pub fn figure(&self, figure: Figure) -> Samples {
        self.figures.get(&figure).into_iter().flatten().copied().collect()
    }

    /// The median cells of a section.
    pub fn medians(&self, section: Section) -> impl Iterator<Item = (Key, Cell)> {
        let cells = self.cells.iter().filter(move |(key, _)| key.section == section);
        cells.map(|(key, cells)| (*key, Cell::median_of(cells)))
    }
}

/// One figure of each repetition.
#[derive(Debug, Clone)]
pub struct Samples(pub Vec<f64>);

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(samples: I) -> Self {
        Self(samples.into_iter().collect())
    }
}

/// Divides repetition by repetition, so that a ratio compares measurements that were made
/// next to each other.
impl Div for Samples {
    type Output = Self;

    fn div(self, divisor: Self) -> Self {
        self.0.iter().zip(&divisor.0).map(|(dividend, divisor)| dividend / divisor).collect()
    }
}

impl Samples {
    /// NaN if there are none.
    pub fn median(&self) -> f64 {
        let sorted = self.sorted();
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let last = sorted.len().saturating_sub(1);
        (at(last / 2) + at(last.div_ceil(2))) / 2.0
    }

    /// The lowest and the highest sample, such as ` (0.98 to 1.02)`; empty for a single one.
    pub fn range(&self, number: impl Fn(f64) -> String) -> String {
        match self.sorted()[..] {
            [min, .., max] => format!(" ({} to {})", number(min), number(max)),
            _ => String::new(),
        }
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        sorted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_or_the_mean_of_the_two_middle_figures() {
        let samples = Samples(vec![3.0, 1.0, 2.0]);
        assert_eq!(samples.median(), 2.0);
        assert_eq!(samples.range(|n| n.to_string()), " (1 to 3)");
        assert_eq!(Samples(vec![4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        assert!(Samples(vec![]).median().is_nan());
    }

    #[test]
    fn ratios_are_taken_within_repetitions() {
        assert_eq!((Samples(vec![2.0, 9.0]) / Samples(vec![1.0, 3.0])).0, [2.0, 3.0]);
    }
}

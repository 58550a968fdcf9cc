//! The targets, and whether the measurements meet them.

use crate::{
    bulk, feed,
    format::amount,
    plan::{BUSY, LOADS, Plan, Variant},
    requests::Work,
    results::{Cell, Figure, Results, Samples, Section},
    run,
};

/// A figure with its minimum and target. Both are numbers with an optional unit behind;
/// with `≤` in front, less is better.
#[derive(Debug)]
pub struct Target {
    pub what: String,
    pub minimum: &'static str,
    /// Empty if there is none beyond the minimum.
    pub target: &'static str,
    pub measured: Samples,
}

impl Target {
    fn new(what: impl Into<String>, [minimum, target]: [&'static str; 2], samples: Samples) -> Self {
        Self { what: what.into(), minimum, target, measured: samples }
    }

    /// Whether the median meets the minimum or target.
    pub fn meets(&self, limit: &str) -> bool {
        let number = limit.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(f64::NAN);
        let median = self.measured.median();
        if limit.starts_with('≤') { median <= number } else { median >= number }
    }

    /// The unit behind the numbers.
    pub fn unit(&self) -> &'static str {
        self.minimum.trim_start_matches(|c: char| !c.is_alphabetic())
    }
}

/// All targets, in the order of the report.
pub fn targets(results: &Results, plan: &Plan) -> Vec<Target> {
    let mut targets = calls(results, plan);
    targets.extend(sizes(results, plan));
    targets.extend(figures(results));
    targets
}

fn calls(results: &Results, plan: &Plan) -> Vec<Target> {
    use Variant::{Coalesced as On, Single as Off};
    let each = |section: Section, work, variant, load, figure: fn(&Cell) -> f64| {
        results.each(section.key(work, variant, load, plan.users), figure)
    };
    let rate = |work, variant, load| each(Section::Calls, work, variant, load, |cell| cell.rate);
    let get = |variant, load| rate(Work::GetById, variant, load);
    let to_empty = |load| get(On, load) / rate(Work::Empty, On, load);
    let to_pgbench = |work| rate(work, On, 512) / best_of_pgbench(results, plan, work);
    let cpu = |variant| each(Section::Calls, Work::GetById, variant, 512, Cell::cpu);
    let p99 = |variant| each(Section::SameRate, Work::GetById, variant, BUSY, |cell| cell.p99);
    vec![
        Target::new("`GetUser` ÷ empty call, 512 in flight", ["0.70", "0.85"], to_empty(512)),
        Target::new("`GetUser` ÷ empty call, 100 in flight", ["0.72", "0.85"], to_empty(100)),
        Target::new("`GetUser`, 512 in flight ÷ best of pgbench", ["1.5", "2.0"], to_pgbench(Work::GetById)),
        Target::new(
            "`CreateUser`, 512 in flight ÷ best of pgbench",
            ["4.0", "5.0"],
            to_pgbench(Work::Create),
        ),
        Target::new(
            "`UpdateUser`, 512 in flight ÷ best of pgbench",
            ["3.5", "5.0"],
            to_pgbench(Work::Update),
        ),
        Target::new(
            "`GetUser`, 512 in flight: coalescing on ÷ off",
            ["2.5", "3.5"],
            get(On, 512) / get(Off, 512),
        ),
        Target::new("`GetUser`, 1 in flight: coalescing on ÷ off", ["1.0", "1.2"], get(On, 1) / get(Off, 1)),
        Target::new("its CPU time, 512 in flight: on ÷ off", ["≤ 0.36", "≤ 0.25"], cpu(On) / cpu(Off)),
        Target::new("its p99, at the highest rate of off: on ÷ off", ["≤ 0.7", "≤ 0.5"], p99(On) / p99(Off)),
    ]
}

/// What depends on the size of the table. The larger it is, the more of a `LookupUsers` and of
/// a `GetUser` is the same walk down the index.
fn sizes(results: &Results, plan: &Plan) -> Vec<Target> {
    let each = |section: Section, work, load, users| {
        results.each(section.key(work, Variant::Coalesced, load, users), |cell| cell.rate)
    };
    let many = |work, load, users| each(Section::ManyUsers, work, load, users);
    let sized = |work, users| each(Section::TableSize, work, BUSY, users);
    let (Some(&small), Some(&large)) = (plan.sizes.first(), plan.sizes.last()) else { return Vec::new() };
    let growth = format!("`GetUser` with {} users ÷ with {}", amount(large), amount(small));
    let pages = format!("deep page ÷ first page, {} users", amount(large));
    let batches = "users/s of `BatchCreateUsers` ÷ of 1000 `CreateUser` in flight";
    let ratio = many(Work::BatchCreate, 4, plan.users) / many(Work::Create, 1000, plan.users);
    let mut targets = vec![
        Target::new(growth, ["0.80", "0.90"], sized(Work::GetById, large) / sized(Work::GetById, small)),
        Target::new(pages, ["0.90", "1.0"], sized(Work::DeepPage, large) / sized(Work::FirstPage, large)),
        Target::new(batches, ["2", ""], ratio),
    ];
    targets.extend(plan.sizes.iter().map(|&users| {
        let ratio = many(Work::Lookup, 4, users) / many(Work::GetById, 1000, users);
        let what = format!("users/s of `LookupUsers` ÷ of 1000 `GetUser` in flight, {} users", amount(users));
        Target::new(what, ["5", ""], ratio)
    }));
    targets
}

fn figures(results: &Results) -> Vec<Target> {
    let [.., (_, [same_median, same_p99, _, other_p99])] = feed::DELIVERY;
    let of = |figure| results.figure(figure);
    let ratio = |what, minimum, above, below| Target::new(what, [minimum, ""], of(above) / of(below));
    let figure = |figure: Figure, limits| Target::new(figure.0, limits, of(figure));
    vec![
        ratio("`ImportUsers` ÷ `psql \\copy`, both with change log", "0.6", bulk::IMPORT, bulk::COPY_IN),
        ratio("`ExportUsers` ÷ binary `COPY` to stdout", "0.5", bulk::EXPORT, bulk::COPY_OUT),
        figure(bulk::IMPORT_MEMORY, ["≤ 64 MiB", ""]),
        figure(bulk::EXPORT_MEMORY, ["≤ 64 MiB", ""]),
        Target::new("delivery at 50 % creates, same replica: median", ["≤ 10 ms", ""], of(same_median)),
        Target::new("delivery at 50 % creates, same replica: p99", ["≤ 50 ms", ""], of(same_p99)),
        Target::new("delivery at 50 % creates, another replica: p99", ["≤ 250 ms", ""], of(other_p99)),
        ratio("creates with 1000 watchers ÷ without", "0.85", feed::WATCHED, feed::UNWATCHED),
        figure(feed::WATCHER_MEMORY, ["≤ 64 KiB", ""]),
        ratio("creates with the change log ÷ without", "0.85", feed::LOGGED, feed::UNLOGGED),
        ratio("catching up ÷ `ExportUsers`, same users", "0.5", bulk::CATCH_UP, bulk::EXPORT_OF_IMPORTED),
        figure(run::STARTUP, ["≤ 150 ms", "≤ 60 ms"]),
        figure(run::PEAK_MEMORY, ["≤ 64 MiB", "≤ 32 MiB"]),
    ]
}

/// The best rate of each repetition.
pub fn best_of_pgbench(results: &Results, plan: &Plan, work: Work) -> Samples {
    let rates = LOADS.map(|(_, sessions)| {
        results.each(Section::Calls.key(work, Variant::Pgbench, sessions, plan.users), |cell| cell.rate)
    });
    let of_repetition = |n: usize| rates.iter().filter_map(|rates| rates.0.get(n).copied()).reduce(f64::max);
    (0..).map_while(of_repetition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_lower_or_upper_bounds() {
        let target = |measured| Target::new("", ["≤ 60 ms", "0.70"], Samples(vec![measured]));
        assert!(target(0.7).meets("0.70") && !target(0.69).meets("0.70"));
        assert!(target(60.0).meets("≤ 60 ms") && !target(60.1).meets("≤ 60 ms"));
        assert_eq!(target(1.0).unit(), "ms");
    }
}

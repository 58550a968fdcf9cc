//! The targets, and whether the measurements meet them.

use crate::{
    bulk, feed,
    format::amount,
    plan::{BUSY, LOADS, Plan, Variant},
    requests::Work,
    results::{Cell, Figure, Results, Section, Summary, ratios},
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
    pub measured: Summary,
}

impl Target {
    fn new(what: impl Into<String>, minimum: &'static str, target: &'static str, figures: &[f64]) -> Self {
        Self { what: what.into(), minimum, target, measured: Summary::of(figures) }
    }

    /// The figure is a ratio, taken within each repetition.
    fn ratio(what: impl Into<String>, limits: [&'static str; 2], above: &[f64], below: &[f64]) -> Self {
        let [minimum, target] = limits;
        Self::new(what, minimum, target, &ratios(above, below))
    }

    /// Whether the median meets the minimum or target.
    pub fn meets(&self, limit: &str) -> bool {
        let number = limit.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(f64::NAN);
        if limit.starts_with('≤') { self.measured.median <= number } else { self.measured.median >= number }
    }

    /// The unit behind the numbers.
    pub fn unit(&self) -> &'static str {
        self.minimum.trim_start_matches(|c: char| !c.is_alphabetic())
    }
}

pub fn targets(results: &Results, plan: &Plan) -> Vec<Target> {
    [calls(results, plan), table_size(results, plan), many_users(results, plan), feed_and_program(results)]
        .into_iter()
        .flatten()
        .collect()
}

fn calls(results: &Results, plan: &Plan) -> Vec<Target> {
    use Variant::{Coalesced, Single};
    let each = |section: Section, work, variant, load, figure: fn(&Cell) -> f64| {
        results.each(section.key(work, variant, load, plan.users), figure)
    };
    let rate = |work, variant, load| each(Section::Calls, work, variant, load, |cell| cell.rate);
    let get = |variant, load| rate(Work::GetById, variant, load);
    let empty = |load| rate(Work::Empty, Coalesced, load);
    let cpu = |variant| each(Section::Calls, Work::GetById, variant, 512, Cell::cpu);
    let p99 = |variant| each(Section::SameRate, Work::GetById, variant, BUSY, |cell| cell.p99);
    let to_pgbench = |what: &str, limits, work| {
        let what = format!("`{what}` ÷ best of pgbench with the same statement, 512 in flight");
        Target::ratio(what, limits, &rate(work, Coalesced, 512), &best_of_pgbench(results, plan, work))
    };
    let to_single =
        |what: &str, limits, load| Target::ratio(what, limits, &get(Coalesced, load), &get(Single, load));
    vec![
        Target::ratio(
            "`GetUser` ÷ empty call, 512 in flight",
            ["0.70", "0.85"],
            &get(Coalesced, 512),
            &empty(512),
        ),
        Target::ratio(
            "`GetUser` ÷ empty call, 100 in flight",
            ["0.72", "0.85"],
            &get(Coalesced, 100),
            &empty(100),
        ),
        to_pgbench("GetUser", ["1.5", "2.0"], Work::GetById),
        to_single("`GetUser`, coalescing on ÷ off, 512 in flight", ["2.5", "3.5"], 512),
        Target::ratio(
            "CPU of `GetUser`, service + database, coalescing on ÷ off, 512 in flight",
            ["≤ 0.36", "≤ 0.25"],
            &cpu(Coalesced),
            &cpu(Single),
        ),
        to_single("`GetUser`, coalescing on ÷ off, 1 in flight", ["1.0", "1.2"], 1),
        to_pgbench("CreateUser", ["4.0", "5.0"], Work::Create),
        to_pgbench("UpdateUser", ["3.5", "5.0"], Work::Update),
        Target::ratio(
            "99th percentile of `GetUser`, coalescing on ÷ off, at the highest rate of the latter",
            ["≤ 0.7", "≤ 0.5"],
            &p99(Coalesced),
            &p99(Single),
        ),
    ]
}

/// About the largest table of the run.
fn table_size(results: &Results, plan: &Plan) -> Vec<Target> {
    let rate = |work, users| {
        results.each(Section::TableSize.key(work, Variant::Coalesced, BUSY, users), |cell| cell.rate)
    };
    let (Some(&small), Some(&large)) = (plan.sizes.first(), plan.sizes.last()) else { return Vec::new() };
    let (get, pages) = (|users| rate(Work::GetById, users), [Work::DeepPage, Work::FirstPage]);
    let [deep, first] = pages.map(|page| rate(page, large));
    vec![
        Target::ratio(
            format!("`GetUser` with {} users ÷ with {}", amount(large), amount(small)),
            ["0.80", "0.90"],
            &get(large),
            &get(small),
        ),
        Target::ratio(
            format!("deep page ÷ first page, {} users", amount(large)),
            ["0.90", "1.0"],
            &deep,
            &first,
        ),
    ]
}

/// In users per second. The larger the table, the more of a lookup and of a call is the same
/// walk down the index.
fn many_users(results: &Results, plan: &Plan) -> Vec<Target> {
    let rate = |(work, load), users| {
        results.each(Section::ManyUsers.key(work, Variant::Coalesced, load, users), |cell| cell.rate)
    };
    let lookup = |&users: &u64| {
        let what = format!("`LookupUsers` of 1000 ÷ 1000 `GetUser` in flight, {} users", amount(users));
        Target::ratio(what, ["5", ""], &rate((Work::Lookup, 4), users), &rate((Work::GetById, 1000), users))
    };
    let ratio = |what, minimum, above, below| {
        Target::ratio(what, [minimum, ""], results.figure(above), results.figure(below))
    };
    let memory = |figure: Figure| Target::new(figure.name, "≤ 64 MiB", "", results.figure(figure));
    let mut targets: Vec<_> = plan.sizes.iter().map(lookup).collect();
    targets.extend([
        Target::ratio(
            "`BatchCreateUsers` of 1000 ÷ 1000 `CreateUser` in flight",
            ["2", ""],
            &rate((Work::BatchCreate, 4), plan.users),
            &rate((Work::Create, 1000), plan.users),
        ),
        ratio(
            "`ImportUsers` ÷ `psql \\copy` of the same rows and change log",
            "0.6",
            bulk::IMPORT,
            bulk::COPY_IN,
        ),
        ratio(
            "`ExportUsers` ÷ binary `COPY` to stdout of the same rows",
            "0.5",
            bulk::EXPORT,
            bulk::COPY_OUT,
        ),
        memory(bulk::IMPORT_MEMORY),
        memory(bulk::EXPORT_MEMORY),
    ]);
    targets
}

fn feed_and_program(results: &Results) -> Vec<Target> {
    let [.., (_, [same_median, same_p99, _, other_p99])] = feed::DELIVERY;
    let figure = |what, minimum, target, figure| Target::new(what, minimum, target, results.figure(figure));
    let ratio = |what, minimum, above, below| {
        Target::ratio(what, [minimum, ""], results.figure(above), results.figure(below))
    };
    vec![
        figure(
            "delivery at half of the highest create rate, same replica: median",
            "≤ 10 ms",
            "",
            same_median,
        ),
        figure("delivery at half of the highest create rate, same replica: p99", "≤ 50 ms", "", same_p99),
        figure(
            "delivery at half of the highest create rate, another replica: p99",
            "≤ 250 ms",
            "",
            other_p99,
        ),
        ratio("creates with 1000 watchers ÷ without", "0.85", feed::WATCHED, feed::UNWATCHED),
        figure(feed::WATCHER_MEMORY.name, "≤ 64 KiB", "", feed::WATCHER_MEMORY),
        ratio("creates with the change log ÷ without", "0.85", feed::LOGGED, feed::UNLOGGED),
        ratio(
            "catching up a million changes ÷ `ExportUsers` of the same users",
            "0.5",
            bulk::CATCH_UP,
            bulk::EXPORT_OF_IMPORTED,
        ),
        figure(run::STARTUP.name, "≤ 150 ms", "≤ 60 ms", run::STARTUP),
        figure(run::PEAK_MEMORY.name, "≤ 64 MiB", "≤ 32 MiB", run::PEAK_MEMORY),
    ]
}

/// The best rate of each repetition.
pub fn best_of_pgbench(results: &Results, plan: &Plan, work: Work) -> Vec<f64> {
    let rates = LOADS.map(|(_, sessions)| {
        results.each(Section::Calls.key(work, Variant::Pgbench, sessions, plan.users), |cell| cell.rate)
    });
    let of_repetition = |n: usize| rates.iter().filter_map(|rates| rates.get(n).copied()).reduce(f64::max);
    (0..).map_while(of_repetition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_lower_or_upper_bounds() {
        let target = |measured| Target::new("", "≤ 60 ms", "0.70", &[measured]);
        assert!(target(0.7).meets("0.70") && !target(0.69).meets("0.70"));
        assert!(target(60.0).meets("≤ 60 ms") && !target(60.1).meets("≤ 60 ms"));
        assert_eq!(target(1.0).unit(), "ms");
    }
}

//! What was aimed at, and whether it was reached.

use crate::{
    calls::Work,
    report::amount,
    results::{Cell, Summary, ratios},
    run::{By, Findings, LOADS, Plan},
};

/// A figure, the least that it shall be, and what we would like it to be: numbers
/// with `≤` in front where less is better, and a unit behind.
#[derive(Debug)]
pub struct Criterion {
    pub what: String,
    pub floor: &'static str,
    pub goal: Option<&'static str>,
    pub measured: Summary,
}

impl Criterion {
    /// Whether the floor or the goal is reached.
    pub fn meets(&self, target: &str) -> bool {
        let digits = target.trim_matches(|c: char| !c.is_ascii_digit());
        let limit = digits.parse().unwrap_or(f64::NAN);
        if target.starts_with('≤') { self.measured.median <= limit } else { self.measured.median >= limit }
    }

    /// What stands behind the numbers.
    pub fn unit(&self) -> &'static str {
        self.floor.trim_start_matches(|c: char| !c.is_alphabetic())
    }
}

/// All that was aimed at.
pub fn bar(findings: &Findings, plan: &Plan) -> Vec<Criterion> {
    let (growth, many) = (growth(findings, plan), many(findings, plan));
    [reads(findings), writes_and_latency(findings), growth, many, feed(findings), program(findings)]
        .into_iter()
        .flatten()
        .collect()
}

fn criterion(
    what: impl Into<String>,
    floor: &'static str,
    goal: impl Into<Option<&'static str>>,
    figures: Vec<f64>,
) -> Criterion {
    Criterion { what: what.into(), floor, goal: goal.into(), measured: Summary::of(figures) }
}

fn reads(findings: &Findings) -> Vec<Criterion> {
    let empty = |load| rate(findings, Work::Empty, By::Grouped, load);
    let get = |by, load| rate(findings, Work::GetById, by, load);
    let cpu = |by| findings.points.each((Work::GetById, by, 512), Cell::cpu);
    vec![
        criterion(
            "`GetUser` grouped ÷ empty call, calls a second, 512 in flight",
            "0.70",
            "0.85",
            ratios(&get(By::Grouped, 512), &empty(512)),
        ),
        criterion("the same, 100 in flight", "0.72", "0.85", ratios(&get(By::Grouped, 100), &empty(100))),
        criterion(
            "`GetUser` grouped ÷ best of pgbench with the same SELECT, 512 in flight",
            "1.5",
            "2.0",
            ratios(&get(By::Grouped, 512), &best_of_pgbench(findings, Work::GetById)),
        ),
        criterion(
            "`GetUser` grouped ÷ `GROUPING=off`, calls a second, 512 in flight",
            "2.5",
            "3.5",
            ratios(&get(By::Grouped, 512), &get(By::Single, 512)),
        ),
        criterion(
            "CPU a call, service + database: grouped ÷ `GROUPING=off`, 512 in flight",
            "≤ 0.36",
            "≤ 0.25",
            ratios(&cpu(By::Grouped), &cpu(By::Single)),
        ),
        criterion(
            "`GetUser` grouped ÷ `GROUPING=off`, 1 in flight",
            "1.0",
            "1.2",
            ratios(&get(By::Grouped, 1), &get(By::Single, 1)),
        ),
    ]
}

fn writes_and_latency(findings: &Findings) -> Vec<Criterion> {
    let to_pgbench = |work| ratios(&rate(findings, work, By::Grouped, 512), &best_of_pgbench(findings, work));
    let p99 = |by| findings.paced.each(by, Cell::p99);
    vec![
        criterion(
            "`CreateUser` grouped ÷ best of pgbench with the same single statement, 512 in flight",
            "4.0",
            "5.0",
            to_pgbench(Work::Create),
        ),
        criterion("`UpdateUser` grouped ÷ pgbench likewise", "3.5", "5.0", to_pgbench(Work::Update)),
        criterion(
            "99th percentile, grouped ÷ `GROUPING=off`, at the highest load that the latter sustains",
            "≤ 0.7",
            "≤ 0.5",
            ratios(&p99(By::Grouped), &p99(By::Single)),
        ),
    ]
}

/// Of the largest table that there is in this run.
fn growth(findings: &Findings, plan: &Plan) -> Vec<Criterion> {
    let rate = |work, users| findings.growth.each((work, users), |cell| cell.rate);
    let (Some(&small), Some(&large)) = (plan.sizes.first(), plan.sizes.last()) else { return Vec::new() };
    vec![
        criterion(
            format!("rate with {} users ÷ with {}, `GetUser`", amount(large), amount(small)),
            "0.80",
            "0.90",
            ratios(&rate(Work::GetById, large), &rate(Work::GetById, small)),
        ),
        criterion(
            format!("a deep page ÷ the first page, {} users", amount(large)),
            "0.90",
            "1.0",
            ratios(&rate(Work::DeepPage, large), &rate(Work::FirstPage, large)),
        ),
    ]
}

/// Users a second. The larger the table, the more a lookup and a call have in common,
/// which is the walk down the index; and the bar does not say how large it is.
fn many(findings: &Findings, plan: &Plan) -> Vec<Criterion> {
    let rate =
        |work: Work, users| findings.at_once.each((work, users), |cell| cell.rate * work.users() as f64);
    let bulk = &findings.bulk;
    let lookup = |&users: &u64| {
        criterion(
            format!(
                "`LookupUsers` of 1000 ÷ 1000 grouped `GetUser` calls in flight, users a second, {} users",
                amount(users)
            ),
            "5",
            None,
            ratios(&rate(Work::Lookup, users), &rate(Work::GetById, users)),
        )
    };
    let mut criteria: Vec<_> = plan.sizes.iter().map(lookup).collect();
    criteria.extend([
        criterion(
            "`BatchCreateUsers` of 1000 ÷ 1000 grouped `CreateUser` calls in flight, users a second",
            "2",
            None,
            ratios(&rate(Work::BatchCreate, plan.users), &rate(Work::Create, plan.users)),
        ),
        criterion(
            "`ImportUsers` ÷ `psql \\copy` of the same rows, and a row in the change log for each",
            "0.6",
            None,
            ratios(&bulk.import, &bulk.copy_in),
        ),
        criterion(
            "`ExportUsers` ÷ `COPY (select …) TO STDOUT (FORMAT binary)`, rows a second",
            "0.5",
            None,
            ratios(&bulk.export, &bulk.copy_out),
        ),
        criterion("growth of resident memory, import", "≤ 64 MiB", None, vec![bulk.import_growth]),
        criterion("growth of resident memory, export", "≤ 64 MiB", None, vec![bulk.export_growth]),
    ]);
    criteria
}

fn feed(findings: &Findings) -> Vec<Criterion> {
    let (feed, bulk) = (&findings.feed, &findings.bulk);
    let [.., at_half] = &feed.delivery;
    let figures = |figures: &[f64]| figures.to_vec();
    vec![
        criterion(
            "begin of a transaction to delivery, same replica, half of the highest create rate: median",
            "≤ 10 ms",
            None,
            figures(&at_half.here.median),
        ),
        criterion("the same, 99th percentile", "≤ 50 ms", None, figures(&at_half.here.p99)),
        criterion(
            "the same, another replica, 99th percentile",
            "≤ 250 ms",
            None,
            figures(&at_half.there.p99),
        ),
        criterion(
            "creates with 1000 watchers ÷ with none",
            "0.85",
            None,
            ratios(&feed.watched, &feed.unwatched),
        ),
        criterion("resident memory of a watcher", "≤ 64 KiB", None, figures(&feed.memory_per_watcher)),
        criterion(
            "creates with the change log ÷ without",
            "0.85",
            None,
            ratios(&feed.logged, &feed.unlogged),
        ),
        criterion(
            "catching up a million changes ÷ `ExportUsers` of the same users",
            "0.5",
            None,
            ratios(&bulk.caught_up, &bulk.exported_beside),
        ),
    ]
}

fn program(findings: &Findings) -> Vec<Criterion> {
    vec![
        criterion("exec to SERVING, migrated database", "≤ 150 ms", "≤ 60 ms", findings.starts.clone()),
        criterion(
            "resident memory under 512 calls in flight",
            "≤ 64 MiB",
            "≤ 32 MiB",
            vec![findings.memory_peak],
        ),
    ]
}

fn rate(findings: &Findings, work: Work, by: By, load: usize) -> Vec<f64> {
    findings.points.each((work, by, load), |cell| cell.rate)
}

/// The best rate of each repetition.
pub fn best_of_pgbench(findings: &Findings, work: Work) -> Vec<f64> {
    let rates = LOADS.map(|(_, clients)| rate(findings, work, By::Pgbench, clients));
    (0..)
        .map_while(|repetition| {
            rates.iter().filter_map(|rates| rates.get(repetition)).copied().reduce(f64::max)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_aimed_at_may_be_a_least_or_a_most() {
        let criterion = |measured| Criterion {
            what: String::new(),
            floor: "≤ 60 ms",
            goal: Some("0.70"),
            measured: Summary::of(vec![measured]),
        };
        assert!(criterion(0.7).meets("0.70") && !criterion(0.69).meets("0.70"));
        assert!(criterion(60.0).meets("≤ 60 ms") && !criterion(60.1).meets("≤ 60 ms"));
        assert_eq!(criterion(1.0).unit(), "ms");
    }
}

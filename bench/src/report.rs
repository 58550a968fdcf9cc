//! The tables, in Markdown.

use std::fmt::Display;

use crate::{
    bar::{Criterion, bar, best_of_pgbench},
    bulk::Bulk,
    calls::Work,
    charts,
    feed::{SHARES, TURNS, WATCHERS},
    results::{Cell, Summary, ratios},
    run::{BUSY, By, Findings, GROWTH, Plan, READ_AT_ONCE, WRITTEN_AT_ONCE},
    usage::machine,
};

/// The whole report.
pub fn report(findings: &Findings, plan: &Plan) -> anyhow::Result<String> {
    let [charts @ .., delivery_chart] = charts::FILES.map(|(file, title)| format!("![{title}]({file})\n"));
    Ok([
        "# Results of the benchmark\n".into(),
        format!("{} on {}.\n", plan.made_by, machine(&findings.postgres_version)?),
        format!(
            "Service, database and load generator share the cores. Each figure is the median of {} \
             repetitions of {} s, in which all rows take turns; a ratio is taken within each repetition, and \
             what stands in parentheses is the range of them. {} users unless stated otherwise.\n",
            plan.repetitions,
            plan.duration.as_secs_f64(),
            thousands(plan.users as f64),
        ),
        "## The bar\n".into(),
        bar_table(&bar(findings, plan)),
        "## The load generator\n".into(),
        generator_line(findings),
        "## Calls\n".into(),
        charts.concat(),
        points_table(findings),
        pgbench_line(findings),
        "## The same rate, with and without grouping\n".into(),
        format!(
            "`GetUser` by id, {BUSY} calls in flight: without grouping as fast as it goes, with grouping at \
             that rate.\n"
        ),
        paced_table(findings),
        format!("## As the table grows\n\nGrouped, {BUSY} calls in flight.\n"),
        growth_table(findings, plan),
        "## Many users at once\n".into(),
        many_table(findings, plan),
        "## The change feed\n".into(),
        delivery_chart,
        feed_tables(findings),
        "## The program\n".into(),
        program_table(findings),
    ]
    .join("\n"))
}

fn bar_table(criteria: &[Criterion]) -> String {
    let mark = |is_met| if is_met { "✓" } else { "✗" };
    let rows = criteria.iter().map(|criterion| {
        let Summary { median, min, max } = criterion.measured;
        let (unit, digits) = match criterion.unit() {
            "" => (String::new(), 2),
            unit => (format!(" {unit}"), 0),
        };
        let range = if min < max { format!(" ({min:.digits$} to {max:.digits$})") } else { String::new() };
        vec![
            criterion.what.clone(),
            format!("{} {}", criterion.floor, mark(criterion.meets(criterion.floor))),
            criterion.goal.map_or(String::new(), |goal| format!("{goal} {}", mark(criterion.meets(goal)))),
            format!("**{median:.digits$}**{unit}{range}"),
        ]
    });
    table(&["", "floor", "goal", "measured"], rows)
}

/// Why it is the service that is measured, and not what measures it.
fn generator_line(findings: &Findings) -> String {
    let served = || findings.points.medians().filter(|((_, by, _), _)| *by != By::Pgbench);
    let empty = findings.points.median((Work::Empty, By::Grouped, 512));
    let fastest = served()
        .filter(|((work, _, load), _)| *work != Work::Empty && *load == 512)
        .max_by(|(_, a), (_, b)| a.rate.total_cmp(&b.rate));
    let busiest = served().max_by(|(_, a), (_, b)| a.generator_share().total_cmp(&b.generator_share()));
    let (Some(empty), Some((fastest, fastest_cell)), Some((busiest, busiest_cell))) =
        (empty, fastest, busiest)
    else {
        return String::new();
    };
    let share = busiest_cell.generator_share();
    let verdict = if share < 0.95 { "It is not the bottleneck." } else { "It may be the bottleneck!" };
    format!(
        "{verdict} With 512 in flight it makes {} empty calls a second, at {:.1} µs of CPU each; the \
         fastest other row is {} with {}: the empty call is {:.2} times as fast. It is one thread, and was \
         busiest with {}, {} in flight: {:.0} % of a core.\n",
        thousands(empty.rate),
        empty.generator,
        row_name(fastest.0, fastest.1),
        thousands(fastest_cell.rate),
        empty.rate / fastest_cell.rate,
        row_name(busiest.0, busiest.1),
        busiest.2,
        share * 100.0,
    )
}

fn points_table(findings: &Findings) -> String {
    let rows = findings.points.medians().map(|((work, by, load), cell)| {
        [vec![row_name(work, by), load.to_string()], figures(&cell)].concat()
    });
    let columns = ["", "in flight", "calls/s", "median", "p99", "CPU: service", "database", "generator"];
    table(&columns, rows)
}

fn pgbench_line(findings: &Findings) -> String {
    let best = [Work::GetById, Work::Create, Work::Update].map(|work| {
        let rate = Summary::of(best_of_pgbench(findings, work)).median;
        format!("{} {}/s", work.name(), thousands(rate))
    });
    format!(
        "pgbench runs the service's single statement in so many sessions; its CPU time, under generator, and \
         that of the database include connecting. The best of each repetition, which the bar takes: {}.\n",
        best.join(", "),
    )
}

fn paced_table(findings: &Findings) -> String {
    let rows = [By::Single, By::Grouped].into_iter().filter_map(|by| {
        Some([vec![row_name(Work::GetById, by)], figures(&findings.paced.median(by)?)].concat())
    });
    let p99_at_512 = |by| findings.points.each((Work::GetById, by, 512), Cell::p99);
    let ratio = Summary::of(ratios(&p99_at_512(By::Grouped), &p99_at_512(By::Single))).median;
    let columns = ["", "calls/s", "median", "p99", "CPU: service", "database", "generator"];
    let table = table(&columns, rows);
    format!(
        "{table}\nBoth as fast as they go, 512 in flight: the 99th percentile is {ratio:.2} times that without.\n"
    )
}

fn growth_table(findings: &Findings, plan: &Plan) -> String {
    let rate = |work, users| findings.growth.each((work, users), |cell| cell.rate);
    let smallest = plan.sizes.first().copied().unwrap_or_default();
    let rows = GROWTH.into_iter().flat_map(|work| {
        plan.sizes.iter().filter_map(move |&users| {
            let ratio = Summary::of(ratios(&rate(work, users), &rate(work, smallest))).median;
            let cell = findings.growth.median((work, users))?;
            Some([vec![work.name().into(), amount(users), format!("{ratio:.2}")], figures(&cell)].concat())
        })
    });
    let relative = format!("÷ {}", amount(smallest));
    let columns =
        ["", "users", &relative, "calls/s", "median", "p99", "CPU: service", "database", "generator"];
    table(&columns, rows)
}

fn many_table(findings: &Findings, plan: &Plan) -> String {
    let reads = plan.sizes.iter().flat_map(|size| READ_AT_ONCE.map(|read| (read, *size)));
    let written = WRITTEN_AT_ONCE.map(|written| (written, plan.users));
    let at_once = reads.chain(written).filter_map(|((work, in_flight), size)| {
        let cell = findings.at_once.median((work, size))?;
        let users = work.users() as f64;
        let us = |time: f64| format!("{:.1} µs", time / users);
        Some(vec![
            format!("{}, {in_flight} in flight", row_name(work, By::Grouped)),
            amount(size),
            thousands(cell.rate * users),
            us(cell.service),
            us(cell.database),
            us(cell.generator),
        ])
    });
    let Bulk { import, copy_in, export, copy_out, .. } = &findings.bulk;
    let bulk = [
        ("ImportUsers", import),
        ("psql \\copy", copy_in),
        ("ExportUsers", export),
        ("COPY to stdout", copy_out),
    ];
    let bulk = bulk.map(|(name, rates)| {
        let rate = thousands(Summary::of(rates.clone()).median);
        let none = String::new();
        vec![name.into(), none.clone(), rate, none.clone(), none.clone(), none]
    });
    let columns = ["", "of", "users/s", "CPU a user: service", "database", "generator"];
    table(&columns, at_once.chain(bulk))
}

fn feed_tables(findings: &Findings) -> String {
    let feed = &findings.feed;
    let ms = |figures: &[f64]| format!("{:.1} ms", Summary::of(figures.to_vec()).median);
    let delivery = SHARES.iter().zip(&feed.delivery).map(|(share, delivery)| {
        let (here, there) = (&delivery.here, &delivery.there);
        let figures = [&here.median, &here.p99, &there.median, &there.p99].map(|figures| ms(figures));
        [vec![format!("{:.0} %", share * 100.0)], figures.to_vec()].concat()
    });
    let columns =
        ["of the highest create rate", "same replica: median", "p99", "another replica: median", "p99"];
    let delivery = table(&columns, delivery);
    let rate = |figures: &[f64]| thousands(Summary::of(figures.to_vec()).median);
    let (bulk, watching) = (&findings.bulk, format!("CreateUser, grouped, {WATCHERS} watch"));
    let rates = [
        ("CreateUser, grouped, nobody watches", &feed.unwatched),
        (watching.as_str(), &feed.watched),
        ("statement of a group that creates 128 users, without the change log", &feed.unlogged),
        ("the same with the change log", &feed.logged),
        ("catching up, changes/s", &bulk.caught_up),
        ("ExportUsers of the same users", &bulk.exported_beside),
    ];
    let rates =
        table(&["", "users/s"], rates.into_iter().map(|(name, figures)| vec![name.into(), rate(figures)]));
    format!(
        "From the beginning of the transaction that creates a user to the delivery of the change, so the \
         transaction itself is counted. One client watches each of two replicas, of which one is written to.\n\n\
         {delivery}\n\
         Creates that nobody watches and creates that {WATCHERS} watch take turns {TURNS} times in a \
         repetition.\n\n{rates}"
    )
}

fn program_table(findings: &Findings) -> String {
    let starts = Summary::of(findings.starts.clone());
    let stripped = findings.stripped_binary.map_or("?".into(), |mib| format!("{mib:.1}"));
    let rows = [
        (
            "exec to SERVING, migrated database",
            format!("{:.0} ms ({:.0} to {:.0})", starts.median, starts.min, starts.max),
        ),
        ("resident memory at rest", format!("{:.1} MiB", findings.memory_at_rest)),
        ("the most in the whole run, up to 512 calls in flight", format!("{:.1} MiB", findings.memory_peak)),
        ("size of the program", format!("{:.1} MiB, stripped {stripped} MiB", findings.binary)),
    ];
    table(&["", ""], rows.into_iter().map(|(what, value)| vec![what.into(), value]))
}

/// What the columns of a measurement show.
fn figures(cell: &Cell) -> Vec<String> {
    let ms = |time: Option<f64>| time.map_or(String::new(), |ms| format!("{ms:.2} ms"));
    let us = |time: f64| format!("{time:.1} µs");
    vec![
        thousands(cell.rate),
        ms(cell.median),
        ms(cell.p99),
        us(cell.service),
        us(cell.database),
        us(cell.generator),
    ]
}

pub fn row_name(work: Work, by: By) -> String {
    let name = work.name();
    match by {
        // It never gets to where calls are grouped.
        _ if work == Work::Empty => name.into(),
        By::Grouped if work.users() > 1 => name.into(),
        By::Grouped => format!("{name}, grouped"),
        By::Single => format!("{name}, `GROUPING=off`"),
        By::Pgbench => format!("pgbench: {name}"),
    }
}

fn table<S: Display>(columns: &[S], rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = columns.iter().map(ToString::to_string).collect();
    // The first column is text, the others are numbers.
    let rule: Vec<String> = (0..head.len()).map(|n| if n == 0 { "--" } else { "--:" }.into()).collect();
    let rows: Vec<String> = rows.map(|row| line(&row)).collect();
    [line(&head), line(&rule), rows.concat()].concat()
}

/// `12,345`
pub fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let groups: Vec<String> =
        digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group).into()).collect();
    groups.join(",")
}

/// `10 thousand`, `1 million`
pub fn amount(number: u64) -> String {
    match number {
        1_000_000.. => format!("{} million", number / 1_000_000),
        _ => format!("{} thousand", number / 1_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!([0.4, 999.0, 1000.0, 1234567.0].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([10_000, 10_000_000].map(amount), ["10 thousand", "10 million"]);
    }
}

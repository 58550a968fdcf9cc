//! The report, in Markdown.

use crate::{
    baseline, bulk, charts,
    feed::{self, DELIVERY, PAIRS},
    format::{amount, table, thousands},
    plan::{BUSY, Plan, Variant},
    requests::Work,
    results::{Cell, Figure, Results, Section},
    run,
    targets::{Target, best_of_pgbench, targets},
    usage::machine,
};
use anyhow::Result;

pub fn report(results: &Results, plan: &Plan, postgres_version: &str) -> Result<String> {
    let [charts @ .., delivery_chart] = charts::FILES.map(|(file, title)| format!("![{title}]({file})\n"));
    let p99 =
        |variant| results.each(Section::Calls.key(Work::GetById, variant, 512, plan.users), |cell| cell.p99);
    let p99_ratio = (p99(Variant::Coalesced) / p99(Variant::Single)).median();
    Ok([
        "# Benchmark results\n".into(),
        format!("{} on {}; PostgreSQL {postgres_version}.\n", plan.made_by, machine()?),
        format!(
            "Service, database and load generator share the cores. A figure is the median of {} repetitions of \
             {} s, in which all rows take turns. A ratio is taken within each repetition; its range is in \
             parentheses. {} users unless stated otherwise.\n",
            plan.repetitions,
            plan.duration.as_secs_f64(),
            thousands(plan.users as f64),
        ),
        "## Targets\n".into(),
        targets_table(&targets(results, plan)),
        "## Calls\n".into(),
        charts.concat(),
        cells(results, Section::Calls, "calls/s"),
        pgbench_note(results, plan),
        generator_note(results),
        format!("## Coalescing at the same rate\n\n{BUSY} calls in flight; both at the highest rate without it.\n"),
        cells(results, Section::SameRate, "calls/s"),
        format!("At the highest rates of both, 512 in flight, the p99 with coalescing is {p99_ratio:.2} of that without.\n"),
        "## Table size\n".into(),
        cells(results, Section::TableSize, "calls/s"),
        "## Many users at once\n\nCPU times are per user.\n".into(),
        cells(results, Section::ManyUsers, "users/s"),
        figures(results, &[bulk::IMPORT, bulk::COPY_IN, bulk::EXPORT, bulk::COPY_OUT]),
        "## Change feed\n".into(),
        delivery_chart,
        "The latency from the start of the transaction that creates a user to the delivery of the change, so \
         the transaction itself is included. One client watches each of two replicas; one of them writes.\n"
            .into(),
        delivery_table(results),
        format!("Creates with and without 1000 watchers take turns {PAIRS} times in a repetition.\n"),
        figures(results, &[feed::UNWATCHED, feed::WATCHED, feed::UNLOGGED, feed::LOGGED]),
        figures(results, &[bulk::CATCH_UP, bulk::EXPORT_OF_IMPORTED]),
        "## Program\n".into(),
        figures(
            results,
            &[run::STARTUP, run::MEMORY_AT_REST, run::PEAK_MEMORY, run::BINARY, run::STRIPPED_BINARY],
        ),
        baseline::report(results, plan),
    ]
    .join("\n"))
}

fn targets_table(targets: &[Target]) -> String {
    let rows = targets.iter().map(|target| {
        let digits = if target.unit().is_empty() { 2 } else { 0 };
        let number = |n: f64| format!("{n:.digits$}");
        let limit = |limit: &str| match limit {
            "" => String::new(),
            limit => format!("{limit} {}", if target.meets(limit) { "✓" } else { "✗" }),
        };
        let (median, range) = (number(target.measured.median()), target.measured.range(number));
        let measured = format!("**{median}** {}{range}", target.unit()).replace("  ", " ").trim_end().into();
        vec![target.what.clone(), limit(target.minimum), limit(target.target), measured]
    });
    table(&["", "minimum", "target", "measured"], rows)
}

/// The median cells of a table.
fn cells(results: &Results, part: Section, rate: &str) -> String {
    let ms = |time: f64| if time.is_nan() { String::new() } else { format!("{time:.2} ms") };
    let us = |time: f64| format!("{time:.1} µs");
    let rows = results.medians(part).map(|(key, cell)| {
        let Cell { median, p99, service, database, generator, .. } = cell;
        let what = [row_name(key.work, key.variant), amount(key.users), key.load.to_string()];
        let figures = [thousands(cell.rate), ms(median), ms(p99), us(service), us(database), us(generator)];
        [&what[..], &figures].concat()
    });
    table(&["", "users", "in flight", rate, "median", "p99", "CPU: service", "database", "generator"], rows)
}

fn row_name(work: Work, variant: Variant) -> String {
    match variant {
        Variant::Coalesced | Variant::Baseline => work.name().into(),
        Variant::Single => format!("{}, coalescing off", work.name()),
        Variant::Pgbench => format!("pgbench: {}", work.name()),
    }
}

/// The medians and ranges of figures.
fn figures(results: &Results, figures: &[Figure]) -> String {
    let rows = figures.iter().map(|figure| {
        let samples = results.figure(*figure);
        let number = |n: f64| if n < 100.0 { format!("{n:.1}") } else { thousands(n) };
        let Figure(name, unit) = *figure;
        vec![name.into(), format!("{} {unit}{}", number(samples.median()), samples.range(number))]
    });
    table(&["", ""], rows)
}

fn delivery_table(results: &Results) -> String {
    let rows = DELIVERY.iter().map(|(share, figures)| {
        let ms = |figure: &Figure| format!("{:.1} ms", results.figure(*figure).median());
        [vec![format!("{:.0} %", share * 100.0)], figures.iter().map(ms).collect()].concat()
    });
    table(
        &["of the highest create rate", "same replica: median", "p99", "another replica: median", "p99"],
        rows,
    )
}

fn pgbench_note(results: &Results, plan: &Plan) -> String {
    let best = [Work::GetById, Work::Create, Work::Update].map(|work| {
        let rate = best_of_pgbench(results, plan, work).median();
        format!("{} {}/s", work.name(), thousands(rate))
    });
    format!(
        "pgbench runs the service's single statement in so many sessions. Its CPU time (under generator) and \
         that of the database include connecting. The best of each repetition: {}.\n",
        best.join(", "),
    )
}

/// Whether the load generator limits what it measures.
fn generator_note(results: &Results) -> String {
    let calls = results.medians(Section::Calls).filter(|(key, _)| key.variant != Variant::Pgbench);
    let share = |(_, cell): &(_, Cell)| cell.generator_share();
    let Some(busiest) = calls.max_by(|a, b| share(a).total_cmp(&share(b))) else { return String::new() };
    let (key, share) = (busiest.0, share(&busiest));
    format!(
        "The load generator is one thread and is {} the bottleneck. It used at most {:.0} % of a core: with {}, \
         {} in flight.\n",
        if share < 0.95 { "not" } else { "perhaps" },
        share * 100.0,
        row_name(key.work, key.variant),
        key.load,
    )
}

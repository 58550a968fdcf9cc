//! The service beside an older binary of it, on one PostgreSQL server.

use std::{path::Path, time::Duration};

use crate::{
    format::{table, thousands},
    generator::Load,
    plan::{Plan, Variant},
    postgres::Postgres,
    requests::Work,
    results::{Cell, Results, Section},
    service::Service,
};
use anyhow::Result;

const WORKS: [Work; 3] = [Work::GetById, Work::Create, Work::Update];
const IN_FLIGHT: [usize; 3] = [1, 100, 512];
/// Turns are shorter and more frequent than those of the other measurements, because other
/// activity on the machine must affect both binaries to show a difference of a few percent.
const TURNS: u32 = 6;
const MIN_TURN: Duration = Duration::from_millis(200);

/// Measures both binaries in turns. Each has a database of its own with the same users.
pub async fn run(plan: &Plan, baseline: &Path, postgres: &Postgres, results: &mut Results) -> Result<()> {
    let mut services = Vec::new();
    for (variant, binary, name) in
        [(Variant::Baseline, baseline, "baseline"), (Variant::Coalesced, &plan.service, "current")]
    {
        eprintln!("loading {} users for {}", plan.users, binary.display());
        let database = postgres.create_database(binary, name, plan.users).await?;
        services.push((variant, Service::start(binary, &database, true).await?));
    }
    let duration = (plan.duration / TURNS).max(MIN_TURN);
    let load = Load { rate: None, warm_up: plan.warm_up / 2, duration };
    for repetition in 1..=plan.repetitions * TURNS as usize {
        eprintln!("baseline, repetition {repetition}");
        for work in WORKS {
            for in_flight in IN_FLIGHT {
                for (variant, service) in &services {
                    let cell = service.measure(work, in_flight, load).await?;
                    results.push(Section::Baseline.key(work, *variant, in_flight, plan.users), cell);
                }
            }
        }
        // The order alternates, so that neither always follows the other.
        services.reverse();
    }
    for (_, service) in services {
        let database = service.database.clone();
        service.stop().await?;
        postgres.drop_database(database).await?;
    }
    Ok(())
}

/// The table of ratios; empty if there was no baseline.
pub fn report(results: &Results, plan: &Plan) -> String {
    let Some(baseline) = &plan.baseline else { return String::new() };
    let rows = WORKS.iter().flat_map(|&work| IN_FLIGHT.map(|in_flight| (work, in_flight)));
    let rows = rows.map(|(work, in_flight)| {
        let each = |variant, figure: fn(&Cell) -> f64| {
            results.each(Section::Baseline.key(work, variant, in_flight, plan.users), figure)
        };
        let ratio = |figure| {
            let ratios = each(Variant::Coalesced, figure) / each(Variant::Baseline, figure);
            format!("**{:.2}**{}", ratios.median(), ratios.range(|ratio| format!("{ratio:.2}")))
        };
        let rate = |variant| thousands(each(variant, |cell| cell.rate).median());
        vec![
            format!("{}, {in_flight} in flight", work.name()),
            rate(Variant::Baseline),
            rate(Variant::Coalesced),
            ratio(|cell| cell.rate),
            ratio(Cell::cpu),
            ratio(|cell| cell.p99),
        ]
    });
    let columns = ["", "baseline, calls/s", "this, calls/s", "calls/s: this ÷ baseline", "CPU", "p99"];
    format!(
        "## Baseline\n\n`{}` ÷ `{}`: the median of the ratios, and their range.\n\n{}",
        plan.service.display(),
        baseline.display(),
        table(&columns, rows)
    )
}

//! What is measured, and in which order.
//!
//! Compared variants take turns, load by load and repetition by repetition, so that other
//! activity on the machine affects all of them. Reads come before writes, which make the
//! table larger.

use std::{path::Path, process::Stdio};

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::{
    bulk, feed,
    generator::Load,
    pgbench,
    plan::{BUSY, LOADS, Plan, Variant},
    postgres::Postgres,
    requests::Work,
    results::{Figure, Results, Section},
    service::Service,
    usage::{memory, peak_memory},
};

pub const STARTUP: Figure = Figure("exec to SERVING, migrated database", "ms");
pub const MEMORY_AT_REST: Figure = Figure("resident memory at rest", "MiB");
pub const PEAK_MEMORY: Figure = Figure("highest resident memory, up to 512 calls in flight", "MiB");
pub const BINARY: Figure = Figure("size of the binary", "MiB");
pub const STRIPPED_BINARY: Figure = Figure("size of the binary without symbols", "MiB");

/// How often the service is started to time it.
const STARTS: usize = 7;

const SERVICE: &[Variant] = &[Variant::Coalesced, Variant::Single];
const ALL: &[Variant] = &[Variant::Coalesced, Variant::Single, Variant::Pgbench];
const READS: &[(Work, &[Variant])] = &[
    (Work::Empty, &[Variant::Coalesced]),
    (Work::GetById, ALL),
    (Work::GetByUsername, SERVICE),
    (Work::FirstPage, SERVICE),
    (Work::DeepPage, SERVICE),
];
const WRITES: &[(Work, &[Variant])] = &[(Work::Create, ALL), (Work::Update, ALL)];

/// Users in flight, in calls of one and of a thousand users, and the calls in flight.
const MANY_READ: [(Work, usize); 2] = [(Work::GetById, 1000), (Work::Lookup, 4)];
const MANY_WRITTEN: [(Work, usize); 2] = [(Work::Create, 1000), (Work::BatchCreate, 4)];

/// What may depend on the size of the table.
const SIZE_DEPENDENT: [Work; 3] = [Work::GetById, Work::FirstPage, Work::DeepPage];

/// Measures everything but the baseline.
pub async fn run(plan: &Plan, postgres: &Postgres, results: &mut Results) -> Result<()> {
    let mut databases = Vec::new();
    for users in &plan.sizes {
        eprintln!("loading {users} users");
        let name = format!("users_{users}");
        let mut database = postgres.create_database(&plan.service, &name, *users).await?;
        let service = Service::start(&plan.service, &database, true).await?;
        database.deep_page = service.deep_page().await?;
        service.stop().await?;
        databases.push(database);
    }
    let database = databases.iter().find(|database| database.users == plan.users).context("no such size")?;
    for _ in 0..STARTS {
        let service = Service::start(&plan.service, database, true).await?;
        results.push_figure(STARTUP, service.start.as_secs_f64() * 1e3);
        service.stop().await?;
    }
    measure_binary(plan, postgres, results).await?;

    let coalesced = Service::start(&plan.service, database, true).await?;
    let single = Service::start(&plan.service, database, false).await?;
    results.push_figure(MEMORY_AT_REST, memory(coalesced.server.pid)?);
    let mut bench = Bench { plan, postgres, coalesced, single, results };
    bench.calls("reads", READS).await?;
    bench.same_rate().await?;
    let mut services = Vec::new();
    for database in &databases {
        services.push(Service::start(&plan.service, database, true).await?);
    }
    bench.table_sizes(&services).await?;
    for service in services {
        service.stop().await?;
    }
    bench.calls("writes", WRITES).await?;
    bench.results.push_figure(PEAK_MEMORY, peak_memory(bench.coalesced.server.pid)?);
    for repetition in 1..=plan.repetitions {
        eprintln!("batches, repetition {repetition}");
        many_users(&bench.coalesced, &MANY_WRITTEN, bench.load(None), bench.results).await?;
    }
    let Bench { coalesced, single, results, .. } = bench;
    coalesced.stop().await?;
    single.stop().await?;

    let create = |(load, _)| Section::Calls.key(Work::Create, Variant::Coalesced, load, plan.users);
    let rates = LOADS.map(create).map(|key| results.each(key, |cell| cell.rate).median());
    feed::run(plan, database, rates.into_iter().fold(0.0, f64::max), results).await?;
    bulk::run(plan, postgres, database, results).await
}

async fn measure_binary(plan: &Plan, postgres: &Postgres, results: &mut Results) -> Result<()> {
    let mib = |file: &Path| anyhow::Ok(file.metadata()?.len() as f64 / 1024.0 / 1024.0);
    results.push_figure(BINARY, mib(&plan.service)?);
    let stripped = postgres.dir.path().join("stripped");
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(&stripped).arg(&plan.service).stderr(Stdio::null());
    if strip.status().await.is_ok_and(|status| status.success()) {
        results.push_figure(STRIPPED_BINARY, mib(&stripped)?);
    }
    Ok(())
}

struct Bench<'a> {
    plan: &'a Plan,
    postgres: &'a Postgres,
    coalesced: Service,
    single: Service,
    results: &'a mut Results,
}

impl Bench<'_> {
    async fn calls(&mut self, name: &str, rows: &[(Work, &[Variant])]) -> Result<()> {
        let rows = rows.iter().flat_map(|(work, variants)| variants.iter().map(|variant| (*work, *variant)));
        let mut rows: Vec<_> = rows.collect();
        for repetition in 1..=self.plan.repetitions {
            for (in_flight, sessions) in LOADS {
                eprintln!("{name}, repetition {repetition}, {in_flight} in flight");
                for &(work, variant) in &rows {
                    let load = if variant == Variant::Pgbench { sessions } else { in_flight };
                    let cell = match variant {
                        Variant::Pgbench => {
                            let (database, duration) = (&self.coalesced.database, self.plan.duration);
                            pgbench::run(self.postgres, database, work, load, duration).await?
                        }
                        Variant::Single => self.single.measure(work, load, self.load(None)).await?,
                        _ => self.coalesced.measure(work, load, self.load(None)).await?,
                    };
                    self.results.push(Section::Calls.key(work, variant, load, self.plan.users), cell);
                }
            }
            // The order alternates, so that no row always follows the same one.
            rows.reverse();
        }
        Ok(())
    }

    /// Coalescing at the rate that the service without it reaches.
    async fn same_rate(&mut self) -> Result<()> {
        for repetition in 1..=self.plan.repetitions {
            eprintln!("same rate, repetition {repetition}");
            let single = self.single.measure(Work::GetById, BUSY, self.load(None)).await?;
            let coalesced = self.coalesced.measure(Work::GetById, BUSY, self.load(Some(single.rate))).await?;
            for (variant, cell) in [(Variant::Single, single), (Variant::Coalesced, coalesced)] {
                let key = Section::SameRate.key(Work::GetById, variant, BUSY, self.plan.users);
                self.results.push(key, cell);
            }
        }
        Ok(())
    }

    async fn table_sizes(&mut self, services: &[Service]) -> Result<()> {
        for repetition in 1..=self.plan.repetitions {
            eprintln!("table sizes, repetition {repetition}");
            for work in SIZE_DEPENDENT {
                for service in services {
                    let cell = service.measure(work, BUSY, self.load(None)).await?;
                    let key = Section::TableSize.key(work, Variant::Coalesced, BUSY, service.database.users);
                    self.results.push(key, cell);
                }
            }
            for service in services {
                many_users(service, &MANY_READ, self.load(None), self.results).await?;
            }
        }
        Ok(())
    }

    fn load(&self, rate: Option<f64>) -> Load {
        Load { rate, warm_up: self.plan.warm_up, duration: self.plan.duration }
    }
}

/// Measures users instead of calls.
async fn many_users(
    service: &Service,
    rows: &[(Work, usize)],
    load: Load,
    results: &mut Results,
) -> Result<()> {
    for &(work, in_flight) in rows {
        let cell = service.measure(work, in_flight, load).await?.per_user(work.users());
        results
            .push(Section::ManyUsers.key(work, Variant::Coalesced, in_flight, service.database.users), cell);
    }
    Ok(())
}

//! The whole run: what is measured, in which order.
//!
//! Variants that are compared take turns, load by load and repetition by
//! repetition, so that what else the machine does meets them all. Reads come before
//! writes, because those make the table larger.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::Context;
use tokio::process::Command;

use crate::{
    bulk::{self, Bulk},
    calls::{Requests, Work},
    cluster::{Cluster, Database},
    feed::{self, Feed},
    generator::{self, Load},
    pgbench,
    results::{Cell, Results},
    service::Service,
    usage::{Memory, Meter},
};

/// Calls in flight, and beside them clients of pgbench, of which the best counts.
pub const LOADS: [(usize, usize); 4] = [(1, 8), (32, 16), (100, 32), (512, 64)];
/// Where the service without grouping is at its limit, or close to it.
pub const BUSY: usize = 100;
/// How often the service is started.
const STARTS: usize = 7;

/// How much is measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What this run is, in the words of the report.
    pub made_by: &'static str,
    pub service: PathBuf,
    pub repetitions: usize,
    /// Of each measurement.
    pub warm_up: Duration,
    pub duration: Duration,
    /// Sizes of the table, in ascending order, for what depends on it.
    pub sizes: Vec<u64>,
    /// The one of them for all the rest.
    pub users: u64,
}

/// By whom a call is answered, or a statement made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    /// The service with `GROUPING=on`.
    Grouped,
    /// The service with `GROUPING=off`.
    Single,
    /// PostgreSQL's own benchmark.
    Pgbench,
}

/// A row of the report, and how many calls are in flight, or clients.
pub type Point = (Work, By, usize);

const READS: [(Work, By); 10] = [
    (Work::Empty, By::Grouped),
    (Work::GetById, By::Grouped),
    (Work::GetById, By::Single),
    (Work::GetById, By::Pgbench),
    (Work::GetByUsername, By::Grouped),
    (Work::GetByUsername, By::Single),
    (Work::FirstPage, By::Grouped),
    (Work::FirstPage, By::Single),
    (Work::DeepPage, By::Grouped),
    (Work::DeepPage, By::Single),
];

const WRITES: [(Work, By); 6] = [
    (Work::Create, By::Grouped),
    (Work::Create, By::Single),
    (Work::Create, By::Pgbench),
    (Work::Update, By::Grouped),
    (Work::Update, By::Single),
    (Work::Update, By::Pgbench),
];

/// Users in flight, one by one and a thousand at a time: calls in flight. Reads are made
/// with each size of the table.
pub const READ_AT_ONCE: [(Work, usize); 2] = [(Work::GetById, 1000), (Work::Lookup, 4)];
pub const WRITTEN_AT_ONCE: [(Work, usize); 2] = [(Work::Create, 1000), (Work::BatchCreate, 4)];

/// What depends on the size of the table.
pub const GROWTH: [Work; 3] = [Work::GetById, Work::FirstPage, Work::DeepPage];

/// Everything that was found out.
#[derive(Debug, Default)]
pub struct Findings {
    pub postgres_version: String,
    pub points: Results<Point>,
    /// With and without grouping at the same rate, the most that the latter does
    /// with [`BUSY`] calls in flight.
    pub paced: Results<By>,
    /// By the number of users, with [`BUSY`] calls in flight.
    pub growth: Results<(Work, u64)>,
    /// Many users at once, by the number of users that there are.
    pub at_once: Results<(Work, u64)>,
    pub bulk: Bulk,
    pub feed: Feed,
    /// Milliseconds from exec to SERVING.
    pub starts: Vec<f64>,
    /// MiB, before the first call, and the most of the whole run.
    pub memory_at_rest: f64,
    pub memory_peak: f64,
    /// MiB of the program as it was built, and without its symbols.
    pub binary: f64,
    pub stripped_binary: Option<f64>,
}

/// Measures everything.
pub async fn run(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Findings> {
    let mut findings = Findings { postgres_version: cluster.version().await?, ..Findings::default() };
    let mut databases = Vec::new();
    for users in &plan.sizes {
        eprintln!("loading {users} users");
        databases.push(cluster.create_database(*users).await?);
    }
    let database = databases.iter().find(|database| database.users == plan.users).context("no such size")?;
    measure_program(plan, cluster, database, &mut findings).await?;

    let mut bench = Bench {
        plan,
        cluster,
        grouped: Service::start(&plan.service, database, "on").await?,
        single: Service::start(&plan.service, database, "off").await?,
        findings,
    };
    bench.findings.memory_at_rest = Memory::of(bench.grouped.pid)?.now;
    bench.measure_points("reads", &READS).await?;
    bench.measure_paced().await?;
    bench.measure_growth(&databases).await?;
    bench.measure_points("writes", &WRITES).await?;
    bench.findings.memory_peak = Memory::of(bench.grouped.pid)?.peak;
    bench.measure_written_at_once().await?;
    let mut findings = bench.findings;
    bench.grouped.stop().await?;
    bench.single.stop().await?;
    let creates = |load| findings.points.median((Work::Create, By::Grouped, load)).map(|cell| cell.rate);
    let most = LOADS.iter().filter_map(|(load, _)| creates(*load)).fold(0.0, f64::max);
    findings.feed = feed::run(plan, cluster, database, most).await?;
    findings.bulk = bulk::run(plan, cluster, database).await?;
    Ok(findings)
}

/// How large the program is, and how long it takes to start.
async fn measure_program(
    plan: &Plan,
    cluster: &Cluster,
    database: &Database,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    eprintln!("starts");
    for _ in 0..STARTS {
        let service = Service::start(&plan.service, database, "on").await?;
        findings.starts.push(service.start.as_secs_f64() * 1e3);
        service.stop().await?;
    }
    findings.binary = mib(&plan.service)?;
    let stripped = cluster.dir.path().join("stripped");
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(&stripped).arg(&plan.service).stderr(Stdio::null());
    if strip.status().await.is_ok_and(|status| status.success()) {
        findings.stripped_binary = Some(mib(&stripped)?);
    }
    Ok(())
}

fn mib(file: &Path) -> anyhow::Result<f64> {
    Ok(file.metadata()?.len() as f64 / 1024.0 / 1024.0)
}

/// The services that take turns, and what is known already.
struct Bench<'a> {
    plan: &'a Plan,
    cluster: &'a Cluster,
    grouped: Service,
    single: Service,
    findings: Findings,
}

impl Bench<'_> {
    async fn measure_points(&mut self, what: &str, rows: &[(Work, By)]) -> anyhow::Result<()> {
        let mut rows = rows.to_vec();
        for repetition in 1..=self.plan.repetitions {
            for (in_flight, clients) in LOADS {
                eprintln!("{what}, repetition {repetition}, {in_flight} in flight");
                for &(work, by) in &rows {
                    let (load, cell) = match by {
                        By::Grouped => (in_flight, self.load(&self.grouped, work, in_flight, None).await?),
                        By::Single => (in_flight, self.load(&self.single, work, in_flight, None).await?),
                        By::Pgbench => (clients, self.pgbench(work, clients).await?),
                    };
                    self.findings.points.push((work, by, load), cell);
                }
            }
            // So that nobody always comes after the same one.
            rows.reverse();
        }
        Ok(())
    }

    async fn measure_paced(&mut self) -> anyhow::Result<()> {
        for repetition in 1..=self.plan.repetitions {
            eprintln!("the same rate, repetition {repetition}");
            let single = self.load(&self.single, Work::GetById, BUSY, None).await?;
            let grouped = self.load(&self.grouped, Work::GetById, BUSY, Some(single.rate)).await?;
            self.findings.paced.push(By::Single, single);
            self.findings.paced.push(By::Grouped, grouped);
        }
        Ok(())
    }

    async fn measure_written_at_once(&mut self) -> anyhow::Result<()> {
        for repetition in 1..=self.plan.repetitions {
            eprintln!("batches, repetition {repetition}");
            for (work, in_flight) in WRITTEN_AT_ONCE {
                let cell = self.load(&self.grouped, work, in_flight, None).await?;
                self.findings.at_once.push((work, self.plan.users), cell);
            }
        }
        Ok(())
    }

    async fn measure_growth(&mut self, databases: &[Database]) -> anyhow::Result<()> {
        let mut services = Vec::new();
        for database in databases {
            services.push(Service::start(&self.plan.service, database, "on").await?);
        }
        for repetition in 1..=self.plan.repetitions {
            eprintln!("sizes of the table, repetition {repetition}");
            for work in GROWTH {
                for service in &services {
                    let cell = self.load(service, work, BUSY, None).await?;
                    self.findings.growth.push((work, service.database.users), cell);
                }
            }
            for service in &services {
                for (work, in_flight) in READ_AT_ONCE {
                    let cell = self.load(service, work, in_flight, None).await?;
                    self.findings.at_once.push((work, service.database.users), cell);
                }
            }
        }
        for service in services {
            service.stop().await?;
        }
        Ok(())
    }

    async fn load(
        &self,
        service: &Service,
        work: Work,
        in_flight: usize,
        rate: Option<f64>,
    ) -> anyhow::Result<Cell> {
        let requests = Requests::new(work, service.database.users, service.database.deep_page.clone());
        let load = Load { in_flight, rate, warm_up: self.plan.warm_up, duration: self.plan.duration };
        let meter = Meter { service: Some(service.pid), postmaster: self.cluster.postmaster };
        let cell = generator::run(service.addr, requests, load, || meter.read()).await;
        cell.with_context(|| format!("{} with {in_flight} in flight", work.name()))
    }

    async fn pgbench(&self, work: Work, clients: usize) -> anyhow::Result<Cell> {
        pgbench::run(self.cluster, &self.grouped.database, work, clients, self.plan.duration).await
    }
}

//! The benchmark of user-service.
//!
//! Starts a PostgreSQL server and the service, with and without coalescing, puts both under
//! load beside pgbench with the same statements, and reports ratios, tables and charts. A
//! call counts when its trailers say OK; a failed call ends the run.
//!
//! A module imports only modules of the lines below its own:
//!
//! | module | subject |
//! |--|--|
//! | [`report`] | the report, in Markdown |
//! | [`charts`] | the charts |
//! | [`targets`] | what is aimed at |
//! | [`run`] | the order of the measurements |
//! | [`bulk`], [`feed`], [`baseline`], [`comparison`], [`week`] | imports and exports; change feed; an older binary; Python stacks; compressed time |
//! | [`service`], [`pgbench`] | load on the service, and on PostgreSQL alone |
//! | [`postgres`], [`generator`] | the PostgreSQL server and its databases; the load generator |
//! | [`server`], [`results`] | server processes; from repetitions to figures |
//! | [`requests`] | the calls |
//! | [`client`], [`statements`], [`usage`], [`plan`], [`format`] | gRPC; the service's SQL; CPU time and memory; the extent of a run; tables |

mod baseline;
mod bulk;
mod charts;
mod client;
mod comparison;
mod feed;
mod format;
mod generator;
mod pgbench;
mod plan;
mod postgres;
mod report;
mod requests;
mod results;
mod run;
mod server;
mod service;
mod statements;
mod targets;
mod usage;
mod week;

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::{plan::Plan, postgres::Postgres, results::Results};

/// Measures user-service.
#[derive(Debug, Parser)]
struct Cli {
    /// Also measure with 10 million users, which takes some minutes and 10 GB more.
    #[arg(long)]
    scale: bool,
    /// Measure everything, but too briefly for meaningful numbers.
    #[arg(long)]
    quick: bool,
    /// The service to measure [default: user-service, beside this program]
    #[arg(long)]
    service: Option<PathBuf>,
    /// Compare with an older binary of the service too.
    #[arg(long, value_name = "BINARY")]
    baseline: Option<PathBuf>,
    /// Compare with the baseline only, and print the ratios.
    #[arg(long, requires = "baseline")]
    only_baseline: bool,
    /// Compare with the Python stacks only, run by this interpreter.
    #[arg(long, value_name = "PYTHON", conflicts_with_all = ["baseline", "scale"])]
    comparison: Option<PathBuf>,
    /// Measure two weeks of writes with compressed time only.
    #[arg(long, conflicts_with_all = ["baseline", "scale", "comparison"])]
    week: bool,
    /// The directory of the report [default: none, only print it]
    #[arg(long)]
    out: Option<PathBuf>,
}

impl Cli {
    fn plan(&self) -> Result<Plan> {
        let beside = std::env::current_exe()?.with_file_name("user-service");
        let existing = |path: &PathBuf| path.canonicalize().with_context(|| format!("no {}", path.display()));
        let (warm_up, duration) = if self.quick { (50, 200) } else { (250, 2000) };
        let mut sizes = if self.quick { vec![1_000, 10_000] } else { vec![10_000, 100_000, 1_000_000] };
        let users = if self.quick { 10_000 } else { 1_000_000 };
        if self.scale {
            sizes.push(10 * users);
        }
        let (repetitions, made_by) = match (self.quick, self.scale) {
            (true, _) => (1, "A trial run, too short for meaningful numbers,"),
            (false, true) => (5, "Made by `make bench-scale`"),
            (false, false) => (3, "Made by `make bench`"),
        };
        Ok(Plan {
            made_by,
            service: existing(self.service.as_ref().unwrap_or(&beside))?,
            baseline: self.baseline.as_ref().map(existing).transpose()?,
            repetitions,
            warm_up: Duration::from_millis(warm_up),
            duration: Duration::from_millis(duration),
            sizes,
            users,
        })
    }

    /// Measures, writes the report and prints it.
    async fn run(&self, plan: &Plan, postgres: &Postgres) -> Result<()> {
        let mut results = Results::default();
        if let Some(python) = &self.comparison {
            return self.write("comparison.md", &comparison::run(plan, python, postgres).await?);
        }
        if self.week {
            return self.write("week.md", &week::run(plan, postgres).await?);
        }
        if !self.only_baseline {
            run::run(plan, postgres, &mut results).await?;
        }
        if let Some(baseline) = &plan.baseline {
            baseline::run(plan, baseline, postgres, &mut results).await?;
        }
        if self.only_baseline {
            return self.write("baseline.md", &baseline::report(&results, plan));
        }
        self.write("results.md", &report::report(&results, plan, &postgres.version().await?)?)?;
        self.out.as_ref().map_or(Ok(()), |dir| charts::write(&results, plan, dir))
    }

    fn write(&self, file: &str, report: &str) -> Result<()> {
        println!("{report}");
        if let Some(dir) = &self.out {
            fs::create_dir_all(dir)?;
            fs::write(dir.join(file), report)?;
        }
        Ok(())
    }
}

/// One thread runs everything, the load generator included.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let plan = cli.plan()?;
    // A thousand watchers have a connection each, here and in the service.
    let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let postgres = Postgres::start(&plan.service).await?;
    // An interrupted run is dropped, which stops its servers and programs.
    let result = tokio::select! {
        result = cli.run(&plan, &postgres) => Some(result),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
    };
    postgres.stop().await?;
    let Some(result) = result else { bail!("interrupted") };
    result
}

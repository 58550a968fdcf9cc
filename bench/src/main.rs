//! The benchmark of user-service.
//!
//! Starts a PostgreSQL and the service, twice: with grouping and without. Puts
//! both under load side by side, and beside pgbench with the same statements, and
//! says what came out as ratios, in tables and charts. What counts is a call whose
//! trailers say OK; one that does not ends the run.
//!
//! | file | what lives there |
//! |--|--|
//! | [`run`] | what is measured, in which order |
//! | [`cluster`], [`service`] | the PostgreSQL and the service that are measured |
//! | [`generator`], [`client`], [`calls`] | the load, from the number of callers to the octets |
//! | [`load`] | that load for others to use, who compare other services |
//! | [`bulk`] | imports and exports beside `COPY` |
//! | [`feed`] | the change feed: deliveries, watchers, and what they cost |
//! | [`pgbench`] | the load that PostgreSQL makes itself |
//! | [`usage`] | CPU time and memory |
//! | [`results`] | from repetitions to a figure |
//! | [`bar`], [`report`], [`charts`], [`svg`] | what is told |

mod bar;
mod bulk;
mod calls;
mod charts;
mod client;
mod cluster;
mod feed;
mod generator;
mod load;
mod pgbench;
mod report;
mod results;
mod run;
mod service;
mod svg;
mod usage;

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::{cluster::Cluster, load::LoadArgs, run::Plan};

/// Measures user-service, and says how it compares.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Also with 10 million users, which takes some minutes and 10 GB more.
    #[arg(long)]
    scale: bool,
    /// A rehearsal: everything, but too short for the numbers to mean anything.
    #[arg(long)]
    quick: bool,
    /// The service to measure [default: user-service, beside this program]
    #[arg(long)]
    service: Option<PathBuf>,
    /// Where results and charts are written [default: docs/performance, of a rehearsal nowhere]
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Only the load generator, on a service that runs already.
    Load(LoadArgs),
}

impl Cli {
    fn plan(&self) -> anyhow::Result<Plan> {
        let beside = std::env::current_exe()?.with_file_name("user-service");
        let service = self.service.clone().unwrap_or(beside);
        let service = service.canonicalize().with_context(|| format!("no {}", service.display()))?;
        let (warm_up, duration) = if self.quick { (50, 200) } else { (250, 2000) };
        let mut sizes = if self.quick { vec![1_000, 10_000] } else { vec![10_000, 100_000, 1_000_000] };
        let users = if self.quick { 10_000 } else { 1_000_000 };
        if self.scale {
            sizes.push(10 * users);
        }
        let (repetitions, made_by) = match (self.quick, self.scale) {
            (true, _) => (1, "A rehearsal, too short for the numbers to mean anything,"),
            (false, true) => (5, "Made by `make bench-scale`"),
            (false, false) => (3, "Made by `make bench`"),
        };
        Ok(Plan {
            made_by,
            service,
            repetitions,
            warm_up: Duration::from_millis(warm_up),
            duration: Duration::from_millis(duration),
            sizes,
            users,
        })
    }
}

/// All on one thread: the load generator's.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    if let Some(Command::Load(args)) = &cli.command {
        return load::run(args).await;
    }
    let plan = cli.plan()?;
    // A thousand watchers have a connection each, here and in the service.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let cluster = Cluster::start().await?;
    // Whoever loses is dropped, and with the run the services and pgbench end.
    let result = tokio::select! {
        result = run::run(&plan, &cluster) => Some(result),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
    };
    cluster.stop().await?;
    let Some(result) = result else { bail!("interrupted") };
    let findings = result?;

    let report = report::report(&findings, &plan)?;
    println!("{report}");
    let default = (!cli.quick).then(|| PathBuf::from("docs/performance"));
    if let Some(dir) = cli.out.or(default) {
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("results.md"), report)?;
        charts::write(&findings, &dir)?;
    }
    Ok(())
}

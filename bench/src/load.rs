//! The load generator by itself, for services that others start.

use std::{net::SocketAddr, time::Duration};

use clap::Args;

use crate::{
    calls::{Requests, Work},
    generator::{self, Load},
    usage::Usage,
};

/// Puts a service under load and prints what came of it, as one line of JSON.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// Where it listens.
    #[arg(long)]
    addr: SocketAddr,
    /// Which rpc.
    #[arg(long)]
    rpc: Work,
    /// How many users there are, with the ids of the benchmark.
    #[arg(long)]
    users: u64,
    #[arg(long)]
    in_flight: usize,
    #[arg(long)]
    seconds: f64,
}

pub async fn run(args: &LoadArgs) -> anyhow::Result<()> {
    let duration = Duration::from_secs_f64(args.seconds);
    let load = Load { in_flight: args.in_flight, rate: None, warm_up: duration / 10, duration };
    let requests = Requests::new(args.rpc, args.users, String::new());
    let cell = generator::run(args.addr, requests, load, || Ok(Usage::default())).await?;
    let us = |ms: Option<f64>| ms.unwrap_or_default() * 1e3;
    println!(
        r#"{{"ok": {:.0}, "errors": 0, "seconds": {}, "p50_us": {:.0}, "p99_us": {:.0}}}"#,
        cell.rate * args.seconds,
        args.seconds,
        us(cell.median),
        us(cell.p99)
    );
    Ok(())
}

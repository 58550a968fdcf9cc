//! The load generator: so many callers, each of which makes its next call when it
//! has the answer to the one before.
//!
//! It runs on one thread, the benchmark's own, and its CPU time is reported with
//! each row.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use http::Request;
use tokio::{task::JoinSet, time};

use crate::{
    calls::Requests,
    client::{Caller, Connection, head},
    results::Cell,
    usage::Usage,
};

/// Several in flight spread over so many connections; a single one needs but one.
const CONNECTIONS: usize = 4;

/// How much, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub in_flight: usize,
    /// Calls a second, if not as many as possible.
    pub rate: Option<f64>,
    /// Before anything is measured.
    pub warm_up: Duration,
    pub duration: Duration,
}

/// A call that succeeded.
struct Sample {
    ended: Instant,
    took: Duration,
}

/// Puts a service under load, and asks `usage` before and after for what was used.
/// One call that fails fails it all.
pub async fn run(
    addr: SocketAddr,
    mut requests: Requests,
    load: Load,
    usage: impl Fn() -> anyhow::Result<Usage>,
) -> anyhow::Result<Cell> {
    let head = head(addr, requests.work.path())?;
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS.min(load.in_flight) {
        connections.push(Connection::open(addr).await?);
    }
    let is_over = Arc::new(AtomicBool::new(false));
    let mut callers = JoinSet::new();
    let mut pace = Pace::new(load);
    for (_, connection) in (0..load.in_flight).zip(connections.iter().cycle()) {
        let (caller, requests) = (connection.caller.clone(), requests.fork());
        callers.spawn(make_calls(caller, head.clone(), requests, pace, Arc::clone(&is_over)));
        pace.next += pace.between_callers;
    }

    let window = async {
        time::sleep(load.warm_up).await;
        let before = usage()?;
        let from = Instant::now();
        time::sleep(load.duration).await;
        let to = Instant::now();
        anyhow::Ok((from..to, usage()? - before))
    };
    let (window, used) = tokio::select! {
        window = window => window?,
        Some(ended) = callers.join_next() => {
            ended??;
            bail!("a caller stopped calling");
        }
    };
    is_over.store(true, Ordering::Relaxed);
    let mut latencies = Vec::new();
    while let Some(samples) = callers.join_next().await {
        let samples = samples??;
        let in_window = samples.iter().filter(|sample| window.contains(&sample.ended));
        latencies.extend(in_window.map(|sample| sample.took));
    }
    let elapsed = window.end - window.start;
    Cell::new(latencies, elapsed, used).context("no call ended while it was measured")
}

/// When a caller makes its calls.
#[derive(Clone, Copy)]
struct Pace {
    next: Instant,
    between_calls: Duration,
    between_callers: Duration,
}

impl Pace {
    /// The pace of the first caller. Without a rate, every call is due at once.
    fn new(load: Load) -> Self {
        let between_callers = load.rate.map_or(0.0, f64::recip);
        Self {
            next: Instant::now(),
            between_calls: Duration::from_secs_f64(between_callers * load.in_flight as f64),
            between_callers: Duration::from_secs_f64(between_callers),
        }
    }
}

/// One caller.
async fn make_calls(
    mut caller: Caller,
    head: Request<()>,
    mut requests: Requests,
    mut pace: Pace,
    is_over: Arc<AtomicBool>,
) -> anyhow::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        // The clock of the timer ticks in milliseconds: paced calls come in small
        // bursts, which is no easier to serve than an even flow. A caller that is
        // late does not wait, so the rate holds.
        if !pace.between_calls.is_zero() {
            time::sleep_until(pace.next.into()).await;
            pace.next += pace.between_calls;
        }
        let request = requests.next()?;
        let started = Instant::now();
        caller.call(head.clone(), request).await?;
        let ended = Instant::now();
        samples.push(Sample { ended, took: ended - started });
    }
    Ok(samples)
}

//! The load generator: callers that each make the next call when the previous one has
//! succeeded. It runs on one thread, and its CPU time is reported with each row.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use tokio::{task::JoinSet, time};

use crate::{
    client::GrpcClient,
    requests::Requests,
    results::{Cell, quantiles},
    usage::Meter,
};

/// Makes one call at a time.
pub trait Caller: Send + 'static {
    type Request: Send;

    /// Builds a request, which is not part of the latency.
    fn next_request(&mut self) -> Result<Self::Request>;

    /// Returns when the call has succeeded.
    fn call(&mut self, request: Self::Request) -> impl Future<Output = Result<()>> + Send;
}

pub struct GrpcCaller {
    pub client: GrpcClient,
    pub requests: Requests,
}

impl Caller for GrpcCaller {
    type Request = Bytes;

    fn next_request(&mut self) -> Result<Bytes> {
        self.requests.next()
    }

    async fn call(&mut self, request: Bytes) -> Result<()> {
        self.client.call(request).await?;
        Ok(())
    }
}

/// How fast and how long the callers call.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Calls per second of all callers together; `None` for as many as possible.
    pub rate: Option<f64>,
    pub warm_up: Duration,
    pub duration: Duration,
}

/// A call that succeeded.
struct Sample {
    end: Instant,
    latency: Duration,
}

/// Runs the load. One failed call ends it with an error.
pub async fn run(callers: Vec<impl Caller>, load: Load, meter: Meter) -> Result<Cell> {
    let is_over = Arc::new(AtomicBool::new(false));
    let between_callers = Duration::from_secs_f64(load.rate.map_or(0.0, f64::recip));
    let mut pace = Pace { next: Instant::now(), interval: between_callers * u32::try_from(callers.len())? };
    let mut tasks = JoinSet::new();
    for caller in callers {
        tasks.spawn(make_calls(caller, pace, Arc::clone(&is_over)));
        pace.next += between_callers;
    }
    let measure = async {
        time::sleep(load.warm_up).await;
        let before = meter.read()?;
        let start = Instant::now();
        time::sleep(load.duration).await;
        let end = Instant::now();
        anyhow::Ok((start..end, meter.since(before)?))
    };
    let (window, used) = tokio::select! {
        measured = measure => measured?,
        Some(ended) = tasks.join_next() => {
            ended??;
            bail!("a caller stopped calling");
        }
    };
    is_over.store(true, Ordering::Relaxed);
    let mut latencies = Vec::new();
    while let Some(samples) = tasks.join_next().await {
        let samples = samples??;
        let in_window = samples.iter().filter(|sample| window.contains(&sample.end));
        latencies.extend(in_window.map(|sample| sample.latency.as_secs_f64() * 1e3));
    }
    let calls = latencies.len() as f64;
    let quantiles = quantiles(latencies).context("no call ended during the measurement")?;
    Ok(Cell::new(calls, calls / (window.end - window.start).as_secs_f64(), quantiles, used))
}

/// When a caller makes its calls; without an interval, at once.
#[derive(Clone, Copy)]
struct Pace {
    next: Instant,
    interval: Duration,
}

async fn make_calls(
    mut caller: impl Caller,
    mut pace: Pace,
    is_over: Arc<AtomicBool>,
) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        // The timer has a resolution of a millisecond, so paced calls come in small bursts.
        // A late caller does not wait, so the rate holds.
        if !pace.interval.is_zero() {
            time::sleep_until(pace.next.into()).await;
            pace.next += pace.interval;
        }
        let request = caller.next_request()?;
        let start = Instant::now();
        caller.call(request).await?;
        let end = Instant::now();
        samples.push(Sample { end, latency: end - start });
    }
    Ok(samples)
}

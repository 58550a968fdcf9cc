//! The change feed: how soon changes are delivered, and what watchers and the change log
//! cost the writers.

use std::{
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use futures_util::future::try_join_all;
use h2::RecvStream;
use tokio::{runtime, sync::oneshot, task::JoinSet};
use tokio_postgres::types::ToSql;
use user_service::pb::{self, user_change::State, user_service_client::UserServiceClient};
use uuid::Uuid;

use crate::{
    client::{GrpcClient, frame},
    generator::Load,
    plan::Plan,
    postgres::{Database, connect},
    requests::{NEW_NAMES, Work},
    results::{Figure, Results, quantiles},
    service::Service,
    statements::{self, SESSION_OPTIONS},
    usage::{peak_memory, reset_peak_memory},
};

/// Create rates at which deliveries are timed, as shares of the highest one, and the
/// latencies in milliseconds from the start of a transaction to the delivery of its change:
/// to a watcher on the replica that writes (median, p99) and on another one (the same).
pub const DELIVERY: [(f64, [Figure; 4]); 3] = [
    (0.1, delivery(["10 %, same, median", "10 %, same, p99", "10 %, other, median", "10 %, other, p99"])),
    (0.25, delivery(["25 %, same, median", "25 %, same, p99", "25 %, other, median", "25 %, other, p99"])),
    (0.5, delivery(["50 %, same, median", "50 %, same, p99", "50 %, other, median", "50 %, other, p99"])),
];

const fn delivery(names: [&'static str; 4]) -> [Figure; 4] {
    let [a, b, c, d] = names;
    [Figure(a, "ms"), Figure(b, "ms"), Figure(c, "ms"), Figure(d, "ms")]
}

pub const UNWATCHED: Figure = Figure("`CreateUser` without watchers", "users/s");
pub const WATCHED: Figure = Figure("`CreateUser` with 1000 watchers", "users/s");
pub const WATCHER_MEMORY: Figure = Figure("resident memory of a watcher", "KiB");
pub const UNLOGGED: Figure = Figure("batch statement of 128 creates, without the change log", "users/s");
pub const LOGGED: Figure = Figure("batch statement of 128 creates, with the change log", "users/s");

/// Calls in flight that create.
const IN_FLIGHT: usize = 512;
/// The most watchers that a replica accepts by default.
const WATCHERS: usize = 1000;
/// Pairs of measurements with and without watchers in a repetition. A single pair differs
/// more by chance than by its watchers.
pub const PAIRS: usize = 4;
/// Users in a timed batch statement, and the number of such statements.
const BATCH: usize = 128;
const BATCHES: usize = 200;

/// Measures everything; `highest` is the highest create rate.
pub async fn run(plan: &Plan, database: &Database, highest: f64, results: &mut Results) -> Result<()> {
    let same = Service::start(&plan.service, database, true).await?;
    let other = Service::start(&plan.service, database, true).await?;
    for repetition in 1..=plan.repetitions {
        eprintln!("change feed, repetition {repetition}");
        for (share, figures) in DELIVERY {
            let mut watches = Vec::new();
            for addr in [same.server.addr, other.server.addr] {
                watches.push(Watch::start(move |ready, stop| time_changes(addr, ready, stop)).await?);
            }
            create(plan, &same, Some(share * highest)).await?;
            for (watch, figures) in watches.into_iter().zip(figures.chunks(2)) {
                let latencies = quantiles(watch.stop().await?).context("nothing was delivered")?;
                for (figure, value) in figures.iter().zip(latencies) {
                    results.push_figure(*figure, value);
                }
            }
        }
        for pair in 0..PAIRS {
            let mut turns = [(UNWATCHED, 0), (WATCHED, WATCHERS)];
            // The order alternates, so that neither always follows the other.
            if pair % 2 == 1 {
                turns.reverse();
            }
            let mut memory = 0.0;
            for (figure, watchers) in turns {
                let (rate, peak) = create_watched(plan, &same, watchers).await?;
                results.push_figure(figure, rate);
                memory = peak - memory;
            }
            // Later, memory of earlier watchers may not have been returned yet.
            if pair == 0 {
                results.push_figure(WATCHER_MEMORY, memory * 1024.0 / WATCHERS as f64);
            }
        }
        let [unlogged, logged] = run_batches(database).await?;
        results.push_figure(UNLOGGED, unlogged);
        results.push_figure(LOGGED, logged);
    }
    same.stop().await?;
    other.stop().await
}

/// Creates users and returns the number per second.
async fn create(plan: &Plan, service: &Service, rate: Option<f64>) -> Result<f64> {
    let load = Load { rate, warm_up: plan.warm_up, duration: plan.duration };
    Ok(service.measure(Work::Create, IN_FLIGHT, load).await?.rate)
}

/// Creates users with so many watchers. Returns users per second, and the highest memory of
/// the service in MiB.
async fn create_watched(plan: &Plan, service: &Service, watchers: usize) -> Result<(f64, f64)> {
    let addr = service.server.addr;
    let watch = Watch::start(move |ready, stop| discard_changes(addr, watchers, ready, stop)).await?;
    reset_peak_memory(service.server.pid)?;
    let rate = create(plan, service, None).await?;
    let peak = peak_memory(service.server.pid)?;
    watch.stop().await?;
    Ok((rate, peak))
}

/// Watchers on a thread of their own, so that they do not delay the load generator.
struct Watch<T> {
    thread: JoinSet<Result<T>>,
    stop: oneshot::Sender<()>,
}

impl<T: Send + 'static> Watch<T> {
    /// Returns when `watch` sends to its first argument. It has to end when its second
    /// argument receives.
    async fn start<F: Future<Output = Result<T>>>(
        watch: impl FnOnce(oneshot::Sender<()>, oneshot::Receiver<()>) -> F + Send + 'static,
    ) -> Result<Self> {
        let (ready, is_ready) = oneshot::channel();
        let (stop, is_stopped) = oneshot::channel();
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let mut thread = JoinSet::new();
        thread.spawn_blocking(move || runtime.block_on(watch(ready, is_stopped)));
        let watch = Self { thread, stop };
        if is_ready.await.is_err() {
            watch.stop().await?;
            bail!("a watch ended before it started");
        }
        Ok(watch)
    }

    async fn stop(mut self) -> Result<T> {
        // If the thread has ended already, its result says why.
        let _ = self.stop.send(());
        self.thread.join_next().await.context("no thread")??
    }
}

/// Returns the latency of each change in milliseconds.
async fn time_changes(
    addr: SocketAddr,
    ready: oneshot::Sender<()>,
    mut stop: oneshot::Receiver<()>,
) -> Result<Vec<f64>> {
    let mut client = UserServiceClient::connect(format!("http://{addr}")).await?;
    let mut messages = client.watch_users(pb::WatchUsersRequest::default()).await?.into_inner();
    messages.message().await?.context("the watch ended")?;
    let _ = ready.send(());
    let mut latencies = Vec::new();
    loop {
        let message = tokio::select! {
            message = messages.message() => message?.context("the watch ended")?,
            _ = &mut stop => return Ok(latencies),
        };
        let now = SystemTime::now();
        for change in message.changes {
            let Some(State::User(user)) = change.state else { bail!("a change without user") };
            let time = user.update_time.context("a user without update_time")?;
            latencies.push(now.duration_since(time.try_into()?)?.as_secs_f64() * 1e3);
        }
    }
}

/// Reads what so many watchers receive, each on its own connection.
async fn discard_changes(
    addr: SocketAddr,
    watchers: usize,
    ready: oneshot::Sender<()>,
    stop: oneshot::Receiver<()>,
) -> Result<()> {
    let request = frame(&pb::WatchUsersRequest::default())?;
    let mut watches = Vec::new();
    for _ in 0..watchers {
        let mut client = GrpcClient::connect(addr, "/users.v1.UserService/WatchUsers").await?;
        let mut messages = client.start(request.clone()).await?;
        discard(&mut messages).await?;
        watches.push(async move {
            let _client = client;
            loop {
                discard(&mut messages).await?;
            }
        });
    }
    let _ = ready.send(());
    tokio::select! {
        ended = try_join_all(watches) => ended.map(|_: Vec<()>| ()),
        _ = stop => Ok(()),
    }
}

async fn discard(messages: &mut RecvStream) -> Result<()> {
    let bytes = messages.data().await.context("the watch ended")??;
    Ok(messages.flow_control().release_capacity(bytes.len())?)
}

/// Runs the batch statement without and with the change log, in turns, and returns users
/// per second of each.
async fn run_batches(database: &Database) -> Result<[f64; 2]> {
    let client = connect(&database.url, SESSION_OPTIONS).await?;
    let [unlogged, logged] = statements::create_batch()?;
    let statements = [client.prepare(&unlogged).await?, client.prepare(&logged).await?];
    let mut random = fastrand::Rng::new();
    let mut elapsed = [Duration::ZERO; 2];
    for _ in 0..BATCHES {
        for (statement, elapsed) in statements.iter().zip(&mut elapsed) {
            let numbers: Vec<u64> = (0..BATCH).map(|_| random.u64(NEW_NAMES)).collect();
            let ids: Vec<Uuid> = numbers.iter().map(|_| Uuid::now_v7()).collect();
            let request_ids: Vec<Uuid> = numbers.iter().map(|n| Uuid::from_u64_pair(*n, *n)).collect();
            let texts = |text: fn(&u64) -> String| numbers.iter().map(text).collect::<Vec<_>>();
            let (names, emails) = (texts(|n| format!("user{n}")), texts(|n| format!("user{n}@example.com")));
            let display_names = texts(|n| format!("User {n}"));
            let [fingerprints, salts] = [32, 16].map(|length| vec![vec![0x5a_u8; length]; BATCH]);
            let no = vec![false; BATCH];
            let parameters: [&(dyn ToSql + Sync); 11] = [
                &None::<&str>,
                &request_ids,
                &fingerprints,
                &ids,
                &no,
                &names,
                &names,
                &emails,
                &emails,
                &display_names,
                &salts,
            ];
            let start = Instant::now();
            client.query(statement, &parameters).await?;
            *elapsed += start.elapsed();
        }
    }
    Ok(elapsed.map(|elapsed| (BATCHES * BATCH) as f64 / elapsed.as_secs_f64()))
}

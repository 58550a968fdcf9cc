//! The change feed: how soon changes are delivered, what watchers and the change log
//! cost those who write, and how fast somebody catches up who was away.

use std::{
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, bail};
use futures_util::future::try_join_all;
use h2::RecvStream;
use tokio::{runtime, sync::oneshot, task::JoinSet};
use tokio_postgres::types::ToSql;
use user_service::{
    db::session_settings,
    grouped,
    pb::{self, user_service_client::UserServiceClient},
};
use uuid::Uuid;

use crate::{
    calls::{NEW_NAMES, Requests, Work, frame},
    client::{Connection, head},
    cluster::{Cluster, Database},
    generator::{self, Load},
    run::Plan,
    service::Service,
    usage::{Memory, Usage},
};

/// How much of what can be created at most is created while deliveries are timed.
pub const SHARES: [f64; 3] = [0.1, 0.25, 0.5];
/// Calls in flight that create.
const IN_FLIGHT: usize = 512;
/// The most that one replica takes.
pub const WATCHERS: usize = 1000;
/// How often in a repetition creates that many watch take turns with creates that nobody
/// watches: two measurements of the same differ by more than these do.
pub const TURNS: usize = 4;
/// Users in a group of creates that is timed, and how many such groups.
const GROUP: usize = 128;
const GROUPS: usize = 200;

/// What was found out: figures of one repetition each.
#[derive(Debug, Default)]
pub struct Feed {
    /// By share.
    pub delivery: [Delivery; SHARES.len()],
    /// Creates a second: nobody watches, many do.
    pub unwatched: Vec<f64>,
    pub watched: Vec<f64>,
    /// KiB by which the service grows at most, for each of them.
    pub memory_per_watcher: Vec<f64>,
    /// Creates a second without the change log, and with it.
    pub unlogged: Vec<f64>,
    pub logged: Vec<f64>,
}

/// Deliveries to a watcher of the replica that wrote, and of another one.
#[derive(Debug, Default)]
pub struct Delivery {
    pub here: Latencies,
    pub there: Latencies,
}

/// Milliseconds from the beginning of a transaction to the delivery of its change.
#[derive(Debug, Default)]
pub struct Latencies {
    pub median: Vec<f64>,
    pub p99: Vec<f64>,
}

impl Latencies {
    /// Those of a repetition.
    fn push(&mut self, mut latencies: Vec<f64>) -> anyhow::Result<()> {
        latencies.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| latencies.get((latencies.len() as f64 * share) as usize);
        self.median.push(*at(0.5).context("nothing was delivered")?);
        self.p99.push(*at(0.99).context("nothing was delivered")?);
        Ok(())
    }
}

/// Measures all of it; `most` is the rate at which users can be created.
pub async fn run(plan: &Plan, cluster: &Cluster, database: &Database, most: f64) -> anyhow::Result<Feed> {
    let mut feed = Feed::default();
    let here = Service::start(&plan.service, database, "on").await?;
    let there = Service::start(&plan.service, database, "on").await?;
    let (here_addr, there_addr) = (here.addr, there.addr);
    for repetition in 1..=plan.repetitions {
        eprintln!("the change feed, repetition {repetition}");
        for (share, delivery) in SHARES.into_iter().zip(&mut feed.delivery) {
            let at_here =
                Watching::begin(move |begun, enough| time_changes(here_addr, begun, enough)).await?;
            let at_there =
                Watching::begin(move |begun, enough| time_changes(there_addr, begun, enough)).await?;
            create(plan, &here, Some(share * most)).await?;
            delivery.here.push(at_here.end().await?)?;
            delivery.there.push(at_there.end().await?)?;
        }
        for turn in 0..TURNS {
            // Neither always comes after the other.
            let ((unwatched, without), (watched, with)) = if turn % 2 == 0 {
                let unwatched = create_watched(plan, &here, 0).await?;
                (unwatched, create_watched(plan, &here, WATCHERS).await?)
            } else {
                let watched = create_watched(plan, &here, WATCHERS).await?;
                (create_watched(plan, &here, 0).await?, watched)
            };
            feed.unwatched.push(unwatched);
            feed.watched.push(watched);
            // Later, what watchers took before has perhaps not been given back yet.
            if turn == 0 {
                feed.memory_per_watcher.push((with - without) * 1024.0 / WATCHERS as f64);
            }
        }
        let [unlogged, logged] = write_groups(cluster, database).await?;
        feed.unlogged.push(unlogged);
        feed.logged.push(logged);
    }
    here.stop().await?;
    there.stop().await?;
    Ok(feed)
}

/// Creates users, and says how many a second.
async fn create(plan: &Plan, service: &Service, rate: Option<f64>) -> anyhow::Result<f64> {
    let requests = Requests::new(Work::Create, service.database.users, String::new());
    let load = Load { in_flight: IN_FLIGHT, rate, warm_up: plan.warm_up, duration: plan.duration };
    Ok(generator::run(service.addr, requests, load, || Ok(Usage::default())).await?.rate)
}

/// Creates users while so many watch, and says how many a second, and how many MiB the
/// service takes at most.
async fn create_watched(plan: &Plan, service: &Service, watchers: usize) -> anyhow::Result<(f64, f64)> {
    let addr = service.addr;
    let watching = Watching::begin(move |begun, enough| read_along(addr, watchers, begun, enough)).await?;
    Memory::forget_peak(service.pid)?;
    let rate = create(plan, service, None).await?;
    let peak = Memory::of(service.pid)?.peak;
    watching.end().await?;
    Ok((rate, peak))
}

/// Whoever watches, on a thread of their own.
struct Watching<T> {
    thread: JoinSet<anyhow::Result<T>>,
    enough: oneshot::Sender<()>,
}

impl<T: Send + 'static> Watching<T> {
    /// Returns when `watch` says, with its first argument, that it has begun. It is to
    /// end when it hears from its second.
    async fn begin<F: Future<Output = anyhow::Result<T>>>(
        watch: impl FnOnce(oneshot::Sender<()>, oneshot::Receiver<()>) -> F + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (begun, has_begun) = oneshot::channel();
        let (enough, is_enough) = oneshot::channel();
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let mut thread = JoinSet::new();
        thread.spawn_blocking(move || runtime.block_on(watch(begun, is_enough)));
        let watching = Self { thread, enough };
        if has_begun.await.is_err() {
            watching.end().await?;
            bail!("a watch ended before it began");
        }
        Ok(watching)
    }

    async fn end(mut self) -> anyhow::Result<T> {
        // If nobody hears it, the thread says why.
        let _ = self.enough.send(());
        self.thread.join_next().await.context("nobody watches")??
    }
}

/// How long each change takes, in milliseconds.
async fn time_changes(
    addr: SocketAddr,
    begun: oneshot::Sender<()>,
    mut is_enough: oneshot::Receiver<()>,
) -> anyhow::Result<Vec<f64>> {
    let mut client = UserServiceClient::connect(format!("http://{addr}")).await?;
    let mut messages = client.watch_users(pb::WatchUsersRequest::default()).await?.into_inner();
    messages.message().await?.context("the watch ended")?;
    let _ = begun.send(());
    let mut latencies = Vec::new();
    loop {
        let message = tokio::select! {
            message = messages.message() => message?.context("the watch ended")?,
            _ = &mut is_enough => return Ok(latencies),
        };
        let now = SystemTime::now();
        for change in message.changes {
            let time = change.user.and_then(|user| user.update_time).context("a change without user")?;
            latencies.push(now.duration_since(time.try_into()?)?.as_secs_f64() * 1e3);
        }
    }
}

/// Reads what so many watchers get, each on a connection of its own.
async fn read_along(
    addr: SocketAddr,
    watchers: usize,
    begun: oneshot::Sender<()>,
    is_enough: oneshot::Receiver<()>,
) -> anyhow::Result<()> {
    let head = head(addr, "/users.v1.UserService/WatchUsers")?;
    let request = frame(&pb::WatchUsersRequest::default())?;
    let mut watches = Vec::new();
    for _ in 0..watchers {
        let mut connection = Connection::open(addr).await?;
        let mut messages = connection.caller.begin(head.clone(), request.clone()).await?;
        read(&mut messages).await?;
        watches.push(async move {
            let _connection = connection;
            loop {
                read(&mut messages).await?;
            }
        });
    }
    let _ = begun.send(());
    tokio::select! {
        ended = try_join_all(watches) => ended.map(|_: Vec<()>| ()),
        _ = is_enough => Ok(()),
    }
}

/// Some octets, whatever they are.
async fn read(messages: &mut RecvStream) -> anyhow::Result<()> {
    let octets = messages.data().await.context("the watch ended")??;
    Ok(messages.flow_control().release_capacity(octets.len())?)
}

/// Creates users with the statement of a group, without the change log and with it:
/// users a second.
async fn write_groups(cluster: &Cluster, database: &Database) -> anyhow::Result<[f64; 2]> {
    let statement = grouped::STATEMENTS.iter().find(|sql| sql.contains("insert into users"));
    let logged = *statement.context("no statement creates users")?;
    let (before, log) = logged.split_once(", change as (").context("no statement writes the log")?;
    let (_, after) = log.split_once(")\nselect").context("nothing behind the log")?;
    let unlogged = format!("{before}\nselect{after}");
    let session = cluster.connect(database).await?;
    session.client.batch_execute(&session_settings(0, 0)).await?;
    let statements = [session.client.prepare(&unlogged).await?, session.client.prepare(logged).await?];
    let mut random = fastrand::Rng::new();
    let mut took = [Duration::ZERO; 2];
    for _ in 0..GROUPS {
        for (statement, took) in statements.iter().zip(&mut took) {
            let new = |_| random.u64(NEW_NAMES);
            let numbers: Vec<u64> = (0..GROUP).map(new).collect();
            let ids: Vec<Uuid> = numbers.iter().map(|_| Uuid::now_v7()).collect();
            let request_ids: Vec<Uuid> = numbers.iter().map(|n| Uuid::from_u64_pair(*n, *n)).collect();
            let of_octets = |length| vec![vec![0x5a_u8; length]; GROUP];
            let names = |make: fn(&u64) -> String| numbers.iter().map(make).collect::<Vec<_>>();
            let (usernames, emails) =
                (names(|n| format!("user{n}")), names(|n| format!("user{n}@example.com")));
            let (display_names, fingerprints, salts) =
                (names(|n| format!("User {n}")), of_octets(32), of_octets(16));
            let params: [&(dyn ToSql + Sync); 9] = [
                &request_ids,
                &fingerprints,
                &ids,
                &usernames,
                &usernames,
                &emails,
                &emails,
                &display_names,
                &salts,
            ];
            let started = Instant::now();
            session.client.query(statement, &params).await?;
            *took += started.elapsed();
        }
    }
    Ok(took.map(|took| (GROUPS * GROUP) as f64 / took.as_secs_f64()))
}

//! The only place that wires, starts and stops.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::server::{HealthReporter, HealthService};

use crate::api::coalescer::Limits;
use crate::api::service::UserService;
use crate::config::{Config, RequestCoalescing};
use crate::feed::reader::Feed;
use crate::health;
use crate::pb;
use crate::server::dispatch::{self, NamedService};
use crate::store::batch;
use crate::store::change_log;
use crate::store::dev_postgres::Embedded;
use crate::store::export::{self, Exports};
use crate::store::grouped;
use crate::store::import::{self, Imports};
use crate::store::list;
use crate::store::lookup;
use crate::store::pool::{self, Db};
use crate::store::purge;
use crate::store::users;
use crate::telemetry::describe;

/// Statements under way at once for each of the rpcs that are grouped. With more,
/// groups are smaller. On two cores, 1 to 4 made no difference that was larger than the
/// noise, with 512 calls in flight; one is slower with 100.
const LANES: usize = 2;
/// Calls in one statement, at most. 64 to 512 made no difference either.
const GROUP_SIZE: usize = 128;

/// Between two attempts to reach a database that is not there yet.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);

/// Runs the service until SIGTERM or SIGINT, or until a part of it fails.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let listener = TcpListener::bind(config.listen_addr)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen_addr))?;
    let addr = listener.local_addr()?;
    let (embedded, postgres) = open(&config).await?;

    let (db, abandoned) = Db::new(&config, postgres.clone(), &statements())?;
    let db = Arc::new(db);
    let reporter = health::reporter().await;
    let lanes = TaskTracker::new();
    let imports = Imports::new(Arc::clone(&db), &config, lanes.clone());
    let (exports, export_connections) = Exports::new(Arc::clone(&db), postgres.clone(), &config);
    let feed = Arc::new(Feed::new(Arc::clone(&db), &config));
    let users =
        UserService::new(Arc::clone(&db), group_limits(&config), &lanes, imports, exports, Arc::clone(&feed));
    let services = services(users, &reporter)?;
    let (stop_tasks, stop_server) = (CancellationToken::new(), CancellationToken::new());

    let mut tasks = JoinSet::new();
    let keeping = keep_database(postgres.clone(), Arc::clone(&db), reporter.clone(), config.clone());
    spawn(&mut tasks, &stop_tasks, keeping);
    // They go on when the others stop, for those that are cut off at the end.
    let mut closers = JoinSet::new();
    closers.spawn(pool::cancel_abandoned(abandoned));
    closers.spawn(export::drive(export_connections));
    let mut server = JoinSet::new();
    server.spawn({
        let (config, stop) = (config.clone(), stop_server.clone());
        async move { dispatch::serve(listener, services, &config, stop).await }
    });
    // As long as there are streams.
    server.spawn({
        let stop = stop_server.clone();
        async move { stop.run_until_cancelled(feed.publish()).await.unwrap_or_default() }
    });
    tracing::info!(%addr, "listening");

    let mut result = tokio::select! {
        name = signals.next() => {
            tracing::info!(signal = name, "stopping");
            Ok(())
        }
        ended = tasks.join_next() => ended_early(ended),
        ended = server.join_next() => ended_early(ended.map(|ended| ended.map(Ok))),
    };

    // Back in the opposite order. Clients notice, calls finish, tasks stop.
    stop_tasks.cancel();
    while tasks.join_next().await.is_some() {}
    health::set_ready(&reporter, false).await;
    if result.is_ok() {
        let delay = Duration::from_millis(config.drain_delay_ms);
        tokio::select! { () = time::sleep(delay) => {}, _ = signals.next() => {} }
    }
    stop_server.cancel();
    while server.join_next().await.is_some() {}
    lanes.close();
    lanes.wait().await;
    db.close();
    drop(db);
    // They end when the last call has let go of the database, those cut off included.
    while closers.join_next().await.is_some() {}
    if let Some(embedded) = embedded {
        result = result.and(embedded.stop().await);
    }
    tracing::info!("stopped");
    result
}

/// Makes the database ready, and looks after it from then on.
async fn keep_database(
    postgres: tokio_postgres::Config,
    db: Arc<Db>,
    reporter: HealthReporter,
    config: Config,
) -> anyhow::Result<()> {
    prepare(&postgres, &db).await?;
    tokio::join!(
        health::watch_database(&postgres, &reporter),
        db.prewarm(),
        db.retire_connections(),
        purge::run(&db, &config),
        change_log::maintain_origin(&db, &postgres),
    );
    Ok(())
}

/// Brings the database's schema up to date.
pub async fn migrate(config: Config) -> anyhow::Result<()> {
    let (embedded, postgres) = open(&config).await?;
    let result = pool::migrate(&postgres).await;
    match embedded {
        Some(embedded) => result.and(embedded.stop().await),
        None => result,
    }
}

/// The database of `DATABASE_URL`, or the private one.
async fn open(config: &Config) -> anyhow::Result<(Option<Embedded>, tokio_postgres::Config)> {
    let embedded = match &config.database_url {
        Some(_) => None,
        None => Some(Embedded::start(&config.data_dir()).await?),
    };
    let given = config.database_url.clone().or_else(|| embedded.as_ref().map(Embedded::config));
    let postgres = pool::with_timeouts(given.context("no database")?);
    Ok((embedded, postgres))
}

/// Waits for the database, however long it takes, and makes it ready. What waiting
/// does not cure is an error.
async fn prepare(postgres: &tokio_postgres::Config, db: &Db) -> anyhow::Result<()> {
    let mut delay = RETRY_DELAY_MIN;
    loop {
        let Err(error) = async {
            pool::migrate(postgres).await?;
            change_log::reset_origin(postgres).await?;
            db.verify_schema().await
        }
        .await
        else {
            return Ok(());
        };
        if !pool::is_transient(&error) {
            return Err(error.context("cannot prepare the database"));
        }
        tracing::warn!(
            error = describe(error.as_ref()),
            delay_ms = delay.as_millis() as u64,
            "no database yet"
        );
        time::sleep(delay).await;
        delay = (delay * 2).min(RETRY_DELAY_MAX);
    }
}

fn group_limits(config: &Config) -> Limits {
    Limits {
        lanes: match config.request_coalescing {
            RequestCoalescing::On => LANES,
            RequestCoalescing::Off => usize::MAX,
        },
        size: GROUP_SIZE,
        waiting: config.max_queued_requests,
        timeout: Duration::from_millis(config.request_timeout_ms),
    }
}

/// Every statement of the service, for preparation.
pub fn statements() -> Vec<&'static str> {
    [
        users::STATEMENTS,
        grouped::STATEMENTS,
        batch::STATEMENTS,
        lookup::STATEMENTS,
        list::STATEMENTS,
        import::STATEMENTS,
        purge::STATEMENTS,
        change_log::STATEMENTS,
    ]
    .concat()
}

fn services(users: UserService, reporter: &HealthReporter) -> anyhow::Result<Vec<NamedService>> {
    let health = HealthService::from_health_reporter(reporter.clone());
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    Ok(vec![
        NamedService {
            name: pb::user_service_server::SERVICE_NAME,
            service: Box::new(pb::user_service_server::UserServiceServer::new(users)),
            streams: &["ImportUsers", "ExportUsers", "WatchUsers"],
        },
        NamedService {
            name: tonic_health::pb::health_server::SERVICE_NAME,
            service: Box::new(tonic_health::pb::health_server::HealthServer::new(health)),
            streams: &["Watch"],
        },
        NamedService {
            name: "grpc.reflection.v1.ServerReflection",
            service: Box::new(reflection().build_v1()?),
            streams: &["ServerReflectionInfo"],
        },
        NamedService {
            name: "grpc.reflection.v1alpha.ServerReflection",
            service: Box::new(reflection().build_v1alpha()?),
            streams: &["ServerReflectionInfo"],
        },
    ])
}

/// Starts a task that ends with an error, or when it is told to stop.
fn spawn(
    tasks: &mut JoinSet<anyhow::Result<()>>,
    stop: &CancellationToken,
    task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) {
    let stop = stop.clone();
    tasks.spawn(async move { stop.run_until_cancelled(task).await.unwrap_or(Ok(())) });
}

/// Parts of the service do not end by themselves: one that does has failed, and
/// the process is better started anew than left without it.
fn ended_early(ended: Option<Result<anyhow::Result<()>, tokio::task::JoinError>>) -> anyhow::Result<()> {
    match ended {
        Some(Ok(Err(error))) => Err(error),
        Some(Err(error)) => Err(error.into()),
        _ => bail!("a part of the service ended early"),
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

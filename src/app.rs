//! Builds the parts of the service, runs them, and shuts them down in order.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prost::Message;
use prost_types::{FileDescriptorSet, MethodDescriptorProto, method_options::IdempotencyLevel};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    task::{JoinError, JoinSet},
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::{
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tonic_reflection::pb::{v1, v1alpha};

use crate::api::coalescer::Limits;
use crate::api::service::UserService;
use crate::config::{Config, Reflection, RequestCoalescing};
use crate::feed::reader::Feed;
use crate::health;
use crate::pb;
use crate::server::dispatch::{GrpcService, NamedService};
use crate::server::listener::{self, ListenerLimits};
use crate::server::method::MethodKind;
use crate::store;
use crate::store::change_log;
use crate::store::connect;
use crate::store::dev_postgres::Embedded;
use crate::store::export::{self, Exports};
use crate::store::migrate;
use crate::store::pool::{self, Db};
use crate::store::purge;
use crate::store::token_keys::TokenKeyring;
use crate::telemetry::describe;

/// Concurrent statements of each coalesced rpc. More of them make batches smaller. On two
/// cores with 512 requests in flight, 1 to 4 made no difference beyond the noise; 1 is
/// slower with 100 requests.
const MAX_IN_FLIGHT: usize = 2;
/// Requests in one statement. 64 to 512 made no difference either.
const MAX_BATCH_SIZE: usize = 128;

/// The first delay between two attempts to connect to an unavailable database. It doubles
/// with each attempt.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);

/// The descriptors of all services, which say what their methods stream.
const DESCRIPTORS: [&[u8]; 4] = [
    pb::FILE_DESCRIPTOR_SET,
    tonic_health::pb::FILE_DESCRIPTOR_SET,
    v1::FILE_DESCRIPTOR_SET,
    v1alpha::FILE_DESCRIPTOR_SET,
];

/// Streams that end by themselves. They may outlive the maximum age of their connection.
const FINITE_STREAMS: [&str; 2] = ["ImportUsers", "ExportUsers"];

/// Runs the service until SIGTERM, SIGINT or the failure of a task.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    raise_descriptor_limit();
    let listener = bind(config.listen_addr).await?;
    let addr = listener.local_addr()?;
    let reporter = health::reporter().await;
    let stop_health = CancellationToken::new();
    let mut health_server = serve_probes(&config, &reporter, &stop_health).await?;
    let (dev_postgres, postgres) = open_database(&config).await?;

    let (db, detached) = Db::new(&config, postgres.clone(), store::statements())?;
    let (db, token_keys) = (Arc::new(db), Arc::new(TokenKeyring::default()));
    let statement_tasks = TaskTracker::new();
    let (exports, export_connections) =
        Exports::new(Arc::clone(&db), Arc::clone(&token_keys), postgres.clone(), &config);
    let feed = Arc::new(Feed::new(Arc::clone(&db), Arc::clone(&token_keys), &config));
    let limits = coalescer_limits(&config);
    let users =
        UserService::new(Arc::clone(&db), &config, limits, &statement_tasks, exports, Arc::clone(&feed));
    let services = services(users, &reporter, &config)?;
    let (stop_tasks, stop_server) = (CancellationToken::new(), CancellationToken::new());

    let mut tasks = JoinSet::new();
    let maintenance =
        maintain_database(postgres.clone(), Arc::clone(&db), token_keys, reporter.clone(), config.clone());
    spawn(&mut tasks, &stop_tasks, maintenance);
    // These outlive the other tasks: they clean up the statements and connections of
    // requests that shutdown cancels.
    let mut closers = JoinSet::new();
    closers.spawn(pool::finish_detached(detached));
    closers.spawn(export::drive(export_connections));
    let mut server = JoinSet::new();
    let limits = ListenerLimits::for_clients(&config);
    server.spawn(listener::serve(listener, services, limits, stop_server.clone()));
    // The feed ends with the server, because watch streams need it.
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
        exit = tasks.join_next() => unexpected_exit(exit),
        exit = server.join_next() => unexpected_exit(exit.map(|exit| exit.map(Ok))),
        Some(exit) = health_server.join_next() => unexpected_exit(Some(exit.map(Ok))),
    };

    // Shutdown: background tasks stop, clients see NOT_SERVING, requests in flight finish.
    stop_tasks.cancel();
    while tasks.join_next().await.is_some() {}
    health::set_ready(&reporter, false).await;
    if result.is_ok() {
        let delay = Duration::from_millis(config.drain_delay_ms);
        tokio::select! { () = time::sleep(delay) => {}, _ = signals.next() => {} }
    }
    stop_server.cancel();
    while server.join_next().await.is_some() {}
    statement_tasks.close();
    statement_tasks.wait().await;
    db.close();
    drop(db);
    // The closers end when the last request, finished or cancelled, has released the
    // database.
    while closers.join_next().await.is_some() {}
    stop_health.cancel();
    while health_server.join_next().await.is_some() {}
    if let Some(dev_postgres) = dev_postgres {
        result = result.and(dev_postgres.stop().await);
    }
    tracing::info!("stopped");
    result
}

async fn bind(addr: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr).await.with_context(|| format!("cannot listen on {addr}"))
}

/// Answers probes on `HEALTH_ADDR`, if it is set, until `stop`: as long as the process lives.
async fn serve_probes(
    config: &Config,
    reporter: &HealthReporter,
    stop: &CancellationToken,
) -> anyhow::Result<JoinSet<()>> {
    let mut server = JoinSet::new();
    if let Some(addr) = config.health_addr {
        let listener = bind(addr).await?;
        tracing::info!(addr = %listener.local_addr()?, "listening for probes");
        let (services, limits) = (vec![health_service(reporter)?], ListenerLimits::for_probes(config));
        server.spawn(listener::serve(listener, services, limits, stop.clone()));
    }
    Ok(server)
}

/// Prepares the database, then runs its periodic tasks. Returns only on failure.
async fn maintain_database(
    postgres: tokio_postgres::Config,
    db: Arc<Db>,
    token_keys: Arc<TokenKeyring>,
    reporter: HealthReporter,
    config: Config,
) -> anyhow::Result<()> {
    prepare_database(&postgres, &db, &token_keys, config.migrate_on_start).await?;
    tokio::join!(
        health::watch_database(&postgres, &db, &reporter),
        db.prewarm(),
        db.retire_connections(),
        purge::run(&db, &config),
        change_log::maintain_origin(&db, &postgres),
        token_keys.poll(&db),
    );
    Ok(())
}

/// Migrates the database to the current schema.
pub async fn migrate(config: Config) -> anyhow::Result<()> {
    let (dev_postgres, postgres) = open_database(&config).await?;
    let result = migrate::migrate(&postgres).await;
    match dev_postgres {
        Some(dev_postgres) => result.and(dev_postgres.stop().await),
        None => result,
    }
}

/// Raises the limit on descriptors as far as the process may: the soft limit is often less than
/// `MAX_CONNECTIONS` needs.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit on descriptors is not raised");
    }
}

/// Returns the connection settings of `DATABASE_URL`, or starts the private PostgreSQL.
async fn open_database(config: &Config) -> anyhow::Result<(Option<Embedded>, tokio_postgres::Config)> {
    let dev_postgres = match &config.database_url {
        Some(_) => None,
        None => Some(Embedded::start(&config.data_dir()).await?),
    };
    let postgres = config.database_url.clone().or_else(|| dev_postgres.as_ref().map(Embedded::config));
    Ok((dev_postgres, connect::with_timeouts(postgres.context("no database")?)))
}

/// Migrates or checks the schema, and verifies the database. Waits without limit for an
/// unavailable database; any other failure is an error, because a retry cannot help.
async fn prepare_database(
    postgres: &tokio_postgres::Config,
    db: &Db,
    token_keys: &TokenKeyring,
    migrate_on_start: bool,
) -> anyhow::Result<()> {
    let mut delay = RETRY_DELAY_MIN;
    loop {
        let Err(error) = async {
            connect::verify_server(postgres).await?;
            match migrate_on_start {
                true => migrate::migrate(postgres).await?,
                false => migrate::check(postgres).await?,
            }
            change_log::reset_origin(postgres).await?;
            token_keys.load(postgres).await?;
            change_log::verify(db).await?;
            db.verify_schema().await
        }
        .await
        else {
            return Ok(());
        };
        if !connect::is_transient(&error) {
            return Err(error.context("cannot prepare the database"));
        }
        tracing::warn!(
            error = describe(error.as_ref()),
            delay_ms = delay.as_millis() as u64,
            "the database is not available"
        );
        time::sleep(delay).await;
        delay = (delay * 2).min(RETRY_DELAY_MAX);
    }
}

fn coalescer_limits(config: &Config) -> Limits {
    let (max_in_flight, max_batch) = match config.request_coalescing {
        RequestCoalescing::On => (MAX_IN_FLIGHT, MAX_BATCH_SIZE),
        RequestCoalescing::Off => (usize::MAX, 1),
    };
    Limits {
        max_in_flight,
        max_batch,
        max_queued: config.max_queued_requests,
        timeout: Duration::from_millis(config.request_timeout_ms),
        lock_timeout: Duration::from_millis(config.lock_timeout_ms),
    }
}

fn services(
    users: UserService,
    reporter: &HealthReporter,
    config: &Config,
) -> anyhow::Result<Vec<NamedService>> {
    let users = pb::user_service_server::UserServiceServer::new(users);
    let users = named(pb::user_service_server::SERVICE_NAME, users)?;
    let mut services = vec![users, health_service(reporter)?];
    if config.reflection == Reflection::On {
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        };
        let v1 = named(v1::server_reflection_server::SERVICE_NAME, reflection().build_v1()?)?;
        let v1alpha = named(v1alpha::server_reflection_server::SERVICE_NAME, reflection().build_v1alpha()?)?;
        // A client is not limited otherwise in how many of these streams it leaves open.
        let idle_timeout = Some(Duration::from_millis(config.request_timeout_ms));
        for mut service in [v1, v1alpha] {
            service.methods.iter_mut().for_each(|method| method.idle_timeout = idle_timeout);
            services.push(service);
        }
    }
    Ok(services)
}

fn health_service(reporter: &HealthReporter) -> anyhow::Result<NamedService> {
    let service = HealthServer::new(HealthService::from_health_reporter(reporter.clone()));
    named(tonic_health::pb::health_server::SERVICE_NAME, service)
}

fn named(name: &'static str, service: impl GrpcService + 'static) -> anyhow::Result<NamedService> {
    Ok(NamedService { name, service: Arc::new(service), methods: methods(name)? })
}

/// Reads the methods of a service from its descriptor. A list by hand could miss a stream,
/// and shutdown would not end it.
fn methods(service: &str) -> anyhow::Result<Vec<MethodKind>> {
    for descriptors in DESCRIPTORS {
        for file in FileDescriptorSet::decode(descriptors)?.file {
            let is_named = |name: &str| format!("{}.{name}", file.package()) == service;
            if let Some(found) = file.service.iter().find(|found| is_named(found.name())) {
                return Ok(found.method.iter().map(method_kind).collect());
            }
        }
    }
    bail!("{service} has no descriptor")
}

fn method_kind(method: &MethodDescriptorProto) -> MethodKind {
    let options = method.options.clone().unwrap_or_default();
    MethodKind {
        name: method.name().to_owned(),
        takes_stream: method.client_streaming(),
        returns_stream: method.server_streaming(),
        is_finite: FINITE_STREAMS.contains(&method.name()),
        idle_timeout: None,
        is_read: options.idempotency_level() == IdempotencyLevel::NoSideEffects,
    }
}

/// Starts a task that runs until `stop` or its failure.
fn spawn(
    tasks: &mut JoinSet<anyhow::Result<()>>,
    stop: &CancellationToken,
    task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) {
    let stop = stop.clone();
    tasks.spawn(async move { stop.run_until_cancelled(task).await.unwrap_or(Ok(())) });
}

/// The error of a task that exits before shutdown. The process then exits as well: a
/// restart is safer than a service without one of its tasks.
fn unexpected_exit(exit: Option<Result<anyhow::Result<()>, JoinError>>) -> anyhow::Result<()> {
    match exit {
        Some(Ok(Err(error))) => Err(error),
        Some(Err(error)) => Err(error.into()),
        _ => bail!("a task of the service exited unexpectedly"),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_methods_are_found_in_the_descriptors() {
        for (service, expected) in [
            ("users.v1.UserService", &["ImportUsers", "ExportUsers", "WatchUsers"][..]),
            ("grpc.health.v1.Health", &["Watch"]),
            ("grpc.reflection.v1.ServerReflection", &["ServerReflectionInfo"]),
            ("grpc.reflection.v1alpha.ServerReflection", &["ServerReflectionInfo"]),
        ] {
            let methods = methods(service).unwrap();
            let streams = methods.iter().filter(|method| method.takes_stream || method.returns_stream);
            assert_eq!(streams.map(|method| &method.name).collect::<Vec<_>>(), expected, "{service}");
        }
        let methods = methods("users.v1.UserService").unwrap();
        let names = |is: fn(&MethodKind) -> bool| {
            methods.iter().filter(|method| is(method)).map(|method| method.name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(names(|method| method.takes_stream), ["ImportUsers"]);
        assert_eq!(names(|method| method.is_finite), FINITE_STREAMS);
        let reads = names(|method| method.is_read);
        assert!(reads.contains(&"GetUser") && !reads.contains(&"CreateUser"), "{reads:?}");
    }

    #[test]
    fn service_without_a_descriptor_is_an_error() {
        methods("users.v1.Unknown").unwrap_err();
    }
}

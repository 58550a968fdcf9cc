//! Readiness and liveness, as `grpc.health.v1` and the probes of Kubernetes define them.
//! The service is NOT_SERVING until a database check has succeeded.
//!
//! The database check is also the judge of the connections: it finds out that the server does not
//! answer any more, or that its address leads to another server, and closes them.

use std::time::{Duration, Instant};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Fuse, FusedFuture},
};
use tokio::time;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::pb;
use crate::store::connect::{ServerState, connect, server_state};
use crate::store::pool::{Db, Kept};
use crate::telemetry::describe;

/// The time between two database checks.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// The same while statements fail.
const CHECK_INTERVAL_MIN: Duration = Duration::from_millis(50);
/// How long a check may take, and connecting to one address, unless `connect_timeout` is set.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);
/// How many checks in a row have to fail before the service is not ready. All replicas have the
/// same database: one slow answer must not take them out of service together.
const MAX_FAILURES: u32 = 3;

/// The health service names for readiness: the server accepts requests.
const READINESS: [&str; 2] = ["", pb::user_service_server::SERVICE_NAME];
/// The health service name for liveness: the process needs no restart.
const LIVENESS: &str = "liveness";

/// Creates a reporter whose state is: live, not ready.
pub async fn reporter() -> HealthReporter {
    let reporter = HealthReporter::new();
    set_ready(&reporter, false).await;
    reporter.set_service_status(LIVENESS, ServingStatus::Serving).await;
    reporter
}

/// Sets the readiness.
pub async fn set_ready(reporter: &HealthReporter, is_ready: bool) {
    let status = if is_ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in READINESS {
        reporter.set_service_status(name, status).await;
    }
}

/// Updates readiness from the state of the database. Never returns.
///
/// The checks have their own connection, because a busy pool does not mean that the database is
/// unavailable. If an answer is overdue, a new connection is opened meanwhile: if that one
/// answers first, the old connections are dead, and if the old one does, the server was slow.
pub async fn watch_database(postgres: &tokio_postgres::Config, db: &Db, reporter: &HealthReporter) {
    let mut postgres = postgres.clone();
    if postgres.get_connect_timeout().is_none() {
        postgres.connect_timeout(CHECK_TIMEOUT);
    }
    let mut health = DatabaseHealth { db, reporter, is_ready: false, failures: 0, server: None };
    let (mut overdue, mut asked) = (Fuse::terminated(), Instant::now());
    loop {
        let answer = tokio::select! {
            biased;
            Ok(answer) = &mut overdue => Ok(answer),
            answer = Probe::open(&postgres) => {
                if let Ok((_, state)) = &answer
                    && !overdue.is_terminated()
                {
                    let kept = Kept { server: &state.identity, since: Some(asked) };
                    health.close_connections("connections do not answer, new ones do", Some(kept)).await;
                }
                answer
            }
        };
        match answer {
            Ok((probe, state)) => {
                overdue = Fuse::terminated();
                health.answered(&state).await;
                if state.unusable.is_none() {
                    if let Some(answer) = probe.check(&mut health).await {
                        (overdue, asked) = (answer.0.fuse(), answer.1);
                    }
                    // Connect again at once: a connection that breaks is no outage.
                    continue;
                }
            }
            Err(error) => health.failed(error).await,
        }
        time::sleep(CHECK_INTERVAL).await;
    }
}

/// What the checks have found so far.
struct DatabaseHealth<'a> {
    db: &'a Db,
    reporter: &'a HealthReporter,
    is_ready: bool,
    /// The checks that have failed in a row.
    failures: u32,
    /// The identity of the server that answered last.
    server: Option<String>,
}

impl DatabaseHealth<'_> {
    async fn answered(&mut self, state: &ServerState) {
        self.failures = 0;
        let before = self.server.replace(state.identity.clone());
        if before.is_some_and(|before| before != state.identity) {
            let kept = Kept { server: &state.identity, since: None };
            self.close_connections("another server answers, or it has another role", Some(kept)).await;
        }
        match state.unusable {
            None => {
                // This connection can write, so others are older than the change that allows it.
                if self.db.take_write_refused() {
                    let kept = Kept { server: &state.identity, since: None };
                    self.close_connections("they reject writes, new ones do not", Some(kept)).await;
                }
                if !self.is_ready {
                    tracing::info!("ready: the database accepts writes");
                    self.set_ready(true).await;
                }
            }
            Some(reason) if self.is_ready => {
                tracing::warn!(%reason, "not ready: the database cannot be used");
                self.set_ready(false).await;
            }
            Some(_) => {}
        }
    }

    async fn failed(&mut self, error: anyhow::Error) {
        self.failures += 1;
        let (error, failures) = (describe(error.as_ref()), self.failures);
        tracing::debug!(error, failures, "the database check failed");
        if self.is_ready && failures >= MAX_FAILURES {
            tracing::warn!(error, failures, "not ready: the database check failed");
            self.set_ready(false).await;
            self.close_connections("the server does not answer", None).await;
        }
    }

    async fn close_connections(&self, reason: &str, kept: Option<Kept<'_>>) {
        tracing::warn!(reason, "connections to the database closed");
        self.db.close_connections(kept).await;
    }

    async fn set_ready(&mut self, is_ready: bool) {
        set_ready(self.reporter, is_ready).await;
        self.is_ready = is_ready;
    }
}

/// The connection of the checks.
struct Probe {
    client: tokio_postgres::Client,
    connection: BoxFuture<'static, ()>,
}

type Answer = BoxFuture<'static, anyhow::Result<(Probe, ServerState)>>;

impl Probe {
    /// Opens a connection and makes the first check.
    async fn open(postgres: &tokio_postgres::Config) -> anyhow::Result<(Self, ServerState)> {
        let (client, connection) = connect(postgres).await?;
        time::timeout(CHECK_TIMEOUT, Self { client, connection }.ask()).await?
    }

    fn ask(mut self) -> Answer {
        let answer = async move {
            let state = tokio::select! {
                state = server_state(&self.client) => state?,
                () = &mut self.connection => anyhow::bail!("the connection was closed"),
            };
            Ok((self, state))
        };
        answer.boxed()
    }

    /// Checks the database until another connection is needed. Returns an answer that is overdue,
    /// and when the question was asked.
    async fn check(mut self, health: &mut DatabaseHealth<'_>) -> Option<(Answer, Instant)> {
        loop {
            time::sleep(CHECK_INTERVAL_MIN).await;
            tokio::select! {
                () = time::sleep(CHECK_INTERVAL - CHECK_INTERVAL_MIN) => {}
                () = health.db.suspected.notified() => {}
                () = &mut self.connection => return None,
            }
            if health.db.has_write_refused() {
                // A new connection tells whether the address leads to a server that can write.
                return None;
            }
            let asked = Instant::now();
            let mut answer = self.ask();
            let state;
            (self, state) = match time::timeout(CHECK_TIMEOUT, &mut answer).await {
                Ok(Ok(answered)) => answered,
                Ok(Err(_)) => return None,
                Err(_) => return Some((answer, asked)),
            };
            health.answered(&state).await;
            if state.unusable.is_some() {
                return None;
            }
        }
    }
}

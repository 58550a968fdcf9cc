//! The way to PostgreSQL: the pool, what a statement goes through, the
//! migrations.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use deadpool_postgres::{
    ClientWrapper, Hook, HookError, Manager, ManagerConfig, Object, Pool, PoolError, QueueMode,
    RecyclingMethod, Runtime, TimeoutType,
};
use futures_util::{
    FutureExt, StreamExt,
    future::{self, BoxFuture},
    stream,
};
use tokio::{
    sync::{Notify, Semaphore, mpsc},
    time,
};
use tokio_postgres::{
    Client, NoTls, Row,
    error::{DbError, SqlState},
    types::ToSql,
};

use crate::config::Config;
use crate::error::{Access, Error, is_connection_lost};
use crate::telemetry::describe;

/// Opening a connection up to the login, and from there to the last prepared statement.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Asking PostgreSQL to cancel a statement.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is closed when it is this old, so that connections spread over
/// what stands behind the address, and a backend's memory does not only grow.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(30 * 60);
/// How often to look for such, and which part of all is closed at a time, so that calls
/// find others.
const RETIRE_INTERVAL: Duration = Duration::from_secs(60);
const RETIRED_PART: usize = 10;
/// A parameter of a statement.
pub type Param<'a> = &'a (dyn ToSql + Sync);
/// The parameters of a statement, `$1` first.
pub type Params<'a> = &'a [Param<'a>];

/// The database, as far as calls need it: statements, each on a connection of its own, and
/// connections for those who have several.
#[derive(Debug)]
pub struct Db {
    pool: Pool,
    max_waiting: usize,
    /// For the tasks that open connections.
    openers: Arc<Semaphore>,
    /// Connections whose statement nobody waits for any more.
    abandoned: mpsc::UnboundedSender<Object>,
    /// Set once the schema is there; calls that come earlier are refused.
    is_migrated: AtomicBool,
    /// How long the username that an update replaces stays held.
    pub username_hold_days: i32,
    /// Told of every write that was committed. That costs a write an atomic or two.
    pub committed: Notify,
}

/// What [`cancel_abandoned`] works on.
pub type Abandoned = mpsc::UnboundedReceiver<Object>;

impl Db {
    /// A pool, without any connection yet. Every connection prepares
    /// `statements` when it is opened, so that a statement that does not fit the
    /// schema is found at the start.
    pub fn new(
        config: &Config,
        postgres: tokio_postgres::Config,
        statements: &[&'static str],
    ) -> anyhow::Result<(Self, Abandoned)> {
        // Fast: a connection that broke is known to be closed without asking.
        let recycling_method = RecyclingMethod::Fast;
        let manager = Manager::from_config(postgres, NoTls, ManagerConfig { recycling_method });
        let session: Arc<str> = session_settings(config.request_timeout_ms, config.lock_timeout_ms).into();
        let statements: Arc<[&str]> = statements.into();
        let pool = Pool::builder(manager)
            .max_size(config.pool_size)
            // The one that came back last: what it needs is still in its caches.
            .queue_mode(QueueMode::Lifo)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(Duration::from_millis(config.pool_acquire_timeout_ms)))
            .create_timeout(Some(CONNECT_TIMEOUT))
            .recycle_timeout(Some(CONNECT_TIMEOUT))
            .post_create(Hook::async_fn(move |client: &mut ClientWrapper, _| {
                let (session, statements) = (Arc::clone(&session), Arc::clone(&statements));
                Box::pin(async move {
                    // All in one round trip: the client sends them without waiting.
                    let prepared =
                        future::try_join_all(statements.iter().map(|sql| client.prepare_cached(sql)));
                    let made = future::try_join(client.batch_execute(&session), prepared);
                    match time::timeout(CONNECT_TIMEOUT, made).await {
                        Ok(made) => made.map(drop).map_err(HookError::Backend),
                        Err(_) => Err(HookError::message("the database does not answer")),
                    }
                })
            }))
            .build()
            .context("cannot build the connection pool")?;
        let (abandoned, receiver) = mpsc::unbounded_channel();
        let db = Self {
            pool,
            max_waiting: config.max_queued_requests,
            openers: Arc::new(Semaphore::new(config.pool_size)),
            abandoned,
            is_migrated: AtomicBool::new(false),
            username_hold_days: i32::try_from(config.username_hold_days).unwrap_or(i32::MAX),
            committed: Notify::new(),
        };
        Ok((db, receiver))
    }

    /// Runs a statement. What it writes is committed when this returns `Ok`.
    pub async fn run(
        &self,
        access: Access,
        sql: &'static str,
        params: Params<'_>,
    ) -> Result<Vec<Row>, Error> {
        let started = Instant::now();
        let mut connection = self.connection().await?;
        let wait = started.elapsed();
        let mut result = connection.query(access, sql, params).await;
        if result.as_ref().is_err_and(is_stale_statement) {
            // The schema changed under the prepared statement, which did nothing.
            let _ = connection.release(access, result);
            connection = self.connection().await?;
            result = connection.query(access, sql, params).await;
        }
        tracing::debug!(
            sql,
            rows = result.as_ref().map_or(0, Vec::len),
            wait_us = micros(wait),
            statement_us = micros(started.elapsed() - wait),
            "statement"
        );
        let rows = connection.release(access, result)?;
        if access == Access::Write {
            self.committed.notify_one();
        }
        Ok(rows)
    }

    /// Refuses what comes before the schema is there.
    pub fn ensure_migrated(&self) -> Result<(), Error> {
        let is_migrated = self.is_migrated.load(Ordering::Acquire);
        is_migrated.then_some(()).ok_or(Error::DatabaseUnavailable)
    }

    /// A connection on loan, for several statements.
    pub(crate) async fn connection(&self) -> Result<Connection<'_>, Error> {
        self.ensure_migrated()?;
        let status = self.pool.status();
        if status.waiting >= self.max_waiting {
            return Err(Error::Overloaded);
        }
        let may_open = status.available == 0 && status.size < status.max_size;
        let opener = may_open.then(|| Arc::clone(&self.openers).try_acquire_owned().ok()).flatten();
        let got = match opener {
            // A call that runs out of time must not take with it what it has begun to
            // open: there might never be a connection again.
            Some(opener) => {
                let pool = self.pool.clone();
                #[expect(clippy::disallowed_methods, reason = "it may end with the runtime")]
                let opened = tokio::spawn(async move { (pool.get().await, opener).0 });
                opened.await.unwrap_or(Err(PoolError::Closed))
            }
            None => self.pool.get().await,
        };
        match got {
            Ok(object) => Ok(Connection { object: Some(object), is_idle: true, db: self }),
            Err(PoolError::Timeout(TimeoutType::Wait)) => Err(Error::Overloaded),
            Err(error) => {
                // The loss of the database is logged once, by its health.
                tracing::debug!(error = describe(&error), "no connection");
                Err(Error::DatabaseUnavailable)
            }
        }
    }

    /// Closes the idle connections if statements are stale: all others are as old, and the
    /// next one is not.
    pub(crate) fn invalidate_statements(&self, error: &tokio_postgres::Error) -> bool {
        let is_stale = is_stale_statement(error);
        if is_stale {
            tracing::warn!(error = describe(error), "statements are stale");
            self.pool.retain(|_, _| false);
        }
        is_stale
    }

    /// A connection to keep, with everything prepared. It is none of the pool's any more.
    pub(crate) async fn own_connection(&self) -> anyhow::Result<ClientWrapper> {
        Ok(Object::take(self.pool.get().await?))
    }

    /// Opens a connection, which finds out whether the statements fit the schema;
    /// from then on, calls are let through.
    pub async fn verify_schema(&self) -> anyhow::Result<()> {
        drop(self.pool.get().await?);
        self.is_migrated.store(true, Ordering::Release);
        Ok(())
    }

    /// Opens the other connections, so that no call has to.
    pub async fn prewarm(&self) {
        let opened = future::join_all((0..self.pool.status().max_size).map(|_| self.pool.get())).await;
        tracing::debug!(connections = opened.iter().flatten().count(), "warm");
    }

    /// Closes connections that are too old, when they are idle; for ever.
    pub async fn retire_connections(&self) {
        loop {
            time::sleep(RETIRE_INTERVAL).await;
            let mut left = self.pool.status().max_size.div_ceil(RETIRED_PART);
            self.pool.retain(|_, metrics| {
                let stays = left == 0 || metrics.age() < MAX_CONNECTION_AGE;
                left -= usize::from(!stays);
                stays
            });
        }
    }

    /// Closes the pool: idle connections now, others when they come back.
    pub fn close(&self) {
        self.pool.close();
    }
}

/// A connection on loan. If the call goes away while its statement runs, the
/// connection is not given to anybody until PostgreSQL has cancelled it.
pub(crate) struct Connection<'a> {
    /// Taken when the connection is discarded.
    object: Option<Object>,
    is_idle: bool,
    db: &'a Db,
}

impl Connection<'_> {
    /// Runs a statement; the connection is busy until [`Connection::release`].
    async fn query(
        &mut self,
        access: Access,
        sql: &str,
        params: Params<'_>,
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        let Some(client) = self.client_mut() else { return Ok(Vec::new()) };
        if access == Access::DryRun {
            let transaction = client.transaction().await?;
            let statement = transaction.prepare_cached(sql).await?;
            let result = transaction.query(&statement, params).await;
            transaction.rollback().await?;
            return result;
        }
        let statement = client.prepare_cached(sql).await?;
        client.query(&statement, params).await
    }

    /// The connection, which is busy until [`Connection::release`].
    pub(crate) fn client_mut(&mut self) -> Option<&mut ClientWrapper> {
        self.is_idle = false;
        self.object.as_deref_mut()
    }

    /// Gives the connection back, or closes it if it is of no more use.
    pub(crate) fn release<T>(
        mut self,
        access: Access,
        result: Result<T, tokio_postgres::Error>,
    ) -> Result<T, Error> {
        self.is_idle = true;
        let error = match result {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        if !is_reusable(&error) {
            self.discard();
        }
        if self.db.invalidate_statements(&error) {
            return Err(Error::DatabaseUnavailable);
        }
        let meaning = Error::from_postgres(&error, access);
        if meaning == Error::Internal {
            tracing::error!(error = describe(&error), "a statement failed");
        } else {
            tracing::debug!(error = describe(&error), "a statement was refused");
        }
        Err(meaning)
    }

    /// Closes the connection.
    fn discard(&mut self) {
        self.is_idle = true;
        self.object.take().map(Object::take);
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        if !self.is_idle
            && let Some(object) = self.object.take()
        {
            // Without a receiver the service is at its end, and the object's own
            // drop closes the connection.
            let _ = self.db.abandoned.send(object);
        }
    }
}

/// Cancels the statements of calls that went away, and closes their connections:
/// a late cancellation must not hit the next call. Each keeps its place in the
/// pool until then, so that there are never more than the pool's size.
pub async fn cancel_abandoned(abandoned: Abandoned) {
    stream::unfold(abandoned, async |mut receiver| receiver.recv().await.map(|object| (object, receiver)))
        .for_each_concurrent(None, async |object| {
            let cancelled = time::timeout(CANCEL_TIMEOUT, object.cancel_token().cancel_query(NoTls)).await;
            tracing::debug!(cancelled = matches!(cancelled, Ok(Ok(()))), "statement abandoned");
            drop(Object::take(object));
        })
        .await;
}

/// What each connection is told first. There is one plan for each statement, the
/// one that the tests look at, made when nothing is known yet of how large the
/// tables will be: so it goes by indexes. What it is thought to cost is then of no
/// meaning, and must not have statements compiled. A backend whose client has gone
/// stops. A statement that waits for a lock keeps its connection, so it must not wait
/// long: a row that somebody keeps locked would take the whole pool.
pub fn session_settings(timeout_ms: u64, lock_timeout_ms: u64) -> String {
    format!(
        "set statement_timeout = {timeout_ms};
         set lock_timeout = {lock_timeout_ms};
         set idle_in_transaction_session_timeout = {timeout_ms};
         set client_connection_check_interval = 1000;
         set plan_cache_mode = force_generic_plan;
         set enable_seqscan = off;
         set enable_bitmapscan = off;
         set jit = off;"
    )
}

/// "cached plan must not change result type", or a prepared statement that the
/// server does not know.
fn is_stale_statement(error: &tokio_postgres::Error) -> bool {
    matches!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED | &SqlState::INVALID_SQL_STATEMENT_NAME))
}

/// Whether the connection can serve the next call after this error. One to a
/// server that has become a standby is whole, but of no use.
fn is_reusable(error: &tokio_postgres::Error) -> bool {
    let is_whole =
        |state: &SqlState| *state != SqlState::READ_ONLY_SQL_TRANSACTION && !is_connection_lost(state);
    !is_stale_statement(error) && error.code().is_some_and(is_whole)
}

/// Sets what the driver leaves open. Without it, a server that vanished from the
/// network holds its callers for a quarter of an hour.
pub fn with_timeouts(mut postgres: tokio_postgres::Config) -> tokio_postgres::Config {
    postgres
        .connect_timeout(CONNECT_TIMEOUT)
        .keepalives_idle(Duration::from_secs(30))
        .keepalives_interval(Duration::from_secs(10))
        .keepalives_retries(3)
        .tcp_user_timeout(Duration::from_secs(30));
    if postgres.get_application_name().is_none() {
        postgres.application_name("user-service");
    }
    postgres
}

/// Whether waiting may cure what went wrong at the start: the server is not there
/// yet, is busy, is becoming the primary, or somebody holds a lock. Anything else is
/// final, such as a wrong password or a migration that fails.
pub fn is_transient(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        if let Some(db) = cause.downcast_ref::<DbError>() {
            let state = db.code();
            return is_connection_lost(state)
                || state.code().starts_with("53")
                || [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED].contains(state)
                || *state == SqlState::READ_ONLY_SQL_TRANSACTION;
        }
        cause.is::<io::Error>()
            || cause.is::<time::error::Elapsed>()
            || cause.downcast_ref::<tokio_postgres::Error>().is_some_and(tokio_postgres::Error::is_closed)
            || matches!(
                cause.downcast_ref::<PoolError>(),
                Some(PoolError::Timeout(_) | PoolError::PostCreateHook(HookError::Message(_)))
            )
    })
}

/// A connection beside the pool, and the task that drives it, which is the
/// caller's to run.
pub async fn connect(postgres: &tokio_postgres::Config) -> anyhow::Result<(Client, BoxFuture<'static, ()>)> {
    let (client, connection) = time::timeout(CONNECT_TIMEOUT, postgres.connect(NoTls)).await??;
    Ok((client, connection.map(drop).boxed()))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

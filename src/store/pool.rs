//! The pool of connections to PostgreSQL, and how a statement runs on one of them.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{
        Arc, Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use deadpool::{
    Runtime,
    managed::{self, Metrics, PoolError, QueueMode, RecycleError, RecycleResult, TimeoutType},
};
use deadpool_postgres::ClientWrapper;
use futures_util::{
    StreamExt,
    future::{self},
    stream,
};
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot, watch},
    task::{self, AbortHandle},
    time,
};
use tokio_postgres::{NoTls, Row, error::SqlState, types::ToSql};

use crate::config::Config;
use crate::error::{Access, Error, is_connection_lost};
use crate::store::connect::{CONNECT_TIMEOUT, connect, server_state, session_settings, set_up};
use crate::telemetry::describe;

/// How long a statement whose caller has left may run on before it is cancelled.
const DETACHED_MAX: Duration = Duration::from_millis(200);
/// Limit of asking PostgreSQL to cancel a statement.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);
/// The age at which an idle connection is closed, so that connections spread over the servers
/// behind an address, and the memory of a backend does not only grow.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(30 * 60);
/// How often old connections are looked for, and which part of the pool may be closed at a time,
/// so that statements find others.
const RETIRE_INTERVAL: Duration = Duration::from_secs(60);
const RETIRED_PART: usize = 10;
/// A parameter of a statement.
pub type Param<'a> = &'a (dyn ToSql + Sync);
/// The parameters of a statement, `$1` first.
pub type Params<'a> = &'a [Param<'a>];

/// Whether what a statement wrote is committed, by the rows that it returns.
pub(crate) type IsAccepted = fn(&[Row]) -> bool;
type Pool = managed::Pool<Manager>;
type Object = managed::Object<Manager>;

/// The database as the rest of the service sees it: statements, each on a pooled connection, and
/// connections for several statements.
pub struct Db {
    pool: Pool,
    max_waiting: usize,
    /// Limits the tasks that open connections.
    openers: Arc<Semaphore>,
    /// Statements whose callers have left.
    detached: mpsc::UnboundedSender<DetachedStatement>,
    /// Set once the schema is current; earlier requests are rejected.
    is_migrated: AtomicBool,
    /// How long the username that an update replaces stays held.
    pub username_hold_days: i32,
    /// Notified of every committed write, which costs the write one or two atomic operations.
    pub committed: Arc<Notify>,
    /// Notified when a connection breaks or a write is rejected as read-only: the server is
    /// worth a look.
    pub suspected: Notify,
    /// Whether the server has rejected a write as read-only since the last look.
    write_refused: AtomicBool,
}

/// Opens the connections of the pool.
struct Manager {
    postgres: tokio_postgres::Config,
    session: String,
    /// Prepared on every new connection, so that a statement that does not fit the schema is
    /// found at the start.
    statements: Vec<&'static str>,
    /// Changes when all connections are to be closed, also those that are being opened.
    generation: watch::Sender<()>,
    /// What drives the connections, in the pool and taken out of it.
    drivers: Mutex<Vec<Driver>>,
    timeline_warning: Once,
}

/// The task that drives a connection.
struct Driver {
    task: AbortHandle,
    /// The identity of the server when the connection was opened.
    server: String,
    opened: Instant,
}

/// The connections that [`Db::close_connections`] leaves open: those to a server that were opened
/// later than a check of another connection began.
pub struct Kept<'a> {
    /// The identity of the server.
    pub server: &'a str,
    /// When the check began; `None` if it succeeded.
    pub since: Option<Instant>,
}

impl managed::Manager for Manager {
    type Type = ClientWrapper;
    type Error = anyhow::Error;

    async fn create(&self) -> anyhow::Result<ClientWrapper> {
        let mut generation = self.generation.subscribe();
        let (client, driver) = tokio::select! {
            opened = self.open() => opened?,
            _ = generation.changed() => bail!("the server has changed"),
        };
        let mut drivers = self.drivers();
        if generation.has_changed()? {
            bail!("the server has changed");
        }
        drivers.retain(|driver| !driver.task.is_finished());
        drivers.push(driver);
        Ok(client)
    }

    async fn recycle(&self, client: &mut ClientWrapper, _: &Metrics) -> RecycleResult<anyhow::Error> {
        if client.is_closed() { Err(RecycleError::message("the connection is closed")) } else { Ok(()) }
    }
}

impl Manager {
    async fn open(&self) -> anyhow::Result<(ClientWrapper, Driver)> {
        let opened = Instant::now();
        let (client, connection) = connect(&self.postgres).await?;
        #[expect(clippy::disallowed_methods, reason = "it ends with the client")]
        let driver = tokio::spawn(connection);
        let task = driver.abort_handle();
        let client = ClientWrapper::new(client, driver);
        // One round trip: the client sends all without waiting.
        let prepared = future::try_join_all(self.statements.iter().map(|sql| client.prepare_cached(sql)));
        let made =
            async { future::try_join(set_up(&client, &self.session), prepared).await.map_err(Into::into) };
        let made = future::try_join(made, server_state(&client));
        let ((knows_timeline, _), state) = time::timeout(CONNECT_TIMEOUT, made).await??;
        if !knows_timeline {
            self.timeline_warning.call_once(|| {
                tracing::warn!(
                    "the server does not tell its timeline: resume tokens are valid until it is restarted"
                );
            });
        }
        Ok((client, Driver { task, server: state.identity, opened }))
    }

    fn drivers(&self) -> MutexGuard<'_, Vec<Driver>> {
        self.drivers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Db {
    /// A pool without connections. Every new connection prepares `statements`.
    pub fn new(
        config: &Config,
        postgres: tokio_postgres::Config,
        statements: Vec<&'static str>,
    ) -> anyhow::Result<(Self, DetachedStatements)> {
        let manager = Manager {
            postgres,
            session: session_settings(config.request_timeout_ms, config.lock_timeout_ms),
            statements,
            generation: watch::Sender::new(()),
            drivers: Mutex::default(),
            timeline_warning: Once::new(),
        };
        let pool = Pool::builder(manager)
            .max_size(config.pool_size)
            // The connection that was used last has warm caches.
            .queue_mode(QueueMode::Lifo)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(Duration::from_millis(config.pool_acquire_timeout_ms)))
            .build()
            .context("cannot build the connection pool")?;
        let (detached, receiver) = mpsc::unbounded_channel();
        let committed = Arc::new(Notify::new());
        let statements = DetachedStatements {
            receiver,
            limit: (config.pool_size / 2).max(1),
            committed: Arc::clone(&committed),
        };
        let db = Self {
            pool,
            max_waiting: config.max_queued_requests,
            openers: Arc::new(Semaphore::new(config.pool_size)),
            detached,
            is_migrated: AtomicBool::new(false),
            username_hold_days: i32::try_from(config.username_hold_days).unwrap_or(i32::MAX),
            committed,
            suspected: Notify::new(),
            write_refused: AtomicBool::new(false),
        };
        Ok((db, statements))
    }

    /// Runs a statement. What it writes is committed when this returns `Ok`.
    pub async fn run(
        &self,
        access: Access,
        sql: &'static str,
        params: Params<'_>,
    ) -> Result<Vec<Row>, Error> {
        self.run_if(access, sql, params, None).await
    }

    /// Runs a statement. What it writes is committed when this returns `Ok` with rows that
    /// `is_accepted`, if that is given; otherwise it is rolled back.
    pub(crate) async fn run_if(
        &self,
        access: Access,
        sql: &'static str,
        params: Params<'_>,
        is_accepted: Option<IsAccepted>,
    ) -> Result<Vec<Row>, Error> {
        let started = Instant::now();
        let mut connection = self.connection().await?;
        let wait = started.elapsed();
        let mut result = connection.query(access, sql, params, is_accepted).await;
        if result.as_ref().is_err_and(is_stale_statement) {
            // The schema changed under the prepared statement, which has done nothing.
            let _ = connection.release(access, result);
            connection = self.connection().await?;
            result = connection.query(access, sql, params, is_accepted).await;
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

    /// Fails until the schema is current.
    pub fn ensure_migrated(&self) -> Result<(), Error> {
        let is_migrated = self.is_migrated.load(Ordering::Acquire);
        is_migrated.then_some(()).ok_or(Error::DatabaseUnavailable)
    }

    /// A pooled connection for several statements.
    pub(crate) async fn connection(&self) -> Result<Connection<'_>, Error> {
        self.ensure_migrated()?;
        let status = self.pool.status();
        if status.waiting >= self.max_waiting {
            return Err(Error::Overloaded);
        }
        let may_open = status.available == 0 && status.size < status.max_size;
        let opener = may_open.then(|| Arc::clone(&self.openers).try_acquire_owned().ok()).flatten();
        let got = match opener {
            // A request that runs out of time must not close the connection that it has begun to
            // open: under steady load of such requests, none would ever be opened.
            Some(opener) => {
                let pool = self.pool.clone();
                #[expect(clippy::disallowed_methods, reason = "it may end with the runtime")]
                let opened = tokio::spawn(async move { (pool.get().await, opener).0 });
                opened.await.unwrap_or(Err(PoolError::Closed))
            }
            None => self.pool.get().await,
        };
        match got {
            Ok(object) => Ok(Connection { object: Some(object), running: None, db: self }),
            Err(PoolError::Timeout(TimeoutType::Wait)) => Err(Error::Overloaded),
            Err(error) => {
                // The health check logs the loss of the database, once.
                tracing::debug!(error = describe(cause(error).as_ref()), "no connection");
                Err(Error::DatabaseUnavailable)
            }
        }
    }

    /// Closes idle connections if the error says that prepared statements are stale: the other
    /// connections are as old as this one.
    pub(crate) fn invalidate_statements(&self, error: &tokio_postgres::Error) -> bool {
        let is_stale = is_stale_statement(error);
        if is_stale {
            tracing::warn!(error = describe(error), "statements are stale");
            self.pool.retain(|_, _| false);
        }
        is_stale
    }

    /// A connection that is taken out of the pool, with everything prepared.
    pub(crate) async fn own_connection(&self) -> anyhow::Result<ClientWrapper> {
        Ok(Object::take(self.pool.get().await.map_err(cause)?))
    }

    /// Opens a connection, which verifies that all statements fit the schema, and accepts requests
    /// from then on.
    pub async fn verify_schema(&self) -> anyhow::Result<()> {
        drop(self.pool.get().await.map_err(cause)?);
        self.is_migrated.store(true, Ordering::Release);
        Ok(())
    }

    /// Opens all connections, so that no request has to.
    pub async fn prewarm(&self) {
        let opened = future::join_all((0..self.pool.status().max_size).map(|_| self.pool.get())).await;
        tracing::debug!(connections = opened.iter().flatten().count(), "pool ready");
    }

    /// Closes idle connections that are too old; never returns.
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

    /// Closes connections, in the pool or not, that lead to a server that does not answer any more
    /// or is not the primary any more, and gives up opening others. The next requests open new ones.
    pub async fn close_connections(&self, kept: Option<Kept<'_>>) {
        let manager = self.pool.manager();
        let is_kept = |driver: &mut Driver| {
            kept.as_ref().is_some_and(|kept| {
                driver.server == kept.server && kept.since.is_none_or(|since| driver.opened > since)
            })
        };
        let closed: Vec<Driver> = {
            let mut drivers = manager.drivers();
            manager.generation.send_replace(());
            drivers.extract_if(.., |driver| !is_kept(driver)).collect()
        };
        for driver in &closed {
            driver.task.abort();
        }
        // A closed connection is known as such when its task has ended.
        while closed.iter().any(|driver| !driver.task.is_finished()) {
            task::yield_now().await;
        }
        self.pool.retain(|client, _| !client.is_closed());
    }

    /// Whether the server has rejected a write as read-only since the last call.
    pub fn take_write_refused(&self) -> bool {
        self.write_refused.swap(false, Ordering::Relaxed)
    }

    /// The same, for the next call to see.
    pub fn has_write_refused(&self) -> bool {
        self.write_refused.load(Ordering::Relaxed)
    }

    /// Closes the pool: idle connections now, others when they are released.
    pub fn close(&self) {
        self.pool.close();
    }
}

/// A pooled connection. If its future is dropped while a statement runs, the statement is
/// detached: it may finish within [`DETACHED_MAX`].
pub(crate) struct Connection<'a> {
    /// Taken when the connection is discarded.
    object: Option<Object>,
    /// What the statement that runs does with the data.
    running: Option<Access>,
    db: &'a Db,
}

impl Connection<'_> {
    /// Runs a statement; the connection is busy until [`Connection::release`].
    async fn query(
        &mut self,
        access: Access,
        sql: &str,
        params: Params<'_>,
        is_accepted: Option<IsAccepted>,
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        self.running = Some(access);
        let Some(client) = self.object.as_deref_mut() else { return Ok(Vec::new()) };
        let never: IsAccepted = |_| false;
        let is_accepted = if access == Access::DryRun { Some(never) } else { is_accepted };
        if let Some(is_accepted) = is_accepted {
            let transaction = client.transaction().await?;
            let statement = transaction.prepare_cached(sql).await?;
            let result = transaction.query(&statement, params).await;
            match result.as_deref().is_ok_and(is_accepted) {
                true => transaction.commit().await?,
                false => transaction.rollback().await?,
            }
            return result;
        }
        let statement = client.prepare_cached(sql).await?;
        client.query(&statement, params).await
    }

    /// The connection, for several statements; it is busy until [`Connection::release`].
    pub(crate) fn client_mut(&mut self, access: Access) -> Option<&mut ClientWrapper> {
        self.running = Some(access);
        self.object.as_deref_mut()
    }

    /// Returns the connection to the pool, or closes it if it is not usable any more.
    pub(crate) fn release<T>(
        mut self,
        access: Access,
        result: Result<T, tokio_postgres::Error>,
    ) -> Result<T, Error> {
        self.running = None;
        let error = match result {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        if !is_reusable(&error) {
            self.discard();
            self.db.suspected.notify_one();
        } else if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) {
            // The connection stays: if the server is not writable, a new one would not be either.
            self.db.write_refused.store(true, Ordering::Relaxed);
            self.db.suspected.notify_one();
        }
        if self.db.invalidate_statements(&error) {
            return Err(Error::DatabaseUnavailable);
        }
        let meaning = Error::from_postgres(&error, access);
        if meaning == Error::Internal {
            tracing::error!(error = describe(&error), "a statement failed");
        } else {
            tracing::debug!(error = describe(&error), "a statement was rejected");
        }
        Err(meaning)
    }

    /// Closes the connection.
    fn discard(&mut self) {
        self.running = None;
        self.object.take().map(Object::take);
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        if let Some(access) = self.running
            && let Some(object) = self.object.take()
        {
            // Without a receiver the service is stopping, and dropping the object closes the
            // connection.
            let _ = self.db.detached.send(DetachedStatement { object, access });
        }
    }
}

/// A statement whose caller has left, on its connection. What its caller would have sent next
/// is not sent; an open transaction is rolled back.
struct DetachedStatement {
    object: Object,
    access: Access,
}

/// What [`finish_detached`] works on.
pub struct DetachedStatements {
    receiver: mpsc::UnboundedReceiver<DetachedStatement>,
    /// How many may run at the same time.
    limit: usize,
    committed: Arc<Notify>,
}

/// Lets detached statements finish, which most do in a moment, and returns their connections to
/// the pool. A cancelled request costs no connection that way. At most half of the pool is used
/// for it: one more ends the wait for the oldest. Returns when the database is dropped and
/// every statement has ended.
pub async fn finish_detached(statements: DetachedStatements) {
    let DetachedStatements { receiver, limit, committed } = statements;
    let mut running = VecDeque::<oneshot::Sender<Infallible>>::new();
    stream::unfold(receiver, async |mut receiver| receiver.recv().await.map(|next| (next, receiver)))
        .map(|statement| {
            running.retain(|earlier| !earlier.is_closed());
            if running.len() >= limit {
                running.pop_front();
            }
            let (this, overtaken) = oneshot::channel();
            running.push_back(this);
            statement.finish(overtaken, &committed)
        })
        .for_each_concurrent(None, |finished| finished)
        .await;
}

impl DetachedStatement {
    /// Waits until the statement has ended, and cancels it if it takes too long. Its connection
    /// is closed then, because a late cancellation must not hit the next statement. It counts for
    /// the size of the pool until the end.
    async fn finish(self, overtaken: oneshot::Receiver<Infallible>, committed: &Notify) {
        let Self { object, access } = self;
        let is_open = tokio::select! {
            // PostgreSQL answers it when it has done everything that was sent before.
            answer = object.check_connection() => Some(answer.is_ok()),
            () = time::sleep(DETACHED_MAX) => None,
            _ = overtaken => None,
        };
        match is_open {
            Some(is_open) => {
                tracing::debug!(is_open, "detached statement finished");
                if access == Access::Write {
                    committed.notify_one();
                }
            }
            None => {
                let cancelled =
                    time::timeout(CANCEL_TIMEOUT, object.cancel_token().cancel_query(NoTls)).await;
                tracing::debug!(cancelled = matches!(cancelled, Ok(Ok(()))), "detached statement cancelled");
                drop(Object::take(object));
            }
        }
    }
}

/// "cached plan must not change result type", or a prepared statement that the
/// server does not know.
fn is_stale_statement(error: &tokio_postgres::Error) -> bool {
    matches!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED | &SqlState::INVALID_SQL_STATEMENT_NAME))
}

/// Whether the connection can run the next statement after this error.
fn is_reusable(error: &tokio_postgres::Error) -> bool {
    !is_stale_statement(error) && error.code().is_some_and(|state| !is_connection_lost(state))
}

/// Why the pool has no connection.
fn cause(error: PoolError<anyhow::Error>) -> anyhow::Error {
    match error {
        PoolError::Backend(error) => error,
        other => anyhow!("{other}"),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

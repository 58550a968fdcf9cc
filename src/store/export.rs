//! Exports: all users, or the users of a filter, from one snapshot, as a stream of parts.
//!
//! An export goes at its client's pace, so it has a connection outside the pool. A stream is not
//! polled while its client does not read. So another task drives the connection, and closes it
//! when the export exceeds its time or its client has left. PostgreSQL then ends the query and
//! releases its snapshot.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt, StreamExt, TryStreamExt,
    future::BoxFuture,
    stream::{self, BoxStream, TryChunksError},
};
use tokio::{sync::mpsc, time};
use tokio_postgres::{Client, RowStream, types::ToSql};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::config::Config;
use crate::error::{Access, Error};
use crate::limits::StreamLimiter;
use crate::model::position::LogPosition;
use crate::model::stream::Export;
use crate::pb;
use crate::store::change_log::{CURRENT_POSITION, position_from_rows};
use crate::store::connect::{connect, session_settings, set_up};
use crate::store::list;
use crate::store::pool::Db;
use crate::store::token_keys::TokenKeyring;
use crate::store::user_row::{user_columns, user_from_row};
use crate::telemetry::describe;

/// The largest number of users in a part. A user has at most 1.1 KiB, so a part has less than
/// 1 MiB.
const PART_SIZE: usize = 500;

/// The exports from a database.
pub struct Exports {
    db: Arc<Db>,
    token_keys: Arc<TokenKeyring>,
    postgres: tokio_postgres::Config,
    limiter: StreamLimiter,
    timeout: Duration,
    connections: mpsc::UnboundedSender<BoxFuture<'static, ()>>,
}

/// The connections that [`drive`] polls.
pub type Connections = mpsc::UnboundedReceiver<BoxFuture<'static, ()>>;

impl Exports {
    /// No exports yet.
    pub fn new(
        db: Arc<Db>,
        token_keys: Arc<TokenKeyring>,
        postgres: tokio_postgres::Config,
        config: &Config,
    ) -> (Self, Connections) {
        let (connections, receiver) = mpsc::unbounded_channel();
        let limiter = StreamLimiter::new("exports", config.max_exports);
        let timeout = Duration::from_millis(config.export_timeout_ms);
        (Self { db, token_keys, postgres, limiter, timeout, connections }, receiver)
    }

    /// Exports users: the watch token first, then the users.
    pub async fn run(
        &self,
        export: &Export,
    ) -> Result<BoxStream<'static, Result<pb::ExportUsersResponse, Error>>, Error> {
        let session = self.open().await?;
        let (position, rows) = session.begin(export).await?;
        let keys = self.token_keys.keys()?;
        let watch_token = position.map(|position| position.to_token(keys.as_ref())).unwrap_or_default();
        let users = rows.map(move |row| user_from_row(&row.map_err(|error| session.failure(&error))?));
        let parts = users.try_chunks(PART_SIZE).map(|part| match part {
            Ok(users) => Ok(pb::ExportUsersResponse { users, ..Default::default() }),
            Err(TryChunksError(_, error)) => Err(error),
        });
        let first = pb::ExportUsersResponse { watch_token, ..Default::default() };
        Ok(stream::iter([Ok(first)]).chain(parts).boxed())
    }

    async fn open(&self) -> Result<Session, Error> {
        self.db.ensure_migrated()?;
        let permit = self.limiter.acquire()?;
        let started = Instant::now();
        let (client, connection) = connect(&self.postgres).await.map_err(|error| {
            tracing::debug!(error = describe(error.as_ref()), "no connection");
            Error::DatabaseUnavailable
        })?;
        let (timeout, is_over) = (self.timeout, CancellationToken::new());
        let close = is_over.clone().drop_guard();
        let driven = async move {
            let _ = time::timeout(timeout, is_over.run_until_cancelled(connection)).await;
            drop(permit);
        };
        // Without its driver, the service is at its end.
        self.connections.send(driven.boxed()).map_err(|_| Error::ShuttingDown)?;
        Ok(Session { client, started, timeout, _close: close })
    }
}

/// Drives the connections of exports, for ever.
pub async fn drive(connections: Connections) {
    stream::unfold(connections, async |mut receiver| receiver.recv().await.map(|driven| (driven, receiver)))
        .for_each_concurrent(None, |driven| driven)
        .await;
}

/// The connection of an export; it is closed when this is dropped.
struct Session {
    client: Client,
    started: Instant,
    timeout: Duration,
    _close: DropGuard,
}

const ALL: &str = concat!("select ", user_columns!(), " from users");

const ALL_LIVE: &str = concat!("select ", user_columns!(), " from users where delete_time is null");

impl Session {
    /// Takes the snapshot; returns its position, if the server tells it, and the users that it has.
    async fn begin(&self, export: &Export) -> Result<(Option<LogPosition>, RowStream), Error> {
        let timeout_ms = u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX);
        let refused = |error| self.failure(&error);
        set_up(&self.client, &session_settings(timeout_ms, timeout_ms)).await.map_err(refused)?;
        // The whole table is read twice as fast without an index.
        let (scan, sql, params) = match export {
            Export::All { include_deleted: true } => ("on", ALL, Vec::new()),
            Export::All { include_deleted: false } => ("on", ALL_LIVE, Vec::new()),
            Export::Filtered(list) => ("off", list::statement(list), list::params(list, &None)),
        };
        let begin = format!(
            "set enable_seqscan = {scan}; begin isolation level repeatable read read only; savepoint snapshot;"
        );
        self.client.batch_execute(&begin).await.map_err(refused)?;
        let position = match self.client.query(CURRENT_POSITION, &[]).await.map_err(refused) {
            // A standby has no position, and a watch could not continue without one.
            Ok(rows) => Some(position_from_rows(&rows)?),
            // A server that does not tell the position still has the users.
            Err(Error::Internal) => None,
            Err(error) => return Err(error),
        };
        // Releases the locks on the change log, but not the snapshot: the purge waits for the locks.
        self.client.batch_execute("rollback to snapshot").await.map_err(refused)?;
        let statement = self.client.prepare(sql).await.map_err(refused)?;
        let params = params.into_iter().map(|param| param as &dyn ToSql);
        let rows = self.client.query_raw(&statement, params).await.map_err(refused)?;
        Ok((position, rows))
    }

    fn failure(&self, error: &tokio_postgres::Error) -> Error {
        if self.started.elapsed() >= self.timeout {
            return Error::DeadlineExceeded;
        }
        tracing::warn!(error = describe(error), "an export broke off");
        Error::from_postgres(error, Access::Read)
    }
}

//! The reader of the change feed. One reader per process publishes new changes to all
//! watchers; a watcher that lags behind reads the same changes from the change log.
//!
//! Both ways make batches, each of which leads from one position to another.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, broadcast},
    time,
};
use tokio_postgres::Row;

use crate::config::Config;
use crate::error::{Access, Error};
use crate::feed::messages::{ChangeBatch, WatchMessage};
use crate::limits::StreamLimiter;
use crate::model::page::Page;
use crate::model::position::{LogPosition, TransactionStamp};
use crate::store::change_log::{self, CURRENT_POSITION, ChangesSince, position_from_rows};
use crate::store::list;
use crate::store::pool::Db;
use crate::store::token_keys::TokenKeyring;
use crate::telemetry::describe;

/// Changes in a batch. The changes of a transaction are read together, so a batch can have
/// more.
const BATCH_SIZE: usize = 500;
/// The same for a catch-up with a permit, since a read costs the same whatever its size. Such
/// a batch takes 1 MiB, or 5 MiB if users are as large as possible.
const LARGE_BATCH_SIZE: usize = 4000;
/// Published batches that are kept for slow watchers.
const BATCHES_KEPT: usize = 64;
/// Limits concurrent catch-up reads so that they cannot exhaust the pool.
const MAX_CATCH_UP_READS: usize = 2;
/// Limits the memory of large batches: a slow client keeps one, and its permit.
const MAX_CATCH_UP_PERMITS: usize = 8;
/// The pause after a published batch, at least, and what each watcher adds to it, since each
/// delivery has a fixed cost.
const BATCH_DELAY: Duration = Duration::from_millis(5);
const BATCH_DELAY_PER_WATCHER: Duration = Duration::from_micros(100);
/// Limits what is sent to all watchers together, so that many changes reach many watchers
/// later instead of slowing the writers down. [`BOOKMARK_INTERVAL`] limits the delay.
const BYTES_PER_SECOND: f64 = 64e6;
/// How often the reader looks for changes of other replicas. The interval doubles while there
/// are none.
const POLL_MIN: Duration = Duration::from_millis(10);
const POLL_MAX: Duration = Duration::from_millis(100);
/// How often watchers get a bookmark while nothing changes.
pub const BOOKMARK_INTERVAL: Duration = Duration::from_secs(5);
/// How long PostgreSQL may take to answer the reader.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the reader waits before it connects again.
const RECONNECT_DELAY: Duration = Duration::from_millis(500);

/// The change feed of a process.
pub struct Feed {
    db: Arc<Db>,
    /// The keys of tokens, those of lists included.
    pub token_keys: Arc<TokenKeyring>,
    batches: broadcast::Sender<Arc<ChangeBatch>>,
    /// Notified when a watch starts.
    watch_started: Notify,
    /// Limits the number of watches.
    pub limiter: StreamLimiter,
    catch_up_reads: Semaphore,
    catch_up_permits: Arc<Semaphore>,
}

impl Feed {
    /// A feed without watchers.
    pub fn new(db: Arc<Db>, token_keys: Arc<TokenKeyring>, config: &Config) -> Self {
        Self {
            db,
            token_keys,
            batches: broadcast::Sender::new(BATCHES_KEPT),
            watch_started: Notify::new(),
            limiter: StreamLimiter::new("watches", config.max_watchers),
            catch_up_reads: Semaphore::new(MAX_CATCH_UP_READS),
            catch_up_permits: Arc::new(Semaphore::new(MAX_CATCH_UP_PERMITS)),
        }
    }

    /// Subscribes to the batches published from now on. Each begins where the one before ends.
    pub fn batches(&self) -> broadcast::Receiver<Arc<ChangeBatch>> {
        let batches = self.batches.subscribe();
        self.watch_started.notify_one();
        batches
    }

    /// The position that includes every committed change.
    pub async fn current_position(&self) -> Result<LogPosition, Error> {
        position_from_rows(&self.db.run(Access::Read, CURRENT_POSITION, &[]).await?)
    }

    /// Checks that the log has every change after a position.
    pub async fn check(&self, position: &LogPosition) -> Result<(), Error> {
        change_log::check(&self.db, position).await
    }

    /// Reads a page of an initial state, and whether it is the last one.
    pub async fn page(&self, page: &Page) -> Result<(Vec<Row>, bool), Error> {
        let _permit = self.catch_up_reads.acquire().await;
        list::walk(&self.db, page).await
    }

    /// A permit to catch up with large batches and to prefetch them, if one is free.
    pub fn try_catch_up_permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.catch_up_permits).try_acquire_owned().ok()
    }

    /// Reads the changes after a position, for a watcher that lags behind.
    pub async fn read(&self, from: LogPosition, has_permit: bool) -> Result<ChangesSince, Error> {
        let _permit = self.catch_up_reads.acquire().await;
        let mut connection = self.db.connection().await?;
        let size = if has_permit { LARGE_BATCH_SIZE } else { BATCH_SIZE };
        let changes =
            change_log::read(connection.client_mut(Access::Read).ok_or(Error::Internal)?, from, size).await;
        connection.release(Access::Read, changes)?
    }

    /// Publishes batches while there are watchers; never returns. When the connection breaks,
    /// watches stay open, and the next connection continues from the last published position.
    pub async fn publish(&self) {
        let mut published = None;
        loop {
            self.wait_for_watcher(&mut published).await;
            let started = Instant::now();
            let Err(error) = self.publish_from(&mut published).await;
            if let Some(error) = error.downcast_ref() {
                self.db.invalidate_statements(error);
            }
            self.db.suspected.notify_one();
            // While PostgreSQL is down, attempts fail at once and are not worth a warning each.
            if started.elapsed() > RECONNECT_DELAY {
                tracing::warn!(error = describe(error.as_ref()), "feed interrupted");
            } else {
                tracing::debug!(error = describe(error.as_ref()), "feed unavailable");
                time::sleep(RECONNECT_DELAY).await;
            }
        }
    }

    /// Publishes the changes after the last published position on one connection.
    async fn publish_from(&self, published: &mut Option<LogPosition>) -> anyhow::Result<Infallible> {
        let failed = |error: Error| anyhow::anyhow!("{error:?}");
        let mut client = self.db.own_connection().await?;
        tracing::debug!("feed connected");
        let (mut last_batch, mut poll) = (None::<Instant>, POLL_MIN);
        loop {
            self.wait_for_watcher(published).await;
            let from = match published.take() {
                Some(position) => position,
                None => {
                    // A watch that started before this position has to learn of it at once.
                    last_batch = None;
                    let current = client.prepare_cached(CURRENT_POSITION).await?;
                    let rows = time::timeout(READ_TIMEOUT, client.query(&current, &[])).await??;
                    position_from_rows(&rows).map_err(failed)?
                }
            };
            let from = published.insert(from);
            let read = change_log::read(&mut client, from.clone(), BATCH_SIZE);
            let batch = match time::timeout(READ_TIMEOUT, read).await?? {
                Ok(changes) => ChangeBatch::new(&self.token_keys, changes).await,
                Err(error) => Err(error),
            };
            let batch = match batch {
                Ok(batch) => batch,
                Err(error) => {
                    *published = None;
                    let _ = self.batches.send(Arc::new(invalidation()));
                    return Err(failed(error).context("the change log does not continue"));
                }
            };
            if !batch.messages.is_empty() {
                poll = POLL_MIN;
            } else if last_batch.is_some_and(|sent| sent.elapsed() < BOOKMARK_INTERVAL) {
                time::sleep(BATCH_DELAY).await;
                self.wait_for_commit(poll).await;
                poll = (poll * 2).min(POLL_MAX);
                continue;
            }
            from.clone_from(&batch.end);
            let bytes = batch.messages.iter().map(WatchMessage::encoded_len).sum();
            let delay = batch_delay(self.batches.receiver_count(), bytes);
            // Fails if the last watcher has just ended.
            let _ = self.batches.send(Arc::new(batch));
            last_batch = Some(Instant::now());
            tokio::select! {
                () = time::sleep(delay) => {}
                // No watcher is left: a new one must not wait for the delivery of this batch.
                () = self.batches.closed() => *published = None,
            }
        }
    }

    /// Waits until there is a watcher. Changes made while there is none are not published.
    async fn wait_for_watcher(&self, published: &mut Option<LogPosition>) {
        while self.batches.receiver_count() == 0 {
            *published = None;
            self.watch_started.notified().await;
        }
    }

    /// Waits until this process commits a write, at most for `timeout`.
    async fn wait_for_commit(&self, timeout: Duration) {
        let _ = time::timeout(timeout, self.db.committed.notified()).await;
    }
}

/// A batch that continues no position: each watcher reads the log, and fails if the log does
/// not continue its own position either.
fn invalidation() -> ChangeBatch {
    let nowhere = LogPosition::current(String::new(), &[], TransactionStamp { xid: 0, time_us: 0 });
    ChangeBatch { from: nowhere.clone(), end: nowhere, messages: Vec::new() }
}

/// The pause after a batch of this size was sent to all watchers. A longer one than
/// [`BOOKMARK_INTERVAL`] would look like a dead feed.
fn batch_delay(watchers: usize, bytes: usize) -> Duration {
    let count = u32::try_from(watchers).unwrap_or(u32::MAX);
    let sending = Duration::from_secs_f64(watchers as f64 * bytes as f64 / BYTES_PER_SECOND);
    (BATCH_DELAY + BATCH_DELAY_PER_WATCHER * count + sending).min(BOOKMARK_INTERVAL)
}

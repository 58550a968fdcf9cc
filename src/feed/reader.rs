//! The change log as a feed: one reader a process publishes what became visible, and
//! whoever is behind reads the same from the log.
//!
//! Both make batches of it, which begin at a point and say at which point they end.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, broadcast},
    time,
};
use tokio_postgres::Row;

use crate::config::Config;
use crate::error::{Access, Error};
use crate::limits::StreamLimiter;
use crate::model::page::Page;
use crate::model::position::{LogPosition, TransactionStamp};
use crate::store::change_log::{self, ChangeBatch, ChangesSince, NOW, position_from_rows};
use crate::store::list;
use crate::store::pool::Db;
use crate::telemetry::describe;

/// Changes in a round, and those that somebody who is behind is given at a time. Those of a
/// transaction are read together, so there can be more.
const ROUND_SIZE: usize = 500;
/// Some of those who are behind are given more, since to ask for them costs the same however
/// many they are. They take a MiB, or five if users are as large as they can be.
const FAST_SIZE: usize = 4000;
/// Rounds that are kept for watchers that are not as fast as others.
const ROUNDS_KEPT: usize = 64;
/// Those who are behind take turns in reading, so that calls find connections.
const READING_AT_ONCE: usize = 2;
/// So few are fast, because a client may take its time, and keeps that memory meanwhile, and
/// its permit: then others are not fast.
const FAST_AT_ONCE: usize = 8;
/// After a batch was published: how long the next one gathers, at least, and what each
/// watcher adds, since each delivery costs something however small it is.
const GATHER_TIME: Duration = Duration::from_millis(5);
const GATHER_TIME_PER_WATCHER: Duration = Duration::from_micros(100);
/// What all watchers are sent together, unless a round takes longer than watchers wait for
/// bookmarks. A flood of changes reaches many of them later, rather than taking from the
/// writers what they need.
const OCTETS_PER_SECOND: f64 = 64e6;
/// How often to look for changes that other replicas made; less and less often when
/// there are none.
const POLL_MIN: Duration = Duration::from_millis(10);
const POLL_MAX: Duration = Duration::from_millis(100);
/// Without changes, watchers hear this often that there were none.
pub const BOOKMARK_INTERVAL: Duration = Duration::from_secs(5);
/// How long PostgreSQL may take to answer the reader.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the reader waits before it connects again.
const RECONNECT_DELAY: Duration = Duration::from_millis(500);

/// The feed of a process.
pub struct Feed {
    db: Arc<Db>,
    rounds: broadcast::Sender<Arc<ChangeBatch>>,
    /// Told when somebody begins to watch.
    arrivals: Notify,
    /// For those who watch.
    pub limiter: StreamLimiter,
    reading: Semaphore,
    fast: Arc<Semaphore>,
}

impl Feed {
    /// A feed that nobody watches yet.
    pub fn new(db: Arc<Db>, config: &Config) -> Self {
        Self {
            db,
            rounds: broadcast::Sender::new(ROUNDS_KEPT),
            arrivals: Notify::new(),
            limiter: StreamLimiter::new("watches", config.max_watchers),
            reading: Semaphore::new(READING_AT_ONCE),
            fast: Arc::new(Semaphore::new(FAST_AT_ONCE)),
        }
    }

    /// What is published from now on: rounds, each of which begins where the one before ends.
    pub fn rounds(&self) -> broadcast::Receiver<Arc<ChangeBatch>> {
        let rounds = self.rounds.subscribe();
        self.arrivals.notify_one();
        rounds
    }

    /// The point that has all that is committed.
    pub async fn now(&self) -> Result<LogPosition, Error> {
        position_from_rows(&self.db.run(Access::Read, NOW, &[]).await?)
    }

    /// Refuses a point from which the log does not lead on.
    pub async fn check(&self, point: &LogPosition) -> Result<(), Error> {
        change_log::check(&self.db, point).await
    }

    /// The users of a page of an initial state, and whether it is the last one.
    pub async fn page(&self, page: &Page) -> Result<(Vec<Row>, bool), Error> {
        let _turn = self.reading.acquire().await;
        list::walk(&self.db, page).await
    }

    /// A permit to be fast while behind, if there is one.
    pub fn be_fast(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.fast).try_acquire_owned().ok()
    }

    /// The changes behind a point, for somebody who is behind the rounds.
    pub async fn read(&self, from: LogPosition, is_fast: bool) -> Result<ChangesSince, Error> {
        let _turn = self.reading.acquire().await;
        let mut connection = self.db.connection().await?;
        let size = if is_fast { FAST_SIZE } else { ROUND_SIZE };
        let behind = change_log::read(connection.client_mut().ok_or(Error::Internal)?, from, size).await;
        connection.release(Access::Read, behind)?
    }

    /// Publishes rounds while somebody watches, for ever. Those who watch stay when the
    /// connection breaks: the next one goes on where the last one ended.
    pub async fn publish(&self) {
        let mut published = None;
        loop {
            self.somebody_watches(&mut published).await;
            let begun = Instant::now();
            let Err(error) = self.publish_from(&mut published).await;
            if let Some(error) = error.downcast_ref() {
                self.db.invalidate_statements(error);
            }
            // An attempt that fails at once, while PostgreSQL is away, is no news.
            if begun.elapsed() > RECONNECT_DELAY {
                tracing::warn!(error = describe(error.as_ref()), "the change feed is interrupted");
            } else {
                tracing::debug!(error = describe(error.as_ref()), "the change feed cannot be read");
                time::sleep(RECONNECT_DELAY).await;
            }
        }
    }

    /// Publishes what follows the point that was published last.
    async fn publish_from(&self, published: &mut Option<LogPosition>) -> anyhow::Result<Infallible> {
        let failed = |error: Error| anyhow::anyhow!("{error:?}");
        let mut client = self.db.own_connection().await?;
        tracing::debug!("the change feed is read");
        let (mut last_round, mut poll) = (None::<Instant>, POLL_MIN);
        loop {
            self.somebody_watches(published).await;
            let from = match published.take() {
                Some(point) => point,
                None => {
                    // The first round comes at once: whoever began before this point has to
                    // learn of it.
                    last_round = None;
                    let now = client.prepare_cached(NOW).await?;
                    let rows = time::timeout(READ_TIMEOUT, client.query(&now, &[])).await??;
                    position_from_rows(&rows).map_err(failed)?
                }
            };
            let from = published.insert(from);
            let read = change_log::read(&mut client, from.clone(), ROUND_SIZE);
            let batch = match time::timeout(READ_TIMEOUT, read).await?? {
                Ok(behind) => behind.into_batch().await,
                Err(error) => Err(error),
            };
            let batch = match batch {
                Ok(batch) => batch,
                Err(error) => {
                    *published = None;
                    let _ = self.rounds.send(Arc::new(of_no_history()));
                    return Err(failed(error).context("the change log does not go on"));
                }
            };
            if !batch.messages.is_empty() {
                poll = POLL_MIN;
            } else if last_round.is_some_and(|round| round.elapsed() < BOOKMARK_INTERVAL) {
                time::sleep(GATHER_TIME).await;
                self.committed_within(poll).await;
                poll = (poll * 2).min(POLL_MAX);
                continue;
            }
            from.clone_from(&batch.end);
            let octets = batch.messages.iter().map(Message::encoded_len).sum();
            let pause = gather_time(self.rounds.receiver_count(), octets);
            // It fails if the last watcher has just gone.
            let _ = self.rounds.send(Arc::new(batch));
            last_round = Some(Instant::now());
            tokio::select! {
                () = time::sleep(pause) => {}
                // Whoever comes then need not wait for what these were to get yet.
                () = self.rounds.closed() => *published = None,
            }
        }
    }

    /// Waits for a watcher, if there is none. What happens meanwhile is not published.
    async fn somebody_watches(&self, published: &mut Option<LogPosition>) {
        while self.rounds.receiver_count() == 0 {
            *published = None;
            self.arrivals.notified().await;
        }
    }

    /// Waits until this process has committed something.
    async fn committed_within(&self, duration: Duration) {
        let _ = time::timeout(duration, self.db.committed.notified()).await;
    }
}

/// A round that goes on from nobody's point: who gets it looks into the log, and finds out
/// whether that goes on.
fn of_no_history() -> ChangeBatch {
    let nowhere = LogPosition::now(String::new(), &[], TransactionStamp { xid: 0, time_us: 0 });
    ChangeBatch { from: nowhere.clone(), end: nowhere, messages: Vec::new() }
}

/// How long a round gathers, when as much as the last one goes to so many.
fn gather_time(watchers: usize, octets: usize) -> Duration {
    let count = u32::try_from(watchers).unwrap_or(u32::MAX);
    let sending = Duration::from_secs_f64(watchers as f64 * octets as f64 / OCTETS_PER_SECOND);
    // Later than that, and the watchers would take the feed for dead.
    (GATHER_TIME + GATHER_TIME_PER_WATCHER * count + sending).min(BOOKMARK_INTERVAL)
}

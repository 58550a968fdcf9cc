//! The change log as a feed: one reader a process publishes what became visible, and
//! whoever is behind reads the same from the log.
//!
//! Both read batches that begin at a point and say at which point they end. A batch has
//! what the statement sees of the log and the point does not have, and with it the users
//! as that same statement sees them. So of each user, the state that is delivered later
//! is the newer one, whatever the order of the transactions was.

use std::{
    collections::HashSet,
    convert::Infallible,
    mem,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use prost::Message;
use tokio::{
    sync::{Notify, Semaphore, broadcast},
    time,
};
use tokio_postgres::{Client, Row, Statement};
use uuid::Uuid;

use crate::{
    config::Config,
    db::{self, Db},
    error::{Access, Error},
    pb,
    places::Places,
    point::{self, Change, Log, Point, Rest},
    telemetry::describe,
    users::{EXTRA, ID, column, user_columns, user_from_row},
};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[ADOPT, NOW, BEGINNING, PAGE, READ];

/// Changes in a batch for somebody who is behind, and users in one of an initial state.
/// The changes of a transaction stay together, so there can be some more.
const BATCH_SIZE: i64 = 500;
/// Changes in a batch that is published: few enough for a thousand watchers to have one
/// each in their buffers.
const ROUND_SIZE: i64 = 128;
/// Batches that are kept for watchers that are not as fast as others.
const ROUNDS_KEPT: usize = 64;
/// Those who are behind take turns in reading, so that calls find connections.
const READING_AT_ONCE: usize = 2;
/// After a batch was published: how long the next one gathers, at least, and what each
/// watcher adds, since each delivery costs something however small it is.
const GATHER_TIME: Duration = Duration::from_millis(5);
const GATHER_TIME_PER_WATCHER: Duration = Duration::from_micros(250);
/// What all watchers are sent together, at most. A flood of changes reaches many of them
/// later, rather than taking from the writers what they need.
const OCTETS_PER_SECOND: f64 = 64e6;
/// How often to look for changes that other replicas made; less and less often when
/// there are none.
const POLL_MIN: Duration = Duration::from_millis(10);
const POLL_MAX: Duration = Duration::from_millis(100);
/// Without changes, watchers hear this often that there were none.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(5);
/// How long PostgreSQL may take to answer the reader.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the reader waits before it connects again.
const RECONNECT_DELAY: Duration = Duration::from_millis(500);

/// Where a statement is in history: nothing on a standby, whose snapshots do not know of
/// all running transactions, and no row at all if the log is of another database.
macro_rules! here {
    ($more:literal) => {
        concat!(
            "(
    select
        case when not pg_is_in_recovery()
            then feed.origin || ' ' || left(pg_walfile_name(pg_current_wal_lsn()), 8)
        end as history,
        pg_current_snapshot()::text as snapshot,
        ",
            $more,
            "
    from user_feed feed, pg_control_system() cluster, pg_database database
    where database.datname = current_database()
        and feed.origin = cluster.system_identifier || ' ' || database.oid
)"
        )
    };
    () => {
        concat!(
            "(
    select history, snapshot, newest.xid::text, newest.time from ",
            here!("feed.purged_xid, feed.purged_time"),
            " as feed, lateral (
        select xid, time from (
            (select xid, time from user_changes order by xid desc, seq desc limit 1)
            union all select feed.purged_xid, feed.purged_time
        ) as known order by xid desc limit 1
    ) as newest
) as here"
        )
    };
}
pub(crate) use here;

/// Reads the point from the first columns of a row, which are those of `here!()`.
pub(crate) fn point_from_row(row: &Row) -> Result<Option<Point>, Error> {
    let (Some(history), Some(snapshot)) = (column(row, 0)?, column(row, 1)?) else { return Ok(None) };
    let last = Change::new(number(column(row, 2)?)?, column(row, 3)?);
    Ok(Some(Point::now(history, &running(snapshot)?, last)))
}

/// The first column behind them.
pub(crate) const BEHIND_POINT: usize = 4;

/// The log of a dump that was restored here has another database's transaction ids:
/// they would hide what is written from now on.
const ADOPT: &str = "
with here as (
    select cluster.system_identifier || ' ' || database.oid as origin
    from pg_control_system() cluster, pg_database database
    where database.datname = current_database()
), adopted as (
    update user_feed feed set origin = here.origin, purged_xid = '0', purged_time = 'epoch'
    from here where feed.origin <> here.origin
    returning feed.purged_xid
), gone as (
    delete from user_changes where xid >= (select purged_xid from adopted)
)
select from adopted";

/// Makes the change log this database's own, if it is of another one.
pub async fn adopt(postgres: &tokio_postgres::Config) -> anyhow::Result<()> {
    // Without the time limit of calls: the log may be large.
    let (client, connection) = db::connect(postgres).await?;
    let adopted = tokio::select! {
        adopted = client.query(ADOPT, &[]) => adopted?,
        () = connection => anyhow::bail!("the connection broke"),
    };
    if !adopted.is_empty() {
        tracing::warn!("emptied the change log, which was of another database: watches begin anew");
    }
    Ok(())
}

pub(crate) const NOW: &str = concat!("select * from ", here!());

/// The point, and the last of the users that belong to an initial state.
const BEGINNING: &str =
    concat!("select here.*, (select id from users order by id desc limit 1) from ", here!());

/// Users by id.
const PAGE: &str =
    concat!("select ", user_columns!(), " from users where id > $1 and id <= $2 order by id limit $3");

/// The changes behind a point, which has seen all transactions up to `$1` except `$2`:
/// `$3` of them, and those that share a transaction with the last one.
const READ: &str = concat!(
    "with here as materialized ",
    here!(
        "feed.purged_xid::text, feed.purged_time,
        (select time from user_changes where xid = $1::text::xid8 order by seq limit 1) as last_time"
    ),
    "
select ",
    user_columns!(),
    ", user_id, user_revision, kind, change.xid::text, change.time, here.*
from here left join (
    select xid, seq, user_id, revision as user_revision, kind, time from user_changes
    where xid = any($2::text[]::xid8[])
    union all (
        select xid, seq, user_id, revision, kind, time from user_changes
        where xid > $1::text::xid8 order by xid fetch first $3 rows with ties
    )
    order by xid fetch first $3 rows with ties
) as change on true
left join lateral (select * from users where id = user_id limit 1) as user_now on true
order by change.xid, seq"
);

/// Changes that follow a point.
#[derive(Debug)]
pub struct Batch {
    /// In the order of their transactions. A user comes with the last of its changes.
    pub changes: Vec<pb::UserChange>,
    /// The point behind them.
    pub upto: Point,
    /// Whether these are all that there are by now.
    pub is_all: bool,
}

impl Batch {
    fn from_rows(from: &Point, rows: &[Row], size: i64) -> Result<Self, Error> {
        // No row: the log is not this database's. No history: a standby.
        let Some(log) = rows.first().map(log_from_row).transpose()?.flatten() else {
            return Err(Error::DatabaseUnavailable);
        };
        from.check(&log)?;
        let last = match rows.last() {
            Some(row) => change_from_row(row)?,
            None => None,
        };
        let is_all = last.is_none() || i64::try_from(rows.len()).is_ok_and(|count| count < size);
        let mut changes = Vec::new();
        if last.is_some() {
            let mut users_told = HashSet::new();
            for row in rows.iter().rev() {
                let id: Uuid = column(row, EXTRA)?;
                let is_there = column::<Option<Uuid>>(row, ID)?.is_some();
                let is_last = users_told.insert(id);
                changes.push(pb::UserChange {
                    kind: i32::from(column::<i16>(row, EXTRA + 2)?),
                    id: id.to_string(),
                    revision: column(row, EXTRA + 1)?,
                    user: if is_last && is_there { Some(user_from_row(row)?) } else { None },
                });
            }
            changes.reverse();
        }
        Ok(Self { changes, upto: from.after(&log, last, is_all), is_all })
    }

    /// The message that delivers it: a bookmark, if nothing has changed.
    pub fn into_message(self) -> pb::WatchUsersResponse {
        pb::WatchUsersResponse {
            bookmark: self.changes.is_empty(),
            changes: self.changes,
            initial_state_end: false,
            resume_token: self.upto.to_token(),
        }
    }
}

/// The transaction of a change, unless the row has none.
fn change_from_row(row: &Row) -> Result<Option<Change>, Error> {
    let Some(xid) = column(row, EXTRA + 3)? else { return Ok(None) };
    Ok(Some(Change::new(number(xid)?, column(row, EXTRA + 4)?)))
}

fn log_from_row(row: &Row) -> Result<Option<Log>, Error> {
    let Some(history) = column(row, EXTRA + 5)? else { return Ok(None) };
    Ok(Some(Log {
        history,
        running: running(column(row, EXTRA + 6)?)?,
        purged: Change::new(number(column(row, EXTRA + 7)?)?, column(row, EXTRA + 8)?),
        last_time_us: column::<Option<SystemTime>>(row, EXTRA + 9)?.map(|time| Change::new(0, time).time_us),
    }))
}

fn running(snapshot: &str) -> Result<Vec<u64>, Error> {
    point::running(snapshot).ok_or(Error::Internal)
}

fn number(text: &str) -> Result<u64, Error> {
    text.parse().map_err(|_| Error::Internal)
}

/// A batch that was published.
#[derive(Debug)]
pub struct Round {
    /// The point before it, which is the one after the round before.
    pub from: Point,
    /// The point after it.
    pub upto: Point,
    /// What watchers get.
    pub message: pb::WatchUsersResponse,
}

/// The feed of a process.
pub struct Feed {
    db: Arc<Db>,
    session: String,
    rounds: broadcast::Sender<Arc<Round>>,
    /// Told when somebody begins to watch.
    arrivals: Notify,
    /// For those who watch.
    pub places: Places,
    reading: Semaphore,
}

impl Feed {
    /// A feed that nobody watches yet.
    pub fn new(db: Arc<Db>, config: &Config) -> Self {
        Self {
            db,
            session: db::session_settings(config.call_timeout_ms),
            rounds: broadcast::Sender::new(ROUNDS_KEPT),
            arrivals: Notify::new(),
            places: Places::new("watches", config.max_watchers),
            reading: Semaphore::new(READING_AT_ONCE),
        }
    }

    /// The rounds from now on.
    pub fn rounds(&self) -> broadcast::Receiver<Arc<Round>> {
        let rounds = self.rounds.subscribe();
        self.arrivals.notify_one();
        rounds
    }

    /// The point that has all that is committed.
    pub async fn now(&self) -> Result<Point, Error> {
        let rows = self.db.run(Access::Read, NOW, &[]).await?;
        rows.first().map(point_from_row).transpose()?.flatten().ok_or(Error::DatabaseUnavailable)
    }

    /// The point from which an initial state is the users that are in it now, if there
    /// are any, and the changes since.
    pub async fn beginning(&self) -> Result<(Point, Rest), Error> {
        let rows = self.db.run(Access::Read, BEGINNING, &[]).await?;
        let row = rows.first().ok_or(Error::DatabaseUnavailable)?;
        let point = point_from_row(row)?.ok_or(Error::DatabaseUnavailable)?;
        let until: Option<Uuid> = column(row, BEHIND_POINT)?;
        Ok((point, Rest { after: Uuid::nil(), until: until.unwrap_or_default() }))
    }

    /// The next users of an initial state, and what is left then.
    pub async fn page(&self, rest: Rest) -> Result<(Vec<pb::User>, Option<Rest>), Error> {
        let _turn = self.reading.acquire().await;
        let rows = self.db.run(Access::Read, PAGE, &[&rest.after, &rest.until, &BATCH_SIZE]).await?;
        let is_last = i64::try_from(rows.len()).is_ok_and(|count| count < BATCH_SIZE);
        let rest = match rows.last() {
            Some(row) if !is_last => Some(Rest { after: column(row, ID)?, ..rest }),
            _ => None,
        };
        Ok((rows.iter().map(user_from_row).collect::<Result<_, _>>()?, rest))
    }

    /// The changes behind a point, for somebody who is behind the rounds.
    pub async fn read(&self, from: &Point) -> Result<Batch, Error> {
        let _turn = self.reading.acquire().await;
        let (last, unseen) = parameters(from);
        let rows = self.db.run(Access::Read, READ, &[&last, &unseen, &BATCH_SIZE]).await?;
        Batch::from_rows(from, &rows, BATCH_SIZE)
    }

    /// Publishes rounds while somebody watches, for ever. Those who watch stay when the
    /// connection breaks: the next one goes on where the last one ended.
    pub async fn publish(&self, postgres: &tokio_postgres::Config) {
        let mut published = None;
        loop {
            self.somebody_watches(&mut published).await;
            let Err(error) = self.publish_from(postgres, &mut published).await;
            tracing::warn!(error = describe(error.as_ref()), "the change feed is interrupted");
            time::sleep(RECONNECT_DELAY).await;
        }
    }

    async fn publish_from(
        &self,
        postgres: &tokio_postgres::Config,
        published: &mut Option<Point>,
    ) -> anyhow::Result<Infallible> {
        let (client, connection) = db::connect(postgres).await?;
        tokio::select! {
            failed = self.publish_by(&client, published) => failed,
            () = connection => anyhow::bail!("the connection broke"),
        }
    }

    /// Publishes what follows the point that was published last.
    async fn publish_by(&self, client: &Client, published: &mut Option<Point>) -> anyhow::Result<Infallible> {
        client.batch_execute(&self.session).await?;
        let reader = Reader { client, now: client.prepare(NOW).await?, read: client.prepare(READ).await? };
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
                    reader.now().await?
                }
            };
            let from = published.insert(from);
            let batch = match reader.read(from).await? {
                Ok(batch) => batch,
                Err(error) => {
                    // Watchers will see that something is missing, and whether they can read it.
                    *published = None;
                    anyhow::bail!("the change log does not go on: {error:?}");
                }
            };
            if !batch.changes.is_empty() {
                poll = POLL_MIN;
            } else if last_round.is_some_and(|round| round.elapsed() < BOOKMARK_INTERVAL) {
                self.committed_within(poll).await;
                poll = (poll * 2).min(POLL_MAX);
                continue;
            }
            let from = mem::replace(from, batch.upto.clone());
            let round = Round { from, upto: batch.upto.clone(), message: batch.into_message() };
            let pause = gather_time(self.rounds.receiver_count(), round.message.encoded_len());
            // It fails if the last watcher has just gone.
            let _ = self.rounds.send(Arc::new(round));
            last_round = Some(Instant::now());
            time::sleep(pause).await;
        }
    }

    /// Waits for a watcher, if there is none. What happens meanwhile is not published.
    async fn somebody_watches(&self, published: &mut Option<Point>) {
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

/// How long a round gathers, when as much as the last one goes to so many.
fn gather_time(watchers: usize, octets: usize) -> Duration {
    let count = u32::try_from(watchers).unwrap_or(u32::MAX);
    let sending = Duration::from_secs_f64(watchers as f64 * octets as f64 / OCTETS_PER_SECOND);
    GATHER_TIME + GATHER_TIME_PER_WATCHER * count + sending
}

/// The parameters `$1` and `$2` of [`READ`].
fn parameters(from: &Point) -> (String, Vec<String>) {
    (from.last_xid().to_string(), from.unseen().iter().map(u64::to_string).collect())
}

/// The reader of a process, on a connection of its own.
struct Reader<'a> {
    client: &'a Client,
    now: Statement,
    read: Statement,
}

impl Reader<'_> {
    async fn now(&self) -> anyhow::Result<Point> {
        let row = time::timeout(READ_TIMEOUT, self.client.query_one(&self.now, &[])).await??;
        point_from_row(&row).ok().flatten().context("the server is a standby")
    }

    /// The next batch. The outer error is one of the connection.
    async fn read(&self, from: &Point) -> anyhow::Result<Result<Batch, Error>> {
        let (last, unseen) = parameters(from);
        let params: db::Params<'_> = &[&last, &unseen, &ROUND_SIZE];
        let rows = time::timeout(READ_TIMEOUT, self.client.query(&self.read, params)).await??;
        Ok(Batch::from_rows(from, &rows, ROUND_SIZE))
    }
}

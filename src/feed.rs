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
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use prost::{Message, bytes::BytesMut};
use tokio::{
    sync::{Notify, Semaphore, broadcast},
    time,
};
use tokio_postgres::{
    Client, Row, Statement,
    types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked},
};
use uuid::Uuid;

use crate::{
    codec::Encoded,
    config::Config,
    db::{self, Db},
    error::{Access, Error},
    list,
    page::Page,
    pb,
    places::Places,
    point::{self, Change, Log, Point, Token},
    telemetry::describe,
    users::{EXTRA, ID, column, user_columns, user_from_row},
};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[ADOPT, NOW, READ];

/// Changes that are read at a time. Those of a transaction are read together, so there
/// can be more.
const BATCH_SIZE: i64 = 500;
/// Those of them that are sent at a time: few enough for a message to fit into the buffer
/// that each stream has anyway, 8 KiB, as long as users are not very large.
pub const MESSAGE_SIZE: usize = 32;
/// Rounds that are kept for watchers that are not as fast as others.
const ROUNDS_KEPT: usize = 64;
/// Those who are behind take turns in reading, so that calls find connections.
const READING_AT_ONCE: usize = 2;
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
/// How often to look whether the log is still this database's own.
const ADOPTION_INTERVAL: Duration = Duration::from_secs(5);
/// How long PostgreSQL may take to answer the reader.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the reader waits before it connects again.
const RECONNECT_DELAY: Duration = Duration::from_millis(500);

/// Where a statement is in history: nothing on a standby, whose snapshots do not know of
/// all running transactions, and no row at all if the log is of another database. Its
/// origin has a third word if it was adopted.
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
        and starts_with(feed.origin || ' ', cluster.system_identifier || ' ' || database.oid || ' ')
)"
        )
    };
    () => {
        concat!(
            "(
    select history, snapshot, newest.xid, newest.time from ",
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
    let last = Change::new(xid(row, 2)?, column(row, 3)?);
    Ok(Some(Point::now(history, &running(snapshot)?, last)))
}

/// The first column behind them.
pub(crate) const BEHIND_POINT: usize = 4;

/// The log of a dump that was restored here has another database's transaction ids:
/// they would hide what is written from now on. From now on it is another history. While
/// keys are missing, the dump is still being restored.
const ADOPT: &str = "
with here as (
    select cluster.system_identifier || ' ' || database.oid as origin
    from pg_control_system() cluster, pg_database database
    where database.datname = current_database()
        and to_regclass('users_pkey') is not null and to_regclass('user_changes_pkey') is not null
), adopted as (
    update user_feed feed set purged_xid = '0', purged_time = 'epoch',
        origin = here.origin || ' ' || (extract(epoch from clock_timestamp()) * 1000000)::bigint
    from here where not starts_with(feed.origin || ' ', here.origin || ' ')
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

/// Adopts the log again when another database has been restored under the service.
pub async fn keep_adopted(db: &Db, postgres: &tokio_postgres::Config) {
    loop {
        time::sleep(ADOPTION_INTERVAL).await;
        let is_foreign = db.run(Access::Read, NOW, &[]).await.is_ok_and(|rows| rows.is_empty());
        if is_foreign && let Err(error) = adopt(postgres).await {
            tracing::warn!(error = describe(error.as_ref()), "the change log is of another database");
        }
    }
}

pub(crate) const NOW: &str = concat!("select * from ", here!());

/// Where the statement is, in one row, and the changes behind a point, which has seen all
/// transactions up to `$1` except `$2`: `$3` of them, and those that share a transaction
/// with the last one. They come in no order, since PostgreSQL would sort whole users.
const READ: &str = concat!(
    "with here as materialized ",
    here!(
        "feed.purged_xid, feed.purged_time,
        (select time from user_changes where xid = $1 order by seq limit 1) as last_time"
    ),
    "
select ",
    user_columns!(),
    ", user_id, user_revision, kind, xid, seq, change.time, null, null, null, null, null
from (
    select xid, seq, user_id, revision as user_revision, kind, time from user_changes
    where xid = any($2)
    union all (
        select xid, seq, user_id, revision, kind, time from user_changes
        where xid > $1 order by xid fetch first $3 rows with ties
    )
    order by xid fetch first $3 rows with ties
) as change
left join lateral (select * from users where id = user_id limit 1) as user_now on true
where exists (select from here)
union all
select null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, here.*
from here"
);

/// What follows a point: changes, or that there are none.
#[derive(Debug)]
pub struct Batch {
    /// The point before it.
    pub from: Point,
    /// The point behind it.
    pub upto: Point,
    /// Whether nothing has changed.
    pub is_bookmark: bool,
    /// The messages that deliver it. Changes are in the order of their transactions, and
    /// a user comes with the last of its changes.
    pub messages: Vec<Encoded>,
}

impl Batch {
    /// Nothing has changed up to this point, which is now.
    pub fn bookmark(point: Point) -> Self {
        let message = pb::WatchUsersResponse { bookmark: true, ..leading_to(&point) };
        let messages = vec![Encoded::new(&message)];
        Self { from: point.clone(), upto: point, is_bookmark: true, messages }
    }

    /// A round that goes on from nobody's point: who gets it looks into the log, and finds
    /// out whether that goes on.
    fn of_no_history() -> Self {
        Self::bookmark(Point::now(String::new(), &[], Change { xid: 0, time_us: 0 }))
    }
}

/// What a statement has read of the log behind a point.
pub struct Behind {
    from: Point,
    log: Log,
    /// The changes, in the order of their transactions.
    changes: Vec<(Change, Row)>,
    /// The point behind them.
    pub upto: Point,
    /// Whether this is all that there is by now.
    pub is_all: bool,
}

impl Behind {
    fn from_rows(from: Point, rows: Vec<Row>) -> Result<Self, Error> {
        let (mut log, mut changes) = (None, Vec::with_capacity(rows.len()));
        for row in rows {
            match column::<Option<i64>>(&row, EXTRA + 4)? {
                Some(seq) => {
                    let change = Change::new(xid(&row, EXTRA + 3)?, column(&row, EXTRA + 5)?);
                    changes.push((change, seq, row));
                }
                None => log = log_from_row(&row)?,
            }
        }
        // No such row: the log is not this database's. No history: a standby.
        let log = log.ok_or(Error::DatabaseUnavailable)?;
        from.check(&log)?;
        changes.sort_unstable_by_key(|(change, seq, _)| (change.xid, *seq));
        let changes: Vec<_> = changes.into_iter().map(|(change, _, row)| (change, row)).collect();
        let is_all = i64::try_from(changes.len()).is_ok_and(|count| count < BATCH_SIZE);
        let upto = from.after(&log, changes.last().map(|(last, _)| *last), is_all);
        Ok(Self { from, log, changes, upto, is_all })
    }

    /// The same as messages.
    pub fn into_batch(self) -> Result<Batch, Error> {
        let Self { from, log, changes, upto, is_all } = self;
        if changes.is_empty() {
            return Ok(Batch { from, ..Batch::bookmark(upto) });
        }
        let mut users_told = HashSet::with_capacity(changes.len());
        let mut is_last = Vec::with_capacity(changes.len());
        for (_, row) in changes.iter().rev() {
            is_last.push(users_told.insert(column::<Uuid>(row, EXTRA)?));
        }
        let mut messages = Vec::with_capacity(changes.len().div_ceil(MESSAGE_SIZE));
        let mut reached = from.clone();
        let mut parts = changes.chunks(MESSAGE_SIZE).peekable();
        while let Some(part) = parts.next() {
            // Behind the last transaction that does not go on in the next part.
            let next = parts.peek().and_then(|next| next.first()).map(|(change, _)| change.xid);
            let complete = part.iter().map(|(change, _)| *change).rfind(|change| Some(change.xid) != next);
            if complete.is_some() {
                reached = from.after(&log, complete, is_all && next.is_none());
            }
            let told = part.iter().map(|(_, row)| change_from_row(row, is_last.pop() == Some(true)));
            let changes = told.collect::<Result<_, Error>>()?;
            messages.push(Encoded::new(&pb::WatchUsersResponse { changes, ..leading_to(&reached) }));
        }
        Ok(Batch { from, upto, is_bookmark: false, messages })
    }
}

/// A change, with what has become of the user if it is the last one of this user.
fn change_from_row(row: &Row, is_last: bool) -> Result<pb::UserChange, Error> {
    let is_there = column::<Option<Uuid>>(row, ID)?.is_some();
    Ok(pb::UserChange {
        kind: i32::from(column::<i16>(row, EXTRA + 2)?),
        id: column::<Uuid>(row, EXTRA)?.to_string(),
        revision: column(row, EXTRA + 1)?,
        user: if is_last && is_there { Some(user_from_row(row)?) } else { None },
        removed: is_last && !is_there,
    })
}

/// A message that leads to a point, and says no more: a sign of life.
pub fn leading_to(point: &Point) -> pb::WatchUsersResponse {
    let resume_token = Token { point: point.clone(), page_token: None }.to_text();
    pb::WatchUsersResponse { resume_token, ..Default::default() }
}

fn log_from_row(row: &Row) -> Result<Option<Log>, Error> {
    let Some(history) = column(row, EXTRA + 6)? else { return Ok(None) };
    Ok(Some(Log {
        history,
        running: running(column(row, EXTRA + 7)?)?,
        purged: Change::new(xid(row, EXTRA + 8)?, column(row, EXTRA + 9)?),
        last_time_us: column::<Option<SystemTime>>(row, EXTRA + 10)?.map(|time| Change::new(0, time).time_us),
    }))
}

fn running(snapshot: &str) -> Result<Vec<u64>, Error> {
    point::running(snapshot).ok_or(Error::Internal)
}

fn xid(row: &Row, index: usize) -> Result<u64, Error> {
    column::<Xid>(row, index).map(|Xid(xid)| xid)
}

/// The number of a transaction, as PostgreSQL sends it.
#[derive(Debug)]
struct Xid(u64);

impl FromSql<'_> for Xid {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(u64::from_be_bytes(raw.try_into()?)))
    }

    accepts!(XID8);
}

impl ToSql for Xid {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(&self.0.to_be_bytes());
        Ok(IsNull::No)
    }

    accepts!(XID8);

    to_sql_checked!();
}

/// The feed of a process.
pub struct Feed {
    db: Arc<Db>,
    session: String,
    rounds: broadcast::Sender<Arc<Batch>>,
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

    /// What is published from now on: rounds, each of which begins where the one before ends.
    pub fn rounds(&self) -> broadcast::Receiver<Arc<Batch>> {
        let rounds = self.rounds.subscribe();
        self.arrivals.notify_one();
        rounds
    }

    /// The point that has all that is committed.
    pub async fn now(&self) -> Result<Point, Error> {
        let rows = self.db.run(Access::Read, NOW, &[]).await?;
        rows.first().map(point_from_row).transpose()?.flatten().ok_or(Error::DatabaseUnavailable)
    }

    /// The users of a page of an initial state, and whether it is the last one.
    pub async fn page(&self, page: &Page) -> Result<(Vec<Row>, bool), Error> {
        let _turn = self.reading.acquire().await;
        list::walk(&self.db, page).await
    }

    /// The changes behind a point, for somebody who is behind the rounds.
    pub async fn read(&self, from: Point) -> Result<Behind, Error> {
        let _turn = self.reading.acquire().await;
        let (last, unseen) = parameters(&from);
        let rows = self.db.run(Access::Read, READ, &[&last, &unseen, &BATCH_SIZE]).await?;
        Behind::from_rows(from, rows)
    }

    /// Publishes rounds while somebody watches, for ever. Those who watch stay when the
    /// connection breaks: the next one goes on where the last one ended.
    pub async fn publish(&self, postgres: &tokio_postgres::Config) {
        let mut published = None;
        loop {
            self.somebody_watches(&mut published).await;
            let begun = Instant::now();
            let Err(error) = self.publish_from(postgres, &mut published).await;
            // An attempt that fails at once, while PostgreSQL is away, is no news.
            if begun.elapsed() > RECONNECT_DELAY {
                tracing::warn!(error = describe(error.as_ref()), "the change feed is interrupted");
            } else {
                tracing::debug!(error = describe(error.as_ref()), "the change feed cannot be read");
            }
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
                    *published = None;
                    let _ = self.rounds.send(Arc::new(Batch::of_no_history()));
                    anyhow::bail!("the change log does not go on: {error:?}");
                }
            };
            if !batch.is_bookmark {
                poll = POLL_MIN;
            } else if last_round.is_some_and(|round| round.elapsed() < BOOKMARK_INTERVAL) {
                time::sleep(GATHER_TIME).await;
                self.committed_within(poll).await;
                poll = (poll * 2).min(POLL_MAX);
                continue;
            }
            from.clone_from(&batch.upto);
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
    // Later than that, and the watchers would take the feed for dead.
    (GATHER_TIME + GATHER_TIME_PER_WATCHER * count + sending).min(BOOKMARK_INTERVAL)
}

/// The parameters `$1` and `$2` of [`READ`].
fn parameters(from: &Point) -> (Xid, Vec<Xid>) {
    (Xid(from.last_xid()), from.unseen().iter().copied().map(Xid).collect())
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
        let params: db::Params<'_> = &[&last, &unseen, &BATCH_SIZE];
        let rows = time::timeout(READ_TIMEOUT, self.client.query(&self.read, params)).await??;
        Ok(Behind::from_rows(from.clone(), rows).and_then(Behind::into_batch))
    }
}

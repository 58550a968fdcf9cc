//! The statements on the change log. The statements that change users write it, and
//! `purge.rs` purges it.
//!
//! What is behind a point is read in one snapshot: the changes that the point does not
//! have, and their users as they are by then. So of each user, the state that is delivered
//! later is the newer one, whatever the order of the transactions was.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, SystemTime},
};

use deadpool_postgres::{ClientWrapper, Transaction};
use futures_util::future;
use prost::bytes::BytesMut;
use tokio::{task, time};
use tokio_postgres::{
    IsolationLevel, Row,
    types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked},
};
use uuid::Uuid;

use crate::error::{Access, Error};
use crate::model::position::{self, Log, LogPosition, Token, TransactionStamp};
use crate::pb;
use crate::pb::codec::Encoded;
use crate::store::pool::{self, Db, Params};
use crate::store::user_row::{ID, column, user_columns, user_from_row};
use crate::telemetry::describe;

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[ADOPT, NOW, LOG, CHANGES, BETWEEN, EACH];

/// Changes in a message: few enough for it to fit into the buffer that each stream has
/// anyway, 8 KiB, as long as users are not very large.
pub const MESSAGE_SIZE: usize = 32;
/// Messages that are made without a pause.
const MESSAGES_AT_ONCE: usize = 16;
/// How often to look whether the log is still this database's own.
const ADOPTION_INTERVAL: Duration = Duration::from_secs(5);

/// Where a statement is in history: nothing on a standby, whose snapshots do not know of
/// all running transactions, and no row at all if the log is of another database. Its
/// origin has a third word if it was adopted.
macro_rules! current_position {
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
            current_position!("feed.purged_xid, feed.purged_time"),
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
pub(crate) use current_position;

/// Reads the point from the first columns of a row, which are those of `current_position!()`.
pub(crate) fn position_from_row(row: &Row) -> Result<Option<LogPosition>, Error> {
    let (Some(history), Some(snapshot)) = (column(row, 0)?, column(row, 1)?) else { return Ok(None) };
    let last = TransactionStamp::new(xid(row, 2)?, column(row, 3)?);
    Ok(Some(LogPosition::now(history, &running(snapshot)?, last)))
}

/// The first column behind them.
pub(crate) const POSITION_COLUMN_COUNT: usize = 4;

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
    let (client, connection) = pool::connect(postgres).await?;
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

/// The point that has all that is committed.
pub(crate) const NOW: &str = concat!("select * from ", current_position!());

/// Reads it from the rows of [`NOW`].
pub(crate) fn position_from_rows(rows: &[Row]) -> Result<LogPosition, Error> {
    rows.first().map(position_from_row).transpose()?.flatten().ok_or(Error::DatabaseUnavailable)
}

/// The log, for whoever comes from a point of which `$1` is the last transaction.
const LOG: &str = concat!(
    "select * from ",
    current_position!(
        "feed.purged_xid, feed.purged_time,
        (select time from user_changes where xid = $1 order by seq limit 1)"
    ),
    " as here"
);

/// Refuses a point from which the log does not lead on.
pub async fn check(db: &Db, point: &LogPosition) -> Result<(), Error> {
    point.check(&log_from_rows(&db.run(Access::Read, LOG, &[&Xid(point.last_xid())]).await?)?)
}

fn log_from_rows(rows: &[Row]) -> Result<Log, Error> {
    // No row: the log is not this database's. No history: a standby.
    let row = rows.first().ok_or(Error::DatabaseUnavailable)?;
    Ok(Log {
        history: column::<Option<String>>(row, 0)?.ok_or(Error::DatabaseUnavailable)?,
        running: running(column(row, 1)?)?,
        purged: TransactionStamp::new(xid(row, 2)?, column(row, 3)?),
        last_time_us: column::<Option<SystemTime>>(row, 4)?
            .map(|time| TransactionStamp::new(0, time).time_us),
    })
}

/// The changes behind a point, which has seen all transactions up to `$1` except `$2`: `$3`
/// of them, and those that share a transaction with the last one.
const CHANGES: &str = "select user_id, revision, kind, xid, seq, time from user_changes
where xid = any($2)
union all (
    select user_id, revision, kind, xid, seq, time from user_changes
    where xid > $1 order by xid fetch first $3 rows with ties
)
order by xid fetch first $3 rows with ties";

/// Users whose ids lie between two.
const BETWEEN: &str =
    concat!("select ", user_columns!(), " from users where id >= $1 and id <= $2 order by id limit $3");

/// Users here and there.
const EACH: &str = concat!("select ", user_columns!(), " from users where id = any($1)");

/// A change in the log.
struct Entry {
    user_id: Uuid,
    revision: i64,
    kind: i16,
    change: TransactionStamp,
    /// The order within the transaction.
    seq: i64,
    /// Whether no other change of the transaction comes behind it.
    completes: bool,
    /// Whether no other change of the user comes behind it: then the user comes with it.
    is_last: bool,
}

impl Entry {
    /// The changes in the order of their transactions.
    fn from_rows(rows: &[Row]) -> Result<Vec<Self>, tokio_postgres::Error> {
        let mut entries = rows.iter().map(Self::from_row).collect::<Result<Vec<_>, _>>()?;
        entries.sort_unstable_by_key(|entry| (entry.change.xid, entry.seq));
        let (mut users, mut xid) = (HashSet::with_capacity(entries.len()), None);
        // Backwards, so what was met before comes behind it.
        for entry in entries.iter_mut().rev() {
            entry.completes = xid.replace(entry.change.xid) != Some(entry.change.xid);
            entry.is_last = users.insert(entry.user_id);
        }
        Ok(entries)
    }

    /// A change, as if others came behind it.
    fn from_row(row: &Row) -> Result<Self, tokio_postgres::Error> {
        let Xid(xid) = row.try_get(3)?;
        Ok(Self {
            user_id: row.try_get(0)?,
            revision: row.try_get(1)?,
            kind: row.try_get(2)?,
            change: TransactionStamp::new(xid, row.try_get(5)?),
            seq: row.try_get(4)?,
            completes: false,
            is_last: false,
        })
    }

    /// The change as watchers get it.
    fn told(&self, users: &HashMap<Uuid, Row>) -> Result<pb::UserChange, Error> {
        let user = if self.is_last { users.get(&self.user_id) } else { None };
        Ok(pb::UserChange {
            kind: self.kind.into(),
            id: self.user_id.to_string(),
            revision: self.revision,
            state: Some(match user {
                Some(user) => pb::user_change::State::User(user_from_row(user)?),
                None if self.is_last => pb::user_change::State::Removed(pb::user_change::Removed {}),
                None => pb::user_change::State::Superseded(pb::user_change::Superseded {}),
            }),
        })
    }
}

/// What is behind a point, as it was read.
pub struct ChangesSince {
    from: LogPosition,
    /// The point that has it as well.
    pub end: LogPosition,
    /// Whether this is all that there is by now.
    pub is_all: bool,
    log: Log,
    entries: Vec<Entry>,
    /// Those that come with them.
    users: Vec<Row>,
}

/// Reads what is behind a point: so many changes, and the rest of the last one's
/// transaction. The inner error is one of the point.
pub(crate) async fn read(
    client: &mut ClientWrapper,
    from: LogPosition,
    size: usize,
) -> Result<Result<ChangesSince, Error>, tokio_postgres::Error> {
    let snapshot = client.build_transaction().isolation_level(IsolationLevel::RepeatableRead);
    // When it is dropped, it is rolled back, and nobody waits for that.
    let snapshot = snapshot.read_only(true).start().await?;
    let last = Xid(from.last_xid());
    let unseen: Vec<Xid> = from.unseen().iter().copied().map(Xid).collect();
    let limit = i64::try_from(size).unwrap_or(i64::MAX);
    let params: Params<'_> = &[&last, &unseen, &limit];
    // Both at once, in one round trip.
    let (log, changes) =
        future::try_join(query(&snapshot, LOG, &[&last]), query(&snapshot, CHANGES, params)).await?;
    let log = match log_from_rows(&log).and_then(|log| from.check(&log).map(|()| log)) {
        Ok(log) => log,
        Err(error) => return Ok(Err(error)),
    };
    let entries = Entry::from_rows(&changes)?;
    let users = read_users(&snapshot, &entries).await?;
    let is_all = entries.len() < size;
    let end = from.after(&log, entries.last().map(|last| last.change), is_all);
    Ok(Ok(ChangesSince { from, end, is_all, log, entries, users }))
}

/// As the log has it.
const CREATED: i16 = pb::ChangeKind::Created as i16;

/// The users that come with changes, as far as they still are there. The service makes ids
/// in the order of time (version 7), so who was created at one time stands side by side in
/// the index: to walk there takes half as long as to look for each. Others may have been
/// created there as well, so the walk has an end.
async fn read_users(
    snapshot: &Transaction<'_>,
    entries: &[Entry],
) -> Result<Vec<Row>, tokio_postgres::Error> {
    let (mut together, mut apart) = (Vec::new(), Vec::new());
    for Entry { user_id, kind, .. } in entries.iter().filter(|entry| entry.is_last) {
        let is_near = *kind == CREATED && user_id.get_version_num() == 7;
        if is_near { &mut together } else { &mut apart }.push(*user_id);
    }
    together.sort_unstable();
    let mut users = Vec::new();
    if let (Some(first), Some(last)) = (together.first(), together.last()) {
        let limit = together.len() + together.len() / 4 + 1;
        for user in query(snapshot, BETWEEN, &[first, last, &(limit as i64)]).await? {
            users.push((user.try_get::<_, Uuid>(ID)?, user));
        }
        if let Some((reached, _)) = users.last().filter(|_| users.len() == limit) {
            apart.extend(together.iter().filter(|id| *id > reached));
        }
        if users.len() > together.len() {
            users.retain(|(id, _)| together.binary_search(id).is_ok());
        }
    }
    let mut users: Vec<Row> = users.into_iter().map(|(_, user)| user).collect();
    if !apart.is_empty() {
        apart.sort_unstable();
        users.append(&mut query(snapshot, EACH, &[&apart]).await?);
    }
    Ok(users)
}

async fn query(
    snapshot: &Transaction<'_>,
    sql: &str,
    params: Params<'_>,
) -> Result<Vec<Row>, tokio_postgres::Error> {
    snapshot.query(&snapshot.prepare_cached(sql).await?, params).await
}

/// What follows a point, as messages.
#[derive(Debug)]
pub struct ChangeBatch {
    /// The point before it.
    pub from: LogPosition,
    /// The point behind it.
    pub end: LogPosition,
    /// None if nothing has changed.
    pub messages: Vec<Encoded>,
}

impl ChangesSince {
    /// Makes messages of it, with pauses: there can be many, and others wait.
    pub async fn into_batch(self) -> Result<ChangeBatch, Error> {
        let Self { from, end, is_all, log, entries, users } = self;
        let by_id = |user| Ok((column(&user, ID)?, user));
        let users = users.into_iter().map(by_id).collect::<Result<HashMap<Uuid, Row>, Error>>()?;
        let mut messages = Vec::with_capacity(entries.len().div_ceil(MESSAGE_SIZE));
        let (mut reached, mut left) = (from.clone(), entries.len());
        for part in entries.chunks(MESSAGE_SIZE) {
            left -= part.len();
            if let Some(last) = part.iter().rfind(|entry| entry.completes) {
                reached = from.after(&log, Some(last.change), is_all && left == 0);
            }
            let changes = part.iter().map(|entry| entry.told(&users)).collect::<Result<_, _>>()?;
            messages.push(Encoded::new(&pb::WatchUsersResponse { changes, ..position_message(&reached) }));
            if messages.len() % MESSAGES_AT_ONCE == 0 {
                task::yield_now().await;
            }
        }
        Ok(ChangeBatch { from, end, messages })
    }
}

/// A message that leads to a point, and says no more: a sign of life.
pub fn position_message(point: &LogPosition) -> pb::WatchUsersResponse {
    let resume_token = Token { point: point.clone(), page_token: None }.to_text();
    pb::WatchUsersResponse { resume_token, ..Default::default() }
}

fn running(snapshot: &str) -> Result<Vec<u64>, Error> {
    position::running(snapshot).ok_or(Error::Internal)
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

//! The statements that read the change log. The statements that change users write it, and
//! `purge.rs` purges it.
//!
//! The changes after a position and the current state of their users are read in one
//! snapshot. Of two states of a user, the one that is delivered later is therefore the newer
//! one, whatever the order of the transactions is.

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use deadpool_postgres::{ClientWrapper, Transaction};
use futures_util::future;
use prost::bytes::BytesMut;
use tokio::time;
use tokio_postgres::{
    IsolationLevel, Row,
    types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked},
};
use uuid::Uuid;

use crate::error::{Access, Error};
use crate::model::position::{LogPosition, LogState, TransactionStamp};
use crate::pb;
use crate::store::connect::{PIN_SCHEMA, connect, connection_lost};
use crate::store::pool::{Db, Params};
use crate::store::user_row::{ID, column, user_columns};
use crate::telemetry::describe;

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] =
    &[RESET_ORIGIN, CURRENT_POSITION, LOG_STATE, CHANGES, USERS_IN_RANGE, USERS_BY_ID];

/// How often the origin of the log is compared with the database.
const ORIGIN_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// A subquery that returns the position of its snapshot. The timeline is a setting of the
/// session, see `connect.rs`. The origin is null on a standby, whose snapshots do not contain all
/// transactions in flight. There is no row if the log
/// belongs to another database. `feed.origin` has a third word after a reset.
macro_rules! current_position {
    ($more:literal) => {
        concat!(
            "(
    select
        case when not pg_is_in_recovery()
            then feed.origin || ' ' || nullif(current_setting('user_service.timeline', true), '')
        end as origin,
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
    select feed.origin, snapshot, newest.xid, newest.time from ",
            current_position!("feed.purged_xid, feed.purged_time"),
            " as feed, lateral (
        select xid, time from (
            (select xid, time from user_changes order by xid desc, seq desc limit 1)
            union all select feed.purged_xid, feed.purged_time
        ) as known order by xid desc limit 1
    ) as newest
) as log_position"
        )
    };
}
pub(crate) use current_position;

/// Reads the position from the first columns of a row, which are those of
/// `current_position!()`; `None` on a standby.
pub(crate) fn position_from_row(row: &Row) -> Result<Option<LogPosition>, Error> {
    let (Some(origin), Some(snapshot)) = (column(row, 0)?, column(row, 1)?) else { return Ok(None) };
    let last = TransactionStamp::new(xid(row, 2)?, column(row, 3)?);
    Ok(Some(LogPosition::current(origin, &in_flight_xids(snapshot)?, last)))
}

/// The number of columns of `current_position!()`.
pub(crate) const POSITION_COLUMN_COUNT: usize = 4;

/// Empties the log of another database and gives it a new origin. A restored dump contains
/// another cluster's transaction ids, which would hide new changes; older tokens become
/// invalid. While a primary key is missing, the restore is still running.
const RESET_ORIGIN: &str = "
with here as (
    select cluster.system_identifier || ' ' || database.oid as origin
    from pg_control_system() cluster, pg_database database
    where database.datname = current_database()
        and to_regclass('users_pkey') is not null and to_regclass('user_changes_pkey') is not null
), reset as (
    update user_feed feed set purged_xid = '0', purged_time = 'epoch',
        origin = here.origin || ' ' || (extract(epoch from clock_timestamp()) * 1000000)::bigint
    from here where not starts_with(feed.origin || ' ', here.origin || ' ')
    returning feed.purged_xid
), deleted as (
    delete from user_changes where xid >= (select purged_xid from reset)
)
select from reset";

/// Checks that the position can be read, before requests need it.
pub async fn verify(db: &Db) -> anyhow::Result<()> {
    let client = db.own_connection().await?;
    let position = client.prepare_cached(CURRENT_POSITION).await?;
    let read = client.query(&position, &[]).await;
    read.context("cannot read the position in the change log").map(drop)
}

/// Resets the change log if it belongs to another database.
pub async fn reset_origin(postgres: &tokio_postgres::Config) -> anyhow::Result<()> {
    // A connection outside the pool has no request timeout: the log can be large.
    let (client, connection) = connect(postgres).await?;
    let reset = async {
        client.batch_execute(PIN_SCHEMA).await?;
        client.query(RESET_ORIGIN, &[]).await
    };
    let reset = tokio::select! {
        reset = reset => reset.context("cannot compare the change log with pg_control_system()")?,
        () = connection => return Err(connection_lost().into()),
    };
    if !reset.is_empty() {
        tracing::warn!("change log of another database emptied; existing resume tokens are invalid");
    }
    Ok(())
}

/// Resets the change log whenever another database is restored under the running service.
pub async fn maintain_origin(db: &Db, postgres: &tokio_postgres::Config) {
    loop {
        time::sleep(ORIGIN_CHECK_INTERVAL).await;
        let is_foreign = db.run(Access::Read, CURRENT_POSITION, &[]).await.is_ok_and(|rows| rows.is_empty());
        if is_foreign && let Err(error) = reset_origin(postgres).await {
            tracing::warn!(error = describe(error.as_ref()), "change log of another database not emptied");
        }
    }
}

/// The position that includes every committed change.
pub(crate) const CURRENT_POSITION: &str = concat!("select * from ", current_position!());

/// Reads the position from the rows of [`CURRENT_POSITION`].
pub(crate) fn position_from_rows(rows: &[Row]) -> Result<LogPosition, Error> {
    rows.first().map(position_from_row).transpose()?.flatten().ok_or(Error::DatabaseUnavailable)
}

/// The state of the log, to check a position whose last transaction is `$1`.
const LOG_STATE: &str = concat!(
    "select * from ",
    current_position!(
        "feed.purged_xid, feed.purged_time,
        (select time from user_changes where xid = $1 order by seq limit 1)"
    ),
    " as log_state"
);

/// Checks that the log has every change after a position.
pub async fn check(db: &Db, position: &LogPosition) -> Result<(), Error> {
    let rows = db.run(Access::Read, LOG_STATE, &[&Xid(position.last_xid())]).await?;
    position.check(&log_state_from_rows(&rows)?)
}

/// Fails without a row, if the log belongs to another database, and without an origin, on a
/// standby.
fn log_state_from_rows(rows: &[Row]) -> Result<LogState, Error> {
    let row = rows.first().ok_or(Error::DatabaseUnavailable)?;
    Ok(LogState {
        origin: column::<Option<String>>(row, 0)?.ok_or(Error::DatabaseUnavailable)?,
        in_flight_xids: in_flight_xids(column(row, 1)?)?,
        purged: TransactionStamp::new(xid(row, 2)?, column(row, 3)?),
        last_time_us: column::<Option<SystemTime>>(row, 4)?
            .map(|time| TransactionStamp::new(0, time).time_us),
    })
}

/// Comes before the snapshot of a read. To empty a partition is not a matter of snapshots: a read
/// that waited for it would find no changes, and in its older snapshot no record that they are
/// purged.
const LOCK: &str = "lock table user_changes in access share mode";

/// Up to `$3` changes, and the rest of the last one's transaction, after a position that
/// includes the transactions up to `$1` except `$2`.
const CHANGES: &str = "select user_id, revision, kind, xid, seq, time from user_changes
where xid = any($2)
union all (
    select user_id, revision, kind, xid, seq, time from user_changes
    where xid > $1 order by xid fetch first $3 rows with ties
)
order by xid fetch first $3 rows with ties";

/// Up to `$3` users with ids from `$1` to `$2`.
const USERS_IN_RANGE: &str =
    concat!("select ", user_columns!(), " from users where id >= $1 and id <= $2 order by id limit $3");

/// The users with the ids `$1`.
const USERS_BY_ID: &str = concat!("select ", user_columns!(), " from users where id = any($1)");

/// A change in the log.
pub(crate) struct LogEntry {
    pub(crate) user_id: Uuid,
    pub(crate) revision: i64,
    pub(crate) kind: i16,
    pub(crate) transaction: TransactionStamp,
    /// The order within the transaction.
    seq: i64,
    /// Whether this is the last change of its transaction.
    pub(crate) ends_transaction: bool,
    /// Whether this is the last change of its user in the read.
    pub(crate) is_last: bool,
}

impl LogEntry {
    /// Reads changes and sorts them by transaction.
    fn from_rows(rows: &[Row]) -> Result<Vec<Self>, tokio_postgres::Error> {
        let mut entries = rows.iter().map(Self::from_row).collect::<Result<Vec<_>, _>>()?;
        entries.sort_unstable_by_key(|entry| (entry.transaction.xid, entry.seq));
        let (mut users, mut next_xid) = (HashSet::with_capacity(entries.len()), None);
        for entry in entries.iter_mut().rev() {
            let xid = entry.transaction.xid;
            entry.ends_transaction = next_xid.replace(xid) != Some(xid);
            entry.is_last = users.insert(entry.user_id);
        }
        Ok(entries)
    }

    /// Leaves `ends_transaction` and `is_last` unset.
    fn from_row(row: &Row) -> Result<Self, tokio_postgres::Error> {
        let Xid(xid) = row.try_get(3)?;
        Ok(Self {
            user_id: row.try_get(0)?,
            revision: row.try_get(1)?,
            kind: row.try_get(2)?,
            transaction: TransactionStamp::new(xid, row.try_get(5)?),
            seq: row.try_get(4)?,
            ends_transaction: false,
            is_last: false,
        })
    }
}

/// The changes after a position, in one snapshot.
pub struct ChangesSince {
    /// The position before the changes.
    pub(crate) from: LogPosition,
    /// The position after the changes.
    pub(crate) end: LogPosition,
    /// Whether these are all changes up to the snapshot.
    pub(crate) is_all: bool,
    pub(crate) log: LogState,
    pub(crate) entries: Vec<LogEntry>,
    /// The changed users that still exist.
    pub(crate) users: Vec<Row>,
}

/// Reads up to `size` changes after a position, and the rest of the last one's transaction.
/// The inner error means that the log does not continue from the position.
pub(crate) async fn read(
    client: &mut ClientWrapper,
    from: LogPosition,
    size: usize,
) -> Result<Result<ChangesSince, Error>, tokio_postgres::Error> {
    let snapshot = client.build_transaction().isolation_level(IsolationLevel::RepeatableRead);
    // Dropping it sends the rollback without waiting for it.
    let snapshot = snapshot.read_only(true).start().await?;
    let last = Xid(from.last_xid());
    let in_flight_xids: Vec<Xid> = from.in_flight_xids().iter().copied().map(Xid).collect();
    let limit = i64::try_from(size).unwrap_or(i64::MAX);
    let params: Params<'_> = &[&last, &in_flight_xids, &limit];
    // Pipelined: one round trip.
    let ((), log, changes) = future::try_join3(
        snapshot.batch_execute(LOCK),
        query(&snapshot, LOG_STATE, &[&last]),
        query(&snapshot, CHANGES, params),
    )
    .await?;
    let log = match log_state_from_rows(&log).and_then(|log| from.check(&log).map(|()| log)) {
        Ok(log) => log,
        Err(error) => return Ok(Err(error)),
    };
    let entries = LogEntry::from_rows(&changes)?;
    let users = read_users(&snapshot, &entries).await?;
    let is_all = entries.len() < size;
    let end = from.after(&log, entries.last().map(|last| last.transaction), is_all);
    Ok(Ok(ChangesSince { from, end, is_all, log, entries, users }))
}

/// The column value of this kind.
const CREATED: i16 = pb::ChangeKind::Created as i16;

/// Reads the changed users that still exist. Ids that the service makes are ordered by time
/// (version 7), so users that were created together are adjacent in the index, and one range
/// scan takes half as long as a lookup of each id. The range can also contain users that are
/// not wanted, so the scan has a limit; users beyond it are looked up by id.
async fn read_users(
    snapshot: &Transaction<'_>,
    entries: &[LogEntry],
) -> Result<Vec<Row>, tokio_postgres::Error> {
    let (mut range, mut single) = (Vec::new(), Vec::new());
    for LogEntry { user_id, kind, .. } in entries.iter().filter(|entry| entry.is_last) {
        let is_adjacent = *kind == CREATED && user_id.get_version_num() == 7;
        if is_adjacent { &mut range } else { &mut single }.push(*user_id);
    }
    range.sort_unstable();
    let mut users = Vec::new();
    if let (Some(first), Some(last)) = (range.first(), range.last()) {
        let limit = range.len() + range.len() / 4 + 1;
        for user in query(snapshot, USERS_IN_RANGE, &[first, last, &(limit as i64)]).await? {
            users.push((user.try_get::<_, Uuid>(ID)?, user));
        }
        if let Some((reached, _)) = users.last().filter(|_| users.len() == limit) {
            single.extend(range.iter().filter(|id| *id > reached));
        }
        if users.len() > range.len() {
            users.retain(|(id, _)| range.binary_search(id).is_ok());
        }
    }
    let mut users: Vec<Row> = users.into_iter().map(|(_, user)| user).collect();
    if !single.is_empty() {
        single.sort_unstable();
        users.append(&mut query(snapshot, USERS_BY_ID, &[&single]).await?);
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

/// The transactions in flight of a `pg_snapshot`, whose text is `xmin:xmax:xip_list`.
fn in_flight_xids(snapshot: &str) -> Result<Vec<u64>, Error> {
    let list = snapshot.split(':').nth(2).ok_or(Error::Internal)?;
    let xids = list.split(',').filter(|xid| !xid.is_empty());
    xids.map(|xid| xid.parse().map_err(|_| Error::Internal)).collect()
}

fn xid(row: &Row, index: usize) -> Result<u64, Error> {
    column::<Xid>(row, index).map(|Xid(xid)| xid)
}

/// A transaction id in the binary format of PostgreSQL.
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

//! Removes what has expired: soft-deleted users, request ids, holds of usernames, chunks of
//! imports, and old changes. Rows are deleted in small batches, each a statement of its own, with
//! pauses; old changes go with their partition. An advisory lock, held for one statement or one
//! partition, lets one replica at a time do it.

use std::time::{Duration, SystemTime};

use deadpool_postgres::ClientWrapper;
use tokio::time;

use crate::config::Config;
use crate::error::{Access, Error};
use crate::store::pool::Db;
use crate::store::user_row::column;

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[
    PURGE_USERS,
    PURGE_HOLDS,
    PURGE_IMPORT_CHUNKS,
    PURGE_REQUESTS,
    EXPIRED_PARTITION,
    RECORD_PURGED,
    NEXT_PARTITION,
];

/// The pause after each statement, in which requests get the connection and the disk.
const PAUSE: Duration = Duration::from_millis(10);

/// In how long the purge walks once through the table of request ids: how long an expired one
/// can stay.
const REQUESTS_WALK: Duration = Duration::from_secs(6 * 3600);
/// Pages of 8 KiB that one statement reads; each has up to 75 request ids.
const REQUEST_PAGES: i64 = 16;
/// Pages that every purge reads at least.
const REQUEST_PAGES_MIN: i64 = 256;

/// How long a purge waits for the readers of a partition. Other readers of the change log queue
/// behind it meanwhile, and no writer does.
const PARTITION_LOCK_TIMEOUT: &str = "set local lock_timeout = '100ms'";

/// Whether it is this replica's turn.
macro_rules! with_turn {
    () => {
        "
with turn as materialized (
    select pg_try_advisory_xact_lock(hashtext('user-service purge')) as is_ours
)"
    };
}

/// Soft-deleted users, each with a row in the change log. The purge times of a batch are `$1` or
/// later, since the index entries of earlier batches remain until a vacuum.
const PURGE_USERS: &str = concat!(
    with_turn!(),
    ", due as (
    select id from users, turn where is_ours and purge_time <= now() and purge_time >= coalesce($1::timestamptz, '-infinity')
    order by purge_time limit 500 for update of users skip locked
), gone as (
    delete from users using due where users.id = due.id returning users.id, users.revision, users.purge_time
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision + 1, 6 from gone
)
select count(*), max(purge_time) from gone"
);

/// The expired rows of a table with this key, in batches as in [`PURGE_USERS`].
macro_rules! purge_expired {
    ($table:literal, $key:literal) => {
        concat!(
            with_turn!(),
            ", due as (
    select ",
            $key,
            " from ",
            $table,
            " as expired, turn
    where is_ours and expire_time <= now() and expire_time >= coalesce($1::timestamptz, '-infinity')
    order by expire_time limit 500 for update of expired skip locked
), gone as (
    delete from ",
            $table,
            " as expired using due where expired.",
            $key,
            " = due.",
            $key,
            " returning expire_time
)
select count(*), max(expire_time) from gone"
        )
    };
}

const PURGE_HOLDS: &str = purge_expired!("username_holds", "username_key");
const PURGE_IMPORT_CHUNKS: &str = purge_expired!("import_chunks", "key");

/// The expired request ids in `$2` pages of the table from page `$1` on, and the number of pages
/// of the table. An index for this would be one more for each request to write.
const PURGE_REQUESTS: &str = concat!(
    with_turn!(),
    ", gone as (
    delete from requests
    where (select is_ours from turn) and expire_time <= now()
        and ctid >= format('(%s,0)', $1::bigint)::tid and ctid < format('(%s,0)', $1 + $2::bigint)::tid
    returning 1
)
select count(*), pg_relation_size('requests') / current_setting('block_size')::bigint from gone"
);

/// The oldest partition that was complete `$1` hours ago.
const EXPIRED_PARTITION: &str = concat!(
    with_turn!(),
    "
select complete.number from user_changes_partitions complete
join user_changes_partitions next on next.number = (complete.number + 1) % 9, turn
where is_ours and next.begin_time > complete.begin_time
    and next.begin_time <= now() - $1::integer * interval '1 hour'
order by complete.begin_time limit 1"
);

/// Records that the changes of the partition `$1`, which is locked, are purged. Older resume tokens
/// are recognised by it. There is no row, and nothing is recorded, while a transaction is running
/// that is as old as one of the changes: a token says of such transactions one by one whether
/// their changes were seen.
const RECORD_PURGED: &str = "
with newest as materialized (
    select xid, time from user_changes
    where seq >= $1::smallint * 1000000000000000000 and seq < ($1 + 1) * 1000000000000000000
    order by xid desc, seq desc limit 1
), emptied as (
    delete from user_changes_partitions
    where number = $1
        and coalesce((select xid from newest) < pg_snapshot_xmin(pg_current_snapshot()), true)
    returning number
), recorded as (
    update user_feed set purged_xid = newest.xid, purged_time = newest.time from newest, emptied
    where newest.xid > purged_xid
)
select number from emptied";

/// Begins to write the next partition, if it is empty and the current one has been written for a
/// seventh of the `$1` hours that changes are kept. The sequence is set even if the statement
/// fails afterwards; a second attempt must not set it back.
const NEXT_PARTITION: &str = concat!(
    with_turn!(),
    ", begun as (
    insert into user_changes_partitions (number, begin_time)
    select (number + 1) % 9, now() from (
        select number, begin_time from user_changes_partitions order by begin_time desc limit 1
    ) as current, turn
    where is_ours and begin_time <= now() - $1::integer * interval '1 hour' / 7
    on conflict (number) do nothing
    returning number
)
select setval('user_changes_seq', number * 1000000000000000000) from begun, user_changes_seq
where last_value / 1000000000000000000 <> number"
);

/// Purges every `PURGE_INTERVAL_MS`; never returns.
pub async fn run(db: &Db, config: &Config) {
    let interval = Duration::from_millis(config.purge_interval_ms);
    let retention_hours = i32::try_from(config.change_retention_hours).unwrap_or(i32::MAX);
    let mut request_page = 0;
    loop {
        time::sleep(interval).await;
        report("users", purge(db, PURGE_USERS).await);
        report("requests", purge_requests(db, &mut request_page, interval).await);
        report("username holds", purge(db, PURGE_HOLDS).await);
        report("import chunks", purge(db, PURGE_IMPORT_CHUNKS).await);
        report("partitions of the change log", purge_changes(db, retention_hours).await);
    }
}

fn report(what: &str, result: Result<i64, Error>) {
    match result {
        Ok(0) => {}
        Ok(count) => tracing::info!(what, count, "purged"),
        // The health check logs it, once.
        Err(Error::DatabaseUnavailable) => {}
        // The next interval tries again.
        Err(error) => tracing::warn!(what, ?error, "purge failed"),
    }
}

async fn purge(db: &Db, sql: &'static str) -> Result<i64, Error> {
    let (mut total, mut newest) = (0, None::<SystemTime>);
    loop {
        let rows = db.run(Access::Write, sql, &[&newest]).await?;
        let row = rows.first().ok_or(Error::Internal)?;
        match column::<i64>(row, 0)? {
            0 => return Ok(total),
            count => total += count,
        }
        newest = column(row, 1)?;
        time::sleep(PAUSE).await;
    }
}

/// Walks on from `page` through a part of the table, so that the whole of it takes
/// [`REQUESTS_WALK`].
async fn purge_requests(db: &Db, page: &mut i64, interval: Duration) -> Result<i64, Error> {
    let (mut total, mut walked) = (0, 0);
    loop {
        let rows = db.run(Access::Write, PURGE_REQUESTS, &[&*page, &REQUEST_PAGES]).await?;
        let row = rows.first().ok_or(Error::Internal)?;
        total += column::<i64>(row, 0)?;
        let pages: i64 = column(row, 1)?;
        *page += REQUEST_PAGES;
        walked += REQUEST_PAGES;
        if *page >= pages {
            *page = 0;
        }
        let part = pages as f64 * interval.as_secs_f64() / REQUESTS_WALK.as_secs_f64();
        if walked >= pages.min(REQUEST_PAGES_MIN.max(part.ceil() as i64)) {
            return Ok(total);
        }
        time::sleep(PAUSE).await;
    }
}

/// Empties the partitions whose changes are all older than `retention_hours`, and returns how many
/// it were; then advances to the next partition if it is time.
async fn purge_changes(db: &Db, retention_hours: i32) -> Result<i64, Error> {
    let mut total = 0;
    loop {
        let mut connection = db.connection().await?;
        let client = connection.client_mut(Access::Write).ok_or(Error::Internal)?;
        let emptied = empty_partition(client, retention_hours).await;
        match connection.release(Access::Write, emptied) {
            Ok(true) => total += 1,
            Ok(false) => break,
            // A reader has the partition, such as a dump.
            Err(Error::LockTimeout) => break,
            Err(error) => return Err(error),
        }
    }
    db.run(Access::Write, NEXT_PARTITION, &[&retention_hours]).await?;
    Ok(total)
}

/// Empties the oldest expired partition; `false` if there is none, or if it is not possible yet.
async fn empty_partition(
    client: &mut ClientWrapper,
    retention_hours: i32,
) -> Result<bool, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    transaction.batch_execute(PARTITION_LOCK_TIMEOUT).await?;
    let expired = transaction.prepare_cached(EXPIRED_PARTITION).await?;
    let Some(row) = transaction.query_opt(&expired, &[&retention_hours]).await? else { return Ok(false) };
    let number: i16 = row.try_get(0)?;
    // It waits for the transactions that have written here.
    let lock = format!("lock table user_changes_{number} in access exclusive mode");
    transaction.batch_execute(&lock).await?;
    let record = transaction.prepare_cached(RECORD_PURGED).await?;
    if transaction.query_opt(&record, &[&number]).await?.is_none() {
        return Ok(false);
    }
    transaction.batch_execute(&format!("truncate user_changes_{number}")).await?;
    transaction.commit().await?;
    Ok(true)
}

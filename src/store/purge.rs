//! Deletes expired rows: soft-deleted users, request ids, holds of usernames, chunks of imports
//! and old changes. Each small batch is a statement of its own, so that no other statement
//! waits long for it. An advisory lock, held for one statement, lets one replica at a time do
//! it.

use std::time::{Duration, Instant};

use tokio::time;

use crate::config::Config;
use crate::error::{Access, Error};
use crate::store::pool::{Db, Params};
use crate::store::user_row::column;

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] =
    &[PURGE_USERS, PURGE_REQUESTS, PURGE_HOLDS, PURGE_IMPORT_CHUNKS, PURGE_CHANGES];

/// Soft-deleted users, each with a row in the change log.
const PURGE_USERS: &str = "
with turn as materialized (
    select pg_try_advisory_xact_lock(hashtext('user-service purge')) as is_ours
), due as (
    select id from users, turn where is_ours and purge_time <= now()
    order by purge_time limit 500 for update of users skip locked
), gone as (
    delete from users using due where users.id = due.id returning users.id, users.revision
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision + 1, 6 from gone
)
select count(*) from gone";

/// Deletes the expired rows of a table with this key.
macro_rules! purge_expired {
    ($table:literal, $key:literal) => {
        concat!(
            "
with turn as materialized (
    select pg_try_advisory_xact_lock(hashtext('user-service purge')) as is_ours
), due as (
    select ",
            $key,
            " from ",
            $table,
            " as expired, turn where is_ours and expire_time <= now()
    order by expire_time limit 500 for update of expired skip locked
), gone as (
    delete from ",
            $table,
            " as expired using due where expired.",
            $key,
            " = due.",
            $key,
            " returning 1
)
select count(*) from gone"
        )
    };
}

const PURGE_REQUESTS: &str = purge_expired!("requests", "request_id");
const PURGE_HOLDS: &str = purge_expired!("username_holds", "username_key");
const PURGE_IMPORT_CHUNKS: &str = purge_expired!("import_chunks", "key");

/// The oldest changes that are older than `$1` hours and whose transactions are not running any
/// more. The newest of them is recorded, so that older resume tokens are recognised.
const PURGE_CHANGES: &str = "
with turn as materialized (
    select pg_try_advisory_xact_lock(hashtext('user-service purge')) as is_ours
), oldest as (
    select xid, seq, time from user_changes order by xid, seq limit 500
), gone as (
    delete from user_changes using oldest, turn
    where is_ours and user_changes.xid = oldest.xid and user_changes.seq = oldest.seq
        and oldest.time < now() - $1::integer * interval '1 hour'
        and oldest.xid < pg_snapshot_xmin(pg_current_snapshot())
    returning user_changes.xid, user_changes.time
), noted as (
    update user_feed set purged_xid = newest.xid, purged_time = newest.time
    from (select xid, time from gone order by xid desc limit 1) as newest
    where newest.xid > purged_xid
)
select count(*) from gone";

/// Purges every `PURGE_INTERVAL_MS`; never returns.
pub async fn run(db: &Db, config: &Config) {
    let interval = Duration::from_millis(config.purge_interval_ms);
    let hours = i32::try_from(config.change_retention_hours).unwrap_or(i32::MAX);
    let statements: [(_, _, Params<'_>); 5] = [
        ("users", PURGE_USERS, &[]),
        ("requests", PURGE_REQUESTS, &[]),
        ("username holds", PURGE_HOLDS, &[]),
        ("import chunks", PURGE_IMPORT_CHUNKS, &[]),
        ("changes", PURGE_CHANGES, &[&hours]),
    ];
    loop {
        time::sleep(interval).await;
        for (what, sql, params) in statements {
            match purge(db, sql, params).await {
                Ok(0) => {}
                Ok(count) => tracing::info!(what, count, "purged"),
                // The health check logs it, once.
                Err(Error::DatabaseUnavailable) => {}
                // The next interval tries again.
                Err(error) => tracing::warn!(what, ?error, "purge failed"),
            }
        }
    }
}

async fn purge(db: &Db, sql: &'static str, params: Params<'_>) -> Result<i64, Error> {
    let mut total: i64 = 0;
    loop {
        let started = Instant::now();
        let rows = db.run(Access::Write, sql, params).await?;
        match rows.first().map_or(Ok(0), |row| column(row, 0))? {
            0 => return Ok(total),
            count => total += count,
        }
        // Requests have the connection for as long as the batch had it. A batch that took long
        // because the server is busy is followed by a long pause.
        time::sleep(started.elapsed()).await;
    }
}

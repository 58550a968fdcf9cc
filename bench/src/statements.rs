//! SQL that the benchmark runs without the service: the statement that a service with one query
//! for each request would run, and the service's own statement for a batch.

use anyhow::{Context, Result};
use user_service::store::users;

/// The planner settings of the service's sessions.
pub const SESSION_OPTIONS: &str =
    "-c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c enable_bitmapscan=off -c jit=off";

macro_rules! columns {
    () => {
        "id, username, email, display_name, create_time, update_time, delete_time, purge_time, revision"
    };
}

/// Reads a user: `$1` is the id.
pub const GET_BY_ID: &str = concat!("select ", columns!(), " from users where id = $1");

/// Creates a user with a request id and a row in the change log: request id, fingerprint, user
/// id, username and its key, e-mail address and its key, display name, salt.
pub const CREATE: &str = concat!(
    "with request as (
    insert into requests (request_id, fingerprint, is_salted, user_id, expire_time)
    select $1::uuid, sha256($2::bytea || $9::bytea), true, $3::uuid, now() + interval '24 hours'
    on conflict (request_id) do nothing
    returning request_id
), created as (
    insert into users (
        id, username, username_key, username_held, email, email_key, display_name,
        revision, create_time, update_time, fingerprint_salt
    )
    select $3, $4, $5, true, $6, $7, $8, 1, now(), now(), $9 from request
    returning ",
    columns!(),
    "
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 1 from created
)
select ",
    columns!(),
    " from created"
);

/// Changes a user with a request id and a row in the change log: request id, fingerprint, user
/// id, expected revision, the new values in the order of [`CREATE`].
pub const UPDATE: &str = "with cur as (
    select id, fingerprint_salt from users
    where id = $3 and delete_time is null and $4::bigint in (0, revision) for update
), request as (
    insert into requests (request_id, fingerprint, is_salted, user_id, expire_time)
    select $1::uuid, sha256($2::bytea || fingerprint_salt), true, id, now() + interval '24 hours' from cur
    on conflict (request_id) do nothing
    returning request_id
), updated as (
    update users u set
        username = coalesce($5, u.username),
        username_key = coalesce($6, u.username_key),
        email = coalesce($7, u.email),
        email_key = coalesce($8, u.email_key),
        display_name = coalesce($9, u.display_name),
        revision = u.revision + 1,
        update_time = greatest(now(), u.update_time)
    from cur where u.id = cur.id and exists (select from request)
    returning u.id, u.revision
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 2 from updated
)
select id, revision from updated";

/// The service's own statement for a batch of creates, without the change log and with it.
pub fn create_batch() -> Result<[String; 2]> {
    let is_create = |sql: &&&str| sql.contains("insert into users");
    let logged = users::STATEMENTS.iter().find(is_create).context("the service creates no users")?;
    let (before, log) = logged.split_once(", change as (").context("no part writes the change log")?;
    let (_, after) = log.split_once(")\nselect").context("nothing follows the change log")?;
    Ok([format!("{before}\nselect{after}"), (*logged).to_owned()])
}

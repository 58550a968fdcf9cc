//! The statements on the users of a batch. Each is one round trip, and does all of
//! its work or nothing.
//!
//! A statement first looks at all that could stand in the way, in the rows that it
//! has locked and in the index of usernames, and writes only if nothing does. So a
//! refusal knows every conflict. What somebody else does in the moment between the
//! look and the write meets a constraint; then the statement runs again, and sees it.
//!
//! Rows are locked in the order of ids, and usernames taken in their own order, so
//! that two batches never wait for each other.

use std::{collections::HashMap, hash::Hash};

use tokio_postgres::Row;
use uuid::Uuid;

use crate::error::{Access, Element, Error, Violation, reason};
use crate::model::request::{Batch, NewUser, Removal, RequestId, UserPatch};
use crate::pb;
use crate::store::pool::{Db, Params};
use crate::store::user_row::{Changes, NewUsers};
use crate::store::users::{ID, USER_COLUMN_COUNT, column, record_request, user_columns, user_from_row};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[CREATE, UPDATE, DELETE, REPLAY];

/// How often a statement is run that fails for what somebody else just did.
const ATTEMPTS: usize = 5;

/// The columns behind a user's.
const IS_LET_THROUGH: usize = USER_COLUMN_COUNT;
const USERNAME_IS_TAKEN: usize = USER_COLUMN_COUNT + 1;
const ID_IS_TAKEN: usize = USER_COLUMN_COUNT + 2;

/// Whether the batch is written: nothing stands in its way, and it is no retry.
macro_rules! is_let_through {
    () => {
        "exists (select from ok) and ($1 is null or exists (select from request))"
    };
}

/// For the users `$3`. `ok` has one row, with all of their salts, or none.
macro_rules! record_batch {
    () => {
        record_request!("salt", "($3::uuid[])[1], $3", "from ok")
    };
}

/// What comes back is what was asked: all of it is created as it is, or nothing.
const CREATE: &str = concat!(
    "with input as materialized (
    select i.*,
        same.id is not null or id_is_repeated as id_is_taken,
        holder.id is not null or username_is_repeated as username_is_taken
    from unnest(
        $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::bytea[],
        $10::boolean[], $11::boolean[]
    ) with ordinality as i (
        user_id, new_username, new_username_key, new_email, new_email_key, new_display_name, salt,
        id_is_repeated, username_is_repeated, n
    )
    left join users same on same.id = user_id
    left join users holder on holder.username_key = new_username_key and holder.username_held
), ok as (
    select string_agg(salt, '' order by n) as salt from input
    having not bool_or(id_is_taken or username_is_taken)
), ",
    record_batch!(),
    ", created as (
    insert into users (
        id, username, username_key, username_held, email, email_key, display_name,
        revision, create_time, update_time, fingerprint_salt
    )
    select user_id, new_username, new_username_key, true, new_email, new_email_key, new_display_name,
        1, now(), now(), salt
    from input where ",
    is_let_through!(),
    "
    order by new_username_key
), change as (
    insert into user_changes (user_id, revision, kind) select user_id, 1, 1 from input where ",
    is_let_through!(),
    "
)
select user_id, new_username, new_email, new_display_name, now(), now(),
    null::timestamptz, null::timestamptz, 1::bigint, ",
    is_let_through!(),
    ", username_is_taken, id_is_taken
from input order by n"
);

/// Creates users, all or none.
pub async fn create(db: &Db, batch: &Batch<NewUser>) -> Result<Vec<pb::User>, Error> {
    let users: NewUsers<'_> = batch.items.iter().collect();
    let params: Params<'_> = &[
        &batch.request_id.id,
        &batch.request_id.fingerprint,
        &users.ids,
        &users.usernames,
        &users.username_keys,
        &users.emails,
        &users.email_keys,
        &users.display_names,
        &users.salts,
        &repeated(users.ids.iter().map(Some)),
        &repeated(users.username_keys.iter().map(Some)),
    ];
    let rows = run(db, Access::write(batch.validate_only), CREATE, params).await?;
    if let Some(users) = done(db, &batch.request_id, &rows, "user.id").await? {
        return Ok(users);
    }
    let mut conflicts = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        if column(row, ID_IS_TAKEN)? {
            let what = "another user or item has this id";
            conflicts.push(conflict(index, "user.id", reason::USER_ID_TAKEN, what));
        }
        if column(row, USERNAME_IS_TAKEN)? {
            conflicts.push(username_taken(index));
        }
    }
    Err(refusal(conflicts))
}

/// As in `users.rs`, all is decided on what `cur` has read, since only that is the
/// row as it is when it has been locked.
const UPDATE: &str = concat!(
    "with input as materialized (
    select i.*, holder.id is not null or username_is_repeated as username_is_taken
    from unnest(
        $3::uuid[], $4::bigint[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[],
        $10::boolean[]
    ) with ordinality as i (
        user_id, expected_revision, new_username, new_username_key, new_email, new_email_key,
        new_display_name, username_is_repeated, n
    )
    left join users holder
        on holder.username_key = new_username_key and holder.username_held and holder.id <> user_id
), cur as materialized (
    select n, ",
    user_columns!(),
    ", fingerprint_salt as salt,
        delete_time is null and expected_revision in (0, revision) and not username_is_taken as is_fit,
        (username, email, display_name) is distinct from (
            coalesce(new_username, username), coalesce(new_email, email),
            coalesce(new_display_name, display_name)
        ) as has_changes
    from input join users u on id = user_id
    order by id for update of u
), ok as (
    select string_agg(salt, '' order by n) as salt from cur
    having count(*) = cardinality($3) and bool_and(is_fit)
), ",
    record_batch!(),
    ", updated as (
    update users u set
        username = coalesce(new_username, u.username),
        username_key = coalesce(new_username_key, u.username_key),
        email = coalesce(new_email, u.email),
        email_key = coalesce(new_email_key, u.email_key),
        display_name = coalesce(new_display_name, u.display_name),
        revision = u.revision + 1,
        update_time = greatest(now(), u.update_time)
    from (
        select input.* from input join cur using (n) where has_changes order by new_username_key
    ) as changed
    where u.id = user_id and ",
    is_let_through!(),
    "
    returning ",
    user_columns!(),
    "
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 2 from updated
), shown as (
    select ",
    user_columns!(),
    " from updated
    union all
    select ",
    user_columns!(),
    " from cur where not exists (select from updated where updated.id = cur.id)
)
select ",
    user_columns!(),
    ", ",
    is_let_through!(),
    ", username_is_taken
from input left join shown on id = user_id order by n"
);

/// Changes users, all or none.
pub async fn update(db: &Db, batch: &Batch<UserPatch>) -> Result<Vec<pb::User>, Error> {
    let changes: Changes<'_> = batch.items.iter().collect();
    let params: Params<'_> = &[
        &batch.request_id.id,
        &batch.request_id.fingerprint,
        &changes.ids,
        &changes.expected_revisions,
        &changes.usernames,
        &changes.username_keys,
        &changes.emails,
        &changes.email_keys,
        &changes.display_names,
        &repeated(changes.username_keys.iter().copied()),
    ];
    let rows = run(db, Access::write(batch.validate_only), UPDATE, params).await?;
    if let Some(users) = done(db, &batch.request_id, &rows, "user.id").await? {
        return Ok(users);
    }
    let mut conflicts = Vec::new();
    for (index, (row, expected_revision)) in rows.iter().zip(changes.expected_revisions).enumerate() {
        match state_conflict(index, row, expected_revision, ["user.id", "user.revision"])? {
            Some(conflict) => conflicts.push(conflict),
            None if column(row, USERNAME_IS_TAKEN)? => conflicts.push(username_taken(index)),
            None => {}
        }
    }
    Err(refusal(conflicts))
}

/// As [`UPDATE`].
const DELETE: &str = concat!(
    "with input as materialized (
    select * from unnest($3::uuid[], $4::bigint[]) with ordinality as i (user_id, expected_revision, n)
), cur as materialized (
    select n, ",
    user_columns!(),
    ", fingerprint_salt as salt, delete_time is null and expected_revision in (0, revision) as is_fit
    from input join users u on id = user_id
    order by id for update of u
), ok as (
    select string_agg(salt, '' order by n) as salt from cur
    having count(*) = cardinality($3) and bool_and(is_fit)
), ",
    record_batch!(),
    ", deleted as (
    update users u set
        delete_time = now(),
        purge_time = now() + interval '30 days',
        revision = u.revision + 1,
        update_time = greatest(now(), u.update_time)
    from input
    where u.id = user_id and ",
    is_let_through!(),
    "
    returning ",
    user_columns!(),
    "
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 3 from deleted
), shown as (
    select ",
    user_columns!(),
    " from deleted
    union all
    select ",
    user_columns!(),
    " from cur where not exists (select from deleted)
)
select ",
    user_columns!(),
    ", ",
    is_let_through!(),
    "
from input left join shown on id = user_id order by n"
);

/// Deletes users softly, all or none.
pub async fn delete(db: &Db, batch: &Batch<Removal>) -> Result<Vec<pb::User>, Error> {
    let ids: Vec<Uuid> = batch.items.iter().map(|removal| removal.id).collect();
    let expected_revisions: Vec<i64> = batch.items.iter().map(|removal| removal.expected_revision).collect();
    let params: Params<'_> =
        &[&batch.request_id.id, &batch.request_id.fingerprint, &ids, &expected_revisions];
    let rows = run(db, Access::write(batch.validate_only), DELETE, params).await?;
    if let Some(users) = done(db, &batch.request_id, &rows, "id").await? {
        return Ok(users);
    }
    let mut conflicts = Vec::new();
    for (index, (row, expected_revision)) in rows.iter().zip(expected_revisions).enumerate() {
        conflicts.extend(state_conflict(index, row, expected_revision, ["id", "revision"])?);
    }
    Err(refusal(conflicts))
}

/// The users of a batch's request as they now are, null where one was erased.
const REPLAY: &str = concat!(
    "with recorded as materialized (
    select fingerprint, member, n
    from requests left join unnest(user_ids) with ordinality as i (member, n) on true
    where request_id = $1 and expire_time > now()
), found as materialized (
    select ",
    user_columns!(),
    ", fingerprint, n, fingerprint_salt
    from recorded left join users on id = member
)
select ",
    user_columns!(),
    ", n is not null,
    fingerprint = (select sha256($2::bytea || string_agg(fingerprint_salt, '' order by n)) from found)
from found order by n"
);

/// Which keys are those of several items.
fn repeated<K: Eq + Hash>(keys: impl Iterator<Item = Option<K>> + Clone) -> Vec<bool> {
    let mut counts = HashMap::new();
    for key in keys.clone().flatten() {
        *counts.entry(key).or_insert(0) += 1;
    }
    keys.map(|key| key.and_then(|key| counts.get(&key)).is_some_and(|count| *count > 1)).collect()
}

/// Runs a statement, and again if it fails for what somebody else has done since it
/// began to look: the next look sees that.
async fn run(db: &Db, access: Access, sql: &'static str, params: Params<'_>) -> Result<Vec<Row>, Error> {
    for _ in 0..ATTEMPTS {
        match db.run(access, sql, params).await {
            Err(Error::UsernameTaken { .. } | Error::UserIdTaken | Error::TransactionConflict) => {}
            ended => return ended,
        }
    }
    Err(Error::TransactionConflict)
}

/// The users of a batch that was let through, or of one that was made before; `None`
/// if it is refused.
async fn done(
    db: &Db,
    request_id: &RequestId,
    rows: &[Row],
    id_field: &'static str,
) -> Result<Option<Vec<pb::User>>, Error> {
    match rows.first() {
        Some(row) if column(row, IS_LET_THROUGH)? => {
            rows.iter().map(user_from_row).collect::<Result<_, _>>().map(Some)
        }
        _ => replay(db, request_id, rows.len(), id_field).await,
    }
}

/// The users of the batch with this request id as they now are, if there was one
/// with the same content.
async fn replay(
    db: &Db,
    request_id: &RequestId,
    len: usize,
    id_field: &'static str,
) -> Result<Option<Vec<pb::User>>, Error> {
    const IS_BATCH: usize = USER_COLUMN_COUNT;
    const IS_SAME: usize = USER_COLUMN_COUNT + 1;
    if request_id.id.is_none() {
        return Ok(None);
    }
    let rows = db.run(Access::Read, REPLAY, &[&request_id.id, &request_id.fingerprint]).await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let (mut users, mut gone) = (Vec::with_capacity(rows.len()), Vec::new());
    for (index, row) in rows.iter().enumerate() {
        match found(row)? {
            Some(user) => users.push(user),
            None => gone.push(not_found(index, id_field)),
        }
    }
    // With a user, the knowledge goes of what the content was.
    let is_same =
        column(first, IS_BATCH)? && rows.len() == len && (!gone.is_empty() || column(first, IS_SAME)?);
    if !is_same {
        let what = "was used for a request with other content";
        return Err(Error::invalid("request_id", reason::REQUEST_ID_REUSED, what));
    }
    if gone.is_empty() { Ok(Some(users)) } else { Err(Error::Conflicts(gone)) }
}

/// The user of a row, if there is one.
fn found(row: &Row) -> Result<Option<pb::User>, Error> {
    let id: Option<Uuid> = column(row, ID)?;
    id.map(|_| user_from_row(row)).transpose()
}

/// What is wrong with the user of an item, in the order in which a call on this
/// user alone would find it.
fn state_conflict(
    index: usize,
    row: &Row,
    expected_revision: i64,
    [id_field, revision_field]: [&str; 2],
) -> Result<Option<Violation>, Error> {
    let Some(user) = found(row)? else { return Ok(Some(not_found(index, id_field))) };
    if user.delete_time.is_some() {
        return Ok(Some(conflict(index, id_field, reason::USER_DELETED, "the user is deleted")));
    }
    if expected_revision != 0 && expected_revision != user.revision {
        let what = format!("the user has changed: its revision is {}", user.revision);
        return Ok(Some(conflict(index, revision_field, reason::REVISION_MISMATCH, what)));
    }
    Ok(None)
}

fn not_found(index: usize, id_field: &str) -> Violation {
    conflict(index, id_field, reason::USER_NOT_FOUND, "there is no such user")
}

fn username_taken(index: usize) -> Violation {
    let what = "another user or item has this username";
    conflict(index, "user.username", reason::USERNAME_TAKEN, what)
}

fn conflict(index: usize, field: &str, reason: &'static str, description: impl Into<String>) -> Violation {
    let element = Some(Element { list: "items", index });
    Violation { element, field: field.to_owned(), reason, description: description.into() }
}

fn refusal(conflicts: Vec<Violation>) -> Error {
    if conflicts.is_empty() {
        // The record of the request expired between two statements.
        return Error::TransactionConflict;
    }
    Error::Conflicts(conflicts)
}

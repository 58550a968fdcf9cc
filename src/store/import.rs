//! The statements of imports. A chunk is written by one statement, which also records it. It
//! is looked up first, so a chunk that was written before is only acknowledged again.

use std::time::Duration;

use prost::Message;
use tokio::time;
use tokio_postgres::Row;

use crate::error::{Access, Error};
use crate::model::stream::Chunk;
use crate::pb;
use crate::pb::{ErrorReason as Reason, ImportMode};
use crate::store::pool::{Db, Param};
use crate::store::user_row::{NewUsers, column, insert_users, new_user_arrays, new_user_fields};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[RECORD, ADD, OVERWRITE];

/// How often a chunk is written again after a conflict.
const ATTEMPTS: u32 = 6;
/// The pause before the second attempt; twice as long before each one after that.
const PAUSE: Duration = Duration::from_millis(20);

/// Writes a chunk, unless it was written before.
///
/// A concurrent transaction that the statement does not see makes it fail as a whole; the next
/// attempt sees it.
pub async fn write(db: &Db, chunk: &Chunk) -> Result<pb::ImportUsersResponse, Error> {
    let mut pause = PAUSE;
    for _ in 0..ATTEMPTS {
        if let Some(ack) = recorded(db, chunk).await? {
            return Ok(ack);
        }
        match write_once(db, chunk).await {
            Ok(Some(ack)) => return Ok(ack),
            Ok(None) => {}
            Err(
                Error::UsernameTaken { .. }
                | Error::UserIdTaken
                | Error::TransactionConflict
                | Error::LockTimeout,
            ) => {
                time::sleep(pause).await;
                pause *= 2;
            }
            Err(other) => return Err(other),
        }
    }
    Err(Error::TransactionConflict)
}

const RECORD: &str = "select outcomes, refused, fingerprint = $2 from import_chunks
where key = $1 and expire_time > now()";

/// The acknowledgement of a chunk that was written before.
async fn recorded(db: &Db, chunk: &Chunk) -> Result<Option<pb::ImportUsersResponse>, Error> {
    let rows = db.run(Access::Read, RECORD, &[&chunk.key, &chunk.fingerprint]).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    if !column::<bool>(row, 2)? {
        let what = "was imported before, with other content";
        return Err(Error::invalid("chunk", Reason::RequestIdReused, what));
    }
    ack(chunk, row).map(Some)
}

// What becomes of a user. The statements and the stored records have the numbers.
const CREATED: i16 = 1;
const UPDATED: i16 = 2;
const UNCHANGED: i16 = 3;
const USERNAME_TAKEN: i16 = 4;
const USER_ID_TAKEN: i16 = 5;
const USER_DELETED: i16 = 6;

/// The users of a chunk as rows. A chunk that waits for a lock holds up every request that
/// waits for its own locks, so it gives up after a second and lets them pass. The columns of the
/// record are `$1` to `$3`.
macro_rules! input {
    () => {
        concat!(
            "with input as materialized (
    select i.*
    from (select set_config('lock_timeout', '1s', true)) as lock_timeout,
        unnest(",
            new_user_arrays!(),
            ") with ordinality as i (",
            new_user_fields!(),
            ", position)
)"
        )
    };
}

/// What becomes of a user `i` whose username no user has. Subqueries that return a value are
/// never turned into a join over the whole table.
macro_rules! outcome_of_new_user {
    () => {
        "when (select h.user_id from username_holds h
            where h.username_key = i.username_key and h.expire_time > now()) is not null then 4
        when i.has_given_id and (select true from users u where u.id = i.id) then 5
        else 1"
    };
}

/// Records for a week what is `decided` for each user of a chunk, and does it. Nothing is done and no row
/// comes back if another transaction has recorded this chunk meanwhile, or if a user was lost
/// between the look and its lock.
macro_rules! write_decided {
    ($updated:literal) => {
        concat!(
            ", chunk as (
    insert into import_chunks (key, fingerprint, outcomes, refused, expire_time)
    select $1, $2, coalesce(array_agg(outcome order by position), '{}'), $3, now() + interval '7 days'
    from decided
    having count(*) = cardinality($4)
    on conflict (key) do update set
        fingerprint = excluded.fingerprint,
        outcomes = excluded.outcomes,
        refused = excluded.refused,
        expire_time = excluded.expire_time
    where import_chunks.expire_time <= now()
    returning outcomes, refused
), accepted as (
    select * from decided where exists (select from chunk)
), created as (
    ",
            insert_users!("accepted where outcome = 1"),
            "
    returning id, revision
)",
            $updated,
            "
select outcomes, refused from chunk"
        )
    };
}

/// For the modes that change no existing user.
const ADD: &str = concat!(
    input!(),
    ", decided as materialized (
    select *, case
        when (select true from users u where u.username_key = i.username_key and u.username_held) then 4
        ",
    outcome_of_new_user!(),
    "
    end::smallint as outcome
    from input i
)",
    write_decided!(
        ", change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 1 from created
)"
    )
);

/// Rows are locked in the order of ids, as in all statements on several users. A user whose
/// username changed meanwhile is missing in `current` and in `decided`.
const OVERWRITE: &str = concat!(
    input!(),
    ", current as materialized (
    select i.*, u.id as current_id, u.delete_time is not null as is_deleted,
        (u.email, u.display_name) is distinct from (i.email, i.display_name) as has_changes
    from input i join users u on u.username_key = i.username_key and u.username_held
    order by u.id for update of u
), decided as materialized (
    select *, case
        when has_given_id and current_id <> id then 4
        when is_deleted then 6
        when has_changes then 2
        else 3
    end::smallint as outcome
    from current
    union all
    select i.*, null, null, null, case ",
    outcome_of_new_user!(),
    " end::smallint
    from input i
    where (select true from users u where u.username_key = i.username_key and u.username_held) is null
)",
    write_decided!(
        ", updated as (
    update users u set
        email = a.email,
        email_key = a.email_key,
        display_name = a.display_name,
        revision = u.revision + 1,
        update_time = greatest(now(), u.update_time)
    from accepted a where u.id = a.current_id and a.outcome = 2
    returning u.id, u.revision
), change as (
    insert into user_changes (user_id, revision, kind)
    select id, revision, 1 from created union all select id, revision, 2 from updated
)"
    )
);

/// Writes a chunk; `None` if it has to be looked at again.
async fn write_once(db: &Db, chunk: &Chunk) -> Result<Option<pb::ImportUsersResponse>, Error> {
    let users: NewUsers<'_> = chunk.users.iter().collect();
    let rejected = pb::ImportUsersResponse { failures: chunk.rejected.clone(), ..Default::default() };
    let rejected = rejected.encode_to_vec();
    let record: [Param<'_>; 3] = [&chunk.key, &chunk.fingerprint, &rejected];
    let params: Vec<_> = record.into_iter().chain(users.params()).collect();
    let sql = if chunk.mode == ImportMode::Overwrite { OVERWRITE } else { ADD };
    let rows = db.run(Access::Write, sql, &params).await?;
    rows.first().map(|row| ack(chunk, row)).transpose()
}

/// The acknowledgement that the record of a chunk makes.
fn ack(chunk: &Chunk, row: &Row) -> Result<pb::ImportUsersResponse, Error> {
    let outcomes: Vec<i16> = column(row, 0)?;
    let mut ack = pb::ImportUsersResponse::decode(column::<&[u8]>(row, 1)?).map_err(|error| {
        tracing::error!(%error, "the record of a chunk cannot be read");
        Error::Internal
    })?;
    ack.chunk = chunk.number;
    let rejected: Vec<i32> = ack.failures.iter().map(|failure| failure.position).collect();
    let positions = (0..).filter(|position| rejected.binary_search(position).is_err());
    for (position, outcome) in positions.zip(outcomes) {
        match outcome {
            CREATED => ack.created += 1,
            UPDATED => ack.updated += 1,
            UNCHANGED => ack.skipped += 1,
            _ if chunk.mode == ImportMode::SkipExisting => ack.skipped += 1,
            _ => ack.failures.push(failure(position, outcome)),
        }
    }
    ack.failures.sort_by_key(|failure| failure.position);
    Ok(ack)
}

/// What is wrong with a user whose outcome is a failure.
fn failure(position: i32, outcome: i16) -> pb::ImportFailure {
    let (field, reason, description) = match outcome {
        USERNAME_TAKEN => ("username", Reason::UsernameTaken, "another user has this username"),
        USER_ID_TAKEN => ("id", Reason::UserIdTaken, "another user has this id"),
        USER_DELETED => ("username", Reason::UserDeleted, "the user with this username is deleted"),
        _ => ("", Reason::FieldInvalid, "was rejected by a newer release"),
    };
    let (field, reason, description) = (field.to_owned(), reason.into(), description.to_owned());
    pb::ImportFailure { position, violations: vec![pb::ImportViolation { field, reason, description }] }
}

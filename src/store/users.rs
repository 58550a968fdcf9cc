//! The statements on one user. Each change is one statement and one round trip:
//! it writes the request id, the user and the change log together, or nothing.

use std::time::SystemTime;

use tokio_postgres::Row;
use uuid::Uuid;

use crate::error::{Access, Error, reason};
use crate::model::names::Username;
use crate::model::request::{
    Create, Delete, Expunge, NewUser, RequestId, Undelete, Update, UserKey, UserPatch,
};
use crate::pb;
use crate::store::pool::Db;
use crate::telemetry::describe;

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] =
    &[CREATE, GET_BY_ID, GET_BY_USERNAME, USERNAME_HOLDER, UPDATE, DELETE, UNDELETE, EXPUNGE, REPLAY];

/// The columns that [`user_from_row`] reads, in its order. They come first in
/// every row that holds a user.
macro_rules! user_columns {
    () => {
        "id, username, email, display_name, create_time, update_time, delete_time, purge_time, revision"
    };
}
pub(crate) use user_columns;

pub(crate) const ID: usize = 0;
pub(crate) const CREATE_TIME: usize = 4;
/// The first column behind them: what a statement says about the user.
pub(crate) const USER_COLUMN_COUNT: usize = 9;

/// The one way from a row to a user.
pub(crate) fn user_from_row(row: &Row) -> Result<pb::User, Error> {
    let read = || {
        Ok::<_, tokio_postgres::Error>(pb::User {
            id: row.try_get::<_, Uuid>(ID)?.to_string(),
            username: row.try_get(1)?,
            email: row.try_get(2)?,
            display_name: row.try_get(3)?,
            create_time: Some(row.try_get::<_, SystemTime>(CREATE_TIME)?.into()),
            update_time: Some(row.try_get::<_, SystemTime>(5)?.into()),
            delete_time: row.try_get::<_, Option<SystemTime>>(6)?.map(Into::into),
            purge_time: row.try_get::<_, Option<SystemTime>>(7)?.map(Into::into),
            revision: row.try_get(8)?,
        })
    };
    read().map_err(unreadable)
}

/// One more column of a row.
pub(crate) fn column<'a, T: tokio_postgres::types::FromSql<'a>>(
    row: &'a Row,
    index: usize,
) -> Result<T, Error> {
    row.try_get(index).map_err(unreadable)
}

fn unreadable(error: tokio_postgres::Error) -> Error {
    tracing::error!(error = describe(&error), "a row does not have the columns that its statement says");
    Error::Internal
}

/// Records a request id: `$1`, unless it is null, with the fingerprint `$2` hashed
/// with a salt, if there is one; for the user `$3`, or for a batch's first user and
/// all of them. No row comes back if it is recorded already: then this call is a
/// retry. A call that waits here waits for its twin to commit or to fail.
macro_rules! record_request {
    ($salt:literal, $from:literal) => {
        $crate::store::users::record_request!($salt, "$3::uuid, null::uuid[]", $from)
    };
    ($salt:literal, $users:literal, $from:literal) => {
        concat!(
            "request as (
    insert into requests (request_id, fingerprint, is_salted, user_id, user_ids, expire_time)
    select $1::uuid, coalesce(sha256($2::bytea || ",
            $salt,
            "), $2), ",
            $salt,
            " is not null, ",
            $users,
            ", now() + interval '24 hours'
    ",
            $from,
            " where $1 is not null
    on conflict (request_id) do update set
        fingerprint = excluded.fingerprint,
        is_salted = excluded.is_salted,
        user_id = excluded.user_id,
        user_ids = excluded.user_ids,
        expire_time = excluded.expire_time
    where requests.expire_time <= now()
    returning request_id
)"
        )
    };
}
pub(crate) use record_request;

/// Nothing comes back if the request is a retry.
const CREATE: &str = concat!(
    "with ",
    record_request!("$9::bytea", ""),
    ", created as (
    insert into users (
        id, username, username_key, username_held, email, email_key, display_name,
        revision, create_time, update_time, fingerprint_salt
    )
    select $3, $4, $5, true, $6, $7, $8, 1, now(), now(), $9
    where $1 is null or exists (select from request)
    returning ",
    user_columns!(),
    "
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 1 from created
)
select ",
    user_columns!(),
    " from created"
);

/// Creates a user.
pub async fn create(db: &Db, create: &Create) -> Result<pb::User, Error> {
    create_user(db, &create.user, &create.request_id, create.validate_only).await
}

async fn create_user(
    db: &Db,
    user: &NewUser,
    request_id: &RequestId,
    validate_only: bool,
) -> Result<pb::User, Error> {
    let NewUser { id, username, email, display_name, salt } = user;
    let rows = db
        .run(
            Access::write(validate_only),
            CREATE,
            &[
                &request_id.id,
                &request_id.fingerprint,
                id,
                &username.as_entered(),
                &username.canonical(),
                &email.as_entered(),
                &email.canonical(),
                display_name,
                &salt.as_slice(),
            ],
        )
        .await?;
    match rows.first() {
        Some(row) => user_from_row(row),
        None => replay(db, request_id).await?.ok_or(Error::TransactionConflict)?.user(),
    }
}

const GET_BY_ID: &str = concat!("select ", user_columns!(), " from users where id = $1");

const GET_BY_USERNAME: &str =
    concat!("select ", user_columns!(), " from users where username_key = $1 and username_held");

/// Returns a user, soft-deleted or not.
pub async fn get(db: &Db, key: &UserKey) -> Result<pb::User, Error> {
    let rows = match key {
        UserKey::Id(id) => db.run(Access::Read, GET_BY_ID, &[id]).await?,
        UserKey::Username(username) => {
            db.run(Access::Read, GET_BY_USERNAME, &[&username.canonical()]).await?
        }
    };
    match rows.first() {
        Some(row) => user_from_row(row),
        None => Err(key_not_found(key)),
    }
}

/// That nobody has this key.
pub(crate) fn key_not_found(key: &UserKey) -> Error {
    match key {
        UserKey::Id(id) => not_found(*id),
        UserKey::Username(username) => Error::UserNotFound { name: username.as_entered().to_owned() },
    }
}

const USERNAME_HOLDER: &str = "select purge_time from users where username_key = $1 and username_held";

/// Who has a username: nobody (`None`), or somebody, who may have to let go of it
/// at a time that is known.
pub async fn username_holder(db: &Db, username: &Username) -> Result<Option<Option<SystemTime>>, Error> {
    let rows = db.run(Access::Read, USERNAME_HOLDER, &[&username.canonical()]).await?;
    rows.first().map(|row| column(row, 0)).transpose()
}

/// The lock in `cur` makes whoever comes second see the first one's work, so all is
/// decided on what `cur` has read, and nothing on `u`: that is the row as it was
/// before the wait, and if it failed a condition, nobody would look again. The last
/// column tells whether the call was let through: to change something, or to find
/// that there is nothing to change.
const UPDATE: &str = concat!(
    "with cur as (
    select ",
    user_columns!(),
    ", fingerprint_salt from users where id = $3 for update
), ok as (
    select fingerprint_salt as salt,
        (username, email, display_name) is distinct from
            (coalesce($5, username), coalesce($7, email), coalesce($9, display_name)) as has_changes
    from cur where delete_time is null and $4::bigint in (0, revision)
), ",
    record_request!("salt", "from ok"),
    ", updated as (
    update users u set
        username = coalesce($5, u.username),
        username_key = coalesce($6, u.username_key),
        email = coalesce($7, u.email),
        email_key = coalesce($8, u.email_key),
        display_name = coalesce($9, u.display_name),
        revision = u.revision + 1,
        update_time = greatest(now(), u.update_time)
    from ok
    where u.id = $3 and has_changes and ($1 is null or exists (select from request))
    returning ",
    user_columns!(),
    "
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 2 from updated
)
select ",
    user_columns!(),
    ", true from updated
union all
select ",
    user_columns!(),
    ", exists (select from ok) and ($1 is null or exists (select from request))
from cur where not exists (select from updated)"
);

/// Changes a user, or creates it if that is allowed and there is none.
pub async fn update(db: &Db, update: &Update) -> Result<pb::User, Error> {
    let mut conflict = None;
    loop {
        let user = match (update_user(db, update).await, &update.or_create) {
            (Err(Error::UserNotFound { .. }), Some(user)) => user.as_ref().map_err(Clone::clone)?,
            (updated, _) => return updated,
        };
        if let Some(conflict) = conflict {
            return Err(conflict);
        }
        match create_user(db, user, &update.request_id, update.validate_only).await {
            // Perhaps with this very user, made by somebody in between: if so, there
            // is somebody to update.
            Err(error @ (Error::UserIdTaken | Error::UsernameTaken { .. })) => conflict = Some(error),
            created => return created,
        }
    }
}

async fn update_user(db: &Db, update: &Update) -> Result<pb::User, Error> {
    let Update { change, request_id, .. } = update;
    let UserPatch { id, expected_revision, username, email, display_name } = change;
    let rows = db
        .run(
            Access::write(update.validate_only),
            UPDATE,
            &[
                &request_id.id,
                &request_id.fingerprint,
                id,
                expected_revision,
                &username.as_ref().map(Username::as_entered),
                &username.as_ref().map(Username::canonical),
                &email.as_ref().map(|email| email.as_entered()),
                &email.as_ref().map(|email| email.canonical()),
                display_name,
            ],
        )
        .await?;
    let Some(row) = rows.first() else {
        return replayed_or(db, request_id, not_found(*id)).await;
    };
    let user = user_from_row(row)?;
    if column(row, USER_COLUMN_COUNT)? {
        return Ok(user);
    }
    replayed_or(db, request_id, refusal(&user, *expected_revision)).await
}

/// As [`UPDATE`]. `ok` has a row also for a user that does not exist, if that is
/// allowed; its request is then recorded all the same.
const DELETE: &str = concat!(
    "with cur as (
    select ",
    user_columns!(),
    ", fingerprint_salt from users where id = $3 for update
), ok as (
    select fingerprint_salt as salt, cur.id is not null and cur.delete_time is null as is_live
    from (values (1)) as one left join cur on true
    where case
        when cur.id is null or cur.delete_time is not null then $5::boolean
        else $4::bigint in (0, cur.revision)
    end
), ",
    record_request!("salt", "from ok"),
    ", deleted as (
    update users u set
        delete_time = now(),
        purge_time = now() + interval '30 days',
        username_held = not $6::boolean,
        revision = u.revision + 1,
        update_time = greatest(now(), u.update_time)
    from ok
    where u.id = $3 and is_live and ($1 is null or exists (select from request))
    returning ",
    user_columns!(),
    "
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 3 from deleted
)
select ",
    user_columns!(),
    ", true from deleted
union all
select ",
    user_columns!(),
    ", exists (select from ok) and ($1 is null or exists (select from request))
from cur where not exists (select from deleted)"
);

/// Deletes a user softly; `None` if there was none and that is allowed.
pub async fn delete(db: &Db, delete: &Delete) -> Result<Option<pb::User>, Error> {
    let Delete { id, expected_revision, allow_missing, release_username, request_id, .. } = delete;
    let rows = db
        .run(
            Access::write(delete.validate_only),
            DELETE,
            &[
                &request_id.id,
                &request_id.fingerprint,
                id,
                expected_revision,
                allow_missing,
                release_username,
            ],
        )
        .await?;
    let Some(row) = rows.first() else {
        let replay = replay(db, request_id).await?;
        return match replay {
            _ if *allow_missing => Ok(replay.and_then(|replay| replay.user)),
            Some(replay) => replay.user().map(Some),
            None => Err(not_found(*id)),
        };
    };
    let user = user_from_row(row)?;
    if column(row, USER_COLUMN_COUNT)? {
        return Ok(Some(user));
    }
    replayed_or(db, request_id, refusal(&user, *expected_revision)).await.map(Some)
}

/// As [`UPDATE`].
const UNDELETE: &str = concat!(
    "with cur as (
    select ",
    user_columns!(),
    ", username_held, fingerprint_salt from users where id = $3 for update
), ok as (
    select fingerprint_salt as salt from cur
    where delete_time is not null and (username_held or $4::text is not null)
), ",
    record_request!("salt", "from ok"),
    ", undeleted as (
    update users u set
        username = coalesce($4, u.username),
        username_key = coalesce($5, u.username_key),
        username_held = true,
        delete_time = null,
        purge_time = null,
        revision = u.revision + 1,
        update_time = greatest(now(), u.update_time)
    from ok
    where u.id = $3 and ($1 is null or exists (select from request))
    returning ",
    user_columns!(),
    "
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 4 from undeleted
)
select ",
    user_columns!(),
    ", true from undeleted
union all
select ",
    user_columns!(),
    ", false from cur where not exists (select from undeleted)"
);

/// Takes back a soft delete.
pub async fn undelete(db: &Db, undelete: &Undelete) -> Result<pb::User, Error> {
    let Undelete { id, username, request_id } = undelete;
    let username_key = username.as_ref().map(Username::canonical);
    let username = username.as_ref().map(Username::as_entered);
    let rows = db
        .run(
            Access::Write,
            UNDELETE,
            &[&request_id.id, &request_id.fingerprint, id, &username, &username_key],
        )
        .await
        .map_err(|error| match error {
            Error::UsernameTaken { .. } => Error::UsernameTaken { field: "username" },
            other => other,
        })?;
    let Some(row) = rows.first() else {
        return replayed_or(db, request_id, not_found(*id)).await;
    };
    let user = user_from_row(row)?;
    if column(row, USER_COLUMN_COUNT)? {
        return Ok(user);
    }
    let refusal = match user.delete_time {
        Some(_) => Error::UsernameReleased,
        None => Error::UserNotDeleted,
    };
    replayed_or(db, request_id, refusal).await
}

/// The row's delete takes the salt with it, and with the salt all meaning of the
/// fingerprints that are left. This request's own is of an id only.
const EXPUNGE: &str = concat!(
    "with cur as (
    select id from users where id = $3 for update
), ",
    record_request!("null::bytea", "from cur"),
    ", gone as (
    delete from users u using cur
    where u.id = cur.id and ($1 is null or exists (select from request))
    returning u.id, u.revision
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision + 1, 5 from gone
)
select now() from gone"
);

/// Erases a user; returns when.
pub async fn expunge(db: &Db, expunge: &Expunge) -> Result<SystemTime, Error> {
    let Expunge { id, request_id } = expunge;
    let rows = db.run(Access::Write, EXPUNGE, &[&request_id.id, &request_id.fingerprint, id]).await?;
    if let Some(row) = rows.first() {
        return column(row, 0);
    }
    match replay(db, request_id).await? {
        Some(replay) if replay.is_same == Some(true) => Ok(replay.time),
        _ => Err(not_found(*id)),
    }
}

/// The user of an erased one's request is null. What a batch was is not the same as
/// any call on one user.
const REPLAY: &str = concat!(
    "select ",
    user_columns!(),
    ",
    r.user_id,
    r.expire_time - interval '24 hours',
    r.user_ids is null
        and r.fingerprint = case when r.is_salted then sha256($2::bytea || fingerprint_salt) else $2 end
from requests r left join users on id = r.user_id
where r.request_id = $1 and r.expire_time > now()"
);

/// What a request did that was made before.
struct Replay {
    /// Whom it was about.
    user_id: Uuid,
    /// The user as it now is.
    user: Option<pb::User>,
    /// When it was made.
    time: SystemTime,
    /// Whether it had this content, unless that knowledge went with the user.
    is_same: Option<bool>,
}

impl Replay {
    fn user(self) -> Result<pb::User, Error> {
        self.user.ok_or_else(|| not_found(self.user_id))
    }
}

async fn replay(db: &Db, request_id: &RequestId) -> Result<Option<Replay>, Error> {
    if request_id.id.is_none() {
        return Ok(None);
    }
    let rows = db.run(Access::Read, REPLAY, &[&request_id.id, &request_id.fingerprint]).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let id: Option<Uuid> = column(row, ID)?;
    let replay = Replay {
        user: id.map(|_| user_from_row(row)).transpose()?,
        user_id: column(row, USER_COLUMN_COUNT)?,
        time: column(row, USER_COLUMN_COUNT + 1)?,
        is_same: column(row, USER_COLUMN_COUNT + 2)?,
    };
    if replay.is_same == Some(false) {
        let what = "was used for a request with other content";
        return Err(Error::invalid("request_id", reason::REQUEST_ID_REUSED, what));
    }
    Ok(Some(replay))
}

/// A refusal, unless the request was made before: a retry finds what the first
/// call has changed, and must not be refused for that.
async fn replayed_or(db: &Db, request_id: &RequestId, refusal: Error) -> Result<pb::User, Error> {
    match replay(db, request_id).await? {
        Some(replay) => replay.user(),
        None => Err(refusal),
    }
}

/// Why a change of this user was not let through, if it was not a retry.
fn refusal(user: &pb::User, expected_revision: i64) -> Error {
    if user.delete_time.is_some() {
        Error::UserDeleted
    } else if expected_revision != 0 && expected_revision != user.revision {
        Error::RevisionMismatch { current: user.revision }
    } else {
        // The record of the request expired between two statements.
        Error::TransactionConflict
    }
}

fn not_found(id: Uuid) -> Error {
    Error::UserNotFound { name: id.to_string() }
}

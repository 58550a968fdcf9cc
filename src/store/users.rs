//! The changes of users. Each operation is one statement for any number of items: it writes
//! request ids, users and change log together, and says of each item what became of it.
//!
//! An item is done on the row as it is once it is locked. Whatever else becomes of it, a
//! rejection or a change that changes nothing, is read from the statement's snapshot, which is
//! newer than the request. What a concurrent transaction does between the snapshot and the
//! write makes the item [`Outcome::Locked`] or violates a constraint; then the statement runs
//! again and sees it.
//!
//! The statements have the numbers of `outcome` in `items.rs`, and the kinds of changes of
//! `migrations/V2__user_changes.sql`. One that writes a key lowers `norm_version`.

use std::time::SystemTime;

use prost_types::Timestamp;
use tokio_postgres::Row;
use uuid::Uuid;

use crate::error::{Access, Error};
use crate::model::batch::Batch;
use crate::model::names::Username;
use crate::model::request::{Expunge, Undelete};
use crate::model::user::{NewUser, Removal, UserPatch};
use crate::pb;
use crate::store::idempotency::{Replay, record_requests};
use crate::store::items::{Items, Outcome, Statement, TIME, batch_users, one};
use crate::store::pool::{Db, Param};
use crate::store::user_row::{
    NewUsers, Patches, column, has_changes, hold_days, insert_users, new_user_arrays, new_user_fields,
    norm_version, optional_user_from_row, patch_arrays, patch_fields, rename_arrays, rename_fields,
    set_patch, user_columns, user_from_row,
};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[
    CREATE.wait,
    CREATE.atomic,
    UPDATE.skip,
    UPDATE.wait,
    RENAME.wait,
    RENAME.atomic,
    DELETE.skip,
    DELETE.wait,
    DELETE.atomic,
    UNDELETE.wait,
    EXPUNGE.wait,
    USERNAME_HOLDER,
];

/// The items as rows, in an order in which two statements that lock the users never wait for
/// each other.
macro_rules! input {
    ($arrays:expr, $fields:expr, $computed:literal, $order:literal) => {
        concat!(
            "with input as materialized (
    select i.*",
            $computed,
            "
    from (select set_config('lock_timeout', coalesce($1, current_setting('lock_timeout')), true)) as lock_timeout,
        unnest($2::uuid[], $3::bytea[], ",
            $arrays,
            ") with ordinality as i (request_id, fingerprint, ",
            $fields,
            ", n)
    order by ",
            $order,
            "
)"
        )
    };
}

/// Whether the request of the item `i` was recorded before. Subqueries that return a value are
/// never turned into a join over the whole table.
macro_rules! is_replay {
    () => {
        "(select true from requests r where r.request_id = i.request_id)"
    };
}

/// Whether the username `$key` of an item is taken by a user other than `$owner`, or held for
/// one.
macro_rules! is_username_taken {
    ($key:literal, $owner:literal) => {
        concat!(
            "coalesce(
                (select u.id <> ",
            $owner,
            " from users u where u.username_key = ",
            $key,
            " and u.username_held),
                (select h.user_id <> ",
            $owner,
            " from username_holds h where h.username_key = ",
            $key,
            " and h.expire_time > now()),
                false
            )"
        )
    };
}

/// `$repeated` are cases of items that conflict with each other. The coalescer puts no such items
/// into one batch.
macro_rules! create {
    ($record:ident, $repeated:literal) => {
        concat!(
            input!(new_user_arrays!(), new_user_fields!(), "", "username_key"),
            ", decided as materialized (
    select *, id as user_id, case
            when ",
            is_replay!(),
            " then 1
            when i.has_given_id and (select true from users u where u.id = i.id) then 7
            when ",
            is_username_taken!("i.username_key", "i.id"),
            " then 6
            ",
            $repeated,
            "else 0
        end::smallint as outcome
    from input i
), accepted as not materialized (
    select * from decided where outcome = 0
), ",
            record_requests!($record "accepted"),
            ", created as (
    ",
            insert_users!("accepted"),
            "
), change as (
    insert into user_changes (user_id, revision, kind) select id, 1, 1 from accepted
)
select ",
            user_columns!(),
            ", n, outcome, user_id, now() from (
    select *, now() as create_time, now() as update_time, null::timestamptz as delete_time,
        null::timestamptz as purge_time, 1::bigint as revision
    from decided
) as new_users"
        )
    };
}

const CREATE: Statement = Statement {
    skip: create!(each, ""),
    wait: create!(each, ""),
    atomic: create!(
        all,
        "when count(*) over (partition by i.id) > 1 then 7
            when count(*) over (partition by i.username_key) > 1 then 6
            "
    ),
};

/// A statement on existing users. Its parts, of which a change that is not coalesced needs those
/// without a default here:
///
/// - `arrays`, `fields`: the parameters from `$4` on, which is the ids of the users, and their names
///   as columns of an item `i`; `computed`: more such columns (`""`).
/// - `current`: a relation of locked rows, for values as they were before the write, without and with
///   `skip locked` (`["", ""]`).
/// - `write`: an update or delete of the user `c` of each item that is to be done; `skip` makes it
///   leave out locked rows (`""`); `extra` is more that it returns (`""`).
/// - `salt`: what a request id is hashed with (`"fingerprint_salt"`).
/// - `missing`: the outcome of an item whose user does not exist (`"3"`); `outcome`: cases of other
///   outcomes than "to be done", which is 2.
/// - `writes`: the change log, from `done`, which has the items that were done.
///
/// `rest` has the other items, with their outcome in the snapshot. If that is still 2, the row was
/// locked, or has changed since. `accepted` has all with the outcome 0, whose request ids are
/// recorded.
macro_rules! on_users {
    (
        arrays: $arrays:expr, fields: $fields:expr, computed: $computed:literal, current: [$current:expr, $skip_current:expr],
        write: $write:expr, skip: $skip:expr, salt: $salt:expr, extra: $extra:expr,
        missing: $missing:expr, outcome: $outcome:expr, writes: $writes:expr
    ) => {
        Statement {
            skip: on_users!(each, $arrays, $fields, $computed, $skip_current, concat!($write, $skip), $salt, $extra, $missing, $outcome, $writes),
            wait: on_users!(each, $arrays, $fields, $computed, $current, $write, $salt, $extra, $missing, $outcome, $writes),
            atomic: on_users!(all, $arrays, $fields, $computed, $current, $write, $salt, $extra, $missing, $outcome, $writes),
        }
    };
    (
        $record:ident, $arrays:expr, $fields:expr, $computed:literal, $current:expr, $write:expr, $salt:expr, $extra:expr,
        $missing:expr, $outcome:expr, $writes:expr
    ) => {
        concat!(
            input!($arrays, $fields, $computed, "user_id"),
            $current,
            ", done as (
    ",
            $write,
            "
        and ",
            on_users!(outcome $missing, $outcome),
            " = 2
    returning ",
            user_columns!(),
            ", n, request_id, fingerprint, user_id, ",
            $salt,
            " as fingerprint_salt",
            $extra,
            "
), rest as materialized (
    select ",
            user_columns!(),
            ", n, request_id, fingerprint, user_id, ",
            $salt,
            " as fingerprint_salt, ",
            on_users!(outcome $missing, $outcome),
            "::smallint as outcome
    from input i left join users c on c.id = i.user_id
    where (select count(*) from done) < cardinality($4)
        and not exists (select from done where done.n = i.n)
), accepted as not materialized (
    select n, request_id, fingerprint, user_id, fingerprint_salt from done
    union all
    select n, request_id, fingerprint, user_id, fingerprint_salt from rest where outcome = 0
), ",
            record_requests!($record "accepted"),
            $writes,
            "
select ",
            user_columns!(),
            ", n, 0::smallint, user_id, now() from done
union all
select ",
            user_columns!(),
            ", n, outcome, user_id, now() from rest"
        )
    };
    (outcome $missing:expr, $outcome:expr) => {
        concat!(
            "case
            when ",
            is_replay!(),
            " then 1
            when c.id is null then ",
            $missing,
            $outcome,
            "
            else 2
        end"
        )
    };
}

/// The locked rows, for statements that need a value as it was before the write.
macro_rules! current {
    ($skip:literal) => {
        concat!(
            ", current as materialized (
    select id as current_id, username_key as old_username_key, delete_time is null as was_live
    from users where id = any ($4) order by id for update",
            $skip,
            "
)"
        )
    };
}

/// The hold that a concurrent rename has just made is not in the snapshot, so it cannot be
/// released: the item is run again.
macro_rules! release_is_not_raced {
    () => {
        "not (i.release_username and (select u.revision from users u where u.id = i.user_id) <> c.revision)"
    };
}

macro_rules! release_usernames {
    () => {
        "released as (
    delete from username_holds where user_id = any (array(
        select user_id from accepted where n in (select n from input where release_username)
    ))
)"
    };
}

/// Changes that concern no username. They lock rows in the order of ids. A row that another
/// transaction has locked has an `xmax`; one that a finished transaction has left is taken for
/// a lock too, and goes with the next change.
const UPDATE: Statement = on_users! {
    arrays: patch_arrays!(),
    fields: patch_fields!(),
    computed: "",
    current: ["", ""],
    write: concat!(
        "update users c set ", set_patch!(), ", norm_version = least(c.norm_version, ", norm_version!(), "),
        revision = c.revision + 1, update_time = greatest(now(), c.update_time)
    from input i
    where c.id = i.user_id"
    ),
    skip: " and c.xmax = '0'",
    salt: "fingerprint_salt",
    extra: "",
    missing: "3",
    outcome: concat!("
            when c.delete_time is not null then 4
            when i.expected_revision not in (0, c.revision) then 5
            when not (", has_changes!(), ") then 0"
    ),
    writes: ", change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 2 from done
)"
};

/// Changes that may concern the username too. Usernames are taken in order, as in creates. Both
/// keys have to be new for the row to be of the current version.
const RENAME: Statement = on_users! {
    arrays: concat!(patch_arrays!(), ", ", rename_arrays!()),
    fields: concat!(patch_fields!(), ", ", rename_fields!()),
    computed: ", count(i.new_username_key) over (partition by i.new_username_key) > 1 as is_username_repeated",
    current: [current!(""), current!("")],
    write: concat!(
        "update users c set ", set_patch!(), ",
        username = coalesce(i.new_username, c.username),
        username_key = coalesce(i.new_username_key, c.username_key),
        norm_version = case when i.new_username_key is null or i.new_email_key is null
            then least(c.norm_version, ", norm_version!(), ") else ", norm_version!(), " end,
        revision = c.revision + 1, update_time = greatest(now(), c.update_time)
    from (
        select * from input join current on current_id = user_id order by new_username_key
    ) as i
    where c.id = i.user_id and ", release_is_not_raced!()
    ),
    skip: "",
    salt: "fingerprint_salt",
    extra: ", username_key, old_username_key, release_username",
    missing: "3",
    outcome: concat!("
            when c.delete_time is not null then 4
            when i.expected_revision not in (0, c.revision) then 5
            when i.is_username_repeated or i.new_username_key is not null and ",
        is_username_taken!("i.new_username_key", "i.user_id"),
        " then 6
            when c.username = coalesce(i.new_username, c.username) and not (", has_changes!(), ") then 0"
    ),
    writes: concat!(", change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 2 from done
), held as (
    insert into username_holds (username_key, user_id, expire_time)
    select old_username_key, id, now() + ", hold_days!(), " * interval '1 day' from done
    where username_key <> old_username_key and not release_username and ", hold_days!(), " > 0
    on conflict (username_key) do update set user_id = excluded.user_id, expire_time = excluded.expire_time
), taken_back as (
    delete from username_holds where username_key = any (array(
        select username_key from done where username_key <> old_username_key
    ))
), ", release_usernames!())
};

const DELETE: Statement = on_users! {
    arrays: "$4::uuid[], $5::bigint[], $6::boolean[], $7::boolean[]",
    fields: "user_id, expected_revision, allow_missing, release_username",
    computed: "",
    current: [current!(""), current!(" skip locked")],
    write: concat!(
        "update users c set
        delete_time = coalesce(c.delete_time, now()),
        purge_time = coalesce(c.purge_time, now() + interval '30 days'),
        username_held = c.username_held and not i.release_username,
        revision = c.revision + 1, update_time = greatest(now(), c.update_time)
    from (select * from input join current on current_id = user_id) as i
    where c.id = i.user_id and ", release_is_not_raced!()
    ),
    skip: "",
    salt: "fingerprint_salt",
    extra: ", was_live",
    missing: "case when i.allow_missing then 0 else 3 end",
    outcome: "
            when c.delete_time is not null and not i.allow_missing then 4
            when c.delete_time is not null and not (i.release_username and c.username_held) then 0
            when c.delete_time is null and i.expected_revision not in (0, c.revision) then 5",
    writes: concat!(", change as (
    insert into user_changes (user_id, revision, kind)
    select id, revision, case when was_live then 3 else 2 end from done
), ", release_usernames!())
};

const UNDELETE: Statement = on_users! {
    arrays: "$4::uuid[], $5::bigint[], $6::text[], $7::text[]",
    fields: "user_id, expected_revision, new_username, new_username_key",
    computed: "",
    current: ["", ""],
    write: concat!(
        "update users c set
        username = coalesce(i.new_username, c.username),
        username_key = coalesce(i.new_username_key, c.username_key),
        norm_version = least(c.norm_version, ", norm_version!(), "),
        username_held = true, delete_time = null, purge_time = null,
        revision = c.revision + 1, update_time = greatest(now(), c.update_time)
    from input i
    where c.id = i.user_id"
    ),
    skip: "",
    salt: "fingerprint_salt",
    extra: ", username_key",
    missing: "3",
    outcome: concat!("
            when c.delete_time is null then 8
            when i.expected_revision not in (0, c.revision) then 5
            when not c.username_held and i.new_username_key is null then 9
            when i.new_username_key is not null and ",
        is_username_taken!("i.new_username_key", "i.user_id"), " then 6"
    ),
    writes: ", change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 4 from done
), taken_back as (
    delete from username_holds where username_key = any (array(select username_key from done))
)"
};

/// Deleting the row deletes the salt, and with it all meaning of the fingerprints that are
/// left. This request's own fingerprint is of an id only, so it takes no salt.
const EXPUNGE: Statement = on_users! {
    arrays: "$4::uuid[], $5::bigint[], $6::boolean[], $7::boolean[]",
    fields: "user_id, expected_revision, allow_missing, force",
    computed: "",
    current: ["", ""],
    write: "delete from users c using input i where c.id = i.user_id",
    skip: "",
    salt: "null::bytea",
    extra: "",
    missing: "case when i.allow_missing then 0 else 3 end",
    outcome: "
            when c.delete_time is null and not i.force then 8
            when i.expected_revision not in (0, c.revision) then 5",
    writes: ", change as (
    insert into user_changes (user_id, revision, kind) select id, revision + 1, 5 from done
)"
};

/// Creates users.
pub async fn create(db: &Db, items: &Items<'_, NewUser>) -> Result<Vec<Outcome<pb::User>>, Error> {
    let rows = create_rows(db, items).await?;
    items.outcomes(db, &rows, user_from_row, |_, replay| replay.user()).await
}

async fn create_rows(db: &Db, items: &Items<'_, NewUser>) -> Result<Vec<Row>, Error> {
    let users: NewUsers<'_> = items.items.iter().copied().collect();
    items.run(db, &CREATE, &users.params()).await
}

/// Changes users.
pub async fn update(db: &Db, items: &Items<'_, UserPatch>) -> Result<Vec<Outcome<pb::User>>, Error> {
    let rows = update_rows(db, items).await?;
    items.outcomes(db, &rows, user_from_row, |_, replay| replay.user()).await
}

async fn update_rows(db: &Db, items: &Items<'_, UserPatch>) -> Result<Vec<Row>, Error> {
    let patches: Patches<'_> = items.items.iter().copied().collect();
    if !items.is_atomic && !items.items.iter().any(|patch| patch.is_rename()) {
        return items.run(db, &UPDATE, &patches.params()).await;
    }
    let rename = patches.rename_params();
    let hold_days: Param<'_> = &db.username_hold_days;
    let params: Vec<_> = patches.params().into_iter().chain(rename).chain([hold_days]).collect();
    items.run(db, &RENAME, &params).await
}

/// Soft-deletes users. With `allow_missing`, the response of a missing user is none.
pub async fn delete(db: &Db, items: &Items<'_, Removal>) -> Result<Vec<Outcome<Option<pb::User>>>, Error> {
    let rows = delete_rows(db, items).await?;
    let from_replay = |item: &Removal, replay: Replay| match replay.user() {
        Err(Error::UserNotFound { .. }) if item.allow_missing => Ok(None),
        user => user.map(Some),
    };
    items.outcomes(db, &rows, optional_user_from_row, from_replay).await
}

async fn delete_rows(db: &Db, items: &Items<'_, Removal>) -> Result<Vec<Row>, Error> {
    let of = items.items.iter();
    let ids: Vec<Uuid> = of.clone().map(|item| item.id).collect();
    let expected_revisions: Vec<i64> = of.clone().map(|item| item.expected_revision).collect();
    let allow_missing: Vec<bool> = of.clone().map(|item| item.allow_missing).collect();
    let release_usernames: Vec<bool> = of.map(|item| item.release_username).collect();
    items.run(db, &DELETE, &[&ids, &expected_revisions, &allow_missing, &release_usernames]).await
}

/// Restores a soft-deleted user.
pub async fn undelete(db: &Db, undelete: &Undelete) -> Result<pb::User, Error> {
    let items = Items::one(undelete, &undelete.request_id, undelete.validate_only);
    let username = undelete.username.as_ref();
    let params: [Param<'_>; 4] = [
        &vec![undelete.id],
        &vec![undelete.expected_revision],
        &vec![username.map(Username::as_entered)],
        &vec![username.map(Username::canonical)],
    ];
    let rows = items.run(db, &UNDELETE, &params).await?;
    let outcomes = items.outcomes(db, &rows, user_from_row, |_, replay| replay.user()).await?;
    one(outcomes).map_err(|error| match error {
        Error::UsernameTaken { .. } => Error::UsernameTaken { field: "username" },
        other => other,
    })
}

/// Erases a user; returns when, or nothing if there was none and that is allowed.
pub async fn expunge(db: &Db, expunge: &Expunge) -> Result<Option<Timestamp>, Error> {
    let Expunge { id, expected_revision, allow_missing, force, .. } = expunge;
    let items = Items::one(expunge, &expunge.request_id, expunge.validate_only);
    let params: [Param<'_>; 4] =
        [&vec![*id], &vec![*expected_revision], &vec![*allow_missing], &vec![*force]];
    let rows = items.run(db, &EXPUNGE, &params).await?;
    let erased = |row: &Row| {
        let time: SystemTime = column(row, TIME)?;
        Ok(optional_user_from_row(row)?.map(|_| time.into()))
    };
    let from_replay = |_: &Expunge, replay: Replay| match replay.is_same {
        Some(_) => Ok(Some(replay.time.into())),
        // It was another request about a user that is erased now.
        None => Err(Error::UserNotFound { name: id.to_string() }),
    };
    one(items.outcomes(db, &rows, erased, from_replay).await?)
}

/// Creates the users of an atomic batch.
pub async fn create_batch(db: &Db, batch: &Batch<NewUser>) -> Result<Vec<pb::User>, Error> {
    let rows = create_rows(db, &Items::atomic(batch)).await?;
    batch_users(db, batch, "user.", &rows, |_| None).await
}

/// Changes the users of an atomic batch.
pub async fn update_batch(db: &Db, batch: &Batch<UserPatch>) -> Result<Vec<pb::User>, Error> {
    let rows = update_rows(db, &Items::atomic(batch)).await?;
    batch_users(db, batch, "user.", &rows, |_| None).await
}

/// Soft-deletes the users of an atomic batch. A missing one, with `allow_missing`, has its id
/// only.
pub async fn delete_batch(db: &Db, batch: &Batch<Removal>) -> Result<Vec<pb::User>, Error> {
    let rows = delete_rows(db, &Items::atomic(batch)).await?;
    let missing = |item: &Removal| {
        item.allow_missing.then(|| pb::User { id: item.id.to_string(), ..Default::default() })
    };
    batch_users(db, batch, "", &rows, missing).await
}

const USERNAME_HOLDER: &str = "select purge_time from users where username_key = $1 and username_held
union all
select expire_time from username_holds where username_key = $1 and expire_time > now()";

/// Whether a user has or holds a username: none (`None`), or one, that gives it up at a time
/// that is known or not.
pub async fn username_holder(db: &Db, username: &Username) -> Result<Option<Option<SystemTime>>, Error> {
    let rows = db.run(Access::Read, USERNAME_HOLDER, &[&username.canonical()]).await?;
    rows.first().map(|row| column(row, 0)).transpose()
}

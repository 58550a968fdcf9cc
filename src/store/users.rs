//! The changes of users. Each operation is one statement for any number of requests: one, a
//! batch of independent requests, or an atomic batch. It writes request ids, users and change
//! log together, and says of each item what became of it.
//!
//! All is decided on the rows as they are once they are locked, and nothing on the snapshot.
//! What a concurrent transaction does between the look and the write violates a constraint;
//! then nothing is written, and the statement runs again and sees it.

use std::{hash::Hash, time::SystemTime};

use prost_types::Timestamp;
use tokio_postgres::Row;
use uuid::Uuid;

use crate::error::{Access, Error};
use crate::model::batch::{Batch, repeated};
use crate::model::fields::RequestId;
use crate::model::names::Username;
use crate::model::request::{Expunge, Undelete};
use crate::model::user::{NewUser, Removal, UserPatch};
use crate::pb;
use crate::store::idempotency::{Replay, record_requests, replay};
use crate::store::pool::{Db, Param};
use crate::store::user_row::{
    NewUsers, Patches, USER_COLUMN_COUNT, column, has_changes, insert_users, kept_fields, new_user_arrays,
    new_user_fields, no_user, optional_user_from_row, patch_arrays, patch_fields, patched_fields,
    set_patched_fields, user_columns, user_from_row,
};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[
    CREATE,
    UPDATE.wait,
    UPDATE.skip,
    DELETE.wait,
    DELETE.skip,
    UNDELETE.wait,
    EXPUNGE.wait,
    USERNAME_HOLDER,
];

/// How often a statement runs again because of a concurrent transaction.
const ATTEMPTS: usize = 5;

/// How long a statement with [`Locking::Skip`] waits for a username that another transaction
/// is inserting: such a lock cannot be skipped.
const SKIP_LOCK_TIMEOUT: &str = "100ms";

/// What a statement does with a row that another transaction has locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locking {
    /// Waits for it, for `LOCK_TIMEOUT_MS`.
    Wait,
    /// Leaves it out: its item is [`Outcome::Locked`].
    Skip,
}

/// What became of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<T> {
    /// The response: of a new change, of one that changed nothing, or of a retry.
    Done(T),
    /// Nothing was changed.
    Rejected(Error),
    /// Nothing was changed, because another transaction has locked the row.
    Locked,
}

/// The items of one statement.
pub struct Items<'a, T> {
    items: Vec<&'a T>,
    /// One an item; in an atomic batch all the same.
    request_ids: Vec<&'a RequestId>,
    is_atomic: bool,
    access: Access,
    locking: Locking,
}

impl<'a, T> Items<'a, T> {
    /// Items of independent requests.
    pub fn independent(
        requests: impl Iterator<Item = (&'a T, &'a RequestId)>,
        access: Access,
        locking: Locking,
    ) -> Self {
        let (items, request_ids) = requests.unzip();
        Self { items, request_ids, is_atomic: false, access, locking }
    }

    /// The items of an atomic batch: one that is rejected stops all.
    pub fn atomic(batch: &'a Batch<T>) -> Self {
        let items: Vec<&T> = batch.items.iter().collect();
        Self {
            request_ids: vec![&batch.request_id; items.len()],
            items,
            is_atomic: true,
            access: Access::write(batch.validate_only),
            locking: Locking::Wait,
        }
    }
}

/// A statement in the two variants of [`Locking`].
struct Statement {
    wait: &'static str,
    skip: &'static str,
}

/// The outcomes of items, as statements number them.
mod outcome {
    pub(super) const DONE: i16 = 0;
    pub(super) const REPLAY: i16 = 1;
    pub(super) const LOCKED: i16 = 2;
    pub(super) const NOT_FOUND: i16 = 3;
    pub(super) const DELETED: i16 = 4;
    pub(super) const MISMATCH: i16 = 5;
    pub(super) const USERNAME_TAKEN: i16 = 6;
    pub(super) const ID_TAKEN: i16 = 7;
    pub(super) const NOT_DELETED: i16 = 8;
    pub(super) const USERNAME_RELEASED: i16 = 9;
}

/// The first columns of every item, `$3` and `$4`, and whether its request was recorded
/// before. `$2` is a lock timeout, null for that of the session.
macro_rules! input {
    ($arrays:expr, $fields:expr) => {
        concat!(
            "with input as materialized (
    select i.*, (select true from requests r where r.request_id = i.request_id) as is_replay
    from (select set_config('lock_timeout', coalesce($2, current_setting('lock_timeout')), true)) as lock_timeout,
        unnest($3::uuid[], $4::bytea[], ",
            $arrays,
            ") with ordinality as i (request_id, fingerprint, ",
            $fields,
            ", n)
)"
        )
    };
}

/// Whether the username `$key` of an item is taken by a user other than `$owner`, or held for
/// one. Subqueries that return a value are never turned into a join over the whole table.
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

/// A hold that a concurrent rename of the user has just made is not in the snapshot, and could
/// not be released: the item is run again.
macro_rules! release_is_raced {
    () => {
        "when i.release_username and (select u.revision from users u where u.id = i.user_id) <> c.revision then 2
            "
    };
}

/// Statements on existing users, `$5`. Rows are locked in the order of ids, so that two
/// statements never wait for each other. `c` is the current user of the item `i`; items without
/// one are `missing`. With `$1`, nothing is accepted unless everything is.
macro_rules! on_users {
    (
        arrays: $arrays:expr, fields: $fields:expr, missing: $missing:expr, salt: $salt:expr,
        has_changes: $has_changes:expr, outcome: $outcome:expr, shown: $shown:expr, writes: $writes:expr
    ) => {
        Statement {
            wait: on_users!("", $arrays, $fields, $missing, $salt, $has_changes, $outcome, $shown, $writes),
            skip: on_users!(
                " skip locked", $arrays, $fields, $missing, $salt, $has_changes, $outcome, $shown, $writes
            ),
        }
    };
    (
        $lock:literal, $arrays:expr, $fields:expr, $missing:expr, $salt:expr, $has_changes:expr,
        $outcome:expr, $shown:expr, $writes:expr
    ) => {
        concat!(
            input!(concat!("$5::uuid[], ", $arrays), concat!("user_id, ", $fields)),
            ", decided as materialized (
    select i.*, c.id, ",
            $salt,
            " as fingerprint_salt, c.username_key as old_username_key, c.create_time,
        c.revision as current_revision, d.has_changes, c.revision + d.has_changes::int as revision,
        case when d.has_changes then greatest(now(), c.update_time) else c.update_time end as update_time,
        case
            when i.is_replay then 1
            ",
            $outcome,
            "
            else 0
        end::smallint as outcome,
        ",
            $shown,
            "
    from input i join users c on c.id = i.user_id, lateral (select ",
            $has_changes,
            " as has_changes) as d
    order by c.id for update of c",
            $lock,
            "
), missing as materialized (
    select n, request_id, fingerprint, user_id, case
            when is_replay then 1
            when (select true from users u where u.id = i.user_id) then 2
            else ",
            $missing,
            "
        end::smallint as outcome
    from input i
    where (select count(*) from decided) < cardinality($5)
        and not exists (select from decided where decided.n = i.n)
), accepted as (
    select * from decided where outcome = 0 and (not $1::boolean or (
        select bool_and(outcome = 0) from (select outcome from decided union all select outcome from missing) as o
    ))
), recordable as (
    select n, request_id, fingerprint, user_id, fingerprint_salt from accepted
    union all
    select n, request_id, fingerprint, user_id, null from missing where outcome = 0 and (not $1 or (
        select bool_and(outcome = 0) from (select outcome from decided union all select outcome from missing) as o
    ))
), ",
            record_requests!("recordable"),
            $writes,
            "
select ",
            user_columns!(),
            ", n, outcome, current_revision, user_id from decided
union all
select ",
            no_user!(),
            ", n, outcome, null, user_id from missing"
        )
    };
}

/// `conflict` is the outcome of an item that conflicts with another one of its batch.
const CREATE: &str = concat!(
    input!(concat!("$5::smallint[], ", new_user_arrays!()), concat!("conflict, ", new_user_fields!())),
    ", decided as materialized (
    select *, id as user_id, now() as create_time, now() as update_time, null::timestamptz as delete_time,
        null::timestamptz as purge_time, 1::bigint as revision, case
            when is_replay then 1
            when has_given_id and (select true from users u where u.id = input.id) then 7
            when conflict <> 0 then conflict
            when ",
    is_username_taken!("input.username_key", "input.id"),
    " then 6
            else 0
        end::smallint as outcome
    from input
), accepted as (
    select * from decided where outcome = 0
        and (not $1::boolean or (select bool_and(outcome = 0) from decided))
), ",
    record_requests!("accepted"),
    ", created as (
    ",
    insert_users!("accepted"),
    "
), change as (
    insert into user_changes (user_id, revision, kind) select id, 1, 1 from accepted
)
select ",
    user_columns!(),
    ", n, outcome, null::bigint, user_id from decided"
);

/// Creates users.
pub async fn create(db: &Db, items: &Items<'_, NewUser>) -> Result<Vec<Outcome<pb::User>>, Error> {
    let rows = create_rows(db, items).await?;
    items.outcomes(db, &rows, user_from_row, |_, replay| replay.user()).await
}

async fn create_rows(db: &Db, items: &Items<'_, NewUser>) -> Result<Vec<Row>, Error> {
    let users: NewUsers<'_> = items.items.iter().copied().collect();
    let is_id_repeated = items.repeated(users.ids.iter().map(Some));
    let is_username_repeated = items.repeated(users.username_keys.iter().map(Some));
    let conflicts = is_id_repeated.into_iter().zip(is_username_repeated).map(|repeated| match repeated {
        (true, _) => outcome::ID_TAKEN,
        (false, true) => outcome::USERNAME_TAKEN,
        (false, false) => outcome::DONE,
    });
    let conflicts: Vec<i16> = conflicts.collect();
    let (request_ids, fingerprints) = items.requests();
    let lock_timeout = items.lock_timeout();
    let params = users.params([&items.is_atomic, &lock_timeout, &request_ids, &fingerprints, &conflicts]);
    items.run_again(db, CREATE, &params).await
}

const UPDATE: Statement = on_users! {
    arrays: concat!("$6::boolean[], ", patch_arrays!()),
    fields: concat!("is_username_repeated, ", patch_fields!()),
    missing: "3",
    salt: "c.fingerprint_salt",
    has_changes: has_changes!(),
    outcome: concat!(
        release_is_raced!(),
        "when c.delete_time is not null then 4
            when i.expected_revision not in (0, c.revision) then 5
            when i.is_username_repeated or i.new_username_key is not null and ",
        is_username_taken!("i.new_username_key", "i.user_id"),
        " then 6"
    ),
    shown: concat!(patched_fields!(), ", c.delete_time, c.purge_time"),
    writes: concat!(
        ", updated as (
    update users u set ", set_patched_fields!(), ", revision = p.revision, update_time = p.update_time
    from (select * from accepted where has_changes order by username_key) as p where u.id = p.id
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 2 from accepted where has_changes
), held as (
    insert into username_holds (username_key, user_id, expire_time)
    select old_username_key, id, now() + $7::integer * interval '1 day' from accepted
    where username_key <> old_username_key and not release_username and $7 > 0
    on conflict (username_key) do update set user_id = excluded.user_id, expire_time = excluded.expire_time
), taken_back as (
    delete from username_holds where username_key = any (array(
        select username_key from accepted where username_key <> old_username_key
    ))
), released as (
    delete from username_holds where user_id = any (array(select id from accepted where release_username))
)"
    )
};

/// Changes users. Usernames are taken in order, as in creates.
pub async fn update(db: &Db, items: &Items<'_, UserPatch>) -> Result<Vec<Outcome<pb::User>>, Error> {
    let rows = update_rows(db, items).await?;
    items.outcomes(db, &rows, user_from_row, |_, replay| replay.user()).await
}

async fn update_rows(db: &Db, items: &Items<'_, UserPatch>) -> Result<Vec<Row>, Error> {
    let patches: Patches<'_> = items.items.iter().copied().collect();
    let is_username_repeated = items.repeated(patches.username_keys.iter().copied());
    let first: [Param<'_>; 2] = [&is_username_repeated, &db.username_hold_days];
    let params: Vec<_> = first.into_iter().chain(patches.params()).collect();
    items.run(db, &UPDATE, &patches.ids, &params).await
}

const DELETE: Statement = on_users! {
    arrays: "$6::bigint[], $7::boolean[], $8::boolean[]",
    fields: "expected_revision, allow_missing, release_username",
    missing: "case when allow_missing then 0 else 3 end",
    salt: "c.fingerprint_salt",
    has_changes: "c.delete_time is null or i.release_username and c.username_held",
    outcome: concat!(
        release_is_raced!(),
        "when i.allow_missing and c.delete_time is not null then 0
            when c.delete_time is not null then 4
            when i.expected_revision not in (0, c.revision) then 5"
    ),
    shown: concat!(
        "c.username, ", kept_fields!(), ", c.delete_time is null as is_live,
        coalesce(c.delete_time, now()) as delete_time,
        coalesce(c.purge_time, now() + interval '30 days') as purge_time"
    ),
    writes: ", deleted as (
    update users u set
        delete_time = p.delete_time, purge_time = p.purge_time,
        username_held = u.username_held and not p.release_username,
        revision = p.revision, update_time = p.update_time
    from accepted p where u.id = p.id and p.has_changes
), change as (
    insert into user_changes (user_id, revision, kind)
    select id, revision, case when is_live then 3 else 2 end from accepted where has_changes
), released as (
    delete from username_holds where user_id = any (array(select id from accepted where release_username))
)"
};

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
    let params: [Param<'_>; 3] = [&expected_revisions, &allow_missing, &release_usernames];
    items.run(db, &DELETE, &ids, &params).await
}

const UNDELETE: Statement = on_users! {
    arrays: "$6::bigint[], $7::text[], $8::text[]",
    fields: "expected_revision, new_username, new_username_key",
    missing: "3",
    salt: "c.fingerprint_salt",
    has_changes: "true",
    outcome: concat!(
        "when c.delete_time is null then 8
            when i.expected_revision not in (0, c.revision) then 5
            when not c.username_held and i.new_username_key is null then 9
            when i.new_username_key is not null and ",
        is_username_taken!("i.new_username_key", "i.user_id"),
        " then 6"
    ),
    shown: concat!(
        "coalesce(i.new_username, c.username) as username,
        coalesce(i.new_username_key, c.username_key) as username_key,
        ", kept_fields!(), ", null::timestamptz as delete_time, null::timestamptz as purge_time"
    ),
    writes: ", undeleted as (
    update users u set
        username = p.username, username_key = p.username_key, username_held = true,
        delete_time = null, purge_time = null, revision = p.revision, update_time = p.update_time
    from accepted p where u.id = p.id
), change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 4 from accepted
), taken_back as (
    delete from username_holds where username_key = any (array(select username_key from accepted))
)"
};

/// Restores a soft-deleted user.
pub async fn undelete(db: &Db, undelete: &Undelete) -> Result<pb::User, Error> {
    let items = Items::one(undelete, &undelete.request_id, undelete.validate_only);
    let username = undelete.username.as_ref();
    let params: [Param<'_>; 3] = [
        &vec![undelete.expected_revision],
        &vec![username.map(Username::as_entered)],
        &vec![username.map(Username::canonical)],
    ];
    let rows = items.run(db, &UNDELETE, &[undelete.id], &params).await?;
    let outcomes = items.outcomes(db, &rows, user_from_row, |_, replay| replay.user()).await?;
    one(outcomes).map_err(|error| match error {
        Error::UsernameTaken { .. } => Error::UsernameTaken { field: "username" },
        other => other,
    })
}

/// Deleting the row deletes the salt, and with it all meaning of the fingerprints that are
/// left. This request's own fingerprint is of an id only, so it takes no salt. `update_time` is
/// when the user was erased.
const EXPUNGE: Statement = on_users! {
    arrays: "$6::bigint[], $7::boolean[], $8::boolean[]",
    fields: "expected_revision, allow_missing, force",
    missing: "case when allow_missing then 0 else 3 end",
    salt: "null::bytea",
    has_changes: "true",
    outcome: "when c.delete_time is null and not i.force then 8
            when i.expected_revision not in (0, c.revision) then 5",
    shown: concat!("c.username, ", kept_fields!(), ", c.delete_time, c.purge_time"),
    writes: ", expunged as (
    delete from users u using accepted p where u.id = p.id
), change as (
    insert into user_changes (user_id, revision, kind)
    select id, revision, 5 from accepted
)"
};

/// Erases a user; returns when, or nothing if there was none and that is allowed.
pub async fn expunge(db: &Db, expunge: &Expunge) -> Result<Option<Timestamp>, Error> {
    let Expunge { id, expected_revision, allow_missing, force, .. } = expunge;
    let items = Items::one(expunge, &expunge.request_id, expunge.validate_only);
    let params: [Param<'_>; 3] = [&vec![*expected_revision], &vec![*allow_missing], &vec![*force]];
    let rows = items.run(db, &EXPUNGE, &[*id], &params).await?;
    let erased = |row: &Row| Ok(optional_user_from_row(row)?.and_then(|user| user.update_time));
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

/// The columns behind a user's.
const POSITION: usize = USER_COLUMN_COUNT;
const OUTCOME: usize = USER_COLUMN_COUNT + 1;
const CURRENT_REVISION: usize = USER_COLUMN_COUNT + 2;
const USER_ID: usize = USER_COLUMN_COUNT + 3;

impl<T> Items<'_, T> {
    /// Runs a statement on existing users.
    async fn run(
        &self,
        db: &Db,
        statement: &Statement,
        ids: &[Uuid],
        params: &[Param<'_>],
    ) -> Result<Vec<Row>, Error> {
        let sql = match self.locking {
            Locking::Wait => statement.wait,
            Locking::Skip => statement.skip,
        };
        let (request_ids, fingerprints) = self.requests();
        let first: [Param<'_>; 5] =
            [&self.is_atomic, &self.lock_timeout(), &request_ids, &fingerprints, &ids];
        let params: Vec<_> = first.into_iter().chain(params.iter().copied()).collect();
        self.run_again(db, sql, &params).await
    }

    /// Runs a statement, and again if a concurrent transaction was in its way: the next
    /// attempt sees what that one has done.
    async fn run_again(&self, db: &Db, sql: &'static str, params: &[Param<'_>]) -> Result<Vec<Row>, Error> {
        for _ in 0..ATTEMPTS {
            let rows = match db.run(self.access, sql, params).await {
                Err(Error::UsernameTaken { .. } | Error::UserIdTaken | Error::TransactionConflict) => {
                    continue;
                }
                ended => ended?,
            };
            // A row that was there for the snapshot, and gone after the wait for its lock.
            let has_vanished = |row| Ok(column::<i16>(row, OUTCOME)? == outcome::LOCKED);
            let is_raced = self.locking == Locking::Wait
                && rows.iter().map(has_vanished).collect::<Result<Vec<_>, Error>>()?.contains(&true);
            if !is_raced {
                return Ok(rows);
            }
        }
        Err(Error::TransactionConflict)
    }

    fn requests(&self) -> (Vec<Option<Uuid>>, Vec<&[u8]>) {
        self.request_ids.iter().map(|request| (request.id, request.fingerprint.as_slice())).unzip()
    }

    /// Which keys several items of an atomic batch have. The coalescer puts no two requests with
    /// the same key into one batch.
    fn repeated<K: Eq + Hash>(&self, keys: impl Iterator<Item = Option<K>> + Clone) -> Vec<bool> {
        if self.is_atomic { repeated(keys) } else { vec![false; self.items.len()] }
    }

    fn lock_timeout(&self) -> Option<&'static str> {
        (self.locking == Locking::Skip).then_some(SKIP_LOCK_TIMEOUT)
    }

    /// What became of independent items, in their order.
    async fn outcomes<R>(
        &self,
        db: &Db,
        rows: &[Row],
        from_row: impl Fn(&Row) -> Result<R, Error>,
        from_replay: impl Fn(&T, Replay) -> Result<R, Error>,
    ) -> Result<Vec<Outcome<R>>, Error> {
        let mut outcomes: Vec<Option<Outcome<R>>> = self.items.iter().map(|_| None).collect();
        for row in rows {
            let index = index(row)?;
            let (Some(slot), Some(item), Some(request_id)) =
                (outcomes.get_mut(index), self.items.get(index), self.request_ids.get(index))
            else {
                continue;
            };
            *slot = Some(match column(row, OUTCOME)? {
                outcome::DONE => Outcome::Done(from_row(row)?),
                outcome::LOCKED => Outcome::Locked,
                // A retry that overlaps its first attempt looks too early for the record, and then
                // finds the user as that attempt has left it. So each rejection looks again.
                code => {
                    let response = match replay(db, request_id, None).await {
                        Ok(Some(replay)) => from_replay(item, replay),
                        Ok(None) => Err(rejection(code, row)?),
                        Err(error) => Err(error),
                    };
                    response.map_or_else(Outcome::Rejected, Outcome::Done)
                }
            });
        }
        outcomes.into_iter().map(|outcome| outcome.ok_or(Error::Internal)).collect()
    }
}

impl<'a, T> Items<'a, T> {
    /// The only item of a request that shares its statement with no other.
    fn one(item: &'a T, request_id: &'a RequestId, validate_only: bool) -> Self {
        let access = Access::write(validate_only);
        Self::independent([(item, request_id)].into_iter(), access, Locking::Wait)
    }
}

/// The only outcome of a statement that waits for locks.
fn one<R>(outcomes: Vec<Outcome<R>>) -> Result<R, Error> {
    match outcomes.into_iter().next() {
        Some(Outcome::Done(response)) => Ok(response),
        Some(Outcome::Rejected(error)) => Err(error),
        Some(Outcome::Locked) | None => Err(Error::TransactionConflict),
    }
}

/// The users of an atomic batch, if it was done, now or by an earlier request with this id.
async fn batch_users<T>(
    db: &Db,
    batch: &Batch<T>,
    prefix: &str,
    rows: &[Row],
    missing: impl Fn(&T) -> Option<pb::User>,
) -> Result<Vec<pb::User>, Error> {
    let mut users: Vec<Option<pb::User>> = vec![None; batch.items.len()];
    let mut violations = Vec::new();
    for row in rows {
        let index = index(row)?;
        match column(row, OUTCOME)? {
            outcome::DONE => {
                if let Some(user) = users.get_mut(index) {
                    *user = optional_user_from_row(row)?;
                }
            }
            code => violations.push(rejection(code, row)?.into_item_violation(index, prefix)),
        }
    }
    if !violations.is_empty()
        && let Some(replay) = replay(db, &batch.request_id, Some(batch.items.len())).await?
    {
        users = replay.users.into_iter().map(Result::ok).collect();
        violations.clear();
    }
    if violations.is_empty() {
        for (index, (user, item)) in users.iter_mut().zip(&batch.items).enumerate() {
            *user = user.take().or_else(|| missing(item));
            if user.is_none() {
                let error = Error::UserNotFound { name: String::new() };
                violations.push(error.into_item_violation(index, prefix));
            }
        }
    }
    if violations.is_empty() {
        return Ok(users.into_iter().flatten().collect());
    }
    violations.sort_by_key(|violation| violation.element.map(|element| element.index));
    Err(Error::Conflicts(violations))
}

/// The position of a row's item, from 0 on.
fn index(row: &Row) -> Result<usize, Error> {
    usize::try_from(column::<i64>(row, POSITION)? - 1).map_err(|_| Error::Internal)
}

/// Why an item was not done.
fn rejection(code: i16, row: &Row) -> Result<Error, Error> {
    Ok(match code {
        outcome::NOT_FOUND => Error::UserNotFound { name: column::<Uuid>(row, USER_ID)?.to_string() },
        outcome::DELETED => Error::UserDeleted,
        outcome::MISMATCH => Error::RevisionMismatch { current: column(row, CURRENT_REVISION)? },
        outcome::USERNAME_TAKEN => Error::UsernameTaken { field: "user.username" },
        outcome::ID_TAKEN => Error::UserIdTaken,
        outcome::NOT_DELETED => Error::UserNotDeleted,
        outcome::USERNAME_RELEASED => Error::UsernameReleased,
        // The record was purged between two statements.
        outcome::REPLAY => Error::TransactionConflict,
        _ => Error::Internal,
    })
}

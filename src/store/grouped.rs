//! The statements on several users at once, for calls that are gathered.
//!
//! Each does for many what a statement of `users.rs` does for one, as long as it is
//! plain: what meets a conflict, a retry or a wrong revision is left out, and what
//! meets another transaction's lock fails the group after a tenth of a second. Rows
//! are locked in one order, so that two groups never wait for each other.

use std::{
    collections::HashMap,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    sync::Arc,
};

use tokio_postgres::Row;
use uuid::Uuid;

use crate::api::coalescer::{Answers, Sharing, Work};
use crate::error::{Access, Error};
use crate::model::request::{Create, Delete, RequestId, Update, UserKey};
use crate::pb;
use crate::store::pool::{Db, Params};
use crate::store::user_row::{Changes, NewUsers};
use crate::store::users::{self, ID, USER_COLUMN_COUNT, column, user_columns, user_from_row};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[GET, CREATE, UPDATE, DELETE];

/// The calls of a group as rows, under other names than the columns of `users`, in
/// the order in which they lock. Not among them are requests that were made before,
/// alone or in another group.
macro_rules! input {
    ($arrays:literal, $names:literal, $order:literal) => {
        concat!(
            "with input as (
    select i.*
    from (select set_config('lock_timeout', '100ms', true)) as patience,
        unnest($1::uuid[], $2::bytea[], $3::uuid[], ",
            $arrays,
            ") as i (request_id, fingerprint, user_id, ",
            $names,
            ")
    where not exists (select from requests r where r.request_id = i.request_id)
    order by ",
            $order,
            "
)"
        )
    };
}

/// Records the requests of a group. If one was made in this moment, by somebody
/// else or twice in this group, that fails the group.
macro_rules! record_requests {
    ($from:literal) => {
        concat!(
            "recorded as (
    insert into requests (request_id, fingerprint, is_salted, user_id, expire_time)
    select request_id, sha256(fingerprint || salt), true, user_id, now() + interval '24 hours'
    from ",
            $from,
            " where request_id is not null
)"
        )
    };
}

const GET: &str = concat!(
    "select ",
    user_columns!(),
    ", null as username_key from users where id = any($1)
union all
select ",
    user_columns!(),
    ", username_key from users where username_key = any($2) and username_held"
);

/// `GetUser` calls.
pub struct Gets(pub Arc<Db>);

impl Work for Gets {
    type Call = UserKey;
    type Answer = pb::User;

    fn sharing(_: &UserKey) -> Sharing {
        Sharing::All
    }

    async fn alone(&self, key: &UserKey) -> Result<pb::User, Error> {
        users::get(&self.0, key).await
    }

    async fn together(&self, keys: &[UserKey]) -> Result<Answers<Self>, Error> {
        let (mut ids, mut names) = (Vec::new(), Vec::new());
        for key in keys {
            match key {
                UserKey::Id(id) => ids.push(id),
                UserKey::Username(username) => names.push(username.canonical()),
            }
        }
        // PostgreSQL sorts them anyway, but not as fast.
        ids.sort_unstable();
        let rows = self.0.run(Access::Read, GET, &[&ids, &names]).await?;
        let (mut by_id, mut by_name) =
            (HashMap::with_capacity(ids.len()), HashMap::with_capacity(names.len()));
        for row in &rows {
            match column::<Option<&str>>(row, USER_COLUMN_COUNT)? {
                None => by_id.insert(column::<Uuid>(row, ID)?, row),
                Some(name) => by_name.insert(name, row),
            };
        }
        let find = |key: &UserKey| {
            let row = match key {
                UserKey::Id(id) => by_id.get(id),
                UserKey::Username(username) => by_name.get(username.canonical()),
            };
            row.map_or_else(|| Err(users::key_not_found(key)), |row| user_from_row(row))
        };
        Ok(keys.iter().map(|key| Some(find(key))).collect())
    }
}

/// Who asks for a username that somebody has is left out. If somebody takes it in
/// this moment, or if only the id is taken, that fails the group. (`on conflict do
/// nothing` would not, but every row would pay for it.) What is `fresh` is created, all
/// of it, so nothing that is written needs to be joined with what was asked.
const CREATE: &str = concat!(
    input!(
        "$4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::bytea[]",
        "new_username, new_username_key, new_email, new_email_key, new_display_name, salt",
        "new_username_key"
    ),
    ", fresh as (
    select * from input
    where not exists (select from users where username_key = new_username_key and username_held)
), created as (
    insert into users (
        id, username, username_key, username_held, email, email_key, display_name,
        revision, create_time, update_time, fingerprint_salt
    )
    select user_id, new_username, new_username_key, true, new_email, new_email_key, new_display_name,
        1, now(), now(), salt
    from fresh
), ",
    record_requests!("fresh"),
    ", change as (
    insert into user_changes (user_id, revision, kind) select user_id, 1, 1 from fresh
)
select user_id, new_username, new_email, new_display_name, now(), now(),
    null::timestamptz, null::timestamptz, 1::bigint
from fresh"
);

/// `CreateUser` calls.
pub struct Creates(pub Arc<Db>);

impl Work for Creates {
    type Call = Create;
    type Answer = pb::User;

    fn sharing(create: &Create) -> Sharing {
        // Only one of those who ask for the same username can have it.
        let username =
            BuildHasherDefault::<DefaultHasher>::default().hash_one(create.user.username.canonical());
        if create.validate_only { Sharing::Nobody } else { Sharing::Others(username.into()) }
    }

    async fn alone(&self, create: &Create) -> Result<pb::User, Error> {
        users::create(&self.0, create).await
    }

    async fn together(&self, calls: &[Create]) -> Result<Answers<Self>, Error> {
        let (request_ids, fingerprints) = requests(calls.iter().map(|call| &call.request_id));
        let users: NewUsers<'_> = calls.iter().map(|call| &call.user).collect();
        let params: Params<'_> = &[
            &request_ids,
            &fingerprints,
            &users.ids,
            &users.usernames,
            &users.username_keys,
            &users.emails,
            &users.email_keys,
            &users.display_names,
            &users.salts,
        ];
        answers(&self.0.run(Access::Write, CREATE, params).await?, &users.ids)
    }
}

/// An update that changes nothing is left out, and one of the username never comes
/// here: it could fail the whole group. A row that somebody else changes while this
/// waits for it is looked at again; if it was not eligible before, nobody does, and
/// the call is left out.
const UPDATE: &str = concat!(
    input!(
        "$4::bigint[], $5::text[], $6::text[], $7::text[]",
        "expected_revision, new_email, new_email_key, new_display_name",
        "user_id"
    ),
    ", updated as (
    update users set
        email = coalesce(new_email, email),
        email_key = coalesce(new_email_key, email_key),
        display_name = coalesce(new_display_name, display_name),
        revision = revision + 1,
        update_time = greatest(now(), update_time)
    from input
    where id = user_id
        and delete_time is null
        and expected_revision in (0, revision)
        and (email, display_name) is distinct from
            (coalesce(new_email, email), coalesce(new_display_name, display_name))
    returning ",
    user_columns!(),
    ", request_id, fingerprint, fingerprint_salt as salt, user_id
), ",
    record_requests!("updated"),
    ", change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 2 from updated
)
select ",
    user_columns!(),
    " from updated"
);

/// `UpdateUser` calls.
pub struct Updates(pub Arc<Db>);

impl Work for Updates {
    type Call = Update;
    type Answer = pb::User;

    fn sharing(update: &Update) -> Sharing {
        let is_plain = !update.validate_only && update.change.username.is_none();
        if is_plain { Sharing::Others(update.change.id.as_u128()) } else { Sharing::Nobody }
    }

    async fn alone(&self, update: &Update) -> Result<pb::User, Error> {
        users::update(&self.0, update).await
    }

    async fn together(&self, calls: &[Update]) -> Result<Answers<Self>, Error> {
        let (request_ids, fingerprints) = requests(calls.iter().map(|call| &call.request_id));
        let changes: Changes<'_> = calls.iter().map(|call| &call.change).collect();
        let params: Params<'_> = &[
            &request_ids,
            &fingerprints,
            &changes.ids,
            &changes.expected_revisions,
            &changes.emails,
            &changes.email_keys,
            &changes.display_names,
        ];
        answers(&self.0.run(Access::Write, UPDATE, params).await?, &changes.ids)
    }
}

/// As [`UPDATE`].
const DELETE: &str = concat!(
    input!("$4::bigint[], $5::boolean[]", "expected_revision, release_username", "user_id"),
    ", deleted as (
    update users set
        delete_time = now(),
        purge_time = now() + interval '30 days',
        username_held = not release_username,
        revision = revision + 1,
        update_time = greatest(now(), update_time)
    from input
    where id = user_id and delete_time is null and expected_revision in (0, revision)
    returning ",
    user_columns!(),
    ", request_id, fingerprint, fingerprint_salt as salt, user_id
), ",
    record_requests!("deleted"),
    ", change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 3 from deleted
)
select ",
    user_columns!(),
    " from deleted"
);

/// `DeleteUser` calls.
pub struct Deletes(pub Arc<Db>);

impl Work for Deletes {
    type Call = Delete;
    type Answer = Option<pb::User>;

    fn sharing(delete: &Delete) -> Sharing {
        if delete.validate_only { Sharing::Nobody } else { Sharing::Others(delete.id.as_u128()) }
    }

    async fn alone(&self, delete: &Delete) -> Result<Option<pb::User>, Error> {
        users::delete(&self.0, delete).await
    }

    async fn together(&self, calls: &[Delete]) -> Result<Answers<Self>, Error> {
        let (request_ids, fingerprints) = requests(calls.iter().map(|call| &call.request_id));
        let ids: Vec<Uuid> = calls.iter().map(|call| call.id).collect();
        let expected_revisions: Vec<i64> = calls.iter().map(|call| call.expected_revision).collect();
        let release_usernames: Vec<bool> = calls.iter().map(|call| call.release_username).collect();
        let params: Params<'_> =
            &[&request_ids, &fingerprints, &ids, &expected_revisions, &release_usernames];
        let deleted = answers(&self.0.run(Access::Write, DELETE, params).await?, &ids)?;
        Ok(deleted.into_iter().map(|answer| answer.map(|user| user.map(Some))).collect())
    }
}

/// The request ids and fingerprints of a group, as parameters.
fn requests<'a>(calls: impl Iterator<Item = &'a RequestId>) -> (Vec<Option<Uuid>>, Vec<&'a [u8]>) {
    calls.map(|request| (request.id, request.fingerprint.as_slice())).unzip()
}

/// The users that a statement returned, in the order in which they were asked for.
fn answers(rows: &[Row], ids: &[Uuid]) -> Result<Vec<Option<Result<pb::User, Error>>>, Error> {
    let mut by_id = HashMap::with_capacity(rows.len());
    for row in rows {
        by_id.insert(column::<Uuid>(row, ID)?, row);
    }
    Ok(ids.iter().map(|id| by_id.get(id).map(|row| user_from_row(row))).collect())
}

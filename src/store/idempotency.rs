//! Request ids: recorded by the statement that makes the change, looked up for retries.

use std::{slice, time::SystemTime};

use uuid::Uuid;

use crate::error::{Access, Error};
use crate::model::fields::RequestId;
use crate::pb;
use crate::pb::ErrorReason as Reason;
use crate::store::pool::Db;
use crate::store::user_row::{USER_COLUMN_COUNT, column, optional_user_from_row, user_columns};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[REPLAY];

/// Records the request ids of a relation of items, each hashed with the salts of its users:
/// `each` item has its own, or `all` have the same. A record that another transaction has made
/// since this statement began is a unique violation; the next attempt sees it and is a retry.
macro_rules! record_requests {
    (each $from:literal) => {
        concat!(
            "recorded as (
    insert into requests (request_id, fingerprint, is_salted, user_id, user_ids, expire_time)
    select request_id, coalesce(sha256(fingerprint || fingerprint_salt), fingerprint),
        fingerprint_salt is not null, user_id, null, now() + interval '24 hours'
    from ",
            $from,
            " where request_id is not null
)"
        )
    };
    (all $from:literal) => {
        concat!(
            "recorded as (
    insert into requests (request_id, fingerprint, is_salted, user_id, user_ids, expire_time)
    select request_id,
        coalesce(sha256(fingerprint || string_agg(fingerprint_salt, '' order by n)), fingerprint),
        count(fingerprint_salt) > 0, (array_agg(user_id order by n))[1], array_agg(user_id order by n),
        now() + interval '24 hours'
    from ",
            $from,
            " where request_id is not null group by request_id, fingerprint
)"
        )
    };
}
pub(crate) use record_requests;

/// The users of a recorded request as they now are, null where one was erased.
const REPLAY: &str = concat!(
    "with recorded as materialized (
    select fingerprint, is_salted, expire_time, user_ids is not null as is_batch, member, n
    from requests, unnest(coalesce(user_ids, array[user_id])) with ordinality as i (member, n)
    where request_id = $1
), found as materialized (
    select ",
    user_columns!(),
    ", member, n, expire_time, is_batch, is_salted, fingerprint, fingerprint_salt
    from recorded left join users on id = member
)
select ",
    user_columns!(),
    ", member, expire_time - interval '24 hours', is_batch, case
        when fingerprint = case
            when is_salted
            then sha256($2::bytea || (select string_agg(fingerprint_salt, '' order by n) from found))
            else $2
        end then true
        when is_salted and (select bool_or(id is null) from found) then null
        else false
    end
from found order by n"
);

/// The users that a request is about: the ids that it gives.
pub(crate) enum Shape<'a> {
    One(Option<Uuid>),
    Batch(&'a [Option<Uuid>]),
}

/// What a recorded request did.
pub(crate) struct Replay {
    /// Its users as they now are; `Err` has the id of an erased one.
    pub(crate) users: Vec<Result<pb::User, Uuid>>,
    /// When it was made.
    pub(crate) time: SystemTime,
    /// Whether it had the same content; unknown once a user of it is erased.
    pub(crate) is_same: Option<bool>,
}

impl Replay {
    /// The first user, or that it does not exist any more.
    pub(crate) fn user(self) -> Result<pb::User, Error> {
        let first = self.users.into_iter().next().unwrap_or(Err(Uuid::nil()));
        first.map_err(|id| Error::UserNotFound { name: id.to_string() })
    }
}

/// Finds what the request with this id did, if there is an id and it is recorded. Fails with
/// `REQUEST_ID_REUSED` if it had another shape or other content. Once a user of it is erased, its
/// salt is gone, and only the shape is known.
pub(crate) async fn replay(
    db: &Db,
    request_id: &RequestId,
    shape: Shape<'_>,
) -> Result<Option<Replay>, Error> {
    if request_id.id.is_none() {
        return Ok(None);
    }
    let rows = db.run(Access::Read, REPLAY, &[&request_id.id, &request_id.fingerprint]).await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let (mut users, mut ids) = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
    for row in &rows {
        let id = column(row, USER_COLUMN_COUNT)?;
        users.push(optional_user_from_row(row)?.ok_or(id));
        ids.push(id);
    }
    let is_same: Option<bool> = column(first, USER_COLUMN_COUNT + 3)?;
    let (given, is_batch) = match &shape {
        Shape::One(id) => (slice::from_ref(id), false),
        Shape::Batch(ids) => (*ids, true),
    };
    let has_same_shape = is_batch == column::<bool>(first, USER_COLUMN_COUNT + 2)?
        && given.len() == ids.len()
        && given.iter().zip(&ids).all(|(given, id)| given.is_none_or(|given| given == *id));
    if !has_same_shape || is_same == Some(false) {
        let what = "was used for a request with other content";
        return Err(Error::invalid("request_id", Reason::RequestIdReused, what));
    }
    Ok(Some(Replay { users, time: column(first, USER_COLUMN_COUNT + 1)?, is_same }))
}

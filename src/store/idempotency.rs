//! Request ids: recorded by the statement that makes the change, looked up for retries.

use std::time::SystemTime;

use uuid::Uuid;

use crate::error::{Access, Error};
use crate::model::fields::RequestId;
use crate::pb;
use crate::pb::ErrorReason as Reason;
use crate::store::pool::Db;
use crate::store::user_row::{USER_COLUMN_COUNT, column, optional_user_from_row, user_columns};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[REPLAY];

/// Records the request ids of accepted items, each hashed with the salts of its users: one a row,
/// or with `$1` one for all rows. A record that another transaction has made since this
/// statement began is a unique violation; the next attempt sees it and is a retry.
macro_rules! record_requests {
    ($from:literal) => {
        concat!(
            "recorded as (
    insert into requests (request_id, fingerprint, is_salted, user_id, user_ids, expire_time)
    select request_id, coalesce(sha256(fingerprint || fingerprint_salt), fingerprint),
        fingerprint_salt is not null, user_id, null, now() + interval '24 hours'
    from ",
            $from,
            " where request_id is not null and not $1::boolean
    union all
    select (array_agg(request_id))[1],
        coalesce(
            sha256((array_agg(fingerprint))[1] || string_agg(fingerprint_salt, '' order by n)),
            (array_agg(fingerprint))[1]
        ),
        count(fingerprint_salt) > 0, (array_agg(user_id order by n))[1], array_agg(user_id order by n),
        now() + interval '24 hours'
    from ",
            $from,
            " where request_id is not null and $1::boolean
    having count(*) > 0
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
/// `REQUEST_ID_REUSED` if it had other content; that is unknown once a user of it is erased,
/// because its salt is gone too.
///
/// `batch_len` is the number of items; `None` for a request about one user.
pub(crate) async fn replay(
    db: &Db,
    request_id: &RequestId,
    batch_len: Option<usize>,
) -> Result<Option<Replay>, Error> {
    if request_id.id.is_none() {
        return Ok(None);
    }
    let rows = db.run(Access::Read, REPLAY, &[&request_id.id, &request_id.fingerprint]).await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let mut users = Vec::with_capacity(rows.len());
    for row in &rows {
        let id = column(row, USER_COLUMN_COUNT)?;
        users.push(optional_user_from_row(row)?.ok_or(id));
    }
    let is_batch: bool = column(first, USER_COLUMN_COUNT + 2)?;
    let is_same: Option<bool> = column(first, USER_COLUMN_COUNT + 3)?;
    let has_same_shape = is_batch == batch_len.is_some() && batch_len.is_none_or(|len| len == rows.len());
    if !has_same_shape || is_same == Some(false) {
        let what = "was used for a request with other content";
        return Err(Error::invalid("request_id", Reason::RequestIdReused, what));
    }
    Ok(Some(Replay { users, time: column(first, USER_COLUMN_COUNT + 1)?, is_same }))
}

//! The statement that finds many users by keys of all kinds.

use std::collections::{HashMap, hash_map::Entry};

use uuid::Uuid;

use crate::error::{Access, Error};
use crate::model::request::{Lookup, LookupKey};
use crate::pb;
use crate::store::pool::Db;
use crate::store::users::{ID, USER_COLUMN_COUNT, column, user_columns, user_from_row};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[LOOKUP];

/// Users that are returned for one e-mail address, at most. With as many for each
/// of a thousand keys, and each as large as a user can be (1 KiB), the answer still
/// fits into the 4 MiB that clients accept.
pub const USERS_PER_EMAIL_MAX: usize = 4;

/// Each user with the key that found it, unless that was its id; of an e-mail
/// address, one user more than are returned. Live and deleted users have indexes of
/// their own.
const LOOKUP: &str = concat!(
    "select ",
    user_columns!(),
    ", null as username_key, null as email_key from users
where id = any($1) and ($4::boolean or delete_time is null)
union all
select ",
    user_columns!(),
    ", username_key, null from users
where username_key = any($2) and username_held and ($4 or delete_time is null)
union all
select owner.*, null, wanted.email_key from unnest($3::text[]) as wanted (email_key), lateral (
    select ",
    user_columns!(),
    " from (
        (select * from users where email_key = wanted.email_key and delete_time is null
        order by create_time, id limit $5)
        union all
        (select * from users where $4 and email_key = wanted.email_key and delete_time is not null
        order by create_time, id limit $5)
    ) as both_walks order by create_time, id limit $5
) as owner"
);

/// What a user is found by: an id, or the key of a name.
#[derive(PartialEq, Eq, Hash)]
enum Found<'a> {
    Id(Uuid),
    Username(&'a str),
    Email(&'a str),
}

impl<'a> From<&'a LookupKey> for Found<'a> {
    fn from(key: &'a LookupKey) -> Self {
        match key {
            LookupKey::Id(id) => Self::Id(*id),
            LookupKey::Username(username) => Self::Username(username.canonical()),
            LookupKey::Email(email) => Self::Email(email.canonical()),
        }
    }
}

/// Returns who has each of the keys, in their order.
pub async fn lookup(db: &Db, lookup: &Lookup) -> Result<Vec<pb::LookupUsersResult>, Error> {
    let (mut ids, mut usernames, mut emails) = (Vec::new(), Vec::new(), Vec::new());
    // Where a key stands, first of all, and where else.
    let (mut first, mut again) = (HashMap::with_capacity(lookup.keys.len()), Vec::new());
    for (index, key) in lookup.keys.iter().map(Found::from).enumerate() {
        match first.entry(key) {
            Entry::Occupied(known) => again.push((index, *known.get())),
            Entry::Vacant(new) => {
                match new.key() {
                    Found::Id(id) => ids.push(*id),
                    Found::Username(key) => usernames.push(*key),
                    Found::Email(key) => emails.push(*key),
                }
                new.insert(index);
            }
        }
    }
    // PostgreSQL sorts them anyway, but not as fast.
    ids.sort_unstable();
    let limit = i64::try_from(USERS_PER_EMAIL_MAX + 1).unwrap_or(i64::MAX);
    let rows =
        db.run(Access::Read, LOOKUP, &[&ids, &usernames, &emails, &lookup.include_deleted, &limit]).await?;
    let mut results = vec![pb::LookupUsersResult::default(); lookup.keys.len()];
    for row in &rows {
        let found = match (column(row, USER_COLUMN_COUNT)?, column(row, USER_COLUMN_COUNT + 1)?) {
            (Some(username), _) => Found::Username(username),
            (None, Some(email)) => Found::Email(email),
            (None, None) => Found::Id(column(row, ID)?),
        };
        let result = first.get(&found).and_then(|index| results.get_mut(*index));
        result.ok_or(Error::Internal)?.users.push(user_from_row(row)?);
    }
    for result in results.iter_mut().filter(|result| result.users.len() > 1) {
        let age =
            |user: &pb::User| (user.create_time.map(|time| (time.seconds, time.nanos)), user.id.clone());
        result.users.sort_by_cached_key(age);
        result.has_more = result.users.len() > USERS_PER_EMAIL_MAX;
        result.users.truncate(USERS_PER_EMAIL_MAX);
    }
    for (index, first) in again {
        let same = results.get(first).cloned().unwrap_or_default();
        if let Some(result) = results.get_mut(index) {
            *result = same;
        }
    }
    Ok(results)
}

//! The statements that find users by keys.

use std::collections::HashMap;

use crate::error::{Access, Error};
use crate::model::batch::Lookup;
use crate::model::names::Email;
use crate::model::user::{CanonicalKey, UserKey};
use crate::model::view::View;
use crate::pb;
use crate::store::pool::Db;
use crate::store::user_row::{ID, USER_COLUMN_COUNT, column, user_columns, user_from_row};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[GET_BY_ID, GET, LOOKUP];

/// How many users are returned for one e-mail address. With as many for each of a thousand
/// keys, each user as large as it can be (1 KiB), the response still fits into 4 MiB.
const USERS_PER_EMAIL_MAX: usize = 4;

/// The statement of [`get`] for ids only: most requests have one.
const GET_BY_ID: &str =
    concat!("select ", user_columns!(), ", null as username_key from users where id = any($1)");

const GET: &str = concat!(
    "select ",
    user_columns!(),
    ", null as username_key from users where id = any($1)
union all
select ",
    user_columns!(),
    ", username_key from users where username_key = any($2) and username_held"
);

/// Returns the users with these ids or usernames, soft-deleted or not, in the order of the
/// keys. E-mail addresses are for [`get_by_email`].
pub async fn get(db: &Db, keys: &[UserKey]) -> Result<Vec<Result<pb::User, Error>>, Error> {
    let (mut ids, mut usernames) = (Vec::new(), Vec::new());
    for key in keys.iter().map(UserKey::canonical) {
        match key {
            CanonicalKey::Id(id) => ids.push(id),
            CanonicalKey::Username(username) => usernames.push(username),
            CanonicalKey::Email(_) => {}
        }
    }
    // PostgreSQL sorts them anyway, but not as fast.
    ids.sort_unstable();
    let rows = match usernames.is_empty() {
        true => db.run(Access::Read, GET_BY_ID, &[&ids]).await?,
        false => db.run(Access::Read, GET, &[&ids, &usernames]).await?,
    };
    let mut found = HashMap::with_capacity(rows.len());
    for row in &rows {
        let key = match column(row, USER_COLUMN_COUNT)? {
            Some(username) => CanonicalKey::Username(username),
            None => CanonicalKey::Id(column(row, ID)?),
        };
        found.insert(key, row);
    }
    let find = |key: &UserKey| match found.get(&key.canonical()) {
        Some(row) => user_from_row(row),
        None => Err(Error::UserNotFound { name: key.as_entered() }),
    };
    Ok(keys.iter().map(find).collect())
}

/// Returns the only live user with this e-mail address.
pub async fn get_by_email(db: &Db, email: Email) -> Result<pb::User, Error> {
    let name = email.as_entered().to_owned();
    let request = Lookup { keys: vec![UserKey::Email(email)], include_deleted: false, view: View::Full };
    let users = lookup(db, &request).await?.into_iter().next().unwrap_or_default().users;
    match <[pb::User; 1]>::try_from(users) {
        Ok([user]) => Ok(user),
        Err(users) if users.is_empty() => Err(Error::UserNotFound { name }),
        Err(_) => Err(Error::EmailAmbiguous),
    }
}

/// Each user with the key that found it, unless that was its id; of an e-mail address, one
/// user more than is returned. Live and deleted users have indexes of their own.
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

/// Returns the users with each of the keys, in their order.
pub async fn lookup(db: &Db, lookup: &Lookup) -> Result<Vec<pb::LookupUsersResult>, Error> {
    let (mut ids, mut usernames, mut emails) = (Vec::new(), Vec::new(), Vec::new());
    let mut positions = HashMap::with_capacity(lookup.keys.len());
    for (position, key) in lookup.keys.iter().map(UserKey::canonical).enumerate() {
        match key {
            CanonicalKey::Id(id) => ids.push(id),
            CanonicalKey::Username(username) => usernames.push(username),
            CanonicalKey::Email(email) => emails.push(email),
        }
        positions.insert(key, position);
    }
    // PostgreSQL sorts them anyway, but not as fast.
    ids.sort_unstable();
    let limit = i64::try_from(USERS_PER_EMAIL_MAX + 1).unwrap_or(i64::MAX);
    let rows =
        db.run(Access::Read, LOOKUP, &[&ids, &usernames, &emails, &lookup.include_deleted, &limit]).await?;
    let mut results = vec![pb::LookupUsersResult::default(); lookup.keys.len()];
    for row in &rows {
        let key = match (column(row, USER_COLUMN_COUNT)?, column(row, USER_COLUMN_COUNT + 1)?) {
            (Some(username), _) => CanonicalKey::Username(username),
            (None, Some(email)) => CanonicalKey::Email(email),
            (None, None) => CanonicalKey::Id(column(row, ID)?),
        };
        let result = positions.get(&key).and_then(|position| results.get_mut(*position));
        result.ok_or(Error::Internal)?.users.push(user_from_row(row)?);
    }
    for result in results.iter_mut().filter(|result| result.users.len() > 1) {
        let age =
            |user: &pb::User| (user.create_time.map(|time| (time.seconds, time.nanos)), user.id.clone());
        result.users.sort_by_cached_key(age);
        result.has_more = result.users.len() > USERS_PER_EMAIL_MAX;
        result.users.truncate(USERS_PER_EMAIL_MAX);
    }
    Ok(results)
}

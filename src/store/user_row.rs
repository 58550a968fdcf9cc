//! The columns of `users`: the only place that lists them.
//!
//! A statement for many users takes their fields as arrays, one a column, and takes them
//! apart with `unnest`. Each list below stands beside the code that fills or reads it.

use std::time::SystemTime;

use tokio_postgres::{Row, types::FromSql};
use uuid::Uuid;

use crate::error::Error;
use crate::model::names::{Email, NORM_VERSION, Username};
use crate::model::user::{NewUser, UserPatch};
use crate::pb;
use crate::store::pool::Param;
use crate::telemetry::describe;

/// The columns that [`user_from_row`] reads, in its order. They come first in every row that
/// holds a user.
macro_rules! user_columns {
    () => {
        "id, username, email, display_name, create_time, update_time, delete_time, purge_time, revision"
    };
}
/// The same columns of a row without a user.
macro_rules! no_user {
    () => {
        "null, null, null, null, null, null, null, null, null"
    };
}
/// The fields of the user in `c` that only an update changes, without the username.
macro_rules! kept_fields {
    () => {
        "c.email, c.display_name"
    };
}
pub(crate) use {kept_fields, no_user, user_columns};

pub(crate) const ID: usize = 0;
pub(crate) const CREATE_TIME: usize = 4;
/// The first column behind them: what a statement says about the user.
pub(crate) const USER_COLUMN_COUNT: usize = 9;

/// The only way from a row to a user.
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

/// The user of a row, if there is one.
pub(crate) fn optional_user_from_row(row: &Row) -> Result<Option<pb::User>, Error> {
    let id: Option<Uuid> = column(row, ID)?;
    id.map(|_| user_from_row(row)).transpose()
}

/// One more column of a row.
pub(crate) fn column<'a, T: FromSql<'a>>(row: &'a Row, index: usize) -> Result<T, Error> {
    row.try_get(index).map_err(unreadable)
}

fn unreadable(error: tokio_postgres::Error) -> Error {
    tracing::error!(error = describe(&error), "a row does not have the columns of its statement");
    Error::Internal
}

/// The version of the name rules that make the keys of a row. See [`NORM_VERSION`].
macro_rules! norm_version {
    () => {
        "1"
    };
}
pub(crate) use norm_version;
const _: () = assert!(NORM_VERSION == 1);

/// New users as rows: the parameters that [`NewUsers::params`] makes, and their names, which
/// are those of the columns.
macro_rules! new_user_arrays {
    () => {
        "$6::uuid[], $7::boolean[], $8::text[], $9::text[], $10::text[], $11::text[], $12::text[], $13::bytea[]"
    };
}
macro_rules! new_user_fields {
    () => {
        "id, has_given_id, username, username_key, email, email_key, display_name, fingerprint_salt"
    };
}
pub(crate) use {new_user_arrays, new_user_fields};

/// Creates the users of a relation with the columns of `new_user_fields!`. Usernames are
/// inserted in order, so that two statements never wait for each other.
macro_rules! insert_users {
    ($from:literal) => {
        concat!(
            "insert into users (
        id, username, username_key, email, email_key, display_name, fingerprint_salt, norm_version,
        username_held, revision, create_time, update_time
    )
    select id, username, username_key, email, email_key, display_name, fingerprint_salt, ",
            $crate::store::user_row::norm_version!(),
            ", true, 1, now(), now()
    from ",
            $from,
            " order by username_key"
        )
    };
}
pub(crate) use insert_users;

/// Users to create, as arrays.
#[derive(Default)]
pub(crate) struct NewUsers<'a> {
    pub(crate) ids: Vec<Uuid>,
    have_given_ids: Vec<bool>,
    usernames: Vec<&'a str>,
    pub(crate) username_keys: Vec<&'a str>,
    emails: Vec<&'a str>,
    email_keys: Vec<&'a str>,
    display_names: Vec<&'a str>,
    fingerprint_salts: Vec<&'a [u8]>,
}

impl<'a> FromIterator<&'a NewUser> for NewUsers<'a> {
    fn from_iter<I: IntoIterator<Item = &'a NewUser>>(users: I) -> Self {
        let mut arrays = Self::default();
        for NewUser { id, has_given_id, username, email, display_name, fingerprint_salt } in users {
            arrays.ids.push(*id);
            arrays.have_given_ids.push(*has_given_id);
            arrays.usernames.push(username.as_entered());
            arrays.username_keys.push(username.canonical());
            arrays.emails.push(email.as_entered());
            arrays.email_keys.push(email.canonical());
            arrays.display_names.push(display_name);
            arrays.fingerprint_salts.push(fingerprint_salt);
        }
        arrays
    }
}

impl NewUsers<'_> {
    /// The parameters of a statement: `$1` to `$5`, and behind them the arrays.
    pub(crate) fn params<'p>(&'p self, first: [Param<'p>; 5]) -> Vec<Param<'p>> {
        let arrays: [Param<'p>; 8] = [
            &self.ids,
            &self.have_given_ids,
            &self.usernames,
            &self.username_keys,
            &self.emails,
            &self.email_keys,
            &self.display_names,
            &self.fingerprint_salts,
        ];
        first.into_iter().chain(arrays).collect()
    }
}

/// Patches as rows: the parameters that [`Patches::params`] makes, and their names. Null
/// keeps the stored value.
macro_rules! patch_arrays {
    () => {
        "$8::bigint[], $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::boolean[]"
    };
}
macro_rules! patch_fields {
    () => {
        "expected_revision, new_username, new_username_key, new_email, new_email_key, new_display_name,
        release_username"
    };
}
/// Whether the patch in `i` changes the user in `c`.
macro_rules! has_changes {
    () => {
        "(c.username, c.email, c.display_name) is distinct from (
            coalesce(i.new_username, c.username), coalesce(i.new_email, c.email),
            coalesce(i.new_display_name, c.display_name)
        )"
    };
}
/// The fields of the user in `c` with the patch in `i`. Both keys have to be new for the row
/// to be of the current version.
macro_rules! patched_fields {
    () => {
        concat!(
            "coalesce(i.new_username, c.username) as username,
        coalesce(i.new_username_key, c.username_key) as username_key,
        coalesce(i.new_email, c.email) as email,
        coalesce(i.new_email_key, c.email_key) as email_key,
        coalesce(i.new_display_name, c.display_name) as display_name,
        case when i.new_username_key is null or i.new_email_key is null
            then least(c.norm_version, ",
            $crate::store::user_row::norm_version!(),
            ") else ",
            $crate::store::user_row::norm_version!(),
            " end as norm_version"
        )
    };
}
/// Writes the fields of the patched user in `p`.
macro_rules! set_patched_fields {
    () => {
        "username = p.username, username_key = p.username_key, email = p.email, email_key = p.email_key,
        display_name = p.display_name, norm_version = p.norm_version"
    };
}
pub(crate) use {has_changes, patch_arrays, patch_fields, patched_fields, set_patched_fields};

/// Patches, as arrays.
#[derive(Default)]
pub(crate) struct Patches<'a> {
    pub(crate) ids: Vec<Uuid>,
    expected_revisions: Vec<i64>,
    usernames: Vec<Option<&'a str>>,
    pub(crate) username_keys: Vec<Option<&'a str>>,
    emails: Vec<Option<&'a str>>,
    email_keys: Vec<Option<&'a str>>,
    display_names: Vec<Option<&'a str>>,
    release_usernames: Vec<bool>,
}

impl<'a> FromIterator<&'a UserPatch> for Patches<'a> {
    fn from_iter<I: IntoIterator<Item = &'a UserPatch>>(patches: I) -> Self {
        let mut arrays = Self::default();
        for UserPatch { id, expected_revision, username, email, display_name, release_username } in patches {
            arrays.ids.push(*id);
            arrays.expected_revisions.push(*expected_revision);
            arrays.usernames.push(username.as_ref().map(Username::as_entered));
            arrays.username_keys.push(username.as_ref().map(Username::canonical));
            arrays.emails.push(email.as_ref().map(Email::as_entered));
            arrays.email_keys.push(email.as_ref().map(Email::canonical));
            arrays.display_names.push(display_name.as_deref());
            arrays.release_usernames.push(*release_username);
        }
        arrays
    }
}

impl Patches<'_> {
    /// The arrays, from `$8` on.
    pub(crate) fn params(&self) -> [Param<'_>; 7] {
        [
            &self.expected_revisions,
            &self.usernames,
            &self.username_keys,
            &self.emails,
            &self.email_keys,
            &self.display_names,
            &self.release_usernames,
        ]
    }
}

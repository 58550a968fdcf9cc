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
pub(crate) use user_columns;

pub(crate) const ID: usize = 0;
pub(crate) const CREATE_TIME: usize = 4;
pub(crate) const REVISION: usize = 8;
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
            revision: row.try_get(REVISION)?,
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
        "$4::uuid[], $5::boolean[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[], $11::bytea[]"
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
    ids: Vec<Uuid>,
    have_given_ids: Vec<bool>,
    usernames: Vec<&'a str>,
    username_keys: Vec<&'a str>,
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
    /// The arrays, from `$4` on.
    pub(crate) fn params(&self) -> [Param<'_>; 8] {
        [
            &self.ids,
            &self.have_given_ids,
            &self.usernames,
            &self.username_keys,
            &self.emails,
            &self.email_keys,
            &self.display_names,
            &self.fingerprint_salts,
        ]
    }
}

/// Patches as rows: the parameters that [`Patches::params`] makes, and their names. Null
/// keeps the stored value.
macro_rules! patch_arrays {
    () => {
        "$4::uuid[], $5::bigint[], $6::text[], $7::text[], $8::text[]"
    };
}
macro_rules! patch_fields {
    () => {
        "user_id, expected_revision, new_email, new_email_key, new_display_name"
    };
}
/// Whether the patch in `i` changes the user in `c`, apart from the username.
macro_rules! has_changes {
    () => {
        "(c.email, c.display_name) is distinct from (
                coalesce(i.new_email, c.email), coalesce(i.new_display_name, c.display_name)
            )"
    };
}
/// Writes the patch in `i` to the user in `c`, apart from the username.
macro_rules! set_patch {
    () => {
        "email = coalesce(i.new_email, c.email), email_key = coalesce(i.new_email_key, c.email_key),
        display_name = coalesce(i.new_display_name, c.display_name)"
    };
}
/// The parameters of [`Patches::rename_params`] and their names; they follow those above.
macro_rules! rename_arrays {
    () => {
        "$9::text[], $10::text[], $11::boolean[]"
    };
}
macro_rules! rename_fields {
    () => {
        "new_username, new_username_key, release_username"
    };
}
/// How many days a username is held.
macro_rules! hold_days {
    () => {
        "$12::integer"
    };
}
pub(crate) use {
    has_changes, hold_days, patch_arrays, patch_fields, rename_arrays, rename_fields, set_patch,
};

/// Patches, as arrays.
#[derive(Default)]
pub(crate) struct Patches<'a> {
    ids: Vec<Uuid>,
    expected_revisions: Vec<i64>,
    usernames: Vec<Option<&'a str>>,
    username_keys: Vec<Option<&'a str>>,
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
    /// The arrays, from `$4` on.
    pub(crate) fn params(&self) -> [Param<'_>; 5] {
        [&self.ids, &self.expected_revisions, &self.emails, &self.email_keys, &self.display_names]
    }

    /// Those of usernames.
    pub(crate) fn rename_params(&self) -> [Param<'_>; 3] {
        [&self.usernames, &self.username_keys, &self.release_usernames]
    }
}

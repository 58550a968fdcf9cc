//! What is asked of many users as arrays, one for each parameter of a statement that
//! takes them apart with `unnest`.

use uuid::Uuid;

use crate::model::names::{Email, Username};
use crate::model::request::{NewUser, UserPatch};

/// Users to create.
#[derive(Default)]
pub(crate) struct NewUsers<'a> {
    pub(crate) ids: Vec<Uuid>,
    pub(crate) usernames: Vec<&'a str>,
    pub(crate) username_keys: Vec<&'a str>,
    pub(crate) emails: Vec<&'a str>,
    pub(crate) email_keys: Vec<&'a str>,
    pub(crate) display_names: Vec<&'a str>,
    pub(crate) salts: Vec<&'a [u8]>,
}

impl<'a> FromIterator<&'a NewUser> for NewUsers<'a> {
    fn from_iter<I: IntoIterator<Item = &'a NewUser>>(users: I) -> Self {
        let mut arrays = Self::default();
        for NewUser { id, username, email, display_name, salt } in users {
            arrays.ids.push(*id);
            arrays.usernames.push(username.as_entered());
            arrays.username_keys.push(username.canonical());
            arrays.emails.push(email.as_entered());
            arrays.email_keys.push(email.canonical());
            arrays.display_names.push(display_name);
            arrays.salts.push(salt);
        }
        arrays
    }
}

/// What changes in users; null is what stays as it is.
#[derive(Default)]
pub(crate) struct Changes<'a> {
    pub(crate) ids: Vec<Uuid>,
    pub(crate) expected_revisions: Vec<i64>,
    pub(crate) usernames: Vec<Option<&'a str>>,
    pub(crate) username_keys: Vec<Option<&'a str>>,
    pub(crate) emails: Vec<Option<&'a str>>,
    pub(crate) email_keys: Vec<Option<&'a str>>,
    pub(crate) display_names: Vec<Option<&'a str>>,
}

impl<'a> FromIterator<&'a UserPatch> for Changes<'a> {
    fn from_iter<I: IntoIterator<Item = &'a UserPatch>>(changes: I) -> Self {
        let mut arrays = Self::default();
        for UserPatch { id, expected_revision, username, email, display_name } in changes {
            arrays.ids.push(*id);
            arrays.expected_revisions.push(*expected_revision);
            arrays.usernames.push(username.as_ref().map(Username::as_entered));
            arrays.username_keys.push(username.as_ref().map(Username::canonical));
            arrays.emails.push(email.as_ref().map(Email::as_entered));
            arrays.email_keys.push(email.as_ref().map(Email::canonical));
            arrays.display_names.push(display_name.as_deref());
        }
        arrays
    }
}

//! A user in requests: to create, to change, to delete, to find.

use uuid::Uuid;

use crate::model::names::{Email, Username};

/// A user to create.
#[derive(Debug, Clone)]
pub struct NewUser {
    /// The caller's, or a new one.
    pub id: Uuid,
    /// Whether the caller gave the id, so that another user may have it.
    pub has_given_id: bool,
    /// Required.
    pub username: Username,
    /// Required.
    pub email: Email,
    /// May be empty.
    pub display_name: String,
    /// The salt of the fingerprints of requests about this user.
    pub fingerprint_salt: [u8; 16],
}

/// What makes a retry safe: the caller's id for the change, and a fingerprint of the change.
/// Without an id, nothing is recorded.
#[derive(Debug, Clone)]
pub struct RequestId {
    /// The caller's id.
    pub id: Option<Uuid>,
    /// SHA-256 of the rpc, the id and the rest of the request.
    pub fingerprint: Vec<u8>,
}

/// What an update changes. `None` keeps the stored value.
#[derive(Debug, Clone)]
pub struct UserPatch {
    /// The user.
    pub id: Uuid,
    /// 0 for any.
    pub expected_revision: i64,
    /// The new username.
    pub username: Option<Username>,
    /// The new e-mail address.
    pub email: Option<Email>,
    /// The new display name.
    pub display_name: Option<String>,
    /// Free the replaced usernames at once.
    pub release_username: bool,
}

/// A user to soft-delete.
#[derive(Debug)]
pub struct Removal {
    /// The user.
    pub id: Uuid,
    /// 0 for any.
    pub expected_revision: i64,
    /// Accept a user that does not exist or is already deleted.
    pub allow_missing: bool,
    /// Free the usernames at once.
    pub release_username: bool,
}

/// What finds a user.
#[derive(Debug)]
pub enum UserKey {
    /// The id.
    Id(Uuid),
    /// The username.
    Username(Username),
    /// The e-mail address.
    Email(Email),
}

/// What finds a user, in canonical form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CanonicalKey<'a> {
    /// The id.
    Id(Uuid),
    /// The canonical username.
    Username(&'a str),
    /// The canonical e-mail address.
    Email(&'a str),
}

impl UserKey {
    /// The key in the form in which keys are compared.
    pub fn canonical(&self) -> CanonicalKey<'_> {
        match self {
            Self::Id(id) => CanonicalKey::Id(*id),
            Self::Username(username) => CanonicalKey::Username(username.canonical()),
            Self::Email(email) => CanonicalKey::Email(email.canonical()),
        }
    }

    /// The key as the caller entered it.
    pub fn as_entered(&self) -> String {
        match self {
            Self::Id(id) => id.to_string(),
            Self::Username(username) => username.as_entered().to_owned(),
            Self::Email(email) => email.as_entered().to_owned(),
        }
    }
}

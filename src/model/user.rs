//! A user in requests: to create, to change, to delete, to find.

use prost_types::FieldMask;
use uuid::Uuid;

use crate::model::fields::Fields;
use crate::model::names::{Email, Username};
use crate::pb;
use crate::pb::ErrorReason as Reason;

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

impl NewUser {
    /// Parses the user of a request.
    pub(super) fn parse(fields: &mut Fields, user: pb::User) -> Option<Self> {
        let id = match user.id.as_str() {
            "" => Some(Uuid::now_v7()),
            id => fields.id("user.id", id),
        };
        let username = fields.username("user.username", &user.username);
        let email = fields.email("user.email", &user.email);
        let display_name = fields.display_name("user.display_name", user.display_name);
        Some(Self {
            id: id?,
            has_given_id: !user.id.is_empty(),
            username: username?,
            email: email?,
            display_name: display_name?,
            fingerprint_salt: rand::random(),
        })
    }
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

impl UserPatch {
    /// Parses the user and the mask of a request. A rejected field has a value here all the same,
    /// which does not get past [`Fields::finish`].
    pub(super) fn parse(
        fields: &mut Fields,
        user: Option<pb::User>,
        mask: Option<FieldMask>,
        release_username: bool,
    ) -> Self {
        let mask = Mask::parse(fields, mask);
        let user = fields.user(user).unwrap_or_default();
        let expected_revision = fields.revision("user.revision", user.revision);
        let mut patch = Self {
            id: fields.id("user.id", &user.id).unwrap_or_default(),
            expected_revision: expected_revision.unwrap_or_default(),
            username: None,
            email: None,
            display_name: None,
            release_username,
        };
        if mask.selects("username", &user.username) {
            patch.username = fields.username("user.username", &user.username);
        }
        if mask.selects("email", &user.email) {
            patch.email = fields.email("user.email", &user.email);
        }
        if mask.selects("display_name", &user.display_name) {
            patch.display_name = fields.display_name("user.display_name", user.display_name);
        }
        patch
    }

    /// Whether it concerns the username, or one that is held for the user.
    pub fn is_rename(&self) -> bool {
        self.username.is_some() || self.release_username
    }
}

/// The paths that a mask may have: the fields of [`pb::User`].
const PATHS: [&str; 9] = [
    "id",
    "username",
    "email",
    "display_name",
    "create_time",
    "update_time",
    "delete_time",
    "purge_time",
    "revision",
];

/// The paths that `*` stands for. The contract fixes them: a field of a later version is not
/// among them, so that an old client never erases it.
const STAR: [&str; 3] = ["username", "email", "display_name"];

/// The fields of an update that a mask selects.
enum Mask {
    /// The fields of [`STAR`] that have a value.
    Populated,
    /// The named ones.
    Paths(Vec<String>),
}

impl Mask {
    fn parse(fields: &mut Fields, mask: Option<FieldMask>) -> Self {
        let paths = mask.unwrap_or_default().paths;
        match paths.as_slice() {
            [] => return Self::Populated,
            [star] if star == "*" => return Self::Paths(STAR.map(str::to_owned).into()),
            _ => {}
        }
        if !paths.iter().all(|path| PATHS.contains(&path.as_str())) {
            let what = "may have fields of User, or `*` alone";
            fields.reject::<()>("update_mask", Reason::UpdateMaskInvalid, what);
        }
        Self::Paths(paths)
    }

    fn selects(&self, path: &str, value: &str) -> bool {
        match self {
            Self::Populated => STAR.contains(&path) && !value.is_empty(),
            Self::Paths(paths) => paths.iter().any(|p| p == path),
        }
    }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn some_path() -> impl Strategy<Value = String> {
        prop_oneof![
            prop::sample::select(PATHS.to_vec()).prop_map(str::to_owned),
            Just("*".to_owned()),
            any::<String>()
        ]
    }

    proptest! {
        #[test]
        fn mask_has_fields_of_a_user_or_a_star_alone(paths in prop::collection::vec(some_path(), 0..4)) {
            let user = pb::User {
                id: Uuid::max().to_string(),
                username: "alice".into(),
                email: "alice@example.com".into(),
                display_name: "Alice".into(),
                ..Default::default()
            };
            let mut fields = Fields::default();
            let mask = Some(FieldMask { paths: paths.clone() });
            let patch = UserPatch::parse(&mut fields, Some(user), mask, false);
            let is_star = paths == ["*"];
            prop_assert_eq!(fields.is_valid(), is_star || paths.iter().all(|path| PATHS.contains(&path.as_str())));
            if fields.is_valid() {
                let selects = |path: &str| paths.is_empty() || is_star || paths.iter().any(|p| p == path);
                prop_assert_eq!(patch.username.is_some(), selects("username"));
                prop_assert_eq!(patch.email.is_some(), selects("email"));
                prop_assert_eq!(patch.display_name.is_some(), selects("display_name"));
            }
        }
    }
}

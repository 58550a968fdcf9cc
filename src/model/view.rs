//! How much of a user a response has.

use crate::pb;

/// How much of each user a response has: [`pb::UserView`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// The fields that `USER_VIEW_BASIC` lists in the proto.
    Basic,
    /// All.
    Full,
}

impl View {
    /// Removes the fields that are not part of the view.
    pub fn of(self, user: pb::User) -> pb::User {
        if self == Self::Full { user } else { basic(user) }
    }
}

/// The fields of [`View::Basic`]. The contract fixes them: a field of a later version is not one of
/// them.
fn basic(user: pb::User) -> pb::User {
    let pb::User {
        id,
        username,
        email,
        display_name,
        create_time,
        update_time,
        delete_time,
        purge_time,
        revision,
    } = user;
    pb::User {
        id,
        username,
        email,
        display_name,
        create_time,
        update_time,
        delete_time,
        purge_time,
        revision,
    }
}

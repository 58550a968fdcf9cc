//! Requests about one user, and reads, parsed into types that are always valid. All
//! violations of a request are reported at once.

use std::mem;

use uuid::Uuid;

use crate::error::Error;
use crate::model::fields::RequestId;
use crate::model::fields::{Fields, is_unfiltered};
use crate::model::names::Username;
use crate::model::page::Page;
use crate::model::token::TokenKeys;
use crate::model::user::{NewUser, Removal, UserKey, UserPatch};
use crate::model::view::View;
use crate::pb;
use crate::pb::ErrorReason as Reason;

/// [`pb::CreateUserRequest`].
#[derive(Debug)]
pub struct Create {
    /// The user.
    pub user: NewUser,
    /// For retries.
    pub request_id: RequestId,
    /// Roll back.
    pub validate_only: bool,
}

/// [`pb::UpdateUserRequest`].
#[derive(Debug, Clone)]
pub struct Update {
    /// The change.
    pub patch: UserPatch,
    /// With `allow_missing`: the user to create if there is none, or what is wrong with it.
    pub or_create: Option<Result<NewUser, Error>>,
    /// For retries.
    pub request_id: RequestId,
    /// Roll back.
    pub validate_only: bool,
}

/// [`pb::DeleteUserRequest`].
#[derive(Debug)]
pub struct Delete {
    /// The user.
    pub removal: Removal,
    /// For retries.
    pub request_id: RequestId,
    /// Roll back.
    pub validate_only: bool,
}

/// [`pb::UndeleteUserRequest`].
#[derive(Debug)]
pub struct Undelete {
    /// The user.
    pub id: Uuid,
    /// 0 for any.
    pub expected_revision: i64,
    /// The new username, if not the old one.
    pub username: Option<Username>,
    /// For retries.
    pub request_id: RequestId,
    /// Roll back.
    pub validate_only: bool,
}

/// [`pb::ExpungeUserRequest`].
#[derive(Debug)]
pub struct Expunge {
    /// The user.
    pub id: Uuid,
    /// 0 for any.
    pub expected_revision: i64,
    /// Accept a user that does not exist.
    pub allow_missing: bool,
    /// Accept a user that is not soft-deleted.
    pub force: bool,
    /// For retries.
    pub request_id: RequestId,
    /// Roll back.
    pub validate_only: bool,
}

/// The rest of a request must not contain what a retry may change: `request_id` itself and
/// `validate_only`.
macro_rules! take_request_id {
    ($fields:ident, $rpc:literal, $request:ident) => {{
        let request_id = mem::take(&mut $request.request_id);
        let validate_only = mem::take(&mut $request.validate_only);
        ($fields.request_id($rpc, &request_id, &$request), validate_only)
    }};
}
pub(super) use take_request_id;

impl Create {
    /// Parses the request.
    pub fn parse(mut request: pb::CreateUserRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let (request_id, validate_only) = take_request_id!(fields, "CreateUser", request);
        let user = fields.user(request.user).and_then(|user| NewUser::parse(&mut fields, user));
        let (request_id, user) = fields.finish(request_id.zip(user))?;
        Ok(Self { user, request_id, validate_only })
    }
}

impl UserKey {
    /// Parses the key of a [`pb::GetUserRequest`].
    pub fn parse(key: Option<pb::get_user_request::Key>) -> Result<Self, Error> {
        use pb::get_user_request::Key;
        let mut fields = Fields::default();
        let key = match key {
            Some(Key::Id(id)) => fields.id("id", &id).map(Self::Id),
            Some(Key::Username(username)) => fields.username("username", &username).map(Self::Username),
            Some(Key::Email(email)) => fields.email("email", &email).map(Self::Email),
            None => {
                fields.reject("key", Reason::FieldRequired, "give an id, a username or an e-mail address")
            }
        };
        fields.finish(key)
    }
}

impl Update {
    /// Parses the request. The values of fields outside the mask are ignored, and those that
    /// only a create needs matter only if the user turns out to be missing.
    pub fn parse(mut request: pb::UpdateUserRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let (request_id, validate_only) = take_request_id!(fields, "UpdateUser", request);
        let or_create = request.allow_missing.then(|| {
            let mut fields = Fields::default();
            let user = NewUser::parse(&mut fields, request.user.clone().unwrap_or_default());
            fields.finish(user)
        });
        let patch =
            UserPatch::parse(&mut fields, request.user, request.update_mask, request.release_username);
        let request_id = fields.finish(request_id)?;
        Ok(Self { patch, or_create, request_id, validate_only })
    }
}

impl Delete {
    /// Parses the request.
    pub fn parse(mut request: pb::DeleteUserRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let (request_id, validate_only) = take_request_id!(fields, "DeleteUser", request);
        let id = fields.id("id", &request.id);
        let revision = fields.revision("revision", request.revision);
        let ((id, expected_revision), request_id) = fields.finish(id.zip(revision).zip(request_id))?;
        let pb::DeleteUserRequest { allow_missing, release_username, .. } = request;
        let removal = Removal { id, expected_revision, allow_missing, release_username };
        Ok(Self { removal, request_id, validate_only })
    }
}

impl Undelete {
    /// Parses the request.
    pub fn parse(mut request: pb::UndeleteUserRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let (request_id, validate_only) = take_request_id!(fields, "UndeleteUser", request);
        let id = fields.id("id", &request.id);
        let revision = fields.revision("revision", request.revision);
        let username = match request.username.as_str() {
            "" => None,
            username => fields.username("username", username),
        };
        let ((id, expected_revision), request_id) = fields.finish(id.zip(revision).zip(request_id))?;
        Ok(Self { id, expected_revision, username, request_id, validate_only })
    }
}

impl Expunge {
    /// Parses the request.
    pub fn parse(mut request: pb::ExpungeUserRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let (request_id, validate_only) = take_request_id!(fields, "ExpungeUser", request);
        let id = fields.id("id", &request.id);
        let revision = fields.revision("revision", request.revision);
        let ((id, expected_revision), request_id) = fields.finish(id.zip(revision).zip(request_id))?;
        let pb::ExpungeUserRequest { allow_missing, force, .. } = request;
        Ok(Self { id, expected_revision, allow_missing, force, request_id, validate_only })
    }
}

/// Users on a page unless the request says otherwise.
const PAGE_SIZE_DEFAULT: usize = 50;
/// The largest number of users on a page.
const PAGE_SIZE_MAX: usize = 1000;

/// [`pb::ListUsersRequest`].
#[derive(Debug)]
pub struct List {
    /// Which users.
    pub page: Page,
    /// The list has all users, or all live ones.
    pub is_unfiltered: bool,
    /// Of the users in the response.
    pub view: View,
}

impl List {
    /// Parses the request.
    pub fn parse(keys: &TokenKeys, request: &pb::ListUsersRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let size = match usize::try_from(request.page_size) {
            Ok(0) => Some(PAGE_SIZE_DEFAULT),
            Ok(size) => Some(size.min(PAGE_SIZE_MAX)),
            Err(_) => fields.reject("page_size", Reason::FieldInvalid, "must not be negative"),
        };
        let view = fields.view(request.view);
        let order = fields.order_by(request);
        let filter = request.filter.clone().unwrap_or_default();
        let is_unfiltered = is_unfiltered(&filter);
        let selection = order.and_then(|order| fields.selection(order, filter));
        let (size, selection) = fields.finish(size.zip(selection))?;
        if request.page_token.is_empty() {
            return Ok(Self { page: selection.first_page(size), is_unfiltered, view });
        }
        let page = selection.page_after(keys, &request.page_token, size).ok_or_else(|| {
            let what = "is not a token of a list with this order and filter";
            Error::invalid("page_token", Reason::PageTokenInvalid, what)
        })?;
        Ok(Self { page, is_unfiltered, view })
    }
}

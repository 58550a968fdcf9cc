//! Requests about many users, parsed into types that are always valid.

use std::{collections::HashMap, hash::Hash, mem};

use uuid::Uuid;

use crate::error::{Element, Error};
use crate::model::fields::Fields;
use crate::model::fields::RequestId;
use crate::model::request::take_request_id;
use crate::model::user::{NewUser, Removal, UserKey, UserPatch};
use crate::model::view::View;
use crate::pb;
use crate::pb::ErrorReason as Reason;

/// An atomic batch: [`pb::BatchCreateUsersRequest`] with users to create,
/// [`pb::BatchUpdateUsersRequest`] with patches, [`pb::BatchDeleteUsersRequest`] with
/// removals.
#[derive(Debug)]
pub struct Batch<T> {
    /// What to do; no user is changed or removed twice.
    pub items: Vec<T>,
    /// For retries.
    pub request_id: RequestId,
    /// Roll back.
    pub validate_only: bool,
    /// Of the users in the response.
    pub view: View,
}

/// [`pb::LookupUsersRequest`].
#[derive(Debug)]
pub struct Lookup {
    /// What to look for; each key once.
    pub keys: Vec<UserKey>,
    /// Find soft-deleted users too.
    pub include_deleted: bool,
    /// Of the users in the response.
    pub view: View,
}

impl Lookup {
    /// Parses the request.
    pub fn parse(request: pb::LookupUsersRequest) -> Result<Self, Error> {
        use pb::user_key::Key;
        let mut fields = Fields::default();
        let view = fields.view(request.view);
        let keys = fields.each("keys", view, request.keys, |fields, key| match key.key {
            Some(Key::Id(id)) => fields.id("id", &id).map(UserKey::Id),
            Some(Key::Username(username)) => fields.username("username", &username).map(UserKey::Username),
            Some(Key::Email(email)) => fields.email("email", &email).map(UserKey::Email),
            None => {
                fields.reject("key", Reason::FieldRequired, "give an id, a username or an e-mail address")
            }
        });
        let canonical = keys.iter().map(|key| key.as_ref().map(UserKey::canonical));
        reject_repeated(&mut fields, "keys", "key", "another key has this canonical form, too", canonical);
        let keys = fields.finish(keys.into_iter().collect())?;
        Ok(Self { keys, include_deleted: request.include_deleted, view })
    }
}

impl Batch<NewUser> {
    /// Parses the request.
    pub fn parse(mut request: pb::BatchCreateUsersRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let view = fields.view(mem::take(&mut request.view));
        let (request_id, validate_only) = take_request_id!(fields, "BatchCreateUsers", request);
        let items = fields.each("items", view, request.items, |fields, item| {
            let user = fields.user(item.user)?;
            NewUser::parse(fields, user)
        });
        let items = items.into_iter().collect::<Option<_>>();
        let (items, request_id) = fields.finish(items.zip(request_id))?;
        Ok(Self { items, request_id, validate_only, view })
    }
}

impl Batch<UserPatch> {
    /// Parses the request.
    pub fn parse(mut request: pb::BatchUpdateUsersRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let view = fields.view(mem::take(&mut request.view));
        let (request_id, validate_only) = take_request_id!(fields, "BatchUpdateUsers", request);
        let items = fields.each("items", view, request.items, |fields, item| {
            UserPatch::parse(fields, item.user, item.update_mask, item.release_username)
        });
        reject_repeated(
            &mut fields,
            "items",
            "user.id",
            SAME_ID,
            items.iter().map(|patch| non_nil(patch.id)),
        );
        let request_id = fields.finish(request_id)?;
        Ok(Self { items, request_id, validate_only, view })
    }
}

impl Batch<Removal> {
    /// Parses the request.
    pub fn parse(mut request: pb::BatchDeleteUsersRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let view = fields.view(mem::take(&mut request.view));
        let (request_id, validate_only) = take_request_id!(fields, "BatchDeleteUsers", request);
        let items = fields.each("items", view, request.items, |fields, item| Removal {
            id: fields.id("id", &item.id).unwrap_or_default(),
            expected_revision: fields.revision("revision", item.revision).unwrap_or_default(),
            allow_missing: item.allow_missing,
            release_username: item.release_username,
        });
        reject_repeated(&mut fields, "items", "id", SAME_ID, items.iter().map(|item| non_nil(item.id)));
        let request_id = fields.finish(request_id)?;
        Ok(Self { items, request_id, validate_only, view })
    }
}

const SAME_ID: &str = "another item has this id, too";

/// An id that was rejected itself is nil, and is no repetition of another one.
fn non_nil(id: Uuid) -> Option<Uuid> {
    Some(id).filter(|id| !id.is_nil())
}

/// Which keys are those of several elements.
fn repeated<K: Eq + Hash>(keys: impl Iterator<Item = Option<K>> + Clone) -> Vec<bool> {
    let mut counts = HashMap::new();
    for key in keys.clone().flatten() {
        *counts.entry(key).or_insert(0) += 1;
    }
    keys.map(|key| key.and_then(|key| counts.get(&key)).is_some_and(|count| *count > 1)).collect()
}

/// Rejects every element of `list` whose key another element has too.
fn reject_repeated<K: Eq + Hash>(
    fields: &mut Fields,
    list: &'static str,
    field: &str,
    what: &str,
    keys: impl Iterator<Item = Option<K>> + Clone,
) {
    for (index, _) in repeated(keys).into_iter().enumerate().filter(|(_, is_repeated)| *is_repeated) {
        fields.element = Some(Element { list, index });
        fields.reject::<()>(field, Reason::FieldInvalid, what);
    }
    fields.element = None;
}

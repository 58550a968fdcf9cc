//! The operations whose requests are coalesced.

use std::{
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    sync::Arc,
};

use crate::api::coalescer::{BatchPolicy, Operation};
use crate::error::{Access, Error};
use crate::model::fields::RequestId;
use crate::model::names::Username;
use crate::model::request::{Create, Delete, Update};
use crate::model::user::UserKey;
use crate::pb;
use crate::store::items::{Items, Locking, Outcome};
use crate::store::lookup;
use crate::store::pool::Db;
use crate::store::users;

/// `GetUser` by id and by username.
pub struct Get(pub Arc<Db>);

impl Operation for Get {
    type Request = UserKey;
    type Response = pb::User;

    fn batch_policy(_: &UserKey) -> BatchPolicy {
        BatchPolicy::Any
    }

    async fn run_batch(&self, keys: &[UserKey], _: Locking) -> Result<Vec<Outcome<pb::User>>, Error> {
        let users = lookup::get(&self.0, keys).await?;
        Ok(users.into_iter().map(|user| user.map_or_else(Outcome::Rejected, Outcome::Done)).collect())
    }
}

/// `CreateUser`.
pub struct CreateOne(pub Arc<Db>);

impl Operation for CreateOne {
    type Request = Create;
    type Response = pb::User;

    fn batch_policy(create: &Create) -> BatchPolicy {
        let Create { user, request_id, validate_only } = create;
        let id = user.has_given_id.then(|| user.id.as_u128());
        policy(*validate_only, request_id, id, Some(&user.username))
    }

    async fn run_batch(
        &self,
        requests: &[Create],
        locking: Locking,
    ) -> Result<Vec<Outcome<pb::User>>, Error> {
        let access = access(requests.first().map(|create| create.validate_only));
        let items = requests.iter().map(|create| (&create.user, &create.request_id));
        users::create(&self.0, &Items::independent(items, access, locking)).await
    }
}

/// `UpdateUser`.
pub struct UpdateOne(pub Arc<Db>);

impl Operation for UpdateOne {
    type Request = Update;
    type Response = pb::User;

    fn batch_policy(update: &Update) -> BatchPolicy {
        let Update { patch, request_id, validate_only, .. } = update;
        policy(*validate_only || patch.is_rename(), request_id, Some(patch.id.as_u128()), None)
    }

    async fn run_batch(
        &self,
        requests: &[Update],
        locking: Locking,
    ) -> Result<Vec<Outcome<pb::User>>, Error> {
        let access = access(requests.first().map(|update| update.validate_only));
        let items = requests.iter().map(|update| (&update.patch, &update.request_id));
        users::update(&self.0, &Items::independent(items, access, locking)).await
    }
}

/// `DeleteUser`.
pub struct DeleteOne(pub Arc<Db>);

impl Operation for DeleteOne {
    type Request = Delete;
    type Response = Option<pb::User>;

    fn batch_policy(delete: &Delete) -> BatchPolicy {
        let Delete { removal, request_id, validate_only } = delete;
        policy(*validate_only, request_id, Some(removal.id.as_u128()), None)
    }

    async fn run_batch(
        &self,
        requests: &[Delete],
        locking: Locking,
    ) -> Result<Vec<Outcome<Option<pb::User>>>, Error> {
        let access = access(requests.first().map(|delete| delete.validate_only));
        let items = requests.iter().map(|delete| (&delete.removal, &delete.request_id));
        users::delete(&self.0, &Items::independent(items, access, locking)).await
    }
}

/// A change that is rolled back runs alone, and so does a rename, which locks usernames too. Two
/// requests with the same request id, user or username would conflict within one statement.
fn policy(
    is_alone: bool,
    request_id: &RequestId,
    user_id: Option<u128>,
    username: Option<&Username>,
) -> BatchPolicy {
    if is_alone {
        return BatchPolicy::Alone;
    }
    let hash =
        |username: &Username| BuildHasherDefault::<DefaultHasher>::default().hash_one(username.canonical());
    BatchPolicy::UniqueKeys([
        request_id.id.map(|id| id.as_u128()),
        user_id,
        username.map(hash).map(Into::into),
    ])
}

/// All requests of a batch agree on it, see [`policy`].
fn access(validate_only: Option<bool>) -> Access {
    Access::write(validate_only.unwrap_or_default())
}

//! The rpcs: one function each, which parses the request, runs it and responds.

use std::{mem, sync::Arc};

use futures_util::{StreamExt, TryStreamExt, stream::BoxStream};
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::api::coalescer::{Coalescer, Limits};
use crate::api::import::Imports;
use crate::api::operations::{CreateOne, DeleteOne, Get, UpdateOne};
use crate::config::Config;
use crate::error::Error;
use crate::feed::reader::Feed;
use crate::feed::watcher::Watcher;
use crate::limits::FairLimiter;
use crate::model::batch::{Batch, Lookup};
use crate::model::names::{Email, Username};
use crate::model::request::{Create, Delete, Expunge, List, Undelete, Update};
use crate::model::stream::{Chunk, Export, Watch};
use crate::model::user::{NewUser, Removal, UserKey, UserPatch};
use crate::model::view::View;
use crate::pb;
use crate::pb::ErrorReason as Reason;
use crate::pb::codec::Encoded;
use crate::store::export::Exports;
use crate::store::pool::Db;
use crate::store::{list, lookup, users};

/// The service `users.v1.UserService`.
pub struct UserService {
    db: Arc<Db>,
    feed: Arc<Feed>,
    gets: Arc<Coalescer<Get>>,
    creates: Arc<Coalescer<CreateOne>>,
    updates: Arc<Coalescer<UpdateOne>>,
    deletes: Arc<Coalescer<DeleteOne>>,
    /// Limits the reads that are not coalesced, to a quarter of the pool. A request for many users
    /// takes its permit before it is parsed, which takes time too.
    reads: Arc<FairLimiter>,
    /// Limits the writes that are not coalesced, chunks of imports included, likewise. They can
    /// wait for locked rows, and must not keep reads waiting.
    writes: Arc<FairLimiter>,
    imports: Imports,
    exports: Exports,
}

impl UserService {
    /// The service on this database. `limits` are those of each coalescer.
    pub fn new(
        db: Arc<Db>,
        config: &Config,
        limits: Limits,
        tasks: &TaskTracker,
        exports: Exports,
        feed: Arc<Feed>,
    ) -> Self {
        let limiter = || FairLimiter::new(config.pool_size.div_ceil(4), limits.max_queued);
        let writes = limiter();
        Self {
            imports: Imports::new(Arc::clone(&db), config, Arc::clone(&writes), tasks.clone()),
            reads: limiter(),
            writes,
            exports,
            gets: Coalescer::new(Get(Arc::clone(&db)), limits, tasks.clone()),
            creates: Coalescer::new(CreateOne(Arc::clone(&db)), limits, tasks.clone()),
            updates: Coalescer::new(UpdateOne(Arc::clone(&db)), limits, tasks.clone()),
            deletes: Coalescer::new(DeleteOne(Arc::clone(&db)), limits, tasks.clone()),
            db,
            feed,
        }
    }

    async fn get_by_email(&self, email: Email) -> Result<pb::User, Error> {
        let _permit = self.reads.acquire().await?;
        lookup::get_by_email(&self.db, email).await
    }

    /// Changes a user, or creates it if there is none. A user that another request creates in
    /// between is there to be changed, so a conflict is a reason to try that once more.
    async fn upsert(&self, update: Update, user: Result<NewUser, Error>) -> Result<pb::User, Error> {
        let mut conflict = None;
        loop {
            match self.updates.run(update.clone()).await {
                Err(Error::UserNotFound { .. }) => {}
                updated => return updated,
            }
            if let Some(conflict) = conflict {
                return Err(conflict);
            }
            let (request_id, validate_only) = (update.request_id.clone(), update.validate_only);
            let create = Create { user: user.clone()?, request_id, validate_only };
            match self.creates.run(create).await {
                Err(error @ (Error::UserIdTaken | Error::UsernameTaken { .. })) => conflict = Some(error),
                created => return created,
            }
        }
    }
}

fn with_view(view: View, users: Vec<pb::User>) -> Vec<pb::User> {
    users.into_iter().map(|user| view.of(user)).collect()
}

type RpcResult<T> = Result<Response<T>, Status>;
type ResponseStream<T> = BoxStream<'static, Result<T, Status>>;

#[tonic::async_trait]
impl pb::user_service_server::UserService for UserService {
    async fn create_user(
        &self,
        request: Request<pb::CreateUserRequest>,
    ) -> RpcResult<pb::CreateUserResponse> {
        let create = Create::parse(request.into_inner())?;
        let user = self.creates.run(create).await?;
        Ok(Response::new(pb::CreateUserResponse { user: Some(user) }))
    }

    async fn get_user(&self, request: Request<pb::GetUserRequest>) -> RpcResult<pb::GetUserResponse> {
        let pb::GetUserRequest { key, if_revision_not } = request.into_inner();
        let user = match UserKey::parse(key)? {
            // Boxed, because the other requests should not be as large as this one.
            UserKey::Email(email) => Box::pin(self.get_by_email(email)).await?,
            key => self.gets.run(key).await?,
        };
        let not_modified = user.revision == if_revision_not;
        let user = (!not_modified).then_some(user);
        Ok(Response::new(pb::GetUserResponse { user, not_modified }))
    }

    async fn update_user(
        &self,
        request: Request<pb::UpdateUserRequest>,
    ) -> RpcResult<pb::UpdateUserResponse> {
        let mut update = Update::parse(request.into_inner())?;
        let user = match update.or_create.take() {
            Some(user) => Box::pin(self.upsert(update, user)).await?,
            None => self.updates.run(update).await?,
        };
        Ok(Response::new(pb::UpdateUserResponse { user: Some(user) }))
    }

    async fn delete_user(
        &self,
        request: Request<pb::DeleteUserRequest>,
    ) -> RpcResult<pb::DeleteUserResponse> {
        let delete = Delete::parse(request.into_inner())?;
        let user = self.deletes.run(delete).await?;
        Ok(Response::new(pb::DeleteUserResponse { user }))
    }

    async fn undelete_user(
        &self,
        request: Request<pb::UndeleteUserRequest>,
    ) -> RpcResult<pb::UndeleteUserResponse> {
        let undelete = Undelete::parse(request.into_inner())?;
        let _permit = self.writes.acquire().await?;
        let user = users::undelete(&self.db, &undelete).await?;
        Ok(Response::new(pb::UndeleteUserResponse { user: Some(user) }))
    }

    async fn expunge_user(
        &self,
        request: Request<pb::ExpungeUserRequest>,
    ) -> RpcResult<pb::ExpungeUserResponse> {
        let expunge = Expunge::parse(request.into_inner())?;
        let _permit = self.writes.acquire().await?;
        let expunge_time = users::expunge(&self.db, &expunge).await?;
        Ok(Response::new(pb::ExpungeUserResponse { user_id: expunge.id.to_string(), expunge_time }))
    }

    async fn list_users(&self, request: Request<pb::ListUsersRequest>) -> RpcResult<pb::ListUsersResponse> {
        let keys = self.feed.token_keys.keys()?;
        let request = List::parse(&keys, request.get_ref())?;
        let _permit = self.reads.acquire().await?;
        Ok(Response::new(list::list(&self.db, &keys, &request).await?))
    }

    async fn lookup_users(
        &self,
        request: Request<pb::LookupUsersRequest>,
    ) -> RpcResult<pb::LookupUsersResponse> {
        let _permit = self.reads.acquire().await?;
        let lookup = Lookup::parse(request.into_inner())?;
        let mut results = lookup::lookup(&self.db, &lookup).await?;
        for result in &mut results {
            result.users = with_view(lookup.view, mem::take(&mut result.users));
        }
        Ok(Response::new(pb::LookupUsersResponse { results }))
    }

    async fn batch_create_users(
        &self,
        request: Request<pb::BatchCreateUsersRequest>,
    ) -> RpcResult<pb::BatchCreateUsersResponse> {
        let _permit = self.writes.acquire().await?;
        let batch = Batch::<NewUser>::parse(request.into_inner())?;
        let users = users::create_batch(&self.db, &batch).await?;
        Ok(Response::new(pb::BatchCreateUsersResponse { users: with_view(batch.view, users) }))
    }

    async fn batch_update_users(
        &self,
        request: Request<pb::BatchUpdateUsersRequest>,
    ) -> RpcResult<pb::BatchUpdateUsersResponse> {
        let _permit = self.writes.acquire().await?;
        let batch = Batch::<UserPatch>::parse(request.into_inner())?;
        let users = users::update_batch(&self.db, &batch).await?;
        Ok(Response::new(pb::BatchUpdateUsersResponse { users: with_view(batch.view, users) }))
    }

    async fn batch_delete_users(
        &self,
        request: Request<pb::BatchDeleteUsersRequest>,
    ) -> RpcResult<pb::BatchDeleteUsersResponse> {
        let _permit = self.writes.acquire().await?;
        let batch = Batch::<Removal>::parse(request.into_inner())?;
        let users = users::delete_batch(&self.db, &batch).await?;
        Ok(Response::new(pb::BatchDeleteUsersResponse { users: with_view(batch.view, users) }))
    }

    async fn check_username(
        &self,
        request: Request<pb::CheckUsernameRequest>,
    ) -> RpcResult<pb::CheckUsernameResponse> {
        let username = request.into_inner().username;
        if username.is_empty() {
            return Err(Error::invalid("username", Reason::FieldRequired, "is required").into());
        }
        let Ok(username) = Username::parse(&username) else {
            let reason = Reason::UsernameInvalid.into();
            return Ok(Response::new(pb::CheckUsernameResponse { reason, ..Default::default() }));
        };
        let _permit = self.reads.acquire().await?;
        let holder = users::username_holder(&self.db, &username).await?;
        Ok(Response::new(pb::CheckUsernameResponse {
            available: holder.is_none(),
            canonical: username.canonical().to_owned(),
            reason: holder.map_or(Reason::Unspecified, |_| Reason::UsernameTaken).into(),
            available_time: holder.flatten().map(Into::into),
        }))
    }

    type ImportUsersStream = ResponseStream<pb::ImportUsersResponse>;

    async fn import_users(
        &self,
        request: Request<Streaming<pb::ImportUsersRequest>>,
    ) -> RpcResult<Self::ImportUsersStream> {
        let chunks = request
            .into_inner()
            .map(|message| Chunk::parse(message.map_err(|status| Error::of_message(&status))?));
        let acks = self.imports.run(chunks.boxed())?;
        Ok(Response::new(acks.map_err(Status::from).boxed()))
    }

    type ExportUsersStream = ResponseStream<pb::ExportUsersResponse>;

    async fn export_users(
        &self,
        request: Request<pb::ExportUsersRequest>,
    ) -> RpcResult<Self::ExportUsersStream> {
        let export = Export::parse(request.into_inner())?;
        let parts = self.exports.run(&export).await?;
        Ok(Response::new(parts.map_err(Status::from).boxed()))
    }

    type WatchUsersStream = ResponseStream<Encoded>;

    async fn watch_users(
        &self,
        request: Request<pb::WatchUsersRequest>,
    ) -> RpcResult<Self::WatchUsersStream> {
        let watch = Watch::parse(self.feed.token_keys.keys()?.as_ref(), request.into_inner())?;
        let watcher = Watcher::start(Arc::clone(&self.feed), watch).await?;
        Ok(Response::new(watcher.into_stream().boxed()))
    }
}

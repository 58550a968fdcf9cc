//! One function an rpc: parse, call, answer.

use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream::BoxStream};
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::api::coalescer::{Group, Limits};
use crate::error::{Error, reason};
use crate::feed::reader::Feed;
use crate::feed::watcher::Watcher;
use crate::model::names::Username;
use crate::model::page::Page;
use crate::model::request::{
    Batch, Chunk, Create, Delete, Export, Expunge, Lookup, NewUser, Removal, Undelete, Update, UserKey,
    UserPatch, Watch,
};
use crate::pb;
use crate::pb::codec::Encoded;
use crate::store::batch;
use crate::store::export::Exports;
use crate::store::grouped::{Creates, Deletes, Gets, Updates};
use crate::store::import::Imports;
use crate::store::list;
use crate::store::lookup;
use crate::store::pool::Db;
use crate::store::users;

/// The service `users.v1.UserService`.
pub struct UserService {
    db: Arc<Db>,
    feed: Arc<Feed>,
    gets: Arc<Group<Gets>>,
    creates: Arc<Group<Creates>>,
    updates: Arc<Group<Updates>>,
    deletes: Arc<Group<Deletes>>,
    imports: Imports,
    exports: Exports,
}

impl UserService {
    /// The service on this database, with groups within these limits.
    pub fn new(
        db: Arc<Db>,
        limits: Limits,
        tasks: &TaskTracker,
        imports: Imports,
        exports: Exports,
        feed: Arc<Feed>,
    ) -> Self {
        Self {
            imports,
            exports,
            gets: Group::new(Gets(Arc::clone(&db)), limits, tasks.clone()),
            creates: Group::new(Creates(Arc::clone(&db)), limits, tasks.clone()),
            updates: Group::new(Updates(Arc::clone(&db)), limits, tasks.clone()),
            deletes: Group::new(Deletes(Arc::clone(&db)), limits, tasks.clone()),
            db,
            feed,
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;
type AnswerStream<T> = BoxStream<'static, Result<T, Status>>;

#[tonic::async_trait]
impl pb::user_service_server::UserService for UserService {
    async fn create_user(&self, request: Request<pb::CreateUserRequest>) -> Answer<pb::CreateUserResponse> {
        let create = Create::parse(request.into_inner())?;
        let user = self.creates.run(create).await?;
        Ok(Response::new(pb::CreateUserResponse { user: Some(user) }))
    }

    async fn get_user(&self, request: Request<pb::GetUserRequest>) -> Answer<pb::GetUserResponse> {
        let pb::GetUserRequest { key, if_revision_not } = request.into_inner();
        let user = self.gets.run(UserKey::parse(key)?).await?;
        let not_modified = user.revision == if_revision_not;
        let user = (!not_modified).then_some(user);
        Ok(Response::new(pb::GetUserResponse { user, not_modified }))
    }

    async fn update_user(&self, request: Request<pb::UpdateUserRequest>) -> Answer<pb::UpdateUserResponse> {
        let update = Update::parse(request.into_inner())?;
        let user = self.updates.run(update).await?;
        Ok(Response::new(pb::UpdateUserResponse { user: Some(user) }))
    }

    async fn delete_user(&self, request: Request<pb::DeleteUserRequest>) -> Answer<pb::DeleteUserResponse> {
        let delete = Delete::parse(request.into_inner())?;
        let user = self.deletes.run(delete).await?;
        Ok(Response::new(pb::DeleteUserResponse { user }))
    }

    async fn undelete_user(
        &self,
        request: Request<pb::UndeleteUserRequest>,
    ) -> Answer<pb::UndeleteUserResponse> {
        let undelete = Undelete::parse(request.into_inner())?;
        let user = users::undelete(&self.db, &undelete).await?;
        Ok(Response::new(pb::UndeleteUserResponse { user: Some(user) }))
    }

    async fn expunge_user(
        &self,
        request: Request<pb::ExpungeUserRequest>,
    ) -> Answer<pb::ExpungeUserResponse> {
        let expunge = Expunge::parse(request.into_inner())?;
        let expunge_time = users::expunge(&self.db, &expunge).await?;
        Ok(Response::new(pb::ExpungeUserResponse {
            user_id: expunge.id.to_string(),
            expunge_time: Some(expunge_time.into()),
        }))
    }

    async fn list_users(&self, request: Request<pb::ListUsersRequest>) -> Answer<pb::ListUsersResponse> {
        let page = Page::parse(request.get_ref())?;
        Ok(Response::new(list::list(&self.db, &page).await?))
    }

    async fn lookup_users(
        &self,
        request: Request<pb::LookupUsersRequest>,
    ) -> Answer<pb::LookupUsersResponse> {
        let lookup = Lookup::parse(request.into_inner())?;
        let results = lookup::lookup(&self.db, &lookup).await?;
        Ok(Response::new(pb::LookupUsersResponse { results }))
    }

    async fn batch_create_users(
        &self,
        request: Request<pb::BatchCreateUsersRequest>,
    ) -> Answer<pb::BatchCreateUsersResponse> {
        let batch = Batch::<NewUser>::parse(request.into_inner())?;
        let users = batch::create(&self.db, &batch).await?;
        Ok(Response::new(pb::BatchCreateUsersResponse { users }))
    }

    async fn batch_update_users(
        &self,
        request: Request<pb::BatchUpdateUsersRequest>,
    ) -> Answer<pb::BatchUpdateUsersResponse> {
        let batch = Batch::<UserPatch>::parse(request.into_inner())?;
        let users = batch::update(&self.db, &batch).await?;
        Ok(Response::new(pb::BatchUpdateUsersResponse { users }))
    }

    async fn batch_delete_users(
        &self,
        request: Request<pb::BatchDeleteUsersRequest>,
    ) -> Answer<pb::BatchDeleteUsersResponse> {
        let batch = Batch::<Removal>::parse(request.into_inner())?;
        let users = batch::delete(&self.db, &batch).await?;
        Ok(Response::new(pb::BatchDeleteUsersResponse { users }))
    }

    async fn check_username(
        &self,
        request: Request<pb::CheckUsernameRequest>,
    ) -> Answer<pb::CheckUsernameResponse> {
        let username = request.into_inner().username;
        if username.is_empty() {
            return Err(Error::invalid("username", reason::FIELD_REQUIRED, "is required").into());
        }
        let Ok(username) = Username::parse(&username) else {
            let reason = reason::USERNAME_INVALID.to_owned();
            return Ok(Response::new(pb::CheckUsernameResponse { reason, ..Default::default() }));
        };
        let holder = users::username_holder(&self.db, &username).await?;
        Ok(Response::new(pb::CheckUsernameResponse {
            available: holder.is_none(),
            canonical: username.canonical().to_owned(),
            reason: holder.map_or("", |_| reason::USERNAME_TAKEN).to_owned(),
            available_time: holder.flatten().map(Into::into),
        }))
    }

    type ImportUsersStream = AnswerStream<pb::ImportUsersResponse>;

    async fn import_users(
        &self,
        request: Request<Streaming<pb::ImportUsersRequest>>,
    ) -> Answer<Self::ImportUsersStream> {
        let chunks = request
            .into_inner()
            .map(|message| Chunk::parse(message.map_err(|status| Error::of_message(&status))?));
        let acks = self.imports.run(chunks.boxed())?;
        Ok(Response::new(acks.map_err(Status::from).boxed()))
    }

    type ExportUsersStream = AnswerStream<pb::ExportUsersResponse>;

    async fn export_users(
        &self,
        request: Request<pb::ExportUsersRequest>,
    ) -> Answer<Self::ExportUsersStream> {
        let export = Export::parse(request.into_inner())?;
        let parts = self.exports.run(&export).await?;
        Ok(Response::new(parts.map_err(Status::from).boxed()))
    }

    type WatchUsersStream = AnswerStream<Encoded>;

    async fn watch_users(&self, request: Request<pb::WatchUsersRequest>) -> Answer<Self::WatchUsersStream> {
        let watch = Watch::parse(request.into_inner())?;
        let watcher = Watcher::start(Arc::clone(&self.feed), watch).await?;
        Ok(Response::new(watcher.into_stream().boxed()))
    }
}

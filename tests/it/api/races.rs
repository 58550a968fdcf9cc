//! Concurrent changes of one user: the second sees the result of the first.

use tonic::{Code, Status};
use user_service::pb;

use crate::support::*;

/// Runs two requests that both wait for the lock of the same row before either continues.
async fn race<A: Send + 'static, B: Send + 'static>(
    database: &Database,
    first: impl Future<Output = Result<A, Status>> + Send + 'static,
    second: impl Future<Output = Result<B, Status>> + Send + 'static,
) -> (Result<A, Status>, Result<B, Status>) {
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    let first = tokio::spawn(first);
    eventually("the first request waits", async || (database.count(WAITING).await == 1).then_some(())).await;
    let second = tokio::spawn(second);
    eventually("both requests wait", async || (database.count(WAITING).await == 2).then_some(())).await;
    holder.batch_execute("rollback").await.unwrap();
    (first.await.unwrap(), second.await.unwrap())
}

#[tokio::test]
async fn second_of_two_updates_of_one_revision_is_rejected() {
    let (server, database) = server().await;
    let client = server.client().await;
    let user = created(&mut client.clone(), "alice").await;
    let [one, two] = ["one", "two"].map(|name| {
        let mut client = client.clone();
        let mut request = rename(&user.id, name);
        request.user.as_mut().unwrap().revision = 1;
        async move { client.update_user(request).await }
    });
    let responses: [_; 2] = race(&database, one, two).await.into();
    let (accepted, rejected): (Vec<_>, Vec<_>) = responses.into_iter().partition(Result::is_ok);
    assert_eq!(accepted.len(), 1);
    assert_rejected(rejected.into_iter().next().unwrap(), Code::FailedPrecondition, "REVISION_MISMATCH");
}

#[tokio::test]
async fn delete_of_a_revision_that_a_concurrent_update_replaces_is_rejected() {
    let (server, database) = server().await;
    let user = created(&mut server.client().await, "alice").await;
    let (mut updater, mut deleter) = (server.client().await, server.client().await);
    let mut update = rename(&user.id, "New");
    update.user.as_mut().unwrap().revision = 1;
    let delete = pb::DeleteUserRequest { revision: 1, ..delete(&user.id) };
    let update = async move { updater.update_user(update).await };
    let delete = async move { deleter.delete_user(delete).await };
    let (updated, deleted) = race(&database, update, delete).await;
    updated.unwrap();
    assert_rejected(deleted, Code::FailedPrecondition, "REVISION_MISMATCH");
}

#[tokio::test]
async fn second_of_two_undeletes_finds_a_live_user() {
    let (server, database) = server().await;
    let client = server.client().await;
    let user = created(&mut client.clone(), "alice").await;
    client.clone().delete_user(delete(&user.id)).await.unwrap();
    let call = || {
        let mut client = client.clone();
        let request = pb::UndeleteUserRequest { id: user.id.clone(), ..Default::default() };
        async move { client.undelete_user(request).await }
    };
    let (one, two) = race(&database, call(), call()).await;
    one.unwrap();
    assert_rejected(two, Code::FailedPrecondition, "USER_NOT_DELETED");
}

#[tokio::test]
async fn second_of_two_expunges_finds_no_user() {
    let (server, database) = server().await;
    let client = server.client().await;
    let user = created(&mut client.clone(), "alice").await;
    let call = || {
        let mut client = client.clone();
        let request = pb::ExpungeUserRequest { request_id: new_request_id(), ..expunge(&user.id) };
        async move { client.expunge_user(request).await }
    };
    let (one, two) = race(&database, call(), call()).await;
    one.unwrap();
    assert_rejected(two, Code::NotFound, "USER_NOT_FOUND");
    assert_eq!(database.count("select count(*) from requests").await, 1);
}

#[tokio::test]
async fn repeated_delete_does_not_wait_for_an_undelete_that_is_not_committed() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    client.delete_user(delete(&id)).await.unwrap();
    let other = database.connect().await;
    let undelete = "begin; update users set delete_time = null, purge_time = null, revision = revision + 1";
    other.batch_execute(undelete).await.unwrap();
    let request = pb::DeleteUserRequest { allow_missing: true, ..delete(&id) };
    let user = client.delete_user(request.clone()).await.unwrap().into_inner().user.unwrap();
    assert_eq!((user.delete_time.is_some(), user.revision), (true, 2));
    other.batch_execute("commit").await.unwrap();
    let user = client.delete_user(request).await.unwrap().into_inner().user.unwrap();
    assert_eq!((user.delete_time.is_some(), user.revision), (true, 4));
}

#[tokio::test]
async fn update_that_waits_for_the_create_of_a_missing_user_updates_it() {
    let (server, database) = server().await;
    let id = new_request_id();
    let holder = database.connect().await;
    let insert = format!(
        "begin; insert into users (id, username, username_key, username_held, email, email_key, display_name,
            revision, create_time, update_time)
        values ('{id}', 'bob', 'bob', true, 'b@b', 'b@b', '', 1, now(), now())"
    );
    holder.batch_execute(&insert).await.unwrap();
    let mut client = server.client().await;
    let user = Some(pb::User { id, ..user("alice") });
    let request = pb::UpdateUserRequest { user, allow_missing: true, ..Default::default() };
    let call = tokio::spawn(async move { client.update_user(request).await });
    eventually("the request waits for the row", async || (database.count(WAITING).await == 1).then_some(()))
        .await;
    holder.batch_execute("commit").await.unwrap();
    assert_eq!(call.await.unwrap().unwrap().into_inner().user.unwrap().revision, 2);
}

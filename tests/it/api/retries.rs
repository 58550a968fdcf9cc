//! Request ids: a retried request takes effect once.

use futures_util::future::join_all;
use tonic::Code;
use user_service::pb;

use crate::support::*;

#[tokio::test]
async fn fifty_creates_with_one_request_id_create_one_user_and_get_equal_responses() {
    let (server, database) = server().await;
    let request = pb::CreateUserRequest { request_id: new_request_id(), ..create(user("alice")) };
    let mut calls = Vec::new();
    for _ in 0..50 {
        let (mut client, request) = (server.client().await, request.clone());
        calls.push(async move { client.create_user(request).await.unwrap().into_inner() });
    }
    let responses = join_all(calls).await;
    assert!(responses.iter().all(|response| *response == responses[0]));
    assert_eq!(database.count("select count(*) from users").await, 1);
    assert_eq!(database.count("select count(*) from user_changes").await, 1);
}

#[tokio::test]
async fn retried_change_changes_nothing_and_returns_the_current_user() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    let update = pb::UpdateUserRequest {
        user: Some(pb::User {
            id: id.clone(),
            display_name: "One".into(),
            revision: 1,
            ..Default::default()
        }),
        request_id: new_request_id(),
        ..Default::default()
    };
    // The requests are concurrent; all but the first find another revision.
    let calls = (0..20).map(|_| {
        let (mut client, update) = (client.clone(), update.clone());
        async move { client.update_user(update).await.unwrap().into_inner().user.unwrap().revision }
    });
    assert!(join_all(calls).await.iter().all(|revision| *revision == 2));

    client.update_user(rename(&id, "Two")).await.unwrap();
    let retried = client.update_user(update.clone()).await.unwrap().into_inner().user.unwrap();
    assert_eq!((retried.revision, retried.display_name.as_str()), (3, "Two"));

    let delete = pb::DeleteUserRequest { request_id: new_request_id(), ..delete(&id) };
    let undelete =
        pb::UndeleteUserRequest { id: id.clone(), request_id: new_request_id(), ..Default::default() };
    for revision in [4, 4] {
        let user = client.delete_user(delete.clone()).await.unwrap().into_inner().user.unwrap();
        assert_eq!(user.revision, revision);
    }
    for revision in [5, 5] {
        let user = client.undelete_user(undelete.clone()).await.unwrap().into_inner().user.unwrap();
        assert_eq!(user.revision, revision);
    }
    // The delete is not repeated, although the user could be deleted again.
    let user = client.delete_user(delete).await.unwrap().into_inner().user.unwrap();
    assert_eq!((user.revision, user.delete_time), (5, None));

    let expunge = pb::ExpungeUserRequest { request_id: new_request_id(), ..expunge(&id) };
    let first = client.expunge_user(expunge.clone()).await.unwrap().into_inner();
    assert_eq!(client.expunge_user(expunge).await.unwrap().into_inner(), first);
    // The other records outlive the user and do not recreate it.
    assert_rejected(client.update_user(update).await, Code::NotFound, "USER_NOT_FOUND");
    assert_eq!(database.count("select count(*) from users").await, 0);
    assert_eq!(database.count("select count(*) from user_changes").await, 6);
}

#[tokio::test]
async fn retried_delete_of_a_missing_user_does_not_delete_a_user_created_later() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let id = new_request_id();
    let request = pb::DeleteUserRequest { allow_missing: true, request_id: new_request_id(), ..delete(&id) };
    assert_eq!(client.delete_user(request.clone()).await.unwrap().into_inner().user, None);
    client.create_user(create(pb::User { id, ..user("alice") })).await.unwrap();
    let user = client.delete_user(request).await.unwrap().into_inner().user.unwrap();
    assert_eq!((user.revision, user.delete_time), (1, None));
}

#[tokio::test]
async fn request_id_with_other_content_or_for_another_rpc_is_rejected() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let request_id = new_request_id();
    let request = pb::CreateUserRequest { request_id: request_id.clone(), ..create(user("alice")) };
    let id = client.create_user(request).await.unwrap().into_inner().user.unwrap().id;

    let other = pb::CreateUserRequest { request_id: request_id.clone(), ..create(user("bob")) };
    let status = assert_rejected(client.create_user(other).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(violations(&status), [("request_id".into(), "REQUEST_ID_REUSED".into())]);
    let update = pb::UpdateUserRequest { request_id: request_id.clone(), ..rename(&id, "New") };
    assert_rejected(client.update_user(update).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    let delete = pb::DeleteUserRequest { request_id: request_id.clone(), ..delete(&id) };
    assert_rejected(client.delete_user(delete).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    let expunge = pb::ExpungeUserRequest { request_id, ..expunge(&id) };
    assert_rejected(client.expunge_user(expunge).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(client.get_user(by_id(&id)).await.unwrap().into_inner().user.unwrap().revision, 1);

    // The id of an expunge cannot be reused either, although its user is erased.
    let expunge = pb::ExpungeUserRequest { request_id: new_request_id(), ..crate::support::expunge(&id) };
    client.expunge_user(expunge.clone()).await.unwrap();
    let other = pb::CreateUserRequest { request_id: expunge.request_id, ..create(user("bob")) };
    assert_rejected(client.create_user(other).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
}

#[tokio::test]
async fn failed_request_leaves_no_record_and_a_purged_record_has_no_effect() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    let request = pb::CreateUserRequest { request_id: new_request_id(), ..create(user("alice")) };
    assert_rejected(client.create_user(request.clone()).await, Code::AlreadyExists, "USERNAME_TAKEN");
    let stale = pb::UpdateUserRequest {
        user: Some(pb::User {
            id: id.clone(),
            display_name: "New".into(),
            revision: 7,
            ..Default::default()
        }),
        request_id: new_request_id(),
        ..Default::default()
    };
    assert_rejected(client.update_user(stale).await, Code::FailedPrecondition, "REVISION_MISMATCH");
    assert_eq!(database.count("select count(*) from requests").await, 0);

    client.expunge_user(expunge(&id)).await.unwrap();
    let first = client.create_user(request.clone()).await.unwrap().into_inner().user.unwrap();
    database.connect().await.batch_execute("delete from requests").await.unwrap();
    assert_rejected(client.create_user(request.clone()).await, Code::AlreadyExists, "USERNAME_TAKEN");
    client.expunge_user(expunge(&first.id)).await.unwrap();
    let second = client.create_user(request).await.unwrap().into_inner().user.unwrap();
    assert_ne!(first.id, second.id);
}

#[tokio::test]
async fn reused_request_id_is_rejected_before_any_other_error() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let request_id = new_request_id();
    let request = pb::CreateUserRequest { request_id: request_id.clone(), ..create(user("alice")) };
    let id = client.create_user(request).await.unwrap().into_inner().user.unwrap().id;
    let missing = new_request_id();
    let update = pb::UpdateUserRequest { request_id: request_id.clone(), ..rename(&missing, "x") };
    assert_rejected(client.update_user(update).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    let delete_missing =
        pb::DeleteUserRequest { request_id: request_id.clone(), allow_missing: true, ..delete(&missing) };
    assert_rejected(client.delete_user(delete_missing).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    for id in [missing, id.clone()] {
        client.delete_user(pb::DeleteUserRequest { allow_missing: true, ..delete(&id) }).await.unwrap();
        let undelete = pb::UndeleteUserRequest { id, request_id: request_id.clone(), ..Default::default() };
        assert_rejected(client.undelete_user(undelete).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    }
    // After the erasure, the record no longer shows what the id was used for.
    client.expunge_user(expunge(&id)).await.unwrap();
    let again = pb::ExpungeUserRequest { request_id, ..expunge(&id) };
    assert_rejected(client.expunge_user(again).await, Code::NotFound, "USER_NOT_FOUND");
}

#[tokio::test]
async fn request_id_of_an_erased_user_is_not_accepted_for_another_user() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let other = created(&mut client, "bob").await.id;
    let removal = |id: &str, request_id: &str| pb::DeleteUserRequest {
        request_id: request_id.into(),
        allow_missing: true,
        ..delete(id)
    };
    let batch = |id: &str, request_id: &str| pb::BatchDeleteUsersRequest {
        request_id: request_id.into(),
        items: vec![pb::BatchDeleteUsersItem { id: id.into(), allow_missing: true, ..Default::default() }],
        ..Default::default()
    };
    let [lone_id, batch_id] = [new_request_id(), new_request_id()];
    let erased = created(&mut client, "alice").await.id;
    client.delete_user(removal(&erased, &lone_id)).await.unwrap();
    client.batch_delete_users(batch(&erased, &batch_id)).await.unwrap();
    client.expunge_user(expunge(&erased)).await.unwrap();

    let response = client.delete_user(removal(&other, &lone_id)).await;
    assert_rejected(response, Code::InvalidArgument, "REQUEST_ID_REUSED");
    let response = client.batch_delete_users(batch(&other, &batch_id)).await;
    assert_rejected(response, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(client.get_user(by_id(&other)).await.unwrap().into_inner().user.unwrap().revision, 1);
    client.delete_user(removal(&erased, &lone_id)).await.unwrap();
    client.batch_delete_users(batch(&erased, &batch_id)).await.unwrap();
}

#[tokio::test]
async fn retried_create_does_not_recreate_an_erased_user() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let request = pb::CreateUserRequest { request_id: new_request_id(), ..create(user("alice")) };
    let id = client.create_user(request.clone()).await.unwrap().into_inner().user.unwrap().id;
    client.expunge_user(expunge(&id)).await.unwrap();
    assert_rejected(client.create_user(request).await, Code::NotFound, "USER_NOT_FOUND");
    assert_eq!(database.count("select count(*) from users").await, 0);
}

#[tokio::test]
async fn retried_undelete_does_not_undelete_a_user_that_was_deleted_again() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    client.delete_user(delete(&id)).await.unwrap();
    let undelete =
        pb::UndeleteUserRequest { id: id.clone(), request_id: new_request_id(), ..Default::default() };
    client.undelete_user(undelete.clone()).await.unwrap();
    client.delete_user(delete(&id)).await.unwrap();
    let user = client.undelete_user(undelete.clone()).await.unwrap().into_inner().user.unwrap();
    assert!(user.delete_time.is_some() && user.revision == 4);
    // A purged record has no effect.
    database.connect().await.batch_execute("delete from requests").await.unwrap();
    let user = client.undelete_user(undelete.clone()).await.unwrap().into_inner().user.unwrap();
    assert!(user.delete_time.is_none() && user.revision == 5);
    database.connect().await.batch_execute("delete from requests").await.unwrap();
    assert_rejected(client.undelete_user(undelete).await, Code::FailedPrecondition, "USER_NOT_DELETED");
}

#[tokio::test]
async fn equal_requests_for_a_user_created_again_have_other_fingerprints() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let [id, first, second, third] = [(); 4].map(|()| new_request_id());
    let mut fingerprints = std::collections::HashSet::new();
    for _ in 0..2 {
        let user = pb::User { id: id.clone(), ..user("alice") };
        client
            .create_user(pb::CreateUserRequest { request_id: first.clone(), ..create(user) })
            .await
            .unwrap();
        let update = pb::UpdateUserRequest { request_id: second.clone(), ..rename(&id, "New") };
        client.update_user(update).await.unwrap();
        client.delete_user(delete(&id)).await.unwrap();
        let undelete =
            pb::UndeleteUserRequest { id: id.clone(), request_id: third.clone(), ..Default::default() };
        client.undelete_user(undelete).await.unwrap();
        let admin = database.connect().await;
        let rows = admin.query("select fingerprint from requests", &[]).await.unwrap();
        fingerprints.extend(rows.iter().map(|row| row.get::<_, Vec<u8>>(0)));
        client.expunge_user(expunge(&id)).await.unwrap();
        admin.batch_execute("delete from requests").await.unwrap();
    }
    assert_eq!(fingerprints.len(), 6);
}

/// The retry looks up the record before the first attempt commits, and waits for the same row.
#[tokio::test]
async fn retry_that_overlaps_its_first_attempt_gets_the_same_response() {
    let database = Database::migrated().await;
    // Neither attempt must time out on a slow machine.
    let server = Server::start(&database, &[("LOCK_TIMEOUT_MS", "60000")]).await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    let blocker = database.connect().await;
    blocker.batch_execute(&format!("begin; select from users where id = '{id}' for update")).await.unwrap();
    let mut request = rename(&id, "New");
    request.user.as_mut().unwrap().revision = 1;
    request.request_id = new_request_id();
    let attempts = [request.clone(), request].map(|request| {
        let mut client = client.clone();
        tokio::spawn(async move { client.update_user(request).await })
    });
    eventually("both attempts wait", async || (database.count(WAITING).await == 2).then_some(())).await;
    blocker.batch_execute("rollback").await.unwrap();
    for attempt in attempts {
        assert_eq!(attempt.await.unwrap().unwrap().into_inner().user.unwrap().revision, 2);
    }
    assert_eq!(database.count("select count(*) from user_changes").await, 2);
}

//! Request ids of batches: a retried batch takes effect once.

use futures_util::future::join_all;
use tonic::Code;
use user_service::pb;

use crate::api::batch::{batch_created, batch_delete, batch_update, renamed};
use crate::support::*;

fn names(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|n| format!("user{n}"))
}

/// A batch of creates with a request id.
fn creates(count: usize) -> pb::BatchCreateUsersRequest {
    let users = names(count).map(|name| user(&name));
    pb::BatchCreateUsersRequest { request_id: new_request_id(), ..batch_create(users) }
}

#[tokio::test]
async fn twenty_batches_with_one_request_id_create_their_users_once_and_get_equal_responses() {
    let (server, database) = server().await;
    let request = creates(100);
    let mut calls = Vec::new();
    for _ in 0..20 {
        let (mut client, request) = (server.client().await, request.clone());
        calls.push(async move { client.batch_create_users(request).await.unwrap().into_inner() });
    }
    let responses = join_all(calls).await;
    assert_eq!(responses[0].users.len(), 100);
    assert!(responses.iter().all(|response| *response == responses[0]));
    assert_eq!(database.count("select count(*) from users").await, 100);
    assert_eq!(database.count("select count(*) from user_changes").await, 100);
    assert_eq!(database.count("select count(*) from requests").await, 1);
}

#[tokio::test]
async fn retried_batch_changes_nothing_and_returns_the_current_users() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let create = creates(5);
    let users = client.batch_create_users(create.clone()).await.unwrap().into_inner().users;
    let update = pb::BatchUpdateUsersRequest {
        request_id: new_request_id(),
        ..batch_update(users.iter().rev().map(|user| pb::User { revision: 1, ..renamed(&user.id, "One") }))
    };
    // The requests are concurrent; all but the first find other revisions.
    let calls = (0..10).map(|_| {
        let (mut client, update) = (client.clone(), update.clone());
        async move { client.batch_update_users(update).await.unwrap().into_inner().users }
    });
    for users in join_all(calls).await {
        assert!(users.iter().all(|user| (user.revision, user.display_name.as_str()) == (2, "One")));
    }
    client.update_user(rename(&users[2].id, "Two")).await.unwrap();
    let request = pb::BatchDeleteUsersRequest {
        request_id: new_request_id(),
        ..batch_delete(users[3..].iter().map(|user| user.id.as_str()))
    };
    for _ in 0..2 {
        let deleted = client.batch_delete_users(request.clone()).await.unwrap().into_inner().users;
        assert!(deleted.iter().all(|user| user.revision == 3 && user.delete_time.is_some()));
    }
    // A second delete would add a revision.
    client
        .undelete_user(pb::UndeleteUserRequest { id: users[3].id.clone(), ..Default::default() })
        .await
        .unwrap();
    let deleted = client.batch_delete_users(request).await.unwrap().into_inner().users;
    assert_eq!(deleted.iter().map(|user| user.revision).collect::<Vec<_>>(), [4, 3]);

    let now = client.batch_create_users(create).await.unwrap().into_inner().users;
    assert!(now.iter().zip(&users).all(|(now, user)| now.id == user.id));
    assert_eq!(now.iter().map(|user| user.revision).collect::<Vec<_>>(), [2, 2, 3, 4, 3]);
    let mut again = client.batch_update_users(update).await.unwrap().into_inner().users;
    again.reverse();
    assert_eq!(again, now);
    assert_eq!(database.count("select count(*) from user_changes").await, 5 + 5 + 1 + 2 + 1);
}

#[tokio::test]
async fn request_id_is_valid_for_one_batch_or_one_single_request() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let batch = creates(2);
    let users = client.batch_create_users(batch.clone()).await.unwrap().into_inner().users;
    let single = pb::CreateUserRequest { request_id: new_request_id(), ..create(user("single")) };
    client.create_user(single.clone()).await.unwrap();
    for request_id in [&batch.request_id, &single.request_id] {
        let request_id = || request_id.clone();
        let other = pb::BatchCreateUsersRequest {
            request_id: request_id(),
            ..batch_create([user("other"), user("another")])
        };
        let update = pb::BatchUpdateUsersRequest {
            request_id: request_id(),
            ..batch_update([renamed(&users[0].id, "x"), renamed(&users[1].id, "x")])
        };
        let delete =
            pb::BatchDeleteUsersRequest { request_id: request_id(), ..batch_delete([users[0].id.as_str()]) };
        let rename = pb::UpdateUserRequest { request_id: request_id(), ..rename(&users[0].id, "x") };
        let responses = [
            client.batch_create_users(other).await.map(drop),
            client.batch_update_users(update).await.map(drop),
            client.batch_delete_users(delete).await.map(drop),
            client.update_user(rename).await.map(drop),
        ];
        for response in responses {
            let status = assert_rejected(response, Code::InvalidArgument, "REQUEST_ID_REUSED");
            assert_eq!(violations(&status), [("request_id".into(), "REQUEST_ID_REUSED".into())]);
        }
    }
    assert_eq!(database.count("select count(*) from users where revision = 1").await, 3);
    // Also if the first user is erased, or if a batch of one has the same content.
    client.expunge_user(expunge(&users[0].id)).await.unwrap();
    let again = pb::CreateUserRequest { request_id: batch.request_id, ..create(user("user0")) };
    assert_rejected(client.create_user(again).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    let one = pb::BatchCreateUsersRequest { request_id: single.request_id, ..batch_create([user("single")]) };
    assert_rejected(client.batch_create_users(one).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(database.count("select count(*) from users where revision = 1").await, 2);
}

#[tokio::test]
async fn rejected_batch_leaves_no_record_and_a_purged_record_has_no_effect() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let taken = created(&mut client, "user1").await;
    let request = creates(2);
    let status = client.batch_create_users(request.clone()).await;
    assert_rejected(status, Code::AlreadyExists, "USERNAME_TAKEN");
    assert_eq!(database.count("select count(*) from requests").await, 0);
    client.expunge_user(expunge(&taken.id)).await.unwrap();
    let first = client.batch_create_users(request.clone()).await.unwrap().into_inner().users;

    let purge = async || {
        database.connect().await.batch_execute("delete from requests").await.unwrap();
    };
    purge().await;
    let status = client.batch_create_users(request.clone()).await;
    assert_rejected(status, Code::AlreadyExists, "USERNAME_TAKEN");
    // The id is used again, alternately for a single request and for a batch.
    let request_id = request.request_id;
    let single = pb::UpdateUserRequest { request_id: request_id.clone(), ..rename(&first[0].id, "x") };
    let batch = pb::BatchUpdateUsersRequest {
        request_id,
        ..batch_update(first.iter().map(|user| renamed(&user.id, "y")))
    };
    for revision in [2, 4] {
        for _ in 0..2 {
            let user = client.update_user(single.clone()).await.unwrap().into_inner().user.unwrap();
            assert_eq!(user.revision, revision);
        }
        purge().await;
        for _ in 0..2 {
            let users = client.batch_update_users(batch.clone()).await.unwrap().into_inner().users;
            assert_eq!(users[0].revision, revision + 1);
        }
        purge().await;
    }
}

#[tokio::test]
async fn retried_batch_does_not_recreate_an_erased_user_and_its_record_reveals_nothing() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let create = creates(3);
    let users = client.batch_create_users(create.clone()).await.unwrap().into_inner().users;
    let update = pb::BatchUpdateUsersRequest {
        request_id: new_request_id(),
        ..batch_update(users.iter().map(|user| renamed(&user.id, "zqzq new")))
    };
    client.batch_update_users(update.clone()).await.unwrap();
    let delete = pb::BatchDeleteUsersRequest {
        request_id: new_request_id(),
        ..batch_delete(users.iter().map(|user| user.id.as_str()))
    };
    client.batch_delete_users(delete.clone()).await.unwrap();

    client.expunge_user(expunge(&users[1].id)).await.unwrap();
    // The record still shows that the request was not a batch of one.
    let one =
        pb::BatchCreateUsersRequest { request_id: create.request_id.clone(), ..batch_create([user("one")]) };
    assert_rejected(client.batch_create_users(one).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    let id_fields = ["items[1].user.id", "items[1].user.id", "items[1].id"];
    let responses = [
        client.batch_create_users(create).await.map(drop),
        client.batch_update_users(update).await.map(drop),
        client.batch_delete_users(delete).await.map(drop),
    ];
    for (response, field) in responses.into_iter().zip(id_fields) {
        let status = assert_rejected(response, Code::NotFound, "USER_NOT_FOUND");
        assert_eq!(violations(&status), [(field.into(), "USER_NOT_FOUND".into())]);
    }
    assert_eq!(database.count("select count(*) from users").await, 2);
    assert!(!database.dump().contains("zqzquser1"));
    for user in [&users[0], &users[2]] {
        client.expunge_user(expunge(&user.id)).await.unwrap();
    }
    assert!(!database.dump().to_lowercase().contains(SECRET));
    assert_eq!(database.count("select count(*) from requests").await, 3);
}

#[tokio::test]
async fn fingerprint_of_a_batch_depends_on_the_salt_of_every_user() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let admin = database.connect().await;
    let request = pb::BatchCreateUsersRequest {
        request_id: new_request_id(),
        ..batch_create(names(3).map(|name| pb::User { id: new_request_id(), ..user(&name) }))
    };
    client.batch_create_users(request.clone()).await.unwrap();
    // A retry is recognized, unless the salt of any user is lost.
    client.batch_create_users(request.clone()).await.unwrap();
    let salts = "update users set fingerprint_salt = sha256(fingerprint_salt) where username = $1";
    for name in names(3) {
        let before = admin.query("select fingerprint_salt, id from users", &[]).await.unwrap();
        admin.execute(salts, &[&format!("{SECRET}{name}")]).await.unwrap();
        let status = client.batch_create_users(request.clone()).await;
        assert_rejected(status, Code::InvalidArgument, "REQUEST_ID_REUSED");
        for row in before {
            let restore = "update users set fingerprint_salt = $1 where id = $2";
            let (salt, id): (Vec<u8>, uuid::Uuid) = (row.get(0), row.get(1));
            admin.execute(restore, &[&salt, &id]).await.unwrap();
        }
        client.batch_create_users(request.clone()).await.unwrap();
    }
}

#[tokio::test]
async fn retry_resolves_the_outcome_of_a_batch_whose_connection_broke() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[]).await;
    let mut client = server.client().await;
    let request = creates(100);
    proxy.hold_responses_from("COMMIT");
    let call = tokio::spawn({
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.batch_create_users(request).await }
    });
    let count = "select count(*) from users";
    eventually("the batch is committed", async || (database.count(count).await == 100).then_some(())).await;
    proxy.cut();
    assert_rejected(call.await.unwrap(), Code::Unavailable, "OUTCOME_UNKNOWN");
    let users = eventually("the retry succeeds", async || {
        Some(client.batch_create_users(request.clone()).await.ok()?.into_inner().users)
    })
    .await;
    assert_eq!(users.len(), 100);
    assert_eq!(database.count(count).await, 100);
    assert_eq!(database.count("select count(*) from user_changes").await, 100);

    // A batch that was not committed has no effect before its retry.
    let ids: Vec<_> = users.iter().map(|user| user.id.clone()).collect();
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    let request = pb::BatchDeleteUsersRequest {
        request_id: new_request_id(),
        ..batch_delete(ids.iter().map(String::as_str))
    };
    let call = tokio::spawn({
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.batch_delete_users(request).await }
    });
    eventually("the batch waits for the rows", async || (database.count(WAITING).await == 1).then_some(()))
        .await;
    terminate_backends(&database).await;
    assert_rejected(call.await.unwrap(), Code::Unavailable, "OUTCOME_UNKNOWN");
    holder.batch_execute("rollback").await.unwrap();
    assert_eq!(database.count("select count(*) from users where revision = 1").await, 100);
    eventually("the retry succeeds", async || client.batch_delete_users(request.clone()).await.ok()).await;
    assert_eq!(database.count("select count(*) from users where revision = 2").await, 100);
    batch_created(&mut client, ["more".to_owned()].into_iter()).await;
}

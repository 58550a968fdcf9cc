//! CreateUser.

use futures_util::future::join_all;
use tonic::Code;
use user_service::pb;
use uuid::Uuid;

use crate::support::*;

#[tokio::test]
async fn created_user_has_the_requested_fields_and_revision_1() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let requested = user("alice");
    let user = created(&mut client, "alice").await;
    assert_eq!(
        (&user.username, &user.email, &user.display_name),
        (&requested.username, &requested.email, &requested.display_name)
    );
    assert_eq!((user.revision, user.delete_time, user.purge_time), (1, None, None));
    assert!(user.create_time.is_some() && user.create_time == user.update_time);
    assert_eq!(Uuid::parse_str(&user.id).unwrap().get_version_num(), 7);
    let found = client.get_user(by_id(&user.id)).await.unwrap().into_inner();
    assert_eq!(found, pb::GetUserResponse { user: Some(user), not_modified: false });
    assert_eq!(database.count("select count(*) from user_changes where kind = 1 and revision = 1").await, 1);
}

#[tokio::test]
async fn caller_can_choose_an_id_that_is_not_taken() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let id = Uuid::from_u128(0x1234).to_string();
    let with_id = |name| create(pb::User { id: id.clone(), ..user(name) });
    let user = client.create_user(with_id("alice")).await.unwrap().into_inner().user.unwrap();
    assert_eq!(user.id, id);
    let status =
        assert_rejected(client.create_user(with_id("bob")).await, Code::AlreadyExists, "USER_ID_TAKEN");
    assert_eq!(violations(&status)[0].0, "user.id");
}

#[tokio::test]
async fn output_only_fields_are_ignored() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let time = Some(prost_types::Timestamp { seconds: 1, nanos: 0 });
    let requested =
        pb::User { revision: 7, create_time: time, delete_time: time, purge_time: time, ..user("alice") };
    let user = client.create_user(create(requested)).await.unwrap().into_inner().user.unwrap();
    assert_eq!((user.revision, user.delete_time, user.purge_time), (1, None, None));
    assert_ne!(user.create_time, time);
}

#[tokio::test]
async fn one_of_100_concurrent_creates_of_a_username_in_many_forms_succeeds() {
    let (server, database) = server().await;
    // é as one code point and as two, in upper and lower case, and letters in full width.
    let forms = [
        format!("{SECRET}caf\u{e9}"),
        format!("{SECRET}cafe\u{301}"),
        format!("{SECRET}CAF\u{c9}"),
        format!("{SECRET}CAFE\u{301}"),
        format!("{SECRET}\u{ff43}\u{ff41}\u{ff46}\u{e9}"),
    ];
    let mut calls = Vec::new();
    for n in 0..100 {
        let mut client = server.client().await;
        let user = pb::User { username: forms[n % forms.len()].clone(), ..user("cafe") };
        calls.push(async move { client.create_user(create(user)).await });
    }
    let (created, rejected): (Vec<_>, Vec<_>) = join_all(calls).await.into_iter().partition(Result::is_ok);
    assert_eq!((created.len(), rejected.len()), (1, 99));
    for response in rejected {
        let status = assert_rejected(response, Code::AlreadyExists, "USERNAME_TAKEN");
        assert_eq!(violations(&status)[0].0, "user.username");
    }
    assert_eq!(database.count("select count(*) from users").await, 1);
    assert_eq!(database.count("select count(*) from user_changes").await, 1);
}

#[tokio::test]
async fn two_users_can_have_the_same_email() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    for name in ["alice", "bob"] {
        let user = pb::User { email: format!("{SECRET}@example.com"), ..user(name) };
        client.create_user(create(user)).await.unwrap();
    }
}

#[tokio::test]
async fn validate_only_create_returns_what_the_real_one_would_and_writes_nothing() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let request = pb::CreateUserRequest { request_id: new_request_id(), ..create(user("alice")) };
    let validate = pb::CreateUserRequest { validate_only: true, ..request.clone() };
    let rows = "select (select count(*) from users) + (select count(*) from requests) + (select count(*) from user_changes)";

    let tried = client.create_user(validate.clone()).await.unwrap().into_inner().user.unwrap();
    assert_eq!(database.count(rows).await, 0);
    let real = client.create_user(request.clone()).await.unwrap().into_inner().user.unwrap();
    // Each request makes a new id and new times.
    let without_id_and_times = |user: &pb::User| pb::User {
        id: String::new(),
        create_time: None,
        update_time: None,
        ..user.clone()
    };
    assert_eq!(without_id_and_times(&tried), without_id_and_times(&real));

    // A dry run also distinguishes a retry from a conflict.
    let retried = client.create_user(validate).await.unwrap().into_inner().user.unwrap();
    assert_eq!(retried, real);
    let other = pb::CreateUserRequest { validate_only: true, ..create(user("alice")) };
    assert_rejected(client.create_user(other).await, Code::AlreadyExists, "USERNAME_TAKEN");
    assert_eq!(database.count(rows).await, 3);
}

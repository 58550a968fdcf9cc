//! UpdateUser.

use futures_util::future::join_all;
use prost_types::FieldMask;
use tonic::Code;
use user_service::pb;

use crate::support::*;

fn update(user: pb::User, paths: &[&str]) -> pb::UpdateUserRequest {
    let update_mask = Some(FieldMask { paths: paths.iter().map(ToString::to_string).collect() });
    pb::UpdateUserRequest { user: Some(user), update_mask, ..Default::default() }
}

#[tokio::test]
async fn mask_selects_what_is_written() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let old = created(&mut client, "alice").await;
    let new = pb::User { id: old.id.clone(), ..user("bob") };
    let cleared = pb::User { display_name: String::new(), ..new.clone() };
    let expect = |username: &pb::User, email: &pb::User, display_name: &str| {
        (username.username.clone(), email.email.clone(), display_name.to_owned())
    };
    // Each case continues with the result of the one before.
    let cases = [
        (
            "absent, with one field",
            pb::UpdateUserRequest {
                user: Some(pb::User { email: String::new(), display_name: String::new(), ..new.clone() }),
                ..Default::default()
            },
            expect(&new, &old, &old.display_name),
        ),
        (
            "absent, without fields",
            pb::UpdateUserRequest {
                user: Some(pb::User { id: old.id.clone(), ..Default::default() }),
                ..Default::default()
            },
            expect(&new, &old, &old.display_name),
        ),
        ("one path", update(new.clone(), &["email"]), expect(&new, &new, &old.display_name)),
        ("a path to an empty value", update(cleared.clone(), &["display_name"]), expect(&new, &new, "")),
        (
            "output only",
            update(
                old.clone(),
                &["id", "create_time", "update_time", "delete_time", "purge_time", "revision"],
            ),
            expect(&new, &new, ""),
        ),
        (
            "two paths",
            update(old.clone(), &["username", "display_name"]),
            expect(&old, &new, &old.display_name),
        ),
        ("star", update(cleared, &["*"]), expect(&new, &new, "")),
    ];
    for (what, request, (username, email, display_name)) in cases {
        let mut request = request;
        request.user.as_mut().unwrap().revision = 0;
        let user = client.update_user(request).await.unwrap().into_inner().user.unwrap();
        assert_eq!((user.username, user.email, user.display_name), (username, email, display_name), "{what}");
    }
}

#[tokio::test]
async fn invalid_update_mask_is_rejected() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    for paths in [&["nickname"][..], &["*", "email"], &["user.email"], &[""], &["email", "\0"]] {
        let status = client.update_user(update(user.clone(), paths)).await;
        let status = assert_rejected(status, Code::InvalidArgument, "UPDATE_MASK_INVALID");
        assert_eq!(violations(&status), [("update_mask".into(), "UPDATE_MASK_INVALID".into())]);
    }
    // All fields, but a required one is empty.
    let status = client.update_user(update(pb::User { email: String::new(), ..user }, &["*"])).await;
    let status = assert_rejected(status, Code::InvalidArgument, "FIELD_REQUIRED");
    assert_eq!(violations(&status), [("user.email".into(), "FIELD_REQUIRED".into())]);
}

#[tokio::test]
async fn update_that_changes_nothing_keeps_revision_and_update_time() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    let again = client.update_user(update(user.clone(), &["*"])).await.unwrap().into_inner().user.unwrap();
    assert_eq!(again, user);
    assert_eq!(database.count("select count(*) from user_changes").await, 1);
}

#[tokio::test]
async fn second_of_two_writers_is_rejected_with_the_current_revision() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    let writers = ["one", "two"].map(|display_name| {
        let mut client = client.clone();
        let user = pb::User { display_name: display_name.into(), ..user.clone() };
        async move { client.update_user(update(user, &["display_name"])).await }
    });
    let (accepted, rejected): (Vec<_>, Vec<_>) = join_all(writers).await.into_iter().partition(Result::is_ok);
    assert_eq!((accepted.len(), rejected.len()), (1, 1));
    let accepted = accepted.into_iter().next().unwrap().unwrap().into_inner().user.unwrap();
    assert_eq!(accepted.revision, 2);
    let status =
        assert_rejected(rejected.into_iter().next().unwrap(), Code::FailedPrecondition, "REVISION_MISMATCH");
    let details = tonic_types::StatusExt::get_error_details(&status);
    assert_eq!(details.error_info().unwrap().metadata["current_revision"], "2");
    assert_eq!(client.get_user(by_id(&user.id)).await.unwrap().into_inner().user, Some(accepted));
}

#[tokio::test]
async fn each_of_64_concurrent_updates_adds_one_revision() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    let writers = (0..64).map(|n| {
        let (mut client, id) = (client.clone(), user.id.clone());
        async move {
            client.update_user(rename(&id, &format!("name {n}"))).await.unwrap().into_inner().user.unwrap()
        }
    });
    let mut revisions: Vec<_> = join_all(writers).await.iter().map(|user| user.revision).collect();
    revisions.sort_unstable();
    assert_eq!(revisions, (2..=65).collect::<Vec<_>>());
    let last = client.get_user(by_id(&user.id)).await.unwrap().into_inner().user.unwrap();
    assert_eq!(last.revision, 65);
    assert_eq!(database.count("select count(distinct revision) from user_changes").await, 65);
}

#[tokio::test]
async fn earlier_value_is_written_again_if_it_is_no_longer_current() {
    let (server, database) = server().await;
    let client = server.client().await;
    let id = created(&mut client.clone(), "alice").await.id;
    // A writer that waits for the row lock may have seen the requested value before the wait.
    let writers = (0..8).map(|n| {
        let (mut client, id) = (client.clone(), id.clone());
        async move {
            let mut revisions = Vec::new();
            for update in 0..60 {
                let requested = ["A", "B"][(n + update) % 2];
                let user =
                    client.update_user(rename(&id, requested)).await.unwrap().into_inner().user.unwrap();
                assert_eq!(user.display_name, requested);
                revisions.push(user.revision);
            }
            revisions
        }
    });
    join_all(writers).await;
    let last = client.clone().get_user(by_id(&id)).await.unwrap().into_inner().user.unwrap();
    assert_eq!(database.count("select count(distinct revision) from user_changes").await, last.revision);
}

#[tokio::test]
async fn update_time_never_decreases() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    // The clock of another replica is ahead.
    database
        .connect()
        .await
        .batch_execute("update users set update_time = now() + interval '1 hour'")
        .await
        .unwrap();
    let ahead = client.get_user(by_id(&user.id)).await.unwrap().into_inner().user.unwrap();
    let after = client.update_user(rename(&user.id, "New")).await.unwrap().into_inner().user.unwrap();
    assert_eq!((after.update_time, after.revision), (ahead.update_time, 2));
    let deleted = client.delete_user(delete(&user.id)).await.unwrap().into_inner().user.unwrap();
    assert_eq!((deleted.update_time, deleted.revision), (ahead.update_time, 3));
    let undelete = pb::UndeleteUserRequest { id: user.id, ..Default::default() };
    let back = client.undelete_user(undelete).await.unwrap().into_inner().user.unwrap();
    assert_eq!((back.update_time, back.revision), (ahead.update_time, 4));
}

#[tokio::test]
async fn rename_to_a_taken_username_is_rejected_but_changing_its_case_is_accepted() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    created(&mut client, "bob").await;
    let named = |name: &str| update(pb::User { id: alice.id.clone(), ..user(name) }, &["username"]);
    assert_rejected(client.update_user(named("BOB")).await, Code::AlreadyExists, "USERNAME_TAKEN");
    let user = client.update_user(named("ALICE")).await.unwrap().into_inner().user.unwrap();
    assert_eq!((user.username, user.revision), (format!("{SECRET}ALICE"), 2));
}

#[tokio::test]
async fn deleted_or_missing_user_cannot_be_updated() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    client.delete_user(delete(&user.id)).await.unwrap();
    assert_rejected(
        client.update_user(rename(&user.id, "New")).await,
        Code::FailedPrecondition,
        "USER_DELETED",
    );
    assert_rejected(
        client.update_user(rename(&new_request_id(), "New")).await,
        Code::NotFound,
        "USER_NOT_FOUND",
    );
}

#[tokio::test]
async fn twenty_concurrent_updates_with_allow_missing_create_one_user_and_update_it() {
    let (server, database) = server().await;
    let client = server.client().await;
    let id = new_request_id();
    let updates = (0..20).map(|n| {
        let mut client = client.clone();
        let user = pb::User { id: id.clone(), display_name: format!("name {n}"), ..user("alice") };
        let request = pb::UpdateUserRequest { allow_missing: true, ..update(user, &["display_name"]) };
        async move { client.update_user(request).await.unwrap().into_inner().user.unwrap().revision }
    });
    let mut revisions = join_all(updates).await;
    revisions.sort_unstable();
    assert_eq!(revisions, (1..=20).collect::<Vec<_>>());
    assert_eq!(database.count("select count(*) from users").await, 1);

    // The fields that only a create requires are required only if the user is missing.
    let mut client = client;
    let request = pb::UpdateUserRequest { allow_missing: true, ..rename(&id, "New") };
    assert_eq!(client.update_user(request).await.unwrap().into_inner().user.unwrap().revision, 21);
    let request = pb::UpdateUserRequest { allow_missing: true, ..rename(&new_request_id(), "New") };
    let status = assert_rejected(client.update_user(request).await, Code::InvalidArgument, "FIELD_REQUIRED");
    assert_eq!(violations(&status).len(), 2);
}

#[tokio::test]
async fn validate_only_update_returns_what_the_real_one_would_and_writes_nothing() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    let real = pb::UpdateUserRequest { request_id: new_request_id(), ..rename(&user.id, "New") };
    let validate = pb::UpdateUserRequest { validate_only: true, ..real.clone() };
    let tried = client.update_user(validate).await.unwrap().into_inner().user.unwrap();
    assert_eq!(client.get_user(by_id(&user.id)).await.unwrap().into_inner().user, Some(user));
    assert_eq!(database.count("select count(*) from requests").await, 0);
    let done = client.update_user(real).await.unwrap().into_inner().user.unwrap();
    assert_eq!(pb::User { update_time: None, ..tried }, pb::User { update_time: None, ..done.clone() });

    let stale = pb::UpdateUserRequest {
        user: Some(pb::User { revision: 1, ..done }),
        validate_only: true,
        ..Default::default()
    };
    assert_rejected(client.update_user(stale).await, Code::FailedPrecondition, "REVISION_MISMATCH");
}

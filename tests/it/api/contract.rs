//! Rules of the contract for several rpcs: guards of irreversible changes, keys, views, sizes,
//! and codes that stock clients retry.

use tonic::Code;
use tonic_types::StatusExt;
use user_service::pb;

use crate::support::*;

#[tokio::test]
async fn expunge_erases_only_deleted_users_of_the_expected_revision() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    let guarded = |revision| pb::ExpungeUserRequest { force: false, revision, ..expunge(&alice.id) };
    let status = client.expunge_user(guarded(0)).await;
    assert_rejected(status, Code::FailedPrecondition, "USER_NOT_DELETED");
    client.delete_user(delete(&alice.id)).await.unwrap();
    let status = client.expunge_user(guarded(1)).await;
    let status = assert_rejected(status, Code::FailedPrecondition, "REVISION_MISMATCH");
    assert_eq!(status.get_error_details().error_info().unwrap().metadata["current_revision"], "2");
    let tried = pb::ExpungeUserRequest { validate_only: true, ..guarded(2) };
    assert!(client.expunge_user(tried).await.unwrap().into_inner().expunge_time.is_some());
    assert_eq!(database.count("select count(*) from users").await, 1);
    let expunged = client.expunge_user(guarded(2)).await.unwrap().into_inner();
    assert!(expunged.user_id == alice.id && expunged.expunge_time.is_some());
    assert_eq!(database.count("select count(*) from users").await, 0);

    assert_rejected(client.expunge_user(guarded(2)).await, Code::NotFound, "USER_NOT_FOUND");
    let allowed = pb::ExpungeUserRequest { allow_missing: true, ..guarded(2) };
    assert_eq!(client.expunge_user(allowed).await.unwrap().into_inner().expunge_time, None);
    assert_eq!(database.count("select count(*) from user_changes where kind = 5").await, 1);
}

#[tokio::test]
async fn undelete_checks_the_revision_and_accepts_validate_only() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    client.delete_user(delete(&alice.id)).await.unwrap();
    let undelete = |revision, validate_only| {
        let id = alice.id.clone();
        pb::UndeleteUserRequest { id, revision, validate_only, ..Default::default() }
    };
    let status = client.undelete_user(undelete(1, false)).await;
    assert_rejected(status, Code::FailedPrecondition, "REVISION_MISMATCH");
    let tried = client.undelete_user(undelete(2, true)).await.unwrap().into_inner().user.unwrap();
    assert!(tried.delete_time.is_none() && tried.revision == 3);
    let found = client.get_user(by_id(&alice.id)).await.unwrap().into_inner().user.unwrap();
    assert!(found.delete_time.is_some() && found.revision == 2);
    let user = client.undelete_user(undelete(2, false)).await.unwrap().into_inner().user.unwrap();
    assert!(user.delete_time.is_none() && user.revision == 3);
}

#[tokio::test]
async fn batch_delete_accepts_missing_users_and_releases_usernames() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let (alice, bob) = (created(&mut client, "alice").await, created(&mut client, "bob").await);
    let bob = client.delete_user(delete(&bob.id)).await.unwrap().into_inner().user.unwrap();
    let missing = new_request_id();
    let item = |id: &str, allow_missing| pb::BatchDeleteUsersItem {
        id: id.into(),
        allow_missing,
        release_username: true,
        ..Default::default()
    };
    let request = |allow_missing| pb::BatchDeleteUsersRequest {
        items: [&alice.id, &bob.id, &missing].map(|id| item(id, allow_missing)).into(),
        request_id: new_request_id(),
        ..Default::default()
    };
    let status = client.batch_delete_users(request(false)).await;
    let status = assert_rejected(status, Code::NotFound, "USER_NOT_FOUND");
    let expected = [("items[1].id", "USER_DELETED"), ("items[2].id", "USER_NOT_FOUND")];
    assert_eq!(violations(&status), expected.map(|(field, reason)| (field.into(), reason.into())));
    let request = request(true);
    for _ in 0..2 {
        let users = client.batch_delete_users(request.clone()).await.unwrap().into_inner().users;
        assert!(users[0].delete_time.is_some() && users[0].revision == 2);
        assert_eq!((users[1].delete_time, users[1].revision), (bob.delete_time, 3));
        assert_eq!(users[2], pb::User { id: missing.clone(), ..Default::default() });
    }
    created(&mut client, "alice").await;
    created(&mut client, "bob").await;
}

#[tokio::test]
async fn get_user_finds_the_only_live_user_with_an_address() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    let by_email = |email: &str| pb::GetUserRequest {
        key: Some(pb::get_user_request::Key::Email(email.into())),
        ..Default::default()
    };
    let found = client.get_user(by_email("ZQZQalice@EXAMPLE.com")).await.unwrap().into_inner();
    assert_eq!(found.user.as_ref(), Some(&alice));
    let known = pb::GetUserRequest { if_revision_not: 1, ..by_email(&alice.email) };
    assert!(client.get_user(known).await.unwrap().into_inner().not_modified);
    let other = pb::User { email: alice.email.clone(), ..user("other") };
    let other = client.create_user(create(other)).await.unwrap().into_inner().user.unwrap();
    let status = client.get_user(by_email(&alice.email)).await;
    assert_rejected(status, Code::FailedPrecondition, "EMAIL_AMBIGUOUS");
    client.delete_user(delete(&other.id)).await.unwrap();
    assert_eq!(client.get_user(by_email(&alice.email)).await.unwrap().into_inner().user, Some(alice.clone()));
    client.delete_user(delete(&alice.id)).await.unwrap();
    let status = client.get_user(by_email(&alice.email)).await;
    assert_rejected(status, Code::NotFound, "USER_NOT_FOUND");
    let status = client.get_user(by_email("no address")).await;
    let status = assert_rejected(status, Code::InvalidArgument, "EMAIL_INVALID");
    assert_eq!(violations(&status)[0].0, "email");
}

#[tokio::test]
async fn estimate_is_given_for_unfiltered_lists_only() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    client.batch_create_users(batch_create((0..500).map(|n| user(&format!("user{n}"))))).await.unwrap();
    database.connect().await.batch_execute("analyze users").await.unwrap();
    let mut estimate = async |filter| {
        let request = pb::ListUsersRequest { filter, ..Default::default() };
        client.list_users(request).await.unwrap().into_inner().total_size_estimate
    };
    assert_eq!(estimate(None).await, 500);
    assert_eq!(estimate(Some(pb::UserFilter { include_deleted: true, ..Default::default() })).await, 500);
    let filter = pb::UserFilter { email: "zqzquser1@example.com".into(), ..Default::default() };
    assert_eq!(estimate(Some(filter)).await, 0);
}

#[tokio::test]
async fn every_view_is_accepted_and_an_unknown_one_is_rejected() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    for view in [pb::UserView::Unspecified, pb::UserView::Basic, pb::UserView::Full] {
        let request = pb::ListUsersRequest { view: view.into(), ..Default::default() };
        assert_eq!(
            client.list_users(request).await.unwrap().into_inner().users,
            std::slice::from_ref(&alice)
        );
    }
    let unknown = 99;
    let request = pb::ListUsersRequest { view: unknown, ..Default::default() };
    let status = assert_rejected(client.list_users(request).await, Code::InvalidArgument, "FIELD_INVALID");
    assert_eq!(violations(&status)[0].0, "view");
    let request = pb::BatchCreateUsersRequest { view: unknown, ..batch_create([user("bob")]) };
    let status = client.batch_create_users(request).await;
    assert_rejected(status, Code::InvalidArgument, "FIELD_INVALID");
}

#[tokio::test]
async fn full_view_is_given_for_up_to_100_elements() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let lookup = |count: usize, view: pb::UserView| {
        let key = || pb::UserKey { key: Some(pb::user_key::Key::Id(new_request_id())) };
        let keys = (0..count).map(|_| key()).collect();
        pb::LookupUsersRequest { keys, view: view.into(), ..Default::default() }
    };
    client.lookup_users(lookup(101, pb::UserView::Basic)).await.unwrap();
    client.lookup_users(lookup(100, pb::UserView::Full)).await.unwrap();
    let response = client.lookup_users(lookup(101, pb::UserView::Full)).await;
    let status = assert_rejected(response, Code::InvalidArgument, "BATCH_TOO_LARGE");
    assert_eq!(violations(&status)[0].0, "keys");
}

#[tokio::test]
async fn retry_may_ask_for_another_view() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let request_id = new_request_id();
    let request = pb::BatchCreateUsersRequest { request_id, ..batch_create([user("alice")]) };
    let first = client.batch_create_users(request.clone()).await.unwrap().into_inner();
    let full = pb::BatchCreateUsersRequest { view: pb::UserView::Full.into(), ..request };
    assert_eq!(client.batch_create_users(full).await.unwrap().into_inner(), first);
}

#[tokio::test]
async fn overload_is_unavailable_with_a_pushback_that_stock_clients_obey() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_WATCHERS", "1")]).await;
    let mut client = server.client().await;
    let _running = client.watch_users(pb::WatchUsersRequest::default()).await.unwrap();
    let status = client.watch_users(pb::WatchUsersRequest::default()).await;
    let status = assert_rejected(status.map(drop), Code::Unavailable, "OVERLOADED");
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "1000");
    let delay = status.get_error_details().retry_info().unwrap().retry_delay;
    assert_eq!(delay, Some(std::time::Duration::from_secs(1)));
}

/// The proto is the only list of reasons: their names are sent unchanged.
#[test]
fn reasons_are_named_as_they_are_sent() {
    assert_eq!(pb::ErrorReason::UsernameTaken.as_str_name(), "USERNAME_TAKEN");
    assert_eq!(pb::ErrorReason::from_str_name("OVERLOADED"), Some(pb::ErrorReason::Overloaded));
}

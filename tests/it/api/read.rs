//! GetUser and CheckUsername.

use tonic::Code;
use user_service::pb;

use crate::support::*;

#[tokio::test]
async fn user_is_found_by_every_form_of_its_username() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "J\u{fc}rgen").await;
    for form in ["j\u{fc}rgen", "J\u{dc}RGEN", "ju\u{308}rgen", "J\u{fc}rgen"] {
        let found = client.get_user(by_username(&format!("{SECRET}{form}"))).await.unwrap().into_inner();
        assert_eq!(found.user.as_ref(), Some(&user));
    }
}

#[tokio::test]
async fn missing_user_is_not_found_and_its_key_is_named() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let id = new_request_id();
    let name = format!("{SECRET}missing");
    for (key, name) in [(by_id(&id), &id), (by_username(&name), &name)] {
        let status = assert_rejected(client.get_user(key).await, Code::NotFound, "USER_NOT_FOUND");
        let resource = tonic_types::StatusExt::get_error_details(&status).resource_info().cloned().unwrap();
        assert_eq!((resource.resource_type.as_str(), &resource.resource_name), ("users.v1.User", name));
    }
}

#[tokio::test]
async fn user_of_a_known_revision_is_not_sent_again() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    let known = pb::GetUserRequest { if_revision_not: 1, ..by_id(&user.id) };
    let response = client.get_user(known.clone()).await.unwrap().into_inner();
    assert_eq!(response, pb::GetUserResponse { user: None, not_modified: true });
    client.update_user(rename(&user.id, "New")).await.unwrap();
    let response = client.get_user(known).await.unwrap().into_inner();
    assert_eq!((response.user.unwrap().revision, response.not_modified), (2, false));
}

#[tokio::test]
async fn check_username_predicts_what_create_returns() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let mut check = async |username: String| {
        client.check_username(pb::CheckUsernameRequest { username }).await.unwrap().into_inner()
    };
    let name = format!("{SECRET}Alice");
    let free = check(name.clone()).await;
    assert_eq!(
        (free.available, free.canonical.as_str(), free.reason()),
        (true, "zqzqalice", pb::ErrorReason::Unspecified)
    );

    let user = created(&mut server.client().await, "alice").await;
    let taken = check(name.clone()).await;
    assert_eq!(
        (taken.available, taken.reason(), taken.available_time),
        (false, pb::ErrorReason::UsernameTaken, None)
    );

    let deleted =
        server.client().await.delete_user(delete(&user.id)).await.unwrap().into_inner().user.unwrap();
    let held = check(name).await;
    assert_eq!((held.available, held.available_time), (false, deleted.purge_time));
    assert!(held.available_time.is_some());

    for invalid in ["no", "two words", "\u{430}pple", "6f0f7a1e-0000-4000-8000-000000000000"] {
        let response = check(invalid.into()).await;
        assert_eq!(
            (response.available, response.canonical.as_str(), response.reason()),
            (false, "", pb::ErrorReason::UsernameInvalid)
        );
    }
    let status = server.client().await.check_username(pb::CheckUsernameRequest::default()).await;
    assert_rejected(status, Code::InvalidArgument, "FIELD_REQUIRED");
}

//! Invalid input of every kind is rejected, the field is named, and nothing is written.

use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy, rt::TokioExecutor};
use prost::Message;
use tonic::{Code, Status};
use user_service::pb::{self, get_user_request::Key, user_key};
use uuid::Uuid;

use crate::api::batch::{batch_delete, batch_update, renamed};
use crate::support::*;

/// Texts that no username, e-mail address or token may be.
fn invalid_texts() -> Vec<String> {
    let mut texts: Vec<String> = [
        "\0",
        "a\0b",
        "\u{1}",
        "line\nbreak",
        "tab\tstop",
        "\u{7f}\u{80}\u{9f}",
        "\u{202e}drowssap",
        "\u{2066}isolated\u{2069}",
        "\u{feff}bom",
        "a\u{200b}b",
        "\u{1f600}\u{1f600}\u{1f600}",
        "p\u{430}ypal",
        "\u{3b1}bc",
        "two words",
        " padded ",
        ".dot",
        "dot.",
        "-dash",
        "a@b@c",
        "@",
        "123456",
        "ab",
        "6f0f7a1e-1111-4222-8333-944444444444",
        "6f0f7a1e111142228333944444444444",
        "urn:uuid:6f0f7a1e-1111-4222-8333-944444444444",
        "Robert'); drop table users;--",
        "' or '1'='1",
        "$1",
        "%s%s%n",
        "../../etc/passwd",
        "${jndi:ldap://x}",
        "<script>alert(1)</script>",
        "\u{fdfa}\u{fdfa}\u{fdfa}",
        "I\u{307}stanbul\u{345}",
        "\u{10ffff}\u{10ffff}\u{10ffff}",
        "e\u{301}\u{301}\u{301}\u{301}\u{0}",
    ]
    .map(str::to_owned)
    .to_vec();
    texts.push("x".repeat(65));
    texts.push("x".repeat(1024 * 1024));
    texts.push("\u{1f600}".repeat(200_000));
    texts
}

/// Whether a text may be a display name: up to 100 printable characters.
fn is_display_name(text: &str) -> bool {
    let is_hidden = |c: char| c.is_control() || "\u{202e}\u{2066}\u{2069}\u{feff}".contains(c);
    text.chars().count() <= 100 && !text.contains(is_hidden)
}

/// Asserts that each request was rejected for its field only.
#[track_caller]
fn assert_all_rejected(responses: Vec<(&str, Result<(), Status>)>, text: &str) {
    for (field, response) in responses {
        let status = response.expect_err(&format!("{field} accepts {text:.40?}"));
        assert_eq!(status.code(), Code::InvalidArgument, "{field} {text:.40?}: {status:?}");
        let fields: Vec<_> = violations(&status).into_iter().map(|(field, _)| field).collect();
        assert_eq!(fields, [field], "{text:.40?}");
        assert!(!status.message().contains(text) || text.len() < 4, "the error repeats {field}: {status:?}");
    }
}

#[tokio::test]
async fn every_invalid_field_is_rejected_and_named() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    for text in invalid_texts() {
        let t = || text.clone();
        let with = |user: pb::User| create(user);
        let update = |user: pb::User| pb::UpdateUserRequest {
            user: Some(pb::User { id: alice.id.clone(), revision: 99, ..user }),
            ..Default::default()
        };
        let list = |filter| pb::ListUsersRequest { order_by: 3, filter: Some(filter), ..Default::default() };
        let mut responses: Vec<(&str, Result<(), Status>)> = Vec::new();
        let mut add = |field, response: Result<(), Status>| responses.push((field, response));

        let request = with(pb::User { username: t(), ..user("bob") });
        add("user.username", client.create_user(request).await.map(drop));
        let request = with(pb::User { email: t(), ..user("bob") });
        add("user.email", client.create_user(request).await.map(drop));
        if !is_display_name(&text) {
            let request = with(pb::User { display_name: t(), ..user("bob") });
            add("user.display_name", client.create_user(request).await.map(drop));
        }
        add("username", client.get_user(by_username(&text)).await.map(drop));
        let request = update(pb::User { username: t(), ..Default::default() });
        add("user.username", client.update_user(request).await.map(drop));
        let request = update(pb::User { email: t(), ..Default::default() });
        add("user.email", client.update_user(request).await.map(drop));
        let request = pb::UndeleteUserRequest { id: alice.id.clone(), username: t(), ..Default::default() };
        add("username", client.undelete_user(request).await.map(drop));
        let request = pb::ListUsersRequest { page_token: t(), ..Default::default() };
        add("page_token", client.list_users(request).await.map(drop));
        let request =
            pb::ListUsersRequest { order_by: 0, ..list(pb::UserFilter { email: t(), ..Default::default() }) };
        add("filter.email", client.list_users(request).await.map(drop));

        if Uuid::parse_str(&text).is_err() || text.len() != 36 {
            let request = with(pb::User { id: t(), ..user("bob") });
            add("user.id", client.create_user(request).await.map(drop));
            let request = pb::CreateUserRequest { request_id: t(), ..with(user("bob")) };
            add("request_id", client.create_user(request).await.map(drop));
            add("id", client.get_user(by_id(&text)).await.map(drop));
            add("id", client.delete_user(delete(&text)).await.map(drop));
            let request = pb::DeleteUserRequest { request_id: t(), ..delete(&alice.id) };
            add("request_id", client.delete_user(request).await.map(drop));
            add("id", client.expunge_user(expunge(&text)).await.map(drop));
        }

        assert_all_rejected(responses, &text);

        let prefix = list(pb::UserFilter { username_prefix: t(), ..Default::default() });
        let check =
            client.check_username(pb::CheckUsernameRequest { username: t() }).await.unwrap().into_inner();
        assert_eq!(check.reason(), pb::ErrorReason::UsernameInvalid, "{text:.40?}");
        match client.list_users(prefix).await {
            Ok(page) => assert_eq!(page.into_inner().users, []),
            Err(status) => assert_eq!(violations(&status)[0].0, "filter.username_prefix"),
        }
    }
    let rows = "select (select count(*) from users) + (select count(*) from requests) + (select count(*) from user_changes)";
    assert_eq!(database.count(rows).await, 2);
    assert_eq!(client.get_user(by_id(&alice.id)).await.unwrap().into_inner().user, Some(alice));
}

#[tokio::test]
async fn every_invalid_field_of_a_list_is_rejected_and_named_by_its_index() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    let alices = || renamed(&alice.id, "New");
    let lookup = |key| pb::LookupUsersRequest {
        keys: [user_key::Key::Id(alice.id.clone()), key].map(|key| pb::UserKey { key: Some(key) }).into(),
        include_deleted: true,
        ..Default::default()
    };
    for text in invalid_texts() {
        let t = || text.clone();
        let mut responses: Vec<(&str, Result<(), Status>)> = Vec::new();
        let mut add = |field, response: Result<(), Status>| responses.push((field, response));

        let request = batch_create([user("bob"), pb::User { username: t(), ..user("eve") }]);
        add("items[1].user.username", client.batch_create_users(request).await.map(drop));
        let request = batch_create([user("bob"), pb::User { email: t(), ..user("eve") }]);
        add("items[1].user.email", client.batch_create_users(request).await.map(drop));
        let request = batch_update([pb::User { username: t(), ..alices() }]);
        add("items[0].user.username", client.batch_update_users(request).await.map(drop));
        let request = batch_update([pb::User { email: t(), ..alices() }]);
        add("items[0].user.email", client.batch_update_users(request).await.map(drop));
        let request = lookup(user_key::Key::Username(t()));
        add("keys[1].username", client.lookup_users(request).await.map(drop));
        let request = lookup(user_key::Key::Email(t()));
        add("keys[1].email", client.lookup_users(request).await.map(drop));
        if !is_display_name(&text) {
            let request = batch_create([pb::User { display_name: t(), ..user("bob") }]);
            add("items[0].user.display_name", client.batch_create_users(request).await.map(drop));
            let request = batch_update([renamed(&alice.id, &text)]);
            add("items[0].user.display_name", client.batch_update_users(request).await.map(drop));
        }
        if Uuid::parse_str(&text).is_err() || text.len() != 36 {
            let request = batch_create([pb::User { id: t(), ..user("bob") }]);
            add("items[0].user.id", client.batch_create_users(request).await.map(drop));
            let request = batch_update([alices(), renamed(&text, "New")]);
            add("items[1].user.id", client.batch_update_users(request).await.map(drop));
            let request = batch_delete([alice.id.as_str(), &text]);
            add("items[1].id", client.batch_delete_users(request).await.map(drop));
            let request = lookup(user_key::Key::Id(t()));
            add("keys[1].id", client.lookup_users(request).await.map(drop));
            let request = pb::BatchCreateUsersRequest { request_id: t(), ..batch_create([user("bob")]) };
            add("request_id", client.batch_create_users(request).await.map(drop));
            let request = pb::BatchUpdateUsersRequest { request_id: t(), ..batch_update([alices()]) };
            add("request_id", client.batch_update_users(request).await.map(drop));
            let request =
                pb::BatchDeleteUsersRequest { request_id: t(), ..batch_delete([alice.id.as_str()]) };
            add("request_id", client.batch_delete_users(request).await.map(drop));
        }
        assert_all_rejected(responses, &text);
    }
    let negative = [-1, i64::MIN].map(|revision| pb::BatchDeleteUsersItem {
        id: new_request_id(),
        revision,
        ..Default::default()
    });
    let request = pb::BatchDeleteUsersRequest { items: negative.into(), ..Default::default() };
    let status = client.batch_delete_users(request).await;
    let status = assert_rejected(status, Code::InvalidArgument, "FIELD_INVALID");
    let expected = [0, 1].map(|n| (format!("items[{n}].revision"), "FIELD_INVALID".to_owned()));
    assert_eq!(violations(&status), expected);
    let rows = "select (select count(*) from users) + (select count(*) from requests) + (select count(*) from user_changes)";
    assert_eq!(database.count(rows).await, 2);
    assert_eq!(client.get_user(by_id(&alice.id)).await.unwrap().into_inner().user, Some(alice));
}

#[tokio::test]
async fn import_rejects_only_the_invalid_users() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    for (n, text) in invalid_texts().into_iter().enumerate() {
        let good = format!("good{n}");
        let is_id = Uuid::parse_str(&text).is_ok() && text.len() == 36;
        let mut users = vec![
            user(&good),
            pb::User { username: text.clone(), ..user("bob") },
            pb::User { email: text.clone(), ..user("bob") },
        ];
        let mut expected = vec![(1, "username"), (2, "email")];
        if !is_display_name(&text) {
            expected.push((3, "display_name"));
            users.push(pb::User { display_name: text.clone(), ..user("bob") });
        }
        if !is_id {
            expected.push((users.len() as i32, "id"));
            users.push(pb::User { id: text.clone(), ..user("bob") });
        }
        let request = pb::ImportUsersRequest { import_id: new_request_id(), chunk: 1, mode: 3, users };
        let is_too_large = request.encoded_len() > 4 << 20;
        let mut acks = client.import_users(futures_util::stream::iter([request])).await.unwrap().into_inner();
        if is_too_large {
            let status = assert_rejected(acks.message().await, Code::InvalidArgument, "FIELD_INVALID");
            assert_eq!(violations(&status)[0].0, "request");
            continue;
        }
        let ack = acks.message().await.unwrap().unwrap();
        assert_eq!(ack.created, 1, "{text:.40?}");
        let rejected: Vec<_> = ack
            .failures
            .iter()
            .flat_map(|failure| failure.violations.iter().map(|v| (failure.position, v.field.as_str())))
            .collect();
        assert_eq!(rejected, expected, "{text:.40?}");
        let repeats = |v: &pb::ImportViolation| v.description.contains(&text);
        assert!(text.len() < 4 || !ack.failures.iter().flat_map(|failure| &failure.violations).any(repeats));
    }
    let invalid = "select count(*) from users where username_key not like 'zqzqgood%'";
    assert_eq!(database.count(invalid).await, 0);
}

#[tokio::test]
async fn all_violations_are_reported_at_once_in_the_order_of_the_fields() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let request = pb::CreateUserRequest {
        user: Some(pb::User {
            id: "x".into(),
            username: String::new(),
            email: "x".into(),
            display_name: "\u{7}".into(),
            ..Default::default()
        }),
        request_id: "x".into(),
        validate_only: false,
    };
    let status = assert_rejected(client.create_user(request).await, Code::InvalidArgument, "FIELD_INVALID");
    let expected = [
        ("request_id", "FIELD_INVALID"),
        ("user.id", "FIELD_INVALID"),
        ("user.username", "FIELD_REQUIRED"),
        ("user.email", "EMAIL_INVALID"),
        ("user.display_name", "FIELD_INVALID"),
    ];
    assert_eq!(violations(&status), expected.map(|(field, reason)| (field.to_owned(), reason.to_owned())));
}

#[tokio::test]
async fn missing_fields_are_rejected_and_named() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let (create, update) = (pb::BatchCreateUsersItem::default(), pb::BatchUpdateUsersItem::default());
    let create = pb::BatchCreateUsersRequest { items: vec![create], ..Default::default() };
    let update = pb::BatchUpdateUsersRequest { items: vec![update], ..Default::default() };
    let responses = [
        ("user", client.create_user(pb::CreateUserRequest::default()).await.map(drop)),
        ("key", client.get_user(pb::GetUserRequest::default()).await.map(drop)),
        (
            "id",
            client
                .get_user(pb::GetUserRequest { key: Some(Key::Id(String::new())), ..Default::default() })
                .await
                .map(drop),
        ),
        ("user", client.update_user(pb::UpdateUserRequest::default()).await.map(drop)),
        ("id", client.delete_user(pb::DeleteUserRequest::default()).await.map(drop)),
        ("id", client.undelete_user(pb::UndeleteUserRequest::default()).await.map(drop)),
        ("id", client.expunge_user(pb::ExpungeUserRequest::default()).await.map(drop)),
        ("keys", client.lookup_users(pb::LookupUsersRequest::default()).await.map(drop)),
        ("items", client.batch_create_users(pb::BatchCreateUsersRequest::default()).await.map(drop)),
        ("items", client.batch_update_users(pb::BatchUpdateUsersRequest::default()).await.map(drop)),
        ("items", client.batch_delete_users(pb::BatchDeleteUsersRequest::default()).await.map(drop)),
        ("items[0].user", client.batch_create_users(create).await.map(drop)),
        ("items[0].user", client.batch_update_users(update).await.map(drop)),
        ("items[0].id", client.batch_delete_users(batch_delete([""])).await.map(drop)),
    ];
    for (field, response) in responses {
        let status = assert_rejected(response, Code::InvalidArgument, "FIELD_REQUIRED");
        assert_eq!(violations(&status)[0].0, field);
    }
    let nil = Uuid::nil().to_string();
    assert_rejected(client.get_user(by_id(&nil)).await, Code::InvalidArgument, "FIELD_INVALID");
    let negative = pb::DeleteUserRequest { revision: -1, ..delete(&new_request_id()) };
    assert_rejected(client.delete_user(negative).await, Code::InvalidArgument, "FIELD_INVALID");
}

/// Sends bytes unchanged. Returns the HTTP status and the trailers, or the headers of a response
/// without trailers.
async fn send(
    server: &Server,
    path: &str,
    content_type: &str,
    encoding: &str,
    timeout: &str,
    bytes: Vec<u8>,
) -> (u16, HeaderMap) {
    let http = legacy::Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Full<_>>();
    let request = Request::post(format!("http://{}{path}", server.addr))
        .header("content-type", content_type)
        .header("te", "trailers")
        .header("grpc-encoding", encoding)
        .header("grpc-timeout", timeout)
        .body(Full::new(bytes::Bytes::from(bytes)))
        .unwrap();
    let response = http.request(request).await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let trailers = response.into_body().collect().await.unwrap().trailers().cloned();
    (status, trailers.unwrap_or(headers))
}

fn framed(message: &[u8]) -> Vec<u8> {
    let len = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &len[..], message].concat()
}

#[tokio::test]
async fn malformed_messages_are_rejected_and_the_service_keeps_serving() {
    const GET: &str = "/users.v1.UserService/GetUser";
    const GRPC: &str = "application/grpc";
    let (server, _) = server().await;
    let huge =
        framed(&create(pb::User { display_name: "x".repeat(5 << 20), ..user("alice") }).encode_to_vec());
    let invalid = Code::InvalidArgument as i32;
    let cases = [
        ("too large", "/users.v1.UserService/CreateUser", GRPC, "60S", huge, invalid),
        ("not protobuf", GET, GRPC, "1S", framed(&[0xff; 20]), invalid),
        ("not UTF-8", GET, GRPC, "1S", framed(&[0x0a, 2, 0xc3, 0x28]), invalid),
        ("shorter than its length", GET, GRPC, "1S", framed(b"abc")[..6].to_vec(), invalid),
        ("no message", GET, GRPC, "1S", Vec::new(), invalid),
        ("compressed without an encoding", GET, GRPC, "1S", vec![1, 0, 0, 0, 0], invalid),
        ("not a watch request", "/users.v1.UserService/WatchUsers", GRPC, "1S", framed(&[0xff; 20]), invalid),
        (
            "not an export request",
            "/users.v1.UserService/ExportUsers",
            GRPC,
            "1S",
            framed(&[0xff; 20]),
            invalid,
        ),
        ("not a chunk", "/users.v1.UserService/ImportUsers", GRPC, "1S", framed(&[0xff; 20]), invalid),
        ("an unknown rpc", "/users.v1.UserService/Nope", GRPC, "1S", framed(b""), Code::Unimplemented as i32),
        ("an unknown service", "/nope.Nope/Nope", GRPC, "1S", framed(b""), Code::Unimplemented as i32),
        ("an invalid timeout", GET, GRPC, "soon", framed(b""), invalid),
        ("a timeout too long", GET, GRPC, "123456789S", framed(b""), invalid),
        ("a timeout without a number", GET, GRPC, "\u{fc}", framed(b""), invalid),
    ];
    for (what, path, content_type, timeout, bytes, code) in cases {
        let (_, headers) = send(&server, path, content_type, "identity", timeout, bytes).await;
        let status = headers.get("grpc-status").unwrap_or_else(|| panic!("{what}: {headers:?}"));
        assert_eq!(status.to_str().unwrap(), code.to_string(), "{what}: {headers:?}");
        assert_eq!(headers.contains_key("grpc-status-details-bin"), code == invalid, "{what}");
    }
    let (_, headers) = send(&server, GET, GRPC, "gzip", "1S", framed(b"")).await;
    assert_eq!(headers.get("grpc-status").unwrap(), "12", "{headers:?}");
    let (status, _) = send(&server, GET, "application/json", "identity", "1S", b"{}".to_vec()).await;
    assert_eq!(status, 415);
    created(&mut server.client().await, "alice").await;
}

#[tokio::test]
async fn message_of_very_many_empty_elements_is_rejected_without_taking_memory() {
    let (server, _) = server().await;
    let before = server.peak_memory();
    // An element takes two bytes: the tag of the list, and a length of 0.
    let lists = [("LookupUsers", 0x0a), ("BatchCreateUsers", 0x0a), ("ImportUsers", 0x22)];
    for (rpc, tag) in lists {
        let path = format!("/users.v1.UserService/{rpc}");
        let message = framed(&[tag, 0].repeat((4 << 20) / 2 - 8));
        let (_, headers) = send(&server, &path, "application/grpc", "identity", "9S", message).await;
        let status = Status::from_header_map(&headers).unwrap();
        let status = assert_rejected(Err::<(), _>(status), Code::InvalidArgument, "BATCH_TOO_LARGE");
        assert_eq!(violations(&status)[0].0, "request");
    }
    // The elements would take some 400 MiB.
    let growth = server.peak_memory() - before;
    assert!(growth < 64 << 20, "{growth}");
}

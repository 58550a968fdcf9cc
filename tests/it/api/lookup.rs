//! LookupUsers: many users by id, username or e-mail address.

use tonic::{Code, transport::Channel};
use user_service::pb::{self, user_key::Key, user_service_client::UserServiceClient};

use crate::api::batch::{batch_update, renamed};
use crate::support::*;

type Client = UserServiceClient<Channel>;

fn lookup(keys: impl IntoIterator<Item = Key>) -> pb::LookupUsersRequest {
    let keys = keys.into_iter().map(|key| pb::UserKey { key: Some(key) }).collect();
    pb::LookupUsersRequest { keys, ..Default::default() }
}

async fn found(client: &mut Client, request: pb::LookupUsersRequest) -> Vec<pb::LookupUsersResult> {
    client.lookup_users(request).await.unwrap().into_inner().results
}

async fn batch_created(client: &mut Client, users: impl Iterator<Item = pb::User>) -> Vec<pb::User> {
    client.batch_create_users(batch_create(users)).await.unwrap().into_inner().users
}

#[tokio::test]
async fn thousand_keys_of_all_kinds_are_looked_up_in_order_by_one_statement() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let users = batch_created(&mut client, (0..701).map(|n| user(&format!("user{n}")))).await;
    let keys = (0..1000).map(|n: usize| {
        let user = &users[n * 7 % users.len()];
        match n % 5 {
            0 => (Key::Id(user.id.clone()), Some(user)),
            1 => (Key::Username(user.username.to_uppercase()), Some(user)),
            2 => (Key::Email(user.email.replace("example", "EXAMPLE").replace(SECRET, "ZQzq")), Some(user)),
            3 => (Key::Id(new_request_id()), None),
            _ => (Key::Email(format!("{SECRET}missing{n}@example.com")), None),
        }
    });
    let (keys, expected): (Vec<_>, Vec<_>) = keys.unzip();
    let before = server.statements();
    let results = found(&mut client, lookup(keys)).await;
    assert_eq!(server.statements() - before, 1);
    assert_eq!(results.len(), 1000);
    for (n, (result, expected)) in results.iter().zip(expected).enumerate() {
        assert_eq!(result.users.first(), expected, "{n}");
        assert!(result.users.len() < 2 && !result.has_more, "{n}");
    }
}

#[tokio::test]
async fn lookup_of_a_shared_address_returns_the_oldest_users_and_has_more() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let shared = |name: &str, email: &str| pb::User { email: email.into(), ..user(name) };
    let mut oldest = Vec::new();
    for n in 0..6 {
        let request = create(shared(&format!("many{n}"), "Zqzq.Many@example.com"));
        oldest.push(client.create_user(request).await.unwrap().into_inner().user.unwrap());
    }
    batch_created(&mut client, (0..4).map(|n| shared(&format!("four{n}"), "zqzq.four@example.com"))).await;
    let email = |email: &str| Key::Email(email.into());
    let keys = ["zqzq.many@EXAMPLE.com", "zqzq.four@example.com"].map(email);
    let results = found(&mut client, lookup(keys)).await;
    assert_eq!(results[0].users, oldest[..4]);
    let counts: Vec<_> = results.iter().map(|result| (result.users.len(), result.has_more)).collect();
    assert_eq!(counts, [(4, true), (4, false)]);

    // Soft-deleted users count only with `include_deleted`, and keep their place in the order.
    for user in &oldest[1..4] {
        client.delete_user(delete(&user.id)).await.unwrap();
    }
    let request = lookup([email("zqzq.many@example.com")]);
    let live = found(&mut client, request.clone()).await.remove(0);
    assert_eq!(live.users, [oldest[0].clone(), oldest[4].clone(), oldest[5].clone()]);
    assert!(!live.has_more);
    let all = found(&mut client, pb::LookupUsersRequest { include_deleted: true, ..request }).await.remove(0);
    assert!(all.users.iter().zip(&oldest).all(|(found, user)| found.id == user.id));
    assert_eq!((all.users.len(), all.has_more), (4, true));
}

#[tokio::test]
async fn soft_deleted_users_are_found_only_on_request_and_never_by_a_released_username() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let (held, released) = (created(&mut client, "held").await, created(&mut client, "released").await);
    let keys = |user: &pb::User| {
        [Key::Id(user.id.clone()), Key::Username(user.username.clone()), Key::Email(user.email.clone())]
    };
    let request = lookup([keys(&held), keys(&released)].concat());
    let all = pb::LookupUsersRequest { include_deleted: true, ..request.clone() };
    client.delete_user(delete(&held.id)).await.unwrap();
    client
        .delete_user(pb::DeleteUserRequest { release_username: true, ..delete(&released.id) })
        .await
        .unwrap();
    let counts = |results: Vec<pb::LookupUsersResult>| -> Vec<usize> {
        results.iter().map(|result| result.users.len()).collect()
    };
    assert_eq!(counts(found(&mut client, request).await), [0; 6]);
    assert_eq!(counts(found(&mut client, all).await), [1, 1, 1, 1, 0, 1]);
}

#[tokio::test]
async fn largest_possible_response_is_accepted_by_clients() {
    let (server, database) = server().await;
    let largest = "insert into users (id, username, username_key, username_held, email, email_key,
            display_name, revision, create_time, update_time, delete_time, purge_time)
        select gen_random_uuid(), repeat(U&'\\+010400', 64), n, true, repeat('e', 254), n % 1000 || '@e.org',
            repeat(U&'\\+010400', 100), 9223372036854775807, now(), now(), now(), now()
        from generate_series(1, 5000) as n";
    database.connect().await.batch_execute(largest).await.unwrap();
    let keys = (0..1000).map(|n| Key::Email(format!("{n}@e.org")));
    let request = pb::LookupUsersRequest { include_deleted: true, ..lookup(keys) };
    let results = found(&mut server.client().await, request).await;
    assert!(results.iter().all(|result| result.users.len() == 4 && result.has_more));
}

#[tokio::test]
async fn invalid_keys_are_rejected_and_named_by_their_index() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let keys = [
        Some(Key::Id("x".into())),
        Some(Key::Username("alice".into())),
        Some(Key::Username("a b".into())),
        Some(Key::Email("nowhere".into())),
        Some(Key::Email(String::new())),
        None,
    ];
    let request =
        pb::LookupUsersRequest { keys: keys.map(|key| pb::UserKey { key }).into(), ..Default::default() };
    let status = assert_rejected(client.lookup_users(request).await, Code::InvalidArgument, "FIELD_INVALID");
    let expected = [
        ("keys[0].id", "FIELD_INVALID"),
        ("keys[2].username", "USERNAME_INVALID"),
        ("keys[3].email", "EMAIL_INVALID"),
        ("keys[4].email", "FIELD_REQUIRED"),
        ("keys[5].key", "FIELD_REQUIRED"),
    ];
    assert_eq!(violations(&status), expected.map(|(field, reason)| (field.to_owned(), reason.to_owned())));
    assert_eq!(rejected_elements(&status, "keys"), "0,2-5");

    for (count, reason) in [(0, "FIELD_REQUIRED"), (1001, "BATCH_TOO_LARGE")] {
        let keys = (0..count).map(|_| Key::Id(String::new()));
        let status = assert_rejected(client.lookup_users(lookup(keys)).await, Code::InvalidArgument, reason);
        assert_eq!(violations(&status), [("keys".into(), reason.into())]);
    }
}

#[tokio::test]
async fn lookup_never_sees_a_part_of_a_batch() {
    let (server, _) = server().await;
    let client = server.client().await;
    let users = batch_created(&mut client.clone(), (0..100).map(|n| user(&format!("user{n}")))).await;
    let rename = |name: String| batch_update(users.iter().map(|user| renamed(&user.id, &name)));
    client.clone().batch_update_users(rename("before".into())).await.unwrap();
    let requests: Vec<_> = (0..60).map(|n| rename(format!("batch {n}"))).collect();
    let writer = tokio::spawn({
        let mut client = client.clone();
        async move {
            for request in requests {
                client.batch_update_users(request).await.unwrap();
            }
        }
    });
    // Each kind of key is a separate index scan.
    let keys = users.iter().enumerate().map(|(n, user)| match n % 3 {
        0 => Key::Id(user.id.clone()),
        1 => Key::Username(user.username.clone()),
        _ => Key::Email(user.email.clone()),
    });
    let request = lookup(keys);
    let mut seen = std::collections::HashSet::new();
    while !writer.is_finished() {
        let results = found(&mut client.clone(), request.clone()).await;
        let name = results[0].users[0].display_name.clone();
        assert!(results.iter().all(|result| result.users[0].display_name == name));
        seen.insert(name);
    }
    writer.await.unwrap();
    assert!(seen.len() > 1);
}

#[tokio::test]
async fn two_keys_with_one_canonical_form_are_rejected_and_both_are_named() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let keys = [
        Key::Username(format!("{SECRET}Alice")),
        Key::Username(format!("{SECRET}bob")),
        Key::Email(format!("{SECRET}alice@example.com")),
        Key::Username(format!("{SECRET}ALICE")),
        Key::Email(format!("{SECRET}alice@EXAMPLE.com")),
    ];
    let status = client.lookup_users(lookup(keys)).await;
    let status = assert_rejected(status, Code::InvalidArgument, "FIELD_INVALID");
    let fields: Vec<_> = violations(&status).into_iter().map(|(field, _)| field).collect();
    assert_eq!(fields, [0, 2, 3, 4].map(|n| format!("keys[{n}].key")));
}

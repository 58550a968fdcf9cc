//! Atomic batches: every item takes effect, or none does and every rejected item is named.

use prost_types::FieldMask;
use tonic::{Code, transport::Channel};
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::support::*;

type Client = UserServiceClient<Channel>;

pub fn batch_update(users: impl IntoIterator<Item = pb::User>) -> pb::BatchUpdateUsersRequest {
    let item = |user| pb::BatchUpdateUsersItem { user: Some(user), ..Default::default() };
    pb::BatchUpdateUsersRequest { items: users.into_iter().map(item).collect(), ..Default::default() }
}

pub fn batch_delete<'a>(ids: impl IntoIterator<Item = &'a str>) -> pb::BatchDeleteUsersRequest {
    let item = |id: &str| pb::BatchDeleteUsersItem { id: id.into(), ..Default::default() };
    pb::BatchDeleteUsersRequest { items: ids.into_iter().map(item).collect(), ..Default::default() }
}

/// Creates users by one batch.
pub async fn batch_created(client: &mut Client, names: impl Iterator<Item = String>) -> Vec<pb::User> {
    let request = batch_create(names.map(|name| user(&name)));
    client.batch_create_users(request).await.unwrap().into_inner().users
}

/// An item that updates the display name.
pub fn renamed(id: &str, display_name: &str) -> pb::User {
    pb::User { id: id.into(), display_name: display_name.into(), ..Default::default() }
}

/// Counts all rows that a batch can write.
async fn rows(database: &Database) -> [i64; 4] {
    let mut counts = [0; 4];
    let counted =
        ["users", "user_changes", "requests", "users where delete_time is not null or revision > 1"];
    for (count, what) in counts.iter_mut().zip(counted) {
        *count = database.count(&format!("select count(*) from {what}")).await;
    }
    counts
}

#[tokio::test]
async fn thousand_users_are_created_updated_and_deleted_in_order_by_one_statement_each() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let wanted: Vec<_> = (0..1000).map(|n| user(&format!("user{}", n * 7 % 1000))).collect();

    let request =
        pb::BatchCreateUsersRequest { request_id: new_request_id(), ..batch_create(wanted.clone()) };
    let before = server.statements();
    let users = client.batch_create_users(request).await.unwrap().into_inner().users;
    assert_eq!(users.len(), 1000);
    for (user, wanted) in users.iter().zip(wanted) {
        assert_eq!((&user.username, &user.email), (&wanted.username, &wanted.email));
        assert_eq!((&user.display_name, user.revision, &user.delete_time), (&wanted.display_name, 1, &None));
    }

    // Every second user changes; the order is reversed.
    let changes = users.iter().rev().enumerate().map(|(n, user)| match n % 2 {
        0 => renamed(&user.id, "New"),
        _ => pb::User { revision: 1, ..user.clone() },
    });
    let request = pb::BatchUpdateUsersRequest {
        request_id: new_request_id(),
        ..batch_update(changes.collect::<Vec<_>>())
    };
    let changed = client.batch_update_users(request).await.unwrap().into_inner().users;
    assert_eq!(changed.len(), 1000);
    for (n, (after, before)) in changed.iter().zip(users.iter().rev()).enumerate() {
        match n % 2 {
            0 => assert_eq!((&after.id, after.revision, after.display_name.as_str()), (&before.id, 2, "New")),
            _ => assert_eq!(after, before),
        }
    }

    let request = pb::BatchDeleteUsersRequest {
        request_id: new_request_id(),
        ..batch_delete(users.iter().map(|user| user.id.as_str()))
    };
    let deleted = client.batch_delete_users(request).await.unwrap().into_inner().users;
    assert_eq!(deleted.len(), 1000);
    for (after, before) in deleted.iter().zip(&users) {
        assert_eq!(after.id, before.id);
        assert!(after.delete_time.is_some() && after.purge_time.is_some());
    }
    assert_eq!(server.statements() - before, 3);
    assert_eq!(rows(&database).await, [1000, 2500, 3, 1000]);
    let revisions = "select count(*) from users u join user_changes c on c.user_id = u.id
        and c.kind = 3 and c.revision = u.revision and u.username_held";
    assert_eq!(database.count(revisions).await, 1000);
}

#[tokio::test]
async fn all_37_invalid_items_of_a_thousand_are_named() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let mut users: Vec<_> = (0..1000).map(|n| user(&format!("user{n}"))).collect();
    let mut expected = Vec::new();
    for bad in 0..37 {
        let n = bad * 27;
        let user = &mut users[n];
        let (field, reason) = match bad % 6 {
            0 => (set(&mut user.id, "no uuid", "user.id"), "FIELD_INVALID"),
            1 => (set(&mut user.username, "", "user.username"), "FIELD_REQUIRED"),
            2 => (set(&mut user.username, "two words", "user.username"), "USERNAME_INVALID"),
            3 => (set(&mut user.email, "nowhere", "user.email"), "EMAIL_INVALID"),
            4 => (set(&mut user.display_name, "\u{7}", "user.display_name"), "FIELD_INVALID"),
            _ => (set(&mut user.email, "", "user.email"), "FIELD_REQUIRED"),
        };
        expected.push((format!("items[{n}].{field}"), reason.to_owned()));
    }
    let status = client.batch_create_users(batch_create(users)).await;
    let status = assert_rejected(status, Code::InvalidArgument, "FIELD_INVALID");
    assert_eq!(violations(&status), expected);
    assert_eq!(rejected_elements(&status, "items").split(',').count(), 37);
    assert_eq!(rows(&database).await, [0; 4]);
}

fn set(value: &mut String, to: &str, field: &'static str) -> &'static str {
    to.clone_into(value);
    field
}

#[tokio::test]
async fn all_37_conflicting_items_of_a_thousand_are_named() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let users = batch_created(&mut client, (0..1000).map(|n| format!("user{n}"))).await;
    let held = batch_created(&mut client, ["live".into(), "dead".into()].into_iter()).await;
    let is_dead = |n: usize| n.is_multiple_of(27) && n / 27 % 6 == 1 && n / 27 < 37;
    let dead = users.iter().enumerate().filter(|(n, _)| is_dead(*n)).map(|(_, user)| user.id.as_str());
    client.batch_delete_users(batch_delete(dead.chain([held[1].id.as_str()]))).await.unwrap();
    let before = rows(&database).await;

    let mut items: Vec<_> = users.iter().map(|user| renamed(&user.id, "New")).collect();
    let mut expected = Vec::new();
    for bad in 0..37 {
        let n = bad * 27;
        let item = &mut items[n];
        let (field, reason) = match bad % 6 {
            0 => (set(&mut item.id, &new_request_id(), "user.id"), "USER_NOT_FOUND"),
            1 => ("user.id", "USER_DELETED"),
            2 => {
                item.revision = 7;
                ("user.revision", "REVISION_MISMATCH")
            }
            3 => {
                (set(&mut item.username, &held[0].username.to_uppercase(), "user.username"), "USERNAME_TAKEN")
            }
            4 => (set(&mut item.username, &held[1].username, "user.username"), "USERNAME_TAKEN"),
            _ => (set(&mut item.username, "zqzqTwice", "user.username"), "USERNAME_TAKEN"),
        };
        expected.push((format!("items[{n}].{field}"), reason.to_owned()));
    }
    for validate_only in [true, false] {
        let request = pb::BatchUpdateUsersRequest {
            request_id: new_request_id(),
            validate_only,
            ..batch_update(items.clone())
        };
        let status =
            assert_rejected(client.batch_update_users(request).await, Code::NotFound, "USER_NOT_FOUND");
        assert_eq!(violations(&status), expected);
        assert_eq!(rejected_elements(&status, "items").split(',').count(), 37);
        assert_eq!(rows(&database).await, before);
    }
}

#[tokio::test]
async fn rejection_of_a_thousand_items_names_all_and_reaches_the_client() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let users = batch_created(&mut client, (0..1000).map(|n| format!("user{n}"))).await;
    let again = batch_create(users.iter().cloned());
    let status =
        assert_rejected(client.batch_create_users(again).await, Code::AlreadyExists, "USER_ID_TAKEN");
    assert_eq!(rejected_elements(&status, "items"), "0-999");
    assert!(violations(&status).len() > 40);
    assert_eq!(violations(&status)[1], ("items[1].user.id".into(), "USER_ID_TAKEN".into()));
    let request = batch_create((0..1000).map(|_| pb::User::default()));
    let status =
        assert_rejected(client.batch_create_users(request).await, Code::InvalidArgument, "FIELD_REQUIRED");
    assert_eq!(rejected_elements(&status, "items"), "0-999");
}

#[tokio::test]
async fn items_that_conflict_with_each_other_are_all_named() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let id = new_request_id();
    let request = batch_create([
        user("alice"),
        pb::User { id: id.clone(), ..user("bob") },
        user("carol"),
        pb::User { id: id.to_uppercase(), ..user("ALICE") },
    ]);
    let status =
        assert_rejected(client.batch_create_users(request).await, Code::AlreadyExists, "USER_ID_TAKEN");
    let named = |fields: &[(&str, &str)]| -> Vec<(String, String)> {
        fields.iter().map(|(field, reason)| ((*field).into(), (*reason).into())).collect()
    };
    let expected = [
        ("items[0].user.username", "USERNAME_TAKEN"),
        ("items[1].user.id", "USER_ID_TAKEN"),
        ("items[3].user.id", "USER_ID_TAKEN"),
    ];
    assert_eq!(violations(&status), named(&expected));
    assert_eq!(rejected_elements(&status, "items"), "0-1,3");
    assert_eq!(rows(&database).await, [0; 4]);

    // A repeated id is rejected before the users are read.
    let items = [&id, "x", &id.to_uppercase(), &new_request_id()].map(|id| renamed(id, "New"));
    let status = client.batch_update_users(batch_update(items)).await;
    let status = assert_rejected(status, Code::InvalidArgument, "FIELD_INVALID");
    let expected = [0, 1, 2].map(|n| (format!("items[{n}].user.id"), "FIELD_INVALID".to_owned()));
    assert_eq!(violations(&status), expected);
    let status = client.batch_delete_users(batch_delete([id.as_str(), id.as_str()])).await;
    let status = assert_rejected(status, Code::InvalidArgument, "FIELD_INVALID");
    assert_eq!(violations(&status), [0, 1].map(|n| (format!("items[{n}].id"), "FIELD_INVALID".to_owned())));
}

#[tokio::test]
async fn batch_changes_usernames_but_cannot_swap_them() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let users = batch_created(&mut client, ["alice", "bob", "carol"].map(String::from).into_iter()).await;
    let named = |of: usize, name: &str| pb::User {
        id: users[of].id.clone(),
        username: format!("{SECRET}{name}"),
        ..Default::default()
    };
    let swap = batch_update([named(0, "bob"), named(1, "alice"), named(2, "dave")]);
    let status =
        assert_rejected(client.batch_update_users(swap).await, Code::AlreadyExists, "USERNAME_TAKEN");
    let expected = [0, 1].map(|n| (format!("items[{n}].user.username"), "USERNAME_TAKEN".to_owned()));
    assert_eq!(violations(&status), expected);

    // A user can change the case of its own username.
    let mut request = batch_update([named(0, "ALICE"), named(1, "robert"), named(2, "carol")]);
    request.items.iter_mut().for_each(|item| item.release_username = true);
    let changed = client.batch_update_users(request).await.unwrap().into_inner().users;
    let expected = [("zqzqALICE", 2), ("zqzqrobert", 2), ("zqzqcarol", 1)];
    for (user, (username, revision)) in changed.iter().zip(expected) {
        assert_eq!((user.username.as_str(), user.revision), (username, revision));
    }
    let request =
        batch_update([named(2, "bob"), pb::User { email: "zqzq@example.org".into(), ..named(0, "al") }]);
    let changed = client.batch_update_users(request).await.unwrap().into_inner().users;
    let found = client.get_user(by_username("zqzqbob")).await.unwrap().into_inner().user.unwrap();
    assert_eq!(found, changed[0]);
    assert_eq!((changed[1].email.as_str(), changed[1].revision), ("zqzq@example.org", 3));
}

#[tokio::test]
async fn each_item_has_its_own_update_mask() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let users = batch_created(&mut client, (0..3).map(|n| format!("user{n}"))).await;
    let masks: [&[&str]; 3] = [&["display_name"], &["*"], &["revision"]];
    let items = users.iter().zip(masks).map(|(old, paths)| {
        let new = pb::User {
            id: old.id.clone(),
            display_name: String::new(),
            ..user(&format!("{}x", &old.username[4..]))
        };
        let update_mask = Some(FieldMask { paths: paths.iter().map(ToString::to_string).collect() });
        pb::BatchUpdateUsersItem { user: Some(new), update_mask, ..Default::default() }
    });
    let request = pb::BatchUpdateUsersRequest { items: items.collect(), ..Default::default() };
    let changed = client.batch_update_users(request).await.unwrap().into_inner().users;
    assert_eq!(changed[0].username, users[0].username);
    assert_eq!((changed[0].display_name.as_str(), changed[0].revision), ("", 2));
    assert_eq!((changed[1].username.as_str(), changed[1].revision), ("zqzquser1x", 2));
    assert_eq!(changed[2], users[2]);
    let bad = pb::BatchUpdateUsersItem {
        user: Some(renamed(&users[0].id, "x")),
        update_mask: Some(FieldMask { paths: vec!["nickname".into()] }),
        ..Default::default()
    };
    let request = pb::BatchUpdateUsersRequest { items: vec![bad], ..Default::default() };
    let status = client.batch_update_users(request).await;
    let status = assert_rejected(status, Code::InvalidArgument, "UPDATE_MASK_INVALID");
    assert_eq!(violations(&status), [("items[0].update_mask".into(), "UPDATE_MASK_INVALID".into())]);
}

#[tokio::test]
async fn status_code_is_that_of_the_violation_that_is_hardest_to_fix() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let users = batch_created(&mut client, (0..5).map(|n| format!("user{n}"))).await;
    client.delete_user(delete(&users[1].id)).await.unwrap();
    let stale = pb::User { revision: 9, ..renamed(&users[2].id, "x") };
    let taken = pb::User { username: users[0].username.clone(), ..renamed(&users[3].id, "x") };
    let items = [
        (renamed(&users[4].id, "x"), Code::Ok, ""),
        (stale, Code::FailedPrecondition, "REVISION_MISMATCH"),
        (taken, Code::AlreadyExists, "USERNAME_TAKEN"),
        (renamed(&users[1].id, "x"), Code::FailedPrecondition, "USER_DELETED"),
        (renamed(&new_request_id(), "x"), Code::NotFound, "USER_NOT_FOUND"),
    ];
    for count in 2..=items.len() {
        let (_, code, reason) = items[count - 1];
        let request = batch_update(items[..count].iter().map(|(user, ..)| user.clone()));
        let status = assert_rejected(client.batch_update_users(request).await, code, reason);
        assert_eq!(violations(&status).len(), count - 1);
    }
    let request = pb::BatchDeleteUsersRequest {
        items: vec![
            pb::BatchDeleteUsersItem { id: users[2].id.clone(), revision: 9, ..Default::default() },
            pb::BatchDeleteUsersItem { id: users[3].id.clone(), revision: 1, ..Default::default() },
            pb::BatchDeleteUsersItem { id: users[1].id.clone(), revision: 9, ..Default::default() },
        ],
        ..Default::default()
    };
    let status = client.batch_delete_users(request).await;
    let status = assert_rejected(status, Code::FailedPrecondition, "USER_DELETED");
    let expected = [("items[0].revision", "REVISION_MISMATCH"), ("items[2].id", "USER_DELETED")];
    assert_eq!(violations(&status), expected.map(|(field, reason)| (field.to_owned(), reason.to_owned())));
}

#[tokio::test]
async fn one_missing_user_rejects_the_whole_batch() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let users = batch_created(&mut client, (0..2).map(|n| format!("user{n}"))).await;
    let missing = new_request_id();
    let ids = [&users[0].id, &missing, &users[1].id];
    let before = rows(&database).await;
    let responses = [
        (
            "items[1].user.id",
            client.batch_update_users(batch_update(ids.map(|id| renamed(id, "x")))).await.map(drop),
        ),
        ("items[1].id", client.batch_delete_users(batch_delete(ids.map(String::as_str))).await.map(drop)),
    ];
    for (field, response) in responses {
        let status = assert_rejected(response, Code::NotFound, "USER_NOT_FOUND");
        assert_eq!(violations(&status), [(field.into(), "USER_NOT_FOUND".into())]);
    }
    assert_eq!(rows(&database).await, before);
}

#[tokio::test]
async fn batch_of_no_items_or_over_a_thousand_is_rejected() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    for (count, reason) in [(0, "FIELD_REQUIRED"), (1001, "BATCH_TOO_LARGE")] {
        let users = || (0..count).map(|n| user(&format!("user{n}")));
        let ids: Vec<_> = (0..count).map(|_| new_request_id()).collect();
        let responses = [
            client.batch_create_users(batch_create(users())).await.map(drop),
            client.batch_update_users(batch_update(users())).await.map(drop),
            client.batch_delete_users(batch_delete(ids.iter().map(String::as_str))).await.map(drop),
        ];
        for response in responses {
            let status = assert_rejected(response, Code::InvalidArgument, reason);
            assert_eq!(violations(&status), [("items".into(), reason.into())]);
        }
    }
    assert_eq!(rows(&database).await, [0; 4]);
}

#[tokio::test]
async fn validate_only_batch_returns_what_the_real_one_would_and_writes_nothing() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let timeless = |users: Vec<pb::User>| -> Vec<pb::User> {
        let timeless = |user| pb::User {
            create_time: None,
            update_time: None,
            delete_time: None,
            purge_time: None,
            ..user
        };
        users.into_iter().map(timeless).collect()
    };
    let with_id = |n| pb::User { id: new_request_id(), ..user(&format!("user{n}")) };
    let real =
        pb::BatchCreateUsersRequest { request_id: new_request_id(), ..batch_create((0..50).map(with_id)) };
    let validate = pb::BatchCreateUsersRequest { validate_only: true, ..real.clone() };
    let tried = client.batch_create_users(validate).await.unwrap().into_inner().users;
    assert_eq!(rows(&database).await, [0; 4]);
    let users = client.batch_create_users(real).await.unwrap().into_inner().users;
    assert_eq!(timeless(tried), timeless(users.clone()));

    let real = batch_update(users.iter().map(|user| renamed(&user.id, "New")));
    let validate = pb::BatchUpdateUsersRequest { validate_only: true, ..real.clone() };
    let tried = client.batch_update_users(validate).await.unwrap().into_inner().users;
    assert_eq!(rows(&database).await, [50, 50, 1, 0]);
    let changed = client.batch_update_users(real).await.unwrap().into_inner().users;
    assert_eq!(timeless(tried), timeless(changed));

    let real = batch_delete(users.iter().map(|user| user.id.as_str()));
    let validate = pb::BatchDeleteUsersRequest { validate_only: true, ..real.clone() };
    let tried = client.batch_delete_users(validate).await.unwrap().into_inner().users;
    assert_eq!(database.count("select count(*) from users where delete_time is null").await, 50);
    let deleted = client.batch_delete_users(real).await.unwrap().into_inner().users;
    assert_eq!(timeless(tried), timeless(deleted));
}

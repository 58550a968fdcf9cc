//! Holds of usernames, and their release.

use tonic::{Code, transport::Channel};
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::support::*;

type Client = UserServiceClient<Channel>;

/// An update of the username.
fn set_username(id: &str, name: &str) -> pb::UpdateUserRequest {
    let user = pb::User { id: id.into(), username: format!("{SECRET}{name}"), ..Default::default() };
    pb::UpdateUserRequest { user: Some(user), ..Default::default() }
}

async fn check(client: &mut Client, name: &str) -> pb::CheckUsernameResponse {
    let request = pb::CheckUsernameRequest { username: format!("{SECRET}{name}") };
    client.check_username(request).await.unwrap().into_inner()
}

/// Asserts that every way to take a username is rejected.
async fn assert_taken(client: &mut Client, name: &str, eve: &str) {
    let taken = |field: &str| vec![(field.to_owned(), "USERNAME_TAKEN".to_owned())];
    let status =
        assert_rejected(client.create_user(create(user(name))).await, Code::AlreadyExists, "USERNAME_TAKEN");
    assert_eq!(violations(&status), taken("user.username"));
    let status = client.update_user(set_username(eve, name)).await;
    assert_rejected(status, Code::AlreadyExists, "USERNAME_TAKEN");
    let status = client.batch_create_users(batch_create([user("other"), user(name)])).await;
    let status = assert_rejected(status, Code::AlreadyExists, "USERNAME_TAKEN");
    assert_eq!(violations(&status), taken("items[1].user.username"));
    for mode in [pb::ImportMode::CreateOnly, pb::ImportMode::Overwrite] {
        let chunk = pb::ImportUsersRequest {
            import_id: new_request_id(),
            chunk: 1,
            mode: mode.into(),
            users: vec![user(name)],
        };
        let acks = client.import_users(futures_util::stream::iter([chunk])).await.unwrap();
        let ack = acks.into_inner().message().await.unwrap().unwrap();
        assert_eq!(ack.failures[0].violations[0].reason(), pb::ErrorReason::UsernameTaken, "{mode:?}");
    }
    let checked = check(client, name).await;
    assert_eq!((checked.available, checked.reason()), (false, pb::ErrorReason::UsernameTaken));
}

#[tokio::test]
async fn replaced_username_is_held_and_its_owner_takes_it_back() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let (alice, eve) = (created(&mut client, "alice").await, created(&mut client, "eve").await);
    client.update_user(set_username(&alice.id, "ally")).await.unwrap();
    assert_taken(&mut client, "ALICE", &eve.id).await;
    let until = check(&mut client, "alice").await.available_time.unwrap().seconds;
    let now = i64::try_from(std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap();
    assert!((until - now - 30 * 24 * 3600).abs() < 3600);
    // A held username finds no user.
    let status = client.get_user(by_username("zqzqalice")).await;
    assert_rejected(status, Code::NotFound, "USER_NOT_FOUND");

    client.update_user(set_username(&alice.id, "Alice")).await.unwrap();
    assert_taken(&mut client, "ally", &eve.id).await;
    assert_eq!(database.count("select count(*) from username_holds").await, 1);
}

#[tokio::test]
async fn hold_ends_by_release_by_time_or_with_its_user() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("PURGE_INTERVAL_MS", "10")]).await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;

    // At once.
    let release = pb::UpdateUserRequest { release_username: true, ..set_username(&alice.id, "ally") };
    client.update_user(release).await.unwrap();
    created(&mut client, "alice").await;
    // Later, by an update that changes nothing else.
    client.update_user(set_username(&alice.id, "alina")).await.unwrap();
    assert!(!check(&mut client, "ally").await.available);
    let release = pb::UpdateUserRequest { release_username: true, ..set_username(&alice.id, "alina") };
    let user = client.update_user(release).await.unwrap().into_inner().user.unwrap();
    assert_eq!(user.revision, 3);
    assert!(check(&mut client, "ally").await.available);
    // By time. The purge then deletes the row.
    client.update_user(set_username(&alice.id, "alva")).await.unwrap();
    database.connect().await.batch_execute("update username_holds set expire_time = now()").await.unwrap();
    assert!(check(&mut client, "alina").await.available);
    created(&mut client, "alina").await;
    let gone = async || (database.count("select count(*) from username_holds").await == 0).then_some(());
    eventually("expired holds are purged", gone).await;
    // With the user.
    client.update_user(set_username(&alice.id, "amber")).await.unwrap();
    assert!(!check(&mut client, "alva").await.available);
    client.expunge_user(expunge(&alice.id)).await.unwrap();
    assert!(check(&mut client, "alva").await.available && check(&mut client, "amber").await.available);
}

#[tokio::test]
async fn hold_of_zero_days_frees_a_replaced_username_at_once() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("USERNAME_HOLD_DAYS", "0")]).await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    client.update_user(set_username(&alice.id, "ally")).await.unwrap();
    created(&mut client, "alice").await;
}

#[tokio::test]
async fn second_delete_releases_the_usernames_of_a_deleted_user() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    client.update_user(set_username(&alice.id, "ally")).await.unwrap();
    client.delete_user(delete(&alice.id)).await.unwrap();
    assert!(!check(&mut client, "ally").await.available && !check(&mut client, "alice").await.available);

    let release = pb::DeleteUserRequest { allow_missing: true, release_username: true, ..delete(&alice.id) };
    let released = client.delete_user(release.clone()).await.unwrap().into_inner().user.unwrap();
    assert_eq!(released.revision, 4);
    assert!(check(&mut client, "ally").await.available && check(&mut client, "alice").await.available);
    // Nothing is left to release.
    let again = client.delete_user(release).await.unwrap().into_inner().user.unwrap();
    assert_eq!(again, released);
    let undelete = pb::UndeleteUserRequest { id: alice.id.clone(), ..Default::default() };
    let status = client.undelete_user(undelete).await;
    assert_rejected(status, Code::FailedPrecondition, "USERNAME_RELEASED");
}

/// The batch checks both usernames and waits for the first. Another user takes the second and
/// replaces it, so its hold is newer than the check.
#[tokio::test]
async fn username_taken_and_replaced_while_a_batch_waits_stays_held() {
    let database = Database::migrated().await;
    // The batch must not time out on a slow machine.
    let server = Server::start(&database, &[("LOCK_TIMEOUT_MS", "60000")]).await;
    let mut client = server.client().await;
    let blocker = database.connect().await;
    let insert = "begin; insert into users (id, username, username_key, username_held, email, email_key,
            display_name, revision, create_time, update_time)
        values (gen_random_uuid(), 'zqzqaaa', 'zqzqaaa', true, 'a@b', 'a@b', '', 1, now(), now())";
    blocker.batch_execute(insert).await.unwrap();
    let batch = tokio::spawn({
        let mut client = client.clone();
        async move { client.batch_create_users(batch_create([user("aaa"), user("bbb")])).await }
    });
    eventually("the batch waits", async || (database.count(WAITING).await == 1).then_some(())).await;
    let bob = created(&mut client, "bbb").await;
    client.update_user(set_username(&bob.id, "bob")).await.unwrap();
    blocker.batch_execute("rollback").await.unwrap();
    let status = assert_rejected(batch.await.unwrap(), Code::AlreadyExists, "USERNAME_TAKEN");
    assert_eq!(violations(&status), [("items[1].user.username".into(), "USERNAME_TAKEN".into())]);
    assert_eq!(database.count("select count(*) from users").await, 1);
}

/// The delete starts before the rename commits, and waits for it.
#[tokio::test]
async fn release_frees_a_username_that_a_concurrent_rename_replaces() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("LOCK_TIMEOUT_MS", "60000")]).await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    let admin = database.connect().await;
    let rename = format!(
        "begin;
         update users set username_key = 'zqzqally', username = 'zqzqally', revision = 2 where id = '{0}';
         insert into username_holds values ('zqzqalice', '{0}', now() + interval '1 day')",
        alice.id
    );
    admin.batch_execute(&rename).await.unwrap();
    let deleted = tokio::spawn({
        let (mut client, id) = (client.clone(), alice.id.clone());
        let request = pb::DeleteUserRequest { release_username: true, ..delete(&id) };
        async move { client.delete_user(request).await }
    });
    eventually("the delete waits", async || (database.count(WAITING).await == 1).then_some(())).await;
    admin.batch_execute("commit").await.unwrap();
    assert_eq!(deleted.await.unwrap().unwrap().into_inner().user.unwrap().revision, 3);
    assert_eq!(database.count("select count(*) from username_holds").await, 0);
    assert!(check(&mut client, "alice").await.available && check(&mut client, "ally").await.available);
}

#[tokio::test]
async fn rows_have_the_version_of_the_rules_that_made_their_keys() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    let version = async || database.count("select norm_version::bigint from users").await;
    assert_eq!(version().await, i64::from(user_service::model::names::NORM_VERSION));
    // A row of older rules stays old until both of its keys are new.
    let age = "update users set norm_version = 0";
    database.connect().await.batch_execute(age).await.unwrap();
    client.update_user(set_username(&alice.id, "ally")).await.unwrap();
    assert_eq!(version().await, 0);
    let both = pb::User { id: alice.id.clone(), ..user("alina") };
    let both = pb::UpdateUserRequest { user: Some(both), ..Default::default() };
    client.update_user(both).await.unwrap();
    assert_eq!(version().await, i64::from(user_service::model::names::NORM_VERSION));
}

//! DeleteUser, UndeleteUser, ExpungeUser and the purge.

use tonic::Code;
use user_service::pb;

use crate::support::*;

fn undelete(id: &str, username: &str) -> pb::UndeleteUserRequest {
    pb::UndeleteUserRequest { id: id.into(), username: username.into(), ..Default::default() }
}

#[tokio::test]
async fn deleted_user_can_be_read_holds_its_username_and_can_be_undeleted() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    let deleted = client.delete_user(delete(&user.id)).await.unwrap().into_inner().user.unwrap();
    assert_eq!(deleted.revision, 2);
    let (delete_time, purge_time) = (deleted.delete_time.unwrap(), deleted.purge_time.unwrap());
    assert_eq!(purge_time.seconds - delete_time.seconds, 30 * 24 * 3600);
    let found = client.get_user(by_username(&user.username)).await.unwrap().into_inner();
    assert_eq!(found.user, Some(deleted));
    let taken = client.create_user(create(crate::support::user("ALICE"))).await;
    assert_rejected(taken, Code::AlreadyExists, "USERNAME_TAKEN");

    let undeleted = client.undelete_user(undelete(&user.id, "")).await.unwrap().into_inner().user.unwrap();
    assert_eq!(undeleted, pb::User { revision: 3, update_time: undeleted.update_time, ..user.clone() });
    assert_rejected(
        client.undelete_user(undelete(&user.id, "")).await,
        Code::FailedPrecondition,
        "USER_NOT_DELETED",
    );
    assert_eq!(
        database
            .count("select count(*) from user_changes where (kind, revision) in ((1, 1), (3, 2), (4, 3))")
            .await,
        3
    );
}

#[tokio::test]
async fn released_username_is_free_at_once_and_undelete_requires_another_one() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    let release = pb::DeleteUserRequest { release_username: true, ..delete(&alice.id) };
    client.delete_user(release).await.unwrap();
    assert_rejected(client.get_user(by_username(&alice.username)).await, Code::NotFound, "USER_NOT_FOUND");
    let other = created(&mut client, "alice").await;
    assert_ne!(other.id, alice.id);

    let rejected = client.undelete_user(undelete(&alice.id, "")).await;
    assert_rejected(rejected, Code::FailedPrecondition, "USERNAME_RELEASED");
    let rejected = client.undelete_user(undelete(&alice.id, &alice.username)).await;
    let status = assert_rejected(rejected, Code::AlreadyExists, "USERNAME_TAKEN");
    assert_eq!(violations(&status)[0].0, "username");
    let name = format!("{SECRET}alice2");
    let undeleted =
        client.undelete_user(undelete(&alice.id, &name)).await.unwrap().into_inner().user.unwrap();
    assert_eq!((undeleted.username, undeleted.delete_time, undeleted.purge_time), (name, None, None));
}

#[tokio::test]
async fn delete_checks_the_revision_and_the_state() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    let stale = pb::DeleteUserRequest { revision: 7, ..delete(&user.id) };
    assert_rejected(client.delete_user(stale).await, Code::FailedPrecondition, "REVISION_MISMATCH");
    let current = pb::DeleteUserRequest { revision: 1, ..delete(&user.id) };
    let validated = pb::DeleteUserRequest { validate_only: true, ..current.clone() };
    let tried = client.delete_user(validated).await.unwrap().into_inner().user.unwrap();
    assert_eq!(client.get_user(by_id(&user.id)).await.unwrap().into_inner().user.unwrap().revision, 1);
    let deleted = client.delete_user(current).await.unwrap().into_inner().user.unwrap();
    assert!(tried.delete_time.is_some() && tried.revision == deleted.revision);

    assert_rejected(client.delete_user(delete(&user.id)).await, Code::FailedPrecondition, "USER_DELETED");
    let missing = new_request_id();
    assert_rejected(client.delete_user(delete(&missing)).await, Code::NotFound, "USER_NOT_FOUND");
    let allowed = |id: &str| pb::DeleteUserRequest { allow_missing: true, ..delete(id) };
    assert_eq!(client.delete_user(allowed(&user.id)).await.unwrap().into_inner().user, Some(deleted));
    assert_eq!(client.delete_user(allowed(&missing)).await.unwrap().into_inner().user, None);
}

#[tokio::test]
async fn expunge_leaves_nothing_of_the_user() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    // Requests that leave a copy in every table.
    let request = pb::CreateUserRequest { request_id: new_request_id(), ..create(user("alice")) };
    let alice = client.create_user(request).await.unwrap().into_inner().user.unwrap();
    let renamed = pb::UpdateUserRequest {
        user: Some(pb::User { id: alice.id.clone(), ..user("eve") }),
        request_id: new_request_id(),
        ..Default::default()
    };
    client.update_user(renamed).await.unwrap();
    let release =
        pb::DeleteUserRequest { release_username: true, request_id: new_request_id(), ..delete(&alice.id) };
    client.delete_user(release).await.unwrap();
    assert!(database.dump().to_lowercase().contains(SECRET));
    let salt = "select encode(fingerprint_salt, 'hex') from users";
    let salt: String = database.connect().await.query_one(salt, &[]).await.unwrap().get(0);

    let expunged = client.expunge_user(expunge(&alice.id)).await.unwrap().into_inner();
    assert_eq!(expunged.user_id, alice.id);
    assert!(expunged.expunge_time.is_some());
    let dump = database.dump().to_lowercase();
    assert!(!dump.contains(SECRET), "{dump}");
    // The fingerprints of its requests remain, but not their salt.
    assert_eq!(database.count("select count(*) from requests").await, 3);
    assert!(!dump.contains(&salt));
    assert_eq!(database.count("select count(*) from user_changes where kind = 5 and revision = 4").await, 1);
    assert_rejected(client.get_user(by_id(&alice.id)).await, Code::NotFound, "USER_NOT_FOUND");
    assert_rejected(client.expunge_user(expunge(&alice.id)).await, Code::NotFound, "USER_NOT_FOUND");
    created(&mut client, "eve").await;
}

#[tokio::test]
async fn purge_deletes_only_expired_rows() {
    let database = Database::migrated().await;
    let fast = [("PURGE_INTERVAL_MS", "10")];
    // Two replicas purge each user once.
    let (server, _other) = (Server::start(&database, &fast).await, Server::start(&database, &fast).await);
    let mut client = server.client().await;
    let mut deleted = Vec::new();
    for n in 0..40 {
        let request =
            pb::CreateUserRequest { request_id: new_request_id(), ..create(user(&format!("user{n}"))) };
        let user = client.create_user(request).await.unwrap().into_inner().user.unwrap();
        if n % 2 == 0 {
            client.delete_user(delete(&user.id)).await.unwrap();
            deleted.push(user.id);
        }
    }
    let kept = deleted.pop().unwrap();
    let admin = database.connect().await;
    let due = "update users set purge_time = now() where purge_time is not null and id <> $1::text::uuid";
    admin.execute(due, &[&kept]).await.unwrap();
    admin.batch_execute("update requests set expire_time = now() where request_id in (select request_id from requests limit 7)").await.unwrap();

    eventually("all expired rows are deleted", async || {
        let left = "select (select count(*) from users where purge_time <= now())
            + (select count(*) from requests where expire_time <= now())";
        (database.count(left).await == 0).then_some(())
    })
    .await;
    assert_eq!(database.count("select count(*) from users").await, 21);
    assert_eq!(database.count("select count(*) from requests").await, 33);
    assert_eq!(database.count("select count(*) from user_changes where kind = 6").await, 19);
    assert_eq!(database.count("select count(*) from user_changes where kind = 6 and revision = 3").await, 19);
    client.get_user(by_id(&kept)).await.unwrap();
}

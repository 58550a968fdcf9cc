//! ImportUsers: each chunk takes effect once, and each rejected user is named.

use std::collections::HashMap;

use futures_util::{future::join_all, stream};
use tonic::{Code, Status, transport::Channel};
use user_service::pb::{
    self, ImportMode, ImportUsersRequest, ImportUsersResponse, user_service_client::UserServiceClient,
};

use crate::support::*;

type Client = UserServiceClient<Channel>;

pub fn chunk(import_id: &str, number: i64, mode: ImportMode, users: Vec<pb::User>) -> ImportUsersRequest {
    ImportUsersRequest { import_id: import_id.into(), chunk: number, mode: mode.into(), users }
}

/// Sends chunks in one stream. Returns all acknowledgements, and the status if it is an error.
pub async fn import(
    client: &Client,
    chunks: Vec<ImportUsersRequest>,
) -> (Vec<ImportUsersResponse>, Option<Status>) {
    let mut acks = client.clone().import_users(stream::iter(chunks)).await.unwrap().into_inner();
    let mut received = Vec::new();
    loop {
        match acks.message().await {
            Ok(Some(ack)) => received.push(ack),
            Ok(None) => return (received, None),
            Err(status) => return (received, Some(status)),
        }
    }
}

/// Sends one chunk, which must be accepted.
pub async fn import_one(client: &Client, chunk: ImportUsersRequest) -> ImportUsersResponse {
    let (acks, status) = import(client, vec![chunk]).await;
    assert!(status.is_none(), "{status:?}");
    assert_eq!(acks.len(), 1);
    acks.into_iter().next().unwrap()
}

/// The numbers of users created, updated and skipped.
pub fn counts(ack: &ImportUsersResponse) -> (i32, i32, i32) {
    (ack.created, ack.updated, ack.skipped)
}

/// The position, field and reason of each violation.
fn rejected(ack: &ImportUsersResponse) -> Vec<(i32, &str, &str)> {
    let violations = ack.failures.iter().flat_map(|f| f.violations.iter().map(move |v| (f.position, v)));
    violations.map(|(position, v)| (position, v.field.as_str(), v.reason().as_str_name())).collect()
}

pub fn some_users(prefix: &str, count: usize) -> Vec<pb::User> {
    (0..count).map(|n| user(&format!("{prefix}{n}"))).collect()
}

/// Dumps the database, without the lines that differ in every dump.
fn dump(database: &Database) -> String {
    let dump = database.dump();
    dump.lines().filter(|line| !line.contains("restrict")).collect::<Vec<_>>().join("\n")
}

pub async fn get(client: &Client, name: &str) -> pb::User {
    let key = by_username(&format!("{SECRET}{name}"));
    client.clone().get_user(key).await.unwrap().into_inner().user.unwrap()
}

#[tokio::test]
async fn chunks_are_acknowledged_in_order_and_their_users_exist() {
    let (server, database) = server().await;
    let client = server.client().await;
    let id = new_request_id();
    let chunks: Vec<_> =
        (1..=5).map(|n| chunk(&id, n, ImportMode::Unspecified, some_users(&format!("c{n}n"), 200))).collect();
    let (acks, status) = import(&client, chunks).await;
    assert!(status.is_none(), "{status:?}");
    assert_eq!(acks.iter().map(|ack| ack.chunk).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert!(acks.iter().all(|ack| counts(ack) == (200, 0, 0) && ack.failures.is_empty()));
    let expected = user("c3n7");
    let found = get(&client, "C3n7").await;
    assert_eq!(found.revision, 1);
    assert_eq!(
        (found.username, found.email, found.display_name),
        (expected.username, expected.email, expected.display_name)
    );
    assert_eq!(database.count("select count(*) from users").await, 1000);
    let changes = "select count(*) from user_changes c join users u on u.id = c.user_id
        where c.kind = 1 and c.revision = 1";
    assert_eq!(database.count(changes).await, 1000);
}

#[tokio::test]
async fn each_rejected_user_is_named_and_all_other_users_are_created() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let taken = created(&mut client, "taken").await;
    let deleted = created(&mut client, "deleted").await;
    client.delete_user(delete(&deleted.id)).await.unwrap();
    let given = new_request_id();
    let users = vec![
        pb::User { id: given.clone(), ..user("good") },
        pb::User { username: "a b".into(), email: "nonsense".into(), ..user("x") },
        pb::User { username: String::new(), email: String::new(), display_name: "\u{7}".into(), ..user("x") },
        pb::User { id: "nonsense".into(), ..user("badid") },
        user("TAKEN"),
        user("deleted"),
        pb::User { id: taken.id.clone(), ..user("other") },
        user("Good"),
        pb::User { id: given.clone(), ..user("better") },
        pb::User { id: given.clone(), ..user("GOOD") },
        // Output-only fields are ignored.
        pb::User { revision: 7, delete_time: taken.create_time, ..user("last") },
    ];
    let ack = import_one(&client, chunk(&new_request_id(), 1, ImportMode::CreateOnly, users)).await;
    assert_eq!(counts(&ack), (2, 0, 0));
    assert_eq!(
        rejected(&ack),
        [
            (1, "username", "USERNAME_INVALID"),
            (1, "email", "EMAIL_INVALID"),
            (2, "username", "FIELD_REQUIRED"),
            (2, "email", "FIELD_REQUIRED"),
            (2, "display_name", "FIELD_INVALID"),
            (3, "id", "FIELD_INVALID"),
            (4, "username", "USERNAME_TAKEN"),
            (5, "username", "USERNAME_TAKEN"),
            (6, "id", "USER_ID_TAKEN"),
            (7, "username", "USERNAME_TAKEN"),
            (8, "id", "USER_ID_TAKEN"),
            (9, "id", "USER_ID_TAKEN"),
            (9, "username", "USERNAME_TAKEN"),
        ]
    );
    assert!(ack.failures.iter().flat_map(|f| &f.violations).all(|v| !v.description.contains(SECRET)));
    assert_eq!(get(&client, "good").await.id, given);
    let last = get(&client, "last").await;
    assert_eq!((last.revision, last.delete_time), (1, None));
    assert_eq!(database.count("select count(*) from users").await, 4);

    // A chunk with no valid user is acknowledged, too.
    let ack = import_one(&client, chunk(&new_request_id(), 1, ImportMode::CreateOnly, vec![user("")])).await;
    assert_eq!((counts(&ack), ack.failures.len()), ((1, 0, 0), 0));
    let bad = vec![pb::User::default(); 2];
    let ack = import_one(&client, chunk(&new_request_id(), 1, ImportMode::CreateOnly, bad)).await;
    assert_eq!((counts(&ack), ack.failures.len()), ((0, 0, 0), 2));
}

#[tokio::test]
async fn skip_existing_mode_keeps_existing_users() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    let users = vec![
        pb::User { email: "new@example.com".into(), ..user("ALICE") },
        pb::User { id: alice.id.clone(), ..user("renamed") },
        user("bob"),
        user("-"),
    ];
    let ack = import_one(&client, chunk(&new_request_id(), 1, ImportMode::SkipExisting, users)).await;
    assert_eq!(counts(&ack), (1, 0, 2));
    assert_eq!(rejected(&ack), [(3, "username", "USERNAME_INVALID")]);
    assert_eq!(get(&client, "alice").await, alice);
    assert_eq!(database.count("select count(*) from user_changes").await, 2);
}

#[tokio::test]
async fn overwrite_mode_updates_users_by_username_if_a_field_differs() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let mut users = HashMap::new();
    for name in ["alice", "bob", "carol", "dave", "erin"] {
        users.insert(name, created(&mut client, name).await);
    }
    client.delete_user(delete(&users["dave"].id)).await.unwrap();
    let chunked = vec![
        pb::User { email: format!("{SECRET}new@EXAMPLE.com"), ..user("ALICE") },
        user("bob"),
        pb::User { id: users["carol"].id.clone(), display_name: String::new(), ..user("carol") },
        user("dave"),
        pb::User { id: users["alice"].id.clone(), ..user("erin") },
        pb::User { id: users["alice"].id.clone(), ..user("frank") },
        user("grace"),
        user("Bob"),
    ];
    let ack = import_one(&client, chunk(&new_request_id(), 1, ImportMode::Overwrite, chunked)).await;
    assert_eq!(counts(&ack), (1, 2, 1));
    assert_eq!(
        rejected(&ack),
        [
            (3, "username", "USER_DELETED"),
            (4, "username", "USERNAME_TAKEN"),
            (5, "id", "USER_ID_TAKEN"),
            (7, "username", "USERNAME_TAKEN"),
        ]
    );
    let alice = get(&client, "alice").await;
    assert_eq!(
        (alice.username, alice.email),
        (users["alice"].username.clone(), format!("{SECRET}new@EXAMPLE.com"))
    );
    assert_eq!((alice.id, alice.revision), (users["alice"].id.clone(), 2));
    let by_email = pb::UserFilter { email: format!("{SECRET}NEW@example.com"), ..Default::default() };
    let list = pb::ListUsersRequest { filter: Some(by_email), ..Default::default() };
    assert_eq!(client.list_users(list).await.unwrap().into_inner().users.len(), 1);
    assert_eq!(get(&client, "bob").await, users["bob"]);
    let carol = get(&client, "carol").await;
    assert_eq!((carol.revision, carol.display_name.as_str()), (2, ""));
    assert_eq!(get(&client, "erin").await, users["erin"]);
    let changes = "select count(*) from user_changes where kind = 2 and revision = 2";
    assert_eq!(database.count(changes).await, 2);
    assert_eq!(database.count("select count(*) from user_changes").await, 5 + 1 + 2 + 1);
}

#[tokio::test]
async fn repeated_chunk_changes_nothing_and_gets_the_same_acknowledgement() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    created(&mut client, "taken").await;
    let id = new_request_id();
    for (n, mode) in (1..).zip([ImportMode::CreateOnly, ImportMode::SkipExisting, ImportMode::Overwrite]) {
        let mut users = some_users(&format!("mode{n}n"), 3);
        users.extend([user("-"), pb::User { display_name: format!("{n}"), ..user("taken") }]);
        let request = chunk(&id, n, mode, users);
        let first = import_one(&client, request.clone()).await;
        // A repeated chunk does not undo later changes.
        let expunged = get(&client, &format!("mode{n}n0")).await.id;
        client.expunge_user(expunge(&expunged)).await.unwrap();
        let changed = get(&client, "taken").await.id;
        client.update_user(rename(&changed, "New")).await.unwrap();
        let dump = dump(&database);
        for _ in 0..2 {
            assert_eq!(import_one(&client, request.clone()).await, first);
        }
        assert_eq!(self::dump(&database), dump);
        // Nothing of the erased user remains, and the id of the import is stored as a hash only.
        let name = format!("{SECRET}mode{n}n0");
        let hex: String = name.bytes().map(|byte| format!("{byte:02x}")).collect();
        assert!(!dump.contains(&name) && !dump.contains(&hex));
        assert!(!dump.contains(&id) && !dump.contains(&id.replace('-', "")));

        let other = chunk(&id, n, mode, some_users("other", 3));
        let other_mode = ImportUsersRequest { mode: (mode as i32 + 1) % 3, ..request.clone() };
        for other in [other, other_mode] {
            let (acks, status) = import(&client, vec![other]).await;
            assert!(acks.is_empty());
            let status =
                assert_rejected(status.map_or(Ok(()), Err), Code::InvalidArgument, "REQUEST_ID_REUSED");
            assert_eq!(violations(&status), [("chunk".into(), "REQUEST_ID_REUSED".into())]);
        }
        assert_eq!(self::dump(&database), dump);

        // The same number in another import is another chunk.
        let ack =
            import_one(&client, chunk(&new_request_id(), n, mode, some_users(&format!("other{n}n"), 1)))
                .await;
        assert_eq!(counts(&ack), (1, 0, 0));
        // An expired record has no effect.
        database.connect().await.batch_execute("update import_chunks set expire_time = now()").await.unwrap();
        assert_ne!(import_one(&client, request).await, first);
    }
}

#[tokio::test]
async fn expired_records_of_chunks_are_purged() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("PURGE_INTERVAL_MS", "10")]).await;
    let client = server.client().await;
    for n in 1..=2 {
        let users = some_users(&format!("c{n}n"), 2);
        import_one(&client, chunk(&new_request_id(), n, ImportMode::CreateOnly, users)).await;
    }
    let age =
        "update import_chunks set expire_time = now() where key in (select key from import_chunks limit 1)";
    database.connect().await.batch_execute(age).await.unwrap();
    let rows = async || database.count("select count(*) from import_chunks").await;
    eventually("the expired record is purged", async || (rows().await == 1).then_some(())).await;
    let kept = "select count(*) from import_chunks where expire_time > now() + interval '6 days'";
    assert_eq!(database.count(kept).await, 1);
}

/// An open transaction that creates the user `c5`.
pub const UNCOMMITTED: &str =
    "begin; insert into users (id, username, username_key, username_held, email, email_key,
    display_name, revision, create_time, update_time)
    values (gen_random_uuid(), 'x', 'zqzqc5', true, 'b@b', 'b@b', '', 1, now(), now())";

#[tokio::test]
async fn two_concurrent_copies_of_a_chunk_get_the_same_acknowledgement() {
    let (server, database) = server().await;
    for mode in [ImportMode::CreateOnly, ImportMode::Overwrite] {
        database.connect().await.batch_execute("delete from users").await.unwrap();
        let holder = database.connect().await;
        holder.batch_execute(UNCOMMITTED).await.unwrap();
        let request = chunk(&new_request_id(), 1, mode, some_users("c", 10));
        let senders: Vec<_> = join_all((0..2).map(|_| server.client()))
            .await
            .into_iter()
            .map(|client| {
                let request = request.clone();
                tokio::spawn(async move { import_one(&client, request).await })
            })
            .collect();
        eventually("both chunks wait", async || (database.count(WAITING).await == 2).then_some(())).await;
        holder.batch_execute("rollback").await.unwrap();
        let acks: Vec<_> = join_all(senders).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(counts(&acks[0]), (10, 0, 0));
        assert_eq!(acks[0], acks[1]);
        assert_eq!(database.count("select count(*) from users").await, 10);
    }
    assert_eq!(database.count("select count(*) from user_changes").await, 20);
}

#[tokio::test]
async fn username_taken_while_its_chunk_waits_counts_as_existing() {
    let (server, database) = server().await;
    for mode in [ImportMode::CreateOnly, ImportMode::SkipExisting, ImportMode::Overwrite] {
        database.connect().await.batch_execute("delete from users").await.unwrap();
        let client = server.client().await;
        let holder = database.connect().await;
        holder.batch_execute(UNCOMMITTED).await.unwrap();
        let request = chunk(&new_request_id(), 1, mode, some_users("c", 10));
        let call = tokio::spawn(async move { import_one(&client, request).await });
        eventually("the chunk waits", async || (database.count(WAITING).await == 1).then_some(())).await;
        holder.batch_execute("commit").await.unwrap();
        let ack = call.await.unwrap();
        match mode {
            ImportMode::CreateOnly => assert_eq!(rejected(&ack), [(5, "username", "USERNAME_TAKEN")]),
            ImportMode::SkipExisting => assert_eq!(counts(&ack), (9, 0, 1)),
            _ => assert_eq!(counts(&ack), (9, 1, 0)),
        }
        assert_eq!(database.count("select count(*) from users").await, 10);
    }
}

#[tokio::test]
async fn overwrite_that_waits_for_a_user_sees_its_new_state() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    // The change of the user; created, updated, skipped; violations.
    type Case = (&'static str, (i32, i32, i32), &'static [(i32, &'static str, &'static str)]);
    let cases: [Case; 4] = [
        ("update users set username_key = 'zqzqother' where", (3, 0, 0), &[]),
        ("delete from users where", (3, 0, 0), &[]),
        (
            "update users set delete_time = now(), purge_time = now() + interval '1 day' where",
            (2, 0, 0),
            &[(1, "username", "USER_DELETED")],
        ),
        ("update users set display_name = 'wanted', email = 'zqzqc1@example.com' where", (2, 0, 1), &[]),
    ];
    for (change, expected, failures) in cases {
        database.connect().await.batch_execute("delete from users").await.unwrap();
        created(&mut client, "c1").await;
        let holder = database.connect().await;
        holder.batch_execute(&format!("begin; {change} username_key = 'zqzqc1'")).await.unwrap();
        let mut users = some_users("c", 3);
        users[1].display_name = "wanted".into();
        let request = chunk(&new_request_id(), 1, ImportMode::Overwrite, users);
        let call = tokio::spawn({
            let client = client.clone();
            async move { import_one(&client, request).await }
        });
        eventually("the chunk waits", async || (database.count(WAITING).await == 1).then_some(())).await;
        holder.batch_execute("commit").await.unwrap();
        let ack = call.await.unwrap();
        assert_eq!((counts(&ack), rejected(&ack).as_slice()), (expected, failures), "{change}");
    }
}

#[tokio::test]
async fn concurrent_imports_of_the_same_users_in_any_order_all_succeed() {
    let (server, database) = server().await;
    let client = server.client().await;
    let users = some_users("u", 100);
    import_one(&client, chunk(&new_request_id(), 1, ImportMode::CreateOnly, users.clone())).await;
    let imports = (0..6).map(|n| {
        let (client, mut users) = (client.clone(), users.clone());
        tokio::spawn(async move {
            let id = new_request_id();
            let chunks = (1..=5).map(|number| {
                users.reverse();
                users.rotate_left(n * 7);
                let mut users = users.clone();
                users.iter_mut().for_each(|user| user.display_name = format!("{n} {number}"));
                // New users, which several imports have.
                users.extend(some_users(&format!("new{number}n"), 50));
                if n % 2 == 0 {
                    users.reverse();
                }
                chunk(&id, number, ImportMode::Overwrite, users)
            });
            let (acks, status) = import(&client, chunks.collect()).await;
            assert!(status.is_none(), "{status:?}");
            acks
        })
    });
    let imports: Vec<_> = imports.collect();
    for acks in join_all(imports).await {
        let acks = acks.unwrap();
        assert_eq!(acks.len(), 5);
        assert!(acks.iter().all(|ack| ack.failures.is_empty()), "{acks:?}");
    }
    assert_eq!(database.count("select count(*) from users").await, 350);
    let without_changes = "select count(*) from users where revision <>
        (select count(*) from user_changes where user_id = id)";
    assert_eq!(database.count(without_changes).await, 0);
}

#[tokio::test]
async fn invalid_chunk_ends_the_stream_and_names_the_field() {
    let (server, database) = server().await;
    let client = server.client().await;
    let good = || chunk(&new_request_id(), 1, ImportMode::CreateOnly, some_users(&new_request_id()[24..], 1));
    let cases = [
        ("import_id", "FIELD_REQUIRED", ImportUsersRequest { import_id: String::new(), ..good() }),
        ("import_id", "FIELD_INVALID", ImportUsersRequest { import_id: "\0".into(), ..good() }),
        ("chunk", "FIELD_REQUIRED", ImportUsersRequest { chunk: 0, ..good() }),
        ("chunk", "FIELD_INVALID", ImportUsersRequest { chunk: i64::MIN, ..good() }),
        ("mode", "FIELD_INVALID", ImportUsersRequest { mode: 99, ..good() }),
        ("users", "FIELD_REQUIRED", ImportUsersRequest { users: Vec::new(), ..good() }),
        ("users", "BATCH_TOO_LARGE", ImportUsersRequest { users: some_users("u", 1001), ..good() }),
        (
            "request",
            "FIELD_INVALID",
            ImportUsersRequest {
                users: vec![pb::User { display_name: "x".repeat(5 << 20), ..user("x") }],
                ..good()
            },
        ),
    ];
    for (n, (field, reason, bad)) in cases.into_iter().enumerate() {
        let first = ImportUsersRequest { users: some_users(&format!("good{n}n"), 2), ..good() };
        let (acks, status) = import(&client, vec![first, bad, good()]).await;
        let status = assert_rejected(status.map_or(Ok(()), Err), Code::InvalidArgument, reason);
        assert_eq!(violations(&status), [(field.into(), reason.into())]);
        // The chunk before is acknowledged, the chunk after is not read.
        assert_eq!(acks.len(), 1, "{field}");
        assert_eq!(database.count("select count(*) from users").await, 2 * (n as i64 + 1));
    }
    let (acks, status) = import(&client, Vec::new()).await;
    assert!(acks.is_empty() && status.is_none());
}

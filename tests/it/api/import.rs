//! Imports: each chunk once and as a whole, each user that cannot be imported
//! named, and nothing lost in a cut.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, future::join_all, stream};
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming, transport::Channel};
use user_service::pb::{
    self, ImportMode, ImportUsersRequest, ImportUsersResponse, user_service_client::UserServiceClient,
};

use crate::support::*;

type Client = UserServiceClient<Channel>;

fn chunk(import_id: &str, number: i64, mode: ImportMode, users: Vec<pb::User>) -> ImportUsersRequest {
    ImportUsersRequest { import_id: import_id.into(), chunk: number, mode: mode.into(), users }
}

/// Sends chunks in one stream and returns all acknowledgements, or how it ends.
async fn import(
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

/// Sends one chunk that is accepted.
async fn import_one(client: &Client, chunk: ImportUsersRequest) -> ImportUsersResponse {
    let (acks, status) = import(client, vec![chunk]).await;
    assert!(status.is_none(), "{status:?}");
    assert_eq!(acks.len(), 1);
    acks.into_iter().next().unwrap()
}

/// Created, updated, skipped.
fn counts(ack: &ImportUsersResponse) -> (i32, i32, i32) {
    (ack.created, ack.updated, ack.skipped)
}

/// Position, field and reason of everything that was refused.
fn refused(ack: &ImportUsersResponse) -> Vec<(i32, &str, &str)> {
    let violations = ack.failures.iter().flat_map(|f| f.violations.iter().map(move |v| (f.position, v)));
    violations.map(|(position, v)| (position, v.field.as_str(), v.reason().as_str_name())).collect()
}

fn some_users(prefix: &str, count: usize) -> Vec<pb::User> {
    (0..count).map(|n| user(&format!("{prefix}{n}"))).collect()
}

/// Everything in the database; each dump has a secret of its own.
fn dump(database: &Database) -> String {
    let dump = database.dump();
    dump.lines().filter(|line| !line.contains("restrict")).collect::<Vec<_>>().join("\n")
}

async fn get(client: &Client, name: &str) -> pb::User {
    let key = by_username(&format!("{SECRET}{name}"));
    client.clone().get_user(key).await.unwrap().into_inner().user.unwrap()
}

#[tokio::test]
async fn chunks_are_acknowledged_in_their_order_and_their_users_are_there() {
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
async fn each_user_that_cannot_be_created_is_named_and_the_others_are_created() {
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
        // What the service decides is not the caller's to say.
        pb::User { revision: 7, delete_time: taken.create_time, ..user("last") },
    ];
    let ack = import_one(&client, chunk(&new_request_id(), 1, ImportMode::CreateOnly, users)).await;
    assert_eq!(counts(&ack), (2, 0, 0));
    assert_eq!(
        refused(&ack),
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

    // Not even one good user is fine, too.
    let ack = import_one(&client, chunk(&new_request_id(), 1, ImportMode::CreateOnly, vec![user("")])).await;
    assert_eq!((counts(&ack), ack.failures.len()), ((1, 0, 0), 0));
    let bad = vec![pb::User::default(); 2];
    let ack = import_one(&client, chunk(&new_request_id(), 1, ImportMode::CreateOnly, bad)).await;
    assert_eq!((counts(&ack), ack.failures.len()), ((0, 0, 0), 2));
}

#[tokio::test]
async fn existing_users_are_skipped_if_that_is_wanted() {
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
    assert_eq!(refused(&ack), [(3, "username", "USERNAME_INVALID")]);
    assert_eq!(get(&client, "alice").await, alice);
    assert_eq!(database.count("select count(*) from user_changes").await, 2);
}

#[tokio::test]
async fn existing_users_are_overwritten_by_username_where_something_changes() {
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
        refused(&ack),
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
async fn a_chunk_sent_again_changes_nothing_and_is_acknowledged_as_before() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    created(&mut client, "taken").await;
    let id = new_request_id();
    for (n, mode) in (1..).zip([ImportMode::CreateOnly, ImportMode::SkipExisting, ImportMode::Overwrite]) {
        let mut users = some_users(&format!("mode{n}n"), 3);
        users.extend([user("-"), pb::User { display_name: format!("{n}"), ..user("taken") }]);
        let request = chunk(&id, n, mode, users);
        let first = import_one(&client, request.clone()).await;
        // Somebody is erased, somebody changes: the import does not undo it.
        let gone = get(&client, &format!("mode{n}n0")).await.id;
        client.expunge_user(expunge(&gone)).await.unwrap();
        let changed = get(&client, "taken").await.id;
        client.update_user(rename(&changed, "New")).await.unwrap();
        let dump = dump(&database);
        for _ in 0..2 {
            assert_eq!(import_one(&client, request.clone()).await, first);
        }
        assert_eq!(self::dump(&database), dump);
        // Of whom is erased nothing is left, and only the caller knows the import's id.
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
                assert_refused(status.map_or(Ok(()), Err), Code::InvalidArgument, "REQUEST_ID_REUSED");
            assert_eq!(violations(&status), [("chunk".into(), "REQUEST_ID_REUSED".into())]);
        }
        assert_eq!(self::dump(&database), dump);

        // The same number in another import is another chunk.
        let ack =
            import_one(&client, chunk(&new_request_id(), n, mode, some_users(&format!("other{n}n"), 1)))
                .await;
        assert_eq!(counts(&ack), (1, 0, 0));
        // And a record that has expired is none.
        database.connect().await.batch_execute("update import_chunks set expire_time = now()").await.unwrap();
        assert_ne!(import_one(&client, request).await, first);
    }
}

#[tokio::test]
async fn what_is_remembered_of_a_chunk_is_purged() {
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
    eventually("it is purged", async || (rows().await == 1).then_some(())).await;
    let kept = "select count(*) from import_chunks where expire_time > now() + interval '6 days'";
    assert_eq!(database.count(kept).await, 1);
}

/// Somebody else's transaction that has created a user, and is not over.
const UNCOMMITTED: &str =
    "begin; insert into users (id, username, username_key, username_held, email, email_key,
    display_name, revision, create_time, update_time)
    values (gen_random_uuid(), 'x', 'zqzqc5', true, 'b@b', 'b@b', '', 1, now(), now())";

#[tokio::test]
async fn of_two_who_send_the_same_chunk_at_once_both_get_the_same_answer() {
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
        eventually("both wait", async || (database.count(WAITING).await == 2).then_some(())).await;
        holder.batch_execute("rollback").await.unwrap();
        let acks: Vec<_> = join_all(senders).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(counts(&acks[0]), (10, 0, 0));
        assert_eq!(acks[0], acks[1]);
        assert_eq!(database.count("select count(*) from users").await, 10);
    }
    assert_eq!(database.count("select count(*) from user_changes").await, 20);
}

#[tokio::test]
async fn a_username_that_is_taken_while_its_chunk_is_written_is_found_taken() {
    let (server, database) = server().await;
    for mode in [ImportMode::CreateOnly, ImportMode::SkipExisting, ImportMode::Overwrite] {
        database.connect().await.batch_execute("delete from users").await.unwrap();
        let client = server.client().await;
        let holder = database.connect().await;
        holder.batch_execute(UNCOMMITTED).await.unwrap();
        let request = chunk(&new_request_id(), 1, mode, some_users("c", 10));
        let call = tokio::spawn(async move { import_one(&client, request).await });
        eventually("it waits", async || (database.count(WAITING).await == 1).then_some(())).await;
        holder.batch_execute("commit").await.unwrap();
        let ack = call.await.unwrap();
        match mode {
            ImportMode::CreateOnly => assert_eq!(refused(&ack), [(5, "username", "USERNAME_TAKEN")]),
            ImportMode::SkipExisting => assert_eq!(counts(&ack), (9, 0, 1)),
            _ => assert_eq!(counts(&ack), (9, 1, 0)),
        }
        assert_eq!(database.count("select count(*) from users").await, 10);
    }
}

#[tokio::test]
async fn an_overwrite_that_waited_for_a_user_sees_what_became_of_it() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    // What becomes of the user; created, updated, skipped; refused.
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
        eventually("it waits", async || (database.count(WAITING).await == 1).then_some(())).await;
        holder.batch_execute("commit").await.unwrap();
        let ack = call.await.unwrap();
        assert_eq!((counts(&ack), refused(&ack).as_slice()), (expected, failures), "{change}");
    }
}

#[tokio::test]
async fn imports_and_updates_of_the_same_users_in_all_orders_all_get_through() {
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
                // New users as well, of whom each is brought by several.
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
    let untold = "select count(*) from users where revision <>
        (select count(*) from user_changes where user_id = id)";
    assert_eq!(database.count(untold).await, 0);
}

#[tokio::test]
async fn a_chunk_that_makes_no_sense_ends_the_stream_and_names_the_field() {
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
        let status = assert_refused(status.map_or(Ok(()), Err), Code::InvalidArgument, reason);
        assert_eq!(violations(&status), [(field.into(), reason.into())]);
        // What came before is acknowledged, what came after is not looked at.
        assert_eq!(acks.len(), 1, "{field}");
        assert_eq!(database.count("select count(*) from users").await, 2 * (n as i64 + 1));
    }
    let (acks, status) = import(&client, Vec::new()).await;
    assert!(acks.is_empty() && status.is_none());
}

/// A stream of chunks that says how many have been taken from it.
fn counted(
    chunks: impl Iterator<Item = ImportUsersRequest> + Send + 'static,
) -> (impl futures_util::Stream<Item = ImportUsersRequest> + Send, Arc<AtomicUsize>) {
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    (stream::iter(chunks.inspect(move |_| _ = count.fetch_add(1, Ordering::Relaxed))), taken)
}

async fn all(mut acks: Streaming<ImportUsersResponse>) -> Vec<ImportUsersResponse> {
    let mut all = Vec::new();
    while let Some(ack) = acks.message().await.unwrap() {
        all.push(ack);
    }
    all
}

#[tokio::test]
async fn a_client_that_is_faster_than_the_database_is_held_back() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let holder = database.connect().await;
    holder.batch_execute(&UNCOMMITTED.replace("zqzqc5", "zqzqn1x0")).await.unwrap();
    let id = new_request_id();
    // Some 500 kB each, of which most is refused.
    let chunks = (1..=60).map(move |number| {
        let mut users = some_users(&format!("n{number}x"), 1);
        users.push(pb::User { display_name: "x".repeat(500_000), ..user("large") });
        chunk(&id, number, ImportMode::CreateOnly, users)
    });
    let (requests, taken) = counted(chunks);
    let acks = client.import_users(requests).await.unwrap().into_inner();
    eventually("it waits", async || (database.count(WAITING).await == 1).then_some(())).await;
    // Somebody else is not held back.
    let other = server.client().await;
    join_all((0..20).map(|n| {
        let mut other = other.clone();
        async move { created(&mut other, &format!("other{n}")).await }
    }))
    .await;
    let taken = taken.load(Ordering::Relaxed);
    assert!((1..20).contains(&taken), "{taken} chunks were taken from the client");
    holder.batch_execute("rollback").await.unwrap();
    let acks = all(acks).await;
    assert_eq!(acks.len(), 60);
    assert!(acks.iter().all(|ack| counts(ack) == (1, 0, 0)));
}

#[tokio::test]
async fn chunks_that_share_a_user_are_written_in_the_order_in_which_they_are_sent() {
    let (server, database) = server().await;
    let client = server.client().await;
    let id = new_request_id();
    // The larger one takes longer, and the smaller one comes right behind it.
    let chunks = (1..=60).map(|number| {
        let alice = pb::User { display_name: format!("Alice {number}"), ..user("alice") };
        let mut users = if number % 2 == 0 { Vec::new() } else { some_users(&format!("n{number}x"), 300) };
        users.push(alice);
        chunk(&id, number, ImportMode::Overwrite, users)
    });
    let (acks, end) = import(&client, chunks.collect()).await;
    assert!(end.is_none(), "{end:?}");
    assert_eq!(acks.iter().map(|ack| ack.chunk).collect::<Vec<_>>(), (1..=60).collect::<Vec<_>>());
    assert_eq!(acks.iter().map(|ack| ack.updated).sum::<i32>(), 59);
    let alice = get(&client, "alice").await;
    assert_eq!((alice.revision, alice.display_name.as_str()), (60, "Alice 60"));
    assert_eq!(database.count("select count(*) from users").await, 1 + 30 * 300);
}

#[tokio::test]
async fn a_client_that_does_not_read_its_acknowledgements_keeps_no_connection_of_the_pool() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "1"), ("POOL_ACQUIRE_TIMEOUT_MS", "2000")]).await;
    let (id, mut client) = (new_request_id(), server.client().await);
    // Nothing is right, so the acknowledgements are large, but not as large as to be
    // sent alone.
    let chunks = (1..=1_000)
        .map(move |number| chunk(&id, number, ImportMode::CreateOnly, vec![pb::User::default(); 100]));
    let acks = client.import_users(stream::iter(chunks)).await.unwrap().into_inner();
    let written = async || database.count("select count(*) from import_chunks").await;
    let (mut before, mut unchanged) = (0, 0);
    eventually("the import stands still", async || {
        let now = written().await;
        unchanged = if now == before && now > 0 { unchanged + 1 } else { 0 };
        before = now;
        (unchanged == 50).then_some(())
    })
    .await;
    assert!(before < 1_000, "the client is not held back");
    created(&mut server.client().await, "alice").await;
    assert_eq!(all(acks).await.len(), 1_000);
}

/// A client of an import that can vanish, with its connection.
struct Leaving(Option<tokio::runtime::Runtime>);

impl Leaving {
    async fn new(
        server: &Server,
        requests: impl futures_util::Stream<Item = ImportUsersRequest> + Send + 'static,
    ) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let channel = Channel::from_shared(format!("http://{}", server.addr)).unwrap();
        let importing = async move {
            let mut client = UserServiceClient::new(channel.connect().await.unwrap());
            client.import_users(requests).await.unwrap()
        };
        // The acknowledgements would be read here, if there were any.
        std::mem::forget(runtime.spawn(importing).await.unwrap());
        Self(Some(runtime))
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.take().unwrap().shutdown_background();
    }
}

#[tokio::test]
async fn imports_beyond_the_limit_are_refused_and_name_it() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_IMPORTS", "2")]).await;
    let mut client = server.client().await;
    let mut leaving = Vec::new();
    for _ in 0..2 {
        leaving.push(Leaving::new(&server, stream::pending()).await);
    }
    let answer = client.import_users(stream::pending::<ImportUsersRequest>()).await;
    let status = assert_refused(answer, Code::Unavailable, "OVERLOADED");
    assert!(status.message().contains("2 imports"), "{status:?}");
    drop(leaving.pop());
    let again = async || client.clone().import_users(stream::empty::<ImportUsersRequest>()).await.ok();
    eventually("there is room again", again).await;
}

#[tokio::test]
async fn an_import_that_says_nothing_for_long_is_ended_and_makes_room() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_IMPORTS", "1"), ("IMPORT_IDLE_TIMEOUT_MS", "1000")]).await;
    let mut client = server.client().await;
    for number in 1..=2 {
        let first =
            chunk(&new_request_id(), 1, ImportMode::CreateOnly, some_users(&format!("c{number}n"), 5));
        let chunks = stream::iter([first]).chain(stream::pending());
        let mut acks = client.import_users(chunks).await.unwrap().into_inner();
        assert_eq!(acks.message().await.unwrap().unwrap().created, 5);
        let end = tokio::time::timeout(Duration::from_secs(60), acks.message()).await.unwrap();
        assert_refused(end, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    }
}

#[tokio::test]
async fn a_server_that_stops_never_says_that_an_import_is_complete() {
    let database = Database::migrated().await;
    let id = new_request_id();
    let chunks = move || {
        (1..=400).map({
            let id = id.clone();
            move |number| chunk(&id, number, ImportMode::CreateOnly, some_users(&format!("c{number}n"), 5))
        })
    };
    let mut next = 1;
    // Once while it is written to, once while it waits for more.
    for is_waiting in [false, true] {
        let mut server = Server::start(&database, &[]).await;
        let mut client = server.client().await;
        let (sender, receiver) = mpsc::channel(1);
        let requests = stream::unfold(receiver, async |mut r| r.recv().await.map(|c| (c, r)));
        let mut acks = client.import_users(requests).await.unwrap().into_inner();
        let rest: Vec<_> = chunks().skip(next - 1).take(if is_waiting { 3 } else { 400 }).collect();
        let sending = tokio::spawn(async move {
            for chunk in rest {
                if sender.send(chunk).await.is_err() {
                    break;
                }
            }
            sender
        });
        let mut stopped = false;
        let status = loop {
            match acks.message().await {
                Ok(Some(ack)) => {
                    assert_eq!(ack.chunk, next as i64);
                    next += 1;
                    if !stopped && (!is_waiting || next % 3 == 0) {
                        server.signal("TERM");
                        stopped = true;
                    }
                }
                Ok(None) => panic!("complete after {next} chunks"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert_eq!(reason(&status), "SHUTTING_DOWN");
        assert!(server.ended().await.success());
        drop(sending);
    }
    // Whatever was acknowledged is there, and the rest can follow.
    let server = Server::start(&database, &[]).await;
    let acks = all(server
        .client()
        .await
        .import_users(stream::iter(chunks().skip(next - 1)))
        .await
        .unwrap()
        .into_inner())
    .await;
    assert_eq!(acks.len(), 401 - next);
    assert_eq!(database.count("select count(*) from users").await, 2000);
    assert_eq!(database.count("select count(*) from user_changes").await, 2000);
}

/// Those of [`WAITING`] who have just begun to: a chunk waits for a second at a time.
fn just_waiting() -> String {
    format!("{WAITING} and clock_timestamp() - query_start < '0.5 s'")
}

#[tokio::test]
async fn an_import_whose_client_has_gone_leaves_nothing_half_done() {
    let (server, database) = server().await;
    let holder = database.connect().await;
    holder.batch_execute(UNCOMMITTED).await.unwrap();
    let request = chunk(&new_request_id(), 1, ImportMode::CreateOnly, some_users("c", 10));
    let client = Leaving::new(&server, stream::iter([request]).chain(stream::pending())).await;
    eventually("it waits", async || (database.count(&just_waiting()).await == 1).then_some(())).await;
    drop(client);
    let is_abandoned = async || server.log().contains("statement cancelled").then_some(());
    eventually("it is cancelled", is_abandoned).await;
    eventually("it has ended", async || (database.count(WAITING).await == 0).then_some(())).await;
    holder.batch_execute("rollback").await.unwrap();
    let rows = "select (select count(*) from users) + (select count(*) from import_chunks)";
    assert_eq!(database.count(rows).await, 0);
}

#[tokio::test]
async fn a_stream_that_loses_its_database_says_so_and_can_be_gone_on_with() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[]).await;
    let client = server.client().await;
    let holder = database.connect().await;
    holder.batch_execute(UNCOMMITTED).await.unwrap();
    let id = new_request_id();
    let chunks = vec![
        chunk(&id, 1, ImportMode::CreateOnly, some_users("b", 10)),
        chunk(&id, 2, ImportMode::CreateOnly, some_users("c", 10)),
    ];
    let mut acks = client.clone().import_users(stream::iter(chunks.clone())).await.unwrap().into_inner();
    assert_eq!(acks.message().await.unwrap().map(|ack| ack.chunk), Some(1));
    eventually("it waits", async || (database.count(&just_waiting()).await == 1).then_some(())).await;
    proxy.cut();
    assert_refused(acks.message().await, Code::Unavailable, "OUTCOME_UNKNOWN");
    holder.batch_execute("rollback").await.unwrap();
    let retry = async || {
        let (acks, status) = import(&client, chunks.clone()).await;
        status.is_none().then_some(acks)
    };
    let again = eventually("the rest goes through", retry).await;
    assert_eq!(again.iter().map(counts).collect::<Vec<_>>(), [(10, 0, 0); 2]);
    assert_eq!(database.count("select count(*) from users").await, 20);
}

/// A chunk waits for a lock for a second at a time, so that others get by.
#[tokio::test]
async fn a_chunk_that_waits_too_long_is_given_up_and_can_be_sent_again() {
    let (server, database) = server().await;
    let client = server.client().await;
    let holder = database.connect().await;
    holder.batch_execute(UNCOMMITTED).await.unwrap();
    let request = chunk(&new_request_id(), 1, ImportMode::CreateOnly, some_users("c", 10));
    let started = std::time::Instant::now();
    let (acks, status) = import(&client, vec![request.clone()]).await;
    assert!(acks.is_empty() && started.elapsed() > Duration::from_secs(1));
    assert_refused(status.map_or(Ok(()), Err), Code::Aborted, "TRANSACTION_CONFLICT");
    holder.batch_execute("rollback").await.unwrap();
    assert_eq!(counts(&import_one(&client, request).await), (10, 0, 0));
}

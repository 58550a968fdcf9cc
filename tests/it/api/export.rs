//! ExportUsers: a complete snapshot, at the pace of the client, without cost to other requests.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use futures_util::future::join_all;
use prost::Message;
use prost_types::Timestamp;
use tonic::{Code, Status, Streaming, transport::Channel};
use user_service::pb::{self, ExportUsersResponse, user_service_client::UserServiceClient};

use crate::support::*;

type Client = UserServiceClient<Channel>;

/// Inserts users, each a second older than the one before, with display names of length `len`.
async fn insert(database: &Database, prefix: &str, count: u32, len: u32) {
    let sql = format!(
        "insert into users (id, username, username_key, username_held, email, email_key, display_name,
            revision, create_time, update_time)
        select gen_random_uuid(), '{prefix}' || n, '{prefix}' || n, true, n || '@example.com', n || '@example.com',
            repeat('x', {len}), 1, now() - n * interval '1 second', now()
        from generate_series(1, {count}) as n"
    );
    database.connect().await.batch_execute(&sql).await.unwrap();
}

/// Starts an export.
async fn start(
    client: &Client,
    filter: Option<pb::UserFilter>,
) -> Result<Streaming<ExportUsersResponse>, Status> {
    Ok(client.clone().export_users(pb::ExportUsersRequest { filter }).await?.into_inner())
}

/// The remaining users of an export, or the status that ends it.
async fn rest(mut export: Streaming<ExportUsersResponse>) -> Result<Vec<pb::User>, Status> {
    let mut users = Vec::new();
    while let Some(part) = export.message().await? {
        assert!(part.users.len() <= 500 && part.encoded_len() < 1 << 20);
        users.extend(part.users);
    }
    Ok(users)
}

async fn export(client: &Client, filter: pb::UserFilter) -> Vec<pb::User> {
    rest(start(client, Some(filter)).await.unwrap()).await.unwrap()
}

/// Counts the exports that hold a snapshot, each on its own connection.
const EXPORTS: &str = "select count(*) from pg_stat_activity where datname = current_database()
    and application_name = 'user-service' and backend_xid is null and backend_xmin is not null
    and xact_start is not null and query like '%create_time%'";

#[tokio::test]
async fn export_has_all_fields_of_all_users_that_are_not_deleted() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    // Almost as large as users can be.
    insert(&database, &"x".repeat(58), 1_200, 100).await;
    let mut expected = Vec::new();
    for name in ["alice", "bob", "carol"] {
        expected.push(created(&mut client, name).await);
    }
    client.delete_user(delete(&expected[1].id)).await.unwrap();
    expected.remove(1);
    let users = export(&client, pb::UserFilter::default()).await;
    assert_eq!(users.len(), 1_202);
    let own: Vec<_> = users.into_iter().filter(|user| user.username.starts_with(SECRET)).collect();
    assert_eq!(own, expected);
}

#[tokio::test]
async fn export_accepts_the_filters_of_a_list() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let mut users = Vec::new();
    for name in ["ann", "Anna", "bob", "anz"] {
        users.push(created(&mut client, name).await);
    }
    users[1] = client.delete_user(delete(&users[1].id)).await.unwrap().into_inner().user.unwrap();
    let all = pb::UserFilter::default;
    let of = |which: &[usize]| which.iter().map(|n| users[*n].clone()).collect::<Vec<_>>();
    let cases = [
        (all(), of(&[0, 2, 3])),
        (pb::UserFilter { include_deleted: true, ..all() }, of(&[0, 1, 2, 3])),
        (pb::UserFilter { username_prefix: format!("{SECRET}an"), ..all() }, of(&[0, 3])),
        (
            pb::UserFilter { username_prefix: format!("{SECRET}AN"), include_deleted: true, ..all() },
            of(&[0, 1, 3]),
        ),
        (pb::UserFilter { email: format!("{SECRET}BOB@example.com"), ..all() }, of(&[2])),
        (pb::UserFilter { create_time_after: users[0].create_time, ..all() }, of(&[2, 3])),
        (
            pb::UserFilter { create_time_before: users[2].create_time, include_deleted: true, ..all() },
            of(&[0, 1]),
        ),
    ];
    for (filter, expected) in cases {
        let mut users = export(&client, filter.clone()).await;
        users.sort_by_key(|user| user.create_time.map(|time| (time.seconds, time.nanos)));
        assert_eq!(users, expected, "{filter:?}");
    }
    let time = Some(Timestamp { seconds: 1, nanos: 0 });
    let mixed = pb::UserFilter { username_prefix: "a".into(), create_time_after: time, ..all() };
    let response = start(&client, Some(mixed)).await;
    assert_rejected(response, Code::InvalidArgument, "FILTER_UNSUPPORTED");
    let wrong = pb::UserFilter { email: "nonsense".into(), ..all() };
    let status = assert_rejected(start(&client, Some(wrong)).await, Code::InvalidArgument, "EMAIL_INVALID");
    assert_eq!(violations(&status), [("filter.email".into(), "EMAIL_INVALID".into())]);
}

#[tokio::test]
async fn first_message_has_the_watch_token_of_the_snapshot() {
    let (server, _database) = server().await;
    let client = server.client().await;
    let is_over = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (mut client, is_over) = (client.clone(), Arc::clone(&is_over));
            tokio::spawn(async move {
                let mut numbers = 0..;
                while !is_over.load(Ordering::Relaxed) {
                    created(&mut client, &format!("w{writer}n{}", numbers.next().unwrap())).await;
                }
            })
        })
        .collect();
    let mut exports = Vec::new();
    for _ in 0..30 {
        let mut parts = start(&client, None).await.unwrap();
        let first = parts.message().await.unwrap().unwrap();
        let ids: Vec<_> = rest(parts).await.unwrap().into_iter().map(|user| user.id).collect();
        exports.push((first.watch_token, ids));
    }
    is_over.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    // A watch from there delivers exactly the users that the export does not have.
    let mut all: Vec<_> = export(&client, Default::default()).await.into_iter().map(|user| user.id).collect();
    all.sort();
    for (resume_token, mut ids) in exports {
        let request = pb::WatchUsersRequest { resume_token, ..Default::default() };
        let mut watch = client.clone().watch_users(request).await.unwrap().into_inner();
        while ids.len() < all.len() {
            let message = watch.message().await.unwrap().unwrap();
            assert!(!message.bookmark, "a change is missing");
            ids.extend(message.changes.into_iter().map(|change| change.id));
        }
        ids.sort();
        assert_eq!(ids, all);
    }
}

#[tokio::test]
async fn export_is_one_snapshot_while_users_are_created_changed_and_deleted() {
    let (server, database) = server().await;
    insert(&database, "left", 1_000, 0).await;
    insert(&database, "right", 1_000, 0).await;
    // Both users of a pair always have the same display name, and the number of pairs is
    // constant. An export of more than one snapshot would differ.
    let writes = Arc::new(AtomicU32::new(0));
    let writers: Vec<_> = (0..3_u32)
        .map(|writer| {
            let (database, writes) = (database.clone(), Arc::clone(&writes));
            tokio::spawn(async move {
                let admin = database.connect().await;
                for write in 0.. {
                    let (name, n) = (format!("{writer} {write}"), 1 + (write * 7 + writer * 333) % 1_000);
                    let pair = format!("username_key in ('left{n}', 'right{n}')");
                    let sql = match write % 3 {
                        0 => format!("update users set display_name = '{name}' where {pair};"),
                        1 => format!(
                            "update users set delete_time = now(), purge_time = now() where {pair};
                            update users set delete_time = null, purge_time = null, display_name = '{name}',
                                create_time = now() where {pair};"
                        ),
                        _ => format!(
                            "delete from users where username_key = 'left{n}';
                            insert into users (id, username, username_key, username_held, email, email_key,
                                display_name, revision, create_time, update_time)
                            select gen_random_uuid(), 'left{n}', 'left{n}', true, email, email_key, display_name,
                                1, now(), now() from users where username_key = 'right{n}';"
                        ),
                    };
                    // Two writers can conflict; then one rolls back.
                    if admin.batch_execute(&format!("begin; {sql} commit")).await.is_err() {
                        admin.batch_execute("rollback").await.unwrap();
                    }
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let client = server.client().await;
    for _ in 0..10 {
        let before = writes.load(Ordering::Relaxed);
        let parts = start(&client, None).await.unwrap();
        eventually("the writers write", async || {
            (writes.load(Ordering::Relaxed) > before + 10).then_some(())
        })
        .await;
        let users = rest(parts).await.unwrap();
        assert_eq!(users.len(), 2_000);
        let names: HashMap<_, _> = users.iter().map(|u| (u.username.as_str(), &u.display_name)).collect();
        assert_eq!(names.len(), 2_000);
        for n in 1..=1_000 {
            assert_eq!(names[format!("left{n}").as_str()], names[format!("right{n}").as_str()]);
        }
    }
    for writer in writers {
        assert!(!writer.is_finished());
        writer.abort();
    }
}

#[tokio::test]
async fn stalled_exports_take_no_connection_from_the_pool() {
    let database = Database::migrated().await;
    insert(&database, "user", 50_000, 100).await;
    let server = Server::start(&database, &[("POOL_SIZE", "2"), ("RUST_LOG", "user_service=debug")]).await;
    let slow = join_all((0..4).map(async |_| {
        let mut parts = start(&server.client().await, None).await.unwrap();
        let first = parts.message().await.unwrap().unwrap();
        assert!(!first.watch_token.is_empty());
        parts
    }))
    .await;
    let mut client = server.client().await;
    for n in 0..20 {
        let user = created(&mut client, &format!("other{n}")).await;
        client.get_user(by_id(&user.id)).await.unwrap();
    }
    // The queries are still running: flow control holds them back, and nothing is buffered.
    assert_eq!(database.count(EXPORTS).await, 4);
    for parts in slow {
        assert_eq!(rest(parts).await.unwrap().len(), 50_000);
    }
}

#[tokio::test]
async fn export_of_200_000_users_uses_little_memory() {
    let database = Database::migrated().await;
    insert(&database, "user", 200_000, 100).await;
    let server = Server::start(&database, &[("RUST_LOG", "user_service=debug")]).await;
    let before = server.memory();
    let mut parts = start(&server.client().await, None).await.unwrap();
    let mut count = 0;
    while let Some(part) = parts.message().await.unwrap() {
        count += part.users.len();
        // All users take 50 MiB.
        let growth = server.memory().saturating_sub(before);
        assert!(growth < 32 << 20, "the service has grown by {growth} bytes");
    }
    assert_eq!(count, 200_000);
}

#[tokio::test]
async fn export_beyond_the_limit_is_rejected_until_another_client_disconnects() {
    let database = Database::migrated().await;
    insert(&database, "user", 50_000, 100).await;
    let settings = [("MAX_EXPORTS", "2"), ("RUST_LOG", "user_service=debug")];
    let server = Server::start(&database, &settings).await;
    let client = server.client().await;
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(start(&client, None).await.unwrap());
    }
    let status = assert_rejected(start(&client, None).await, Code::Unavailable, "OVERLOADED");
    assert!(status.message().contains("2 exports"), "{status:?}");
    assert_eq!(database.count(EXPORTS).await, 2);
    held.pop();
    eventually("the query ends", async || (database.count(EXPORTS).await == 1).then_some(())).await;
    let again = async || start(&client, None).await.ok();
    let again = eventually("a new export is accepted", again).await;
    assert_eq!(rest(again).await.unwrap().len(), 50_000);
}

#[tokio::test]
async fn query_ends_when_its_client_disconnects() {
    let database = Database::migrated().await;
    insert(&database, "user", 50_000, 100).await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[("RUST_LOG", "user_service=debug")]).await;
    let parts = start(&server.client().await, None).await.unwrap();
    // The query never ends by itself.
    proxy.hold_responses();
    assert_eq!(database.count(EXPORTS).await, 1);
    drop(parts);
    eventually("the query ends", async || (database.count(EXPORTS).await == 0).then_some(())).await;
}

#[tokio::test]
async fn export_ends_at_its_timeout_even_if_the_client_does_not_read() {
    let database = Database::migrated().await;
    insert(&database, "user", 50_000, 100).await;
    let settings = [("EXPORT_TIMEOUT_MS", "10000"), ("RUST_LOG", "user_service=debug")];
    let server = Server::start(&database, &settings).await;
    let parts = start(&server.client().await, None).await.unwrap();
    eventually("the snapshot is released", async || (database.count(EXPORTS).await == 0).then_some(())).await;
    assert_rejected(rest(parts).await, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
}

#[tokio::test]
async fn interrupted_export_ends_with_an_error() {
    let database = Database::migrated().await;
    insert(&database, "user", 50_000, 100).await;
    let mut server = Server::start(&database, &[("RUST_LOG", "user_service=debug")]).await;
    let parts = start(&server.client().await, None).await.unwrap();
    eventually("the backends are terminated", async || {
        terminate_backends(&database).await;
        (database.count(EXPORTS).await == 0).then_some(())
    })
    .await;
    assert_rejected(rest(parts).await, Code::Unavailable, "DATABASE_UNAVAILABLE");

    let again = async || start(&server.client().await, None).await.ok();
    let parts = eventually("the database is available", again).await;
    server.signal("TERM");
    let stops = async || server.log().contains(r#""message":"stopping""#).then_some(());
    eventually("the server stops", stops).await;
    let status = assert_rejected(rest(parts).await, Code::Unavailable, "SHUTTING_DOWN");
    assert!(!status.message().contains("postgres"));
    assert!(server.ended().await.success());
    eventually("the query ends", async || (database.count(EXPORTS).await == 0).then_some(())).await;
}

#[tokio::test]
async fn export_without_a_database_fails_before_its_first_message() {
    let server = Server::spawn(&[("DATABASE_URL", "postgres://postgres@%2Fnowhere/postgres")]).await;
    let response = start(&server.client().await, None).await;
    assert_rejected(response, Code::Unavailable, "DATABASE_UNAVAILABLE");
}

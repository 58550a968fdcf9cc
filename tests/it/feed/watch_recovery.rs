//! A watch misses no change when PostgreSQL crashes, is restored or loses its connections.

use tonic::Code;
use user_service::store::change_log;
use user_service::store::dev_postgres::Embedded;

use crate::feed::chaos::{crash, start_again};
use crate::feed::watch::{Watch, from_token, insert, user_of};
use crate::support::*;

#[tokio::test]
async fn restored_dump_does_not_hide_new_changes() {
    let database = Database::migrated().await;
    let admin = database.connect().await;
    admin.batch_execute(FOREIGN_LOG).await.unwrap();
    let server = Server::start(&database, &[]).await;
    let mut client = server.client().await;
    let mut watch = Watch::from_now(&mut client).await;
    let id = created(&mut client, "alice").await.id;
    assert_eq!(watch.changes(1).await[0].id, id);
    assert_eq!(database.count("select count(*) from user_changes").await, 1);

    // A restore under the running service.
    admin.batch_execute(FOREIGN_LOG).await.unwrap();
    let status = watch.end().await;
    assert!([Code::Unavailable, Code::FailedPrecondition].contains(&status.code()), "{status:?}");
    let from_now = async || Watch::open(&mut client.clone(), from_token("")).await.ok();
    let mut new = eventually("the log has a new origin", from_now).await;
    let token = std::mem::take(&mut watch.token);
    assert_rejected(
        Watch::resumed(&mut client, &token).await.map(drop),
        Code::FailedPrecondition,
        "RESUME_TOKEN_FOREIGN",
    );
    assert!(new.message().await.unwrap().bookmark);
    let id = created(&mut client, "bob").await.id;
    assert_eq!(new.changes(1).await[0].id, id);
}

/// Makes the log one of another cluster.
const FOREIGN_LOG: &str =
    "update user_feed set origin = 'another', purged_xid = '9000000', purged_time = now();
    insert into user_changes (xid, user_id, revision, kind) values ('9999999', gen_random_uuid(), 1, 1)";

#[tokio::test]
async fn restored_database_rejects_earlier_tokens_even_if_it_was_never_written() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let mut tokens = Vec::new();
    for _ in 0..2 {
        tokens.push(Watch::from_now(&mut client).await.token);
        database.connect().await.batch_execute(FOREIGN_LOG).await.unwrap();
        change_log::reset_origin(&database.config()).await.unwrap();
        for token in &tokens {
            let rejected = Watch::resumed(&mut client, token).await.map(drop);
            assert_rejected(rejected, Code::FailedPrecondition, "RESUME_TOKEN_FOREIGN");
        }
    }
}

#[tokio::test]
async fn log_is_not_reset_while_a_restore_is_running() {
    let database = Database::migrated().await;
    let admin = database.connect().await;
    admin.batch_execute(FOREIGN_LOG).await.unwrap();
    let log = "select count(*) from user_changes";
    for (table, key) in [("users", "id"), ("user_changes", "xid, seq")] {
        // A restore creates the keys after the rows.
        admin
            .batch_execute(&format!("alter table {table} drop constraint {table}_pkey cascade"))
            .await
            .unwrap();
        change_log::reset_origin(&database.config()).await.unwrap();
        assert_eq!(database.count(log).await, 1);
        let add = format!("alter table {table} add constraint {table}_pkey primary key ({key})");
        admin.batch_execute(&add).await.unwrap();
    }
    change_log::reset_origin(&database.config()).await.unwrap();
    assert_eq!(database.count(log).await, 0);
}

#[tokio::test]
async fn watches_survive_a_broken_reader_connection_without_missing_changes() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let mut watches = Vec::new();
    for _ in 0..3 {
        watches.push(Watch::from_now(&mut client).await);
    }
    for n in 0..3 {
        assert!(terminate_backends(&database).await > 0);
        insert(&database, &format!("user{n}x"), 2, 10).await;
        for watch in &mut watches {
            watch.changes(20).await;
        }
    }
}

#[tokio::test]
async fn crash_that_reuses_transaction_ids_hides_no_change() {
    let dir = tempfile::TempDir::with_prefix("pg-").unwrap();
    let mut postgres = Embedded::start(dir.path()).await.unwrap();
    let database = Database { socket_dir: dir.path().into(), name: "postgres".into() };
    let server = Server::start(&database, &[]).await;
    let mut client = server.client().await;
    created(&mut client, "alice").await;
    let xid = "select pg_current_xact_id()::text::bigint";
    let mut attempts = 0..10;
    let token = loop {
        assert!(attempts.next().is_some(), "PostgreSQL never reused an id");
        // Transactions without writes. They leave nothing in the WAL, unless PostgreSQL logs
        // its running transactions at this moment.
        let admin = database.connect().await;
        let mut lost: i64 = 0;
        for _ in 0..20 {
            lost = admin.query_one(xid, &[]).await.unwrap().get(0);
        }
        let from_now = async || Watch::open(&mut client.clone(), from_token("")).await.ok();
        let mut watch = eventually("a watch starts", from_now).await;
        let Ok(bookmark) = watch.message().await else { continue };
        crash(dir.path()).await;
        drop(postgres);
        postgres = start_again(dir.path()).await;
        if database.count(xid).await <= lost {
            break bookmark.resume_token;
        }
    };
    let bob = create(user("bob"));
    let bob = eventually("bob is created", async || client.create_user(bob.clone()).await.ok()).await;
    // This too can use a connection that the crash closed.
    let resume = async || Watch::resumed(&mut client.clone(), &token).await.ok();
    let mut watch = eventually("the watch resumes", resume).await;
    assert_eq!(user_of(&watch.changes(1).await[0]), bob.into_inner().user.as_ref());
    drop(server);
    postgres.stop().await.unwrap();
}

//! The change log and the request ids stay small, and no watch misses a change for that.

use tonic::Code;
use user_service::store::dev_postgres::Embedded;

use crate::feed::watch::{Watch, insert};
use crate::support::*;

const FAST: [(&str, &str); 2] = [("PURGE_INTERVAL_MS", "10"), ("CHANGE_RETENTION_HOURS", "1")];

/// The changes of a partition that stay in the file, dead or not.
fn size(partition: u32) -> String {
    format!("select pg_relation_size('user_changes_{partition}')")
}

async fn partition(database: &Database) -> i64 {
    database.count("select last_value / 1000000000000000000 from user_changes_seq").await
}

#[tokio::test]
async fn old_partition_is_emptied_and_watches_of_later_changes_continue_without_a_gap() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let mut live = Watch::from_now(&mut client).await;
    let before = live.token.clone();
    insert(&database, "old", 3, 400).await;
    live.changes(1200).await;
    end_partition(&database, "61 minutes").await;
    insert(&database, "new", 1, 10).await;
    live.changes(10).await;
    let after = live.token.clone();
    insert(&database, "newer", 2, 600).await;
    live.changes(1200).await;
    assert!(database.count(&size(0)).await > 0);

    let purging = Server::start(&database, &FAST).await;
    eventually("the partition is empty", async || (database.count(&size(0)).await == 0).then_some(())).await;
    assert_eq!(database.count("select count(*) from user_changes").await, 1210);
    let mut client = purging.client().await;
    let rejected = Watch::resumed(&mut client, &before).await.map(drop);
    assert_rejected(rejected, Code::OutOfRange, "RESUME_TOKEN_EXPIRED");
    let mut resumed = Watch::resumed(&mut client, &after).await.unwrap();
    let ids: std::collections::HashSet<_> =
        resumed.changes(1200).await.into_iter().map(|change| change.id).collect();
    assert_eq!(ids.len(), 1200);
    let id = created(&mut client, "alice").await.id;
    assert_eq!(resumed.changes(1).await[0].id, id);
    assert_eq!(live.changes(1).await[0].id, id);
}

#[tokio::test]
async fn partitions_are_written_in_turn_and_a_watch_receives_every_change() {
    // Nothing else runs transactions here: a position names those that run, and an hour passes in
    // less than a second.
    let dir = tempfile::TempDir::with_prefix("pg-").unwrap();
    let postgres = Embedded::start(dir.path()).await.unwrap();
    let database = Database { socket_dir: dir.path().into(), name: "postgres".into() };
    let server = Server::start(&database, &FAST).await;
    let mut client = server.client().await;
    let mut watch = Watch::from_now(&mut client).await;
    for day in 0..20 {
        // A seventh of an hour; then the service advances by itself.
        let begun = partition(&database).await;
        let age = "update user_changes_partitions set begin_time = begin_time - interval '10 minutes'";
        database.connect().await.batch_execute(age).await.unwrap();
        let advanced = async || (partition(&database).await == (begun + 1) % 9).then_some(());
        eventually("the next partition is written", advanced).await;
        for n in 0..3 {
            let id = created(&mut client, &format!("user{day}x{n}")).await.id;
            assert_eq!(watch.changes(1).await[0].id, id);
        }
    }
    // Six partitions are complete for less than an hour.
    let kept = "select count(*) from user_changes";
    eventually("the others are empty", async || (database.count(kept).await == 7 * 3).then_some(())).await;
    assert_eq!(database.count("select count(*) from user_changes_partitions").await, 7);
    assert_eq!(database.count("select count(*) from users").await, 60);
    drop(server);
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn writes_go_on_while_no_partition_can_be_emptied() {
    let database = Database::migrated().await;
    for _ in 0..8 {
        insert(&database, &format!("p{}", partition(&database).await), 1, 10).await;
        end_partition(&database, "2 hours").await;
    }
    // As a dump does.
    let reader = database.connect().await;
    reader.batch_execute("begin; select count(*) from user_changes").await.unwrap();
    let server = Server::start(&database, &FAST).await;
    let mut client = server.client().await;
    let mut watch = Watch::from_now(&mut client).await;
    let blocked = "select count(*) from pg_stat_activity where datname = current_database()
        and wait_event_type = 'Lock' and query like 'lock table user_changes_0 %'";
    eventually("the purge waits", async || (database.count(blocked).await > 0).then_some(())).await;
    let id = created(&mut client, "alice").await.id;
    assert_eq!(watch.changes(1).await[0].id, id);
    // There is no empty partition to advance to.
    assert_eq!(partition(&database).await, 8);
    reader.batch_execute("commit").await.unwrap();
    eventually("it advances", async || (partition(&database).await == 0).then_some(())).await;
    let old = "select count(*) from user_changes";
    eventually("the others are empty", async || (database.count(old).await == 1).then_some(())).await;
    let id = created(&mut client, "bob").await.id;
    assert_eq!(watch.changes(1).await[0].id, id);
}

/// A read has a snapshot, and to empty a partition is not a matter of snapshots.
#[tokio::test]
async fn read_that_waits_while_its_partition_is_emptied_fails_instead_of_missing_changes() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    created(&mut client, "alice").await;
    end_partition(&database, "2 hours").await;
    created(&mut client, "bob").await;
    let token = Watch::from_now(&mut client).await.token;
    insert(&database, "missed", 1, 10).await;
    end_partition(&database, "2 hours").await;
    created(&mut client, "carol").await;
    // No watch reads on this replica yet.
    let server = Server::start(&database, &[]).await;
    let mut client = server.client().await;
    let purge = database.connect().await;
    purge.batch_execute("begin; lock table user_changes_1 in access exclusive mode").await.unwrap();
    let resumed = tokio::spawn(async move { Watch::resumed(&mut client, &token).await?.message().await });
    // The read of this watch, and that of the feed.
    let both = async || (database.count(WAITING).await >= 2).then_some(());
    eventually("both reads wait", both).await;
    let empty = "with newest as (select xid, time from user_changes where seq < 2000000000000000000
            order by xid desc limit 1)
        update user_feed set purged_xid = newest.xid, purged_time = newest.time from newest;
        truncate user_changes_1; commit";
    purge.batch_execute(empty).await.unwrap();
    assert_rejected(resumed.await.unwrap(), Code::OutOfRange, "RESUME_TOKEN_EXPIRED");
}

#[tokio::test]
async fn export_does_not_keep_a_partition_from_being_emptied() {
    let (server, database) = server().await;
    let client = server.client().await;
    insert(&database, "user", 20, 1000).await;
    end_partition(&database, "2 hours").await;
    let mut export = client
        .clone()
        .export_users(user_service::pb::ExportUsersRequest::default())
        .await
        .unwrap()
        .into_inner();
    export.message().await.unwrap().unwrap();
    let running = "select count(*) from pg_stat_activity where datname = current_database()
        and backend_xmin is not null and query like '%from users%' and query not like '%pg_stat_activity%'";
    assert_eq!(database.count(running).await, 1);
    let _purging = Server::start(&database, &FAST).await;
    eventually("the partition is empty", async || (database.count(&size(0)).await == 0).then_some(())).await;
    assert_eq!(database.count(running).await, 1);
    let mut exported = 0;
    while let Some(part) = export.message().await.unwrap() {
        exported += part.users.len();
    }
    assert_eq!(exported, 20_000);
}

#[tokio::test]
async fn expired_request_ids_are_purged_wherever_they_are_in_a_large_table() {
    let database = Database::migrated().await;
    let rows = "insert into requests (request_id, fingerprint, is_salted, user_id, expire_time)
        select gen_random_uuid(), sha256(n::text::bytea), true, gen_random_uuid(),
            now() + case when n % 3 = 0 then interval '-1 second' else interval '1 day' end
        from generate_series(1, 60000) as n";
    database.connect().await.batch_execute(rows).await.unwrap();
    // More than one purge reads.
    assert!(database.count("select pg_relation_size('requests') / 8192").await > 512);
    let _server = Server::start(&database, &[("PURGE_INTERVAL_MS", "10")]).await;
    let expired = "select count(*) from requests where expire_time <= now()";
    eventually("all are purged", async || (database.count(expired).await == 0).then_some(())).await;
    assert_eq!(database.count("select count(*) from requests").await, 40_000);
}

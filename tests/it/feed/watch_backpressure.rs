//! Slow clients do not delay other watches, and use little memory.

use std::collections::HashSet;

use futures_util::future::join_all;
use tonic::transport::Channel;
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::feed::watch::{Watch, insert, user_of};
use crate::support::*;

#[tokio::test]
async fn slow_watcher_catches_up_without_blocking_others() {
    // More batches than the feed keeps.
    const BATCHES: usize = 80;
    const USERS_EACH: usize = 130;
    const USERS: usize = BATCHES * USERS_EACH;
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "2")]).await;
    let mut client = server.client().await;
    let addr = format!("http://{}", server.addr);
    let mut stalled = Watch::from_now(&mut narrow_client(&server).await).await;
    // Separate connections, so that only the server can let one delay another.
    let watches = (0..100).map(|_| {
        let addr = addr.clone();
        async move {
            let channel = Channel::from_shared(addr).unwrap().connect().await.unwrap();
            Watch::from_now(&mut UserServiceClient::new(channel)).await
        }
    });
    let read_all = |mut watch: Watch| tokio::spawn(async move { watch.changes(USERS).await.len() });
    let watches: Vec<_> = join_all(watches).await.into_iter().map(read_all).collect();
    let mut fast = Watch::from_now(&mut client).await;
    for batch in 0..BATCHES {
        insert(&database, &format!("{batch}user"), 1, USERS_EACH as u32).await;
        fast.changes(USERS_EACH).await;
    }
    // Requests get connections meanwhile.
    for n in 0..10 {
        client.check_username(pb::CheckUsernameRequest { username: format!("name{n}") }).await.unwrap();
    }
    for received in join_all(watches).await {
        assert_eq!(received.unwrap(), USERS);
    }
    let (mut ids, mut has_lagged) = (HashSet::new(), false);
    while ids.len() < USERS {
        let message = stalled.message().await.unwrap();
        let users = message.changes.iter().filter_map(user_of);
        let (of_message, batches): (Vec<_>, HashSet<_>) =
            users.map(|user| (user.id.clone(), user.username.split_once('u').unwrap().0)).unzip();
        ids.extend(of_message);
        has_lagged |= batches.len() > 1;
    }
    // Only a message that was read from the log can have changes of two batches.
    assert!(has_lagged);
    created(&mut client, "last").await;
    assert_eq!(stalled.changes(1).await.len(), 1);
    let connections = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'user-service'";
    // Two of the pool, one of the health check and one of the feed. A closed connection may
    // still be listed for a moment.
    let are_four = async || (database.count(connections).await == 4).then_some(());
    eventually("no watcher has a connection", are_four).await;
}

#[tokio::test]
async fn stalled_catch_ups_use_little_memory_and_do_not_block_others() {
    const USERS: usize = 6_000;
    // Many more than there are catch-up permits.
    const STALLED: usize = 100;
    let (server, database) = server().await;
    let mut client = server.client().await;
    let token = Watch::from_now(&mut client).await.token;
    insert(&database, "user", 10, USERS as u32 / 10).await;
    let before = server.memory();
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let mut watch = Watch::resumed(&mut narrow_client(&server).await, &token).await.unwrap();
        let seen = watch.message().await.unwrap().changes.len();
        stalled.push((watch, seen));
    }
    // Each watch has missed more than 1 MiB; large batches would take 80 MiB more.
    let growth = server.memory().saturating_sub(before);
    assert!(growth < 48 << 20, "{growth}");
    let mut ids = HashSet::new();
    let mut watch = Watch::resumed(&mut client, &token).await.unwrap();
    ids.extend(watch.changes(USERS).await.iter().filter_map(user_of).map(|user| user.id.clone()));
    assert_eq!(ids.len(), USERS);
    // Watches with a permit, and some without.
    for (mut watch, seen) in stalled.into_iter().take(12) {
        watch.changes(USERS - seen).await;
    }
}

#[tokio::test]
async fn watcher_ahead_of_the_feed_gets_keepalives_and_no_duplicates() {
    // Delivering one transaction to all watchers takes longer than the bookmark interval.
    const TRANSACTIONS: usize = 8;
    const USERS_EACH: usize = 500;
    const WATCHERS: usize = 400;
    let (server, database) = server().await;
    let mut client = server.client().await;
    let token = Watch::from_now(&mut client).await.token;
    // Another connection, because these watches are not read.
    let mut unread_client = server.client().await;
    let mut watches = Vec::new();
    for _ in 0..WATCHERS {
        watches.push(Watch::from_now(&mut unread_client).await);
    }
    let slow = database.connect().await;
    let slow_id = new_request_id();
    let change = format!("insert into user_changes (user_id, revision, kind) values ('{slow_id}', 1, 6)");
    slow.batch_execute(&format!("begin; {change}")).await.unwrap();
    insert(&database, &"x".repeat(1_000), TRANSACTIONS as u32, USERS_EACH as u32).await;
    let mut ahead = Watch::resumed(&mut client, &token).await.unwrap();
    ahead.changes(TRANSACTIONS * USERS_EACH).await;
    let keepalive = ahead.message().await.unwrap();
    // Not a bookmark: there can be changes that the feed has not published yet.
    assert!(keepalive.changes.is_empty() && !keepalive.bookmark);
    // The next batch has it, and many changes that this watch has received.
    slow.batch_execute("commit").await.unwrap();
    assert_eq!(ahead.changes(1).await[0].id, slow_id);
    let id = created(&mut client, "alice").await.id;
    let mut resumed = Watch::resumed(&mut client, &ahead.token).await.unwrap();
    assert_eq!(resumed.changes(1).await[0].id, id);
}

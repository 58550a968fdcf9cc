//! Every token resumes exactly after its changes, or is rejected.

use std::collections::HashSet;

use tonic::{Code, transport::Channel};
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::feed::token_keys::token_keys;
use crate::feed::watch::{Watch, from_token, insert, user_of};
use crate::support::*;

#[tokio::test]
async fn list_token_resumes_exactly_where_the_list_began() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let before = created(&mut client, "before").await;
    let list = client.list_users(pb::ListUsersRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.users, [before]);
    let after = created(&mut client, "after").await;
    let mut watch = Watch::resumed(&mut client, &list.watch_token).await.unwrap();
    let changes = watch.changes(1).await;
    assert_eq!(user_of(&changes[0]), Some(&after));
}

#[tokio::test]
async fn invalid_and_foreign_tokens_are_rejected_with_instructions() {
    let (server, database) = server().await;
    let (other_server, _) = crate::support::server().await;
    let mut client = server.client().await;
    let mut other = other_server.client().await;
    created(&mut client, "alice").await;
    let token = Watch::from_now(&mut client).await.token;

    let mut bad: Vec<String> = (1..token.len()).map(|n| token[..n].to_owned()).collect();
    bad.extend((0..token.len() - 1).map(|n| {
        let mut bytes = token.clone().into_bytes();
        bytes[n] = if bytes[n] == b'A' { b'B' } else { b'A' };
        String::from_utf8(bytes).unwrap()
    }));
    bad.extend(["x", "AAAA", "%00", "\u{202e}", "' or 1=1 --"].map(str::to_owned));
    bad.push("A".repeat(100_000));
    // Tokens of another release: the key is right, the content is not.
    let keys = token_keys(&database).await;
    let position = keys.decode(b"watch", &token).unwrap();
    // A transaction in flight after the last one, and no protobuf.
    for more in [&[0x20, 0][..], &[0x20, 0xff, 0xff, 0xff, 0xff, 0x7f], &[7]] {
        bad.push(keys.encode(b"watch", &[&position, more].concat()));
    }
    // A valid position in the context of another kind of token.
    bad.push(keys.encode(b"page", &position));
    // Another database has other keys.
    let another = Database::migrated().await;
    another.connect().await.batch_execute("update token_keys set key = sha256(key)").await.unwrap();
    let another_server = Server::start(&another, &[]).await;
    bad.push(Watch::from_now(&mut another_server.client().await).await.token);
    for token in bad {
        let rejected = Watch::resumed(&mut client, &token).await.map(drop);
        let status = assert_rejected(rejected, Code::InvalidArgument, "RESUME_TOKEN_INVALID");
        assert_eq!(violations(&status), [("resume_token".into(), "RESUME_TOKEN_INVALID".into())]);
        assert!(status.message().contains("send_initial_state"));
    }
    let both = pb::WatchUsersRequest { send_initial_state: true, ..from_token(&token) };
    let status = assert_rejected(
        Watch::open(&mut client, both).await.map(drop),
        Code::InvalidArgument,
        "FIELD_INVALID",
    );
    assert_eq!(violations(&status)[0].0, "send_initial_state");

    let foreign = async |client: &mut UserServiceClient<Channel>, token: &str| {
        let rejected = Watch::resumed(client, token).await.map(drop);
        let status = assert_rejected(rejected, Code::FailedPrecondition, "RESUME_TOKEN_FOREIGN");
        assert!(status.message().contains("send_initial_state"));
    };
    // A copy of the database in the same cluster, which has its keys.
    foreign(&mut other, &token).await;
    // Another timeline.
    let mut another_timeline = position.clone();
    let digit = position.windows(8).position(|part| part == b"00000001").unwrap() + 7;
    another_timeline[digit] = b'2';
    foreign(&mut client, &keys.encode(b"watch", &another_timeline)).await;
    // A position in the future: of a repeated field that is not a list, the last value counts.
    let future = [position.as_slice(), &[0x10, 0xff, 0xff, 0xff, 0x7f]].concat();
    foreign(&mut client, &keys.encode(b"watch", &future)).await;
    // A database restored from a backup that is older than the token: another transaction has
    // the same id, or there is no such change.
    let admin = database.connect().await;
    admin.batch_execute("update user_changes set time = time + interval '1 hour'").await.unwrap();
    foreign(&mut client, &token).await;
    admin.batch_execute("delete from user_changes").await.unwrap();
    foreign(&mut client, &token).await;
}

#[tokio::test]
async fn old_changes_are_purged_and_tokens_before_them_expire() {
    let database = Database::migrated().await;
    let settings = [("CHANGE_RETENTION_HOURS", "1"), ("PURGE_INTERVAL_MS", "10")];
    let server = Server::start(&database, &settings).await;
    let mut client = server.client().await;
    let before = Watch::from_now(&mut client).await.token;
    // The lock of a running purge keeps the server from purging.
    let admin = database.connect().await;
    admin.batch_execute("select pg_advisory_lock(hashtext('user-service purge'))").await.unwrap();
    insert(&database, "old", 3, 400).await;
    end_partition(&database, "61 minutes").await;
    let after = Watch::from_now(&mut client).await.token;
    admin.batch_execute("select pg_advisory_unlock_all()").await.unwrap();
    let left = async || database.count("select count(*) from user_changes").await;
    eventually("the old changes are purged", async || (left().await == 0).then_some(())).await;

    let rejected = Watch::resumed(&mut client, &before).await.map(drop);
    let status = assert_rejected(rejected, Code::OutOfRange, "RESUME_TOKEN_EXPIRED");
    assert!(status.message().contains("send_initial_state"));
    // A token after the purged changes is still valid.
    let mut resumed = Watch::resumed(&mut client, &after).await.unwrap();
    assert!(resumed.message().await.unwrap().bookmark);
    let id = created(&mut client, "new").await.id;
    assert_eq!(resumed.changes(1).await[0].id, id);

    // While an older transaction is in flight, nothing after it is purged.
    let slow = database.connect().await;
    slow.batch_execute("begin; select pg_current_xact_id()").await.unwrap();
    insert(&database, "older", 1, 10).await;
    end_partition(&database, "61 minutes").await;
    for _ in 0..2 {
        // Each run purges request ids just before changes.
        admin
            .batch_execute(
                "insert into requests values (gen_random_uuid(), '', false, gen_random_uuid(), now())",
            )
            .await
            .unwrap();
        let requests = "select count(*) from requests";
        eventually("the purge runs again", async || (database.count(requests).await == 0).then_some(()))
            .await;
    }
    assert!(left().await >= 10);
    slow.batch_execute("rollback").await.unwrap();
    eventually("the remaining changes are purged", async || (left().await == 0).then_some(())).await;
}

#[tokio::test]
async fn large_transaction_is_split_and_only_its_last_message_advances_the_token() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let mut watch = Watch::from_now(&mut client).await;
    let token = watch.token.clone();
    let keys = token_keys(&database).await;
    let position = |token: &str| keys.decode(b"watch", token).unwrap();
    insert(&database, "user", 1, 20_000).await;
    let mut resumed = Watch::resumed(&mut client, &token).await.unwrap();
    for watch in [&mut watch, &mut resumed] {
        let mut ids = HashSet::new();
        while ids.len() < 20_000 {
            assert!(ids.is_empty() || position(&watch.token) == position(&token));
            let changes = watch.message().await.unwrap().changes;
            assert!(changes.len() <= 32, "{}", changes.len());
            ids.extend(changes.into_iter().map(|change| change.id));
        }
        let mut behind = Watch::resumed(&mut client, &watch.token).await.unwrap();
        assert!(behind.message().await.unwrap().bookmark);
    }
}

#[tokio::test]
async fn every_token_resumes_after_the_last_complete_transaction() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let token = Watch::from_now(&mut client).await.token;
    insert(&database, "small", 3, 31).await;
    insert(&database, "large", 1, 100).await;
    let ends = [0, 31, 62, 93, 193];
    let ids = |changes: Vec<pb::UserChange>| changes.into_iter().map(|change| change.id).collect::<Vec<_>>();
    let (mut all, mut tokens) = (Vec::new(), Vec::new());
    let mut watch = Watch::resumed(&mut client, &token).await.unwrap();
    while all.len() < 193 {
        all.extend(ids(watch.message().await.unwrap().changes));
        tokens.push((watch.token.clone(), all.len()));
    }
    assert!(tokens.len() > 5, "{tokens:?}");
    for (token, seen) in tokens {
        let end = ends.into_iter().rfind(|end| *end <= seen).unwrap();
        let mut watch = Watch::resumed(&mut client, &token).await.unwrap();
        match all.len() - end {
            0 => assert!(watch.message().await.unwrap().bookmark),
            count => assert_eq!(ids(watch.changes(count).await), all[end..]),
        }
    }
}

#[tokio::test]
async fn stopping_server_ends_its_watches_with_tokens_that_another_replica_accepts() {
    let (mut one, database) = server().await;
    let two = Server::start(&database, &[]).await;
    let mut watches = Vec::new();
    for _ in 0..3 {
        watches.push(Watch::from_now(&mut one.client().await).await);
    }
    one.signal("TERM");
    assert!(one.ended().await.success());
    let id = created(&mut two.client().await, "alice").await.id;
    for mut watch in watches {
        let status = watch.end().await;
        assert_rejected::<()>(Err(status), Code::Unavailable, "SHUTTING_DOWN");
        let mut resumed = Watch::resumed(&mut two.client().await, &watch.token).await.unwrap();
        assert_eq!(resumed.changes(1).await[0].id, id);
    }
}

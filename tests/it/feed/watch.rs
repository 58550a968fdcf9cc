//! A watch shows every change that was committed and no other, to everybody, from any
//! token on.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use futures_util::future::join_all;
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_types::StatusExt;
use user_service::model::page::{decode_token, encode_token};
use user_service::pb::{self, ChangeKind, user_service_client::UserServiceClient};
use user_service::store::change_log;
use user_service::store::dev_postgres::Embedded;

use crate::feed::chaos::{crash, start_again};
use crate::mirror::Mirror;
use crate::support::*;

/// An open watch, and the token of the last message that was read.
pub struct Watch {
    messages: Streaming<pb::WatchUsersResponse>,
    pub token: String,
}

impl Watch {
    pub async fn open(
        client: &mut UserServiceClient<Channel>,
        request: pb::WatchUsersRequest,
    ) -> Result<Self, Status> {
        let messages = client.watch_users(request).await?.into_inner();
        Ok(Self { messages, token: String::new() })
    }

    /// One from now on: what happens after this is in it.
    async fn from_now(client: &mut UserServiceClient<Channel>) -> Self {
        let mut watch = Self::open(client, pb::WatchUsersRequest::default()).await.unwrap();
        let first = watch.message().await.unwrap();
        assert!(first.bookmark && first.changes.is_empty());
        watch
    }

    async fn resumed(client: &mut UserServiceClient<Channel>, token: &str) -> Result<Self, Status> {
        Self::open(client, from_token(token)).await
    }

    pub async fn message(&mut self) -> Result<pb::WatchUsersResponse, Status> {
        let message = tokio::time::timeout(Duration::from_secs(60), self.messages.message()).await.unwrap();
        let message = message?.expect("a stream ends with a status");
        self.token.clone_from(&message.resume_token);
        Ok(message)
    }

    /// The next changes, `count` of them.
    pub async fn changes(&mut self, count: usize) -> Vec<pb::UserChange> {
        let mut changes = Vec::new();
        while changes.len() < count {
            changes.extend(self.message().await.unwrap().changes);
        }
        assert_eq!(changes.len(), count, "{changes:?}");
        changes
    }

    /// How the stream ends.
    async fn end(&mut self) -> Status {
        loop {
            if let Err(status) = self.message().await {
                return status;
            }
        }
    }
}

pub fn from_token(token: &str) -> pb::WatchUsersRequest {
    pb::WatchUsersRequest { resume_token: token.into(), ..Default::default() }
}

pub fn initial_state() -> pb::WatchUsersRequest {
    pb::WatchUsersRequest { send_initial_state: true, ..Default::default() }
}

/// What a change says, in short.
fn in_short(change: &pb::UserChange) -> (ChangeKind, &str, i64) {
    (change.kind(), &change.id, change.revision)
}

/// All users, by id.
pub async fn table(client: &mut UserServiceClient<Channel>) -> HashMap<String, pb::User> {
    let filter = pb::UserFilter { include_deleted: true, ..Default::default() };
    let mut request = pb::ListUsersRequest { page_size: 1000, filter: Some(filter), ..Default::default() };
    let mut users = HashMap::new();
    loop {
        let page = client.list_users(request.clone()).await.unwrap().into_inner();
        users.extend(page.users.into_iter().map(|user| (user.id.clone(), user)));
        if page.next_page_token.is_empty() {
            return users;
        }
        request.page_token = page.next_page_token;
    }
}

/// Creates users as the service would, each transaction some of them.
pub async fn insert(database: &Database, prefix: &str, transactions: u32, users_each: u32) {
    let client = database.connect().await;
    for transaction in 0..transactions {
        let sql = format!(
            "with created as (
                insert into users (id, username, username_key, username_held, email, email_key, display_name,
                    revision, create_time, update_time)
                select gen_random_uuid(), name, name, true, name || '@example.com', name || '@example.com', '',
                    1, now(), now()
                from generate_series(1, {users_each}) as n, concat('{prefix}', {transaction}, 'x', n) as name
                returning id
            )
            insert into user_changes (user_id, revision, kind) select id, 1, 1 from created"
        );
        client.batch_execute(&sql).await.unwrap();
    }
}

#[tokio::test]
async fn a_slow_transaction_keeps_nobody_waiting_and_is_not_lost() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let slow_id = created(&mut client, "slow").await.id;
    let mut watch = Watch::from_now(&mut client).await;
    // It draws its numbers first, and commits last.
    let slow = database.connect().await;
    let change = format!(
        "begin;
        update users set revision = 2, display_name = 'slow' where id = '{slow_id}';
        insert into user_changes (user_id, revision, kind) values ('{slow_id}', 2, 2)"
    );
    slow.batch_execute(&change).await.unwrap();
    let mut tokens = vec![watch.token.clone()];
    for name in ["quick", "quicker"] {
        let quick = created(&mut client, name).await;
        let changes = watch.changes(1).await;
        assert_eq!(in_short(&changes[0]), (ChangeKind::Created, quick.id.as_str(), 1));
        tokens.push(watch.token.clone());
    }
    slow.batch_execute("commit").await.unwrap();
    let changes = watch.changes(1).await;
    assert_eq!(in_short(&changes[0]), (ChangeKind::Updated, slow_id.as_str(), 2));
    assert_eq!(changes[0].user.as_ref().unwrap().display_name, "slow");
    // Nor is it lost for those who begin at a token from in between.
    for (token, missed) in tokens.iter().zip([3, 2, 1]) {
        let mut resumed = Watch::resumed(&mut client, token).await.unwrap();
        assert!(resumed.changes(missed).await.iter().any(|change| change.id == slow_id));
    }
    let mut resumed = Watch::resumed(&mut client, &watch.token).await.unwrap();
    assert!(resumed.message().await.unwrap().bookmark);
}

#[tokio::test]
async fn every_way_of_changing_a_user_appears_once_and_nothing_that_did_not_happen() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("PURGE_INTERVAL_MS", "10")]).await;
    let mut client = server.client().await;
    let mut watch = Watch::from_now(&mut client).await;

    // Nothing of this happens.
    let rehearsal = pb::CreateUserRequest { validate_only: true, ..create(user("rehearsed")) };
    client.create_user(rehearsal).await.unwrap();
    client.create_user(create(pb::User { email: "nonsense".into(), ..user("refused") })).await.unwrap_err();

    let alice = created(&mut client, "alice").await;
    client.create_user(create(user("alice"))).await.unwrap_err();
    client.update_user(rename(&alice.id, "New")).await.unwrap();
    client.update_user(rename(&alice.id, "New")).await.unwrap();
    let mut username = rename(&alice.id, "Newer");
    username.user.as_mut().unwrap().username = format!("{SECRET}alicia");
    let request = pb::UpdateUserRequest { request_id: new_request_id(), ..username };
    client.update_user(request.clone()).await.unwrap();
    client.update_user(request).await.unwrap();
    client.delete_user(delete(&alice.id)).await.unwrap();
    let undelete = pb::UndeleteUserRequest { id: alice.id.clone(), ..Default::default() };
    client.undelete_user(undelete).await.unwrap();
    client.expunge_user(expunge(&alice.id)).await.unwrap();

    let bob = pb::User { id: new_request_id(), ..user("bob") };
    let upsert = pb::UpdateUserRequest {
        user: Some(bob.clone()),
        allow_missing: true,
        request_id: new_request_id(),
        ..Default::default()
    };
    client.update_user(upsert).await.unwrap();
    client.delete_user(delete(&bob.id)).await.unwrap();
    database.connect().await.batch_execute("update users set purge_time = now()").await.unwrap();
    // As soon as it is purged, its id may be used again.
    let again = create(pb::User { id: bob.id.clone(), ..user("bob") });
    eventually("bob is purged", async || client.create_user(again.clone()).await.ok()).await;

    let (a, b) = (alice.id.as_str(), bob.id.as_str());
    let expected = [
        (ChangeKind::Created, a, 1),
        (ChangeKind::Updated, a, 2),
        (ChangeKind::Updated, a, 3),
        (ChangeKind::Deleted, a, 4),
        (ChangeKind::Undeleted, a, 5),
        (ChangeKind::Expunged, a, 6),
        (ChangeKind::Created, b, 1),
        (ChangeKind::Deleted, b, 2),
        (ChangeKind::Purged, b, 3),
        (ChangeKind::Created, b, 1),
    ];
    let changes = watch.changes(expected.len()).await;
    assert_eq!(changes.iter().map(in_short).collect::<Vec<_>>(), expected);

    // Many at once, which share statements, and half of them refused.
    let writers = join_all((0..200).map(|n| {
        let mut client = client.clone();
        async move { client.create_user(create(user(&format!("user{}", n % 100)))).await }
    }));
    let acknowledged = writers.await.into_iter().flatten().map(|answer| answer.into_inner().user.unwrap());
    let acknowledged: HashSet<String> = acknowledged.map(|user| user.id).collect();
    assert_eq!(acknowledged.len(), 100);
    let changes = watch.changes(100).await;
    assert_eq!(changes.into_iter().map(|change| change.id).collect::<HashSet<_>>(), acknowledged);
}

#[tokio::test]
async fn an_initial_state_and_the_changes_after_it_are_the_table_wherever_they_are_interrupted() {
    let by_username = pb::UserFilter { username_prefix: "user".into(), ..Default::default() };
    for (filter, is_meant) in [
        (None, (|_| true) as fn(&pb::User) -> bool),
        (Some(pb::UserFilter::default()), |user| user.delete_time.is_none()),
        (Some(by_username), |user| user.delete_time.is_none() && user.username.starts_with("user")),
    ] {
        interrupted_everywhere(filter, is_meant).await;
    }
}

async fn interrupted_everywhere(filter: Option<pb::UserFilter>, is_meant: impl Fn(&pb::User) -> bool) {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let beginning = pb::WatchUsersRequest { filter: filter.clone(), ..initial_state() };
    let empty = Watch::open(&mut client, beginning.clone()).await.unwrap().message().await.unwrap();
    assert!(empty.initial_state_end && empty.changes.is_empty());

    insert(&database, "user", 13, 100).await;
    for name in ["deleted", "released"] {
        let id = created(&mut client, name).await.id;
        let release_username = name == "released";
        client.delete_user(pb::DeleteUserRequest { release_username, ..delete(&id) }).await.unwrap();
    }
    let victims: Vec<String> = table(&mut client).await.into_keys().take(200).collect();
    let mut mirror = Mirror::default();
    let mut interruptions = 0;
    while !mirror.is_complete {
        // A stream for each message.
        let request = match mirror.resume_token.as_str() {
            "" => beginning.clone(),
            token => pb::WatchUsersRequest { filter: filter.clone(), ..from_token(token) },
        };
        let message = Watch::open(&mut client, request).await.unwrap().message().await.unwrap();
        assert!(message.changes.iter().all(|change| change.kind() == ChangeKind::Existing));
        mirror.apply(message);
        client.update_user(rename(&victims[interruptions], "Renamed")).await.ok();
        client.expunge_user(expunge(&victims[interruptions + 100])).await.unwrap();
        created(&mut client, &format!("late{interruptions}")).await;
        interruptions += 1;
    }
    assert!(interruptions > 2);
    let mut table = table(&mut client).await;
    table.retain(|_, user| is_meant(user));
    let request = pb::WatchUsersRequest { filter, ..from_token(&mirror.resume_token) };
    let mut watch = Watch::open(&mut client, request).await.unwrap();
    while mirror.users != table {
        mirror.apply(watch.message().await.unwrap());
    }
}

#[tokio::test]
async fn the_token_of_a_list_continues_exactly_where_the_list_began() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let before = created(&mut client, "before").await;
    let list = client.list_users(pb::ListUsersRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.users, [before]);
    let after = created(&mut client, "after").await;
    let mut watch = Watch::resumed(&mut client, &list.watch_token).await.unwrap();
    let changes = watch.changes(1).await;
    assert_eq!(changes[0].user.as_ref(), Some(&after));
}

#[tokio::test]
async fn changes_that_other_replicas_make_are_delivered_too_and_their_tokens_are_good_everywhere() {
    let (one, database) = server().await;
    let two = Server::start(&database, &[]).await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let (mut watch_one, mut watch_two) =
        (Watch::from_now(&mut at_one).await, Watch::from_now(&mut at_two).await);
    for n in 0..20 {
        let writer = if n % 2 == 0 { &mut at_one } else { &mut at_two };
        let id = created(writer, &format!("user{n}")).await.id;
        assert_eq!(watch_one.changes(1).await[0].id, id);
        assert_eq!(watch_two.changes(1).await[0].id, id);
        (watch_one, watch_two) = (
            Watch::resumed(&mut at_one, &watch_two.token).await.unwrap(),
            Watch::resumed(&mut at_two, &watch_one.token).await.unwrap(),
        );
        assert!(watch_one.message().await.unwrap().bookmark && watch_two.message().await.unwrap().bookmark);
    }
}

#[tokio::test]
async fn a_token_that_cannot_be_resumed_is_refused_with_what_to_do() {
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
    // What only malice makes: sealed, but not a point.
    for text in [
        "",
        "1 2 3|4 5||x",
        "1 2 3|4 5|9|",
        "1 2 3|18446744073709551615 5||",
        "1 2 3|1 9223372036854775807||",
    ] {
        bad.push(encode_token(b"watch", text.as_bytes()));
    }
    for token in bad {
        let refused = Watch::resumed(&mut client, &token).await.map(drop);
        let status = assert_refused(refused, Code::InvalidArgument, "RESUME_TOKEN_INVALID");
        assert_eq!(violations(&status), [("resume_token".into(), "RESUME_TOKEN_INVALID".into())]);
        assert!(status.message().contains("send_initial_state"));
    }
    let both = pb::WatchUsersRequest { send_initial_state: true, ..from_token(&token) };
    let status = assert_refused(
        Watch::open(&mut client, both).await.map(drop),
        Code::InvalidArgument,
        "FIELD_INVALID",
    );
    assert_eq!(violations(&status)[0].0, "send_initial_state");

    let foreign = async |client: &mut UserServiceClient<Channel>, token: &str| {
        let refused = Watch::resumed(client, token).await.map(drop);
        let status = assert_refused(refused, Code::FailedPrecondition, "RESUME_TOKEN_FOREIGN");
        assert!(status.message().contains("send_initial_state"));
    };
    // Of another database of this cluster; of another timeline; from the future.
    foreign(&mut other, &token).await;
    let text = String::from_utf8(decode_token(b"watch", &token).unwrap()).unwrap();
    foreign(&mut client, &encode_token(b"watch", text.replacen(" 00000001|", " 00000002|", 1).as_bytes()))
        .await;
    let (history, rest) = text.split_once('|').unwrap();
    let future = format!("{history}|9999999 {}", rest.split_once(' ').unwrap().1);
    foreign(&mut client, &encode_token(b"watch", future.as_bytes())).await;
    // The database is one that was restored from before the token: it has no such change,
    // or another transaction has got the number of the one that had it.
    let admin = database.connect().await;
    admin.batch_execute("update user_changes set time = time + interval '1 hour'").await.unwrap();
    foreign(&mut client, &token).await;
    admin.batch_execute("delete from user_changes").await.unwrap();
    foreign(&mut client, &token).await;
}

#[tokio::test]
async fn old_changes_are_purged_and_who_has_missed_one_is_told() {
    let database = Database::migrated().await;
    let settings = [("CHANGE_RETENTION_HOURS", "1"), ("PURGE_INTERVAL_MS", "10")];
    let server = Server::start(&database, &settings).await;
    let mut client = server.client().await;
    let before = Watch::from_now(&mut client).await.token;
    // Nobody purges while somebody else does.
    let admin = database.connect().await;
    admin.batch_execute("select pg_advisory_lock(hashtext('user-service purge'))").await.unwrap();
    insert(&database, "old", 3, 400).await;
    let age = "update user_changes set time = now() - interval '61 minutes'";
    admin.batch_execute(age).await.unwrap();
    let after = Watch::from_now(&mut client).await.token;
    admin.batch_execute("select pg_advisory_unlock_all()").await.unwrap();
    let left = async || database.count("select count(*) from user_changes").await;
    eventually("the old ones are purged", async || (left().await == 0).then_some(())).await;

    let refused = Watch::resumed(&mut client, &before).await.map(drop);
    let status = assert_refused(refused, Code::OutOfRange, "RESUME_TOKEN_EXPIRED");
    assert!(status.message().contains("send_initial_state"));
    // Whoever has seen them all can go on.
    let mut resumed = Watch::resumed(&mut client, &after).await.unwrap();
    assert!(resumed.message().await.unwrap().bookmark);
    let id = created(&mut client, "new").await.id;
    assert_eq!(resumed.changes(1).await[0].id, id);

    // A transaction that is under way could still add to what is old already.
    let slow = database.connect().await;
    slow.batch_execute("begin; select pg_current_xact_id()").await.unwrap();
    insert(&database, "older", 1, 10).await;
    admin.batch_execute(age).await.unwrap();
    for _ in 0..2 {
        // Request ids are purged just before changes are.
        admin
            .batch_execute(
                "insert into requests values (gen_random_uuid(), '', false, gen_random_uuid(), now())",
            )
            .await
            .unwrap();
        let requests = "select count(*) from requests";
        eventually("another turn", async || (database.count(requests).await == 0).then_some(())).await;
    }
    assert!(left().await >= 10);
    slow.batch_execute("rollback").await.unwrap();
    eventually("the rest is purged", async || (left().await == 0).then_some(())).await;
}

#[tokio::test]
async fn the_log_of_a_dump_that_was_restored_hides_nothing() {
    let database = Database::migrated().await;
    let admin = database.connect().await;
    // It has the transaction ids of another cluster.
    admin.batch_execute(FOREIGN_LOG).await.unwrap();
    let server = Server::start(&database, &[]).await;
    let mut client = server.client().await;
    let mut watch = Watch::from_now(&mut client).await;
    let id = created(&mut client, "alice").await.id;
    assert_eq!(watch.changes(1).await[0].id, id);
    assert_eq!(database.count("select count(*) from user_changes").await, 1);

    // It is restored once more, under the running service.
    admin.batch_execute(FOREIGN_LOG).await.unwrap();
    let status = watch.end().await;
    assert!([Code::Unavailable, Code::FailedPrecondition].contains(&status.code()), "{status:?}");
    let from_now = async || Watch::open(&mut client.clone(), from_token("")).await.ok();
    let mut anew = eventually("the log is this database's own again", from_now).await;
    let token = std::mem::take(&mut watch.token);
    assert_refused(
        Watch::resumed(&mut client, &token).await.map(drop),
        Code::FailedPrecondition,
        "RESUME_TOKEN_FOREIGN",
    );
    assert!(anew.message().await.unwrap().bookmark);
    let id = created(&mut client, "bob").await.id;
    assert_eq!(anew.changes(1).await[0].id, id);
}

/// The log has another cluster's transaction ids from now on.
const FOREIGN_LOG: &str =
    "update user_feed set origin = 'another', purged_xid = '9000000', purged_time = now();
    insert into user_changes (xid, user_id, revision, kind) values ('9999999', gen_random_uuid(), 1, 1)";

#[tokio::test]
async fn a_restored_database_is_another_history_also_if_nothing_was_ever_written_in_it() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let mut tokens = Vec::new();
    for _ in 0..2 {
        tokens.push(Watch::from_now(&mut client).await.token);
        database.connect().await.batch_execute(FOREIGN_LOG).await.unwrap();
        change_log::adopt(&database.config()).await.unwrap();
        for token in &tokens {
            let refused = Watch::resumed(&mut client, token).await.map(drop);
            assert_refused(refused, Code::FailedPrecondition, "RESUME_TOKEN_FOREIGN");
        }
    }
}

#[tokio::test]
async fn a_database_that_is_still_being_restored_is_left_alone() {
    let database = Database::migrated().await;
    let admin = database.connect().await;
    admin.batch_execute(FOREIGN_LOG).await.unwrap();
    let log = "select count(*) from user_changes";
    for (table, key) in [("users", "id"), ("user_changes", "xid, seq")] {
        // A restore makes keys when all rows are there.
        admin.batch_execute(&format!("alter table {table} drop constraint {table}_pkey")).await.unwrap();
        change_log::adopt(&database.config()).await.unwrap();
        assert_eq!(database.count(log).await, 1);
        let add = format!("alter table {table} add constraint {table}_pkey primary key ({key})");
        admin.batch_execute(&add).await.unwrap();
    }
    change_log::adopt(&database.config()).await.unwrap();
    assert_eq!(database.count(log).await, 0);
}

/// One without windows so large that all of it fits into them.
async fn narrow_client(server: &Server) -> UserServiceClient<Channel> {
    let channel = Channel::from_shared(format!("http://{}", server.addr)).unwrap();
    let channel = channel.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
    UserServiceClient::new(channel.connect().await.unwrap())
}

#[tokio::test]
async fn who_does_not_read_is_in_nobodys_way_and_catches_up() {
    // More rounds than are kept.
    const ROUNDS: usize = 80;
    const USERS_EACH: usize = 130;
    const USERS: usize = ROUNDS * USERS_EACH;
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "2")]).await;
    let mut client = server.client().await;
    let addr = format!("http://{}", server.addr);
    let mut stalled = Watch::from_now(&mut narrow_client(&server).await).await;
    // On connections of their own, so that only the server can keep them apart.
    let others = (0..100).map(|_| {
        let addr = addr.clone();
        async move {
            let channel = Channel::from_shared(addr).unwrap().connect().await.unwrap();
            Watch::from_now(&mut UserServiceClient::new(channel)).await
        }
    });
    let read_all = |mut watch: Watch| tokio::spawn(async move { watch.changes(USERS).await.len() });
    let others: Vec<_> = join_all(others).await.into_iter().map(read_all).collect();
    let mut pacemaker = Watch::from_now(&mut client).await;
    for round in 0..ROUNDS {
        insert(&database, &format!("{round}user"), 1, USERS_EACH as u32).await;
        pacemaker.changes(USERS_EACH).await;
    }
    // Meanwhile, calls find connections.
    for n in 0..10 {
        client.check_username(pb::CheckUsernameRequest { username: format!("name{n}") }).await.unwrap();
    }
    for other in join_all(others).await {
        assert_eq!(other.unwrap(), USERS);
    }
    let (mut ids, mut has_missed_rounds) = (HashSet::new(), false);
    while ids.len() < USERS {
        let users = stalled.message().await.unwrap().changes.into_iter().filter_map(|change| change.user);
        let (of_message, rounds): (Vec<_>, HashSet<_>) =
            users.map(|user| (user.id, user.username.split_once('u').unwrap().0.to_owned())).unzip();
        ids.extend(of_message);
        has_missed_rounds |= rounds.len() > 1;
    }
    // What a round had is never in one message with what another had, unless both were
    // read from the log.
    assert!(has_missed_rounds);
    created(&mut client, "last").await;
    assert_eq!(stalled.changes(1).await.len(), 1);
    let connections = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'user-service'";
    // The pool, the health, and the feed; one that has broken may take a moment to go.
    let are_four = async || (database.count(connections).await == 4).then_some(());
    eventually("no watcher has a connection", are_four).await;
}

#[tokio::test]
async fn those_who_stall_while_they_catch_up_are_in_nobodys_way_and_take_little_memory() {
    const USERS: usize = 6_000;
    // Many more than those who may be fast.
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
    // What each has missed takes more than a MiB, and large batches of that 80 MiB.
    let growth = server.memory().saturating_sub(before);
    assert!(growth < 48 << 20, "{growth}");
    let mut ids = HashSet::new();
    let mut watch = Watch::resumed(&mut client, &token).await.unwrap();
    ids.extend(watch.changes(USERS).await.into_iter().filter_map(|change| change.user).map(|user| user.id));
    assert_eq!(ids.len(), USERS);
    // Fast ones and others.
    for (mut watch, seen) in stalled.into_iter().take(12) {
        watch.changes(USERS - seen).await;
    }
}

#[tokio::test]
async fn users_come_with_their_changes_wherever_their_ids_lie() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    // Random ids: each has many between itself and the next one that is created later.
    insert(&database, "old", 1, 5_000).await;
    let token = Watch::from_now(&mut client).await.token;
    insert(&database, "new", 7, 3).await;
    let mut names = HashSet::new();
    for name in ["anna", "bob"] {
        let user = created(&mut client, name).await;
        client.update_user(rename(&user.id, "Somebody")).await.unwrap();
        names.insert(user.username);
    }
    let old = table(&mut client).await.into_values().find(|user| user.username.starts_with("old")).unwrap();
    client.update_user(rename(&old.id, "Somebody")).await.unwrap();
    names.insert(old.username);
    let changes = Watch::resumed(&mut client, &token).await.unwrap().changes(21 + 4 + 1).await;
    let users = changes.into_iter().filter_map(|change| {
        assert!(!change.removed);
        change.user.inspect(|user| assert_eq!(user.id, change.id))
    });
    let (new, others): (HashSet<_>, HashSet<_>) =
        users.map(|user| user.username).partition(|name| name.starts_with("new"));
    assert_eq!((new.len(), others), (21, names));
}

#[tokio::test]
async fn a_large_transaction_comes_in_parts_and_only_the_last_of_them_leads_behind_it() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let mut watch = Watch::from_now(&mut client).await;
    let token = watch.token.clone();
    insert(&database, "user", 1, 20_000).await;
    let mut resumed = Watch::resumed(&mut client, &token).await.unwrap();
    for watch in [&mut watch, &mut resumed] {
        let mut ids = HashSet::new();
        while ids.len() < 20_000 {
            assert!(watch.token == token || ids.is_empty());
            let changes = watch.message().await.unwrap().changes;
            assert!(changes.len() <= 32, "{}", changes.len());
            ids.extend(changes.into_iter().map(|change| change.id));
        }
        let mut behind = Watch::resumed(&mut client, &watch.token).await.unwrap();
        assert!(behind.message().await.unwrap().bookmark);
    }
}

#[tokio::test]
async fn every_message_leads_behind_the_last_transaction_that_is_complete() {
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
async fn of_a_user_that_changed_often_only_the_last_change_has_the_user() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let token = Watch::from_now(&mut client).await.token;
    let id = created(&mut client, "alice").await.id;
    for n in 0..5 {
        client.update_user(rename(&id, &format!("Name {n}"))).await.unwrap();
    }
    let changes = Watch::resumed(&mut client, &token).await.unwrap().changes(6).await;
    let (last, others) = changes.split_last().unwrap();
    assert_eq!(last.user.as_ref().unwrap().display_name, "Name 4");
    assert!(others.iter().all(|change| change.user.is_none()));
}

#[tokio::test]
async fn a_user_that_was_erased_and_made_again_is_there_in_whatever_order_the_transactions_began() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    let mut watch = Watch::open(&mut client, initial_state()).await.unwrap();
    let mut mirror = Mirror::default();
    while !mirror.is_complete {
        mirror.apply(watch.message().await.unwrap());
    }
    // The transaction that makes it again has the lower number, and so comes first.
    let again = database.connect().await;
    again.batch_execute("begin; select pg_current_xact_id()").await.unwrap();
    client.expunge_user(expunge(&id)).await.unwrap();
    let create = format!(
        "insert into users (id, username, username_key, username_held, email, email_key, display_name,
            revision, create_time, update_time) values ('{id}', 'again', 'again', true, '', '', '', 1, now(), now());
        insert into user_changes (user_id, revision, kind) values ('{id}', 1, 1);
        commit"
    );
    again.batch_execute(&create).await.unwrap();
    let mut resumed = Watch::resumed(&mut client, &mirror.resume_token).await.unwrap();
    let message = resumed.message().await.unwrap();
    let kinds: Vec<_> = message.changes.iter().map(in_short).collect();
    assert_eq!(kinds, [(ChangeKind::Created, id.as_str(), 1), (ChangeKind::Expunged, id.as_str(), 2)]);
    mirror.apply(message);
    assert_eq!(mirror.users, table(&mut client).await);
    assert_eq!(mirror.users.len(), 1);
}

#[tokio::test]
async fn when_the_readers_connection_breaks_the_watches_stay_and_miss_nothing() {
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
async fn a_crash_that_gives_transaction_ids_out_again_hides_no_change() {
    let dir = tempfile::TempDir::with_prefix("pg-").unwrap();
    let mut postgres = Embedded::start(dir.path()).await.unwrap();
    let database = Database { socket_dir: dir.path().into(), name: "postgres".into() };
    let server = Server::start(&database, &[]).await;
    let mut client = server.client().await;
    created(&mut client, "alice").await;
    let xid = "select pg_current_xact_id()::text::bigint";
    let mut attempts = 0..10;
    let token = loop {
        assert!(attempts.next().is_some(), "PostgreSQL does not give ids out again any more");
        // Transactions that come to nothing. PostgreSQL writes nothing of them down, unless
        // it happens to note at this moment how far the ids have come.
        let admin = database.connect().await;
        let mut lost: i64 = 0;
        for _ in 0..20 {
            lost = admin.query_one(xid, &[]).await.unwrap().get(0);
        }
        let from_now = async || Watch::open(&mut client.clone(), from_token("")).await.ok();
        let mut watch = eventually("somebody watches", from_now).await;
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
    // This, too, can meet a connection that was cut.
    let resume = async || Watch::resumed(&mut client.clone(), &token).await.ok();
    let mut watch = eventually("the watch goes on", resume).await;
    assert_eq!(watch.changes(1).await[0].user, bob.into_inner().user);
    drop(server);
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn a_quiet_feed_says_so_now_and_then() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let mut watch = Watch::from_now(&mut client).await;
    let bookmark = watch.message().await.unwrap();
    assert!(bookmark.bookmark && bookmark.changes.is_empty() && !bookmark.resume_token.is_empty());
    created(&mut client, "alice").await;
    assert_eq!(watch.changes(1).await.len(), 1);
    assert!(watch.message().await.unwrap().bookmark);
}

#[tokio::test]
async fn whoever_is_ahead_of_rounds_that_are_late_hears_that_the_feed_lives_and_nothing_again() {
    // One of the transactions to so many watchers takes longer than the feed may be silent.
    const TRANSACTIONS: usize = 8;
    const USERS_EACH: usize = 500;
    const WATCHERS: usize = 400;
    let (server, database) = server().await;
    let mut client = server.client().await;
    let token = Watch::from_now(&mut client).await.token;
    // On another connection, since they do not read.
    let mut others = server.client().await;
    let mut watches = Vec::new();
    for _ in 0..WATCHERS {
        watches.push(Watch::from_now(&mut others).await);
    }
    let slow = database.connect().await;
    let slow_id = new_request_id();
    let change = format!("insert into user_changes (user_id, revision, kind) values ('{slow_id}', 1, 6)");
    slow.batch_execute(&format!("begin; {change}")).await.unwrap();
    insert(&database, &"x".repeat(1_000), TRANSACTIONS as u32, USERS_EACH as u32).await;
    let mut ahead = Watch::resumed(&mut client, &token).await.unwrap();
    ahead.changes(TRANSACTIONS * USERS_EACH).await;
    let sign = ahead.message().await.unwrap();
    // No bookmark: there could be changes that the rounds do not have yet.
    assert!(sign.changes.is_empty() && !sign.bookmark);
    // The next round has it, and much that is not new here.
    slow.batch_execute("commit").await.unwrap();
    assert_eq!(ahead.changes(1).await[0].id, slow_id);
    let id = created(&mut client, "alice").await.id;
    let mut resumed = Watch::resumed(&mut client, &ahead.token).await.unwrap();
    assert_eq!(resumed.changes(1).await[0].id, id);
}

#[tokio::test]
async fn a_server_that_stops_ends_its_watches_with_a_token_that_others_take() {
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
        assert_refused::<()>(Err(status), Code::Unavailable, "SHUTTING_DOWN");
        let mut resumed = Watch::resumed(&mut two.client().await, &watch.token).await.unwrap();
        assert_eq!(resumed.changes(1).await[0].id, id);
    }
}

#[tokio::test]
async fn more_watches_than_are_allowed_are_refused_with_the_limit() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_WATCHERS", "2")]).await;
    let mut client = server.client().await;
    let one = Watch::from_now(&mut client).await;
    let _two = Watch::from_now(&mut client).await;
    let refused = Watch::open(&mut client, initial_state()).await.map(drop);
    let status = assert_refused(refused, Code::Unavailable, "OVERLOADED");
    assert!(status.message().contains('2') && status.get_error_details().retry_info().is_some());
    drop(one);
    let again = async || Watch::open(&mut client.clone(), initial_state()).await.ok().map(drop);
    eventually("there is a place again", again).await;
}

//! A watch delivers every committed change and no other.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use futures_util::future::join_all;
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_types::StatusExt;
use user_service::pb::{
    self, ChangeKind,
    user_change::{Removed, State, Superseded},
    user_service_client::UserServiceClient,
};

use crate::mirror::Mirror;
use crate::support::*;

/// An open watch and the token of the last message read.
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

    /// Opens a watch that has every change made from now on.
    pub async fn from_now(client: &mut UserServiceClient<Channel>) -> Self {
        let mut watch = Self::open(client, pb::WatchUsersRequest::default()).await.unwrap();
        let first = watch.message().await.unwrap();
        assert!(first.bookmark && first.changes.is_empty());
        watch
    }

    pub async fn resumed(client: &mut UserServiceClient<Channel>, token: &str) -> Result<Self, Status> {
        Self::open(client, from_token(token)).await
    }

    pub async fn message(&mut self) -> Result<pb::WatchUsersResponse, Status> {
        let message = tokio::time::timeout(Duration::from_secs(60), self.messages.message()).await.unwrap();
        let message = message?.expect("a stream ends with a status");
        self.token.clone_from(&message.resume_token);
        Ok(message)
    }

    /// The next `count` changes.
    pub async fn changes(&mut self, count: usize) -> Vec<pb::UserChange> {
        let mut changes = Vec::new();
        while changes.len() < count {
            changes.extend(self.message().await.unwrap().changes);
        }
        assert_eq!(changes.len(), count, "{changes:?}");
        changes
    }

    /// The status that ends the stream.
    pub async fn end(&mut self) -> Status {
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

/// The kind, the user's id and the revision of a change.
fn summary(change: &pb::UserChange) -> (ChangeKind, &str, i64) {
    (change.kind(), &change.id, change.revision)
}

/// The user of a change that has one.
pub fn user_of(change: &pb::UserChange) -> Option<&pb::User> {
    match &change.state {
        Some(State::User(user)) => Some(user),
        _ => None,
    }
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

/// Creates users as the service does, `users_each` in each transaction.
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
async fn slow_transaction_does_not_delay_the_feed_and_is_delivered_after_its_commit() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let slow_id = created(&mut client, "slow").await.id;
    let mut watch = Watch::from_now(&mut client).await;
    // It gets its transaction id first and commits last.
    let slow = database.connect().await;
    let change = format!(
        "begin;
        update users set revision = 2, display_name = 'slow' where id = '{slow_id}';
        insert into user_changes (user_id, revision, kind) values ('{slow_id}', 2, 2)"
    );
    slow.batch_execute(&change).await.unwrap();
    let mut tokens = vec![watch.token.clone()];
    for name in ["first", "second"] {
        let user = created(&mut client, name).await;
        let changes = watch.changes(1).await;
        assert_eq!(summary(&changes[0]), (ChangeKind::Created, user.id.as_str(), 1));
        tokens.push(watch.token.clone());
    }
    slow.batch_execute("commit").await.unwrap();
    let changes = watch.changes(1).await;
    assert_eq!(summary(&changes[0]), (ChangeKind::Updated, slow_id.as_str(), 2));
    assert_eq!(user_of(&changes[0]).unwrap().display_name, "slow");
    // Watches that resume from an earlier token get it too.
    for (token, missed) in tokens.iter().zip([3, 2, 1]) {
        let mut resumed = Watch::resumed(&mut client, token).await.unwrap();
        assert!(resumed.changes(missed).await.iter().any(|change| change.id == slow_id));
    }
    let mut resumed = Watch::resumed(&mut client, &watch.token).await.unwrap();
    assert!(resumed.message().await.unwrap().bookmark);
}

#[tokio::test]
async fn every_committed_change_appears_once_and_no_other_appears() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("PURGE_INTERVAL_MS", "10")]).await;
    let mut client = server.client().await;
    let mut watch = Watch::from_now(&mut client).await;

    // Neither of these is a change.
    let dry_run = pb::CreateUserRequest { validate_only: true, ..create(user("dryrun")) };
    client.create_user(dry_run).await.unwrap();
    client.create_user(create(pb::User { email: "nonsense".into(), ..user("invalid") })).await.unwrap_err();

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
    // The id is free as soon as the user is purged.
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
    assert_eq!(changes.iter().map(summary).collect::<Vec<_>>(), expected);

    // Concurrent requests that share statements; half of them are rejected.
    let writers = join_all((0..200).map(|n| {
        let mut client = client.clone();
        async move { client.create_user(create(user(&format!("user{}", n % 100)))).await }
    }));
    let acknowledged =
        writers.await.into_iter().flatten().map(|response| response.into_inner().user.unwrap());
    let acknowledged: HashSet<String> = acknowledged.map(|user| user.id).collect();
    assert_eq!(acknowledged.len(), 100);
    let changes = watch.changes(100).await;
    assert_eq!(changes.into_iter().map(|change| change.id).collect::<HashSet<_>>(), acknowledged);
}

#[tokio::test]
async fn initial_state_and_later_changes_equal_the_table_wherever_the_stream_is_interrupted() {
    let by_username = pb::UserFilter { username_prefix: "user".into(), ..Default::default() };
    for (filter, matches) in [
        (None, (|_| true) as fn(&pb::User) -> bool),
        (Some(pb::UserFilter::default()), |user| user.delete_time.is_none()),
        (Some(by_username), |user| user.delete_time.is_none() && user.username.starts_with("user")),
    ] {
        assert_initial_state_can_be_interrupted(filter, matches).await;
    }
}

async fn assert_initial_state_can_be_interrupted(
    filter: Option<pb::UserFilter>,
    matches: impl Fn(&pb::User) -> bool,
) {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let first_request = pb::WatchUsersRequest { filter: filter.clone(), ..initial_state() };
    let empty = Watch::open(&mut client, first_request.clone()).await.unwrap().message().await.unwrap();
    assert!(empty.initial_state_end && empty.changes.is_empty());

    insert(&database, "user", 13, 100).await;
    for name in ["deleted", "released"] {
        let id = created(&mut client, name).await.id;
        let release_username = name == "released";
        client.delete_user(pb::DeleteUserRequest { release_username, ..delete(&id) }).await.unwrap();
    }
    let changed: Vec<String> = table(&mut client).await.into_keys().take(200).collect();
    let mut mirror = Mirror::default();
    let mut interruptions = 0;
    while !mirror.is_complete {
        // One stream per message.
        let request = match mirror.resume_token.as_str() {
            "" => first_request.clone(),
            token => pb::WatchUsersRequest { filter: filter.clone(), ..from_token(token) },
        };
        let message = Watch::open(&mut client, request).await.unwrap().message().await.unwrap();
        assert!(message.changes.iter().all(|change| change.kind() == ChangeKind::Existing));
        mirror.apply(message);
        client.update_user(rename(&changed[interruptions], "Renamed")).await.ok();
        client.expunge_user(expunge(&changed[interruptions + 100])).await.unwrap();
        created(&mut client, &format!("late{interruptions}")).await;
        interruptions += 1;
    }
    assert!(interruptions > 2);
    let mut table = table(&mut client).await;
    table.retain(|_, user| matches(user));
    let request = pb::WatchUsersRequest { filter, ..from_token(&mirror.resume_token) };
    let mut watch = Watch::open(&mut client, request).await.unwrap();
    while mirror.users != table {
        mirror.apply(watch.message().await.unwrap());
    }
}

#[tokio::test]
async fn changes_of_other_replicas_are_delivered_and_tokens_work_on_every_replica() {
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
async fn changes_have_their_users_wherever_the_ids_are_in_the_index() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    // Random ids: existing users lie between any two new ones.
    insert(&database, "old", 1, 5_000).await;
    let token = Watch::from_now(&mut client).await.token;
    insert(&database, "new", 7, 3).await;
    let mut names = HashSet::new();
    for name in ["anna", "bob"] {
        let user = created(&mut client, name).await;
        client.update_user(rename(&user.id, "Renamed")).await.unwrap();
        names.insert(user.username);
    }
    let old = table(&mut client).await.into_values().find(|user| user.username.starts_with("old")).unwrap();
    client.update_user(rename(&old.id, "Renamed")).await.unwrap();
    names.insert(old.username);
    let changes = Watch::resumed(&mut client, &token).await.unwrap().changes(21 + 4 + 1).await;
    let users = changes.iter().filter_map(|change| {
        assert_ne!(change.state, Some(State::Removed(Removed {})));
        user_of(change).inspect(|user| assert_eq!(user.id, change.id))
    });
    let (new, others): (HashSet<_>, HashSet<_>) =
        users.map(|user| user.username.clone()).partition(|name| name.starts_with("new"));
    assert_eq!((new.len(), others), (21, names));
}

#[tokio::test]
async fn only_the_last_change_of_a_user_has_the_user_and_earlier_ones_are_superseded() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let token = Watch::from_now(&mut client).await.token;
    let id = created(&mut client, "alice").await.id;
    for n in 0..5 {
        client.update_user(rename(&id, &format!("Name {n}"))).await.unwrap();
    }
    let changes = Watch::resumed(&mut client, &token).await.unwrap().changes(6).await;
    let (last, others) = changes.split_last().unwrap();
    assert_eq!(user_of(last).unwrap().display_name, "Name 4");
    assert!(others.iter().all(|change| change.state == Some(State::Superseded(Superseded {}))));
}

#[tokio::test]
async fn erasure_is_removed_even_if_the_id_is_created_again() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("PURGE_INTERVAL_MS", "10")]).await;
    let mut client = server.client().await;
    let token = Watch::from_now(&mut client).await.token;
    let id = created(&mut client, "alice").await.id;
    client.expunge_user(expunge(&id)).await.unwrap();
    let again = create(pb::User { id: id.clone(), ..user("again") });
    client.create_user(again.clone()).await.unwrap();
    client.delete_user(delete(&id)).await.unwrap();
    database.connect().await.batch_execute("update users set purge_time = now()").await.unwrap();
    let last = eventually("the user is purged", async || client.create_user(again.clone()).await.ok()).await;
    let changes = Watch::resumed(&mut client, &token).await.unwrap().changes(6).await;
    let superseded = || Some(State::Superseded(Superseded {}));
    let removed = || Some(State::Removed(Removed {}));
    let expected = [
        (ChangeKind::Created, superseded()),
        (ChangeKind::Expunged, removed()),
        (ChangeKind::Created, superseded()),
        (ChangeKind::Deleted, superseded()),
        (ChangeKind::Purged, removed()),
        (ChangeKind::Created, last.into_inner().user.map(State::User)),
    ];
    let states = changes.into_iter().map(|change| (change.kind(), change.state));
    assert_eq!(states.collect::<Vec<_>>(), expected);

    // The last change of an erased user is its erasure.
    client.expunge_user(expunge(&id)).await.unwrap();
    let changes = Watch::resumed(&mut client, &token).await.unwrap().changes(7).await;
    assert_eq!(changes[6].state, removed());
}

#[tokio::test]
async fn user_erased_and_created_again_is_delivered_in_any_transaction_order() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    let mut watch = Watch::open(&mut client, initial_state()).await.unwrap();
    let mut mirror = Mirror::default();
    while !mirror.is_complete {
        mirror.apply(watch.message().await.unwrap());
    }
    // The transaction that creates the user again has the lower id and is delivered first.
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
    let kinds: Vec<_> = message.changes.iter().map(summary).collect();
    assert_eq!(kinds, [(ChangeKind::Created, id.as_str(), 1), (ChangeKind::Expunged, id.as_str(), 2)]);
    // `removed` would delete the new user.
    assert!(user_of(&message.changes[1]).is_some());
    mirror.apply(message);
    assert_eq!(mirror.users, table(&mut client).await);
    assert_eq!(mirror.users.len(), 1);
}

#[tokio::test]
async fn idle_feed_sends_bookmarks() {
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
async fn watch_beyond_the_limit_is_rejected_with_the_limit() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_WATCHERS", "2")]).await;
    let mut client = server.client().await;
    let one = Watch::from_now(&mut client).await;
    let _two = Watch::from_now(&mut client).await;
    let rejected = Watch::open(&mut client, initial_state()).await.map(drop);
    let status = assert_rejected(rejected, Code::Unavailable, "OVERLOADED");
    assert!(status.message().contains('2') && status.get_error_details().retry_info().is_some());
    drop(one);
    let again = async || Watch::open(&mut client.clone(), initial_state()).await.ok().map(drop);
    eventually("a new watch is accepted", again).await;
}

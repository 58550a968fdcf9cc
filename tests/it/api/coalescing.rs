//! Coalesced requests get the same responses as single requests.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use futures_util::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;
use user_service::pb::{self, user_service_client::UserServiceClient};
use user_service::store::{lookup, users};

use crate::support::*;

type Client = UserServiceClient<Channel>;

async fn coalescing_server() -> (Server, Database) {
    let database = Database::migrated().await;
    (Server::start(&database, &[("REQUEST_COALESCING", "on")]).await, database)
}

/// Counts the statements that ran for several requests.
fn coalesced_batches(server: &Server) -> usize {
    let is_batch = |line: &str| {
        let Ok(line) = serde_json::from_str::<serde_json::Value>(line) else { return false };
        let sql = line["sql"].as_str().unwrap_or_default();
        let is_coalesced = [users::STATEMENTS, lookup::STATEMENTS].concat().contains(&sql);
        is_coalesced && line["rows"].as_u64() > Some(1)
    };
    server.log().lines().filter(|line| is_batch(line)).count()
}

async fn users(client: &Client, count: usize) -> Vec<pb::User> {
    let creates = (0..count).map(|n| {
        let mut client = client.clone();
        async move { created(&mut client, &format!("user{n}")).await }
    });
    join_all(creates).await
}

#[tokio::test]
async fn concurrent_requests_share_statements_and_get_their_own_responses() {
    let (server, _) = coalescing_server().await;
    let client = server.client().await;
    let users = users(&client, 200).await;
    let creates = coalesced_batches(&server);
    assert!((1..100).contains(&creates), "{creates}");
    let gets = users.iter().enumerate().map(|(n, user)| {
        let mut client = client.clone();
        let key = match n % 3 {
            0 => by_id(&user.id),
            1 => by_username(&user.username.to_uppercase()),
            _ => by_id(&new_request_id()),
        };
        async move { client.get_user(key).await.map(|response| response.into_inner().user.unwrap()) }
    });
    for (n, response) in join_all(gets).await.into_iter().enumerate() {
        match n % 3 {
            2 => drop(assert_rejected(response, Code::NotFound, "USER_NOT_FOUND")),
            _ => assert_eq!(response.unwrap(), users[n]),
        }
    }
    let gets = coalesced_batches(&server) - creates;
    assert!((1..100).contains(&gets), "{gets}");
}

#[tokio::test]
async fn sequential_requests_are_not_coalesced() {
    let (server, _) = coalescing_server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    client.get_user(by_id(&user.id)).await.unwrap();
    client.update_user(rename(&user.id, "New")).await.unwrap();
    client.delete_user(delete(&user.id)).await.unwrap();
    assert_eq!(coalesced_batches(&server), 0);
}

#[tokio::test]
async fn conflicts_retries_and_reused_ids_in_a_coalesced_batch_are_distinguished() {
    let (server, database) = coalescing_server().await;
    let client = server.client().await;
    let taken = users(&client, 1).await.remove(0);
    let (retried, reused) = (new_request_id(), new_request_id());
    let calls = (0..300).map(|n: usize| {
        let mut client = client.clone();
        let request = match n % 6 {
            // One of these succeeds.
            0 => create(user("same")),
            1 => create(user("user0")),
            2 => create(pb::User { id: taken.id.clone(), ..user(&format!("id{n}")) }),
            3 => pb::CreateUserRequest { request_id: retried.clone(), ..create(user("retried")) },
            4 => pb::CreateUserRequest { request_id: reused.clone(), ..create(user(&format!("reused{n}"))) },
            _ => create(user(&format!("good{n}"))),
        };
        async move { client.create_user(request).await.map(|response| response.into_inner().user.unwrap()) }
    });
    let mut responses: [Vec<Result<pb::User, Status>>; 6] = Default::default();
    for (n, response) in join_all(calls).await.into_iter().enumerate() {
        responses[n % 6].push(response);
    }
    let [same, user0, id, retry, reuse, good] = responses;
    let one_succeeds = |responses: Vec<Result<pb::User, Status>>, code, reason| {
        let (created, rejected): (Vec<_>, Vec<_>) = responses.into_iter().partition(Result::is_ok);
        assert_eq!(created.len(), 1);
        for response in rejected {
            assert_rejected(response, code, reason);
        }
    };
    one_succeeds(same, Code::AlreadyExists, "USERNAME_TAKEN");
    one_succeeds(reuse, Code::InvalidArgument, "REQUEST_ID_REUSED");
    for response in user0 {
        assert_rejected(response, Code::AlreadyExists, "USERNAME_TAKEN");
    }
    for response in id {
        assert_rejected(response, Code::AlreadyExists, "USER_ID_TAKEN");
    }
    let retry: Vec<_> = retry.into_iter().map(Result::unwrap).collect();
    assert!(retry.iter().all(|user| *user == retry[0]));
    assert!(good.iter().all(Result::is_ok));
    assert!(coalesced_batches(&server) > 0);
    // user0, same, retried, one of the reused and all good users, each with one change; two have
    // a record of their request id.
    assert_eq!(database.count("select count(*) from users").await, 4 + 50);
    assert_eq!(database.count("select count(*) from user_changes").await, 4 + 50);
    assert_eq!(database.count("select count(*) from requests").await, 2);
}

#[tokio::test]
async fn locked_row_does_not_delay_requests_for_other_rows() {
    let (server, database) = coalescing_server().await;
    let client = server.client().await;
    let users = users(&client, 100).await;
    let holder = database.connect().await;
    let lock =
        "begin; select from users where username_key in ('zqzquser0', 'zqzquser1', 'zqzquser2') for update";
    holder.batch_execute(lock).await.unwrap();
    let update = |user: &pb::User| {
        let (mut client, request) = (client.clone(), rename(&user.id, "New"));
        tokio::spawn(async move { client.update_user(request).await })
    };
    // The first requests, more than there are slots.
    let locked: Vec<_> = users[..3].iter().map(update).collect();
    for call in join_all(users[3..].iter().map(update)).await {
        assert_eq!(call.unwrap().unwrap().into_inner().user.unwrap().revision, 2);
    }
    assert!(locked.iter().all(|call| !call.is_finished()));
    holder.batch_execute("rollback").await.unwrap();
    for call in locked {
        assert_eq!(call.await.unwrap().unwrap().into_inner().user.unwrap().revision, 2);
    }
}

#[tokio::test]
async fn cancelled_requests_do_not_fail_their_coalesced_batch() {
    let (server, _) = coalescing_server().await;
    let client = server.client().await;
    let users = users(&client, 100).await;
    for attempt in 0..10 {
        let calls: Vec<_> = users
            .iter()
            .map(|user| {
                let (mut client, request) = (client.clone(), rename(&user.id, &format!("attempt {attempt}")));
                tokio::spawn(async move { client.update_user(request).await })
            })
            .collect();
        tokio::task::yield_now().await;
        for (n, call) in calls.into_iter().enumerate() {
            if n % 3 == attempt % 3 {
                call.abort();
            } else {
                call.await.unwrap().unwrap();
            }
        }
    }
    let again = users.iter().map(|user| {
        let (mut client, id) = (client.clone(), user.id.clone());
        async move { client.update_user(rename(&id, "last")).await }
    });
    assert!(join_all(again).await.iter().all(Result::is_ok));
}

#[tokio::test]
async fn retries_resolve_the_outcomes_of_a_coalesced_batch_whose_connection_broke() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[("REQUEST_COALESCING", "on")]).await;
    let client = server.client().await;
    let requests: Vec<_> = (0..100)
        .map(|n| pb::CreateUserRequest { request_id: new_request_id(), ..create(user(&format!("user{n}"))) })
        .collect();
    let call = |request: &pb::CreateUserRequest| {
        let (mut client, request) = (client.clone(), request.clone());
        tokio::spawn(async move { client.create_user(request).await })
    };
    proxy.hold_responses();
    let calls: Vec<_> = requests.iter().map(call).collect();
    let count = "select count(*) from users";
    // The first two requests each take a slot and release it after a while; the rest forms batches.
    eventually("a coalesced batch is committed", async || (database.count(count).await > 2).then_some(()))
        .await;
    proxy.cut();
    let mut unknown = 0;
    for call in calls {
        if let Err(status) = call.await.unwrap() {
            unknown += usize::from(reason(&status) == "OUTCOME_UNKNOWN");
            assert_eq!(status.code(), Code::Unavailable);
            assert!(status.get_error_details().retry_info().is_some());
        }
    }
    assert!(unknown > 2, "{unknown}");
    // A retry can use another connection that was cut; then it is repeated.
    for request in &requests {
        eventually("the retry succeeds", async || call(request).await.unwrap().ok()).await;
    }
    assert_eq!(database.count(count).await, 100);
    assert_eq!(database.count("select count(*) from user_changes").await, 100);
}

/// The states of one user that the responses have shown, by revision.
#[derive(Default)]
struct History {
    states: HashMap<i64, pb::User>,
}

impl History {
    /// Adds a state. Two responses with the same revision must have the same user.
    fn add(&mut self, user: &pb::User) {
        let known = self.states.entry(user.revision).or_insert_with(|| user.clone());
        assert_eq!(known, user);
    }
}

/// Runs thousands of concurrent random requests on few users. The revisions of a user are the
/// serial order: each change must follow from the state before it, each error from some state of
/// the user, and no response may be older than one received before its request was sent.
#[tokio::test]
async fn responses_to_thousands_of_random_requests_fit_a_serial_order() {
    const USERS: usize = 12;
    const CALLERS: u64 = 64;
    const CALLS: usize = 40;
    let seed = rand::random::<u64>();
    #[expect(clippy::print_stdout, reason = "a failure is repeated with its seed")]
    {
        println!("seed {seed}");
    }
    let (server, database) = coalescing_server().await;
    let client = server.client().await;
    let users = Arc::new(users(&client, USERS).await);
    let histories: Arc<Vec<Mutex<History>>> = Arc::new((0..USERS).map(|_| Mutex::default()).collect());
    for (user, history) in users.iter().zip(histories.iter()) {
        history.lock().unwrap().add(user);
    }
    let callers = (0..CALLERS).map(|caller| {
        let (mut client, users, histories) = (client.clone(), Arc::clone(&users), Arc::clone(&histories));
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(caller));
        tokio::spawn(async move {
            let mut responses = Vec::new();
            for n in 0..CALLS {
                let of = rng.random_range(0..USERS);
                let user = &users[of];
                let latest = *histories[of].lock().unwrap().states.keys().max().unwrap();
                let revision = if rng.random_bool(0.3) { latest } else { 0 };
                let call = RandomRequest::random(&mut rng, &format!("{caller}/{n}"), revision);
                let response = call.send(&mut client, user).await;
                if let Ok(user) = &response {
                    assert!(user.revision >= latest, "{call:?} returned an old state: {user:?} < {latest}");
                    histories[of].lock().unwrap().add(user);
                }
                responses.push((of, call, response));
            }
            responses
        })
    });
    let responses: Vec<_> = join_all(callers).await.into_iter().flat_map(Result::unwrap).collect();
    for (of, call, response) in &responses {
        let states = &histories[*of].lock().unwrap().states;
        call.check(response, states);
    }
    for (of, history) in histories.iter().enumerate() {
        // Each change belongs to one successful response.
        let changes = responses
            .iter()
            .filter(|(n, call, response)| *n == of && call.is_change() && response.is_ok())
            .count();
        let last = client.clone().get_user(by_id(&users[of].id)).await.unwrap().into_inner().user.unwrap();
        assert_eq!(usize::try_from(last.revision).unwrap(), 1 + changes);
        assert_eq!(history.lock().unwrap().states.get(&last.revision), Some(&last));
    }
    let total: i64 = histories.iter().map(|h| *h.lock().unwrap().states.keys().max().unwrap()).sum();
    assert_eq!(database.count("select count(distinct (user_id, revision)) from user_changes").await, total);
    assert!(coalesced_batches(&server) > 20);
}

/// A random request for one user.
#[derive(Debug)]
enum RandomRequest {
    Get,
    Rename { name: String, revision: i64 },
    ChangeEmail { email: String, revision: i64 },
    Delete { revision: i64 },
    Undelete,
}

impl RandomRequest {
    fn random(rng: &mut StdRng, text: &str, revision: i64) -> Self {
        match rng.random_range(0..20) {
            0..6 => Self::Get,
            6..13 => Self::Rename { name: text.into(), revision },
            13..16 => Self::ChangeEmail {
                email: format!("{SECRET}{}@example.com", text.replace('/', "-")),
                revision,
            },
            16..18 => Self::Delete { revision },
            _ => Self::Undelete,
        }
    }

    fn is_change(&self) -> bool {
        !matches!(self, Self::Get)
    }

    async fn send(&self, client: &mut Client, user: &pb::User) -> Result<pb::User, Status> {
        let update = |user: pb::User| pb::UpdateUserRequest { user: Some(user), ..Default::default() };
        let id = user.id.clone();
        let user = match self {
            Self::Get => client.get_user(by_id(&id)).await?.into_inner().user,
            Self::Rename { name, revision } => {
                let user =
                    pb::User { id, display_name: name.clone(), revision: *revision, ..Default::default() };
                let request = pb::UpdateUserRequest { request_id: new_request_id(), ..update(user) };
                client.update_user(request).await?.into_inner().user
            }
            Self::ChangeEmail { email, revision } => {
                let user = pb::User { id, email: email.clone(), revision: *revision, ..Default::default() };
                client.update_user(update(user)).await?.into_inner().user
            }
            Self::Delete { revision } => {
                let request = pb::DeleteUserRequest { revision: *revision, ..delete(&id) };
                client.delete_user(request).await?.into_inner().user
            }
            Self::Undelete => {
                let request = pb::UndeleteUserRequest { id, ..Default::default() };
                client.undelete_user(request).await?.into_inner().user
            }
        };
        Ok(user.unwrap())
    }

    /// Asserts that the response follows from the states of the user.
    fn check(&self, response: &Result<pb::User, Status>, states: &HashMap<i64, pb::User>) {
        let is_deleted = |user: &pb::User| user.delete_time.is_some();
        let after = match response {
            Ok(user) => user,
            Err(status) => {
                let expected = match self {
                    Self::Get => unreachable!("{status:?}"),
                    Self::Undelete => 0,
                    Self::Rename { revision, .. }
                    | Self::ChangeEmail { revision, .. }
                    | Self::Delete { revision } => *revision,
                };
                match reason(status).as_str() {
                    "USER_NOT_DELETED" => assert!(matches!(self, Self::Undelete)),
                    "USER_DELETED" => assert!(states.values().any(is_deleted)),
                    "REVISION_MISMATCH" => {
                        let details = status.get_error_details();
                        let current =
                            details.error_info().unwrap().metadata["current_revision"].parse().unwrap();
                        assert!(expected != 0 && current != expected && !is_deleted(&states[&current]));
                    }
                    _ => panic!("{self:?}: {status:?}"),
                }
                return;
            }
        };
        if !self.is_change() {
            return;
        }
        // Every state was in some response, so the one before is known.
        let before = &states[&(after.revision - 1)];
        let mut expected =
            pb::User { revision: before.revision + 1, update_time: after.update_time, ..before.clone() };
        let at = match self {
            Self::Get => unreachable!(),
            Self::Rename { name, revision } => {
                assert!(!is_deleted(before));
                expected.display_name.clone_from(name);
                *revision
            }
            Self::ChangeEmail { email, revision } => {
                assert!(!is_deleted(before));
                expected.email.clone_from(email);
                *revision
            }
            Self::Delete { revision } => {
                assert!(!is_deleted(before) && is_deleted(after));
                (expected.delete_time, expected.purge_time) = (after.delete_time, after.purge_time);
                *revision
            }
            Self::Undelete => {
                assert!(is_deleted(before));
                (expected.delete_time, expected.purge_time) = (None, None);
                0
            }
        };
        assert!(at == 0 || at == before.revision, "{self:?} on {before:?}");
        assert_eq!(*after, expected);
    }
}

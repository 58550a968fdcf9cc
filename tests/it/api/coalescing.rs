//! Calls that share a statement get the answers that they would get alone.

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

async fn grouping_server() -> (Server, Database) {
    let database = Database::migrated().await;
    (Server::start(&database, &[("REQUEST_COALESCING", "on")]).await, database)
}

/// How many statements were run for several requests.
fn batches(server: &Server) -> usize {
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
async fn calls_at_once_share_statements_and_get_their_own_answers() {
    let (server, _) = grouping_server().await;
    let client = server.client().await;
    let users = users(&client, 200).await;
    let creates = batches(&server);
    assert!((1..100).contains(&creates), "{creates}");
    let gets = users.iter().enumerate().map(|(n, user)| {
        let mut client = client.clone();
        let key = match n % 3 {
            0 => by_id(&user.id),
            1 => by_username(&user.username.to_uppercase()),
            _ => by_id(&new_request_id()),
        };
        async move { client.get_user(key).await.map(|answer| answer.into_inner().user.unwrap()) }
    });
    for (n, answer) in join_all(gets).await.into_iter().enumerate() {
        match n % 3 {
            2 => drop(assert_refused(answer, Code::NotFound, "USER_NOT_FOUND")),
            _ => assert_eq!(answer.unwrap(), users[n]),
        }
    }
    let gets = batches(&server) - creates;
    assert!((1..100).contains(&gets), "{gets}");
}

#[tokio::test]
async fn a_lone_call_runs_alone() {
    let (server, _) = grouping_server().await;
    let mut client = server.client().await;
    let user = created(&mut client, "alice").await;
    client.get_user(by_id(&user.id)).await.unwrap();
    client.update_user(rename(&user.id, "New")).await.unwrap();
    client.delete_user(delete(&user.id)).await.unwrap();
    assert_eq!(batches(&server), 0);
}

#[tokio::test]
async fn conflicts_retries_and_reuse_in_one_group_are_told_apart() {
    let (server, database) = grouping_server().await;
    let client = server.client().await;
    let taken = users(&client, 1).await.remove(0);
    let (retried, reused) = (new_request_id(), new_request_id());
    let calls = (0..300).map(|n: usize| {
        let mut client = client.clone();
        let request = match n % 6 {
            // One of these is first.
            0 => create(user("same")),
            1 => create(user("user0")),
            2 => create(pb::User { id: taken.id.clone(), ..user(&format!("id{n}")) }),
            3 => pb::CreateUserRequest { request_id: retried.clone(), ..create(user("retried")) },
            4 => pb::CreateUserRequest { request_id: reused.clone(), ..create(user(&format!("reused{n}"))) },
            _ => create(user(&format!("good{n}"))),
        };
        async move { client.create_user(request).await.map(|answer| answer.into_inner().user.unwrap()) }
    });
    let mut answers: [Vec<Result<pb::User, Status>>; 6] = Default::default();
    for (n, answer) in join_all(calls).await.into_iter().enumerate() {
        answers[n % 6].push(answer);
    }
    let [same, user0, id, retry, reuse, good] = answers;
    let one_succeeds = |answers: Vec<Result<pb::User, Status>>, code, reason| {
        let (created, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
        assert_eq!(created.len(), 1);
        for answer in refused {
            assert_refused(answer, code, reason);
        }
    };
    one_succeeds(same, Code::AlreadyExists, "USERNAME_TAKEN");
    one_succeeds(reuse, Code::InvalidArgument, "REQUEST_ID_REUSED");
    for answer in user0 {
        assert_refused(answer, Code::AlreadyExists, "USERNAME_TAKEN");
    }
    for answer in id {
        assert_refused(answer, Code::AlreadyExists, "USER_ID_TAKEN");
    }
    let retry: Vec<_> = retry.into_iter().map(Result::unwrap).collect();
    assert!(retry.iter().all(|user| *user == retry[0]));
    assert!(good.iter().all(Result::is_ok));
    assert!(batches(&server) > 0);
    // user0, same, retried, one reused, the good; each with its change, and a request where there was one.
    assert_eq!(database.count("select count(*) from users").await, 4 + 50);
    assert_eq!(database.count("select count(*) from user_changes").await, 4 + 50);
    assert_eq!(database.count("select count(*) from requests").await, 2);
}

#[tokio::test]
async fn a_row_that_somebody_has_locked_delays_nobody_else() {
    let (server, database) = grouping_server().await;
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
    // More of them than there are lanes, and first.
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
async fn callers_that_give_up_take_nobody_with_them() {
    let (server, _) = grouping_server().await;
    let client = server.client().await;
    let users = users(&client, 100).await;
    for round in 0..10 {
        let calls: Vec<_> = users
            .iter()
            .map(|user| {
                let (mut client, request) = (client.clone(), rename(&user.id, &format!("round {round}")));
                tokio::spawn(async move { client.update_user(request).await })
            })
            .collect();
        tokio::task::yield_now().await;
        for (n, call) in calls.into_iter().enumerate() {
            if n % 3 == round % 3 {
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
async fn a_group_whose_connection_breaks_leaves_each_outcome_open_and_the_retries_settle_it() {
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
    proxy.hold_answers();
    let calls: Vec<_> = requests.iter().map(call).collect();
    let count = "select count(*) from users";
    // Two run alone, each in a lane, and then lose it; the others form groups.
    eventually("a group is committed", async || (database.count(count).await > 2).then_some(())).await;
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
    // A retry may meet another of the connections that were cut, and is made again.
    for request in &requests {
        eventually("the retry goes through", async || call(request).await.unwrap().ok()).await;
    }
    assert_eq!(database.count(count).await, 100);
    assert_eq!(database.count("select count(*) from user_changes").await, 100);
}

/// What is known of one user: each state that an answer has shown, by revision.
#[derive(Default)]
struct History {
    states: HashMap<i64, pb::User>,
}

impl History {
    /// Two answers that show the same revision show the same user.
    fn note(&mut self, user: &pb::User) {
        let known = self.states.entry(user.revision).or_insert_with(|| user.clone());
        assert_eq!(known, user);
    }
}

/// Thousands of random calls on few users, at once. Revisions number the changes
/// of a user, so they are the serial order that has to explain every answer: each
/// change follows from the state before it, each refusal from some state that the
/// user had, and no answer is older than one that came before the call was made.
#[tokio::test]
async fn some_serial_order_explains_the_answers_to_thousands_of_random_calls() {
    const USERS: usize = 12;
    const CALLERS: u64 = 64;
    const CALLS: usize = 40;
    let seed = rand::random::<u64>();
    #[expect(clippy::print_stdout, reason = "to run it again when it fails")]
    {
        println!("seed {seed}");
    }
    let (server, database) = grouping_server().await;
    let client = server.client().await;
    let users = Arc::new(users(&client, USERS).await);
    let histories: Arc<Vec<Mutex<History>>> = Arc::new((0..USERS).map(|_| Mutex::default()).collect());
    for (user, history) in users.iter().zip(histories.iter()) {
        history.lock().unwrap().note(user);
    }
    let callers = (0..CALLERS).map(|caller| {
        let (mut client, users, histories) = (client.clone(), Arc::clone(&users), Arc::clone(&histories));
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(caller));
        tokio::spawn(async move {
            let mut made = Vec::new();
            for n in 0..CALLS {
                let of = rng.random_range(0..USERS);
                let user = &users[of];
                let latest = *histories[of].lock().unwrap().states.keys().max().unwrap();
                let revision = if rng.random_bool(0.3) { latest } else { 0 };
                let call = Call::random(&mut rng, &format!("{caller}/{n}"), revision);
                let answer = call.make(&mut client, user).await;
                if let Ok(user) = &answer {
                    assert!(user.revision >= latest, "{call:?} answered with the past: {user:?} < {latest}");
                    histories[of].lock().unwrap().note(user);
                }
                made.push((of, call, answer));
            }
            made
        })
    });
    let made: Vec<_> = join_all(callers).await.into_iter().flat_map(Result::unwrap).collect();
    for (of, call, answer) in &made {
        let states = &histories[*of].lock().unwrap().states;
        call.explain(answer, states);
    }
    for (of, history) in histories.iter().enumerate() {
        // Every change was made by one call, and told to it.
        let changes =
            made.iter().filter(|(n, call, answer)| *n == of && call.is_change() && answer.is_ok()).count();
        let last = client.clone().get_user(by_id(&users[of].id)).await.unwrap().into_inner().user.unwrap();
        assert_eq!(usize::try_from(last.revision).unwrap(), 1 + changes);
        assert_eq!(history.lock().unwrap().states.get(&last.revision), Some(&last));
    }
    let total: i64 = histories.iter().map(|h| *h.lock().unwrap().states.keys().max().unwrap()).sum();
    assert_eq!(database.count("select count(distinct (user_id, revision)) from user_changes").await, total);
    assert!(batches(&server) > 20);
}

/// A call on a user.
#[derive(Debug)]
enum Call {
    Get,
    Rename { name: String, revision: i64 },
    Mail { email: String, revision: i64 },
    Delete { revision: i64 },
    Undelete,
}

impl Call {
    fn random(rng: &mut StdRng, text: &str, revision: i64) -> Self {
        match rng.random_range(0..20) {
            0..6 => Self::Get,
            6..13 => Self::Rename { name: text.into(), revision },
            13..16 => {
                Self::Mail { email: format!("{SECRET}{}@example.com", text.replace('/', "-")), revision }
            }
            16..18 => Self::Delete { revision },
            _ => Self::Undelete,
        }
    }

    fn is_change(&self) -> bool {
        !matches!(self, Self::Get)
    }

    async fn make(&self, client: &mut Client, user: &pb::User) -> Result<pb::User, Status> {
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
            Self::Mail { email, revision } => {
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

    /// The answer follows from the states of the user.
    fn explain(&self, answer: &Result<pb::User, Status>, states: &HashMap<i64, pb::User>) {
        let is_deleted = |user: &pb::User| user.delete_time.is_some();
        let after = match answer {
            Ok(user) => user,
            Err(status) => {
                let expected = match self {
                    Self::Get => unreachable!("{status:?}"),
                    Self::Undelete => 0,
                    Self::Rename { revision, .. }
                    | Self::Mail { revision, .. }
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
        // Every state was told to somebody, so the one before is known.
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
            Self::Mail { email, revision } => {
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

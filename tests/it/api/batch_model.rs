//! A batch is answered as a call on each of its users would have been.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tonic::{Status, transport::Channel};
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::api::batch::{batch_created, batch_update, renamed};
use crate::support::*;

type Client = UserServiceClient<Channel>;

#[derive(Clone)]
enum Call {
    Create(pb::User),
    Update(pb::User),
    Delete(String, i64),
}

/// Calls of one kind, on users of their own, most of which can be done.
fn random_calls(rng: &mut StdRng, users: &[pb::User], round: usize) -> Vec<Call> {
    let first = rng.random_range(0..users.len());
    let mut calls = Vec::new();
    for n in 0..rng.random_range(1..8) {
        let known = &users[(first + n) % users.len()];
        let is_bad = rng.random_bool(0.1);
        let id = if is_bad && rng.random_bool(0.3) { new_request_id() } else { known.id.clone() };
        let revision = match rng.random_range(0..10) {
            0 => known.revision + i64::from(is_bad),
            _ => 0,
        };
        let fresh = user(&format!("round{round}n{n}"));
        let username = match rng.random_range(0..10) {
            // Somebody else's, and nobody else asks for it.
            0..5 if is_bad && n == 0 => users[(first + 20) % users.len()].username.to_uppercase(),
            0 => fresh.username.clone(),
            _ => String::new(),
        };
        let email = if rng.random_bool(0.5) { fresh.email.clone() } else { known.email.clone() };
        calls.push(match round % 3 {
            0 if !is_bad => Call::Create(pb::User { id: new_request_id(), ..fresh }),
            0 if n % 2 == 0 => Call::Create(pb::User { id, ..fresh }),
            0 => Call::Create(known.clone()),
            1 => Call::Update(pb::User { username, email, revision, ..renamed(&id, "Same") }),
            _ => Call::Delete(id, revision),
        });
    }
    calls
}

/// Asks what would happen.
async fn try_alone(client: &mut Client, call: &Call) -> Result<pb::User, Status> {
    let user = match call.clone() {
        Call::Create(user) => {
            let request = pb::CreateUserRequest { validate_only: true, ..create(user) };
            client.create_user(request).await?.into_inner().user
        }
        Call::Update(user) => {
            let user = Some(user);
            let request = pb::UpdateUserRequest { user, validate_only: true, ..Default::default() };
            client.update_user(request).await?.into_inner().user
        }
        Call::Delete(id, revision) => {
            let request = pb::DeleteUserRequest { revision, validate_only: true, ..delete(&id) };
            client.delete_user(request).await?.into_inner().user
        }
    };
    Ok(user.unwrap())
}

async fn make_together(client: &mut Client, calls: &[Call]) -> Result<Vec<pb::User>, Status> {
    let (mut creates, mut updates, mut deletes) = (Vec::new(), Vec::new(), Vec::new());
    for call in calls.iter().cloned() {
        match call {
            Call::Create(user) => creates.push(user),
            Call::Update(user) => updates.push(user),
            Call::Delete(id, revision) => {
                deletes.push(pb::BatchDeleteUsersItem { id, revision, ..Default::default() })
            }
        }
    }
    if !creates.is_empty() {
        return Ok(client.batch_create_users(batch_create(creates)).await?.into_inner().users);
    }
    if !updates.is_empty() {
        return Ok(client.batch_update_users(batch_update(updates)).await?.into_inner().users);
    }
    let request = pb::BatchDeleteUsersRequest { items: deletes, ..Default::default() };
    Ok(client.batch_delete_users(request).await?.into_inner().users)
}

/// The items that a batch was refused for, each with its first reason: a call on one
/// user has no other.
fn refusals(status: &Status) -> HashMap<usize, String> {
    let mut refusals = HashMap::new();
    for (field, reason) in violations(status) {
        let index = field.split(['[', ']']).nth(1).unwrap().parse().unwrap();
        refusals.entry(index).or_insert(reason);
    }
    refusals
}

/// The user, but for the moment at which it was changed.
fn without_times(user: &pb::User) -> pb::User {
    let now = |time: Option<prost_types::Timestamp>| time.map(|_| prost_types::Timestamp::default());
    pb::User {
        create_time: None,
        update_time: None,
        delete_time: now(user.delete_time),
        purge_time: now(user.purge_time),
        ..user.clone()
    }
}

#[tokio::test]
async fn a_batch_is_answered_as_a_call_on_each_user_would_have_been() {
    let seed = rand::random::<u64>();
    #[expect(clippy::print_stdout, reason = "to run it again when it fails")]
    {
        println!("seed {seed}");
    }
    let mut rng = StdRng::seed_from_u64(seed);
    let (server, _) = server().await;
    let mut client = server.client().await;
    let mut users = batch_created(&mut client, (0..60).map(|n| format!("user{n}"))).await;
    let (mut refused, mut done) = (0, 0);
    for round in 0..120 {
        let calls = random_calls(&mut rng, &users, round);
        let mut alone = Vec::new();
        for call in &calls {
            alone.push(try_alone(&mut client, call).await);
        }
        let together = make_together(&mut client, &calls).await;
        let expected: HashMap<usize, String> = alone
            .iter()
            .enumerate()
            .filter_map(|(n, answer)| Some((n, reason(answer.as_ref().err()?))))
            .collect();
        let Ok(answers) = together else {
            assert_eq!(refusals(&together.unwrap_err()), expected, "round {round}");
            refused += 1;
            continue;
        };
        assert_eq!(expected, HashMap::new(), "round {round}");
        done += 1;
        for (answer, alone) in answers.into_iter().zip(alone) {
            assert_eq!(without_times(&answer), without_times(&alone.unwrap()), "round {round}");
            let now = client.get_user(by_id(&answer.id)).await.unwrap().into_inner().user.unwrap();
            assert_eq!(now, answer);
            match users.iter_mut().find(|user| user.id == now.id) {
                Some(user) => *user = now,
                None => users.push(now),
            }
        }
    }
    assert!(refused > 10 && done > 10, "{refused} refused, {done} done");
}

//! Random batches have the same outcome as dry runs of single requests.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tonic::{Status, transport::Channel};
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::api::batch::{batch_created, batch_update, renamed};
use crate::support::*;

type Client = UserServiceClient<Channel>;

/// A change of one user, by a single request or as an item of a batch.
#[derive(Clone)]
enum SingleChange {
    Create(pb::User),
    Update(pb::User),
    Delete(String, i64),
}

/// Changes of one kind, each of another user. Most of them are valid.
fn random_changes(rng: &mut StdRng, users: &[pb::User], batch: usize) -> Vec<SingleChange> {
    let first = rng.random_range(0..users.len());
    let mut changes = Vec::new();
    for n in 0..rng.random_range(1..8) {
        let known = &users[(first + n) % users.len()];
        let is_bad = rng.random_bool(0.1);
        let id = if is_bad && rng.random_bool(0.3) { new_request_id() } else { known.id.clone() };
        let revision = match rng.random_range(0..10) {
            0 => known.revision + i64::from(is_bad),
            _ => 0,
        };
        let new = user(&format!("batch{batch}n{n}"));
        let username = match rng.random_range(0..10) {
            // The username of another user, which no other item requests.
            0..5 if is_bad && n == 0 => users[(first + 20) % users.len()].username.to_uppercase(),
            0 => new.username.clone(),
            _ => String::new(),
        };
        let email = if rng.random_bool(0.5) { new.email.clone() } else { known.email.clone() };
        changes.push(match batch % 3 {
            0 if !is_bad => SingleChange::Create(pb::User { id: new_request_id(), ..new }),
            0 if n % 2 == 0 => SingleChange::Create(pb::User { id, ..new }),
            0 => SingleChange::Create(known.clone()),
            1 => SingleChange::Update(pb::User { username, email, revision, ..renamed(&id, "Same") }),
            _ => SingleChange::Delete(id, revision),
        });
    }
    changes
}

/// Runs one change with `validate_only`.
async fn dry_run(client: &mut Client, change: &SingleChange) -> Result<pb::User, Status> {
    let user = match change.clone() {
        SingleChange::Create(user) => {
            let request = pb::CreateUserRequest { validate_only: true, ..create(user) };
            client.create_user(request).await?.into_inner().user
        }
        SingleChange::Update(user) => {
            let user = Some(user);
            let request = pb::UpdateUserRequest { user, validate_only: true, ..Default::default() };
            client.update_user(request).await?.into_inner().user
        }
        SingleChange::Delete(id, revision) => {
            let request = pb::DeleteUserRequest { revision, validate_only: true, ..delete(&id) };
            client.delete_user(request).await?.into_inner().user
        }
    };
    Ok(user.unwrap())
}

/// Runs the changes as one batch.
async fn run_batch(client: &mut Client, changes: &[SingleChange]) -> Result<Vec<pb::User>, Status> {
    let (mut creates, mut updates, mut deletes) = (Vec::new(), Vec::new(), Vec::new());
    for change in changes.iter().cloned() {
        match change {
            SingleChange::Create(user) => creates.push(user),
            SingleChange::Update(user) => updates.push(user),
            SingleChange::Delete(id, revision) => {
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

/// The rejected items of a batch, each with its first reason, which is the one that a single
/// request returns.
fn rejections(status: &Status) -> HashMap<usize, String> {
    let mut rejections = HashMap::new();
    for (field, reason) in violations(status) {
        let index = field.split(['[', ']']).nth(1).unwrap().parse().unwrap();
        rejections.entry(index).or_insert(reason);
    }
    rejections
}

/// The user without the times that depend on when it was changed.
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
async fn batch_has_the_same_outcome_as_single_requests() {
    let seed = rand::random::<u64>();
    #[expect(clippy::print_stdout, reason = "a failure is repeated with its seed")]
    {
        println!("seed {seed}");
    }
    let mut rng = StdRng::seed_from_u64(seed);
    let (server, _) = server().await;
    let mut client = server.client().await;
    let mut users = batch_created(&mut client, (0..60).map(|n| format!("user{n}"))).await;
    let (mut rejected, mut accepted) = (0, 0);
    for batch in 0..120 {
        let changes = random_changes(&mut rng, &users, batch);
        let mut dry_runs = Vec::new();
        for change in &changes {
            dry_runs.push(dry_run(&mut client, change).await);
        }
        let result = run_batch(&mut client, &changes).await;
        let expected: HashMap<usize, String> = dry_runs
            .iter()
            .enumerate()
            .filter_map(|(n, response)| Some((n, reason(response.as_ref().err()?))))
            .collect();
        let Ok(changed) = result else {
            assert_eq!(rejections(&result.unwrap_err()), expected, "batch {batch}");
            rejected += 1;
            continue;
        };
        assert_eq!(expected, HashMap::new(), "batch {batch}");
        accepted += 1;
        for (user, dry_run) in changed.into_iter().zip(dry_runs) {
            assert_eq!(without_times(&user), without_times(&dry_run.unwrap()), "batch {batch}");
            let now = client.get_user(by_id(&user.id)).await.unwrap().into_inner().user.unwrap();
            assert_eq!(now, user);
            match users.iter_mut().find(|user| user.id == now.id) {
                Some(user) => *user = now,
                None => users.push(now),
            }
        }
    }
    assert!(rejected > 10 && accepted > 10, "{rejected} rejected, {accepted} accepted");
}

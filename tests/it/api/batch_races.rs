//! Concurrent batches of the same users: they do not deadlock, and each sees the changes of the
//! one before.

use std::sync::Arc;

use futures_util::future::{join, join_all};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use tonic::{Code, Status};
use user_service::pb;
use uuid::Uuid;

use crate::api::batch::{batch_created, batch_delete, batch_update, renamed};
use crate::support::*;

/// Stops the server and returns the number of deadlocks that PostgreSQL has resolved. A session
/// reports them at its end at the latest.
async fn deadlocks(server: Server, database: &Database) -> i64 {
    drop(server);
    let sessions = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'user-service'";
    eventually("the sessions end", async || (database.count(sessions).await == 0).then_some(())).await;
    database.count("select deadlocks from pg_stat_database where datname = current_database()").await
}

#[tokio::test]
async fn batches_in_opposite_order_and_single_requests_do_not_deadlock() {
    const UPDATES: usize = 40;
    let (server, database) = server().await;
    let client = server.client().await;
    let users = batch_created(&mut client.clone(), (0..60).map(|n| format!("user{n}"))).await;
    let ids: Arc<Vec<String>> = Arc::new(users.into_iter().map(|user| user.id).collect());
    let batches = (0..6).map(|caller: usize| {
        let (mut client, ids) = (client.clone(), Arc::clone(&ids));
        let mut rng = StdRng::seed_from_u64(rand::random());
        tokio::spawn(async move {
            let mut ids: Vec<_> = ids.iter().collect();
            for update in 0..UPDATES {
                match caller % 3 {
                    0 => {}
                    1 => ids.reverse(),
                    _ => ids.shuffle(&mut rng),
                }
                let request = batch_update(ids.iter().map(|id| renamed(id, &format!("{caller} {update}"))));
                let request = pb::BatchUpdateUsersRequest { request_id: new_request_id(), ..request };
                let users = client.batch_update_users(request).await.unwrap().into_inner().users;
                assert!(users.iter().zip(&ids).all(|(user, id)| user.id == **id));
                assert!(users.iter().all(|user| user.display_name == format!("{caller} {update}")));
            }
        })
    });
    // Enough concurrent requests to be coalesced.
    let calls = (0..20).map(|caller| {
        let (mut client, ids) = (client.clone(), Arc::clone(&ids));
        let mut rng = StdRng::seed_from_u64(rand::random());
        tokio::spawn(async move {
            for update in 0..UPDATES {
                let id = &ids[rng.random_range(0..ids.len())];
                let request = rename(id, &format!("{caller} {update}, single"));
                let request = pb::UpdateUserRequest { request_id: new_request_id(), ..request };
                client.update_user(request).await.unwrap();
            }
        })
    });
    let tasks: Vec<_> = batches.chain(calls).collect();
    for task in tasks {
        task.await.unwrap();
    }
    let changes = 60 * 6 * UPDATES as i64 + 20 * UPDATES as i64;
    assert_eq!(database.count("select sum(revision - 1)::bigint from users").await, changes);
    assert_eq!(
        database.count("select count(distinct (user_id, revision)) from user_changes").await,
        changes + 60
    );
    assert_eq!(deadlocks(server, &database).await, 0);
}

#[tokio::test]
async fn second_of_two_batches_that_delete_the_same_users_is_rejected_with_all_items() {
    let (server, database) = server().await;
    let client = server.client().await;
    for race in 0..20 {
        let users = batch_created(&mut client.clone(), (0..40).map(|n| format!("user{race}n{n}"))).await;
        let ids: Vec<_> = users.iter().map(|user| user.id.as_str()).collect();
        let delete = |request| {
            let mut client = client.clone();
            tokio::spawn(async move { client.batch_delete_users(request).await })
        };
        let calls =
            [delete(batch_delete(ids.iter().copied())), delete(batch_delete(ids.iter().rev().copied()))];
        let responses = join_all(calls).await.into_iter().map(Result::unwrap);
        let (accepted, rejected): (Vec<_>, Vec<_>) = responses.partition(Result::is_ok);
        assert_eq!(accepted.len(), 1);
        let rejected = rejected.into_iter().next().unwrap();
        let status = assert_rejected(rejected, Code::FailedPrecondition, "USER_DELETED");
        assert_eq!(rejected_elements(&status, "items"), "0-39");
    }
    assert_eq!(database.count("select count(*) from user_changes where kind = 3").await, 20 * 40);
    assert_eq!(deadlocks(server, &database).await, 0);
}

#[tokio::test]
async fn second_of_two_batches_that_create_the_same_users_is_rejected_with_all_items() {
    let (server, database) = server().await;
    let client = server.client().await;
    for race in 0..20 {
        let users: Vec<_> = (0..40).map(|n| user(&format!("user{race}n{n}"))).collect();
        let create = |request| {
            let mut client = client.clone();
            tokio::spawn(async move { client.batch_create_users(request).await })
        };
        let batches = [batch_create(users.clone()), batch_create(users.iter().rev().cloned())];
        // A single request that conflicts with both.
        let single = {
            let (mut client, request) = (client.clone(), create_one(&users[20]));
            tokio::spawn(async move { client.create_user(request).await })
        };
        let responses = join_all(batches.map(create)).await.into_iter().map(Result::unwrap);
        let (accepted, rejected): (Vec<_>, Vec<_>) = responses.partition(Result::is_ok);
        let single = single.await.unwrap();
        assert_eq!(accepted.len() + usize::from(single.is_ok()), 1);
        for rejected in rejected {
            let status = assert_rejected(rejected, Code::AlreadyExists, "USERNAME_TAKEN");
            let named = rejected_elements(&status, "items");
            assert!(named == "0-39" || single.is_ok() && ["20", "19"].contains(&named.as_str()), "{named}");
        }
    }
    assert_eq!(deadlocks(server, &database).await, 0);
}

fn create_one(user: &pb::User) -> pb::CreateUserRequest {
    create(user.clone())
}

#[tokio::test]
async fn second_of_two_batches_that_take_the_same_usernames_is_rejected_with_all_items() {
    let (server, database) = server().await;
    let client = server.client().await;
    let users = batch_created(&mut client.clone(), (0..80).map(|n| format!("user{n}"))).await;
    let (first, second) = users.split_at(40);
    for race in 0..20 {
        let names: Vec<_> = (0..40).map(|n| format!("{SECRET}race{race}n{n}")).collect();
        let rename = |users: &[pb::User], names: Vec<&String>| {
            let named = |(user, name): (&pb::User, &String)| pb::User {
                id: user.id.clone(),
                username: name.clone(),
                ..Default::default()
            };
            let (mut client, request) = (client.clone(), batch_update(users.iter().zip(names).map(named)));
            tokio::spawn(async move { client.batch_update_users(request).await })
        };
        let calls = [rename(first, names.iter().collect()), rename(second, names.iter().rev().collect())];
        let responses = join_all(calls).await.into_iter().map(Result::unwrap);
        let (accepted, rejected): (Vec<_>, Vec<_>) = responses.partition(Result::is_ok);
        assert_eq!(accepted.len(), 1);
        let rejected = rejected.into_iter().next().unwrap();
        let status = assert_rejected(rejected, Code::AlreadyExists, "USERNAME_TAKEN");
        assert_eq!(rejected_elements(&status, "items"), "0-39");
    }
    assert_eq!(deadlocks(server, &database).await, 0);
}

#[tokio::test]
async fn username_taken_after_a_batch_has_checked_it_is_named() {
    let (server, database) = server().await;
    let client = server.client().await;
    let alice = created(&mut client.clone(), "alice").await;
    let free = created(&mut client.clone(), "free").await;
    let holder = database.connect().await;
    let creates = batch_create(["carol", "bob", "dave"].map(user));
    let updates = batch_update([
        renamed(&free.id, "New"),
        pb::User { username: format!("{SECRET}eve"), ..renamed(&alice.id, "New") },
    ]);
    let create = {
        let mut client = client.clone();
        async move { client.batch_create_users(creates).await.map(drop) }
    };
    let update = {
        let mut client = client.clone();
        async move { client.batch_update_users(updates).await.map(drop) }
    };
    let take = |name: &str| {
        format!(
            "begin; insert into users (id, username, username_key, username_held, email, email_key,
                display_name, revision, create_time, update_time)
            values (gen_random_uuid(), 'x', '{SECRET}{name}', true, 'x', 'x', '', 1, now(), now())"
        )
    };
    let race =
        async |sql: String, call: std::pin::Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>| {
            holder.batch_execute(&sql).await.unwrap();
            let call = tokio::spawn(call);
            eventually("the request waits for the username", async || {
                (database.count(WAITING).await == 1).then_some(())
            })
            .await;
            holder.batch_execute("commit").await.unwrap();
            let status = assert_rejected(call.await.unwrap(), Code::AlreadyExists, "USERNAME_TAKEN");
            assert_eq!(violations(&status), [("items[1].user.username".into(), "USERNAME_TAKEN".into())]);
        };
    race(take("bob"), Box::pin(create)).await;
    race(take("eve"), Box::pin(update)).await;
    assert_eq!(database.count("select count(*) from users where username_key like 'zqzq%'").await, 4);
    assert_eq!(database.count("select count(*) from users where revision > 1").await, 0);
    assert_eq!(database.count("select count(*) from user_changes").await, 2);
}

#[tokio::test]
async fn batch_that_waits_for_locks_uses_the_rows_as_they_are_after_the_wait() {
    let (server, database) = server().await;
    let client = server.client().await;
    let users = batch_created(&mut client.clone(), (0..5).map(|n| format!("user{n}"))).await;
    let id = |n: usize| users[n].id.as_str();
    let holder = database.connect().await;
    let changes = format!(
        "begin;
        update users set revision = 2, display_name = 'Old' where id = '{}';
        update users set revision = 2, delete_time = now(), purge_time = now() where id = '{}';
        delete from users where id = '{}';
        update users set revision = 2, display_name = 'Same' where id = '{}'",
        id(0),
        id(1),
        id(2),
        id(3)
    );
    holder.batch_execute(&changes).await.unwrap();
    let at = |n: usize, revision| pb::User { revision, ..renamed(id(n), "Same") };
    let rejected = batch_update([at(0, 1), at(1, 1), at(2, 0), at(4, 0)]);
    // One item requests what its row had before the wait, the other what it has after it.
    let back = pb::User { display_name: users[0].display_name.clone(), ..at(0, 0) };
    let accepted = batch_update([at(3, 0), back]);
    let call = |request| {
        let mut client = client.clone();
        tokio::spawn(async move { client.batch_update_users(request).await })
    };
    let (rejected, accepted) = (call(rejected), call(accepted));
    eventually("both batches wait", async || (database.count(WAITING).await == 2).then_some(())).await;
    holder.batch_execute("commit").await.unwrap();
    let status = assert_rejected(rejected.await.unwrap(), Code::NotFound, "USER_NOT_FOUND");
    let expected = [
        ("items[0].user.revision", "REVISION_MISMATCH"),
        ("items[1].user.id", "USER_DELETED"),
        ("items[2].user.id", "USER_NOT_FOUND"),
    ];
    assert_eq!(violations(&status), expected.map(|(field, reason)| (field.to_owned(), reason.to_owned())));
    let users_after = accepted.await.unwrap().unwrap().into_inner().users;
    assert_eq!((users_after[0].revision, users_after[0].display_name.as_str()), (2, "Same"));
    assert_eq!((users_after[1].revision, &users_after[1].display_name), (3, &users[0].display_name));
}

#[tokio::test]
async fn deadlocked_batch_is_run_again() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let mut ids: Vec<_> = batch_created(&mut client, (0..3).map(|n| format!("user{n}")))
        .await
        .into_iter()
        .map(|u| u.id)
        .collect();
    ids.sort_unstable_by_key(|id| Uuid::parse_str(id).unwrap());
    let lock = |id: &str| format!("select from users where id = '{id}' for update");
    let (holder, other) = (database.connect().await, database.connect().await);
    // A session that locks in the other order, and that does not look for deadlocks.
    holder.batch_execute("set deadlock_timeout = '10min'; begin").await.unwrap();
    holder.batch_execute(&lock(&ids[2])).await.unwrap();
    other.batch_execute("begin").await.unwrap();
    other.batch_execute(&lock(&ids[1])).await.unwrap();
    let request = batch_update(ids.iter().map(|id| renamed(id, "New")));
    let call = tokio::spawn(async move { client.batch_update_users(request).await });
    eventually("the batch waits", async || (database.count(WAITING).await == 1).then_some(())).await;
    // The batch has to close the cycle: a session looks for a deadlock only once in each wait.
    let close = async {
        eventually("the batch and the holder wait", async || {
            (database.count(WAITING).await == 2).then_some(())
        })
        .await;
        other.batch_execute("commit").await.unwrap();
    };
    let first = lock(&ids[0]);
    let ((), locked) = join(close, holder.batch_execute(&first)).await;
    locked.unwrap();
    holder.batch_execute("commit").await.unwrap();
    let users = call.await.unwrap().unwrap().into_inner().users;
    assert!(users.iter().all(|user| user.revision == 2));
    // The retry can lock the row again before the holder gets it, which is another deadlock.
    assert!(deadlocks(server, &database).await >= 1);
}

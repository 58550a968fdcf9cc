//! Faults of the database are reported as retryable, end by themselves, and lose no change.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tempfile::TempDir;
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_types::StatusExt;
use user_service::pb;
use user_service::store::dev_postgres::Embedded;

use crate::feed::watch::{Watch, from_token, user_of};
use crate::support::*;

/// Asserts that an error is retryable, and returns its reason.
#[track_caller]
fn assert_retryable(status: &Status) -> String {
    let reason = reason(status);
    assert!(["DATABASE_UNAVAILABLE", "OUTCOME_UNKNOWN"].contains(&reason.as_str()), "{status:?}");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.get_error_details().retry_info().is_some());
    reason
}

#[tokio::test]
async fn retry_after_a_kill_between_commit_and_response_returns_the_created_user() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let mut server = Server::start(&proxy.database(), &[]).await;
    let request = pb::CreateUserRequest { request_id: new_request_id(), ..create(user("alice")) };
    let mut client = server.client().await;
    client.check_username(pb::CheckUsernameRequest { username: "warm-up".into() }).await.unwrap();

    proxy.hold_responses();
    let call = tokio::spawn({
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.create_user(request).await }
    });
    let count = "select count(*) from users";
    eventually("the change is committed", async || (database.count(count).await == 1).then_some(())).await;
    assert!(!call.is_finished());
    server.signal("KILL");
    server.ended().await;
    call.await.unwrap().unwrap_err();

    let server = Server::start(&database, &[]).await;
    let user = server.client().await.create_user(request).await.unwrap().into_inner().user.unwrap();
    assert_eq!(database.count(count).await, 1);
    let id: String =
        database.connect().await.query_one("select id::text from users", &[]).await.unwrap().get(0);
    assert_eq!((user.id, user.revision), (id, 1));
}

#[tokio::test]
async fn retry_resolves_the_outcome_of_a_change_whose_connection_broke() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[]).await;
    let mut client = server.client().await;
    let request = pb::CreateUserRequest { request_id: new_request_id(), ..create(user("alice")) };
    proxy.hold_responses();
    let call = tokio::spawn({
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.create_user(request).await }
    });
    let count = "select count(*) from users";
    eventually("the change is committed", async || (database.count(count).await == 1).then_some(())).await;
    proxy.cut();
    let status = call.await.unwrap().unwrap_err();
    assert_eq!(assert_retryable(&status), "OUTCOME_UNKNOWN");
    // The retry can use another connection that was cut; then it is repeated.
    eventually("the retry succeeds", async || client.create_user(request.clone()).await.ok()).await;
    assert_eq!(database.count(count).await, 1);
}

#[tokio::test]
async fn uncommitted_change_whose_connection_broke_can_be_retried() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[]).await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    let request = pb::UpdateUserRequest { request_id: new_request_id(), ..rename(&id, "New") };
    let call = tokio::spawn({
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.update_user(request).await }
    });
    eventually("the statement waits for the row", async || {
        (database.count(WAITING).await == 1).then_some(())
    })
    .await;
    proxy.cut();
    assert_eq!(assert_retryable(&call.await.unwrap().unwrap_err()), "OUTCOME_UNKNOWN");
    // The backend detects that its client has disconnected, and rolls back.
    let cut = Instant::now();
    eventually("the backend has ended", async || (database.count(WAITING).await == 0).then_some(())).await;
    // The backend checks once a second. The statement timeout is 30 s.
    assert!(cut.elapsed() < Duration::from_secs(10), "{:?}", cut.elapsed());
    holder.batch_execute("rollback").await.unwrap();
    let retry = async || client.clone().update_user(request.clone()).await.ok();
    let user = eventually("the retry succeeds", retry).await.into_inner().user.unwrap();
    assert_eq!((user.revision, user.display_name.as_str()), (2, "New"));
}

#[tokio::test]
async fn connections_are_opened_even_if_the_requests_that_need_them_have_ended() {
    const POOL_SIZE: usize = 3;
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[("POOL_SIZE", "3")]).await;
    let client = server.client_ignoring_deadlines();
    let calls = |timeout| {
        let client = &client;
        join_all((0..POOL_SIZE).map(move |_| {
            let mut client = client.clone();
            async move { client.get_user(with_timeout(by_id(&new_request_id()), timeout)).await }
        }))
    };
    proxy.cut();
    proxy.hold_responses();
    // The first requests find that their connections are broken.
    calls("100m").await;
    for response in calls("500m").await {
        assert_rejected(response, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    }
    proxy.release_responses();
    let idle = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'user-service' and state = 'idle'";
    // One more connection belongs to the health check.
    let are_open = async || (database.count(idle).await == POOL_SIZE as i64 + 1).then_some(());
    eventually("all connections are open", are_open).await;
}

#[tokio::test]
async fn no_connection_stays_broken_after_all_backends_are_terminated() {
    let (server, database) = server().await;
    let client = server.client().await;
    let id = created(&mut client.clone(), "alice").await.id;
    let burst = || {
        join_all((0..50).map(|_| {
            let (mut client, id) = (client.clone(), id.clone());
            async move { client.get_user(by_id(&id)).await }
        }))
    };
    assert!(burst().await.iter().all(Result::is_ok));
    for _ in 0..5 {
        assert!(terminate_backends(&database).await > 0);
        // A request can use a connection that is being closed.
        for status in burst().await.into_iter().filter_map(Result::err) {
            assert_retryable(&status);
        }
        eventually("all connections work", async || burst().await.iter().all(Result::is_ok).then_some(()))
            .await;
    }
}

#[tokio::test]
async fn schema_change_prepares_statements_again_on_every_connection() {
    let (server, database) = server().await;
    let client = server.client().await;
    let user = created(&mut client.clone(), "alice").await;
    let burst = || {
        join_all((0..100).map(|_| {
            let (mut client, id) = (client.clone(), user.id.clone());
            async move { client.get_user(by_id(&id)).await.unwrap().into_inner().user.unwrap() }
        }))
    };
    assert!(burst().await.iter().all(|found| *found == user));
    // The migration of a later release can do this while this one is serving.
    database
        .connect()
        .await
        .batch_execute("alter table users alter display_name type varchar(1000)")
        .await
        .unwrap();
    assert!(burst().await.iter().all(|found| *found == user));
    client.clone().update_user(rename(&user.id, "New")).await.unwrap();
}

#[tokio::test]
async fn watches_miss_no_change_after_a_schema_change() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let mut watch = Watch::open(&mut client, pb::WatchUsersRequest::default()).await.unwrap();
    watch.message().await.unwrap();
    let token = watch.token.clone();
    let id = created(&mut client, "alice").await.id;
    watch.changes(1).await;
    let sql = "alter table users alter display_name type varchar(1000)";
    database.connect().await.batch_execute(sql).await.unwrap();
    // The watch is first rejected as retryable, and then accepted.
    let mut resumed = eventually("the watch resumes", async || {
        Watch::open(&mut client.clone(), from_token(&token))
            .await
            .inspect_err(|status| {
                assert_retryable(status);
            })
            .ok()
    })
    .await;
    resumed.changes(1).await;
    client.update_user(rename(&id, "New")).await.unwrap();
    for watch in [&mut watch, &mut resumed] {
        assert_eq!(user_of(&watch.changes(1).await[0]).unwrap().display_name, "New");
    }
}

#[tokio::test]
async fn read_only_connection_is_replaced() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "1")]).await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    let admin = database.connect().await;
    let read_only = format!("alter database {} set default_transaction_read_only = on", database.name);
    admin.batch_execute(&read_only).await.unwrap();
    terminate_backends(&database).await;
    eventually("the connection is read-only", async || {
        let status = client.update_user(rename(&id, "New")).await.unwrap_err();
        (assert_retryable(&status) == "DATABASE_UNAVAILABLE").then_some(())
    })
    .await;
    admin.batch_execute("set default_transaction_read_only = off").await.unwrap();
    let writable = format!("alter database {} reset default_transaction_read_only", database.name);
    admin.batch_execute(&writable).await.unwrap();
    server.wait_until("", ServingStatus::Serving).await;
    client.update_user(rename(&id, "Newer")).await.unwrap();
}

#[tokio::test]
async fn database_restart_under_load_loses_no_acknowledged_write() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    let postgres = Embedded::start(dir.path()).await.unwrap();
    let database = Database { socket_dir: dir.path().into(), name: "postgres".into() };
    let server = Server::start(&database, &[]).await;
    let is_over = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let (addr, is_over) = (server.addr.clone(), Arc::clone(&is_over));
            tokio::spawn(async move {
                let channel = tonic::transport::Channel::from_shared(format!("http://{addr}")).unwrap();
                let mut client = pb::user_service_client::UserServiceClient::new(channel.connect_lazy());
                let (mut acknowledged, mut rejected) = (Vec::new(), 0);
                for n in 0.. {
                    if is_over.load(Ordering::Relaxed) {
                        break;
                    }
                    match client.create_user(create(user(&format!("w{writer}n{n}")))).await {
                        Ok(response) => acknowledged.push(response.into_inner().user.unwrap().id),
                        Err(status) => {
                            assert_retryable(&status);
                            rejected += 1;
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                    }
                }
                (acknowledged, rejected)
            })
        })
        .collect();
    let rows = async || database.count("select count(*) from users").await;
    eventually("the writers write", async || (rows().await > 50).then_some(())).await;
    postgres.stop().await.unwrap();
    drop(postgres);
    server.wait_until("", ServingStatus::NotServing).await;
    assert_eq!(server.health("liveness").await, Some(ServingStatus::Serving));
    server.wait_until("users.v1.UserService", ServingStatus::NotServing).await;

    let postgres = Embedded::start(dir.path()).await.unwrap();
    server.wait_until("", ServingStatus::Serving).await;
    let before = rows().await;
    eventually("the writers write again", async || (rows().await > before + 50).then_some(())).await;
    is_over.store(true, Ordering::Relaxed);
    let (mut acknowledged, mut rejected) = (Vec::new(), 0);
    for writer in join_all(writers).await {
        let (ids, n) = writer.unwrap();
        acknowledged.extend(ids);
        rejected += n;
    }
    assert!(rejected > 0);
    let client = database.connect().await;
    let found: i64 = client
        .query_one("select count(*) from users where id::text = any($1)", &[&acknowledged])
        .await
        .unwrap()
        .get(0);
    assert_eq!(usize::try_from(found).unwrap(), acknowledged.len());
    drop((client, server));
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn unresponsive_database_delays_no_request_beyond_its_deadline() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[]).await;
    let mut client = server.client_ignoring_deadlines();
    proxy.hold_responses();
    let response = client.get_user(with_timeout(by_id(&new_request_id()), "100m")).await;
    assert_rejected(response, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    server.wait_until("", ServingStatus::NotServing).await;
    proxy.cut();
    server.wait_until("", ServingStatus::Serving).await;
    let response = client.get_user(by_id(&new_request_id())).await;
    assert_rejected(response, Code::NotFound, "USER_NOT_FOUND");
}

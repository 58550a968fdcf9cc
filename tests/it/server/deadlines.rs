//! Deadlines, cancellation, lock waits and overload: a request ends in time, and so does
//! its statement.

use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use tonic::Code;
use tonic_types::StatusExt;
use user_service::pb;

use crate::support::*;

/// Creates a user, and opens a transaction that locks its row.
async fn locked(server: &Server, database: &Database) -> (String, tokio_postgres::Client) {
    let id = created(&mut server.client().await, "locked").await.id;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    (id, holder)
}

/// Counts the service's database sessions that are not idle.
const BUSY: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and application_name = 'user-service' and state <> 'idle'";

#[tokio::test]
async fn deadline_on_a_locked_row_is_met_and_cancels_the_statement() {
    let database = Database::migrated().await;
    // With one connection, the next request needs the one that was blocked.
    let server = Server::start(&database, &[("POOL_SIZE", "1")]).await;
    let (id, holder) = locked(&server, &database).await;
    let mut client = server.client_ignoring_deadlines();

    let started = Instant::now();
    let response = client.update_user(with_timeout(rename(&id, "New"), "50m")).await;
    let elapsed = started.elapsed();
    assert_rejected(response, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    // The statement timeout is 30 s, far more.
    assert!((Duration::from_millis(50)..Duration::from_secs(5)).contains(&elapsed), "{elapsed:?}");
    let returned = Instant::now();
    eventually("the backend is idle", async || (database.count(BUSY).await == 0).then_some(())).await;
    assert!(returned.elapsed() < Duration::from_secs(5), "{:?}", returned.elapsed());
    // The row is still locked. Requests that do not lock it are not affected.
    client.get_user(with_timeout(by_id(&id), "5S")).await.unwrap();

    holder.batch_execute("rollback").await.unwrap();
    let user = client.update_user(rename(&id, "New")).await.unwrap().into_inner().user.unwrap();
    assert_eq!(user.revision, 2);
}

#[tokio::test]
async fn statement_of_a_cancelled_request_is_cancelled() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "1")]).await;
    let (id, _holder) = locked(&server, &database).await;
    let mut client = server.client().await;
    let request = tokio::spawn({
        let (mut client, id) = (client.clone(), id.clone());
        async move { client.update_user(rename(&id, "New")).await }
    });
    eventually("the statement waits for the row lock", async || {
        (database.count(WAITING).await == 1).then_some(())
    })
    .await;
    request.abort();
    eventually("the backend is idle", async || (database.count(BUSY).await == 0).then_some(())).await;
    client.get_user(by_id(&id)).await.unwrap();
}

#[tokio::test]
async fn wait_for_a_connection_counts_towards_the_deadline() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "1"), ("REQUEST_TIMEOUT_MS", "10000")]).await;
    let (id, _holder) = locked(&server, &database).await;
    let mut client = server.client_ignoring_deadlines();
    let blocked = tokio::spawn({
        let (mut client, id) = (client.clone(), id.clone());
        async move { client.update_user(rename(&id, "New")).await }
    });
    eventually("one statement waits for the row lock", async || {
        (database.count(WAITING).await == 1).then_some(())
    })
    .await;
    let response = client.get_user(with_timeout(by_id(&id), "50m")).await;
    assert_rejected(response, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    // The blocked request has no deadline, so REQUEST_TIMEOUT_MS ends it.
    assert_rejected(blocked.await.unwrap(), Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
}

#[tokio::test]
async fn full_queue_rejects_at_once_and_queued_requests_time_out() {
    let database = Database::migrated().await;
    let settings = [("POOL_SIZE", "1"), ("MAX_QUEUED_REQUESTS", "2"), ("POOL_ACQUIRE_TIMEOUT_MS", "5000")];
    let server = Server::start(&database, &settings).await;
    let (id, holder) = locked(&server, &database).await;
    let mut client = server.client_ignoring_deadlines();
    let blocked = tokio::spawn({
        let (mut client, id) = (client.clone(), id.clone());
        async move { client.update_user(rename(&id, "New")).await }
    });
    eventually("one statement waits for the row lock", async || {
        (database.count(WAITING).await == 1).then_some(())
    })
    .await;
    let requests = (0..20).map(|_| {
        let (mut client, id) = (client.clone(), id.clone());
        async move {
            let started = Instant::now();
            let status = assert_rejected(client.get_user(by_id(&id)).await, Code::Unavailable, "OVERLOADED");
            assert!(status.get_error_details().retry_info().is_some());
            started.elapsed()
        }
    });
    let waits = join_all(requests).await;
    let rejected_at_once = waits.iter().filter(|wait| **wait < Duration::from_secs(3)).count();
    // Two statements in flight and a queue of two wait for the only connection. All other
    // requests are rejected.
    assert!((14..20).contains(&rejected_at_once), "{waits:?}");
    assert!(waits.iter().all(|wait| *wait < Duration::from_secs(20)));
    holder.batch_execute("rollback").await.unwrap();
    blocked.await.unwrap().unwrap();
    assert_eq!(client.get_user(by_id(&id)).await.unwrap().into_inner().user.unwrap().revision, 2);
}

#[tokio::test]
async fn locked_row_does_not_exhaust_the_pool() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "2"), ("LOCK_TIMEOUT_MS", "100")]).await;
    let (id, holder) = locked(&server, &database).await;
    let client = server.client_ignoring_deadlines();
    let writers = (0..20).map(|n| {
        let (mut client, id) = (client.clone(), id.clone());
        async move {
            let request = pb::UpdateUserRequest { validate_only: n % 2 == 0, ..rename(&id, "New") };
            let response = client.update_user(request).await;
            let status = assert_rejected(response, Code::Aborted, "TRANSACTION_CONFLICT");
            assert!(status.get_error_details().retry_info().is_some());
        }
    });
    let reader = async {
        for _ in 0..20 {
            client.clone().get_user(by_id(&id)).await.unwrap();
        }
    };
    join(join_all(writers), reader).await;
    holder.batch_execute("rollback").await.unwrap();
    let user = client.clone().update_user(rename(&id, "New")).await.unwrap().into_inner().user.unwrap();
    assert_eq!(user.revision, 2);
}

#[tokio::test]
async fn validate_only_releases_its_locks_when_its_deadline_passes() {
    let (server, database) = server().await;
    let (id, holder) = locked(&server, &database).await;
    let mut client = server.client_ignoring_deadlines();
    let request = pb::UpdateUserRequest { validate_only: true, ..rename(&id, "New") };
    let response = client.update_user(with_timeout(request, "50m")).await;
    assert_rejected(response, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    eventually("the backend is idle", async || (database.count(BUSY).await == 0).then_some(())).await;
    holder.batch_execute("rollback").await.unwrap();
    holder.batch_execute("select from users for update nowait").await.unwrap();
}

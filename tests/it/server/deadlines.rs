//! A call ends in time, and takes what it started with it.

use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use tonic::Code;
use tonic_types::StatusExt;
use user_service::pb;

use crate::support::*;

/// A user, and a transaction that holds its row.
async fn locked(server: &Server, database: &Database) -> (String, tokio_postgres::Client) {
    let id = created(&mut server.client().await, "locked").await.id;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    (id, holder)
}

/// How many of the service's backends have something to do.
const BUSY: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and application_name = 'user-service' and state <> 'idle'";

#[tokio::test]
async fn a_deadline_against_a_locked_row_is_kept_and_the_query_cancelled() {
    let database = Database::migrated().await;
    // One connection, so that the next call needs the one that was stuck.
    let server = Server::start(&database, &[("POOL_SIZE", "1")]).await;
    let (id, holder) = locked(&server, &database).await;
    let mut client = server.patient_client();

    let started = Instant::now();
    let answer = client.update_user(with_timeout(rename(&id, "New"), "50m")).await;
    let taken = started.elapsed();
    assert_refused(answer, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    // Far less than the 30 s that the statement itself may take.
    assert!((Duration::from_millis(50)..Duration::from_secs(5)).contains(&taken), "{taken:?}");
    let asked = Instant::now();
    eventually("the backend is idle", async || (database.count(BUSY).await == 0).then_some(())).await;
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    // The row is still locked; whoever wants something else does not notice.
    client.get_user(with_timeout(by_id(&id), "5S")).await.unwrap();

    holder.batch_execute("rollback").await.unwrap();
    let user = client.update_user(rename(&id, "New")).await.unwrap().into_inner().user.unwrap();
    assert_eq!(user.revision, 2);
}

#[tokio::test]
async fn the_query_of_a_caller_who_left_is_cancelled() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "1")]).await;
    let (id, _holder) = locked(&server, &database).await;
    let mut client = server.client().await;
    let call = tokio::spawn({
        let (mut client, id) = (client.clone(), id.clone());
        async move { client.update_user(rename(&id, "New")).await }
    });
    eventually("it waits for the row", async || (database.count(WAITING).await == 1).then_some(())).await;
    call.abort();
    eventually("the backend is idle", async || (database.count(BUSY).await == 0).then_some(())).await;
    client.get_user(by_id(&id)).await.unwrap();
}

#[tokio::test]
async fn the_wait_for_a_connection_counts() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "1"), ("REQUEST_TIMEOUT_MS", "10000")]).await;
    let (id, _holder) = locked(&server, &database).await;
    let mut client = server.patient_client();
    let stuck = tokio::spawn({
        let (mut client, id) = (client.clone(), id.clone());
        async move { client.update_user(rename(&id, "New")).await }
    });
    eventually("one call waits for the row", async || (database.count(WAITING).await == 1).then_some(()))
        .await;
    let answer = client.get_user(with_timeout(by_id(&id), "50m")).await;
    assert_refused(answer, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    // The other one set no deadline, so the service's own limit ends it.
    assert_refused(stuck.await.unwrap(), Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
}

#[tokio::test]
async fn who_finds_the_line_full_is_turned_away_at_once_and_who_waits_too_long_then() {
    let database = Database::migrated().await;
    let settings = [("POOL_SIZE", "1"), ("MAX_QUEUED_REQUESTS", "2"), ("POOL_ACQUIRE_TIMEOUT_MS", "5000")];
    let server = Server::start(&database, &settings).await;
    let (id, holder) = locked(&server, &database).await;
    let mut client = server.patient_client();
    let stuck = tokio::spawn({
        let (mut client, id) = (client.clone(), id.clone());
        async move { client.update_user(rename(&id, "New")).await }
    });
    eventually("one call waits for the row", async || (database.count(WAITING).await == 1).then_some(()))
        .await;
    let calls = (0..20).map(|_| {
        let (mut client, id) = (client.clone(), id.clone());
        async move {
            let started = Instant::now();
            let status =
                assert_refused(client.get_user(by_id(&id)).await, Code::ResourceExhausted, "OVERLOADED");
            assert!(status.get_error_details().retry_info().is_some());
            started.elapsed()
        }
    });
    let waits = join_all(calls).await;
    let at_once = waits.iter().filter(|wait| **wait < Duration::from_secs(3)).count();
    // Two lanes and a line of two wait for the only connection; nobody else does.
    assert!((14..20).contains(&at_once), "{waits:?}");
    assert!(waits.iter().all(|wait| *wait < Duration::from_secs(20)));
    holder.batch_execute("rollback").await.unwrap();
    stuck.await.unwrap().unwrap();
    assert_eq!(client.get_user(by_id(&id)).await.unwrap().into_inner().user.unwrap().revision, 2);
}

#[tokio::test]
async fn a_row_that_somebody_keeps_locked_does_not_take_the_pool() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "2"), ("LOCK_TIMEOUT_MS", "100")]).await;
    let (id, holder) = locked(&server, &database).await;
    let client = server.patient_client();
    let writers = (0..20).map(|n| {
        let (mut client, id) = (client.clone(), id.clone());
        async move {
            let request = pb::UpdateUserRequest { validate_only: n % 2 == 0, ..rename(&id, "New") };
            let answer = client.update_user(request).await;
            let status = assert_refused(answer, Code::Aborted, "TRANSACTION_CONFLICT");
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
async fn validate_only_lets_go_of_what_it_locked_when_its_deadline_passes() {
    let (server, database) = server().await;
    let (id, holder) = locked(&server, &database).await;
    let mut client = server.patient_client();
    let request = pb::UpdateUserRequest { validate_only: true, ..rename(&id, "New") };
    let answer = client.update_user(with_timeout(request, "50m")).await;
    assert_refused(answer, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    eventually("the backend is idle", async || (database.count(BUSY).await == 0).then_some(())).await;
    holder.batch_execute("rollback").await.unwrap();
    holder.batch_execute("select from users for update nowait").await.unwrap();
}

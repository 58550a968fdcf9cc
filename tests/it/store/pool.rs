//! Pooled connections: cancelled requests, silent servers, session settings.

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use tokio::time;
use user_service::pb;

use crate::support::*;

/// The service's sessions.
async fn sessions(database: &Database) -> BTreeSet<i32> {
    let sql = "select pid from pg_stat_activity
        where datname = current_database() and application_name = 'user-service'";
    let rows = database.connect().await.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// How many lines of the log have a message.
fn logged(server: &Server, message: &str) -> usize {
    let message = format!(r#""message":"{message}""#);
    server.log().lines().filter(|line| line.contains(&message)).count()
}

#[tokio::test]
async fn cancelled_requests_cost_no_connections_and_leave_no_transactions() {
    const DETACHED: usize = 200;
    let (server, database) = server().await;
    let client = server.client().await;
    let id = created(&mut client.clone(), "alice").await.id;
    let before = sessions(&database).await;
    // Each request is cancelled at another point of its way.
    let mut round = 0;
    let finished = || logged(&server, "detached statement finished");
    eventually("requests are cancelled while their statements run", async || {
        round += 1;
        let hedged = (0..30).map(|n| {
            let (mut client, id) = (client.clone(), id.clone());
            async move {
                let delay = Duration::from_micros(100 * (round % 40) + 37 * n);
                let name = format!("hedged{round}n{n}");
                match n % 3 {
                    0 => drop(time::timeout(delay, client.get_user(by_id(&id))).await),
                    1 => drop(time::timeout(delay, client.create_user(create(user(&name)))).await),
                    _ => {
                        let name = format!("dry{name}");
                        let dry = pb::CreateUserRequest { validate_only: true, ..create(user(&name)) };
                        drop(time::timeout(delay, client.create_user(dry)).await);
                    }
                }
            }
        });
        join_all(hedged).await;
        (finished() > DETACHED).then_some(())
    })
    .await;
    let idle = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'user-service' and state <> 'idle'";
    eventually("all connections are idle", async || (database.count(idle).await == 0).then_some(())).await;
    let dry = format!("select count(*) from users where username like '{SECRET}dry%'");
    assert_eq!(database.count(&dry).await, 0);
    // A statement that takes longer than 200 ms, on a busy machine, costs its connection.
    let opened = sessions(&database).await.difference(&before).count();
    assert!(opened < DETACHED / 20, "{opened} connections for {} cancelled statements", finished());
}

#[tokio::test]
async fn statement_that_hangs_without_its_caller_is_cancelled_and_its_connection_replaced() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "2")]).await;
    let client = server.patient_client();
    let id = created(&mut server.client().await, "alice").await.id;
    let before = sessions(&database).await;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    // One detached statement may hold one of two connections. Each next one ends it.
    for _ in 0..4 {
        let response = client.clone().update_user(with_timeout(rename(&id, "New"), "50m")).await;
        response.unwrap_err();
        client.clone().get_user(by_id(&id)).await.unwrap();
    }
    eventually("nothing waits for the row", async || (database.count(WAITING).await == 0).then_some(()))
        .await;
    assert!(logged(&server, "detached statement cancelled") > 0);
    holder.batch_execute("rollback").await.unwrap();
    let user = client.clone().update_user(rename(&id, "Newer")).await.unwrap().into_inner().user.unwrap();
    assert_eq!((user.revision, user.display_name.as_str()), (2, "Newer"));
    // The connection of the health check stays.
    let after = sessions(&database).await;
    assert!(after.len() <= 3 && after != before, "{before:?} {after:?}");
}

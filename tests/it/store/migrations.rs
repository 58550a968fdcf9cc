//! Migrations run once, even if replicas start at the same time.

use std::process::Command;

use futures_util::future::join_all;
use user_service::store::list;
use user_service::store::migrate::MIGRATION_LOCK;

use crate::support::*;

const APPLIED: &str = "select count(*) from refinery_schema_history";

#[tokio::test]
async fn eight_replicas_that_start_at_once_on_an_empty_database_all_become_ready() {
    let database = Database::empty().await;
    let servers = join_all((0..8).map(|_| Server::start(&database, &[("POOL_SIZE", "2")]))).await;
    for (n, server) in servers.iter().enumerate() {
        created(&mut server.client().await, &format!("user{n}")).await;
    }
    assert_eq!(database.count(APPLIED).await, 7);
    let migrated: usize =
        servers.iter().map(|server| server.log().matches(r#""message":"migrated""#).count()).sum();
    assert_eq!(migrated, 7);
}

#[tokio::test]
async fn replica_that_dies_while_it_migrates_does_not_block_other_replicas() {
    let database = Database::empty().await;
    // The connection that holds the lock of a migrating replica.
    let holder = database.connect().await;
    holder.batch_execute(&format!("select pg_advisory_lock({MIGRATION_LOCK})")).await.unwrap();
    let server = Server::spawn(&[("DATABASE_URL", &database.url())]).await;
    let polls = "select count(*) from pg_stat_activity
        where datname = current_database() and query like 'select pg_try_advisory_lock%'";
    eventually("the server requests the lock", async || (database.count(polls).await > 0).then_some(()))
        .await;
    // No migration has started.
    let tables = "select count(*) from pg_class where relname in ('users', 'refinery_schema_history')";
    assert_eq!(database.count(tables).await, 0);
    // While it waits it holds no snapshot, which would block `create index concurrently`.
    let in_transaction = format!("{polls} and backend_xmin is not null and state <> 'active'");
    assert_eq!(database.count(&in_transaction).await, 0);
    drop(holder);
    server.wait_until("", tonic_health::pb::health_check_response::ServingStatus::Serving).await;
}

#[tokio::test]
async fn database_with_a_newer_schema_is_served() {
    let database = Database::migrated().await;
    let future = "insert into refinery_schema_history
        select 99, 'from_the_future', applied_on, checksum from refinery_schema_history limit 1";
    database.connect().await.batch_execute(future).await.unwrap();
    let server = Server::start(&database, &[]).await;
    created(&mut server.client().await, "alice").await;
}

#[tokio::test]
async fn migrate_command_applies_all_migrations_once_and_exits() {
    let database = Database::empty().await;
    for _ in 0..2 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_user-service"));
        let output = command.arg("migrate").env_clear().env("DATABASE_URL", database.url()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(database.count(APPLIED).await, 7);
    }
}

#[tokio::test]
async fn schema_without_a_required_column_stops_the_start() {
    let database = Database::migrated().await;
    assert!(list::STATEMENTS.iter().any(|sql| sql.contains("display_name")));
    database.connect().await.batch_execute("alter table users drop column display_name").await.unwrap();
    let mut server = Server::spawn(&[("DATABASE_URL", &database.url())]).await;
    assert!(!server.ended().await.success());
    assert!(server.log().contains("42703"), "{}", server.log());
}

#[tokio::test]
async fn modified_migration_stops_the_start() {
    let database = Database::migrated().await;
    let change = "update refinery_schema_history set checksum = '1' where version = 1";
    database.connect().await.batch_execute(change).await.unwrap();
    let mut server = Server::spawn(&[("DATABASE_URL", &database.url())]).await;
    assert!(!server.ended().await.success());
    assert!(server.log().contains("different than filesystem one"), "{}", server.log());
}

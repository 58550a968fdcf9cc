//! Migrations run once, whenever replicas start and end.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::{future::join_all, stream};
use refinery::Migration;
use tokio_postgres::error::SqlState;
use tonic_health::pb::health_check_response::ServingStatus;
use user_service::pb;
use user_service::store::list;
use user_service::store::migrate::{self, MIGRATION_LOCK};

use crate::feed::watch::Watch;
use crate::support::*;

const APPLIED: &str = "select count(*) from refinery_schema_history";

/// The version of release 0.1.0's schema.
const OLD_VERSION: i32 = 7;

fn all_migrations() -> i64 {
    migrate::embedded().len() as i64
}

/// A database with the schema of release 0.1.0.
async fn old_database() -> Database {
    let database = Database::empty().await;
    let mut old = migrate::embedded();
    old.retain(|migration| migration.version() <= OLD_VERSION);
    migrate::apply_all(&database.config(), &old).await.unwrap();
    database
}

/// The session that runs a statement like this, once it waits for a lock.
async fn waiting_session(database: &Database, statement: &str) -> i32 {
    let admin = database.connect().await;
    let sql = "select pid from pg_stat_activity where datname = current_database()
        and wait_event_type = 'Lock' and query like $1";
    eventually(statement, async || Some(admin.query_opt(sql, &[&statement]).await.unwrap()?.get(0))).await
}

async fn terminate(database: &Database, pid: i32) {
    database.connect().await.execute("select pg_terminate_backend($1, 60000)", &[&pid]).await.unwrap();
}

#[tokio::test]
async fn eight_replicas_that_start_at_once_on_an_empty_database_all_become_ready() {
    let database = Database::empty().await;
    let servers = join_all((0..8).map(|_| Server::start(&database, &[("POOL_SIZE", "2")]))).await;
    for (n, server) in servers.iter().enumerate() {
        created(&mut server.client().await, &format!("user{n}")).await;
    }
    assert_eq!(database.count(APPLIED).await, all_migrations());
    let migrated: usize =
        servers.iter().map(|server| server.log().matches(r#""message":"migrated""#).count()).sum();
    assert_eq!(migrated as i64, all_migrations());
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
        assert_eq!(database.count(APPLIED).await, all_migrations());
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
    assert!(server.log().contains("V1__users is not the migration that was applied"), "{}", server.log());
}

/// The SQL of the section "Two roles" of docs/operations.md, as the roles that it names: a
/// superuser's first, then the migrator's before and after its migration.
fn documented_grants(database: &str) -> Vec<Vec<String>> {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md");
    let document = std::fs::read_to_string(document).unwrap();
    let section = document.split_once("### Two roles").unwrap().1.split_once("\n## ").unwrap().0;
    let blocks = section.split("```sql").skip(1).map(|block| block.split_once("```").unwrap().0);
    let named = |sql: &str| {
        // A superuser's names are those of the whole cluster.
        let sql = sql.replace("userservice", &format!("{database}_roles"));
        sql.replace("migrator", &format!("{database}_migrator"))
            .replace("server", &format!("{database}_server"))
    };
    let statements = |block: &str| named(block).split_terminator(';').map(str::to_owned).collect();
    blocks.map(statements).collect()
}

/// Creates, changes, reads, imports, exports and expunges users, with a watch beside.
async fn make_every_kind_of_call(server: &Server) {
    let mut client = server.client().await;
    let mut watch = Watch::from_now(&mut client).await;
    let request_id = new_request_id();
    let request = pb::CreateUserRequest { request_id, ..create(user("alice")) };
    let alice = client.create_user(request.clone()).await.unwrap().into_inner().user.unwrap();
    assert_eq!(client.create_user(request).await.unwrap().into_inner().user.unwrap(), alice);
    let renamed = pb::User { id: alice.id.clone(), username: format!("{SECRET}bob"), ..Default::default() };
    client.update_user(pb::UpdateUserRequest { user: Some(renamed), ..Default::default() }).await.unwrap();
    client.delete_user(delete(&alice.id)).await.unwrap();
    client
        .undelete_user(pb::UndeleteUserRequest { id: alice.id.clone(), ..Default::default() })
        .await
        .unwrap();
    client.list_users(pb::ListUsersRequest::default()).await.unwrap();
    let keys =
        vec![pb::UserKey { key: Some(pb::user_key::Key::Email(format!("{SECRET}alice@example.com"))) }];
    client.lookup_users(pb::LookupUsersRequest { keys, ..Default::default() }).await.unwrap();
    let chunk = pb::ImportUsersRequest {
        import_id: new_request_id(),
        chunk: 1,
        users: vec![user("carol"), user("dave")],
        mode: pb::ImportMode::Overwrite.into(),
    };
    let mut acks = client.import_users(stream::iter([chunk])).await.unwrap().into_inner();
    assert_eq!(acks.message().await.unwrap().unwrap().created, 2);
    let mut export = client.export_users(pb::ExportUsersRequest::default()).await.unwrap().into_inner();
    let mut exported = 0;
    while let Some(part) = export.message().await.unwrap() {
        exported += part.users.len();
    }
    assert_eq!(exported, 3);
    client.expunge_user(expunge(&alice.id)).await.unwrap();
    watch.changes(7).await;
}

#[tokio::test]
async fn role_with_the_documented_grants_serves_and_purges_and_cannot_change_the_schema() {
    let admin = Database::empty().await;
    let [as_superuser, before, after] = documented_grants(&admin.name).try_into().unwrap();
    for statement in as_superuser {
        admin.connect().await.batch_execute(&statement).await.unwrap();
    }
    let database = Database { name: format!("{}_roles", admin.name), ..admin.clone() };
    let url = |role: &str| database.url().replace("postgres:zqzqpassword", &format!("{}_{role}", admin.name));
    let run = async |statements: Vec<String>| {
        let config: tokio_postgres::Config = url("migrator").parse().unwrap();
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        for statement in statements {
            client.batch_execute(&statement).await.unwrap();
        }
    };
    run(before).await;
    let mut migrate = Command::new(env!("CARGO_BIN_EXE_user-service"));
    let output = migrate.arg("migrate").env_clear().env("DATABASE_URL", url("migrator")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    run(after).await;

    let url = url("server");
    let settings =
        [("DATABASE_URL", url.as_str()), ("PURGE_INTERVAL_MS", "10"), ("CHANGE_RETENTION_HOURS", "1")];
    let server = Server::spawn(&settings).await;
    server.wait_until("", ServingStatus::Serving).await;
    make_every_kind_of_call(&server).await;
    let mut client = server.client().await;
    // The purge: of users, of every other kind of row, and of changes.
    let dave =
        client.get_user(by_username(&format!("{SECRET}dave"))).await.unwrap().into_inner().user.unwrap();
    client.delete_user(delete(&dave.id)).await.unwrap();
    let expire = "update users set purge_time = now() where purge_time is not null;
        update requests set expire_time = now(); update import_chunks set expire_time = now();
        insert into username_holds select 'held', id, now() from users limit 1";
    database.connect().await.batch_execute(expire).await.unwrap();
    end_partition(&database, "2 hours").await;
    let left = "select (select count(*) from users) - 1 + (select count(*) from requests)
        + (select count(*) from import_chunks) + (select count(*) from username_holds)
        + pg_relation_size('user_changes_0')";
    eventually("the purge empties them", async || (database.count(left).await == 0).then_some(())).await;
    assert!(!server.log().contains("permission denied"), "{}", server.log());

    let config: tokio_postgres::Config = url.parse().unwrap();
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    for sql in [
        "create table another (id int)",
        "alter table users add column another int",
        "drop table user_changes_0",
        "truncate users",
        "delete from refinery_schema_history",
    ] {
        let code = client.batch_execute(sql).await.unwrap_err().code().cloned();
        assert_eq!(code, Some(SqlState::INSUFFICIENT_PRIVILEGE), "{sql}");
    }
}

/// Writes as release 0.1.0 does until it is stopped; every write has to succeed.
async fn write(database: Database, is_over: Arc<AtomicBool>) -> i64 {
    let client = database.connect().await;
    client.batch_execute("set lock_timeout = 1000").await.unwrap();
    let sql = "with request as (
            insert into requests (request_id, fingerprint, is_salted, user_id, expire_time)
            select gen_random_uuid(), '', false, gen_random_uuid(), now() + interval '24 hours' returning user_id
        )
        insert into user_changes (user_id, revision, kind) select user_id, 1, 1 from request";
    let write = client.prepare(sql).await.unwrap();
    let mut written = 0;
    while !is_over.load(Ordering::Relaxed) {
        client.execute(&write, &[]).await.unwrap();
        written += 1;
    }
    written
}

#[tokio::test]
async fn two_replicas_migrate_a_database_that_is_written_without_a_failed_write() {
    let database = old_database().await;
    let is_over = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> =
        (0..4).map(|_| tokio::spawn(write(database.clone(), Arc::clone(&is_over)))).collect();
    let changes = "select count(*) from user_changes";
    eventually("the writers write", async || (database.count(changes).await > 100).then_some(())).await;
    let servers = join_all((0..2).map(|_| Server::start(&database, &[]))).await;
    let migrated = database.count(changes).await;
    eventually("the writers write on", async || (database.count(changes).await > migrated).then_some(()))
        .await;
    is_over.store(true, Ordering::Relaxed);
    let mut written = 0;
    for writer in writers {
        written += writer.await.unwrap();
    }
    assert_eq!(database.count(changes).await, written);
    assert_eq!(database.count("select count(distinct seq) from user_changes").await, written);
    assert_eq!(database.count(APPLIED).await, all_migrations());
    for (n, server) in servers.iter().enumerate() {
        created(&mut server.client().await, &format!("user{n}")).await;
    }
}

#[tokio::test]
async fn killed_migration_is_finished_by_the_next_attempt() {
    let database = old_database().await;
    // In a transaction: it waits for a table.
    let reader = database.connect().await;
    reader.batch_execute("begin; select from user_changes").await.unwrap();
    let server = Server::spawn(&[("DATABASE_URL", &database.url())]).await;
    let killed = waiting_session(&database, "%alter table user_changes%").await;
    terminate(&database, killed).await;
    assert_ne!(waiting_session(&database, "%alter table user_changes%").await, killed);
    // The one before it is that of the token keys.
    assert_eq!(database.count(APPLIED).await, i64::from(OLD_VERSION) + 1);
    // Outside a transaction: it waits for the transactions that use the table.
    reader.batch_execute("rollback; begin; select from requests").await.unwrap();
    let killed = waiting_session(&database, "%drop index concurrently%").await;
    terminate(&database, killed).await;
    assert_ne!(waiting_session(&database, "%drop index concurrently%").await, killed);
    reader.batch_execute("rollback").await.unwrap();
    server.wait_until("", ServingStatus::Serving).await;
    assert_eq!(database.count(APPLIED).await, all_migrations());
    assert_eq!(
        database.count("select count(*) from pg_class where relname = 'requests_expire_time'").await,
        0
    );
    created(&mut server.client().await, "alice").await;
}

#[tokio::test]
async fn index_is_built_beside_writes_and_again_after_the_build_was_killed() {
    let database = Database::migrated().await;
    let mut migrations = migrate::embedded();
    let sql = "-- outside a transaction\ndrop index concurrently if exists users_example;\n\
        create index concurrently users_example on users (display_name);\n";
    migrations.push(Migration::unapplied("V999__example", sql).unwrap());
    let config = database.config();
    let valid =
        "select count(*) from pg_index where indexrelid = to_regclass('users_example') and indisvalid";

    // The build waits for a transaction that has written.
    let writer = database.connect().await;
    writer.batch_execute("begin; delete from users").await.unwrap();
    // Two replicas: one builds, the other waits for it.
    let mut replicas = Vec::new();
    for _ in 0..2 {
        let (config, migrations) = (config.clone(), migrations.clone());
        replicas.push(tokio::spawn(async move { migrate::apply_all(&config, &migrations).await }));
    }
    let killed = waiting_session(&database, "%create index concurrently%").await;
    // No other session waits for the build.
    let server = Server::start(&database, &[]).await;
    created(&mut server.client().await, "alice").await;
    terminate(&database, killed).await;
    // The other one takes over.
    assert_ne!(waiting_session(&database, "%index concurrently%").await, killed);
    let invalid = "select count(*) from pg_index where indexrelid = to_regclass('users_example')";
    assert_eq!((database.count(invalid).await, database.count(valid).await), (1, 0));
    writer.batch_execute("commit").await.unwrap();
    let results = join_all(replicas).await;
    assert_eq!(results.iter().filter(|result| result.as_ref().unwrap().is_ok()).count(), 1);
    assert_eq!(database.count(valid).await, 1);
    assert_eq!(database.count(APPLIED).await, all_migrations() + 1);
    migrate::apply_all(&config, &migrations).await.unwrap();
}

#[tokio::test]
async fn without_migration_an_older_schema_stops_the_start_and_a_current_one_does_not() {
    let settings = |url: &str| [("DATABASE_URL", url.to_owned()), ("MIGRATE_ON_START", "false".to_owned())];
    for database in [Database::empty().await, old_database().await] {
        let tables = "select count(*) from pg_class where relkind = 'r'";
        let before = database.count(tables).await;
        let settings = settings(&database.url());
        let settings = settings.each_ref().map(|(name, value)| (*name, value.as_str()));
        let mut server = Server::spawn(&settings).await;
        assert!(!server.ended().await.success());
        let log = server.log();
        assert!(
            log.contains("the schema is older than this release") && log.contains("user-service migrate"),
            "{log}"
        );
        assert_eq!(database.count(tables).await, before);
    }
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MIGRATE_ON_START", "false")]).await;
    created(&mut server.client().await, "alice").await;
}

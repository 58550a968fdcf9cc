//! Pooled connections: cancelled requests, silent servers, session settings.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::future::{join, join_all};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixListener, UnixStream},
    sync::Notify,
    time,
};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use user_service::pb;
use user_service::store::dev_postgres::Embedded;
use user_service::store::migrate;

use crate::feed::watch::Watch;
use crate::server::clients::tool;
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

/// Checks that most statements of cancelled requests have finished, and that only others have cost
/// their connections: on a busy machine, a statement can take longer than 200 ms.
async fn assert_few_connections(server: &Server, database: &Database, before: &BTreeSet<i32>) {
    let (finished, cancelled) =
        (logged(server, "detached statement finished"), logged(server, "detached statement cancelled"));
    assert!(cancelled < finished, "{cancelled} statements cancelled, {finished} finished");
    let opened = sessions(database).await.difference(before).count();
    assert!(opened <= cancelled, "{opened} connections for {cancelled} cancelled statements");
}

#[tokio::test]
async fn cancelled_requests_cost_no_connections_and_leave_no_transactions() {
    const DETACHED: usize = 40;
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
    assert_few_connections(&server, &database, &before).await;
}

#[tokio::test]
async fn requests_that_grpcio_cancels_cost_no_connections() {
    let (server, database) = server().await;
    let before = sessions(&database).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/cancel.py");
    let output = tool("venv/bin/python").args([script, &server.addr]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_few_connections(&server, &database, &before).await;
}

#[tokio::test]
async fn cancelled_requests_cost_others_no_more_than_completed_ones() {
    const WORKERS: usize = 8;
    const CALLS: usize = 20;
    let database = Database::migrated().await;
    // Fewer connections than requests: what a cancelled one costs, others wait for.
    let server = Server::start(&database, &[("POOL_SIZE", "4")]).await;
    let (client, hedges) = (server.client().await, server.client().await);
    let id = created(&mut client.clone(), "alice").await.id;
    // How long it takes to make calls, each beside two others that are cancelled or not.
    let run = async |is_cancelled: bool| {
        let started = Instant::now();
        join_all((0..WORKERS).map(|_| async {
            for n in 0..CALLS {
                let hedges = join_all((0..2).map(|hedge| {
                    let (mut client, id) = (hedges.clone(), id.clone());
                    // Spread over the time that a call takes.
                    let delay = Duration::from_micros(300 * ((n + 10 * hedge) % 20) as u64 + 200);
                    async move {
                        let call = client.get_user(by_id(&id));
                        if is_cancelled { drop(time::timeout(delay, call).await) } else { drop(call.await) }
                    }
                }));
                let mut client = client.clone();
                let (call, _) = join(client.get_user(by_id(&id)), hedges).await;
                call.unwrap();
            }
        }))
        .await;
        started.elapsed()
    };
    let (mut completed, mut cancelled) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..2 {
        completed += run(false).await;
        cancelled += run(true).await;
    }
    assert!(
        cancelled < completed * 2,
        "{cancelled:?} with cancelled calls, {completed:?} with completed ones"
    );
    assert!(logged(&server, "detached statement finished") > 10);
}

#[tokio::test]
async fn statement_that_hangs_without_its_caller_is_cancelled_and_its_connection_replaced() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "2")]).await;
    let client = server.client_ignoring_deadlines();
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

#[tokio::test]
async fn silent_move_of_the_server_fails_one_request_and_no_later_one() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[("POOL_SIZE", "6")]).await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    let mut watch = Watch::from_now(&mut client).await;

    proxy.move_silently();
    // Without a deadline of its own: the connections are closed under it.
    let status = client.get_user(by_id(&id)).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "DATABASE_UNAVAILABLE"));
    client.get_user(by_id(&id)).await.unwrap();
    client.update_user(rename(&id, "New")).await.unwrap();
    let read = (0..20).map(|_| {
        let (mut client, id) = (client.clone(), id.clone());
        async move { client.get_user(by_id(&id)).await.unwrap() }
    });
    join_all(read).await;
    assert_eq!(watch.changes(1).await.len(), 1);
    assert_eq!(logged(&server, "connections to the database closed"), 1);
    assert!(!server.log().contains("not ready"), "{}", server.log());
}

#[tokio::test]
async fn slow_answer_closes_no_connection_and_is_no_outage() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[]).await;
    let before = sessions(&database).await;
    proxy.hold_responses();
    eventually("a check has failed", async || {
        (logged(&server, "the database check failed") > 0).then_some(())
    })
    .await;
    proxy.release_responses();
    let mut client = server.client().await;
    created(&mut client, "alice").await;
    assert_eq!(server.health("").await, Some(ServingStatus::Serving));
    eventually("the sessions are those that were there before", async || {
        (sessions(&database).await == before).then_some(())
    })
    .await;
    assert!(!server.log().contains("not ready"));
    assert_eq!(logged(&server, "connections to the database closed"), 0);
}

#[tokio::test]
async fn lost_connection_of_the_health_check_is_no_outage() {
    let (server, database) = server().await;
    for _ in 0..5 {
        terminate_backends(&database).await;
        let mut client = server.client().await;
        eventually("requests succeed", async || {
            client.check_username(pb::CheckUsernameRequest { username: "bob".into() }).await.ok()
        })
        .await;
    }
    assert!(!server.log().contains("not ready"));
}

/// The settings for a PostgreSQL of the test's own.
fn own(dir: &TempDir) -> Database {
    Database { socket_dir: dir.path().into(), name: "postgres".into() }
}

async fn alter_system(database: &Database, what: &str) {
    let admin = database.connect().await;
    admin.batch_execute(&format!("alter system {what}")).await.unwrap();
    admin.batch_execute("select pg_reload_conf()").await.unwrap();
}

#[tokio::test]
async fn read_only_primary_is_not_ready_and_leaves_no_read_only_connection() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    let postgres = Embedded::start(dir.path()).await.unwrap();
    let database = own(&dir);
    let server = Server::start(&database, &[("POOL_SIZE", "5")]).await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    alter_system(&database, "set default_transaction_read_only = on").await;
    server.wait_until("", ServingStatus::NotServing).await;
    assert!(server.log().contains("the server is read-only"));
    let response = client.update_user(rename(&id, "New")).await;
    assert_rejected(response, Code::Unavailable, "DATABASE_UNAVAILABLE");
    client.get_user(by_id(&id)).await.unwrap();
    alter_system(&database, "reset default_transaction_read_only").await;
    server.wait_until("", ServingStatus::Serving).await;
    let writes = (0..10).map(|n| {
        let mut client = client.clone();
        async move { created(&mut client, &format!("user{n}")).await }
    });
    join_all(writes).await;
    drop(server);
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn service_on_a_standby_says_so_and_starts_when_it_is_promoted() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    let postgres = Embedded::start(dir.path()).await.unwrap();
    migrate::migrate(&postgres.config()).await.unwrap();
    postgres.stop().await.unwrap();
    drop(postgres);
    std::fs::write(dir.path().join("data/standby.signal"), "").unwrap();
    let postgres = Embedded::start(dir.path()).await.unwrap();
    let database = own(&dir);
    let server = Server::spawn(&[("DATABASE_URL", &database.url())]).await;
    eventually("it says so", async || server.log().contains("the server is a standby").then_some(())).await;
    assert_eq!(server.health("").await, Some(ServingStatus::NotServing));
    database.connect().await.batch_execute("select pg_promote()").await.unwrap();
    server.wait_until("", ServingStatus::Serving).await;
    created(&mut server.client().await, "alice").await;
    drop(server);
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn silent_first_host_does_not_keep_the_service_from_the_second() {
    let database = Database::migrated().await;
    // The kernel accepts the connections, and nothing answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let socket_dir = database.socket_dir.to_str().unwrap().replace('/', "%2F");
    for query in ["", "?target_session_attrs=read-write", "?connect_timeout=2"] {
        let url = format!("postgres://postgres@127.0.0.1:{port},{socket_dir}:5432/{}{query}", database.name);
        let server = Server::spawn(&[("DATABASE_URL", &url)]).await;
        server.wait_until("", ServingStatus::Serving).await;
        server.client().await.list_users(pb::ListUsersRequest::default()).await.unwrap();
    }
}

#[tokio::test]
async fn pooler_in_transaction_mode_is_rejected_at_the_start() {
    let database = Database::migrated().await;
    let pooler = transaction_pooler(&database).await;
    let behind = Database { socket_dir: pooler.path().into(), name: database.name.clone() };
    // It passes transactions on.
    assert_eq!(behind.count("select count(*) from users").await, 0);
    let mut server = Server::spawn(&[("DATABASE_URL", &behind.url())]).await;
    assert!(!server.ended().await.success());
    assert!(server.log().contains("connection pooler"), "{}", server.log());
}

/// Sessions of PostgreSQL that clients share: each transaction of a client runs in the session
/// that was used last.
#[derive(Clone, Default)]
struct Sessions(Arc<(Mutex<Vec<UnixStream>>, Notify)>);

impl Sessions {
    fn give_back(&self, session: UnixStream) {
        self.0.0.lock().unwrap().push(session);
        self.0.1.notify_one();
    }

    async fn take(&self) -> UnixStream {
        loop {
            let free = self.0.0.lock().unwrap().pop();
            match free {
                Some(session) => return session,
                None => self.0.1.notified().await,
            }
        }
    }
}

async fn transaction_pooler(upstream: &Database) -> TempDir {
    let dir = TempDir::with_prefix("pb-").unwrap();
    let listener = UnixListener::bind(dir.path().join(".s.PGSQL.5432")).unwrap();
    let target = upstream.socket_dir.join(".s.PGSQL.5432");
    let sessions = Sessions::default();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let session = UnixStream::connect(&target).await.unwrap();
            tokio::spawn(pool_transactions(client, session, sessions.clone()));
        }
    });
    dir
}

/// Serves a client, whose login opens one more session.
async fn pool_transactions(
    mut client: UnixStream,
    mut session: UnixStream,
    sessions: Sessions,
) -> std::io::Result<()> {
    let len = client.read_u32().await?;
    let mut startup = vec![0; len as usize - 4];
    client.read_exact(&mut startup).await?;
    session.write_u32(len).await?;
    session.write_all(&startup).await?;
    pass_answer(&mut session, &mut client).await?;
    sessions.give_back(session);
    loop {
        let first = read_message(&mut client).await?;
        let mut session = sessions.take().await;
        let mut message = first;
        loop {
            session.write_all(&message).await?;
            // The end of a transaction, if it is not in a block.
            if matches!(message[0], b'Q' | b'S') && pass_answer(&mut session, &mut client).await? == b'I' {
                break;
            }
            message = read_message(&mut client).await?;
        }
        sessions.give_back(session);
    }
}

/// Passes messages on until the session is ready for the next query. Returns its state.
async fn pass_answer(session: &mut UnixStream, client: &mut UnixStream) -> std::io::Result<u8> {
    loop {
        let message = read_message(session).await?;
        client.write_all(&message).await?;
        if message[0] == b'Z' {
            return Ok(message[5]);
        }
    }
}

async fn read_message(from: &mut UnixStream) -> std::io::Result<Vec<u8>> {
    let (kind, len) = (from.read_u8().await?, from.read_u32().await?);
    let mut message = [&[kind][..], &len.to_be_bytes()].concat();
    message.resize(len as usize + 1, 0);
    from.read_exact(&mut message[5..]).await?;
    Ok(message)
}

#[tokio::test]
async fn isolation_level_and_schema_do_not_depend_on_defaults_of_the_database() {
    let database = Database::migrated().await;
    let admin = database.connect().await;
    let defaults = format!(
        "alter database {0} set default_transaction_isolation = 'serializable';
         alter database {0} set search_path = other, public;
         create schema other;
         create table other.users (id integer)",
        database.name
    );
    admin.batch_execute(&defaults).await.unwrap();
    let server = Server::start(&database, &[]).await;
    let client = server.client().await;
    let id = created(&mut client.clone(), "alice").await.id;
    let holder = database.connect().await;
    let hold = "begin isolation level read committed; update public.users set display_name = 'Other'";
    holder.batch_execute(hold).await.unwrap();
    let call = tokio::spawn({
        let (mut client, id) = (client.clone(), id.clone());
        async move { client.update_user(rename(&id, "New")).await }
    });
    eventually("it waits for the row", async || (database.count(WAITING).await == 1).then_some(())).await;
    // What a serializable transaction has read.
    let serializable = "select count(*) from pg_locks join pg_stat_activity using (pid)
        where mode = 'SIReadLock' and datname = current_database()";
    assert_eq!(database.count(serializable).await, 0);
    holder.batch_execute("commit").await.unwrap();
    call.await.unwrap().unwrap();
    let tables = "select count(*) from pg_class where relname = 'users' or relname = 'user_feed'";
    assert_eq!(database.count(tables).await, 3);
}

#[tokio::test]
async fn commits_are_durable_unless_the_database_url_says_otherwise() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    let postgres = Embedded::start(dir.path()).await.unwrap();
    let database = own(&dir);
    let off = "alter role postgres set synchronous_commit = off";
    database.connect().await.batch_execute(off).await.unwrap();
    let server = Server::start(&database, &[]).await;
    let options = format!("{}?options=-csynchronous_commit%3Doff", database.url());
    let asynchronous = Server::spawn(&[("DATABASE_URL", &options)]).await;
    asynchronous.wait_until("", ServingStatus::Serving).await;
    // From now on a durable commit waits for a standby that is not there.
    alter_system(&database, "set synchronous_standby_names = 'missing'").await;
    created(&mut asynchronous.client().await, "alice").await;
    let mut client = server.client().await;
    let call = tokio::spawn(async move { client.create_user(create(user("bob"))).await });
    let waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
    eventually("the commit waits", async || (database.count(waiting).await == 1).then_some(())).await;
    alter_system(&database, "reset synchronous_standby_names").await;
    call.await.unwrap().unwrap();
    drop((server, asynchronous));
    postgres.stop().await.unwrap();
}

/// A new database with a role that is not a superuser, and its URL.
async fn with_plain_role() -> (Database, String) {
    let database = Database::empty().await;
    let role = format!("plain_{}", database.name);
    let sql = format!("create role {role} login; grant create on schema public to {role}");
    database.connect().await.batch_execute(&sql).await.unwrap();
    let url = database.url().replace("postgres://postgres", &format!("postgres://{role}"));
    (database, url)
}

#[tokio::test]
async fn server_that_does_not_tell_its_timeline_can_be_watched() {
    let (database, url) = with_plain_role().await;
    let admin = database.connect().await;
    admin.batch_execute("revoke execute on function pg_walfile_name(pg_lsn) from public").await.unwrap();
    let server = Server::spawn(&[("DATABASE_URL", &url)]).await;
    server.wait_until("", ServingStatus::Serving).await;
    let warning = "the server does not tell its timeline: resume tokens are valid until it is restarted";
    assert_eq!(logged(&server, warning), 1);
    let mut client = server.client().await;
    let page = client.list_users(pb::ListUsersRequest::default()).await.unwrap().into_inner();
    created(&mut client, "alice").await;
    let mut watch = Watch::resumed(&mut client, &page.watch_token).await.unwrap();
    watch.changes(1).await;
}

#[tokio::test]
async fn position_that_cannot_be_read_stops_the_start_and_costs_a_list_its_token_only() {
    let (database, url) = with_plain_role().await;
    let admin = database.connect().await;
    let server = Server::spawn(&[("DATABASE_URL", &url)]).await;
    server.wait_until("", ServingStatus::Serving).await;
    let mut client = server.client().await;
    created(&mut client, "alice").await;
    admin.batch_execute("revoke execute on function pg_control_system() from public").await.unwrap();
    let page = client.list_users(pb::ListUsersRequest::default()).await.unwrap().into_inner();
    assert_eq!((page.users.len(), page.watch_token.as_str()), (1, ""));
    let mut parts = client.export_users(pb::ExportUsersRequest::default()).await.unwrap().into_inner();
    let (mut users, mut token) = (0, String::new());
    while let Some(part) = parts.message().await.unwrap() {
        users += part.users.len();
        token.push_str(&part.watch_token);
    }
    assert_eq!((users, token.as_str()), (1, ""));

    let mut another = Server::spawn(&[("DATABASE_URL", &url)]).await;
    assert!(!another.ended().await.success());
    assert!(another.log().contains("pg_control_system"), "{}", another.log());
}

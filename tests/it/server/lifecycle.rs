//! Start, health, prefaces, and shutdown.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use user_service::store::dev_postgres::Embedded;

use crate::support::*;

/// Runs the binary; returns whether it succeeded, and its standard error.
fn run(args: &[&str], settings: &[(&str, &str)]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_user-service"));
    command.args(args).env_clear().envs(settings.iter().copied()).stdin(Stdio::null());
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test]
async fn service_without_a_database_is_live_and_becomes_ready_when_the_database_starts() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    let url = format!("postgres://postgres@{}/postgres", dir.path().to_str().unwrap().replace('/', "%2F"));
    let server = Server::spawn(&[("DATABASE_URL", &url)]).await;
    for (name, status) in [
        ("", ServingStatus::NotServing),
        ("users.v1.UserService", ServingStatus::NotServing),
        ("liveness", ServingStatus::Serving),
    ] {
        assert_eq!(server.health(name).await, Some(status), "{name}");
    }
    let status = server.client().await.get_user(by_id(&new_request_id())).await;
    assert_rejected(status, Code::Unavailable, "DATABASE_UNAVAILABLE");
    let postgres = Embedded::start(dir.path()).await.unwrap();
    server.wait_until("", ServingStatus::Serving).await;
    created(&mut server.client().await, "alice").await;
    drop(server);
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn sigterm_under_load_fails_no_accepted_request() {
    let database = Database::migrated().await;
    let mut server = Server::start(&database, &[("DRAIN_DELAY_MS", "100")]).await;
    // An idle connection must not delay shutdown.
    let mut idle = TcpStream::connect(&server.addr).await.unwrap();
    let writers = (0..16).map(|writer| {
        let addr = server.addr.clone();
        tokio::spawn(async move {
            let channel = tonic::transport::Channel::from_shared(format!("http://{addr}")).unwrap();
            let mut client = user_service::pb::user_service_client::UserServiceClient::new(
                channel.connect().await.unwrap(),
            );
            let mut acknowledged = Vec::new();
            for n in 0.. {
                let name = format!("w{writer}n{n}");
                let request = client.create_user(create(user(&name)));
                match tokio::time::timeout(Duration::from_secs(60), request).await {
                    Ok(Ok(response)) => acknowledged.push(response.into_inner().user.unwrap().username),
                    // The first request that is not accepted.
                    _ => return (acknowledged, format!("{SECRET}{name}")),
                }
            }
            unreachable!()
        })
    });
    let writers: Vec<_> = writers.collect();
    let rows = async || database.count("select count(*) from users").await;
    eventually("the writers write", async || (rows().await > 100).then_some(())).await;
    let started = Instant::now();
    server.signal("TERM");
    assert!(server.ended().await.success());
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    let mut total = 0;
    let admin = database.connect().await;
    for writer in join_all(writers).await {
        let (acknowledged, rejected) = writer.unwrap();
        total += acknowledged.len();
        // An accepted request would have created the user.
        let found = admin.query("select from users where username = $1", &[&rejected]).await.unwrap();
        assert_eq!(found.len(), 0, "{rejected} was accepted without a response");
    }
    assert_eq!(usize::try_from(rows().await).unwrap(), total);
    assert_eq!(idle.read(&mut [0]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn draining_service_is_not_ready_and_still_serves() {
    let database = Database::migrated().await;
    let mut server = Server::start(&database, &[("DRAIN_DELAY_MS", "600000")]).await;
    let mut client = server.client().await;
    let mut health = HealthClient::new(server.channel().await);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    // Neither the client nor the service ends this stream by itself.
    let mut reflection = ServerReflectionClient::new(server.channel().await);
    let reflection = reflection.server_reflection_info(futures_util::stream::pending()).await.unwrap();
    let mut reflection = reflection.into_inner();
    server.signal("TERM");
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(server.health("").await, Some(ServingStatus::NotServing));
    assert_eq!(server.health("liveness").await, Some(ServingStatus::Serving));
    created(&mut client, "alice").await;
    created(&mut server.client().await, "bob").await;
    // A second signal skips the drain delay, and the streams end.
    let signalled = Instant::now();
    server.signal("INT");
    assert!(!matches!(watch.message().await, Ok(Some(_))));
    assert!(!matches!(reflection.message().await, Ok(Some(_))));
    assert!(server.ended().await.success());
    assert!(signalled.elapsed() < Duration::from_secs(10), "{:?}", signalled.elapsed());
}

#[tokio::test]
async fn requests_are_cancelled_after_the_shutdown_grace_period() {
    let database = Database::migrated().await;
    let mut server = Server::start(&database, &[("SHUTDOWN_GRACE_MS", "100")]).await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    let blocked = tokio::spawn(async move { client.update_user(rename(&id, "New")).await });
    eventually("the statement waits for the row lock", async || {
        (database.count(WAITING).await == 1).then_some(())
    })
    .await;
    let signalled = Instant::now();
    server.signal("TERM");
    assert!(server.ended().await.success());
    // PostgreSQL may process the cancellation later.
    eventually("the statement is cancelled", async || (database.count(WAITING).await == 0).then_some(()))
        .await;
    assert!(signalled.elapsed() < Duration::from_secs(10), "{:?}", signalled.elapsed());
    blocked.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn connection_without_a_complete_preface_is_closed_after_a_timeout() {
    let (server, _) = server().await;
    let send = |text: &'static [u8]| {
        let addr = server.addr.clone();
        async move {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            stream.write_all(text).await.unwrap();
            stream.read(&mut [0]).await.unwrap_or(0)
        }
    };
    let ends = join_all([send(b""), send(b"P"), send(b"PRI * HTTP/2.0\r\n")]);
    assert_eq!(tokio::time::timeout(Duration::from_secs(60), ends).await.unwrap(), [0, 0, 0]);
    // A connection that is not HTTP/2 is closed at once.
    let mut stream = TcpStream::connect(&server.addr).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n").await.unwrap();
    let closed = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut Vec::new())).await;
    assert!(closed.is_ok());
    created(&mut server.client().await, "alice").await;
}

#[tokio::test]
async fn connection_without_a_preface_does_not_delay_shutdown() {
    let (mut server, _) = server().await;
    let _idle = TcpStream::connect(&server.addr).await.unwrap();
    // Connections are accepted in order, so this request proves that the first one was.
    server.client().await.get_user(by_id(&new_request_id())).await.unwrap_err();
    let signalled = Instant::now();
    server.signal("TERM");
    assert!(server.ended().await.success());
    assert!(signalled.elapsed() < Duration::from_secs(5), "{:?}", signalled.elapsed());
}

#[tokio::test]
async fn busy_pool_does_not_affect_readiness() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "2")]).await;
    let client = server.client().await;
    let id = created(&mut client.clone(), "alice").await.id;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    let requests: Vec<_> = (0..4)
        .map(|_| {
            let (mut client, id) = (client.clone(), id.clone());
            tokio::spawn(async move { client.update_user(rename(&id, "New")).await })
        })
        .collect();
    eventually("all connections wait for the row lock", async || {
        (database.count(WAITING).await == 2).then_some(())
    })
    .await;
    // There are two database checks a second: one would fail within three seconds.
    let mut health = HealthClient::new(server.channel().await);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    assert!(tokio::time::timeout(Duration::from_secs(3), watch.message()).await.is_err());
    holder.batch_execute("rollback").await.unwrap();
    assert!(join_all(requests).await.into_iter().all(|request| request.unwrap().is_ok()));
}

#[tokio::test]
async fn check_command_reports_readiness_by_its_exit_code() {
    let (mut server, database) = server().await;
    let addr = server.addr.clone();
    let by_name = addr.replace("127.0.0.1", "localhost");
    assert_eq!(run(&["check", "--addr", &by_name], &[]), (true, String::new()));
    assert_eq!(
        run(&["check", "--addr", &addr, "--service", "users.v1.UserService"], &[]),
        (true, String::new())
    );
    assert_eq!(run(&["check", "--service", "liveness"], &[("LISTEN_ADDR", &addr)]), (true, String::new()));
    assert!(!run(&["check", "--addr", &addr, "--service", "nope"], &[]).0);

    // An address in use is an error at start.
    let (is_ok, error) = run(&["serve"], &[("DATABASE_URL", &database.url()), ("LISTEN_ADDR", &addr)]);
    assert!(!is_ok && error.contains("cannot listen on"), "{error}");

    server.signal("TERM");
    assert!(server.ended().await.success());
    assert!(!run(&["check", "--addr", &addr], &[]).0);
}

//! The service comes when it can, says how it is, and goes without a bang.

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

/// Runs the binary to its end.
fn run(args: &[&str], settings: &[(&str, &str)]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_user-service"));
    command.args(args).env_clear().envs(settings.iter().copied()).stdin(Stdio::null());
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test]
async fn without_its_database_the_service_lives_is_not_ready_and_gets_ready_by_itself() {
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
    assert_refused(status, Code::Unavailable, "DATABASE_UNAVAILABLE");
    let postgres = Embedded::start(dir.path()).await.unwrap();
    server.wait_until("", ServingStatus::Serving).await;
    created(&mut server.client().await, "alice").await;
    drop(server);
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn sigterm_under_load_fails_no_call_that_was_accepted() {
    let database = Database::migrated().await;
    let mut server = Server::start(&database, &[("DRAIN_DELAY_MS", "100")]).await;
    // It never says a word, and must not keep the service.
    let mut silent = TcpStream::connect(&server.addr).await.unwrap();
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
                let call = client.create_user(create(user(&name)));
                match tokio::time::timeout(Duration::from_secs(60), call).await {
                    Ok(Ok(answer)) => acknowledged.push(answer.into_inner().user.unwrap().username),
                    // The first call that is not accepted.
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
        let (acknowledged, refused) = writer.unwrap();
        total += acknowledged.len();
        // Had it been accepted, it would be there.
        let found = admin.query("select from users where username = $1", &[&refused]).await.unwrap();
        assert_eq!(found.len(), 0, "{refused} was accepted and not answered");
    }
    assert_eq!(usize::try_from(rows().await).unwrap(), total);
    assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn while_it_drains_the_service_is_not_ready_and_still_serves() {
    let database = Database::migrated().await;
    let mut server = Server::start(&database, &[("DRAIN_DELAY_MS", "600000")]).await;
    let mut client = server.client().await;
    let mut health = HealthClient::new(server.channel().await);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    // A stream that neither side would ever end.
    let mut reflection = ServerReflectionClient::new(server.channel().await);
    let reflection = reflection.server_reflection_info(futures_util::stream::pending()).await.unwrap();
    let mut reflection = reflection.into_inner();
    server.signal("TERM");
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(server.health("").await, Some(ServingStatus::NotServing));
    assert_eq!(server.health("liveness").await, Some(ServingStatus::Serving));
    created(&mut client, "alice").await;
    created(&mut server.client().await, "bob").await;
    // A second signal skips the delay; the streams end.
    let asked = Instant::now();
    server.signal("INT");
    assert!(!matches!(watch.message().await, Ok(Some(_))));
    assert!(!matches!(reflection.message().await, Ok(Some(_))));
    assert!(server.ended().await.success());
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn what_does_not_finish_within_the_grace_is_cancelled() {
    let database = Database::migrated().await;
    let mut server = Server::start(&database, &[("SHUTDOWN_GRACE_MS", "100")]).await;
    let mut client = server.client().await;
    let id = created(&mut client, "alice").await.id;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    let stuck = tokio::spawn(async move { client.update_user(rename(&id, "New")).await });
    eventually("it waits for the row", async || (database.count(WAITING).await == 1).then_some(())).await;
    let asked = Instant::now();
    server.signal("TERM");
    assert!(server.ended().await.success());
    // The cancellation may still be on its way.
    eventually("so is its statement", async || (database.count(WAITING).await == 0).then_some(())).await;
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    stuck.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_at_once() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_CONNECTIONS", "3")]).await;
    // One more than there is room for is closed; the others wait for us to speak.
    let held: Vec<_> = join_all((0..4).map(|_| TcpStream::connect(&server.addr))).await;
    let mut held: Vec<_> = held.into_iter().map(Result::unwrap).collect();
    let ends = held.iter_mut().map(|stream| Box::pin(async { stream.read(&mut [0]).await.unwrap_or(0) }));
    let (read, _, others) = futures_util::future::select_all(ends).await;
    assert_eq!((read, others.len()), (0, 3));
    drop(others);
    held.clear();
    server.wait_until("", ServingStatus::Serving).await;
}

#[tokio::test]
async fn a_connection_that_says_too_little_is_closed_after_a_while() {
    let (server, _) = server().await;
    let talk = |text: &'static [u8]| {
        let addr = server.addr.clone();
        async move {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            stream.write_all(text).await.unwrap();
            stream.read(&mut [0]).await.unwrap_or(0)
        }
    };
    let ends = join_all([talk(b""), talk(b"P"), talk(b"PRI * HTTP/2.0\r\n")]);
    assert_eq!(tokio::time::timeout(Duration::from_secs(60), ends).await.unwrap(), [0, 0, 0]);
    // What is not HTTP/2 at all is closed at once.
    let mut stream = TcpStream::connect(&server.addr).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n").await.unwrap();
    let closed = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut Vec::new())).await;
    assert!(closed.is_ok());
    created(&mut server.client().await, "alice").await;
}

#[tokio::test]
async fn a_connection_that_has_not_spoken_yet_does_not_keep_the_service() {
    let (mut server, _) = server().await;
    let _silent = TcpStream::connect(&server.addr).await.unwrap();
    // Connections are accepted in their order.
    server.client().await.get_user(by_id(&new_request_id())).await.unwrap_err();
    let asked = Instant::now();
    server.signal("TERM");
    assert!(server.ended().await.success());
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn a_busy_pool_is_no_reason_not_to_be_ready() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "2")]).await;
    let client = server.client().await;
    let id = created(&mut client.clone(), "alice").await.id;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    let calls: Vec<_> = (0..4)
        .map(|_| {
            let (mut client, id) = (client.clone(), id.clone());
            tokio::spawn(async move { client.update_user(rename(&id, "New")).await })
        })
        .collect();
    eventually("all connections wait", async || (database.count(WAITING).await == 2).then_some(())).await;
    // The health is looked at twice a second; three seconds would show it.
    let mut health = HealthClient::new(server.channel().await);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    assert!(tokio::time::timeout(Duration::from_secs(3), watch.message()).await.is_err());
    holder.batch_execute("rollback").await.unwrap();
    assert!(join_all(calls).await.into_iter().all(|call| call.unwrap().is_ok()));
}

#[tokio::test]
async fn check_tells_a_container_whether_the_service_is_ready() {
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

    // The address is taken, which is an error of the start.
    let (is_ok, error) = run(&["serve"], &[("DATABASE_URL", &database.url()), ("LISTEN_ADDR", &addr)]);
    assert!(!is_ok && error.contains("cannot listen on"), "{error}");

    server.signal("TERM");
    assert!(server.ended().await.success());
    assert!(!run(&["check", "--addr", &addr], &[]).0);
}

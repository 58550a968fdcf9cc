//! Connections: their limit, which of them loses its place, their age, and probes beside them.

use std::time::Duration;

use futures_util::future::join_all;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::feed::watch::{Watch, insert};
use crate::support::*;

/// What an HTTP/2 client sends first: the preface, and empty SETTINGS.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Opens a connection and sends some bytes.
async fn connect(server: &Server, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(&server.addr).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream
}

/// Waits until the server closes a connection.
async fn closed(stream: &mut TcpStream) {
    let read_all = async { while let Ok(1..) = stream.read(&mut [0; 1024]).await {} };
    timeout(Duration::from_secs(60), read_all).await.expect("the connection stays open");
}

/// Whether a connection is open: the server answers a PING.
async fn is_open(stream: &mut TcpStream) -> bool {
    let mut received = Vec::new();
    let ping = b"\0\0\x08\x06\0\0\0\0\0zqzqping";
    if stream.write_all(ping).await.is_err() {
        return false;
    }
    let answered = async {
        while !received.windows(8).any(|window| window == b"zqzqping") {
            if !matches!(stream.read_buf(&mut received).await, Ok(1..)) {
                return false;
            }
        }
        true
    };
    timeout(Duration::from_secs(60), answered).await.unwrap()
}

/// Opens two connections, each with a watch. The second follows the watch of the first, because a
/// connection without a preface is the first to lose its place.
async fn busy_clients(server: &Server) -> (Vec<UserServiceClient<Channel>>, Vec<Watch>) {
    let (mut clients, mut watches) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let mut client = server.client().await;
        watches.push(Watch::from_now(&mut client).await);
        clients.push(client);
    }
    (clients, watches)
}

#[tokio::test]
async fn silent_connections_do_not_keep_a_client_out() {
    const SILENT: usize = 1500;
    let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).unwrap();
    for bytes in [b"".as_slice(), &PREFACE[..12], PREFACE] {
        let (server, _) = server().await;
        let mut silent = Vec::new();
        for _ in 0..SILENT {
            silent.push(connect(&server, bytes).await);
        }
        // As many as have a place stay open, so this client needs one of theirs.
        let mut client = server.client().await;
        created(&mut client, "alice").await;
        created(&mut server.client().await, "bob").await;
        // The oldest was the first to lose its place.
        closed(&mut silent[0]).await;
        if bytes == PREFACE {
            assert!(is_open(silent.last_mut().unwrap()).await);
        }
        created(&mut client, "carol").await;
    }
}

#[tokio::test]
async fn connection_beyond_the_limit_takes_the_place_of_the_one_that_is_idle_longest() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_CONNECTIONS", "3")]).await;
    // This one has a stream, so it is not idle.
    let mut busy = server.client().await;
    let mut watch = Watch::from_now(&mut busy).await;
    let mut first = connect(&server, PREFACE).await;
    assert!(is_open(&mut first).await);
    let mut second = connect(&server, PREFACE).await;
    assert!(is_open(&mut second).await);
    // A PING is no request: the first connection stays the one that is idle longest.
    assert!(is_open(&mut first).await);
    let mut third = connect(&server, PREFACE).await;
    assert!(is_open(&mut third).await);
    closed(&mut first).await;
    // A connection without a preface goes before all others.
    let mut silent = connect(&server, b"PRI").await;
    closed(&mut second).await;
    let mut fourth = connect(&server, PREFACE).await;
    assert!(is_open(&mut fourth).await);
    closed(&mut silent).await;
    assert!(is_open(&mut third).await);
    created(&mut busy, "alice").await;
    assert_eq!(watch.changes(1).await.len(), 1);
}

#[tokio::test]
async fn connection_beyond_the_limit_is_closed_if_none_is_idle() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_CONNECTIONS", "2")]).await;
    let (mut clients, mut watches) = busy_clients(&server).await;
    closed(&mut connect(&server, PREFACE).await).await;
    assert!(server.log().contains("connection limit reached"));
    created(&mut clients[0], "alice").await;
    for watch in &mut watches {
        assert_eq!(watch.changes(1).await.len(), 1);
    }
    // A stream that ends frees the place.
    drop(watches.pop());
    eventually("the connection is idle", async || server.health("").await).await;
}

#[tokio::test]
async fn connection_that_ends_within_the_preface_frees_its_place() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_CONNECTIONS", "2")]).await;
    let mut client = server.client().await;
    // While it has a request in flight, only the other place is left.
    let _watch = Watch::from_now(&mut client).await;
    for length in 1..24 {
        let mut half = connect(&server, &PREFACE[..length]).await;
        half.shutdown().await.unwrap();
        // The server closes its side at once, not after the timeout of 10 s.
        timeout(Duration::from_secs(5), closed(&mut half)).await.unwrap();
    }
    created(&mut server.client().await, "alice").await;
}

#[tokio::test]
async fn probe_is_answered_while_no_connection_is_free() {
    let database = Database::migrated().await;
    let settings =
        [("MAX_CONNECTIONS", "2"), ("MAX_REQUESTS_IN_FLIGHT", "4"), ("HEALTH_ADDR", "127.0.0.1:0")];
    let server = Server::start(&database, &settings).await;
    let _busy = busy_clients(&server).await;
    assert_eq!(server.health("").await, None);
    let addr = server.health_addr();
    for (name, status) in [
        ("", Some(ServingStatus::Serving)),
        ("users.v1.UserService", Some(ServingStatus::Serving)),
        ("liveness", Some(ServingStatus::Serving)),
        ("unknown", None),
    ] {
        assert_eq!(server.health_at(&addr, name).await, status, "{name}");
    }
    // There is nothing else at this address, and many connections do not keep a probe out.
    let channel = Channel::from_shared(format!("http://{addr}")).unwrap();
    let mut client = UserServiceClient::new(channel.connect().await.unwrap());
    let status = client.get_user(by_id(&new_request_id())).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    let silent = join_all((0..100).map(|_| TcpStream::connect(&addr))).await;
    assert_eq!(server.health_at(&addr, "liveness").await, Some(ServingStatus::Serving));
    drop(silent);
}

#[tokio::test]
async fn probe_is_answered_until_the_last_request_has_ended() {
    let database = Database::migrated().await;
    let settings = [("HEALTH_ADDR", "127.0.0.1:0"), ("SHUTDOWN_GRACE_MS", "600000")];
    let mut server = Server::start(&database, &settings).await;
    let addr = server.health_addr();
    let id = created(&mut server.client().await, "alice").await.id;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    let mut client = server.client().await;
    let request = tokio::spawn(async move { client.update_user(rename(&id, "New")).await });
    eventually("the statement waits for the row lock", async || {
        (database.count(WAITING).await == 1).then_some(())
    })
    .await;
    server.signal("TERM");
    eventually("the server accepts no clients", async || server.health("").await.is_none().then_some(()))
        .await;
    assert_eq!(server.health_at(&addr, "liveness").await, Some(ServingStatus::Serving));
    assert_eq!(server.health_at(&addr, "").await, Some(ServingStatus::NotServing));
    holder.batch_execute("rollback").await.unwrap();
    request.await.unwrap().unwrap();
    assert!(server.ended().await.success());
}

#[tokio::test]
async fn old_connection_ends_its_watches_and_finishes_its_other_streams() {
    let database = Database::migrated().await;
    insert(&database, "user", 10, 2_000).await;
    let settings = [("MAX_CONNECTION_AGE_MS", "1000"), ("MAX_CONNECTION_AGE_GRACE_MS", "600000")];
    let server = Server::start(&database, &settings).await;
    let mut client = narrow_client(&server).await;
    let mut watch = Watch::from_now(&mut client).await;
    let mut export = client.export_users(pb::ExportUsersRequest::default()).await.unwrap().into_inner();
    let channel = server.channel().await;
    let health = HealthClient::new(channel.clone()).watch(HealthCheckRequest::default()).await.unwrap();
    let reflection = ServerReflectionClient::new(channel)
        .server_reflection_info(futures_util::stream::pending())
        .await
        .unwrap();
    // The error tells the client to begin again, on a new connection.
    let ended = loop {
        if let Err(status) = watch.message().await {
            break assert_rejected(Err::<(), _>(status), Code::Unavailable, "SHUTTING_DOWN");
        }
    };
    assert!(ended.message().contains("reconnect"), "{ended:?}");
    let mut health = health.into_inner();
    let ended = loop {
        match health.message().await {
            Ok(message) => assert!(message.is_some()),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::Unavailable);
    assert_eq!(reflection.into_inner().message().await.unwrap_err().code(), Code::Unavailable);
    let mut exported = 0;
    while let Some(part) = export.message().await.unwrap() {
        exported += part.users.len();
    }
    assert_eq!(exported, 20_000);
}

#[tokio::test]
async fn old_connection_is_closed_after_the_grace_period() {
    let database = Database::migrated().await;
    insert(&database, "user", 10, 2_000).await;
    let settings = [
        ("MAX_CONNECTION_AGE_MS", "1000"),
        ("MAX_CONNECTION_AGE_GRACE_MS", "0"),
        ("REQUEST_TIMEOUT_MS", "1000"),
        ("MAX_EXPORTS", "1"),
    ];
    let server = Server::start(&database, &settings).await;
    let mut stalled = narrow_client(&server).await;
    let _unread = stalled.export_users(pb::ExportUsersRequest::default()).await.unwrap();
    let import = server.client().await.import_users(futures_util::stream::pending()).await.unwrap();
    let ended = import.into_inner().message().await;
    assert_rejected(ended, Code::Unavailable, "SHUTTING_DOWN");
    // The client still does not read, but it holds nothing any more.
    eventually("the export has ended", async || {
        server.client().await.export_users(pb::ExportUsersRequest::default()).await.ok()
    })
    .await;
}

#[tokio::test]
async fn request_outlives_the_age_of_its_connection() {
    let database = Database::migrated().await;
    let settings = [
        ("MAX_CONNECTION_AGE_MS", "1000"),
        ("MAX_CONNECTION_AGE_GRACE_MS", "0"),
        ("LOCK_TIMEOUT_MS", "60000"),
        ("REQUEST_TIMEOUT_MS", "60000"),
    ];
    let server = Server::start(&database, &settings).await;
    let id = created(&mut server.client().await, "alice").await.id;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    let mut client = server.client().await;
    let call = tokio::spawn(async move { client.update_user(rename(&id, "New")).await });
    eventually("the request waits for the row", async || (database.count(WAITING).await == 1).then_some(()))
        .await;
    // Three younger connections get old meanwhile.
    for _ in 0..3 {
        let mut watch = Watch::from_now(&mut server.client().await).await;
        while watch.message().await.is_ok() {}
    }
    holder.batch_execute("rollback").await.unwrap();
    assert_eq!(call.await.unwrap().unwrap().into_inner().user.unwrap().revision, 2);
}

#[tokio::test]
async fn requests_beyond_the_limit_of_all_connections_are_rejected() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_REQUESTS_IN_FLIGHT", "8")]).await;
    let mut client = server.client().await;
    let mut watches = Vec::new();
    let rejected = loop {
        match Watch::open(&mut client, pb::WatchUsersRequest::default()).await {
            Ok(watch) => watches.push(watch),
            Err(status) => break status,
        }
    };
    assert_rejected(Err::<(), _>(rejected), Code::Unavailable, "OVERLOADED");
    // A connection gets as many as it leaves for all others.
    assert_eq!(watches.len(), 4);
    let mut other = server.client().await;
    created(&mut other, "alice").await;
    let status = client.get_user(by_username("zqzqalice")).await;
    assert_rejected(status, Code::Unavailable, "OVERLOADED");
    for watch in &mut watches {
        assert_eq!(watch.changes(1).await.len(), 1);
    }
    drop(watches);
    eventually("the requests have ended", async || client.get_user(by_username("zqzqalice")).await.ok())
        .await;
}

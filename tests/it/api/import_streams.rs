//! ImportUsers as a stream: flow control, limits, faults and shutdown.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, future::join_all, stream};
use tokio::sync::mpsc;
use tonic::{Code, Streaming, transport::Channel};
use user_service::pb::{
    self, ImportMode, ImportUsersRequest, ImportUsersResponse, user_service_client::UserServiceClient,
};

use crate::api::import::{UNCOMMITTED, chunk, counts, get, import, import_one, some_users};
use crate::support::*;

/// A stream of chunks, and a counter of the chunks that were read from it.
fn counted(
    chunks: impl Iterator<Item = ImportUsersRequest> + Send + 'static,
) -> (impl futures_util::Stream<Item = ImportUsersRequest> + Send, Arc<AtomicUsize>) {
    let read = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&read);
    (stream::iter(chunks.inspect(move |_| _ = count.fetch_add(1, Ordering::Relaxed))), read)
}

/// All acknowledgements of a stream that must end with success.
async fn all(mut acks: Streaming<ImportUsersResponse>) -> Vec<ImportUsersResponse> {
    let mut all = Vec::new();
    while let Some(ack) = acks.message().await.unwrap() {
        all.push(ack);
    }
    all
}

#[tokio::test]
async fn client_faster_than_the_database_is_held_back() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    let holder = database.connect().await;
    holder.batch_execute(&UNCOMMITTED.replace("zqzqc5", "zqzqn1x0")).await.unwrap();
    let id = new_request_id();
    // Chunks of 500 kB, most of it a rejected user.
    let chunks = (1..=60).map(move |number| {
        let mut users = some_users(&format!("n{number}x"), 1);
        users.push(pb::User { display_name: "x".repeat(500_000), ..user("large") });
        chunk(&id, number, ImportMode::CreateOnly, users)
    });
    let (requests, read) = counted(chunks);
    let acks = client.import_users(requests).await.unwrap().into_inner();
    eventually("the chunk waits", async || (database.count(WAITING).await == 1).then_some(())).await;
    // Other requests are not held back.
    let other = server.client().await;
    join_all((0..20).map(|n| {
        let mut other = other.clone();
        async move { created(&mut other, &format!("other{n}")).await }
    }))
    .await;
    let read = read.load(Ordering::Relaxed);
    assert!((1..20).contains(&read), "{read} chunks were read from the client");
    holder.batch_execute("rollback").await.unwrap();
    let acks = all(acks).await;
    assert_eq!(acks.len(), 60);
    assert!(acks.iter().all(|ack| counts(ack) == (1, 0, 0)));
}

#[tokio::test]
async fn chunks_with_a_common_user_are_written_in_the_order_of_the_stream() {
    let (server, database) = server().await;
    let client = server.client().await;
    let id = new_request_id();
    // A small chunk follows each large one, which takes longer.
    let chunks = (1..=60).map(|number| {
        let alice = pb::User { display_name: format!("Alice {number}"), ..user("alice") };
        let mut users = if number % 2 == 0 { Vec::new() } else { some_users(&format!("n{number}x"), 300) };
        users.push(alice);
        chunk(&id, number, ImportMode::Overwrite, users)
    });
    let (acks, end) = import(&client, chunks.collect()).await;
    assert!(end.is_none(), "{end:?}");
    assert_eq!(acks.iter().map(|ack| ack.chunk).collect::<Vec<_>>(), (1..=60).collect::<Vec<_>>());
    assert_eq!(acks.iter().map(|ack| ack.updated).sum::<i32>(), 59);
    let alice = get(&client, "alice").await;
    assert_eq!((alice.revision, alice.display_name.as_str()), (60, "Alice 60"));
    assert_eq!(database.count("select count(*) from users").await, 1 + 30 * 300);
}

#[tokio::test]
async fn unread_acknowledgements_keep_no_connection_of_the_pool() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("POOL_SIZE", "1"), ("POOL_ACQUIRE_TIMEOUT_MS", "2000")]).await;
    let (id, mut client) = (new_request_id(), server.client().await);
    // All users are rejected, so the acknowledgements are large, but not so large that each is
    // sent at once.
    let chunks = (1..=1_000)
        .map(move |number| chunk(&id, number, ImportMode::CreateOnly, vec![pb::User::default(); 100]));
    let acks = client.import_users(stream::iter(chunks)).await.unwrap().into_inner();
    let written = async || database.count("select count(*) from import_chunks").await;
    let (mut before, mut unchanged) = (0, 0);
    eventually("the import makes no progress", async || {
        let now = written().await;
        unchanged = if now == before && now > 0 { unchanged + 1 } else { 0 };
        before = now;
        (unchanged == 50).then_some(())
    })
    .await;
    assert!(before < 1_000, "the import is not held back");
    created(&mut server.client().await, "alice").await;
    assert_eq!(all(acks).await.len(), 1_000);
}

/// A client of an import that closes its connection when it is dropped.
struct DisconnectingClient(Option<tokio::runtime::Runtime>);

impl DisconnectingClient {
    async fn new(
        server: &Server,
        requests: impl futures_util::Stream<Item = ImportUsersRequest> + Send + 'static,
    ) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let channel = Channel::from_shared(format!("http://{}", server.addr)).unwrap();
        let importing = async move {
            let mut client = UserServiceClient::new(channel.connect().await.unwrap());
            client.import_users(requests).await.unwrap()
        };
        // The stream of acknowledgements must stay open.
        std::mem::forget(runtime.spawn(importing).await.unwrap());
        Self(Some(runtime))
    }
}

impl Drop for DisconnectingClient {
    fn drop(&mut self) {
        self.0.take().unwrap().shutdown_background();
    }
}

#[tokio::test]
async fn import_beyond_the_limit_is_rejected_with_the_limit() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_IMPORTS", "2")]).await;
    let mut client = server.client().await;
    let mut imports = Vec::new();
    for _ in 0..2 {
        imports.push(DisconnectingClient::new(&server, stream::pending()).await);
    }
    let response = client.import_users(stream::pending::<ImportUsersRequest>()).await;
    let status = assert_rejected(response, Code::Unavailable, "OVERLOADED");
    assert!(status.message().contains("2 imports"), "{status:?}");
    drop(imports.pop());
    let again = async || client.clone().import_users(stream::empty::<ImportUsersRequest>()).await.ok();
    eventually("a new import is accepted", again).await;
}

#[tokio::test]
async fn idle_import_is_ended_and_releases_its_permit() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("MAX_IMPORTS", "1"), ("IMPORT_IDLE_TIMEOUT_MS", "1000")]).await;
    let mut client = server.client().await;
    for number in 1..=2 {
        let first =
            chunk(&new_request_id(), 1, ImportMode::CreateOnly, some_users(&format!("c{number}n"), 5));
        let chunks = stream::iter([first]).chain(stream::pending());
        let mut acks = client.import_users(chunks).await.unwrap().into_inner();
        assert_eq!(acks.message().await.unwrap().unwrap().created, 5);
        let end = tokio::time::timeout(Duration::from_secs(60), acks.message()).await.unwrap();
        assert_rejected(end, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    }
}

#[tokio::test]
async fn stopping_server_ends_its_imports_with_an_error() {
    let database = Database::migrated().await;
    let id = new_request_id();
    let chunks = move || {
        (1..=400).map({
            let id = id.clone();
            move |number| chunk(&id, number, ImportMode::CreateOnly, some_users(&format!("c{number}n"), 5))
        })
    };
    let mut next = 1;
    // Once while the client sends, once while the server waits for the next chunk.
    for is_waiting in [false, true] {
        let mut server = Server::start(&database, &[]).await;
        let mut client = server.client().await;
        let (sender, receiver) = mpsc::channel(1);
        let requests = stream::unfold(receiver, async |mut r| r.recv().await.map(|c| (c, r)));
        let mut acks = client.import_users(requests).await.unwrap().into_inner();
        let rest: Vec<_> = chunks().skip(next - 1).take(if is_waiting { 3 } else { 400 }).collect();
        let sending = tokio::spawn(async move {
            for chunk in rest {
                if sender.send(chunk).await.is_err() {
                    break;
                }
            }
            sender
        });
        let mut stopped = false;
        let status = loop {
            match acks.message().await {
                Ok(Some(ack)) => {
                    assert_eq!(ack.chunk, next as i64);
                    next += 1;
                    if !stopped && (!is_waiting || next % 3 == 0) {
                        server.signal("TERM");
                        stopped = true;
                    }
                }
                Ok(None) => panic!("the stream is complete after {next} chunks"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert_eq!(reason(&status), "SHUTTING_DOWN");
        assert!(server.ended().await.success());
        drop(sending);
    }
    // The acknowledged chunks were written, and the rest can follow.
    let server = Server::start(&database, &[]).await;
    let acks = all(server
        .client()
        .await
        .import_users(stream::iter(chunks().skip(next - 1)))
        .await
        .unwrap()
        .into_inner())
    .await;
    assert_eq!(acks.len(), 401 - next);
    assert_eq!(database.count("select count(*) from users").await, 2000);
    assert_eq!(database.count("select count(*) from user_changes").await, 2000);
}

/// The sessions of [`WAITING`] that have just started to wait. A chunk waits for a second at a
/// time, so there is enough time left for the test.
fn just_waiting() -> String {
    format!("{WAITING} and clock_timestamp() - query_start < '0.5 s'")
}

#[tokio::test]
async fn disconnected_import_leaves_no_partial_chunk() {
    let (server, database) = server().await;
    let holder = database.connect().await;
    holder.batch_execute(UNCOMMITTED).await.unwrap();
    let request = chunk(&new_request_id(), 1, ImportMode::CreateOnly, some_users("c", 10));
    let client = DisconnectingClient::new(&server, stream::iter([request]).chain(stream::pending())).await;
    eventually("the chunk waits", async || (database.count(&just_waiting()).await == 1).then_some(())).await;
    drop(client);
    let is_cancelled = async || server.log().contains("statement cancelled").then_some(());
    eventually("the statement is cancelled", is_cancelled).await;
    eventually("the statement has ended", async || (database.count(WAITING).await == 0).then_some(())).await;
    holder.batch_execute("rollback").await.unwrap();
    let rows = "select (select count(*) from users) + (select count(*) from import_chunks)";
    assert_eq!(database.count(rows).await, 0);
}

#[tokio::test]
async fn import_that_loses_its_database_ends_with_an_error_and_can_be_repeated() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[]).await;
    let client = server.client().await;
    let holder = database.connect().await;
    holder.batch_execute(UNCOMMITTED).await.unwrap();
    let id = new_request_id();
    let chunks = vec![
        chunk(&id, 1, ImportMode::CreateOnly, some_users("b", 10)),
        chunk(&id, 2, ImportMode::CreateOnly, some_users("c", 10)),
    ];
    let mut acks = client.clone().import_users(stream::iter(chunks.clone())).await.unwrap().into_inner();
    assert_eq!(acks.message().await.unwrap().map(|ack| ack.chunk), Some(1));
    eventually("the chunk waits", async || (database.count(&just_waiting()).await == 1).then_some(())).await;
    proxy.cut();
    assert_rejected(acks.message().await, Code::Unavailable, "OUTCOME_UNKNOWN");
    holder.batch_execute("rollback").await.unwrap();
    let retry = async || {
        let (acks, status) = import(&client, chunks.clone()).await;
        status.is_none().then_some(acks)
    };
    let again = eventually("the repeated import succeeds", retry).await;
    assert_eq!(again.iter().map(counts).collect::<Vec<_>>(), [(10, 0, 0); 2]);
    assert_eq!(database.count("select count(*) from users").await, 20);
}

/// A chunk waits for a lock for a second at a time, so that other requests are not blocked.
#[tokio::test]
async fn chunk_that_waits_too_long_is_aborted_and_can_be_sent_again() {
    let (server, database) = server().await;
    let client = server.client().await;
    let holder = database.connect().await;
    holder.batch_execute(UNCOMMITTED).await.unwrap();
    let request = chunk(&new_request_id(), 1, ImportMode::CreateOnly, some_users("c", 10));
    let started = std::time::Instant::now();
    let (acks, status) = import(&client, vec![request.clone()]).await;
    assert!(acks.is_empty() && started.elapsed() > Duration::from_secs(1));
    assert_rejected(status.map_or(Ok(()), Err), Code::Aborted, "TRANSACTION_CONFLICT");
    holder.batch_execute("rollback").await.unwrap();
    assert_eq!(counts(&import_one(&client, request).await), (10, 0, 0));
}

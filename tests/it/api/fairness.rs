//! Connections share queues: many requests of one do not delay a few of another.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use futures_util::future::join_all;
use tokio::task::JoinHandle;
use tonic::{Code, transport::Channel};
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::support::*;

/// The requests of the connection that floods the service.
const FLOOD: usize = 600;

/// A server with a user, and a pool whose statements get no response until the proxy releases them.
async fn stalled_server(settings: &[(&str, &str)]) -> (Server, pb::User, Proxy) {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let settings = [&[("REQUEST_COALESCING", "on"), ("POOL_SIZE", "2")], settings].concat();
    let server = Server::start(&proxy.database(), &settings).await;
    let user = created(&mut server.client().await, "alice").await;
    proxy.hold_responses();
    (server, user, proxy)
}

fn list() -> pb::ListUsersRequest {
    pb::ListUsersRequest { page_size: 1, ..Default::default() }
}

/// Waits until the server has received the requests of the tasks that were spawned before. A
/// request behind them on the connection, which needs no statement, has its response then.
async fn received(client: &UserServiceClient<Channel>) {
    let mut client = client.clone();
    let request = pb::CheckUsernameRequest { username: "\u{7}".into() };
    let behind = tokio::spawn(async move { client.check_username(request).await });
    behind.await.unwrap().unwrap();
}

#[tokio::test]
async fn lists_of_one_connection_do_not_delay_a_list_of_another() {
    let (server, _, proxy) = stalled_server(&[]).await;
    let flood = server.client().await;
    let done = Arc::new(AtomicUsize::new(0));
    let calls: Vec<JoinHandle<()>> = (0..FLOOD)
        .map(|_| {
            let (mut client, done) = (flood.clone(), Arc::clone(&done));
            tokio::spawn(async move {
                client.list_users(list()).await.unwrap();
                done.fetch_add(1, Ordering::SeqCst);
            })
        })
        .collect();
    received(&flood).await;
    let other = server.client().await;
    let response = tokio::spawn({
        let mut client = other.clone();
        async move { client.list_users(list()).await }
    });
    received(&other).await;
    proxy.release_responses();
    response.await.unwrap().unwrap();
    let done = done.load(Ordering::SeqCst);
    assert!(done < FLOOD / 2, "{done} of {FLOOD} lists were served first");
    join_all(calls).await.into_iter().for_each(Result::unwrap);
}

#[tokio::test]
async fn full_queue_rejects_the_connection_with_the_most_requests() {
    let (server, user, proxy) = stalled_server(&[("MAX_QUEUED_REQUESTS", "100")]).await;
    let (flood, mut other) = (server.client().await, server.client().await);
    let get = by_id(&user.id);
    let calls: Vec<_> = (0..FLOOD)
        .map(|_| {
            let (mut client, get) = (flood.clone(), get.clone());
            tokio::spawn(async move { client.get_user(get).await })
        })
        .collect();
    let is_full = async || calls.iter().any(JoinHandle::is_finished).then_some(());
    eventually("a request is rejected", is_full).await;
    let response = tokio::spawn(async move { other.get_user(get).await });
    proxy.release_responses();
    assert_eq!(response.await.unwrap().unwrap().into_inner().user, Some(user));
    for response in join_all(calls).await {
        if let Err(status) = response.unwrap() {
            assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "OVERLOADED"));
        }
    }
}

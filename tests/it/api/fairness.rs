//! Connections share queues: many requests of one do not delay a few of another.

use futures_util::future::join_all;
use tokio::task::JoinHandle;
use tonic::{Code, transport::Channel};
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::support::*;

/// The requests of the connection that floods the service.
const FLOOD: usize = 100;

/// A server with a user, and a pool whose statements get no response until the proxy releases
/// them. It has one permit for reads that are not coalesced.
async fn stalled_server(settings: &[(&str, &str)]) -> (Server, pb::User, Proxy) {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let settings = [&[("REQUEST_COALESCING", "on"), ("POOL_SIZE", "2")], settings].concat();
    let server = Server::start(&proxy.database(), &settings).await;
    let user = created(&mut server.client().await, "alice").await;
    proxy.hold_responses();
    (server, user, proxy)
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
async fn lists_of_one_connection_do_not_delay_a_lookup_of_another() {
    let (server, user, proxy) = stalled_server(&[]).await;
    let flood = server.client().await;
    let calls: Vec<_> = (0..FLOOD)
        .map(|_| {
            let mut client = flood.clone();
            let list = pb::ListUsersRequest { page_size: 1, ..Default::default() };
            tokio::spawn(async move { client.list_users(list).await })
        })
        .collect();
    received(&flood).await;
    let other = server.client().await;
    let response = tokio::spawn({
        let mut client = other.clone();
        let keys = vec![pb::UserKey { key: Some(pb::user_key::Key::Id(user.id)) }];
        async move { client.lookup_users(pb::LookupUsersRequest { keys, ..Default::default() }).await }
    });
    received(&other).await;
    proxy.release_responses();
    response.await.unwrap().unwrap();
    for response in join_all(calls).await {
        response.unwrap().unwrap();
    }
    // The server logs each request when it has responded.
    let log = server.log();
    let (before, _) = log.split_once("users.v1.UserService/LookupUsers").unwrap();
    let lists = before.matches("users.v1.UserService/ListUsers").count();
    assert!(lists < FLOOD / 2, "{lists} of {FLOOD} lists were served first");
}

#[tokio::test]
async fn writes_that_wait_for_locks_do_not_delay_reads() {
    let database = Database::migrated().await;
    let settings = [("REQUEST_COALESCING", "on"), ("POOL_SIZE", "4"), ("LOCK_TIMEOUT_MS", "60000")];
    let server = Server::start(&database, &settings).await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    let holder = database.connect().await;
    holder.batch_execute("begin; select from users for update").await.unwrap();
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let (mut client, request) = (client.clone(), expunge(&alice.id));
            tokio::spawn(async move { client.expunge_user(request).await })
        })
        .collect();
    received(&client).await;
    let list = client.list_users(pb::ListUsersRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.users, std::slice::from_ref(&alice));
    let user = client.get_user(by_id(&alice.id)).await.unwrap().into_inner().user.unwrap();
    assert_eq!(user, alice);
    assert!(calls.iter().all(|call| !call.is_finished()));
    holder.batch_execute("rollback").await.unwrap();
    let responses = join_all(calls).await.into_iter().map(Result::unwrap);
    assert_eq!(responses.filter(Result::is_ok).count(), 1);
}

#[tokio::test]
async fn full_queue_rejects_the_connection_with_the_most_requests() {
    let (server, user, proxy) = stalled_server(&[("MAX_QUEUED_REQUESTS", "20")]).await;
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

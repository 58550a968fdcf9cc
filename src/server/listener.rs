//! The accept loop: connection limit, and shutdown with a grace period.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet, time};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::server::connection::{ConnectionContext, serve_connection};
use crate::server::dispatch::{Dispatcher, NamedService};

/// The pause after a failed accept. The usual cause is a lack of file descriptors,
/// and an immediate retry fails again.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Accepts connections until `shutdown`. Requests in flight then have the grace period
/// to finish; the rest is dropped.
pub async fn serve(
    listener: TcpListener,
    services: Vec<NamedService>,
    config: &Config,
    shutdown: CancellationToken,
) {
    let context = Arc::new(ConnectionContext {
        dispatcher: Arc::new(Dispatcher {
            services,
            request_timeout: Duration::from_millis(config.request_timeout_ms),
            shutdown: shutdown.clone(),
        }),
        max_streams: u32::try_from(config.max_streams_per_connection).ok(),
        max_age: Duration::from_millis(config.max_connection_age_ms),
        shutdown: shutdown.clone(),
        next_id: AtomicU64::new(1),
    });
    let permits = Arc::new(Semaphore::new(config.max_connections));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = shutdown.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                time::sleep(ACCEPT_RETRY_DELAY).await;
                continue;
            }
        };
        // A closed connection is better than a waiting one: the client can try
        // another replica.
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            tracing::warn!(max_connections = config.max_connections, "connection limit reached");
            continue;
        };
        let context = Arc::clone(&context);
        connections.spawn(async move {
            serve_connection(stream, context).await;
            drop(permit);
        });
    }
    // New connections are refused from here on.
    drop(listener);
    let grace = Duration::from_millis(config.shutdown_grace_ms);
    if time::timeout(grace, async { while connections.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!(connections = connections.len(), "shutdown grace period exceeded");
    }
    connections.shutdown().await;
}

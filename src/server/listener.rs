//! The accept loop: connection limit, and shutdown with a grace period.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    task::{self, JoinError, JoinSet},
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::limits::ConnectionId;
use crate::server::connection::{ConnectionContext, serve_connection};
use crate::server::dispatch::{Dispatcher, NamedService};
use crate::server::state::{ConnectionState, RequestLimits, ServerState};

/// The pause after a failed accept. The usual cause is a lack of file descriptors,
/// and an immediate retry fails again.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// The time between two warnings that the connection limit is reached.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);
/// One in so many places may go to connections that have sent no preface, while other idle
/// connections lose theirs.
const SILENT_SHARE: usize = 8;

/// Connections of the health listener, which has no other use than a probe now and then.
const HEALTH_CONNECTIONS: usize = 64;
/// How long the last probe may take at shutdown.
const HEALTH_SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// What a listener allows.
#[derive(Debug, Clone, Copy)]
pub struct ListenerLimits {
    max_connections: usize,
    max_streams_per_connection: u32,
    requests: RequestLimits,
    max_connection_age: Duration,
    max_connection_age_grace: Duration,
    shutdown_grace: Duration,
}

impl ListenerLimits {
    /// The limits of the listener for clients.
    pub fn for_clients(config: &Config) -> Self {
        Self {
            max_connections: config.max_connections,
            max_streams_per_connection: config.max_streams_per_connection,
            requests: RequestLimits {
                max_requests: config.max_requests_in_flight,
                max_bytes: config.max_bytes_in_flight,
                max_bytes_per_connection: config.max_bytes_per_connection,
                timeout: Duration::from_millis(config.request_timeout_ms),
                stream_read_timeout: Duration::from_millis(config.stream_read_timeout_ms),
            },
            max_connection_age: Duration::from_millis(config.max_connection_age_ms),
            // Requests that are no streams have the time that they would have anyway.
            max_connection_age_grace: Duration::from_millis(
                config.max_connection_age_grace_ms.max(config.request_timeout_ms),
            ),
            shutdown_grace: Duration::from_millis(config.shutdown_grace_ms),
        }
    }

    /// The limits of the listener for probes.
    pub fn for_probes(config: &Config) -> Self {
        Self {
            max_connections: HEALTH_CONNECTIONS,
            shutdown_grace: HEALTH_SHUTDOWN_GRACE,
            ..Self::for_clients(config)
        }
    }
}

/// Accepts connections until `shutdown`. Requests in flight then have the grace period
/// to finish; the rest is dropped.
pub async fn serve(
    listener: TcpListener,
    services: Vec<NamedService>,
    limits: ListenerLimits,
    shutdown: CancellationToken,
) {
    let server = Arc::new(ServerState::new(limits.requests));
    let request_timeout = limits.requests.timeout;
    let context = Arc::new(ConnectionContext {
        dispatcher: Dispatcher { services, request_timeout, shutdown: shutdown.clone() },
        max_streams: limits.max_streams_per_connection,
        max_age: limits.max_connection_age,
        max_age_grace: limits.max_connection_age_grace,
        shutdown: shutdown.clone(),
    });
    let mut tasks = JoinSet::new();
    // The connections that have a place. One that has lost it soon ends.
    let mut places = HashMap::new();
    let mut warned: Option<Instant> = None;
    let mut ids = (1..).map(ConnectionId);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(ended) = tasks.join_next_with_id() => {
                places.remove(&id_of(ended));
                continue;
            }
            () = shutdown.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                evict(&mut places);
                time::sleep(ACCEPT_RETRY_DELAY).await;
                continue;
            }
        };
        while let Some(ended) = tasks.try_join_next_with_id() {
            places.remove(&id_of(ended));
        }
        if places.len() >= limits.max_connections {
            if warned.is_none_or(|warned| warned.elapsed() > WARNING_INTERVAL) {
                warned = Some(Instant::now());
                tracing::warn!(max_connections = limits.max_connections, "connection limit reached");
            }
            // A closed connection is better than a waiting one: the client can try
            // another replica.
            if !evict(&mut places) {
                continue;
            }
        }
        let id = ids.next().unwrap_or_default();
        let state = Arc::new(ConnectionState::new(id, Arc::clone(&server), &shutdown));
        let task = tasks.spawn(serve_connection(stream, Arc::clone(&context), Arc::clone(&state)));
        places.insert(task.id(), state);
    }
    // New connections are refused from here on.
    drop(listener);
    if time::timeout(limits.shutdown_grace, async { while tasks.join_next().await.is_some() {} })
        .await
        .is_err()
    {
        tracing::warn!(connections = tasks.len(), "shutdown grace period exceeded");
    }
    tasks.shutdown().await;
}

/// Takes the place of the connection that has been idle longest. `false` if none is idle.
///
/// Connections that have sent no preface lose their places first, but only those beyond a
/// share: a new client needs a moment until its preface is here. So silent connections take
/// no places from idle clients, and idle connections keep no new client out.
fn evict(places: &mut HashMap<task::Id, Arc<ConnectionState>>) -> bool {
    let silent = places.values().filter(|state| !state.has_preface()).count();
    let is_preferred =
        |state: &ConnectionState| state.has_preface() != (silent * SILENT_SHARE > places.len());
    // A connection that gets a request meanwhile is not idle any more.
    while let Some((_, _, _, id)) = places
        .iter()
        .filter_map(|(id, state)| Some((!is_preferred(state), state.idle_since()?, state.id, *id)))
        .min()
    {
        if places.get(&id).is_some_and(|state| state.evict()) {
            places.remove(&id);
            return true;
        }
    }
    false
}

fn id_of(ended: Result<(task::Id, ()), JoinError>) -> task::Id {
    match ended {
        Ok((id, ())) => id,
        Err(error) => error.id(),
    }
}

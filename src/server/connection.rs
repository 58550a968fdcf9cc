//! One connection: preface, HTTP/2 settings, connection age.

use std::{
    convert::Infallible,
    hash::{BuildHasher, RandomState},
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt;
use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpStream, time};
use tokio_util::sync::CancellationToken;

use crate::limits::ConnectionId;
use crate::server::dispatch::Dispatcher;
use crate::server::executor::{ConnectionExecutor, with_executor};

/// How long a new connection may take to send the HTTP/2 preface.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// The length of the preface in bytes (RFC 9113, section 3.4).
const PREFACE_SIZE: usize = 24;
/// How often to check for the rest of a preface that arrives in pieces.
const PREFACE_POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long a connection may be silent before the server sends a PING.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
/// How long the client may take to acknowledge the PING.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How many streams a client may open and reset before its connection is closed.
const MAX_PENDING_RESETS: usize = 20;
/// How many streams the server may reset because of protocol errors before it closes
/// the connection. This is hyper's default; tonic's own server turns it off
/// (RUSTSEC-2024-0003).
const MAX_ERROR_RESETS: usize = 1024;
/// The most that the headers of a request may take.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// How much of a response is buffered, in addition to one message, when the client
/// does not read.
const MAX_SEND_BUFFER_BYTES: usize = 32 * 1024;

/// What all connections share.
pub(super) struct ConnectionContext {
    pub(super) dispatcher: Arc<Dispatcher>,
    /// HTTP/2 streams, that is requests in flight, on one connection.
    pub(super) max_streams: Option<u32>,
    pub(super) max_age: Duration,
    pub(super) shutdown: CancellationToken,
    /// The number of the next connection.
    pub(super) next_id: AtomicU64,
}

/// Serves a connection together with its requests, in the caller's task.
pub(super) async fn serve_connection(stream: TcpStream, context: Arc<ConnectionContext>) {
    with_executor(|executor| serve_http2(stream, executor, context)).await;
}

async fn serve_http2(stream: TcpStream, executor: ConnectionExecutor, context: Arc<ConnectionContext>) {
    let shutdown = &context.shutdown;
    tokio::select! {
        preface = time::timeout(PREFACE_TIMEOUT, has_preface(&stream)) => {
            if !matches!(preface, Ok(Ok(true))) {
                return;
            }
        }
        () = shutdown.cancelled() => return,
    }
    // Nagle's algorithm would hold back a small response until the previous one is
    // acknowledged.
    let _ = stream.set_nodelay(true);
    let id = ConnectionId(context.next_id.fetch_add(1, Ordering::Relaxed));
    let service = service_fn(|mut request| {
        request.extensions_mut().insert(id);
        Arc::clone(&context.dispatcher).handle(request).map(Ok::<_, Infallible>)
    });
    let mut http = http2::Builder::new(executor);
    http.timer(TokioTimer::new())
        .auto_date_header(false)
        .max_concurrent_streams(context.max_streams)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(MAX_ERROR_RESETS)
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_send_buf_size(MAX_SEND_BUFFER_BYTES)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let max_age = jittered(context.max_age);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = async { tokio::select! { () = time::sleep(max_age) => {} () = shutdown.cancelled() => {} } } => {
            // GOAWAY: requests in flight finish, the client sends new ones elsewhere.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "connection failed");
    }
}

/// Waits until the client has sent as many bytes as the preface has; `false` if it
/// closes the connection before. Nothing is consumed: hyper reads and checks the
/// preface, but has no timeout for it.
async fn has_preface(stream: &TcpStream) -> io::Result<bool> {
    let mut preface = [0; PREFACE_SIZE];
    loop {
        match stream.peek(&mut preface).await? {
            PREFACE_SIZE => return Ok(true),
            0 => return Ok(false),
            _ => time::sleep(PREFACE_POLL_INTERVAL).await,
        }
    }
}

/// Returns 90 to 110 % of the duration. Without jitter, the clients of a replica that
/// started under load would all reconnect at the same time.
fn jittered(duration: Duration) -> Duration {
    let percent = 90 + RandomState::new().hash_one(()) % 21;
    duration.mul_f64(percent as f64 / 100.0)
}

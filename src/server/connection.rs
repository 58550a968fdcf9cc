//! One connection: preface, HTTP/2 settings, age, and when it gives its place to another.

use std::{
    convert::Infallible,
    hash::{BuildHasher, RandomState},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpStream, time};
use tokio_util::sync::CancellationToken;

use crate::server::client_stream::ClientStream;
use crate::server::dispatch::Dispatcher;
use crate::server::executor::{ConnectionExecutor, with_executor};
use crate::server::state::ConnectionState;

/// How long a new connection may take to send the HTTP/2 preface.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may be silent before the server sends a PING.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
/// How long the client may take to acknowledge the PING.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How many streams the server may reset because of protocol errors before it closes
/// the connection. This is hyper's default; tonic's own server turns it off
/// (RUSTSEC-2024-0003).
const MAX_ERROR_RESETS: usize = 1024;
/// The most that the headers of a request may take.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// How much of a response is buffered, in addition to one message, when the client
/// does not read.
const MAX_SEND_BUFFER_BYTES: usize = 32 * 1024;
/// How long the last errors of a connection that is too old may take to be sent.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What all connections share.
pub(super) struct ConnectionContext {
    pub(super) dispatcher: Dispatcher,
    /// HTTP/2 streams, that is requests in flight, on one connection.
    pub(super) max_streams: u32,
    pub(super) max_age: Duration,
    /// How long streams may go on after that.
    pub(super) max_age_grace: Duration,
    pub(super) shutdown: CancellationToken,
}

/// Serves a connection together with its requests, in the caller's task.
pub(super) async fn serve_connection(
    stream: TcpStream,
    context: Arc<ConnectionContext>,
    state: Arc<ConnectionState>,
) {
    let id = state.id;
    id.run(with_executor(|executor| serve_http2(stream, executor, context, state))).await;
}

async fn serve_http2(
    stream: TcpStream,
    executor: ConnectionExecutor,
    context: Arc<ConnectionContext>,
    state: Arc<ConnectionState>,
) {
    // Nagle's algorithm would hold back a small response until the previous one is
    // acknowledged.
    let _ = stream.set_nodelay(true);
    let stream = tokio::select! {
        stream = time::timeout(PREFACE_TIMEOUT, ClientStream::after_preface(stream)) => stream,
        () = state.stop.cancelled() => return,
    };
    let Ok(Ok(stream)) = stream else { return };
    state.set_has_preface();
    let service = service_fn(|request| {
        let (holds, response) = context.dispatcher.handle(request, &state);
        executor.set_next(holds);
        response.map(Ok::<_, Infallible>)
    });
    let mut http = http2::Builder::new(executor.clone());
    http.timer(TokioTimer::new())
        .auto_date_header(false)
        .max_concurrent_streams(context.max_streams)
        // A client that cancels all its requests at once must not lose the connection. h2
        // counts only streams that are reset before the server has seen them.
        .max_pending_accept_reset_streams(usize::try_from(context.max_streams).ok())
        .max_local_error_reset_streams(MAX_ERROR_RESETS)
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_send_buf_size(MAX_SEND_BUFFER_BYTES)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let mut unread = pin!(state.unread());
    tokio::select! {
        result = connection.as_mut() => return log_end(result),
        () = unread.as_mut() => return log_unread(),
        () = time::sleep(jittered(context.max_age)) => {}
        () = state.stop.cancelled() => {}
    }
    // GOAWAY: requests in flight finish, and the client sends new ones elsewhere. It may begin a
    // watch again on a new connection.
    connection.as_mut().graceful_shutdown();
    let is_shutdown = context.shutdown.is_cancelled();
    if state.stop.is_cancelled() && !is_shutdown {
        // Its place went to another connection. One poll writes the GOAWAY.
        let _ = connection.now_or_never();
        return;
    }
    state.end_watches.cancel();
    tokio::select! {
        result = connection.as_mut() => return log_end(result),
        () = unread => return log_unread(),
        // The listener has a grace period for shutdown.
        () = time::sleep(context.max_age_grace), if !is_shutdown => state.end_streams.cancel(),
    }
    let _ = time::timeout(CLOSE_TIMEOUT, connection).await;
}

fn log_end(result: hyper::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(%error, "connection failed");
    }
}

fn log_unread() {
    tracing::debug!("connection closed: the client does not read its responses");
}

/// Returns 90 to 110 % of the duration. Without jitter, the clients of a replica that
/// started under load would all reconnect at the same time.
fn jittered(duration: Duration) -> Duration {
    let percent = 90 + RandomState::new().hash_one(()) % 21;
    duration.mul_f64(percent as f64 / 100.0)
}

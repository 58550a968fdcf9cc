//! From a TCP connection to the call of an rpc: what every connection and every
//! call goes through, whichever service it is for.

use std::{
    any::Any,
    convert::Infallible,
    future::{Future, ready},
    hash::{BuildHasher, RandomState},
    io,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, future::BoxFuture, stream};
use http::{HeaderMap, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body};
use tower_service::Service;

use crate::config::Config;
use crate::error::Error;
use crate::pb::ErrorReason as Reason;
use crate::server::executor::{Calls, with_calls};

/// A new connection has to say that it speaks HTTP/2 within this time.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// Which it does in this many octets (RFC 9113, section 3.4).
const PREFACE_OCTETS: usize = 24;
/// How often to look for the rest of it, if it does not come in one piece.
const PREFACE_POLL: Duration = Duration::from_millis(20);
/// A silent connection is asked whether it is still there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
/// And closed if it does not say so.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// After a failed accept, most likely for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Streams that a client opened and reset, or that broke the protocol, before its
/// connection is closed. Hyper has such limits, but tonic's server turns the
/// second one off (RUSTSEC-2024-0003).
const MAX_PENDING_RESETS: usize = 20;
const MAX_ERROR_RESETS: usize = 1024;
const MAX_HEADER_OCTETS: u32 = 16 * 1024;
/// What of an answer waits for the client to take it, beside one message.
const MAX_SEND_BUFFER_OCTETS: usize = 32 * 1024;

/// What a service makes of a call.
type Answering = BoxFuture<'static, Result<Response<Body>, Infallible>>;

/// A gRPC service, as tonic generates it: always ready, and cheap to clone.
pub trait GrpcService: Send + Sync {
    /// Begins to answer a call.
    fn call(&self, request: Request<Body>) -> Answering;
}

impl<S> GrpcService for S
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answering>,
    S: Clone + Send + Sync,
{
    fn call(&self, request: Request<Body>) -> Answering {
        Service::call(&mut self.clone(), request)
    }
}

/// A service under its full name.
pub struct NamedService {
    /// Such as `users.v1.UserService`.
    pub name: &'static str,
    /// Itself.
    pub service: Box<dyn GrpcService>,
    /// Its methods whose streams go on until somebody ends them.
    pub streams: &'static [&'static str],
}

/// What every call needs.
struct Shared {
    /// The first one also answers what no service has.
    services: Vec<NamedService>,
    request_timeout: Duration,
    max_streams: Option<u32>,
    stop: CancellationToken,
}

/// Accepts connections until `stop`. Then running calls may finish, for as long as
/// the grace lasts; what still runs then is dropped.
pub async fn serve(
    listener: TcpListener,
    services: Vec<NamedService>,
    config: &Config,
    stop: CancellationToken,
) {
    let request_timeout = Duration::from_millis(config.request_timeout_ms);
    let max_streams = u32::try_from(config.max_streams_per_connection).ok();
    let shared = Arc::new(Shared { services, request_timeout, max_streams, stop });
    let places = Arc::new(Semaphore::new(config.max_connections));
    let max_age = Duration::from_millis(config.max_connection_age_ms);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = shared.stop.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Better closed than left waiting: the client can go to another replica.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::warn!(max_connections = config.max_connections, "connection refused: too many");
            continue;
        };
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            with_calls(|calls| serve_connection(stream, calls, shared, jittered(max_age))).await;
            drop(place);
        });
    }
    // From here on nobody can connect any more.
    drop(listener);
    let grace = Duration::from_millis(config.shutdown_grace_ms);
    if time::timeout(grace, async { while connections.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!(connections = connections.len(), "dropped what did not finish in time");
    }
    connections.shutdown().await;
}

async fn serve_connection(stream: TcpStream, calls: Calls, shared: Arc<Shared>, max_age: Duration) {
    tokio::select! {
        greeted = time::timeout(PREFACE_TIMEOUT, greets(&stream)) => {
            if !matches!(greeted, Ok(Ok(true))) {
                return;
            }
        }
        () = shared.stop.cancelled() => return,
    }
    // Small answers must not wait for the one before to be acknowledged.
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| call(Arc::clone(&shared), request).map(Ok::<_, Infallible>));
    let mut http = http2::Builder::new(calls);
    http.timer(TokioTimer::new())
        .auto_date_header(false)
        .max_concurrent_streams(shared.max_streams)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(MAX_ERROR_RESETS)
        .max_header_list_size(MAX_HEADER_OCTETS)
        .max_send_buf_size(MAX_SEND_BUFFER_OCTETS)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = async { tokio::select! { () = time::sleep(max_age) => {} () = shared.stop.cancelled() => {} } } => {
            // GOAWAY: what runs goes on, what is new goes elsewhere.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

/// Whether the client sends as much as the greeting has; hyper reads it then, and
/// would wait for it for ever.
async fn greets(stream: &TcpStream) -> io::Result<bool> {
    let mut preface = [0; PREFACE_OCTETS];
    loop {
        match stream.peek(&mut preface).await? {
            PREFACE_OCTETS => return Ok(true),
            0 => return Ok(false),
            _ => time::sleep(PREFACE_POLL).await,
        }
    }
}

/// 90 to 110 % of it, so that the clients of a replica that started under load do
/// not all come back at once.
fn jittered(duration: Duration) -> Duration {
    let percent = 90 + RandomState::new().hash_one(()) % 21;
    duration.mul_f64(percent as f64 / 100.0)
}

/// One call, with everything that can befall it turned into an answer. The request
/// goes to its service before anything is awaited, so that a call under way is no
/// larger than what it waits for.
fn call(shared: Arc<Shared>, request: Request<Incoming>) -> impl Future<Output = Response<Body>> {
    let mut record = CallRecord::new(request.uri().path());
    let begun = begin(&shared, request.map(Body::new));
    async move {
        let response = begun.answer(&shared).await;
        if let Some(record) = &mut record {
            record.status = Some(status_of(&response));
        }
        response
    }
}

/// A call under way.
struct Begun {
    answering: Answering,
    timeout: Duration,
    is_stream: bool,
}

/// Hands a call to its service, or refuses it.
fn begin(shared: &Shared, request: Request<Body>) -> Begun {
    let timeout = shared.request_timeout;
    let refuse = |response| Begun { answering: ready(Ok(response)).boxed(), timeout, is_stream: false };
    if !is_grpc(request.headers()) {
        return refuse(unsupported_media_type());
    }
    let timeout = match timeout_of(request.headers()) {
        Ok(asked) => asked.map_or(timeout, |asked| asked.min(timeout)),
        Err(error) => return refuse(Status::from(error).into_http()),
    };
    let mut path = request.uri().path().split('/').skip(1);
    let (name, method) = (path.next().unwrap_or_default(), path.next().unwrap_or_default());
    let found = shared.services.iter().find(|service| service.name == name);
    let Some(NamedService { service, streams, .. }) = found.or_else(|| shared.services.first()) else {
        return refuse(Status::from(Error::Internal).into_http());
    };
    let is_stream = streams.contains(&method);
    let request = match is_stream {
        true => request.map(|body| until_stopped(body, shared.stop.clone(), None)),
        false => request,
    };
    Begun { answering: service.call(request), timeout, is_stream }
}

impl Begun {
    /// Whatever the service does not do itself happens here: the deadline, under
    /// which the service's future is dropped and cleans up after itself, and a
    /// panic, which costs this call and no other.
    async fn answer(self, shared: &Shared) -> Response<Body> {
        let answering = AssertUnwindSafe(self.answering).catch_unwind();
        match time::timeout(self.timeout, answering).await {
            Ok(Ok(Ok(response))) if self.is_stream => {
                explained(response).map(|body| until_stopped(body, shared.stop.clone(), stopping()))
            }
            Ok(Ok(Ok(response))) => explained(response),
            Ok(Err(panic)) => {
                tracing::error!(panic = panic_message(panic.as_ref()), "a call panicked");
                Status::from(Error::Internal).into_http()
            }
            Err(_) => Status::from(Error::DeadlineExceeded).into_http(),
        }
    }
}

/// One direction of a stream, which ends when the server stops: with `trailers`, if
/// it is ours; else with an error, since the client has more to say. Without that it
/// would keep its connection as long as the client likes. (One that its client does not
/// read is not asked for more, and is cut off at the end of the grace.)
fn until_stopped(body: Body, stop: CancellationToken, trailers: Option<HeaderMap>) -> Body {
    let stopped = Box::pin(stop.cancelled_owned());
    let frames = stream::unfold(Some((body, stopped, trailers)), async |state| {
        let (mut body, mut stopped, trailers) = state?;
        tokio::select! {
            biased;
            frame = body.frame() => Some((frame?, Some((body, stopped, trailers)))),
            () = &mut stopped => Some((trailers.map(Frame::trailers).ok_or(Error::ShuttingDown.into()), None)),
        }
    });
    Body::new(StreamBody::new(frames))
}

fn stopping() -> Option<HeaderMap> {
    let mut trailers = HeaderMap::new();
    Status::from(Error::ShuttingDown).add_header(&mut trailers).ok().map(|()| trailers)
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let rest = headers.get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

fn unsupported_media_type() -> Response<Body> {
    let mut response = Response::new(Body::default());
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    response
}

/// How long the caller is willing to wait.
fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    match value.to_str().ok().and_then(parse_timeout) {
        Some(timeout) => Ok(Some(timeout)),
        None => {
            let what = "must be up to 8 digits and one of H, M, S, m, u, n";
            Err(Error::invalid("grpc-timeout", Reason::FieldInvalid, what))
        }
    }
}

/// The header `grpc-timeout`: at most 8 digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

/// tonic's own answers to messages that it cannot read lack what our contract
/// promises: a code that says whose fault it is, and details.
fn explained(response: Response<Body>) -> Response<Body> {
    if response.headers().contains_key("grpc-status-details-bin") {
        return response;
    }
    let what = match status_of(&response) {
        Code::OutOfRange => "is too large: at most 4 MiB",
        Code::Internal => "is not a message of this rpc",
        _ => return response,
    };
    Status::from(Error::invalid("request", Reason::FieldInvalid, what)).into_http()
}

/// The status of an answer that is no more than its headers; others begin well,
/// and have theirs in the trailers.
fn status_of(response: &Response<Body>) -> Code {
    match response.headers().get("grpc-status") {
        Some(value) => Code::from_bytes(value.as_bytes()),
        None if response.status().is_success() => Code::Ok,
        None => Code::Unknown,
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("not a text")
}

/// Logs a call when it ends, also one whose caller has gone; if anybody reads it.
struct CallRecord {
    path: String,
    started: Instant,
    status: Option<Code>,
}

impl CallRecord {
    fn new(path: &str) -> Option<Self> {
        let is_read = tracing::enabled!(tracing::Level::DEBUG);
        is_read.then(|| Self { path: path.to_owned(), started: Instant::now(), status: None })
    }
}

impl Drop for CallRecord {
    fn drop(&mut self) {
        let elapsed_us = self.started.elapsed().as_micros();
        match self.status {
            Some(status) => tracing::debug!(path = self.path, ?status, elapsed_us, "call"),
            None => tracing::debug!(path = self.path, elapsed_us, "call abandoned"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll};

    use tonic_types::StatusExt;

    use super::*;

    #[test]
    fn timeouts_are_read_as_the_protocol_says() {
        let read = [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("4m", Duration::from_millis(4)),
            ("5u", Duration::from_micros(5)),
            ("6n", Duration::from_nanos(6)),
            ("0S", Duration::ZERO),
            ("99999999H", Duration::from_secs(99_999_999 * 3600)),
        ];
        for (text, duration) in read {
            assert_eq!(parse_timeout(text), Some(duration), "{text}");
        }
        for text in ["", "S", "1", "1s", "-1S", "+1S", "1.5S", " 1S", "100000000S", "1\u{fc}", "\u{fc}"] {
            assert_eq!(parse_timeout(text), None, "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_panic_costs_one_call_and_says_nothing_of_its_cause() {
        #[derive(Clone)]
        struct Panics;

        impl Service<Request<Body>> for Panics {
            type Response = Response<Body>;
            type Error = Infallible;
            type Future = Answering;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: Request<Body>) -> Answering {
                let answer = async move {
                    assert!(request.uri().path() != "/test/panic", "a secret");
                    Ok(Response::new(Body::default()))
                };
                answer.boxed()
            }
        }

        let named = NamedService { name: "test", service: Box::new(Panics), streams: &[] };
        let shared = Shared {
            services: vec![named],
            request_timeout: Duration::from_secs(1),
            max_streams: None,
            stop: CancellationToken::new(),
        };
        let ask = |path| {
            let request = Request::post(path).header(CONTENT_TYPE, "application/grpc");
            begin(&shared, request.body(Body::default()).unwrap()).answer(&shared)
        };
        let response = ask("/test/panic").await;
        let status = Status::from_header_map(response.headers()).unwrap();
        assert_eq!((status.code(), status.message()), (Code::Internal, "internal error"));
        assert_eq!(status.get_error_details().error_info().unwrap().reason, "INTERNAL");
        assert_eq!(status_of(&ask("/test/fine").await), Code::Ok);
    }
}

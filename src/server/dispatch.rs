//! One request: service look-up, limits, deadline, panic, error details, and the end of
//! streams.

use std::{
    convert::Infallible,
    error::Error as StdError,
    future::{Future, ready},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, future::BoxFuture};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use hyper::body::{Body as HttpBody, Bytes};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body};
use tower_service::Service;

use crate::error::Error;
use crate::pb::ErrorReason as Reason;
use crate::server::body::{IdleTimer, Messages, RequestBody, ResponseBody, StreamEnd};
use crate::server::method::MethodKind;
use crate::server::state::{ConnectionState, RequestState};

/// The response of a service, in the form that tonic generates.
type ResponseFuture = BoxFuture<'static, Result<Response<Body>, Infallible>>;

/// A gRPC service as tonic generates it: always ready, and cheap to clone.
pub trait GrpcService: Send + Sync {
    /// Starts to handle a request.
    fn call(&self, request: Request<Body>) -> ResponseFuture;
}

impl<S> GrpcService for S
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = ResponseFuture>,
    S: Clone + Send + Sync,
{
    fn call(&self, request: Request<Body>) -> ResponseFuture {
        Service::call(&mut self.clone(), request)
    }
}

/// A service under its full name.
pub struct NamedService {
    /// The full name, such as `users.v1.UserService`.
    pub name: &'static str,
    /// The implementation.
    pub service: Arc<dyn GrpcService>,
    /// What the server has to know of its methods.
    pub methods: Vec<MethodKind>,
}

/// Handles the requests of all connections.
pub(super) struct Dispatcher {
    /// The first service also receives the requests for unknown services: it rejects
    /// them with UNIMPLEMENTED.
    pub(super) services: Vec<NamedService>,
    /// The longest time from a request to the start of its response.
    pub(super) request_timeout: Duration,
    pub(super) shutdown: CancellationToken,
}

/// A request that its service handles, or that was rejected.
struct PendingResponse {
    future: ResponseFuture,
    timeout: Duration,
    /// `None` if the request was rejected.
    request: Option<Arc<RequestState>>,
    end: Option<StreamEnd>,
}

impl Dispatcher {
    /// Handles one request; a deadline, panic or failure becomes a gRPC status. Returns what
    /// the request holds, unless it was rejected, and the response.
    ///
    /// The service receives the request before the returned future is polled, so that the
    /// future does not hold the request as well.
    pub(super) fn handle<B>(
        &self,
        request: Request<B>,
        connection: &Arc<ConnectionState>,
    ) -> (Option<Arc<RequestState>>, impl Future<Output = Response<ResponseBody>> + use<B>)
    where
        B: HttpBody<Data = Bytes, Error: Into<Box<dyn StdError + Send + Sync>>> + Send + Unpin + 'static,
    {
        let mut record = RequestRecord::new(request.uri().path());
        let pending = self.dispatch(request, connection);
        let state = pending.request.clone();
        let response = async move {
            let response = pending.respond().await;
            if let Some(record) = &mut record {
                record.status = Some(status_of(&response));
            }
            response
        };
        (state, response)
    }

    /// Passes a request to its service, or rejects it.
    fn dispatch<B>(&self, request: Request<B>, connection: &Arc<ConnectionState>) -> PendingResponse
    where
        B: HttpBody<Data = Bytes, Error: Into<Box<dyn StdError + Send + Sync>>> + Send + Unpin + 'static,
    {
        let timeout = match self.check(&request) {
            Ok(timeout) => timeout,
            Err(response) => return PendingResponse::rejected(*response),
        };
        let mut path = request.uri().path().split('/').skip(1);
        let (name, method) = (path.next().unwrap_or_default(), path.next().unwrap_or_default());
        let found = self.services.iter().find(|service| service.name == name);
        let Some(NamedService { service, methods, .. }) = found.or_else(|| self.services.first()) else {
            return PendingResponse::rejected(Status::from(Error::Internal).into_http());
        };
        let unary = MethodKind::default();
        let method = methods.iter().find(|known| known.name == method).unwrap_or(&unary);
        let is_stream = method.is_stream();
        let state = match connection.start_request(method) {
            Ok(state) => state,
            Err(error) => return PendingResponse::rejected(Status::from(error).into_http()),
        };
        let end = || {
            let token = if method.is_finite { &connection.end_streams } else { &connection.end_watches };
            is_stream.then(|| StreamEnd::new(token, &self.shutdown))
        };
        let request = request.map(|body| {
            Body::new(RequestBody {
                body,
                request: Arc::clone(&state),
                messages: Messages::default(),
                is_stream: method.takes_stream,
                end: end(),
                idle: method.idle_timeout.map(IdleTimer::new),
            })
        });
        PendingResponse { future: service.call(request), timeout, request: Some(state), end: end() }
    }

    /// Checks what all requests have in common, and returns the time until the deadline.
    fn check<B>(&self, request: &Request<B>) -> Result<Duration, Box<Response<Body>>> {
        if request.method() != Method::POST {
            let mut response = without_body(StatusCode::METHOD_NOT_ALLOWED);
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
            return Err(response.into());
        }
        if !is_grpc(request.headers()) {
            return Err(without_body(StatusCode::UNSUPPORTED_MEDIA_TYPE).into());
        }
        match timeout_of(request.headers()) {
            Ok(Some(Duration::ZERO)) => Err(Box::new(Status::from(Error::DeadlineExceeded).into_http())),
            Ok(Some(requested)) => Ok(requested.min(self.request_timeout)),
            Ok(None) => Ok(self.request_timeout),
            Err(error) => Err(Box::new(Status::from(error).into_http())),
        }
    }
}

impl PendingResponse {
    fn rejected(response: Response<Body>) -> Self {
        // The response is there, so the timeout does not matter.
        Self { future: ready(Ok(response)).boxed(), timeout: Duration::MAX, request: None, end: None }
    }

    /// Awaits the response. After the deadline, the service's future is dropped and
    /// cleans up after itself. A panic fails this request only.
    async fn respond(self) -> Response<ResponseBody> {
        let future = AssertUnwindSafe(self.future).catch_unwind();
        let response = match time::timeout(self.timeout, future).await {
            Ok(Ok(Ok(response))) => with_error_details(response),
            // The panic hook has logged where it was.
            Ok(Err(_)) => Status::from(Error::Internal).into_http(),
            Err(_) => Status::from(Error::DeadlineExceeded).into_http(),
        };
        match self.request {
            Some(request) => {
                request.start_response();
                response.map(|body| ResponseBody::new(body, request, self.end))
            }
            None => response.map(ResponseBody::uncounted),
        }
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let suffix =
        headers.get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    suffix.is_some_and(|suffix| matches!(suffix.first(), None | Some(b'+' | b';')))
}

fn without_body(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::default());
    *response.status_mut() = status;
    response
}

/// The timeout that the client requests in the header `grpc-timeout`.
fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    match value.to_str().ok().and_then(parse_timeout) {
        Some(timeout) => Ok(Some(timeout)),
        None => {
            let what = "must be up to 8 digits followed by one of H, M, S, m, u, n";
            Err(Error::invalid("grpc-timeout", Reason::FieldInvalid, what))
        }
    }
}

/// Parses a value of `grpc-timeout`: at most 8 digits and a unit.
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

/// Replaces tonic's own responses to messages that it cannot decode. They lack what the
/// API promises: a code that blames the client, and error details.
fn with_error_details(response: Response<Body>) -> Response<Body> {
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

/// The status of a response without a body. Any other response counts as OK: its
/// status is in the trailers, which are not known yet.
fn status_of<B>(response: &Response<B>) -> Code {
    match response.headers().get("grpc-status") {
        Some(value) => Code::from_bytes(value.as_bytes()),
        None if response.status().is_success() => Code::Ok,
        None => Code::Unknown,
    }
}

/// Logs a request when it is dropped: after its response, or when the client has
/// cancelled it.
struct RequestRecord {
    path: String,
    started: Instant,
    status: Option<Code>,
}

impl RequestRecord {
    /// `None` if the log level excludes it.
    fn new(path: &str) -> Option<Self> {
        let is_logged = tracing::enabled!(tracing::Level::DEBUG);
        is_logged.then(|| Self { path: path.to_owned(), started: Instant::now(), status: None })
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let elapsed_us = self.started.elapsed().as_micros();
        match self.status {
            Some(status) => tracing::debug!(path = self.path, ?status, elapsed_us, "request"),
            None => tracing::debug!(path = self.path, elapsed_us, "request cancelled"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll};

    use proptest::prelude::*;
    use tonic_types::StatusExt;

    use super::*;
    use crate::limits::ConnectionId;
    use crate::server::state::{RequestLimits, ServerState};

    proptest! {
        #[test]
        fn timeout_is_1_to_8_digits_and_a_unit(text: String, amount in "[0-9]{0,10}", unit in "[HMSmunhs. ]{0,2}") {
            for text in [text, amount + &unit] {
                let is_timeout = text.as_bytes().split_last().is_some_and(|(unit, digits)| {
                    let is_number = (1..=8).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
                    is_number && b"HMSmun".contains(unit)
                });
                prop_assert_eq!(parse_timeout(&text).is_some(), is_timeout);
            }
        }

        #[test]
        fn no_header_makes_the_parser_of_timeouts_panic(bytes: Vec<u8>) {
            let mut headers = HeaderMap::new();
            if let Ok(value) = http::HeaderValue::from_bytes(&bytes) {
                headers.insert("grpc-timeout", value);
            }
            let _ = timeout_of(&headers);
        }
    }

    #[test]
    fn timeouts_are_parsed_as_the_protocol_defines() {
        let valid = [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("4m", Duration::from_millis(4)),
            ("5u", Duration::from_micros(5)),
            ("6n", Duration::from_nanos(6)),
            ("0S", Duration::ZERO),
            ("99999999H", Duration::from_secs(99_999_999 * 3600)),
        ];
        for (text, duration) in valid {
            assert_eq!(parse_timeout(text), Some(duration), "{text}");
        }
        for text in ["", "S", "1", "1s", "-1S", "+1S", "1.5S", " 1S", "100000000S", "1\u{fc}", "\u{fc}"] {
            assert_eq!(parse_timeout(text), None, "{text:?}");
        }
    }

    #[tokio::test]
    async fn panic_fails_one_request_and_does_not_reveal_its_message() {
        #[derive(Clone)]
        struct Panics;

        impl Service<Request<Body>> for Panics {
            type Response = Response<Body>;
            type Error = Infallible;
            type Future = ResponseFuture;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: Request<Body>) -> ResponseFuture {
                let response = async move {
                    assert!(request.uri().path() != "/test/panic", "a secret");
                    Ok(Response::new(Body::default()))
                };
                response.boxed()
            }
        }

        let named = NamedService { name: "test", service: Arc::new(Panics), methods: Vec::new() };
        let (timeout, shutdown) = (Duration::from_secs(1), CancellationToken::new());
        let dispatcher =
            Dispatcher { services: vec![named], request_timeout: timeout, shutdown: shutdown.clone() };
        let limits = RequestLimits {
            max_requests: 8,
            max_bytes: 0,
            max_bytes_per_connection: 0,
            timeout,
            stream_read_timeout: timeout,
        };
        let connection =
            Arc::new(ConnectionState::new(ConnectionId(1), Arc::new(ServerState::new(limits)), &shutdown));
        let send = |path| {
            let request = Request::post(path).header(CONTENT_TYPE, "application/grpc");
            dispatcher.handle(request.body(Body::default()).unwrap(), &connection).1
        };
        let response = send("/test/panic").await;
        let status = Status::from_header_map(response.headers()).unwrap();
        assert_eq!((status.code(), status.message()), (Code::Internal, "internal error"));
        assert_eq!(status.get_error_details().error_info().unwrap().reason, "INTERNAL");
        assert_eq!(status_of(&send("/test/fine").await), Code::Ok);
    }
}

//! What requests and responses hold: places and bytes, of all connections and of each.
//!
//! A connection never gets more than what is left for all others. However many connections
//! take all they can, one that comes later finds a free share.

use std::{
    cmp,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{self, Instant, Sleep};
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::limits::ConnectionId;
use crate::server::method::MethodKind;

/// Bytes are counted in blocks of this size. Small requests and responses, which are most,
/// fill no block and cost no counting; the limit on requests bounds them.
const BLOCK: usize = 4096;

/// The limits of a listener.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestLimits {
    /// Requests in flight, of all connections.
    pub(super) max_requests: usize,
    /// Bytes of requests and responses in memory, of all connections.
    pub(super) max_bytes: usize,
    /// The same of one connection.
    pub(super) max_bytes_per_connection: usize,
    /// The longest time from a request to the start of its response, and from there until
    /// the client has read it.
    pub(super) timeout: Duration,
    /// How long a stream waits for its client to read.
    pub(super) stream_read_timeout: Duration,
}

/// What all connections of a listener hold.
pub(super) struct ServerState {
    pub(super) limits: RequestLimits,
    started: Instant,
    requests: AtomicUsize,
    bytes: AtomicUsize,
}

impl ServerState {
    pub(super) fn new(limits: RequestLimits) -> Self {
        let started = Instant::now();
        Self { limits, started, requests: AtomicUsize::new(0), bytes: AtomicUsize::new(0) }
    }
}

/// What one connection holds, and the signals that end it.
pub(super) struct ConnectionState {
    pub(super) id: ConnectionId,
    server: Arc<ServerState>,
    requests: AtomicUsize,
    bytes: AtomicUsize,
    /// Since when no request has been in flight, in milliseconds since the server started.
    idle_since: AtomicU64,
    has_preface: AtomicBool,
    unsent_unary: Unsent,
    unsent_streams: Unsent,
    /// Asks the connection to end: shutdown, or its place goes to another.
    pub(super) stop: CancellationToken,
    /// Ends the streams that have no end of their own. Shutdown cancels it too.
    pub(super) end_watches: CancellationToken,
    /// Ends all streams. Shutdown cancels it too.
    pub(super) end_streams: CancellationToken,
}

impl ConnectionState {
    /// A connection that was accepted now.
    pub(super) fn new(id: ConnectionId, server: Arc<ServerState>, shutdown: &CancellationToken) -> Self {
        let end_streams = shutdown.child_token();
        let state = Self {
            id,
            server,
            requests: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            idle_since: AtomicU64::new(0),
            has_preface: AtomicBool::new(false),
            unsent_unary: Unsent::default(),
            unsent_streams: Unsent::default(),
            stop: shutdown.child_token(),
            end_watches: end_streams.child_token(),
            end_streams,
        };
        state.set_idle();
        state
    }

    fn set_idle(&self) {
        let elapsed = self.server.started.elapsed().as_millis();
        self.idle_since.store(u64::try_from(elapsed).unwrap_or(u64::MAX), Relaxed);
    }

    /// The client has sent the HTTP/2 preface.
    pub(super) fn set_has_preface(&self) {
        self.has_preface.store(true, Relaxed);
    }

    /// Whether the client has sent the HTTP/2 preface.
    pub(super) fn has_preface(&self) -> bool {
        self.has_preface.load(Relaxed)
    }

    /// Since when no request has been in flight, in milliseconds since the server started.
    /// `None` while one is.
    pub(super) fn idle_since(&self) -> Option<u64> {
        (self.requests.load(Relaxed) == 0).then(|| self.idle_since.load(Relaxed))
    }

    /// Ends the connection, if it is idle. A request that comes now finds no place.
    pub(super) fn evict(&self) -> bool {
        let is_idle = self.requests.compare_exchange(0, usize::MAX / 2, Relaxed, Relaxed).is_ok();
        if is_idle {
            self.stop.cancel();
        }
        is_idle
    }

    /// Counts a request. It fails if too many are in flight, or if the connection already
    /// holds all bytes that it may.
    pub(super) fn start_request(self: &Arc<Self>, method: &MethodKind) -> Result<Arc<RequestState>, Error> {
        let all = self.server.requests.fetch_add(1, Relaxed);
        let own = self.requests.fetch_add(1, Relaxed);
        // From here on, dropping the state undoes the count.
        let request = Arc::new(RequestState {
            connection: Arc::clone(self),
            takes_stream: method.takes_stream,
            is_stream: method.is_stream(),
            is_read: method.is_read,
            request_bytes: AtomicUsize::new(0),
            unsent: AtomicUsize::new(0),
            is_responding: AtomicBool::new(false),
            is_unread: AtomicBool::new(false),
            progress: AtomicU32::new(0),
        });
        let limit = self.server.limits.max_requests;
        if own >= limit.saturating_sub(all) {
            return Err(Error::TooManyStreams { what: "requests in flight", limit });
        }
        if self.bytes.load(Relaxed) > self.byte_limit(self.server.bytes.load(Relaxed)) {
            return Err(Error::TooManyBytes);
        }
        Ok(request)
    }

    /// The most that this connection may hold while all connections hold `all`.
    fn byte_limit(&self, all: usize) -> usize {
        let limits = &self.server.limits;
        cmp::min(limits.max_bytes_per_connection, limits.max_bytes.saturating_sub(all))
    }

    fn take_bytes(&self, bytes: usize) -> Result<(), Error> {
        let all = self.server.bytes.fetch_add(bytes, Relaxed);
        let own = self.bytes.fetch_add(bytes, Relaxed);
        if own + bytes > self.byte_limit(all) {
            self.release_bytes(bytes);
            return Err(Error::TooManyBytes);
        }
        Ok(())
    }

    fn release_bytes(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.server.bytes.fetch_sub(bytes, Relaxed);
    }

    /// Waits until a response has been unread for so long that no reset of its stream can
    /// help: HTTP/2 has the whole response, and sends it when the client lets it. Only
    /// closing the connection frees it.
    pub(super) async fn unread(&self) {
        let RequestLimits { timeout, stream_read_timeout, .. } = self.server.limits;
        tokio::select! {
            () = self.unsent_unary.stuck(timeout) => {}
            () = self.unsent_streams.stuck(stream_read_timeout) => {}
        }
    }

    fn unsent(&self, is_stream: bool) -> &Unsent {
        if is_stream { &self.unsent_streams } else { &self.unsent_unary }
    }
}

/// Parts of responses that have not been sent, by the period in which they were made.
#[derive(Default)]
struct Unsent {
    parts: [AtomicUsize; 2],
    period: AtomicUsize,
}

impl Unsent {
    /// Adds a part, and returns the period.
    fn add(&self) -> usize {
        let period = self.period.load(Relaxed);
        self.parts.get(period).map(|unsent| unsent.fetch_add(1, Relaxed));
        period
    }

    fn remove(&self, period: usize) {
        self.parts.get(period).map(|unsent| unsent.fetch_sub(1, Relaxed));
    }

    /// Waits until some of the parts are as old as two to four timeouts. A response that can
    /// be reset has been by then.
    async fn stuck(&self, timeout: Duration) {
        loop {
            time::sleep(timeout * 2).await;
            let [first, second] = &self.parts;
            let (next, previous) = if self.period.load(Relaxed) == 0 { (1, second) } else { (0, first) };
            if previous.load(Relaxed) > 0 {
                return;
            }
            self.period.store(next, Relaxed);
        }
    }
}

/// What one request holds, until its response is sent.
pub(super) struct RequestState {
    connection: Arc<ConnectionState>,
    takes_stream: bool,
    is_stream: bool,
    is_read: bool,
    /// Counted bytes of the request, in blocks.
    request_bytes: AtomicUsize,
    /// Parts of the response that HTTP/2 has and has not sent.
    unsent: AtomicUsize,
    is_responding: AtomicBool,
    /// Whether HTTP/2 waits for the client before it takes more of the response.
    is_unread: AtomicBool,
    /// Changes whenever a part of the response is made or sent.
    progress: AtomicU32,
}

impl RequestState {
    /// Sets the number of bytes of the request that are in memory.
    pub(super) fn hold_request(&self, bytes: usize) -> Result<(), Error> {
        let bytes = bytes / BLOCK * BLOCK;
        let before = self.request_bytes.load(Relaxed);
        match bytes.checked_sub(before) {
            Some(0) => return Ok(()),
            Some(more) => self.connection.take_bytes(more)?,
            None => self.connection.release_bytes(before - bytes),
        }
        self.request_bytes.store(bytes, Relaxed);
        Ok(())
    }

    /// The response begins. A request of one message is no longer in memory.
    pub(super) fn start_response(&self) {
        self.is_responding.store(true, Relaxed);
        if !self.takes_stream {
            self.connection.release_bytes(self.request_bytes.swap(0, Relaxed));
        }
    }

    /// HTTP/2 asks for the next part of the response.
    pub(super) fn poll_response(&self) {
        self.is_unread.store(false, Relaxed);
    }

    /// Counts a part of the response. The bytes of a small one are not counted.
    pub(super) fn hold_response(self: &Arc<Self>, bytes: usize) -> Result<UnsentPart, Error> {
        self.progress.fetch_add(1, Relaxed);
        self.is_unread.store(true, Relaxed);
        let bytes = if bytes < BLOCK { 0 } else { bytes };
        if bytes > 0 {
            self.connection.take_bytes(bytes).map_err(|error| match self.is_stream || self.is_read {
                true => error,
                false => Error::ResponseDropped,
            })?;
        }
        self.unsent.fetch_add(1, Relaxed);
        let period = self.connection.unsent(self.is_stream).add();
        Ok(UnsentPart { request: Arc::clone(self), bytes, period })
    }
}

impl Drop for RequestState {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection.release_bytes(*self.request_bytes.get_mut());
        connection.server.requests.fetch_sub(1, Relaxed);
        if connection.requests.fetch_sub(1, Relaxed) == 1 {
            connection.set_idle();
        }
    }
}

/// A part of a response. Dropped when it is sent, or will never be. Until then, its request is
/// in flight.
pub(super) struct UnsentPart {
    request: Arc<RequestState>,
    /// Counted bytes.
    bytes: usize,
    period: usize,
}

impl Drop for UnsentPart {
    fn drop(&mut self) {
        let RequestState { connection, is_stream, unsent, progress, .. } = &*self.request;
        unsent.fetch_sub(1, Relaxed);
        connection.unsent(*is_stream).remove(self.period);
        if self.bytes > 0 {
            connection.release_bytes(self.bytes);
        }
        progress.fetch_add(1, Relaxed);
    }
}

/// Finds out that a client does not read a response. A response that is sent at once costs
/// no timer.
#[derive(Default)]
pub(super) struct ReadDeadline {
    timer: Option<Pin<Box<Sleep>>>,
    progress: u32,
}

impl ReadDeadline {
    /// Ready when the deadline has passed. A unary response must be read within its timeout. A
    /// stream is reset if none of it is read for one to two of its timeouts.
    pub(super) fn poll(&mut self, request: &RequestState, cx: &mut Context<'_>) -> Poll<()> {
        if !request.is_responding.load(Relaxed) {
            return Poll::Pending;
        }
        let RequestLimits { timeout, stream_read_timeout, .. } = request.connection.server.limits;
        let timeout = if request.is_stream { stream_read_timeout } else { timeout };
        loop {
            let progress = request.progress.load(Relaxed);
            let timer = self.timer.get_or_insert_with(|| {
                self.progress = progress;
                Box::pin(time::sleep(timeout))
            });
            ready!(timer.as_mut().poll(cx));
            let is_waiting = request.is_unread.load(Relaxed) || request.unsent.load(Relaxed) > 0;
            if !request.is_stream || (is_waiting && progress == self.progress) {
                return Poll::Ready(());
            }
            self.progress = progress;
            timer.as_mut().reset(Instant::now() + timeout);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn server(max_requests: usize) -> Arc<ServerState> {
        let timeout = Duration::from_secs(1);
        Arc::new(ServerState::new(RequestLimits {
            max_requests,
            max_bytes: 8 * MIB,
            max_bytes_per_connection: 6 * MIB,
            timeout,
            stream_read_timeout: timeout,
        }))
    }

    fn connection(server: &Arc<ServerState>, id: u64) -> Arc<ConnectionState> {
        Arc::new(ConnectionState::new(ConnectionId(id), Arc::clone(server), &CancellationToken::new()))
    }

    #[test]
    fn connection_holds_no_more_than_is_left_for_all_others() {
        let server = server(4);
        let [first, second] = [connection(&server, 1), connection(&server, 2)];
        let unary = MethodKind::default();
        let held: Vec<_> = (0..2).map(|_| first.start_request(&unary).unwrap()).collect();
        assert!(first.start_request(&unary).is_err());
        let other = second.start_request(&unary).unwrap();
        held[0].hold_request(4 * MIB).unwrap();
        assert_eq!(held[1].hold_request(MIB), Err(Error::TooManyBytes));
        other.hold_request(2 * MIB).unwrap();
        assert_eq!(other.hold_request(5 * MIB), Err(Error::TooManyBytes));
        drop((held, other));
        assert_eq!((server.requests.load(Relaxed), server.bytes.load(Relaxed)), (0, 0));
        assert_eq!((first.bytes.load(Relaxed), second.bytes.load(Relaxed)), (0, 0));
    }

    #[test]
    fn request_is_in_flight_until_its_response_is_sent() {
        let server = server(4);
        let connection = connection(&server, 1);
        for bytes in [1, MIB] {
            let request = connection.start_request(&MethodKind::default()).unwrap();
            request.start_response();
            let part = request.hold_response(bytes).unwrap();
            drop(request);
            assert_eq!(connection.idle_since(), None);
            drop(part);
            assert!(connection.idle_since().is_some());
            assert_eq!(server.bytes.load(Relaxed), 0);
        }
    }

    #[test]
    fn only_an_idle_connection_is_evicted_and_takes_no_request_then() {
        let server = server(4);
        let connection = connection(&server, 1);
        let request = connection.start_request(&MethodKind::default()).unwrap();
        assert!(!connection.evict());
        drop(request);
        assert!(connection.evict() && connection.stop.is_cancelled());
        assert!(connection.start_request(&MethodKind::default()).is_err());
        assert_eq!(connection.idle_since(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn response_that_stays_unsent_ends_the_wait_for_its_client() {
        let server = server(4);
        let connection = connection(&server, 1);
        let request = connection.start_request(&MethodKind::default()).unwrap();
        drop(request.hold_response(1).unwrap());
        let timeout = server.limits.timeout * 10;
        time::timeout(timeout, connection.unread()).await.unwrap_err();
        let _unsent = request.hold_response(1).unwrap();
        time::timeout(timeout, connection.unread()).await.unwrap();
    }
}

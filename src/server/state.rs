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
    /// Asks the connection to give its place to another.
    pub(super) evicted: CancellationToken,
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
            evicted: CancellationToken::new(),
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

    /// Whether no request is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.requests.load(Relaxed) == 0
    }

    /// Since when no request has been in flight, in milliseconds since the server started.
    /// `None` while one is.
    pub(super) fn idle_since(&self) -> Option<u64> {
        self.is_idle().then(|| self.idle_since.load(Relaxed))
    }

    /// Counts a request. It fails if too many are in flight, or if the connection already
    /// holds all bytes that it may.
    pub(super) fn start_request(
        self: &Arc<Self>,
        is_stream: bool,
        is_read: bool,
    ) -> Result<Arc<RequestState>, Error> {
        let all = self.server.requests.fetch_add(1, Relaxed);
        let own = self.requests.fetch_add(1, Relaxed);
        // From here on, dropping the state undoes the count.
        let request = Arc::new(RequestState {
            connection: Arc::clone(self),
            is_stream,
            is_read,
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
        self.take_bytes(0)?;
        Ok(request)
    }

    fn take_bytes(&self, bytes: usize) -> Result<(), Error> {
        let limits = &self.server.limits;
        let all = self.server.bytes.fetch_add(bytes, Relaxed);
        let own = self.bytes.fetch_add(bytes, Relaxed);
        let limit = cmp::min(limits.max_bytes_per_connection, limits.max_bytes.saturating_sub(all));
        if own + bytes > limit {
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

/// Response bytes that have not been sent, by the period in which they were made.
#[derive(Default)]
struct Unsent {
    bytes: [AtomicUsize; 2],
    period: AtomicUsize,
}

impl Unsent {
    /// Adds bytes, and returns the period.
    fn add(&self, bytes: usize) -> usize {
        let period = self.period.load(Relaxed);
        self.bytes.get(period).map(|unsent| unsent.fetch_add(bytes, Relaxed));
        period
    }

    fn remove(&self, bytes: usize, period: usize) {
        self.bytes.get(period).map(|unsent| unsent.fetch_sub(bytes, Relaxed));
    }

    /// Waits until some of the bytes are as old as two to four timeouts. A response that can
    /// be reset has been by then.
    async fn stuck(&self, timeout: Duration) {
        loop {
            time::sleep(timeout * 2).await;
            let [first, second] = &self.bytes;
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
    is_stream: bool,
    is_read: bool,
    /// Counted bytes of the request, in blocks.
    request_bytes: AtomicUsize,
    /// Counted bytes of the response that HTTP/2 has and has not sent.
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

    /// The response begins. A request that is no stream has been handled, and is no longer
    /// in memory.
    pub(super) fn start_response(&self) {
        self.is_responding.store(true, Relaxed);
        if !self.is_stream {
            self.connection.release_bytes(self.request_bytes.swap(0, Relaxed));
        }
    }

    /// HTTP/2 asks for the next part of the response.
    pub(super) fn poll_response(&self) {
        self.is_unread.store(false, Relaxed);
    }

    /// Counts a part of the response. `None` if it is too small to be counted.
    pub(super) fn hold_response(self: &Arc<Self>, bytes: usize) -> Result<Option<UnsentBytes>, Error> {
        self.progress.fetch_add(1, Relaxed);
        self.is_unread.store(true, Relaxed);
        if bytes < BLOCK {
            return Ok(None);
        }
        self.connection.take_bytes(bytes).map_err(|error| match self.is_stream || self.is_read {
            true => error,
            false => Error::ResponseDropped,
        })?;
        self.unsent.fetch_add(bytes, Relaxed);
        let period = self.connection.unsent(self.is_stream).add(bytes);
        Ok(Some(UnsentBytes { request: Arc::clone(self), bytes, period }))
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

/// A counted part of a response. Dropped when it is sent, or will never be.
pub(super) struct UnsentBytes {
    request: Arc<RequestState>,
    bytes: usize,
    period: usize,
}

impl Drop for UnsentBytes {
    fn drop(&mut self) {
        let RequestState { connection, is_stream, unsent, progress, .. } = &*self.request;
        unsent.fetch_sub(self.bytes, Relaxed);
        connection.unsent(*is_stream).remove(self.bytes, self.period);
        connection.release_bytes(self.bytes);
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

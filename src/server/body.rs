//! The bodies of requests and responses: counted, bounded in time, and ended at shutdown.

use std::{
    error::Error as StdError,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::HeaderMap;
use hyper::body::{Body as HttpBody, Buf, Bytes, Frame, SizeHint};
use tokio::time::{self, Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, body::Body};

use crate::error::Error;
use crate::pb::ErrorReason as Reason;
use crate::server::state::{RequestState, UnsentPart};

type BoxError = Box<dyn StdError + Send + Sync>;

/// The size of the prefix of a gRPC message: a flag, and the length of the message.
const PREFIX_SIZE: usize = 5;

/// Ends a stream: at shutdown, and when its connection is too old.
pub(super) struct StreamEnd {
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    shutdown: CancellationToken,
}

impl StreamEnd {
    /// `token` is a child of `shutdown`.
    pub(super) fn new(token: &CancellationToken, shutdown: &CancellationToken) -> Self {
        Self { cancelled: Box::pin(token.clone().cancelled_owned()), shutdown: shutdown.clone() }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        self.cancelled.as_mut().poll(cx).map(|()| match self.shutdown.is_cancelled() {
            true => Error::ShuttingDown,
            false => Error::ConnectionTooOld,
        })
    }
}

/// The body of a request.
pub(super) struct RequestBody<B> {
    pub(super) body: B,
    pub(super) request: Arc<RequestState>,
    pub(super) messages: Messages,
    /// Whether the rpc takes several messages.
    pub(super) is_stream: bool,
    pub(super) end: Option<StreamEnd>,
    pub(super) idle: Option<IdleTimer>,
}

/// Finds the messages in a body.
#[derive(Default)]
pub(super) struct Messages {
    /// The bytes of the incomplete message, its prefix included.
    incomplete: usize,
    /// The length in the prefix, as far as it is known.
    length: usize,
    complete: usize,
    /// The bytes of the complete messages that are in memory.
    complete_bytes: usize,
}

impl Messages {
    fn add(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.incomplete < PREFIX_SIZE {
                let (prefix, rest) = data.split_at(data.len().min(PREFIX_SIZE - self.incomplete));
                for byte in prefix {
                    let is_flag = self.incomplete == 0;
                    self.length = if is_flag { 0 } else { self.length << 8 | usize::from(*byte) };
                    self.incomplete += 1;
                }
                data = rest;
            }
            if self.incomplete >= PREFIX_SIZE {
                let left = self.length + PREFIX_SIZE - self.incomplete;
                let (message, rest) = data.split_at(data.len().min(left));
                self.incomplete += message.len();
                data = rest;
                if message.len() == left {
                    self.complete += 1;
                    self.complete_bytes += self.incomplete;
                    self.incomplete = 0;
                }
            }
        }
    }
}

/// Limits the time that a stream waits for its client.
pub(super) struct IdleTimer {
    timeout: Duration,
    timer: Pin<Box<Sleep>>,
}

impl IdleTimer {
    pub(super) fn new(timeout: Duration) -> Self {
        Self { timeout, timer: Box::pin(time::sleep(timeout)) }
    }
}

impl<B> RequestBody<B> {
    /// Counts the data of a frame.
    fn count(&mut self, data: &[u8]) -> Result<(), Error> {
        self.messages.add(data);
        let Messages { complete, incomplete, complete_bytes, .. } = self.messages;
        if !self.is_stream && complete > 0 && (complete > 1 || incomplete > 0) {
            return Err(Error::invalid("request", Reason::FieldInvalid, "must be one message"));
        }
        self.request.hold_request(complete_bytes + incomplete)
    }

    /// Why the body ends before the client has ended it.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        if let Some(end) = &mut self.end
            && let Poll::Ready(error) = end.poll(cx)
        {
            return Poll::Ready(error);
        }
        match &mut self.idle {
            Some(idle) => idle.timer.as_mut().poll(cx).map(|()| Error::DeadlineExceeded),
            None => Poll::Pending,
        }
    }
}

impl<B> HttpBody for RequestBody<B>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if this.is_stream {
            // tonic asks for more when it has passed on all complete messages.
            this.messages.complete_bytes = 0;
        }
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref()
                    && let Err(error) = this.count(data)
                {
                    return Poll::Ready(Some(Err(Status::from(error).into())));
                }
                if let Some(idle) = &mut this.idle {
                    idle.timer.as_mut().reset(Instant::now() + idle.timeout);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(other) => Poll::Ready(other.map(|frame| frame.map_err(Into::into))),
            Poll::Pending => this.poll_end(cx).map(|error| Some(Err(Status::from(error).into()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of a response. It says whether it is at its end already: HTTP/2 then sends the
/// headers of a rejection with END_STREAM. After an empty DATA frame instead, clients that
/// use gRPC's C core do not read the status.
pub struct ResponseBody {
    body: Body,
    request: Option<Arc<RequestState>>,
    end: Option<StreamEnd>,
    has_ended: bool,
}

impl ResponseBody {
    /// The response to a request that was rejected before it was counted.
    pub(super) fn uncounted(body: Body) -> Self {
        Self { body, request: None, end: None, has_ended: false }
    }

    /// The response to a request. `end` is for streams.
    pub(super) fn new(body: Body, request: Arc<RequestState>, end: Option<StreamEnd>) -> Self {
        Self { body, request: Some(request), end, has_ended: false }
    }

    /// Ends the response with an error.
    fn end_with(&mut self, error: Error) -> Frame<ResponseBytes> {
        self.has_ended = true;
        self.body = Body::default();
        let mut trailers = HeaderMap::new();
        let _ = Status::from(error).add_header(&mut trailers);
        Frame::trailers(trailers)
    }

    fn count(&mut self, bytes: Bytes) -> Frame<ResponseBytes> {
        let held = self.request.as_ref().map(|request| request.hold_response(bytes.len()));
        match held.transpose() {
            Ok(held) => Frame::data(ResponseBytes { bytes, _held: held }),
            Err(error) => self.end_with(error),
        }
    }
}

impl HttpBody for ResponseBody {
    type Data = ResponseBytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<ResponseBytes>, Status>>> {
        let this = self.get_mut();
        if this.has_ended {
            return Poll::Ready(None);
        }
        if let Some(request) = &this.request {
            request.poll_response();
        }
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(match frame.into_data() {
                Ok(bytes) => Some(Ok(this.count(bytes))),
                Err(frame) => frame.into_trailers().ok().map(|trailers| Ok(Frame::trailers(trailers))),
            }),
            Poll::Ready(Some(Err(status))) => Poll::Ready(Some(Err(status))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => match &mut this.end {
                Some(end) => end.poll(cx).map(|error| Some(Ok(this.end_with(error)))),
                None => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A part of a response. It counts as memory until HTTP/2 drops it.
pub struct ResponseBytes {
    bytes: Bytes,
    _held: Option<UnsentPart>,
}

impl Buf for ResponseBytes {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_however_a_body_is_split() {
        let message = |length: u8| [vec![0, 0, 0, 0, length], vec![7; usize::from(length)]].concat();
        let body = [message(0), message(3), message(200), message(1)].concat();
        for size in 1..body.len() {
            let mut messages = Messages::default();
            body.chunks(size).for_each(|data| messages.add(data));
            let Messages { complete, incomplete, complete_bytes, .. } = messages;
            assert_eq!((complete, incomplete, complete_bytes), (4, 0, body.len()), "{size}");
        }
        let mut messages = Messages::default();
        messages.add(&body[..7]);
        assert_eq!((messages.complete, messages.incomplete, messages.complete_bytes), (1, 2, 5));
        messages.add(&[255; 3]);
        messages.add(&[255; 1000]);
        assert_eq!((messages.complete, messages.incomplete), (1, 1005));
    }
}

//! The bytes of a client: the preface, and a limit on frames that carry no request.

use std::{
    cmp, io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    time::Instant,
};

/// What a client sends first (RFC 9113, section 3.4).
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection whose client has sent the preface of HTTP/2.
pub(super) struct ClientStream<S> {
    stream: S,
    /// The part of the preface that has not been read again.
    preface: &'static [u8],
    frames: FrameLimit,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ClientStream<S> {
    /// Reads the preface. Fails if the client sends something else, or closes the connection.
    ///
    /// hyper reads the preface too, but has no timeout for it.
    pub(super) async fn after_preface(mut stream: S) -> io::Result<Self> {
        let mut received = [0; PREFACE.len()];
        let mut size = 0;
        while let Some(free @ [_, ..]) = received.get_mut(size..) {
            match stream.read(free).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => size += more,
            }
            if received.get(..size) != PREFACE.get(..size) {
                return Err(io::Error::other("not HTTP/2"));
            }
        }
        Ok(Self { stream, preface: &PREFACE, frames: FrameLimit::new() })
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ClientStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.preface.is_empty() {
            let (now, later) = this.preface.split_at(cmp::min(this.preface.len(), buf.remaining()));
            buf.put_slice(now);
            this.preface = later;
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        Poll::Ready(this.frames.count_received(buf.filled().get(before..).unwrap_or_default()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ClientStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, buf))?;
        this.frames.count_sent(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, bufs))?;
        this.frames.count_sent(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// The size of the header of a frame (RFC 9113, section 4.1).
const FRAME_HEADER_SIZE: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
/// Frames without a request that a client may send at once.
const BURST: i64 = 10_000;
/// Frames without a request that a client may send in a second.
const PER_SECOND: i64 = 200;
/// Frames that a client may send for each request: cancelling it, window updates, and small
/// parts of its message.
const PER_REQUEST: i64 = 8;
/// A client may send one frame for so many bytes that the server sends. Go's client sends a
/// PING and a window update for each message that it reads. The acknowledgement of a PING
/// is smaller than this, so that PINGs do not pay for themselves.
const BYTES_PER_FRAME: usize = 64;

/// Limits the frames that carry no request: PING, SETTINGS, PRIORITY, RST_STREAM,
/// WINDOW_UPDATE, DATA with next to nothing in it, and unknown ones. Each costs the server time, and neither
/// hyper nor h2 limits them.
struct FrameLimit {
    header: [u8; FRAME_HEADER_SIZE],
    /// How much of the header is known.
    header_size: usize,
    /// What is left of the frame after its header.
    payload: usize,
    /// How many frames the client may still send.
    credit: i64,
    /// Bytes sent that have not become credit.
    sent: usize,
    refilled: Instant,
}

impl FrameLimit {
    fn new() -> Self {
        Self {
            header: [0; FRAME_HEADER_SIZE],
            header_size: 0,
            payload: 0,
            credit: BURST,
            sent: 0,
            refilled: Instant::now(),
        }
    }

    fn count_sent(&mut self, bytes: usize) {
        self.sent += bytes;
        self.add_credit(i64::try_from(self.sent / BYTES_PER_FRAME).unwrap_or(BURST));
        self.sent %= BYTES_PER_FRAME;
    }

    fn add_credit(&mut self, frames: i64) {
        self.credit = cmp::min(BURST, self.credit.saturating_add(frames));
    }

    /// Counts the frames in what was received. Fails if there are too many.
    fn count_received(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let skipped = cmp::min(self.payload, bytes.len());
            self.payload -= skipped;
            let (_, rest) = bytes.split_at(skipped);
            let free = self.header.get_mut(self.header_size..).unwrap_or_default();
            let (part, rest) = rest.split_at(cmp::min(rest.len(), free.len()));
            for (to, from) in free.iter_mut().zip(part) {
                *to = *from;
            }
            self.header_size += part.len();
            bytes = rest;
            if self.header_size == FRAME_HEADER_SIZE {
                self.header_size = 0;
                self.count_frame()?;
            }
        }
        Ok(())
    }

    fn count_frame(&mut self) -> io::Result<()> {
        let [high, middle, low, kind, ..] = self.header;
        self.payload = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        match kind {
            HEADERS => self.add_credit(PER_REQUEST),
            DATA if self.payload >= BYTES_PER_FRAME => {}
            // h2 limits these.
            CONTINUATION => {}
            _ => self.credit -= 1,
        }
        if self.credit < 0 {
            let earned = self.refilled.elapsed().as_millis() as i64 * PER_SECOND / 1000;
            self.refilled = Instant::now();
            self.add_credit(earned);
            if self.credit < 0 {
                return Err(io::Error::other("too many frames without a request"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], &vec![0; payload]].concat()
    }

    #[test]
    fn frames_are_found_however_they_are_split() {
        let frames = [frame(0, 300), frame(0, 0), frame(6, 8), frame(4, 0)].concat();
        for size in 1..frames.len() {
            let mut limit = FrameLimit::new();
            frames.chunks(size).for_each(|bytes| limit.count_received(bytes).unwrap());
            assert_eq!(limit.credit, BURST - 3, "{size}");
        }
    }

    #[tokio::test]
    async fn flood_is_limited_and_requests_are_not() {
        const PING: u8 = 6;
        const RST_STREAM: u8 = 3;
        const WINDOW_UPDATE: u8 = 8;
        let ping = frame(PING, 8);
        let mut limit = FrameLimit::new();
        let is_limited = (0..2 * BURST).any(|_| {
            limit.count_sent(ping.len());
            limit.count_received(&ping).is_err()
        });
        assert!(is_limited);
        let mut limit = FrameLimit::new();
        assert!((0..2 * BURST).any(|_| limit.count_received(&frame(DATA, 1)).is_err()));
        // A client that cancels every request, and one that reads a stream.
        let cancelled = [frame(HEADERS, 20), frame(DATA, 9), frame(RST_STREAM, 4)].concat();
        let read = [frame(PING, 8), frame(WINDOW_UPDATE, 4), frame(WINDOW_UPDATE, 4)].concat();
        let mut limit = FrameLimit::new();
        for _ in 0..2 * BURST {
            limit.count_received(&cancelled).unwrap();
            limit.count_sent(200);
            limit.count_received(&read).unwrap();
        }
    }
}

//! A gRPC client that does the least: unary calls on one HTTP/2 connection.

use std::{future::poll_fn, net::SocketAddr};

use anyhow::{Context, bail};
use bytes::{Buf, Bytes, BytesMut};
use h2::{RecvStream, client::SendRequest};
use http::{HeaderMap, Request, header};
use tokio::{net::TcpStream, task::JoinSet};

/// So large that answers never wait for room.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 256 * STREAM_WINDOW;

/// One connection. It ends when this is dropped.
pub struct Connection {
    pub caller: Caller,
    _driver: JoinSet<Result<(), h2::Error>>,
}

/// Makes calls on a connection, one after the other.
#[derive(Clone)]
pub struct Caller(SendRequest<Bytes>);

impl Connection {
    pub async fn open(addr: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        let mut settings = h2::client::Builder::new();
        settings.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
        let (sender, connection) = settings.handshake(stream).await?;
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        Ok(Self { caller: Caller(sender), _driver: driver })
    }
}

/// The headers of a call; they are the same each time.
pub fn head(addr: SocketAddr, path: &str) -> anyhow::Result<Request<()>> {
    let head = Request::post(format!("http://{addr}{path}"))
        .header(header::TE, "trailers")
        .header(header::CONTENT_TYPE, "application/grpc");
    Ok(head.body(())?)
}

impl Caller {
    /// Makes a call and returns its answer, of which nothing has been read.
    pub async fn begin(&mut self, head: Request<()>, request: Bytes) -> anyhow::Result<RecvStream> {
        poll_fn(|context| self.0.poll_ready(context)).await?;
        let (response, mut stream) = self.0.send_request(head, false)?;
        stream.send_data(request, true)?;
        let response = response.await?;
        // A failure may be no more than headers.
        if response.headers().contains_key("grpc-status") {
            check(response.headers())?;
        }
        Ok(response.into_body())
    }

    /// Makes a call and returns the message of the answer. Anything but an OK in
    /// the trailers is an error.
    pub async fn call(&mut self, head: Request<()>, request: Bytes) -> anyhow::Result<Bytes> {
        let mut body = self.begin(head, request).await?;
        let mut message = Bytes::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            body.flow_control().release_capacity(chunk.len())?;
            // Nearly always there is one, which needs no copying.
            message = if message.is_empty() { chunk } else { join(&message, &chunk) };
        }
        check(&body.trailers().await?.context("an answer without trailers")?)?;
        message.try_get_u8().and_then(|_| message.try_get_u32()).context("an answer without message")?;
        Ok(message)
    }
}

fn check(headers: &HeaderMap) -> anyhow::Result<()> {
    let status = headers.get("grpc-status").context("an answer without grpc-status")?;
    if status.as_bytes() != b"0" {
        let message = headers.get("grpc-message").map_or(&b""[..], |message| message.as_bytes());
        bail!("a call failed: grpc-status {}, {}", status.to_str()?, String::from_utf8_lossy(message));
    }
    Ok(())
}

fn join(head: &Bytes, tail: &Bytes) -> Bytes {
    let mut both = BytesMut::with_capacity(head.len() + tail.len());
    both.extend_from_slice(head);
    both.extend_from_slice(tail);
    both.freeze()
}

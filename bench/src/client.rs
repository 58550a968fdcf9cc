//! A gRPC client that does the minimum: calls on one HTTP/2 connection.

use std::{future::poll_fn, net::SocketAddr, sync::Arc};

use anyhow::{Context, Result, bail};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{RecvStream, client::SendRequest};
use http::{HeaderMap, Request, header};
use prost::Message;
use tokio::{net::TcpStream, task::JoinSet};

/// Large enough that a response never waits for flow control.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 256 * STREAM_WINDOW;

/// Makes calls of one rpc. Clones share the connection, which closes with the last one.
#[derive(Clone)]
pub struct GrpcClient {
    sender: SendRequest<Bytes>,
    head: Request<()>,
    _driver: Arc<JoinSet<Result<(), h2::Error>>>,
}

impl GrpcClient {
    pub async fn connect(addr: SocketAddr, path: &str) -> Result<Self> {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        let mut settings = h2::client::Builder::new();
        settings.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
        let (sender, connection) = settings.handshake(stream).await?;
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        let head = Request::post(format!("http://{addr}{path}"))
            .header(header::TE, "trailers")
            .header(header::CONTENT_TYPE, "application/grpc")
            .body(())?;
        Ok(Self { sender, head, _driver: Arc::new(driver) })
    }

    /// Starts a call and returns the response stream, of which nothing has been read.
    pub async fn start(&mut self, request: Bytes) -> Result<RecvStream> {
        poll_fn(|context| self.sender.poll_ready(context)).await?;
        let (response, mut stream) = self.sender.send_request(self.head.clone(), false)?;
        stream.send_data(request, true)?;
        let response = response.await?;
        // A failed call may consist of headers only.
        if response.headers().contains_key("grpc-status") {
            check(response.headers())?;
        }
        Ok(response.into_body())
    }

    /// Makes a unary call and returns the message. Every status but OK is an error.
    pub async fn call(&mut self, request: Bytes) -> Result<Bytes> {
        let mut body = self.start(request).await?;
        let mut message = Bytes::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            body.flow_control().release_capacity(chunk.len())?;
            // Nearly every response is one chunk, which is not copied.
            message = if message.is_empty() { chunk } else { [message, chunk].concat().into() };
        }
        check(&body.trailers().await?.context("a response without trailers")?)?;
        message.try_get_u8().and_then(|_| message.try_get_u32()).context("a response without a message")?;
        Ok(message)
    }
}

fn check(headers: &HeaderMap) -> Result<()> {
    let status = headers.get("grpc-status").context("a response without grpc-status")?;
    if status.as_bytes() != b"0" {
        let message = headers.get("grpc-message").map_or(&b""[..], |message| message.as_bytes());
        bail!("a call failed: grpc-status {}, {}", status.to_str()?, String::from_utf8_lossy(message));
    }
    Ok(())
}

/// The message behind the gRPC prefix: uncompressed, and its length.
pub fn frame(message: &impl Message) -> Result<Bytes> {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(5 + length);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length)?);
    message.encode(&mut frame)?;
    Ok(frame.freeze())
}

//! What the server has to know of the methods of its services.

use std::time::Duration;

/// A method. The default is a unary change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MethodKind {
    /// The name, such as `GetUser`.
    pub name: String,
    /// The client sends several messages.
    pub takes_stream: bool,
    /// The server sends several messages.
    pub returns_stream: bool,
    /// The stream ends by itself. Others are ended when their connection is too old.
    pub is_finite: bool,
    /// How long the stream waits for a message of its client. `None`: the service decides.
    pub idle_timeout: Option<Duration>,
    /// The method changes nothing.
    pub is_read: bool,
}

impl MethodKind {
    /// Either side sends several messages.
    pub(super) fn is_stream(&self) -> bool {
        self.takes_stream || self.returns_stream
    }
}

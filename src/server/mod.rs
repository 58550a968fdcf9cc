//! The gRPC server: from a TCP connection to a request of a service.

pub mod body;
mod client_stream;
pub mod connection;
pub mod dispatch;
pub mod executor;
pub mod listener;
pub mod method;
mod state;

//! From a TCP connection to the request of an rpc.

pub mod dispatch;
pub mod executor;

//! Tests of the service through gRPC, on a real PostgreSQL.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test fails by a panic"
)]

mod api;
mod cli;
mod feed;
mod layers;
/// The example is the client under test.
#[path = "../../examples/mirror.rs"]
mod mirror;
mod server;
mod store;
mod support;

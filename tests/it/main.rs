//! The service, proved through gRPC on a real PostgreSQL: one file a promise.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test that cannot go on fails by panicking"
)]

mod batch;
mod batch_model;
mod batch_races;
mod batch_retries;
mod clients;
mod command_line;
mod create;
mod deadlines;
mod delete;
mod export;
mod faults;
mod group;
mod hostile;
mod import;
mod list;
mod lookup;
mod migrations;
/// The very code that is to be copied.
#[path = "../../examples/mirror.rs"]
mod mirror;
mod private_postgres;
mod races;
mod read;
mod retries;
mod settings;
mod start_and_stop;
mod support;
mod under_fire;
mod update;
mod watch;
mod watch_command;
mod watch_filters;

//! user-service: the system of record for users, over gRPC, on PostgreSQL.
//!
//! # The path of a request
//!
//! ```text
//! server/connection.rs   serve_connection      HTTP/2, limits, age of the connection
//! server/dispatch.rs     dispatch              deadline, panic, error details: the same for every rpc
//! api/service.rs         create_user           one function an rpc: parse, run, respond
//! model/request.rs       Create::parse         pure; all violations at once; always valid afterwards
//! api/coalescer.rs       Coalescer::run        alone, or in a batch with requests that wait
//! store/users.rs         create                the statement stands above the function that runs it
//! store/items.rs         Items::run            which variant of it; what became of each request
//! store/pool.rs          Db::run               a pooled connection: prepared, timed, released or closed
//! store/user_row.rs      user_from_row         the only way from a row to a pb::User
//! ```
//!
//! # Layers
//!
//! A folder is a layer. It may use the layers behind the arrow and the leaves, and nothing else;
//! files form no cycle. `tests/it/layers.rs` holds this.
//!
//! | layer | uses | has |
//! |--|--|--|
//! | [`app`], `main.rs` | all | builds, runs and stops the parts, in order |
//! | [`api`] | → feed, store, model | the rpcs; how requests share statements; streams of imports |
//! | [`feed`] | → store, model | the change feed: one reader a process, the watchers |
//! | [`store`] | → model | all SQL and every connection to PostgreSQL |
//! | [`model`] | leaves only | pure: requests, name rules, page tokens, positions in the change log |
//! | [`server`] | leaves only | from a TCP connection to a request |
//! | [`cli`] | → model | the commands that talk to a running service |
//! | [`health`] | → store | readiness and liveness |
//! | leaves: [`config`], [`error`], [`limits`], [`pb`], [`telemetry`] | leaves | serve all |
//!
//! # Invariants
//!
//! - A change, of one user or of a thousand, is one statement: request id, rows of users and
//!   change log are written together or not at all. Nothing is read first and written later. An
//!   atomic batch is committed only if all of its items were done.
//! - An acknowledged change is committed. A response to a change whose outcome is unknown says so.
//! - A statement whose caller has left has 200 ms to finish. Only then is it cancelled, and its
//!   connection closed.
//! - Invalid input is rejected, never corrected. Errors do not echo it.
//! - Personal data is in the tables `users` and `username_holds` and nowhere else: not in the
//!   change log, not beside request ids or chunks of imports, not in any log line.
//! - A stream goes at its client's pace: its memory is bounded, and no pooled connection waits
//!   for a client.
//! - Every change between two positions in the change log is delivered to a watcher. A position
//!   is a set of transactions, not a number. A watcher that keeps up has no task and no
//!   connection to PostgreSQL.
//! - `pb::User` is the user. There is no other type for it.
//!
//! # Absent on purpose
//!
//! - A repository layer, DTOs, traits with one implementation: a statement has one caller, and
//!   the protobuf messages are the types that every layer needs.
//! - Mocks: tests run the real server on a real PostgreSQL.
//! - `OFFSET` and `COUNT(*)`: both read every row that they skip or count.
//! - `LISTEN`/`NOTIFY` on the path of a write: it takes a lock of the whole database at commit.
//! - Requests that wait for a timer in order to fill a batch.
//!
//! `docs/decisions/` has the choices that need more than a sentence.

pub mod api;
pub mod app;
pub mod cli;
pub mod config;
pub mod error;
pub mod feed;
pub mod health;
pub mod limits;
pub mod model;
pub mod pb;
pub mod server;
pub mod store;
pub mod telemetry;

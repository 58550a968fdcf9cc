//! user-service: the system of record for users, over gRPC, on PostgreSQL.
//!
//! # The line a call takes
//!
//! ```text
//! server.rs    call            connection, deadline, panic: the same for every rpc
//!   service.rs   create_user   one function an rpc: parse, call, answer
//!     input.rs     Create::parse  pure; all violations at once; types that cannot be wrong
//!     group.rs     Group::run     alone, or together with calls that wait as well
//!     users.rs     create         the statement stands above the function that runs it
//!       db.rs        Db::run        a connection on loan, prepared, timed, given back or discarded
//!     users.rs     user_from_row  the one way from a row to a pb::User
//! ```
//!
//! # The files
//!
//! | file | what lives there |
//! |--|--|
//! | `main.rs` | the command line: `serve`, `migrate`, `check`, and what is in [`cli`] |
//! | [`cli`] | the commands that talk to a running service: `import` and `export`, their files, and `watch` |
//! | [`config`] | every setting; the only one that reads the environment |
//! | [`app`] | wires, starts and stops; what [`server`], [`group`], [`import`] and [`watch`] spawn ends with it |
//! | [`server`] | from a TCP connection to a call: limits, deadlines, panics, the orderly end |
//! | [`calls`] | a connection and its calls as one task |
//! | [`codec`], [`service`] | how messages are read, and one that is encoded for many; the rpcs, a few lines each |
//! | [`input`], [`names`], [`page`] | pure: requests, name rules and keys, whom a filter means and page tokens |
//! | [`users`], [`grouped`], [`batch`], [`lookup`], [`list`], [`purge`] | all SQL on users, each statement above its function, listed for preparation; `arrays`, what those on many users take |
//! | [`places`] | how many streams of a kind there may be |
//! | [`import`], [`export`] | the streams: chunk after chunk in, one snapshot out; their SQL |
//! | [`change_log`], [`point`] | the change log: its statements, and what is read of it with its users; where one is in history, and the tokens for it |
//! | [`feed`], [`watch`] | the log as a feed: the one reader; a stream |
//! | [`group`] | the gathering of calls, whatever they are about |
//! | [`db`] | the pool, what every statement goes through, the migrations |
//! | [`embedded`] | the private PostgreSQL, when `DATABASE_URL` is unset |
//! | [`error`] | what can go wrong, and the only place that picks a code for it |
//! | [`health`], [`telemetry`] | readiness and life; the log |
//!
//! # What always holds
//!
//! - A change, of one user or of a thousand, is one statement: request id, user rows
//!   and change log are written together or not at all. Nothing is read first and
//!   written later.
//! - What was acknowledged is committed. A call whose outcome is not known says so.
//! - A statement whose caller has gone is cancelled, and its connection discarded.
//! - Input is refused, never repaired; what a refusal says of it does not repeat it.
//! - Personal data is in the table `users` and nowhere else: not in the change
//!   log, not with request ids or chunks of imports, not in any log line.
//! - A stream goes at its client's pace: memory is bounded, and no connection of the
//!   pool waits for a client.
//! - What lies between two points in history is delivered to whoever watches: points
//!   are sets of transactions, not positions in a sequence. A watch that keeps up costs
//!   the process no task and no connection to PostgreSQL.
//! - `pb::User` is the user. There is no other.
//!
//! # What is absent on purpose
//!
//! A repository layer, traits with one implementation, mocks, DTOs, `utils`,
//! `OFFSET`, `COUNT(*)`, `LISTEN`/`NOTIFY` on the way of a write, calls that wait for
//! a timer.

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

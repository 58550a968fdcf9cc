//! The change feed.

pub mod chaos;
mod token_keys;
pub mod watch;
mod watch_backpressure;
mod watch_filters;
mod watch_recovery;
mod watch_tokens;

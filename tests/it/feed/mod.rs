//! The change feed.

pub mod chaos;
pub mod watch;
mod watch_filters;

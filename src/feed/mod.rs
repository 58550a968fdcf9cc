//! The change feed: one reader per process, whose batches all watchers share.

pub mod messages;
pub mod reader;
pub mod watcher;

//! The change feed: one reader a process, shared by all watchers.

pub mod reader;
pub mod watcher;

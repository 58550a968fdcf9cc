//! The rpcs, and how requests share statements.

pub mod coalescer;
pub mod import;
pub mod operations;
pub mod service;

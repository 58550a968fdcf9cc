//! The rpcs.

pub mod coalescer;
pub mod service;

//! Connections, deadlines, start and stop, third-party clients.

pub mod clients;
mod deadlines;
mod lifecycle;

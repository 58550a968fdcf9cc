//! Connections, deadlines, start and stop, third-party clients.

mod attacks;
pub mod clients;
mod connections;
mod deadlines;
mod lifecycle;

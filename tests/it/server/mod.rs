//! Connections, deadlines, start and stop, third-party clients.

mod attacks;
mod clients;
mod connections;
mod deadlines;
mod lifecycle;

//! Connections, deadlines, start and stop, third-party clients.

mod clients;
mod deadlines;
mod lifecycle;

//! Connections, deadlines, start and stop, foreign clients.

mod clients;
mod deadlines;
mod lifecycle;

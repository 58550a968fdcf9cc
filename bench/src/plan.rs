//! What a run measures, for how long, and what it compares.

use std::{path::PathBuf, time::Duration};

/// Calls in flight, each with a number of pgbench sessions. The best number of sessions
/// counts, so pgbench is not bound to the number of calls in flight.
pub const LOADS: [(usize, usize); 4] = [(1, 8), (32, 16), (100, 32), (512, 64)];
/// Calls in flight at which the service without coalescing is close to its limit.
pub const BUSY: usize = 100;

/// The extent of a run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How the report says what made it.
    pub made_by: &'static str,
    /// The `user-service` binary under test.
    pub service: PathBuf,
    /// An older `user-service` binary to compare with.
    pub baseline: Option<PathBuf>,
    pub repetitions: usize,
    /// Of each measurement.
    pub warm_up: Duration,
    pub duration: Duration,
    /// Table sizes in users, ascending, for the measurements that depend on the size.
    pub sizes: Vec<u64>,
    /// The table size for all other measurements; one of `sizes`.
    pub users: u64,
}

/// What handles a call or statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    /// The service with `REQUEST_COALESCING=on`.
    Coalesced,
    /// The service with `REQUEST_COALESCING=off`.
    Single,
    /// PostgreSQL's own benchmark program.
    Pgbench,
    /// The binary that `--baseline` names.
    Baseline,
}

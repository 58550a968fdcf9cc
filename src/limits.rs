//! The limit on concurrent streams of one kind.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::Error;

/// Limits the number of concurrent streams of one kind.
pub struct StreamLimiter {
    kind: &'static str,
    limit: usize,
    permits: Arc<Semaphore>,
}

impl StreamLimiter {
    /// Allows `limit` concurrent streams. `kind`, such as "exports", names them in errors.
    pub fn new(kind: &'static str, limit: usize) -> Self {
        Self { kind, limit, permits: Arc::new(Semaphore::new(limit)) }
    }

    /// Takes a permit, which is released when it is dropped. Fails at once, with an
    /// error that names the limit, if there is none.
    pub fn acquire(&self) -> Result<OwnedSemaphorePermit, Error> {
        let rejection = |_| Error::TooManyStreams { what: self.kind, limit: self.limit };
        Arc::clone(&self.permits).try_acquire_owned().map_err(rejection)
    }
}

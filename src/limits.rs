//! How many streams of a kind there may be at once.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::Error;

/// The places for streams of one kind.
pub struct StreamLimiter {
    what: &'static str,
    limit: usize,
    free: Arc<Semaphore>,
}

impl StreamLimiter {
    /// So many for what is called so, such as "exports".
    pub fn new(what: &'static str, limit: usize) -> Self {
        Self { what, limit, free: Arc::new(Semaphore::new(limit)) }
    }

    /// A place, which is free again when this is dropped; or a refusal that names the
    /// limit.
    pub fn acquire(&self) -> Result<OwnedSemaphorePermit, Error> {
        let refusal = |_| Error::TooManyStreams { what: self.what, limit: self.limit };
        Arc::clone(&self.free).try_acquire_owned().map_err(refusal)
    }
}

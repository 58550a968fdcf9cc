//! Streams of ImportUsers: chunk after chunk in, acknowledgement after acknowledgement out.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures_util::{
    StreamExt,
    stream::{self, BoxStream, Fuse, FuturesOrdered},
};
use tokio::{sync::OwnedSemaphorePermit, time};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::config::Config;
use crate::error::Error;
use crate::limits::{ConnectionId, FairLimiter, StreamLimiter};
use crate::model::stream::Chunk;
use crate::pb;
use crate::store::import;
use crate::store::pool::Db;

/// Chunks of an import that are written at the same time, as long as they do not overlap.
const IN_FLIGHT: usize = 2;

/// The imports into a database.
pub struct Imports {
    db: Arc<Db>,
    limiter: StreamLimiter,
    writes: Arc<FairLimiter>,
    idle_timeout: Duration,
    tasks: TaskTracker,
}

impl Imports {
    /// No imports yet. Each chunk takes a permit of `writes`. `tasks` tracks the tasks that write
    /// chunks.
    pub fn new(db: Arc<Db>, config: &Config, writes: Arc<FairLimiter>, tasks: TaskTracker) -> Self {
        let limiter = StreamLimiter::new("imports", config.max_imports);
        let idle_timeout = Duration::from_millis(config.import_idle_timeout_ms);
        Self { db, limiter, writes, idle_timeout, tasks }
    }

    /// Writes chunks and acknowledges each, in their order; the first error ends the import.
    /// While chunks are being written, only the next one is read.
    pub fn run(
        &self,
        chunks: BoxStream<'static, Result<Chunk, Error>>,
    ) -> Result<BoxStream<'static, Result<pb::ImportUsersResponse, Error>>, Error> {
        let import = Import {
            db: Arc::clone(&self.db),
            connection: ConnectionId::current(),
            writes: Arc::clone(&self.writes),
            idle_timeout: self.idle_timeout,
            tasks: self.tasks.clone(),
            chunks: chunks.fuse(),
            next: None,
            writing: FuturesOrdered::new(),
            written: VecDeque::new(),
            _permit: self.limiter.acquire()?,
        };
        let acks = stream::try_unfold(import, async |mut import| {
            Ok(import.next_ack().await?.map(|ack| (ack, import)))
        });
        Ok(acks.boxed())
    }
}

/// A running import.
struct Import {
    db: Arc<Db>,
    connection: ConnectionId,
    writes: Arc<FairLimiter>,
    /// How long the client may be silent: it holds one of few permits.
    idle_timeout: Duration,
    tasks: TaskTracker,
    chunks: Fuse<BoxStream<'static, Result<Chunk, Error>>>,
    /// The chunk to write next.
    next: Option<Result<Chunk, Error>>,
    /// Each in a task of its own, so that it ends and releases its connection even while the
    /// client does not read acknowledgements.
    writing: FuturesOrdered<AbortOnDropHandle<Result<pb::ImportUsersResponse, Error>>>,
    /// The chunks that `writing` writes.
    written: VecDeque<Arc<Chunk>>,
    _permit: OwnedSemaphorePermit,
}

impl Import {
    async fn next_ack(&mut self) -> Result<Option<pb::ImportUsersResponse>, Error> {
        loop {
            self.write_next();
            let expects_chunk = self.next.is_none() && !self.chunks.is_done();
            tokio::select! {
                // A chunk that has arrived counts, even if it is late.
                biased;
                Some(ack) = self.writing.next() => {
                    self.written.pop_front();
                    return ack.map_err(|_| Error::Internal)?.map(Some);
                }
                chunk = self.chunks.next(), if expects_chunk => self.next = chunk,
                () = time::sleep(self.idle_timeout), if expects_chunk && self.writing.is_empty() => {
                    return Err(Error::DeadlineExceeded);
                }
                else => return self.next.take().transpose().map(|_| None),
            }
        }
    }

    /// Starts to write the next chunk, unless it overlaps with one that is being written.
    fn write_next(&mut self) {
        let may_start = |chunk: &Chunk| {
            self.written.len() < IN_FLIGHT && !self.written.iter().any(|other| other.overlaps(chunk))
        };
        if let Some(chunk) = self.next.take_if(|next| next.as_ref().is_ok_and(may_start))
            && let Ok(chunk) = chunk.map(Arc::new)
        {
            self.written.push_back(Arc::clone(&chunk));
            let (db, writes) = (Arc::clone(&self.db), Arc::clone(&self.writes));
            let task = self.tasks.spawn(self.connection.run(async move {
                let _permit = writes.acquire().await?;
                import::write(&db, &chunk).await
            }));
            self.writing.push_back(AbortOnDropHandle::new(task));
        }
    }
}

//! Limits on concurrent work, and how connections share them.

use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task_local,
};

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

/// The number of a client connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

task_local! {
    /// A connection and its requests are one task, see `server/executor.rs`. An extension of each
    /// request would cost two allocations.
    static CONNECTION: ConnectionId;
}

impl ConnectionId {
    /// The connection of the request that the current task handles.
    pub fn current() -> Self {
        CONNECTION.try_get().unwrap_or_default()
    }

    /// Runs a connection together with its requests.
    pub async fn run<F: Future>(self, connection: F) -> F::Output {
        CONNECTION.scope(self, connection).await
    }
}

/// A queue from which connections take turns: one with a thousand requests does not delay one
/// with a single request.
pub struct FairQueue<T> {
    /// The items of each connection, in their order. None of the queues is empty.
    queues: BTreeMap<ConnectionId, VecDeque<T>>,
    /// The next turn is that of this connection, or of the first one behind it that has an item.
    turn: ConnectionId,
    len: usize,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { queues: BTreeMap::new(), turn: ConnectionId::default(), len: 0 }
    }
}

impl<T> FairQueue<T> {
    /// The number of items.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no item.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds an item behind those of the same connection.
    pub fn push(&mut self, connection: ConnectionId, item: T) {
        self.queues.entry(connection).or_default().push_back(item);
        self.len += 1;
    }

    /// Puts an item back that was taken. The next turn is that of its connection.
    pub fn put_back(&mut self, connection: ConnectionId, item: T) {
        self.queues.entry(connection).or_default().push_front(item);
        self.len += 1;
        self.turn = connection;
    }

    /// Takes the first item of the connection whose turn it is.
    pub fn pop(&mut self) -> Option<(ConnectionId, T)> {
        let mut from_turn = self.queues.range(self.turn..);
        let (&connection, _) = from_turn.next().or_else(|| self.queues.first_key_value())?;
        self.turn = ConnectionId(connection.0.wrapping_add(1));
        self.take(connection, VecDeque::pop_front).map(|item| (connection, item))
    }

    /// Makes room for one more item of a connection: takes the newest item of the connection that
    /// has the most. `None` if that is the same connection.
    pub fn displace(&mut self, connection: ConnectionId) -> Option<T> {
        let own = self.queues.get(&connection).map_or(0, VecDeque::len);
        let (&longest, items) = self.queues.iter().max_by_key(|(_, items)| items.len())?;
        if items.len() <= own + 1 {
            return None;
        }
        self.take(longest, VecDeque::pop_back)
    }

    fn take(&mut self, connection: ConnectionId, pop: fn(&mut VecDeque<T>) -> Option<T>) -> Option<T> {
        let items = self.queues.get_mut(&connection)?;
        let item = pop(items)?;
        if items.is_empty() {
            self.queues.remove(&connection);
        }
        self.len -= 1;
        Some(item)
    }
}

/// Limits concurrent work. Connections whose requests wait for it take turns.
pub struct FairLimiter {
    state: Mutex<LimiterState>,
    max_queued: usize,
}

struct LimiterState {
    free: usize,
    waiting: FairQueue<oneshot::Sender<FairPermit>>,
}

/// The right to do a piece of limited work. When it is dropped, the next one in the queue gets
/// it.
pub struct FairPermit(Arc<FairLimiter>);

impl FairLimiter {
    /// Gives out `limit` permits. At most `max_queued` requests wait for one.
    pub fn new(limit: usize, max_queued: usize) -> Arc<Self> {
        let state = Mutex::new(LimiterState { free: limit, waiting: FairQueue::default() });
        Arc::new(Self { state, max_queued })
    }

    /// Waits for a permit. If too many requests wait, one of the connection with the most fails
    /// with [`Error::Overloaded`].
    pub async fn acquire(self: &Arc<Self>) -> Result<FairPermit, Error> {
        let connection = ConnectionId::current();
        let permit = {
            let mut state = self.state();
            if state.free > 0 {
                state.free -= 1;
                return Ok(FairPermit(Arc::clone(self)));
            }
            if state.waiting.len() >= self.max_queued && state.waiting.displace(connection).is_none() {
                return Err(Error::Overloaded);
            }
            let (sender, permit) = oneshot::channel();
            state.waiting.push(connection, sender);
            permit
        };
        permit.await.map_err(|_| Error::Overloaded)
    }

    fn state(&self) -> MutexGuard<'_, LimiterState> {
        // The state is consistent at every step, so a panic leaves it usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for FairPermit {
    fn drop(&mut self) {
        let next = {
            let mut state = self.0.state();
            loop {
                match state.waiting.pop() {
                    Some((_, next)) if next.is_closed() => {}
                    Some((_, next)) => break next,
                    None => {
                        state.free += 1;
                        return;
                    }
                }
            }
        };
        // If the request has been cancelled meanwhile, the permit is dropped again.
        drop(next.send(Self(Arc::clone(&self.0))));
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const A: ConnectionId = ConnectionId(1);
    const B: ConnectionId = ConnectionId(2);
    const C: ConnectionId = ConnectionId(3);

    fn queue(items: &[(ConnectionId, u32)]) -> FairQueue<u32> {
        let mut queue = FairQueue::default();
        items.iter().for_each(|(connection, item)| queue.push(*connection, *item));
        queue
    }

    fn drain(queue: &mut FairQueue<u32>) -> Vec<u32> {
        std::iter::from_fn(|| queue.pop()).map(|(_, item)| item).collect()
    }

    #[test]
    fn connections_take_turns() {
        let mut queue = queue(&[(A, 1), (A, 2), (A, 3), (A, 4), (C, 30), (B, 20), (C, 31)]);
        assert_eq!(drain(&mut queue), [1, 20, 30, 2, 31, 3, 4]);
        assert!(queue.is_empty());
    }

    #[test]
    fn item_that_is_put_back_is_next() {
        let mut queue = queue(&[(A, 1), (A, 2), (B, 20), (C, 30)]);
        let [first, second] = [queue.pop().unwrap(), queue.pop().unwrap()];
        assert_eq!((first, second), ((A, 1), (B, 20)));
        queue.put_back(B, 20);
        assert_eq!((queue.len(), drain(&mut queue)), (3, vec![20, 30, 2]));
    }

    #[test]
    fn full_queue_displaces_the_newest_item_of_the_connection_with_the_most() {
        let mut queue = queue(&[(A, 1), (A, 2), (A, 3), (B, 20)]);
        assert_eq!(queue.displace(C), Some(3));
        assert_eq!(queue.displace(A), None);
        assert_eq!(queue.displace(B), None);
        assert_eq!(drain(&mut queue), [1, 20, 2]);
    }

    #[test]
    fn permits_go_to_connections_in_turn_and_not_to_cancelled_requests() {
        let limiter = FairLimiter::new(1, 3);
        let acquire = |connection: ConnectionId| {
            let limiter = Arc::clone(&limiter);
            let mut permit = async move { connection.run(limiter.acquire()).await }.boxed();
            let first = (&mut permit).now_or_never();
            (permit, first)
        };
        let (_, held) = acquire(A);
        let [(mut a, _), (cancelled, _), (mut other_a, _)] = [acquire(A), acquire(B), acquire(A)];
        let (mut c, _) = acquire(C);
        assert_eq!((&mut other_a).now_or_never().unwrap().err(), Some(Error::Overloaded));
        assert_eq!(acquire(A).1.unwrap().err(), Some(Error::Overloaded));
        drop(cancelled);
        drop(held);
        let permit = (&mut a).now_or_never().unwrap();
        assert!(permit.is_ok() && (&mut c).now_or_never().is_none());
        drop(permit);
        drop((&mut c).now_or_never().unwrap());
        assert!(acquire(B).1.unwrap().is_ok());
    }
}

//! Requests that arrive while a statement is running share the next one.
//!
//! A *slot* is the right to run a statement. A request that finds a free slot takes it and
//! runs at once, in its own task: an idle service never waits. A request that finds all slots
//! taken is queued. When a slot is released while requests are queued, they are run together
//! as one statement, up to a limit. So batches form only because requests wait anyway: the
//! busier the service, the larger the batches. No request is delayed to fill a batch. Connections
//! take turns in the queue.
//!
//! A statement never waits for a locked row: a request that needs one leaves its batch, waits
//! for the row in a statement of its own, and holds a *contended slot* meanwhile. A lock that
//! cannot be skipped, a username that another transaction is inserting, makes the statement
//! fail; the batch is then run again in halves, until the request that waits is alone.
//!
//! If the outcome of a shared statement is unknown, or it exceeds the time limit, all its
//! requests fail.

use std::{
    collections::HashSet,
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time};
use tokio_util::task::TaskTracker;

use crate::error::Error;
use crate::limits::{ConnectionId, FairLimiter, FairQueue};
use crate::store::items::{Locking, Outcome};

/// Statements that may wait for locks at the same time, for each operation. A locked row can
/// keep no more of the pool's connections busy.
const MAX_CONTENDED: usize = 2;

/// How long a statement of one request keeps its slot. On a connection that has gone silent it
/// would keep it until its deadline.
const SLOT_HOLD_MAX: Duration = Duration::from_millis(100);

/// An operation whose requests can share a statement.
pub trait Operation: Send + Sync + 'static {
    /// A request.
    type Request: Send + Sync + 'static;
    /// Its response.
    type Response: Send + 'static;

    /// Which requests may run in the same statement.
    fn batch_policy(request: &Self::Request) -> BatchPolicy;

    /// Runs requests as one statement; the outcomes are in their order.
    fn run_batch(
        &self,
        requests: &[Self::Request],
        locking: Locking,
    ) -> impl Future<Output = Result<Vec<Outcome<Self::Response>>, Error>> + Send;
}

/// Which queued requests may run in the same statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchPolicy {
    /// All.
    Any,
    /// Requests that share none of these keys.
    UniqueKeys([Option<u128>; 3]),
    /// None.
    Alone,
}

/// The limits of a coalescer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Statements that run at the same time.
    pub max_in_flight: usize,
    /// Requests in one statement; 1 switches coalescing off.
    pub max_batch: usize,
    /// Queued requests; more are rejected.
    pub max_queued: usize,
    /// How long a statement may take.
    pub timeout: Duration,
    /// How long a request may wait for a contended slot.
    pub lock_timeout: Duration,
}

/// The slots of an operation, and the requests that wait for them.
pub struct Coalescer<O: Operation> {
    operation: O,
    limits: Limits,
    tasks: TaskTracker,
    queue: Mutex<Queue<O>>,
    contended: Arc<FairLimiter>,
}

struct Queue<O: Operation> {
    slots_taken: usize,
    requests: FairQueue<QueuedRequest<O>>,
}

struct QueuedRequest<O: Operation> {
    request: O::Request,
    caller: Caller<O>,
}

type Caller<O> = oneshot::Sender<NextStep<O>>;

/// What the task of a request does next.
enum NextStep<O: Operation> {
    /// Run it, with this slot.
    Run(O::Request, Slot<O>),
    /// Run it and wait for locks, with a contended slot.
    Wait(O::Request),
    /// Return the response.
    Return(Result<O::Response, Error>),
}

/// What a new request finds.
enum Admission<O: Operation> {
    Slot(O::Request, Slot<O>),
    Queued(oneshot::Receiver<NextStep<O>>),
}

/// A slot that is taken. However it is released (the statement ends, the caller leaves, a
/// panic), it goes to the queued requests.
struct Slot<O: Operation>(Arc<Coalescer<O>>);

impl<O: Operation> Coalescer<O> {
    /// A coalescer. Its tasks are tracked by `tasks`.
    pub fn new(operation: O, limits: Limits, tasks: TaskTracker) -> Arc<Self> {
        let queue = Mutex::new(Queue { slots_taken: 0, requests: FairQueue::default() });
        let contended = FairLimiter::new(MAX_CONTENDED, limits.max_queued);
        Arc::new(Self { operation, limits, tasks, queue, contended })
    }

    /// Runs a request, alone or in a batch.
    pub async fn run(self: &Arc<Self>, request: O::Request) -> Result<O::Response, Error> {
        let step = match self.admit(request)? {
            Admission::Slot(request, slot) => NextStep::Run(request, slot),
            // A statement that panics responds to no request.
            Admission::Queued(step) => step.await.map_err(|_| Error::Internal)?,
        };
        match step {
            NextStep::Return(response) => response,
            // Boxed, because a queued request should not be as large as a running one.
            NextStep::Run(request, slot) => Box::pin(self.run_one(request, slot)).await,
            NextStep::Wait(request) => Box::pin(self.run_contended(request)).await,
        }
    }

    async fn run_one(&self, request: O::Request, slot: Slot<O>) -> Result<O::Response, Error> {
        let requests = [request];
        let outcomes = self.hold_slot(slot, self.operation.run_batch(&requests, Locking::Skip)).await;
        match first(outcomes) {
            Ok(Outcome::Done(response)) => Ok(response),
            Ok(Outcome::Rejected(error)) => Err(error),
            Ok(Outcome::Locked) | Err(Error::LockTimeout) => {
                let [request] = requests;
                self.run_contended(request).await
            }
            Err(error) => Err(error),
        }
    }

    /// Runs a statement with a slot, and without it once it has taken long.
    async fn hold_slot<T>(&self, slot: Slot<O>, statement: impl Future<Output = T>) -> T {
        let mut statement = pin!(statement);
        if let Ok(done) = time::timeout(SLOT_HOLD_MAX, statement.as_mut()).await {
            return done;
        }
        drop(slot);
        statement.await
    }

    async fn run_contended(&self, request: O::Request) -> Result<O::Response, Error> {
        let permit = time::timeout(self.limits.lock_timeout, self.contended.acquire()).await;
        let _permit = permit.map_err(|_| Error::LockTimeout)??;
        match first(self.operation.run_batch(&[request], Locking::Wait).await)? {
            Outcome::Done(response) => Ok(response),
            Outcome::Rejected(error) => Err(error),
            Outcome::Locked => Err(Error::TransactionConflict),
        }
    }

    fn admit(self: &Arc<Self>, request: O::Request) -> Result<Admission<O>, Error> {
        let mut queue = self.queue();
        if queue.slots_taken < self.limits.max_in_flight {
            queue.slots_taken += 1;
            return Ok(Admission::Slot(request, Slot(Arc::clone(self))));
        }
        let connection = ConnectionId::current();
        if queue.requests.len() >= self.limits.max_queued {
            let displaced = queue.requests.displace(connection).ok_or(Error::Overloaded)?;
            drop(displaced.caller.send(NextStep::Return(Err(Error::Overloaded))));
        }
        let (caller, step) = oneshot::channel();
        queue.requests.push(connection, QueuedRequest { request, caller });
        Ok(Admission::Queued(step))
    }

    /// Takes the requests to run together next. A request whose caller has left is dropped; one
    /// that may not join the batch keeps its position in the queue.
    fn next_batch(&self) -> (Vec<O::Request>, Vec<Caller<O>>) {
        let mut queue = self.queue();
        let (mut requests, mut callers) = (Vec::new(), Vec::new());
        let (mut keys, mut skipped) = (HashSet::new(), Vec::new());
        while requests.len() < self.limits.max_batch && skipped.len() < self.limits.max_batch {
            let Some((connection, next)) = queue.requests.pop() else { break };
            if next.caller.is_closed() {
                continue;
            }
            let policy = O::batch_policy(&next.request);
            let may_join = match policy {
                BatchPolicy::Any => true,
                BatchPolicy::Alone => requests.is_empty(),
                BatchPolicy::UniqueKeys(own) => !own.iter().flatten().any(|key| keys.contains(key)),
            };
            if !may_join {
                skipped.push((connection, next));
                continue;
            }
            if let BatchPolicy::UniqueKeys(own) = policy {
                keys.extend(own.into_iter().flatten());
            }
            requests.push(next.request);
            callers.push(next.caller);
            if policy == BatchPolicy::Alone {
                break;
            }
        }
        for (connection, request) in skipped.into_iter().rev() {
            queue.requests.put_back(connection, request);
        }
        (requests, callers)
    }

    fn queue(&self) -> MutexGuard<'_, Queue<O>> {
        // The queue is consistent at every step, so a panic leaves it usable.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<O: Operation> Drop for Slot<O> {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        if queue.requests.is_empty() {
            queue.slots_taken -= 1;
        } else {
            self.0.tasks.spawn(run_next(Slot(Arc::clone(&self.0))));
        }
    }
}

/// Runs queued requests as one statement, and passes the outcomes to their callers.
async fn run_next<O: Operation>(slot: Slot<O>) {
    let coalescer = Arc::clone(&slot.0);
    let (mut requests, mut callers) = coalescer.next_batch();
    if requests.len() < 2 {
        if let (Some(request), Some(caller)) = (requests.pop(), callers.pop()) {
            // If the caller has left, the slot is released with the message.
            drop(caller.send(NextStep::Run(request, slot)));
        }
        return;
    }
    let mut batches = vec![(requests, callers)];
    while let Some((mut requests, mut callers)) = batches.pop() {
        let outcomes = run_while_awaited(&coalescer, &requests, &mut callers).await;
        let outcomes = match outcomes {
            // Nothing was done. One request is the reason.
            Err(Error::LockTimeout | Error::TransactionConflict) if requests.len() > 1 => {
                let half = requests.len() / 2;
                let second = (requests.split_off(half), callers.split_off(half));
                batches.extend([second, (requests, callers)]);
                continue;
            }
            Err(Error::LockTimeout) => vec![Outcome::Locked],
            Err(error) => callers.iter().map(|_| Outcome::Rejected(error.clone())).collect(),
            Ok(outcomes) => outcomes,
        };
        for ((request, caller), outcome) in requests.into_iter().zip(callers).zip(outcomes) {
            let step = match outcome {
                Outcome::Done(response) => NextStep::Return(Ok(response)),
                Outcome::Rejected(error) => NextStep::Return(Err(error)),
                Outcome::Locked => NextStep::Wait(request),
            };
            drop(caller.send(step));
        }
    }
}

/// Runs a statement for as long as any of its callers waits for it.
async fn run_while_awaited<O: Operation>(
    coalescer: &Coalescer<O>,
    requests: &[O::Request],
    callers: &mut [Caller<O>],
) -> Result<Vec<Outcome<O::Response>>, Error> {
    let all_have_left = async {
        for caller in callers {
            caller.closed().await;
        }
    };
    let statement = coalescer.operation.run_batch(requests, Locking::Skip);
    let ended = tokio::select! {
        ended = time::timeout(coalescer.limits.timeout, statement) => ended,
        () = all_have_left => return Err(Error::DeadlineExceeded),
    };
    ended.unwrap_or(Err(Error::DeadlineExceeded))
}

/// The outcome of a batch of one.
fn first<R>(outcomes: Result<Vec<Outcome<R>>, Error>) -> Result<Outcome<R>, Error> {
    outcomes?.into_iter().next().ok_or(Error::Internal)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "the tests spawn requests as tasks")]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::{FutureExt, future::join_all};
    use tokio::sync::Semaphore;

    use super::*;

    /// Numbers that are returned once `go` permits it. 13 panics, 9 is a locked row, 7 is a
    /// username that another transaction is inserting.
    struct Numbers {
        go: Semaphore,
        statements: AtomicUsize,
        failure: Option<Error>,
    }

    impl Operation for Numbers {
        type Request = u128;
        type Response = u128;

        fn batch_policy(request: &u128) -> BatchPolicy {
            match request {
                0..100 => BatchPolicy::Any,
                100..200 => BatchPolicy::UniqueKeys([None, Some(request % 10), None]),
                _ => BatchPolicy::Alone,
            }
        }

        async fn run_batch(&self, requests: &[u128], locking: Locking) -> Result<Vec<Outcome<u128>>, Error> {
            self.statements.fetch_add(1, Ordering::Relaxed);
            self.go.acquire().await.unwrap().forget();
            let keys: HashSet<_> =
                requests.iter().filter(|n| (100..200).contains(*n)).map(|n| n % 10).collect();
            assert_eq!(keys.len(), requests.iter().filter(|n| (100..200).contains(*n)).count());
            assert!(!requests.contains(&13));
            if locking == Locking::Skip && requests.contains(&7) {
                return Err(Error::LockTimeout);
            }
            if let Some(error) = self.failure.clone().filter(|_| requests.len() > 1) {
                return Err(error);
            }
            let outcome = |n: &u128| match n {
                9 if locking == Locking::Skip => Outcome::Locked,
                n => Outcome::Done(*n),
            };
            Ok(requests.iter().map(outcome).collect())
        }
    }

    fn coalescer(max_batch: usize, failure: Option<Error>) -> Arc<Coalescer<Numbers>> {
        let limits = Limits {
            max_in_flight: 1,
            max_batch,
            max_queued: 100,
            timeout: Duration::from_secs(3600),
            lock_timeout: Duration::from_secs(3600),
        };
        let numbers = Numbers { go: Semaphore::new(0), statements: AtomicUsize::new(0), failure };
        Coalescer::new(numbers, limits, TaskTracker::new())
    }

    async fn run(
        coalescer: &Arc<Coalescer<Numbers>>,
        requests: impl IntoIterator<Item = u128>,
    ) -> Vec<Result<u128, Error>> {
        run_of_connections(coalescer, requests.into_iter().map(|request| (0, request))).await
    }

    /// Sends requests, each of a connection, at once and in this order, and lets them continue when
    /// all are admitted.
    async fn run_of_connections(
        coalescer: &Arc<Coalescer<Numbers>>,
        requests: impl IntoIterator<Item = (u64, u128)>,
    ) -> Vec<Result<u128, Error>> {
        let requests: Vec<_> = requests
            .into_iter()
            .map(|(connection, request)| {
                let coalescer = Arc::clone(coalescer);
                tokio::spawn(ConnectionId(connection).run(async move { coalescer.run(request).await }))
            })
            .collect();
        tokio::task::yield_now().await;
        coalescer.operation.go.add_permits(1000);
        let responses = join_all(requests).await.into_iter().map(Result::unwrap).collect();
        coalescer.tasks.close();
        coalescer.tasks.wait().await;
        let queue = coalescer.queue();
        assert_eq!((queue.slots_taken, queue.requests.len()), (0, 0));
        drop(queue);
        let contended: Vec<_> =
            (0..MAX_CONTENDED).map(|_| coalescer.contended.acquire().now_or_never()).collect();
        assert!(contended.iter().all(Option::is_some));
        responses
    }

    fn statements(coalescer: &Coalescer<Numbers>) -> usize {
        coalescer.operation.statements.load(Ordering::Relaxed)
    }

    #[tokio::test]
    async fn first_request_runs_at_once_and_queued_requests_share_a_statement() {
        let coalescer = coalescer(8, None);
        assert_eq!(run(&coalescer, [1, 2, 3, 4, 5]).await, [1, 2, 3, 4, 5].map(Ok));
        assert_eq!(statements(&coalescer), 2);
    }

    #[tokio::test]
    async fn batches_of_one_switch_coalescing_off() {
        let coalescer = coalescer(1, None);
        assert_eq!(run(&coalescer, [1, 2, 3, 4, 5]).await, [1, 2, 3, 4, 5].map(Ok));
        assert_eq!(statements(&coalescer), 5);
    }

    #[tokio::test]
    async fn batches_and_queue_are_bounded() {
        let coalescer = coalescer(8, None);
        let responses = run(&coalescer, (0..110).map(|n| 10 + n % 50 * 2)).await;
        assert_eq!(responses.iter().filter(|response| **response == Err(Error::Overloaded)).count(), 9);
        assert_eq!(statements(&coalescer), 1 + 100_usize.div_ceil(8));
    }

    #[tokio::test]
    async fn full_queue_rejects_a_request_of_the_connection_with_the_most() {
        let coalescer = coalescer(8, None);
        let requests = (0..=100).map(|_| (1, 2)).chain([(2, 4)]);
        let responses = run_of_connections(&coalescer, requests).await;
        let (last, others) = responses.split_last().unwrap();
        let (displaced, others) = others.split_last().unwrap();
        assert_eq!((last, displaced), (&Ok(4), &Err(Error::Overloaded)));
        assert!(others.iter().all(|response| *response == Ok(2)));
    }

    #[tokio::test]
    async fn requests_with_a_common_key_do_not_share_a_statement() {
        let coalescer = coalescer(8, None);
        let requests = [0, 100, 110, 102, 120, 112];
        assert_eq!(run(&coalescer, requests).await, requests.map(Ok));
        // 0 | 100, 102 | 110, 112 | 120
        assert_eq!(statements(&coalescer), 4);
    }

    #[tokio::test]
    async fn requests_that_cannot_share_a_statement_run_one_by_one() {
        let coalescer = coalescer(8, None);
        assert_eq!(run(&coalescer, [0, 1, 200, 2, 202]).await, [0, 1, 200, 2, 202].map(Ok));
        // 0 | 1, 2 | 200 | 202
        assert_eq!(statements(&coalescer), 4);
    }

    #[tokio::test]
    async fn request_for_a_locked_row_waits_outside_its_batch() {
        let coalescer = coalescer(8, None);
        assert_eq!(run(&coalescer, [9, 1, 9, 2, 3]).await, [9, 1, 9, 2, 3].map(Ok));
        // 9 | 1, 9, 2, 3, and both 9 again with a contended slot.
        assert_eq!(statements(&coalescer), 4);
    }

    #[tokio::test]
    async fn request_that_waits_for_a_username_is_found_by_halving_its_batch() {
        let coalescer = coalescer(8, None);
        assert_eq!(run(&coalescer, [0, 1, 2, 3, 4, 5, 6, 7, 8]).await, [0, 1, 2, 3, 4, 5, 6, 7, 8].map(Ok));
        // 0 | 1-8 | 1-4 | 5-8 | 5, 6 | 7, 8 | 7 | 8, and 7 again with a contended slot.
        assert_eq!(statements(&coalescer), 9);
    }

    #[tokio::test]
    async fn unknown_outcome_fails_all_requests_of_the_batch() {
        let coalescer = coalescer(8, Some(Error::OutcomeUnknown));
        let unknown = Err(Error::OutcomeUnknown);
        assert_eq!(run(&coalescer, [0, 2, 4]).await, [Ok(0), unknown.clone(), unknown]);
    }

    #[tokio::test]
    async fn panic_fails_the_batch_and_releases_the_slot() {
        let coalescer = coalescer(8, None);
        let responses = run(&coalescer, [0, 2, 13, 4, 4, 4, 4, 4, 4, 6, 8]).await;
        assert_eq!(responses.first(), Some(&Ok(0)));
        assert!(responses[1..9].iter().all(|response| *response == Err(Error::Internal)));
        assert_eq!(responses[9..], [Ok(6), Ok(8)]);
    }

    #[tokio::test(start_paused = true)]
    async fn slow_statement_of_one_request_releases_its_slot() {
        let coalescer = coalescer(8, None);
        let slow = tokio::spawn({
            let coalescer = Arc::clone(&coalescer);
            async move { coalescer.run(0).await }
        });
        tokio::task::yield_now().await;
        time::sleep(SLOT_HOLD_MAX * 2).await;
        assert_eq!(coalescer.queue().slots_taken, 0);
        coalescer.operation.go.add_permits(1);
        assert_eq!(slow.await.unwrap(), Ok(0));
    }

    #[tokio::test]
    async fn statement_ends_when_all_its_requests_are_cancelled() {
        let coalescer = coalescer(8, None);
        let spawn = |request| {
            let coalescer = Arc::clone(&coalescer);
            tokio::spawn(async move { coalescer.run(request).await })
        };
        let (first, second, third, fourth) = (spawn(0), spawn(2), spawn(4), spawn(6));
        tokio::task::yield_now().await;
        second.abort();
        assert!(second.await.unwrap_err().is_cancelled());
        // The slot passes to the other two requests, which are then cancelled, too.
        coalescer.operation.go.add_permits(1);
        assert_eq!(first.await.unwrap(), Ok(0));
        while statements(&coalescer) < 2 {
            tokio::task::yield_now().await;
        }
        third.abort();
        fourth.abort();
        coalescer.tasks.close();
        coalescer.tasks.wait().await;
        assert_eq!(run(&coalescer, [8]).await, [Ok(8)]);
    }
}

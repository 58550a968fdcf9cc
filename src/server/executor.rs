//! The executor that runs a connection and its requests as one task.
//!
//! hyper spawns the handling of each request on an executor. If each were a task of the
//! runtime, other threads would take the requests of a connection, and all of them would
//! contend for the lock of its HTTP/2 state. Here the task of the connection polls its
//! requests too, so one thread at a time does both, and a coalesced statement that
//! answers many requests wakes one task. The price: a connection uses at most one core.

use std::{
    future::{Future, poll_fn},
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::{
    FutureExt, StreamExt,
    future::{self, BoxFuture, Either},
    stream,
    task::AtomicWaker,
};
use hyper::rt::Executor;
use tokio::sync::mpsc;

use crate::server::state::{ReadDeadline, RequestState};

/// How often a future that wakes itself is polled before it yields to other tasks.
const MAX_POLLS: usize = 8;

/// Receives the requests of one connection from hyper.
#[derive(Clone)]
pub struct ConnectionExecutor {
    sender: mpsc::UnboundedSender<RunningRequest>,
    /// What the request holds whose future comes next.
    next: Arc<Mutex<Option<Arc<RequestState>>>>,
}

impl ConnectionExecutor {
    /// Returns the executor, and the future that runs its requests.
    fn new() -> (Self, BoxFuture<'static, ()>) {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let requests = stream::poll_fn(move |cx| receiver.poll_recv(cx));
        let executor = Self { sender, next: Arc::default() };
        (executor, requests.for_each_concurrent(None, |request| request).boxed())
    }

    /// Sets what the next request holds. hyper calls its service, and then at once
    /// [`execute`](Executor::execute) with the future that handles the request and sends the
    /// response.
    pub(super) fn set_next(&self, request: Option<Arc<RequestState>>) {
        *self.next() = request;
    }

    fn next(&self) -> MutexGuard<'_, Option<Arc<RequestState>>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for ConnectionExecutor {
    fn execute(&self, request: F) {
        let state = self.next().take();
        // `dispatch.rs` turns the panic of a service into a response. A panic later, in the body
        // of a response, fails this request only.
        let future = AssertUnwindSafe(request).catch_unwind().map(drop).boxed();
        // The receiver lives as long as the connection, so this cannot fail.
        let _ = self.sender.send(RunningRequest { future, state, deadline: ReadDeadline::default() });
    }
}

/// A request, until its response is sent or the client has not read it in time.
struct RunningRequest {
    future: BoxFuture<'static, ()>,
    /// `None` if it was rejected.
    state: Option<Arc<RequestState>>,
    deadline: ReadDeadline,
}

impl Future for RunningRequest {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        match (this.future.poll_unpin(cx), &this.state) {
            (Poll::Ready(()), _) => Poll::Ready(()),
            // hyper does not ask for more of a response while the client does not read, so the
            // deadline cannot be in the response. Dropping the future resets the stream.
            (Poll::Pending, Some(state)) => this.deadline.poll(state, cx),
            (Poll::Pending, None) => Poll::Pending,
        }
    }
}

/// Runs a connection together with its requests. When the connection ends, its requests
/// are dropped.
pub async fn with_executor<C: Future>(connection: impl FnOnce(ConnectionExecutor) -> C) -> C::Output {
    let (executor, requests) = ConnectionExecutor::new();
    let connection = pin!(connection(executor));
    match poll_until_idle(future::select(connection, requests)).await {
        Either::Left((output, _)) => output,
        // The connection has dropped its executor: there are no more requests.
        Either::Right(((), connection)) => connection.await,
    }
}

/// Polls a future until it is idle: waits for something outside of itself. If one part
/// wakes another during a poll, as a request does that has data to send, the future is
/// polled again at once. Passing that wake-up to the runtime would wake another thread.
async fn poll_until_idle<F: Future + Unpin>(mut future: F) -> F::Output {
    let flag = Arc::new(WakeFlag::default());
    let waker = Waker::from(Arc::clone(&flag));
    poll_fn(|cx| {
        flag.task.register(cx.waker());
        for _ in 0..MAX_POLLS {
            flag.state.swap(POLLING, Ordering::AcqRel);
            if let Poll::Ready(output) = future.poll_unpin(&mut Context::from_waker(&waker)) {
                return Poll::Ready(output);
            }
            let idle = flag.state.compare_exchange(POLLING, IDLE, Ordering::AcqRel, Ordering::Acquire);
            if idle.is_ok() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

const IDLE: u8 = 0;
const POLLING: u8 = 1;
const NOTIFIED: u8 = 2;

/// Wakes the task if its future is idle. During a poll, records that the future must be
/// polled again.
#[derive(Default)]
struct WakeFlag {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Wake for WakeFlag {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.swap(NOTIFIED, Ordering::AcqRel) == IDLE {
            self.task.wake();
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, clippy::panic, reason = "a test spawns tasks, and one request panics")]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::sync::oneshot;

    use super::*;

    /// Counts the wake-ups of a task.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Polls once; returns the result and the number of wake-ups of the task.
    fn poll<F: Future + Unpin>(future: &mut F) -> (Poll<F::Output>, usize) {
        let count = Arc::new(Count::default());
        let polled = future.poll_unpin(&mut Context::from_waker(&Waker::from(Arc::clone(&count))));
        (polled, count.0.load(Ordering::Relaxed))
    }

    #[test]
    fn wake_ups_within_a_connection_do_not_wake_its_task() {
        let (request, received) = oneshot::channel();
        let (response, responded) = oneshot::channel();
        let mut connection = with_executor(|executor| async move {
            executor.execute(async move { response.send(received.await.unwrap() + 1).unwrap() });
            request.send(1).unwrap();
            responded.await.unwrap()
        })
        .boxed();
        assert_eq!(poll(&mut connection), (Poll::Ready(2), 0));
    }

    #[test]
    fn future_that_always_wakes_itself_yields_to_other_tasks() {
        let mut polls = 0;
        let mut future = poll_until_idle(poll_fn(|cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        }))
        .boxed_local();
        assert_eq!(poll(&mut future), (Poll::Pending, 1));
        drop(future);
        assert_eq!(polls, MAX_POLLS);
    }

    #[test]
    fn panic_fails_one_request() {
        let (response, responded) = oneshot::channel();
        let mut connection = with_executor(|executor| async move {
            executor.execute(async { panic!("a secret") });
            executor.execute(async move { response.send(1).unwrap() });
            responded.await.unwrap()
        })
        .boxed();
        assert_eq!(poll(&mut connection).0, Poll::Ready(1));
    }

    #[test]
    fn requests_are_dropped_with_their_connection() {
        let (_response, responded) = oneshot::channel::<()>();
        let (started, has_started) = oneshot::channel();
        let (alive, was_dropped) = oneshot::channel::<()>();
        let mut connection = with_executor(|executor| async move {
            executor.execute(async move {
                let _alive = alive;
                started.send(()).unwrap();
                let _ = responded.await;
            });
            has_started.await.unwrap();
        })
        .boxed();
        assert_eq!(poll(&mut connection).0, Poll::Ready(()));
        drop(connection);
        assert!(was_dropped.now_or_never().unwrap().is_err());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_wake_up_is_lost() {
        const WAKERS: usize = 8;
        const WAKES: usize = 20_000;
        let (send, mut receive) = mpsc::channel(1);
        for _ in 0..WAKERS {
            let send = send.clone();
            tokio::spawn(async move {
                for _ in 0..WAKES {
                    send.send(()).await.unwrap();
                }
            });
        }
        drop(send);
        let received = with_executor(|executor| async move {
            let (done, is_done) = oneshot::channel();
            executor.execute(async move {
                let mut count = 0;
                while receive.recv().await.is_some() {
                    count += 1;
                }
                done.send(count).unwrap();
            });
            is_done.await.unwrap()
        });
        assert_eq!(tokio::spawn(received).await.unwrap(), WAKERS * WAKES);
    }
}

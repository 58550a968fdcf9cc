//! A connection and its calls as one task.
//!
//! hyper hands each call to an executor. As tasks of the runtime, the calls of a
//! connection are taken by other threads, and all of them then wait for the lock of
//! its HTTP/2 state. Here they are polled by whoever polls their connection: that is
//! one thread at a time, and a group's answers to many calls wake one task. A
//! connection thereby takes no more than one core.

use std::{
    future::{Future, poll_fn},
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{
        Arc,
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

/// How often a future that wakes itself is polled before it is others' turn.
const MAX_POLLS: usize = 8;

/// Takes the calls of a connection.
#[derive(Clone)]
pub struct Calls(mpsc::UnboundedSender<BoxFuture<'static, ()>>);

impl Calls {
    /// And what runs them.
    fn new() -> (Self, BoxFuture<'static, ()>) {
        let (calls, mut begun) = mpsc::unbounded_channel();
        let begun = stream::poll_fn(move |cx| begun.poll_recv(cx));
        (Self(calls), begun.for_each_concurrent(None, |call| call).boxed())
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Calls {
    fn execute(&self, call: F) {
        // `server.rs` answers a panic of a service; one in what is sent later costs this
        // call and no other.
        let call = AssertUnwindSafe(call).catch_unwind().map(drop);
        // They are received for as long as the connection is polled.
        let _ = self.0.send(call.boxed());
    }
}

/// Runs a connection together with its calls. They end with it.
pub async fn with_calls<C: Future>(connection: impl FnOnce(Calls) -> C) -> C::Output {
    let (calls, running) = Calls::new();
    let connection = pin!(connection(calls));
    match until_it_rests(future::select(connection, running)).await {
        Either::Left((output, _)) => output,
        // There will be no more calls.
        Either::Right(((), connection)) => connection.await,
    }
}

/// Polls a future until it waits for others. If a part of it woke another in the
/// meantime, as a call does that has something to send, it is polled again at once.
/// The runtime, asked for that, would wake another thread to do it.
async fn until_it_rests<F: Future + Unpin>(mut future: F) -> F::Output {
    let bell = Arc::new(Bell::default());
    let waker = Waker::from(Arc::clone(&bell));
    poll_fn(|cx| {
        bell.task.register(cx.waker());
        for _ in 0..MAX_POLLS {
            bell.state.swap(POLLED, Ordering::AcqRel);
            if let Poll::Ready(output) = future.poll_unpin(&mut Context::from_waker(&waker)) {
                return Poll::Ready(output);
            }
            let rests = bell.state.compare_exchange(POLLED, RESTS, Ordering::AcqRel, Ordering::Acquire);
            if rests.is_ok() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

const RESTS: u8 = 0;
const POLLED: u8 = 1;
const WOKEN: u8 = 2;

/// Wakes the task of a future that rests, and remembers that one was woken which is
/// being polled.
#[derive(Default)]
struct Bell {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.swap(WOKEN, Ordering::AcqRel) == RESTS {
            self.task.wake();
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, clippy::panic, reason = "those who wake are tasks; one call panics")]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::sync::oneshot;

    use super::*;

    /// Counts how often its task was woken.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Polls once, and tells how often that woke the task.
    fn poll<F: Future + Unpin>(future: &mut F) -> (Poll<F::Output>, usize) {
        let count = Arc::new(Count::default());
        let polled = future.poll_unpin(&mut Context::from_waker(&Waker::from(Arc::clone(&count))));
        (polled, count.0.load(Ordering::Relaxed))
    }

    #[test]
    fn what_calls_and_connection_tell_each_other_takes_no_turn_of_the_task() {
        let (ask, asked) = oneshot::channel();
        let (answer, answered) = oneshot::channel();
        let mut connection = with_calls(|calls| async move {
            calls.execute(async move { answer.send(asked.await.unwrap() + 1).unwrap() });
            ask.send(1).unwrap();
            answered.await.unwrap()
        })
        .boxed();
        assert_eq!(poll(&mut connection), (Poll::Ready(2), 0));
    }

    #[test]
    fn who_wakes_itself_for_ever_leaves_the_others_their_turn() {
        let mut polls = 0;
        let mut restless = until_it_rests(poll_fn(|cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        }))
        .boxed_local();
        assert_eq!(poll(&mut restless), (Poll::Pending, 1));
        drop(restless);
        assert_eq!(polls, MAX_POLLS);
    }

    #[test]
    fn a_panic_costs_one_call() {
        let (answer, answered) = oneshot::channel();
        let mut connection = with_calls(|calls| async move {
            calls.execute(async { panic!("a secret") });
            calls.execute(async move { answer.send(1).unwrap() });
            answered.await.unwrap()
        })
        .boxed();
        assert_eq!(poll(&mut connection).0, Poll::Ready(1));
    }

    #[test]
    fn calls_end_with_their_connection() {
        let (_answer, answered) = oneshot::channel::<()>();
        let (under_way, is_under_way) = oneshot::channel();
        let (gone, has_gone) = oneshot::channel::<()>();
        let mut connection = with_calls(|calls| async move {
            calls.execute(async move {
                let _gone = gone;
                under_way.send(()).unwrap();
                let _ = answered.await;
            });
            is_under_way.await.unwrap();
        })
        .boxed();
        assert_eq!(poll(&mut connection).0, Poll::Ready(()));
        drop(connection);
        assert!(has_gone.now_or_never().unwrap().is_err());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_wake_is_lost_whenever_it_comes() {
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
        let received = with_calls(|calls| async move {
            let (done, is_done) = oneshot::channel();
            calls.execute(async move {
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

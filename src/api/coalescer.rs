//! Calls that arrive while a statement is under way share the next one.
//!
//! A *lane* is the right to run a statement. A call that finds a free lane takes
//! it and runs alone, where it is, at once: an idle service waits for nobody.
//! A call that finds all lanes taken waits in line. When a lane comes back while
//! calls wait, everything that waits, up to a bound, is run as one statement. So
//! groups form only because calls wait anyway: the busier, the larger. Nothing is
//! ever delayed in order to gather.
//!
//! The statement of a group does what is plain. A call that it leaves out, for
//! whatever reason (a conflict, a retry, a wrong revision), is run alone by its own
//! caller, as if there were no groups. So is every member of a group whose statement
//! failed and so did nothing. Thus the answer to a call is always one that it could
//! have got alone; but a change whose outcome is not known, or that takes too long, is all
//! members' loss.

use std::{
    collections::{HashSet, VecDeque},
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time};
use tokio_util::task::TaskTracker;

use crate::error::Error;

/// How long a call that runs alone keeps its lane. One that waits for a row that
/// somebody has locked goes on without it, and is in nobody's way.
const LANE_TIME: Duration = Duration::from_millis(100);

/// What calls are gathered for.
pub trait Work: Send + Sync + 'static {
    /// What is asked.
    type Call: Send + Sync + 'static;
    /// What is answered.
    type Answer: Send + 'static;

    /// Whom a call can share a statement with.
    fn sharing(call: &Self::Call) -> Sharing;

    /// Runs one call.
    fn alone(&self, call: &Self::Call) -> impl Future<Output = Result<Self::Answer, Error>> + Send;

    /// Runs several calls as one statement, and answers in their order. `None` is
    /// for a call that the statement has left out, without a trace.
    fn together(&self, calls: &[Self::Call]) -> impl Future<Output = Result<Answers<Self>, Error>> + Send;
}

/// The answers to a group's calls, in their order.
pub type Answers<W> = Vec<Option<Result<<W as Work>::Answer, Error>>>;

/// Whom a call can share a statement with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// With all.
    All,
    /// With those that have another key.
    Others(u128),
    /// With nobody; it does not wait for a lane either.
    Nobody,
}

/// The bounds of a group.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Statements under way at once. As many as there are calls means that none
    /// ever waits: no grouping.
    pub lanes: usize,
    /// Calls in one statement, at most.
    pub size: usize,
    /// Calls that may wait; more are refused.
    pub waiting: usize,
    /// How long a statement may take.
    pub timeout: Duration,
}

/// The lanes of one kind of work, and the calls that wait for them.
pub struct Group<W: Work> {
    work: W,
    limits: Limits,
    tasks: TaskTracker,
    line: Mutex<Line<W>>,
}

struct Line<W: Work> {
    lanes_taken: usize,
    waiting: VecDeque<Waiting<W>>,
}

/// A call that waits, and the way to its caller.
struct Waiting<W: Work> {
    call: W::Call,
    caller: oneshot::Sender<Turn<W>>,
}

/// What a caller does next.
enum Turn<W: Work> {
    /// Run the call alone, with a lane or without.
    Run(W::Call, Option<Lane<W>>),
    /// Return the answer.
    Return(Result<W::Answer, Error>),
}

/// A lane that is taken. However it comes back (the statement is done, the caller
/// has gone, something panicked), it is passed on to those who wait.
struct Lane<W: Work>(Arc<Group<W>>);

impl<W: Work> Group<W> {
    /// Lanes for this work. Their tasks end when all callers have gone.
    pub fn new(work: W, limits: Limits, tasks: TaskTracker) -> Arc<Self> {
        let line = Mutex::new(Line { lanes_taken: 0, waiting: VecDeque::new() });
        Arc::new(Self { work, limits, tasks, line })
    }

    /// Runs a call, alone or together with others.
    pub async fn run(self: &Arc<Self>, call: W::Call) -> Result<W::Answer, Error> {
        let turn = match self.enter(call)? {
            Entered::Turn(turn) => turn,
            // A lane that panics answers nobody.
            Entered::Line(turn) => turn.await.map_err(|_| Error::Internal)?,
        };
        match turn {
            Turn::Return(answer) => answer,
            // In a box, because it is large, and a call that waits should not be.
            Turn::Run(call, lane) => Box::pin(self.run_alone(&call, lane)).await,
        }
    }

    async fn run_alone(&self, call: &W::Call, lane: Option<Lane<W>>) -> Result<W::Answer, Error> {
        let mut answer = pin!(self.work.alone(call));
        if let Some(lane) = lane {
            if let Ok(answer) = time::timeout(LANE_TIME, answer.as_mut()).await {
                return answer;
            }
            drop(lane);
        }
        answer.await
    }

    fn enter(self: &Arc<Self>, call: W::Call) -> Result<Entered<W>, Error> {
        if W::sharing(&call) == Sharing::Nobody {
            return Ok(Entered::Turn(Turn::Run(call, None)));
        }
        let mut line = self.line();
        if line.lanes_taken < self.limits.lanes {
            line.lanes_taken += 1;
            return Ok(Entered::Turn(Turn::Run(call, Some(Lane(Arc::clone(self))))));
        }
        if line.waiting.len() >= self.limits.waiting {
            return Err(Error::Overloaded);
        }
        let (caller, turn) = oneshot::channel();
        line.waiting.push_back(Waiting { call, caller });
        Ok(Entered::Line(turn))
    }

    /// Takes the calls to run together next. Callers that gave up are forgotten; a
    /// call that cannot share with those taken keeps its place.
    fn take(&self) -> (Vec<W::Call>, Vec<oneshot::Sender<Turn<W>>>) {
        let mut line = self.line();
        let (mut calls, mut callers, mut keys, mut stay) =
            (Vec::new(), Vec::new(), HashSet::new(), Vec::new());
        while calls.len() < self.limits.size {
            let Some(waiting) = line.waiting.pop_front() else { break };
            if waiting.caller.is_closed() {
                continue;
            }
            match W::sharing(&waiting.call) {
                Sharing::Others(key) if !keys.insert(key) => stay.push(waiting),
                _ => {
                    calls.push(waiting.call);
                    callers.push(waiting.caller);
                }
            }
        }
        for waiting in stay.into_iter().rev() {
            line.waiting.push_front(waiting);
        }
        (calls, callers)
    }

    fn line(&self) -> MutexGuard<'_, Line<W>> {
        // What it guards is whole at every step, whoever panics.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a call finds.
enum Entered<W: Work> {
    Turn(Turn<W>),
    Line(oneshot::Receiver<Turn<W>>),
}

impl<W: Work> Drop for Lane<W> {
    fn drop(&mut self) {
        let mut line = self.0.line();
        if line.waiting.is_empty() {
            line.lanes_taken -= 1;
        } else {
            self.0.tasks.spawn(run_next(Lane(Arc::clone(&self.0))));
        }
    }
}

/// Runs the calls that wait as one statement, and answers their callers.
async fn run_next<W: Work>(lane: Lane<W>) {
    let group = Arc::clone(&lane.0);
    let (mut calls, mut callers) = group.take();
    if calls.len() < 2 {
        if let (Some(call), Some(caller)) = (calls.pop(), callers.pop()) {
            // If the caller has gone, the lane comes back with the call.
            drop(caller.send(Turn::Run(call, Some(lane))));
        }
        return;
    }
    let answers = run_together(&group, &calls, &mut callers).await;
    for ((call, caller), answer) in calls.into_iter().zip(callers).zip(answers) {
        drop(caller.send(answer.map_or(Turn::Run(call, None), Turn::Return)));
    }
}

/// Runs a statement for as long as any of its callers waits.
async fn run_together<W: Work>(
    group: &Group<W>,
    calls: &[W::Call],
    callers: &mut [oneshot::Sender<Turn<W>>],
) -> Answers<W> {
    let all_have_gone = async {
        for caller in callers {
            caller.closed().await;
        }
    };
    let ran = tokio::select! {
        ran = time::timeout(group.limits.timeout, group.work.together(calls)) => ran,
        () = all_have_gone => Ok(Err(Error::DeadlineExceeded)),
    };
    let failure = match ran.unwrap_or(Err(Error::DeadlineExceeded)) {
        Ok(answers) => return answers,
        // It may have done its work, or there is no time to do it again.
        Err(error @ (Error::OutcomeUnknown | Error::DeadlineExceeded | Error::Overloaded)) => Some(error),
        // It has done nothing. One call may be the reason, so each goes its own way.
        Err(_) => None,
    };
    calls.iter().map(|_| failure.clone().map(Err)).collect()
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "callers are tasks")]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;

    /// Work on numbers that waits until it may go on, and panics at 13.
    struct Numbers {
        go: Semaphore,
        statements: AtomicUsize,
        failure: Option<Error>,
    }

    impl Work for Numbers {
        type Call = u128;
        type Answer = u128;

        fn sharing(call: &u128) -> Sharing {
            match call {
                0..100 => Sharing::All,
                100..200 => Sharing::Others(call % 10),
                _ => Sharing::Nobody,
            }
        }

        async fn alone(&self, call: &u128) -> Result<u128, Error> {
            self.statements.fetch_add(1, Ordering::Relaxed);
            self.go.acquire().await.unwrap().forget();
            Ok(*call)
        }

        async fn together(&self, calls: &[u128]) -> Result<Answers<Self>, Error> {
            self.statements.fetch_add(1, Ordering::Relaxed);
            self.go.acquire().await.unwrap().forget();
            let keys: HashSet<_> = calls.iter().filter(|call| **call >= 100).map(|call| call % 10).collect();
            assert_eq!(keys.len(), calls.iter().filter(|call| **call >= 100).count());
            assert!(!calls.contains(&13));
            match &self.failure {
                Some(error) => Err(error.clone()),
                // The odd ones are left out.
                None => Ok(calls.iter().map(|call| (call % 2 == 0).then_some(Ok(*call))).collect()),
            }
        }
    }

    fn group(lanes: usize, failure: Option<Error>) -> Arc<Group<Numbers>> {
        let limits = Limits { lanes, size: 8, waiting: 100, timeout: Duration::from_secs(3600) };
        let work = Numbers { go: Semaphore::new(0), statements: AtomicUsize::new(0), failure };
        Group::new(work, limits, TaskTracker::new())
    }

    /// Makes the calls at once, in this order, and lets them go on when all wait.
    async fn run(
        group: &Arc<Group<Numbers>>,
        calls: impl IntoIterator<Item = u128>,
    ) -> Vec<Result<u128, Error>> {
        let calls: Vec<_> = calls
            .into_iter()
            .map(|call| {
                tokio::spawn({
                    let group = Arc::clone(group);
                    async move { group.run(call).await }
                })
            })
            .collect();
        tokio::task::yield_now().await;
        group.work.go.add_permits(1000);
        let answers = join_all(calls).await.into_iter().map(Result::unwrap).collect();
        group.tasks.close();
        group.tasks.wait().await;
        let line = group.line();
        assert_eq!((line.lanes_taken, line.waiting.len()), (0, 0));
        drop(line);
        answers
    }

    #[tokio::test]
    async fn who_finds_a_lane_runs_alone_and_the_others_together() {
        let group = group(1, None);
        let answers = run(&group, [1, 2, 4, 6, 8]).await;
        assert_eq!(answers, [Ok(1), Ok(2), Ok(4), Ok(6), Ok(8)]);
        assert_eq!(group.work.statements.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn what_a_statement_leaves_out_runs_alone() {
        let group = group(1, None);
        assert_eq!(run(&group, [1, 2, 3, 4, 5]).await, [Ok(1), Ok(2), Ok(3), Ok(4), Ok(5)]);
        assert_eq!(group.work.statements.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn a_group_is_bounded_and_so_is_the_line() {
        let group = group(1, None);
        let answers = run(&group, (0..110).map(|n| n % 50 * 2)).await;
        assert_eq!(answers.iter().filter(|answer| **answer == Err(Error::Overloaded)).count(), 9);
        assert_eq!(group.work.statements.load(Ordering::Relaxed), 1 + 100_usize.div_ceil(8));
    }

    #[tokio::test]
    async fn calls_with_the_same_key_do_not_share_a_statement() {
        let group = group(1, None);
        let calls = [0, 100, 110, 102, 120, 112];
        assert_eq!(run(&group, calls).await, calls.map(Ok));
        // 0 | 100, 102 | 110, 112 | 120
        assert_eq!(group.work.statements.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn who_shares_with_nobody_waits_for_nobody() {
        let group = group(1, None);
        assert_eq!(run(&group, [0, 200, 202]).await, [Ok(0), Ok(200), Ok(202)]);
        assert_eq!(group.work.statements.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn a_group_that_fails_runs_again_one_by_one_unless_it_may_have_done_its_work() {
        let failed = group(1, Some(Error::TransactionConflict));
        assert_eq!(run(&failed, [0, 2, 4]).await, [Ok(0), Ok(2), Ok(4)]);
        let unknown = group(1, Some(Error::OutcomeUnknown));
        assert_eq!(
            run(&unknown, [0, 2, 4]).await,
            [Ok(0), Err(Error::OutcomeUnknown), Err(Error::OutcomeUnknown)]
        );
    }

    #[tokio::test]
    async fn a_panic_answers_everyone_it_took_and_passes_the_lane_on() {
        let group = group(1, None);
        let answers = run(&group, [0, 2, 13, 4, 4, 4, 4, 4, 4, 6, 8]).await;
        assert_eq!(answers.first(), Some(&Ok(0)));
        assert!(answers[1..9].iter().all(|answer| *answer == Err(Error::Internal)));
        assert_eq!(answers[9..], [Ok(6), Ok(8)]);
    }

    #[tokio::test]
    async fn callers_that_gave_up_are_forgotten_and_a_statement_nobody_waits_for_ends() {
        let group = group(1, None);
        let spawn = |call| {
            let group = Arc::clone(&group);
            tokio::spawn(async move { group.run(call).await })
        };
        let (first, second, third, fourth) = (spawn(0), spawn(2), spawn(4), spawn(6));
        tokio::task::yield_now().await;
        second.abort();
        assert!(second.await.unwrap_err().is_cancelled());
        // The lane goes on to the other two, who then give up as well.
        group.work.go.add_permits(1);
        assert_eq!(first.await.unwrap(), Ok(0));
        while group.work.statements.load(Ordering::Relaxed) < 2 {
            tokio::task::yield_now().await;
        }
        third.abort();
        fourth.abort();
        group.tasks.close();
        group.tasks.wait().await;
        assert_eq!(run(&group, [8]).await, [Ok(8)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_takes_long_gives_its_lane_back() {
        let group = group(1, None);
        let slow = tokio::spawn({
            let group = Arc::clone(&group);
            async move { group.run(0).await }
        });
        tokio::task::yield_now().await;
        time::sleep(LANE_TIME * 2).await;
        assert_eq!(group.line().lanes_taken, 0);
        group.work.go.add_permits(1);
        assert_eq!(slow.await.unwrap(), Ok(0));
    }
}

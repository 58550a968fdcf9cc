//! One stream of WatchUsers: an initial state, what was missed, and then the rounds that
//! all watchers share.
//!
//! A watch that keeps up has no task and no connection: nothing happens unless its client
//! reads. Who reads too slowly for the rounds finds that some are gone, and reads what
//! they had from the log. A few at a time do that fast: in large batches, and while the
//! client takes one of them, a task reads the next one, and never more than that one.

use std::{mem, sync::Arc, time::Instant, vec};

use futures_util::{Stream, stream};
use tokio::{
    sync::{
        OwnedSemaphorePermit,
        broadcast::{Receiver, error::RecvError},
    },
    task::{self, JoinSet},
};
use tonic::Status;

use crate::error::Error;
use crate::feed::reader::{BOOKMARK_INTERVAL, Feed};
use crate::model::page::{Page, Selection};
use crate::model::position::{LogPosition, Token};
use crate::model::stream::Watch;
use crate::pb;
use crate::pb::codec::Encoded;
use crate::store::change_log::{ChangeBatch, ChangesSince, MESSAGE_SIZE, position_message};
use crate::store::list::position;
use crate::store::user_row::user_from_row;

/// A stream of WatchUsers.
pub struct Watcher {
    feed: Arc<Feed>,
    /// Which users it is of; `None`: all.
    filter: Option<Selection>,
    rounds: Receiver<Arc<ChangeBatch>>,
    /// What the client has been sent, when it has the messages that are at hand.
    point: LogPosition,
    /// When it was sent something last.
    sent: Instant,
    /// What is at hand for the client.
    messages: vec::IntoIter<Encoded>,
    /// While it is behind the rounds, and one of those who may be fast.
    fast: Option<OwnedSemaphorePermit>,
    /// What comes then.
    next: Next,
    _permit: OwnedSemaphorePermit,
}

/// Where the next messages come from.
enum Next {
    /// Users of the initial state.
    Users(Page),
    /// What is in the log behind the point, as soon as the client asks for it.
    Missed,
    /// The same, which a task reads.
    Reading(JoinSet<Result<ChangesSince, Error>>),
    /// A round.
    Round,
}

impl Watcher {
    /// Begins to watch, unless there are too many or the token cannot be resumed.
    pub async fn start(feed: Arc<Feed>, watch: Watch) -> Result<Self, Error> {
        let permit = feed.limiter.acquire()?;
        // Before the point is known, so that nothing falls in between.
        let rounds = feed.rounds();
        let mut fast = None;
        // This is where it turns out whether the token is good.
        let (point, missed) = match (watch.position, &watch.initial_state) {
            (None, _) => (feed.now().await?, None),
            (Some(point), None) => {
                fast = feed.be_fast();
                (point.clone(), Some(feed.read(point, fast.is_some()).await?))
            }
            (Some(point), Some(_)) => {
                feed.check(&point).await?;
                (point, None)
            }
        };
        let (sent, messages) = (Instant::now(), Vec::new().into_iter());
        let (filter, next) = (watch.filter, Next::Round);
        let mut watcher = Self { feed, filter, rounds, point, sent, messages, fast, next, _permit: permit };
        if let Some(page) = watch.initial_state {
            watcher.next = Next::Users(page);
            return Ok(watcher);
        }
        // A bookmark if there is nothing, so that the client has a token from the first
        // moment on.
        watcher.send_bookmark();
        if let Some(missed) = missed {
            watcher.send(missed).await?;
        }
        Ok(watcher)
    }

    /// The messages, until the client goes or something fails.
    pub fn into_stream(self) -> impl Stream<Item = Result<Encoded, Status>> + Send {
        stream::unfold(Some(self), async |watcher| {
            let mut watcher = watcher?;
            // Whoever sends the messages asks for one more before it sends the last, and
            // does not look again until the client has room for it. What has begun by then
            // keeps its connection; so nothing begins at the first look.
            task::yield_now().await;
            match watcher.message().await {
                Ok(message) => {
                    watcher.sent = Instant::now();
                    Some((Ok(message), Some(watcher)))
                }
                Err(error) => Some((Err(error.into()), None)),
            }
        })
    }

    async fn message(&mut self) -> Result<Encoded, Error> {
        loop {
            if let Some(message) = self.messages.next() {
                return match &self.filter {
                    Some(filter) => filtered(&message, filter),
                    None => Ok(message),
                };
            }
            match mem::replace(&mut self.next, Next::Round) {
                Next::Users(page) => self.users(page).await?,
                Next::Missed => {
                    self.fast = self.feed.be_fast();
                    self.next = self.reading();
                }
                Next::Reading(mut reading) => {
                    let missed = reading.join_next().await.ok_or(Error::Internal)?;
                    self.send(missed.map_err(|_| Error::Internal)??).await?;
                }
                Next::Round => {
                    self.fast = None;
                    self.round().await?;
                }
            }
        }
    }

    fn send_bookmark(&mut self) {
        let bookmark = pb::WatchUsersResponse { bookmark: true, ..position_message(&self.point) };
        self.messages = vec![Encoded::new(&bookmark)].into_iter();
    }

    /// Sends what was read behind the point, if that is anything. What comes then may be
    /// read meanwhile.
    async fn send(&mut self, missed: ChangesSince) -> Result<(), Error> {
        self.point.clone_from(&missed.end);
        self.next = match &self.fast {
            _ if missed.is_all => Next::Round,
            Some(_) => self.reading(),
            None => Next::Missed,
        };
        // That task would wait for this one, and PostgreSQL with it.
        task::yield_now().await;
        let batch = missed.into_batch().await?;
        if !batch.messages.is_empty() {
            self.messages = batch.messages.into_iter();
        }
        Ok(())
    }

    /// Begins to read what is in the log behind the point.
    fn reading(&mut self) -> Next {
        // Rounds from now on: those before are in the log.
        self.rounds = self.feed.rounds();
        let (feed, point, is_fast) = (Arc::clone(&self.feed), self.point.clone(), self.fast.is_some());
        let mut reading = JoinSet::new();
        reading.spawn(async move { feed.read(point, is_fast).await });
        Next::Reading(reading)
    }

    /// The next users of the initial state. ChangesSince the last ones come the changes that
    /// were made since it began.
    async fn users(&mut self, mut page: Page) -> Result<(), Error> {
        let existing = |row| {
            let user = user_from_row(row)?;
            let (id, revision) = (user.id.clone(), user.revision);
            let kind = pb::ChangeKind::Existing.into();
            Ok(pb::UserChange { kind, id, revision, state: Some(pb::user_change::State::User(user)) })
        };
        let (rows, is_last) = self.feed.page(&page).await?;
        let mut messages = Vec::new();
        for part in rows.chunks(MESSAGE_SIZE) {
            let [.., last] = part else { continue };
            let last = position(last, page.rest.order)?;
            let token = Token { point: self.point.clone(), page_token: Some(page.token_after(&last)) };
            messages.push(Encoded::new(&pb::WatchUsersResponse {
                changes: part.iter().map(existing).collect::<Result<_, Error>>()?,
                resume_token: token.to_text(),
                ..Default::default()
            }));
            page = page.page_after(last);
        }
        self.next = Next::Users(page);
        if is_last {
            let end = pb::WatchUsersResponse { initial_state_end: true, ..position_message(&self.point) };
            messages.push(Encoded::new(&end));
            self.next = Next::Missed;
        }
        self.messages = messages.into_iter();
        Ok(())
    }

    /// The next round, unless it has nothing new, or something is missing before it, or it
    /// would lead back. Who is ahead of the rounds, which happens when they are late, gets
    /// signs of life meanwhile: no bookmarks, since there may be changes that are not in the
    /// rounds yet.
    async fn round(&mut self) -> Result<(), Error> {
        let round = match self.rounds.recv().await {
            Ok(round) => round,
            Err(RecvError::Lagged(_)) => {
                self.next = Next::Missed;
                return Ok(());
            }
            Err(RecvError::Closed) => return Err(Error::ShuttingDown),
        };
        let is_known = self.point.includes(&round.end);
        let leads_on = self.point.includes(&round.from) && round.end.includes(&self.point);
        if !is_known && !leads_on {
            self.next = Next::Missed;
            return Ok(());
        }
        if !is_known {
            self.point = round.end.clone();
            self.messages = round.messages.clone().into_iter();
        }
        if round.messages.is_empty() {
            self.send_bookmark();
        } else if is_known && self.sent.elapsed() >= BOOKMARK_INTERVAL {
            self.messages = vec![Encoded::new(&position_message(&self.point))].into_iter();
        }
        Ok(())
    }
}

/// A message as the watch of some users gets it.
fn filtered(message: &Encoded, filter: &Selection) -> Result<Encoded, Error> {
    let mut message: pb::WatchUsersResponse = message.decode().map_err(|_| Error::Internal)?;
    for change in &mut message.changes {
        if matches!(&change.state, Some(pb::user_change::State::User(user)) if !filter.contains(user)) {
            change.state = Some(pb::user_change::State::Removed(pb::user_change::Removed {}));
        }
    }
    message.resume_token = filter.seal_watch(&message.resume_token);
    Ok(Encoded::new(&message))
}

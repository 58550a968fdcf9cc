//! One stream of WatchUsers: an initial state, what was missed, and then the rounds that
//! all watchers share.
//!
//! Nothing happens here unless the client reads: a stream has no task, holds no
//! connection, and at most one batch. Who reads too slowly for the rounds finds that some
//! are gone, and reads what they had from the log.

use std::{mem, sync::Arc, time::Instant, vec};

use futures_util::{Stream, stream};
use tokio::{
    sync::{
        OwnedSemaphorePermit,
        broadcast::{Receiver, error::RecvError},
    },
    task,
};
use tonic::Status;
use uuid::Uuid;

use crate::{
    codec::Encoded,
    error::Error,
    feed::{BOOKMARK_INTERVAL, Batch, Feed, MESSAGE_SIZE, leading_to},
    input::Watch,
    pb,
    point::{Point, Rest, Token},
};

/// A stream of WatchUsers.
pub struct Watcher {
    feed: Arc<Feed>,
    rounds: Receiver<Arc<Batch>>,
    /// What the client has been sent, when it has the messages that are at hand.
    point: Point,
    /// When it was sent something last.
    sent: Instant,
    /// What is at hand for the client.
    messages: vec::IntoIter<Encoded>,
    /// What comes then.
    next: Next,
    _place: OwnedSemaphorePermit,
}

/// Where the next messages come from.
enum Next {
    /// Users of the initial state.
    Users(Rest),
    /// What is in the log behind the point.
    Missed,
    /// A round.
    Round,
}

impl Next {
    /// There is more in the log behind a batch that is full.
    fn behind(is_all: bool) -> Self {
        if is_all { Self::Round } else { Self::Missed }
    }
}

impl Watcher {
    /// Begins to watch, unless there are too many or the token cannot be resumed.
    pub async fn start(feed: Arc<Feed>, watch: Watch) -> Result<Self, Error> {
        let place = feed.places.take()?;
        // Before the point is known, so that nothing falls in between.
        let rounds = feed.rounds();
        let (point, next, messages) = match watch {
            Watch::FromNow => {
                // A bookmark, so that the client has a token from the first moment on.
                let batch = Batch::bookmark(feed.now().await?);
                (batch.upto, Next::Round, batch.messages)
            }
            Watch::InitialState => {
                let (point, rest) = feed.beginning().await?;
                (point, Next::Users(rest), Vec::new())
            }
            Watch::Resume(Token { point, initial_state }) => {
                // This is where it turns out whether the token is good.
                let batch = feed.read(&point).await?;
                match initial_state {
                    Some(rest) => (point, Next::Users(rest), Vec::new()),
                    None => (batch.upto, Next::behind(batch.is_all), batch.messages),
                }
            }
        };
        let (sent, messages) = (Instant::now(), messages.into_iter());
        Ok(Self { feed, rounds, point, sent, messages, next, _place: place })
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
                return Ok(message);
            }
            match mem::replace(&mut self.next, Next::Round) {
                Next::Users(rest) => self.users(rest).await?,
                Next::Missed => {
                    // Rounds from now on: those before are in the log.
                    self.rounds = self.feed.rounds();
                    let batch = self.feed.read(&self.point).await?;
                    if batch.is_bookmark {
                        self.point = batch.upto;
                    } else {
                        self.send(batch);
                    }
                }
                Next::Round => self.round().await?,
            }
        }
    }

    /// A batch of this watcher's own.
    fn send(&mut self, batch: Batch) {
        self.point = batch.upto;
        self.next = Next::behind(batch.is_all);
        self.messages = batch.messages.into_iter();
    }

    /// The next users of the initial state. Behind the last ones come the changes that
    /// were made since it began.
    async fn users(&mut self, rest: Rest) -> Result<(), Error> {
        let (users, left) = self.feed.page(rest).await?;
        let to_change = |user: pb::User| pb::UserChange {
            kind: pb::ChangeKind::Existing.into(),
            id: user.id.clone(),
            revision: user.revision,
            user: Some(user),
        };
        let (mut users, mut messages) = (users.into_iter().map(to_change).peekable(), Vec::new());
        loop {
            let changes: Vec<_> = users.by_ref().take(MESSAGE_SIZE).collect();
            let is_last = users.peek().is_none();
            let after = changes.last().and_then(|last| Uuid::try_parse(&last.id).ok());
            let initial_state =
                if is_last { left } else { Some(Rest { after: after.unwrap_or(rest.after), ..rest }) };
            messages.push(Encoded::new(&pb::WatchUsersResponse {
                changes,
                bookmark: false,
                initial_state_end: initial_state.is_none(),
                resume_token: Token { point: self.point.clone(), initial_state }.to_text(),
            }));
            if is_last {
                break;
            }
        }
        self.messages = messages.into_iter();
        self.next = left.map_or(Next::Missed, Next::Users);
        Ok(())
    }

    /// The next round, unless it has nothing new, or something is missing before it. Who
    /// is ahead of the rounds, which happens when they are late, gets signs of life
    /// meanwhile: no bookmarks, since there may be changes that are not in the rounds yet.
    async fn round(&mut self) -> Result<(), Error> {
        let round = match self.rounds.recv().await {
            Ok(round) => round,
            Err(RecvError::Lagged(_)) => {
                self.next = Next::Missed;
                return Ok(());
            }
            Err(RecvError::Closed) => return Err(Error::Stopping),
        };
        if self.point.includes(&round.upto) {
            if round.is_bookmark {
                self.send(Batch::bookmark(self.point.clone()));
            } else if self.sent.elapsed() >= BOOKMARK_INTERVAL {
                self.messages = vec![Encoded::new(&leading_to(&self.point))].into_iter();
            }
        } else if self.point.includes(&round.from) {
            self.point = round.upto.clone();
            self.messages = round.messages.clone().into_iter();
        } else {
            self.next = Next::Missed;
        }
        Ok(())
    }
}

//! One stream of WatchUsers: an initial state, what was missed, and then the rounds that
//! all watchers share.
//!
//! Nothing happens here unless the client reads: a stream has no task, holds no
//! connection, and buffers nothing. Who reads too slowly for the rounds finds that some
//! are gone, and reads what they had from the log.

use std::{mem, sync::Arc};

use futures_util::{Stream, stream};
use tokio::{
    sync::{
        OwnedSemaphorePermit,
        broadcast::{Receiver, error::RecvError},
    },
    task,
};
use tonic::Status;

use crate::{
    error::Error,
    feed::{Batch, Feed, Round},
    input::Watch,
    pb,
    point::{Point, Rest, Token},
};

/// A stream of WatchUsers.
pub struct Watcher {
    feed: Arc<Feed>,
    rounds: Receiver<Arc<Round>>,
    /// What the client has been sent.
    point: Point,
    next: Next,
    _place: OwnedSemaphorePermit,
}

/// What the client gets next.
enum Next {
    /// This batch, which is at hand.
    Batch(Batch),
    /// Users of the initial state.
    Users(Rest),
    /// What is in the log behind the point.
    Missed,
    /// A round.
    Round,
}

impl Watcher {
    /// Begins to watch, unless there are too many or the token cannot be resumed.
    pub async fn start(feed: Arc<Feed>, watch: Watch) -> Result<Self, Error> {
        let place = feed.places.take()?;
        // Before the point is known, so that nothing falls in between.
        let rounds = feed.rounds();
        let (point, next) = match watch {
            Watch::FromNow => {
                let point = feed.now().await?;
                // A bookmark, so that the client has a token from the first moment on.
                let batch = Batch { changes: Vec::new(), upto: point.clone(), is_all: true };
                (point, Next::Batch(batch))
            }
            Watch::InitialState => {
                let (point, rest) = feed.beginning().await?;
                (point, Next::Users(rest))
            }
            Watch::Resume(Token { point, initial_state }) => {
                // This is where it turns out whether the token is good.
                let batch = feed.read(&point).await?;
                (point, initial_state.map_or(Next::Batch(batch), Next::Users))
            }
        };
        Ok(Self { feed, rounds, point, next, _place: place })
    }

    /// The messages, until the client goes or something fails.
    pub fn into_stream(self) -> impl Stream<Item = Result<pb::WatchUsersResponse, Status>> + Send {
        stream::unfold(Some(self), async |watcher| {
            let mut watcher = watcher?;
            // Whoever sends the messages asks for one more before it sends the last, and
            // does not look again until the client has room for it. What has begun by then
            // keeps its connection; so nothing begins at the first look.
            task::yield_now().await;
            match watcher.message().await {
                Ok(message) => Some((Ok(message), Some(watcher))),
                Err(error) => Some((Err(error.into()), None)),
            }
        })
    }

    async fn message(&mut self) -> Result<pb::WatchUsersResponse, Error> {
        loop {
            match mem::replace(&mut self.next, Next::Round) {
                Next::Batch(batch) => return Ok(self.send(batch)),
                Next::Users(rest) => return self.users(rest).await,
                Next::Missed => {
                    // Rounds from now on: those before are in the log.
                    self.rounds = self.feed.rounds();
                    let batch = self.feed.read(&self.point).await?;
                    if !batch.changes.is_empty() {
                        return Ok(self.send(batch));
                    }
                    self.point = batch.upto;
                }
                Next::Round => {
                    if let Some(round) = self.round().await? {
                        return Ok(round.message.clone());
                    }
                }
            }
        }
    }

    /// A batch of this watcher's own. There is more if it is full.
    fn send(&mut self, batch: Batch) -> pb::WatchUsersResponse {
        self.point = batch.upto.clone();
        self.next = if batch.is_all { Next::Round } else { Next::Missed };
        batch.into_message()
    }

    /// The next users of the initial state. Behind the last ones come the changes that
    /// were made since it began.
    async fn users(&mut self, rest: Rest) -> Result<pb::WatchUsersResponse, Error> {
        let (users, rest) = self.feed.page(rest).await?;
        let to_change = |user: pb::User| pb::UserChange {
            kind: pb::ChangeKind::Existing.into(),
            id: user.id.clone(),
            revision: user.revision,
            user: Some(user),
        };
        self.next = rest.map_or(Next::Missed, Next::Users);
        Ok(pb::WatchUsersResponse {
            changes: users.into_iter().map(to_change).collect(),
            bookmark: false,
            initial_state_end: rest.is_none(),
            resume_token: Token { point: self.point.clone(), initial_state: rest }.to_text(),
        })
    }

    /// The next round, unless it has nothing new, or something is missing before it.
    async fn round(&mut self) -> Result<Option<Arc<Round>>, Error> {
        let round = match self.rounds.recv().await {
            Ok(round) => round,
            Err(RecvError::Lagged(_)) => {
                self.next = Next::Missed;
                return Ok(None);
            }
            Err(RecvError::Closed) => return Err(Error::Stopping),
        };
        let is_bookmark_here = round.message.bookmark && round.upto == self.point;
        if self.point.includes(&round.upto) && !is_bookmark_here {
            return Ok(None);
        }
        if !self.point.includes(&round.from) {
            self.next = Next::Missed;
            return Ok(None);
        }
        self.point = round.upto.clone();
        Ok(Some(round))
    }
}

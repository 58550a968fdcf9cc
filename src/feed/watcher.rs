//! One stream of WatchUsers: the initial state, then the changes since, then the batches that
//! all watchers share.
//!
//! A watch that keeps up has no task and no connection; its client's reads drive it. A watcher
//! that lags behind the broadcast channel re-reads the missed changes from the change log. With
//! a catch-up permit, it reads large batches, and a task prefetches the next one while the
//! client takes the current one.

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
use crate::feed::messages::{ChangeBatch, MESSAGE_SIZE, WatchMessage, existing_user};
use crate::feed::reader::{BOOKMARK_INTERVAL, Feed};
use crate::model::page::{Page, Selection};
use crate::model::position::{LogPosition, ResumeToken};
use crate::model::stream::Watch;
use crate::pb;
use crate::pb::codec::Encoded;
use crate::store::change_log::ChangesSince;
use crate::store::list;

/// A stream of WatchUsers.
pub struct Watcher {
    feed: Arc<Feed>,
    /// `None`: all users.
    filter: Option<Selection>,
    batches: Receiver<Arc<ChangeBatch>>,
    /// The client's position after `messages`.
    position: LogPosition,
    /// When the last message was sent.
    last_sent: Instant,
    /// Messages to send before the next step of `phase`.
    messages: vec::IntoIter<WatchMessage>,
    /// Held only while the watcher catches up.
    catch_up_permit: Option<OwnedSemaphorePermit>,
    phase: Phase,
    _permit: OwnedSemaphorePermit,
}

/// Where the next messages come from.
enum Phase {
    /// A page of the initial state.
    InitialState(Page),
    /// The change log, read when the client asks for more.
    CatchUp,
    /// The change log, which a task is reading.
    Prefetch(JoinSet<Result<ChangesSince, Error>>),
    /// The batches that the feed publishes.
    Live,
}

impl Watcher {
    /// Starts a watch. Fails if there are too many, or if the token cannot be resumed.
    pub async fn start(feed: Arc<Feed>, watch: Watch) -> Result<Self, Error> {
        let permit = feed.limiter.acquire()?;
        // Subscribes before the position is read, so that no batch is missed in between.
        let batches = feed.batches();
        let mut catch_up_permit = None;
        // The first read of the log also checks the position.
        let (position, changes) = match (watch.position, &watch.initial_state) {
            (None, _) => (feed.current_position().await?, None),
            (Some(position), None) => {
                catch_up_permit = feed.try_catch_up_permit();
                let changes = feed.read(position.clone(), catch_up_permit.is_some()).await?;
                (position, Some(changes))
            }
            (Some(position), Some(_)) => {
                feed.check(&position).await?;
                (position, None)
            }
        };
        let mut watcher = Self {
            feed,
            filter: watch.filter,
            batches,
            position,
            last_sent: Instant::now(),
            messages: Vec::new().into_iter(),
            catch_up_permit,
            phase: Phase::Live,
            _permit: permit,
        };
        if let Some(page) = watch.initial_state {
            watcher.phase = Phase::InitialState(page);
            return Ok(watcher);
        }
        // If there are no changes, the client gets a token at once.
        watcher.set_bookmark()?;
        if let Some(changes) = changes {
            watcher.set_changes(changes).await?;
        }
        Ok(watcher)
    }

    /// The messages, until the client ends the stream or an error does.
    pub fn into_stream(self) -> impl Stream<Item = Result<Encoded, Status>> + Send {
        stream::unfold(Some(self), async |watcher| {
            let mut watcher = watcher?;
            // The server polls for one more message before it sends the last one, and polls
            // again only when the client has room. A read that starts at the first poll would
            // hold its connection until then, so the first poll starts nothing.
            task::yield_now().await;
            match watcher.next_message().await {
                Ok(message) => {
                    watcher.last_sent = Instant::now();
                    Some((Ok(message), Some(watcher)))
                }
                Err(error) => Some((Err(error.into()), None)),
            }
        })
    }

    async fn next_message(&mut self) -> Result<Encoded, Error> {
        loop {
            if let Some(message) = self.messages.next() {
                return match &self.filter {
                    Some(filter) => message.filtered(self.feed.token_keys.keys()?.as_ref(), filter),
                    None => Ok(message.unfiltered()),
                };
            }
            match mem::replace(&mut self.phase, Phase::Live) {
                Phase::InitialState(page) => self.read_page(page).await?,
                Phase::CatchUp => {
                    self.catch_up_permit = self.feed.try_catch_up_permit();
                    self.phase = self.prefetch();
                }
                Phase::Prefetch(mut read) => {
                    let changes = read.join_next().await.ok_or(Error::Internal)?;
                    self.set_changes(changes.map_err(|_| Error::Internal)??).await?;
                }
                Phase::Live => {
                    self.catch_up_permit = None;
                    self.receive_batch().await?;
                }
            }
        }
    }

    fn set_bookmark(&mut self) -> Result<(), Error> {
        self.set_message(pb::WatchUsersResponse { bookmark: true, ..Default::default() })
    }

    /// Sends a message without changes, with the token of the position.
    fn set_message(&mut self, message: pb::WatchUsersResponse) -> Result<(), Error> {
        let keys = self.feed.token_keys.keys()?;
        self.messages = vec![WatchMessage::at(&keys, &self.position, message)].into_iter();
        Ok(())
    }

    /// Sends the changes after the position, if there are any, and selects the next phase.
    async fn set_changes(&mut self, changes: ChangesSince) -> Result<(), Error> {
        self.position.clone_from(&changes.end);
        self.phase = match &self.catch_up_permit {
            _ if changes.is_all => Phase::Live,
            Some(_) => self.prefetch(),
            None => Phase::CatchUp,
        };
        // Lets the prefetch send its query before this task encodes the batch.
        task::yield_now().await;
        let batch = ChangeBatch::new(&self.feed.token_keys, changes).await?;
        if !batch.messages.is_empty() {
            self.messages = batch.messages.into_iter();
        }
        Ok(())
    }

    /// Spawns a read of the changes after the position.
    fn prefetch(&mut self) -> Phase {
        // Drops the batches published so far: the read includes their changes.
        self.batches = self.feed.batches();
        let (feed, position) = (Arc::clone(&self.feed), self.position.clone());
        let has_permit = self.catch_up_permit.is_some();
        let mut read = JoinSet::new();
        read.spawn(async move { feed.read(position, has_permit).await });
        Phase::Prefetch(read)
    }

    /// Sends a page of the initial state. The changes made since its beginning follow the last
    /// page.
    async fn read_page(&mut self, mut page: Page) -> Result<(), Error> {
        let (rows, is_last) = self.feed.page(&page).await?;
        let keys = self.feed.token_keys.keys()?;
        let mut messages = Vec::new();
        for part in rows.chunks(MESSAGE_SIZE) {
            let [.., last] = part else { continue };
            let last = list::position(last, page.rest.order)?;
            let changes = part.iter().map(existing_user).collect::<Result<_, Error>>()?;
            let message = pb::WatchUsersResponse { changes, ..Default::default() };
            let token = ResumeToken { position: self.position.clone(), last_user: Some(last.clone()) };
            messages.push(WatchMessage::new(&keys, message, Arc::new(token)));
            page = page.page_after(last);
        }
        self.phase = Phase::InitialState(page);
        if is_last {
            let end = pb::WatchUsersResponse { initial_state_end: true, ..Default::default() };
            messages.push(WatchMessage::at(&keys, &self.position, end));
            self.phase = Phase::CatchUp;
        }
        self.messages = messages.into_iter();
        Ok(())
    }

    /// Sends the next batch if it continues the position. If changes are missing before it, or
    /// it would lead back, the watcher catches up from the log. A watcher that is ahead of a
    /// late feed gets keepalives, and not bookmarks: the log may have changes that the feed
    /// has not published yet.
    async fn receive_batch(&mut self) -> Result<(), Error> {
        let batch = match self.batches.recv().await {
            Ok(batch) => batch,
            Err(RecvError::Lagged(_)) => {
                self.phase = Phase::CatchUp;
                return Ok(());
            }
            Err(RecvError::Closed) => return Err(Error::ShuttingDown),
        };
        let is_known = self.position.includes(&batch.end);
        let continues = self.position.includes(&batch.from) && batch.end.includes(&self.position);
        if !is_known && !continues {
            self.phase = Phase::CatchUp;
            return Ok(());
        }
        if !is_known {
            self.position = batch.end.clone();
            self.messages = batch.messages.clone().into_iter();
        }
        if batch.messages.is_empty() {
            self.set_bookmark()?;
        } else if is_known && self.last_sent.elapsed() >= BOOKMARK_INTERVAL {
            self.set_message(pb::WatchUsersResponse::default())?;
        }
        Ok(())
    }
}

//! The messages of WatchUsers, made of changes and users that the store has read.

use std::{collections::HashMap, sync::Arc};

use prost::Message;
use tokio::task;
use tokio_postgres::Row;
use uuid::Uuid;

use crate::error::Error;
use crate::model::page::Selection;
use crate::model::position::{LogPosition, ResumeToken};
use crate::model::token::TokenKeys;
use crate::pb::codec::Encoded;
use crate::pb::{self, ChangeKind, user_change::State};
use crate::store::change_log::{ChangesSince, LogEntry};
use crate::store::token_keys::TokenKeyring;
use crate::store::user_row::{ID, column, user_from_row};

/// Changes in a message. Few enough to fit into the 8 KiB buffer that each stream has, unless
/// users are very large.
pub const MESSAGE_SIZE: usize = 32;

/// How many messages are made before other tasks may run.
const MESSAGES_PER_YIELD: usize = 16;

/// A message of a watch. It is encoded once for all unfiltered watches.
#[derive(Debug, Clone)]
pub struct WatchMessage {
    encoded: Encoded,
    /// The content of its token, which each filter encodes in another way.
    token: Arc<ResumeToken>,
}

impl WatchMessage {
    /// Encodes a message with its token.
    pub fn new(keys: &TokenKeys, mut message: pb::WatchUsersResponse, token: Arc<ResumeToken>) -> Self {
        message.resume_token = token.encode(keys, None);
        Self { encoded: Encoded::new(&message), token }
    }

    /// A message with the token of a position.
    pub fn at(keys: &TokenKeys, position: &LogPosition, message: pb::WatchUsersResponse) -> Self {
        Self::new(keys, message, Arc::new(ResumeToken::at(position.clone())))
    }

    /// The size in bytes.
    pub fn encoded_len(&self) -> usize {
        self.encoded.encoded_len()
    }

    /// The message that an unfiltered watch gets.
    pub fn unfiltered(self) -> Encoded {
        self.encoded
    }

    /// The message that a watch with a filter gets.
    ///
    /// A user that does not match is `removed`, because the client may have an earlier revision
    /// that matched. A created user that has not changed since has no earlier revision, and an
    /// earlier user with the same id is `removed` by its erasure: such a change is left out. A
    /// message without changes is still sent for its token.
    pub fn filtered(&self, keys: &TokenKeys, filter: &Selection) -> Result<Encoded, Error> {
        let mut message: pb::WatchUsersResponse = self.encoded.decode().map_err(|_| Error::Internal)?;
        message.changes.retain_mut(|change| {
            let user = match &change.state {
                Some(State::User(user)) if !filter.contains(user) => user,
                _ => return true,
            };
            let is_new = change.kind() == ChangeKind::Created && user.revision == change.revision;
            change.state = Some(State::Removed(pb::user_change::Removed {}));
            !is_new
        });
        message.resume_token = self.token.encode(keys, Some(filter));
        Ok(Encoded::new(&message))
    }
}

/// The changes between two positions as messages.
#[derive(Debug)]
pub struct ChangeBatch {
    /// The position before the changes.
    pub from: LogPosition,
    /// The position after the changes.
    pub end: LogPosition,
    /// Empty if nothing changed.
    pub messages: Vec<WatchMessage>,
}

impl ChangeBatch {
    /// Encodes what was read. It yields now and then, because a batch can be large.
    pub async fn new(token_keys: &TokenKeyring, changes: ChangesSince) -> Result<Self, Error> {
        let keys = token_keys.keys()?;
        let ChangesSince { from, end, is_all, log, entries, users } = changes;
        let by_id = |user| Ok((column(&user, ID)?, user));
        let users = users.into_iter().map(by_id).collect::<Result<HashMap<Uuid, Row>, Error>>()?;
        let mut messages = Vec::with_capacity(entries.len().div_ceil(MESSAGE_SIZE));
        let (mut token, mut left) = (Arc::new(ResumeToken::at(from.clone())), entries.len());
        for part in entries.chunks(MESSAGE_SIZE) {
            left -= part.len();
            // A token never points into a transaction.
            if let Some(last) = part.iter().rfind(|entry| entry.ends_transaction) {
                let position = from.after(&log, Some(last.transaction), is_all && left == 0);
                token = Arc::new(ResumeToken::at(position));
            }
            let changes = part.iter().map(|entry| change(entry, &users)).collect::<Result<_, _>>()?;
            let message = pb::WatchUsersResponse { changes, ..Default::default() };
            messages.push(WatchMessage::new(&keys, message, Arc::clone(&token)));
            if messages.len() % MESSAGES_PER_YIELD == 0 {
                task::yield_now().await;
            }
        }
        Ok(Self { from, end, messages })
    }
}

/// A change of the log.
///
/// An erasure is `removed` even if later changes follow, with one exception: it is the last
/// change read of a user that exists again. If the transaction that created the new user has
/// the lower id, its change is delivered before the erasure, and `removed` would delete the
/// new user.
fn change(entry: &LogEntry, users: &HashMap<Uuid, Row>) -> Result<pb::UserChange, Error> {
    let kind = ChangeKind::try_from(i32::from(entry.kind));
    let is_erasure = matches!(kind, Ok(ChangeKind::Expunged | ChangeKind::Purged));
    let state = match users.get(&entry.user_id).filter(|_| entry.is_last) {
        Some(user) => State::User(user_from_row(user)?),
        None if entry.is_last || is_erasure => State::Removed(pb::user_change::Removed {}),
        None => State::Superseded(pb::user_change::Superseded {}),
    };
    let id = entry.user_id.to_string();
    Ok(pb::UserChange { kind: entry.kind.into(), id, revision: entry.revision, state: Some(state) })
}

/// A user of the initial state.
pub(crate) fn existing_user(row: &Row) -> Result<pb::UserChange, Error> {
    let user = user_from_row(row)?;
    let (id, revision) = (user.id.clone(), user.revision);
    Ok(pb::UserChange { kind: ChangeKind::Existing.into(), id, revision, state: Some(State::User(user)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::position::TransactionStamp;
    use crate::model::stream::Watch;

    #[test]
    fn filter_leaves_out_only_created_users_that_never_matched() {
        let keys = TokenKeys::new([(1, [1; 32])]).unwrap();
        let filter = pb::UserFilter { username_prefix: "an".into(), ..Default::default() };
        let request = pb::WatchUsersRequest { filter: Some(filter), ..Default::default() };
        let filter = Watch::parse(&keys, request).unwrap().filter.unwrap();
        let position = LogPosition::current(String::new(), &[], TransactionStamp { xid: 1, time_us: 0 });
        let state = |kind: ChangeKind, revision, username: &str| {
            let id = Uuid::nil().to_string();
            let user = pb::User { id: id.clone(), username: username.into(), revision, ..Default::default() };
            let change =
                pb::UserChange { kind: kind.into(), id, revision: 1, state: Some(State::User(user)) };
            let message = pb::WatchUsersResponse { changes: vec![change], ..Default::default() };
            let message = WatchMessage::at(&keys, &position, message).filtered(&keys, &filter).unwrap();
            let message: pb::WatchUsersResponse = message.decode().unwrap();
            message.changes.into_iter().next().map(|change| change.state.unwrap())
        };
        let removed = Some(State::Removed(pb::user_change::Removed {}));
        assert!(matches!(state(ChangeKind::Created, 1, "ann"), Some(State::User(_))));
        assert_eq!(state(ChangeKind::Created, 1, "bob"), None);
        // It may have matched before its second revision.
        assert_eq!(state(ChangeKind::Created, 2, "bob"), removed);
        assert_eq!(state(ChangeKind::Existing, 1, "bob"), removed);
        // The erasure of an earlier user with the same id.
        assert_eq!(state(ChangeKind::Expunged, 1, "bob"), removed);
    }
}

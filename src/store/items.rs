//! The items of a statement on users: one request, a batch of independent requests, or an
//! atomic batch. The statement says of each item what became of it.

use tokio_postgres::Row;
use uuid::Uuid;

use crate::error::{Access, Error};
use crate::model::batch::Batch;
use crate::model::fields::RequestId;
use crate::model::request::{Expunge, Undelete};
use crate::model::user::{NewUser, Removal, UserPatch};
use crate::pb;
use crate::store::idempotency::{Replay, Shape, replay};
use crate::store::pool::{Db, IsAccepted, Param};
use crate::store::user_row::{REVISION, USER_COLUMN_COUNT, column, optional_user_from_row};

/// How often a statement runs again because of a concurrent transaction.
const ATTEMPTS: usize = 5;

/// How long a statement with [`Locking::Skip`] waits for a lock that it could not skip: of a
/// username that another transaction is inserting, or of a row that was locked after the
/// statement began.
const SKIP_LOCK_TIMEOUT: &str = "100ms";

/// What a statement does with a row that another transaction has locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locking {
    /// Waits for it, for `LOCK_TIMEOUT_MS`.
    Wait,
    /// Leaves it out: its item is [`Outcome::Locked`].
    Skip,
}

/// What became of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<T> {
    /// The response: of a new change, of one that changed nothing, or of a retry.
    Done(T),
    /// Nothing was changed.
    Rejected(Error),
    /// Nothing was changed, because another transaction has locked the row.
    Locked,
}

/// The outcomes of items, as statements number them.
mod outcome {
    pub(super) const DONE: i16 = 0;
    pub(super) const REPLAY: i16 = 1;
    pub(super) const LOCKED: i16 = 2;
    pub(super) const NOT_FOUND: i16 = 3;
    pub(super) const DELETED: i16 = 4;
    pub(super) const MISMATCH: i16 = 5;
    pub(super) const USERNAME_TAKEN: i16 = 6;
    pub(super) const ID_TAKEN: i16 = 7;
    pub(super) const NOT_DELETED: i16 = 8;
    pub(super) const USERNAME_RELEASED: i16 = 9;
}

/// The columns behind a user's: the number of the item, its outcome, the id that it asks for.
/// Those of a user are null if there is none.
const POSITION: usize = USER_COLUMN_COUNT;
const OUTCOME: usize = USER_COLUMN_COUNT + 1;
const USER_ID: usize = USER_COLUMN_COUNT + 2;
/// When the statement ran.
pub(super) const TIME: usize = USER_COLUMN_COUNT + 3;

/// A request about one user, or the part of a batch that is.
pub trait Item {
    /// The id of the user, if the request gives it.
    fn user_id(&self) -> Option<Uuid>;
}

impl Item for NewUser {
    fn user_id(&self) -> Option<Uuid> {
        self.has_given_id.then_some(self.id)
    }
}

/// Requests that give the id of their user.
macro_rules! has_id {
    ($($item:ty),+) => {
        $(impl Item for $item {
            fn user_id(&self) -> Option<Uuid> {
                Some(self.id)
            }
        })+
    };
}
has_id!(UserPatch, Removal, Undelete, Expunge);

/// A statement in its variants. `$1` is a lock timeout, null for that of the session; `$2` and
/// `$3` are request ids and fingerprints, one an item; the parameters of the items follow.
pub(super) struct Statement {
    /// For independent items, with [`Locking::Skip`].
    pub(super) skip: &'static str,
    /// For independent items, with [`Locking::Wait`].
    pub(super) wait: &'static str,
    /// For an atomic batch, which has one request id.
    pub(super) atomic: &'static str,
}

/// The items of one statement.
pub struct Items<'a, T> {
    pub(super) items: Vec<&'a T>,
    /// One an item; in an atomic batch all the same.
    request_ids: Vec<&'a RequestId>,
    pub(super) is_atomic: bool,
    access: Access,
    locking: Locking,
}

impl<'a, T: Item> Items<'a, T> {
    /// Items of independent requests.
    pub fn independent(
        requests: impl Iterator<Item = (&'a T, &'a RequestId)>,
        access: Access,
        locking: Locking,
    ) -> Self {
        let (items, request_ids) = requests.unzip();
        Self { items, request_ids, is_atomic: false, access, locking }
    }

    /// The only item of a request that shares its statement with no other.
    pub(super) fn one(item: &'a T, request_id: &'a RequestId, validate_only: bool) -> Self {
        let access = Access::write(validate_only);
        Self::independent([(item, request_id)].into_iter(), access, Locking::Wait)
    }

    /// The items of an atomic batch: one that is rejected stops all.
    pub(super) fn atomic(batch: &'a Batch<T>) -> Self {
        let items: Vec<&T> = batch.items.iter().collect();
        Self {
            request_ids: vec![&batch.request_id; items.len()],
            items,
            is_atomic: true,
            access: Access::write(batch.validate_only),
            locking: Locking::Wait,
        }
    }

    /// Runs a statement, and again if a concurrent transaction was in its way: the next
    /// attempt sees what that one has done.
    pub(super) async fn run(
        &self,
        db: &Db,
        statement: &Statement,
        params: &[Param<'_>],
    ) -> Result<Vec<Row>, Error> {
        let (sql, lock_timeout) = match (self.is_atomic, self.locking) {
            (true, _) => (statement.atomic, None),
            (false, Locking::Wait) => (statement.wait, None),
            (false, Locking::Skip) => (statement.skip, Some(SKIP_LOCK_TIMEOUT)),
        };
        let (request_ids, fingerprints): (Vec<Option<Uuid>>, Vec<&[u8]>) =
            self.request_ids.iter().map(|request| (request.id, request.fingerprint.as_slice())).unzip();
        let first: [Param<'_>; 3] = [&lock_timeout, &request_ids, &fingerprints];
        let params: Vec<_> = first.into_iter().chain(params.iter().copied()).collect();
        for _ in 0..ATTEMPTS {
            let is_accepted: Option<IsAccepted> = self.is_atomic.then_some(is_done);
            let rows = match db.run_if(self.access, sql, &params, is_accepted).await {
                Err(Error::UsernameTaken { .. } | Error::UserIdTaken | Error::TransactionConflict) => {
                    continue;
                }
                ended => ended?,
            };
            // A row that the statement found, and that was changed before its lock was free.
            let is_raced =
                self.locking == Locking::Wait && rows.iter().any(|row| has_outcome(row, outcome::LOCKED));
            if !is_raced {
                return Ok(rows);
            }
        }
        Err(Error::TransactionConflict)
    }

    /// What became of independent items, in their order.
    pub(super) async fn outcomes<R>(
        &self,
        db: &Db,
        rows: &[Row],
        from_row: impl Fn(&Row) -> Result<R, Error>,
        from_replay: impl Fn(&T, Replay) -> Result<R, Error>,
    ) -> Result<Vec<Outcome<R>>, Error> {
        let mut outcomes: Vec<Option<Outcome<R>>> = self.items.iter().map(|_| None).collect();
        for row in rows {
            let index = index(row)?;
            let (Some(slot), Some(item), Some(request_id)) =
                (outcomes.get_mut(index), self.items.get(index), self.request_ids.get(index))
            else {
                continue;
            };
            *slot = Some(match column(row, OUTCOME)? {
                outcome::DONE => Outcome::Done(from_row(row)?),
                outcome::LOCKED => Outcome::Locked,
                // A retry that overlaps its first attempt looks too early for the record, and then
                // finds the user as that attempt has left it. So each rejection looks again.
                code => {
                    let response = match replay(db, request_id, Shape::One(item.user_id())).await {
                        Ok(Some(replay)) => from_replay(item, replay),
                        Ok(None) => Err(rejection(code, row)?),
                        Err(error) => Err(error),
                    };
                    response.map_or_else(Outcome::Rejected, Outcome::Done)
                }
            });
        }
        outcomes.into_iter().map(|outcome| outcome.ok_or(Error::Internal)).collect()
    }
}

/// The only outcome of a statement that waits for locks.
pub(super) fn one<R>(outcomes: Vec<Outcome<R>>) -> Result<R, Error> {
    match outcomes.into_iter().next() {
        Some(Outcome::Done(response)) => Ok(response),
        Some(Outcome::Rejected(error)) => Err(error),
        Some(Outcome::Locked) | None => Err(Error::TransactionConflict),
    }
}

/// The users of an atomic batch, if it was done, now or by an earlier request with this id.
/// `prefix` is the path from an item to the user's fields; `missing` is what stands for a user
/// that may be missing.
pub(super) async fn batch_users<T: Item>(
    db: &Db,
    batch: &Batch<T>,
    prefix: &str,
    rows: &[Row],
    missing: impl Fn(&T) -> Option<pb::User>,
) -> Result<Vec<pb::User>, Error> {
    let mut users: Vec<Option<pb::User>> = vec![None; batch.items.len()];
    let mut violations = Vec::new();
    for row in rows {
        let index = index(row)?;
        match column(row, OUTCOME)? {
            outcome::DONE => {
                if let Some(user) = users.get_mut(index) {
                    *user = optional_user_from_row(row)?;
                }
            }
            code => violations.push(rejection(code, row)?.into_item_violation(index, prefix)),
        }
    }
    if !violations.is_empty() {
        let ids: Vec<_> = batch.items.iter().map(Item::user_id).collect();
        if let Some(replay) = replay(db, &batch.request_id, Shape::Batch(&ids)).await? {
            users = replay.users.into_iter().map(Result::ok).collect();
            violations.clear();
        }
    }
    if violations.is_empty() {
        for (index, (user, item)) in users.iter_mut().zip(&batch.items).enumerate() {
            *user = user.take().or_else(|| missing(item));
            if user.is_none() {
                let error = Error::UserNotFound { name: String::new() };
                violations.push(error.into_item_violation(index, prefix));
            }
        }
    }
    if violations.is_empty() {
        return Ok(users.into_iter().flatten().collect());
    }
    violations.sort_by_key(|violation| violation.element.map(|element| element.index));
    Err(Error::Conflicts(violations))
}

/// The position of a row's item, from 0 on.
fn index(row: &Row) -> Result<usize, Error> {
    usize::try_from(column::<i64>(row, POSITION)? - 1).map_err(|_| Error::Internal)
}

/// Whether every item of a batch was done.
fn is_done(rows: &[Row]) -> bool {
    rows.iter().all(|row| has_outcome(row, outcome::DONE))
}

fn has_outcome(row: &Row, outcome: i16) -> bool {
    column(row, OUTCOME) == Ok(outcome)
}

/// Why an item was not done.
fn rejection(code: i16, row: &Row) -> Result<Error, Error> {
    Ok(match code {
        outcome::NOT_FOUND => Error::UserNotFound { name: column::<Uuid>(row, USER_ID)?.to_string() },
        outcome::DELETED => Error::UserDeleted,
        outcome::MISMATCH => Error::RevisionMismatch { current: column(row, REVISION)? },
        outcome::USERNAME_TAKEN => Error::UsernameTaken { field: "user.username" },
        outcome::ID_TAKEN => Error::UserIdTaken,
        outcome::NOT_DELETED => Error::UserNotDeleted,
        outcome::USERNAME_RELEASED => Error::UsernameReleased,
        // The record was purged between two statements.
        outcome::REPLAY => Error::TransactionConflict,
        _ => Error::Internal,
    })
}

//! Positions in the change log, and the tokens that contain them.
//!
//! A transaction gets its id when it first writes, and transactions commit in another
//! order. A position is therefore a set of transactions, not a number: all transactions up
//! to an id, except those that were still in flight. No change between two positions is
//! lost, and a long transaction does not delay the feed.

use std::{mem, time::SystemTime};

use prost::Message;

use crate::error::Error;
use crate::model::page::{Order, Position, Selection, to_micros};
use crate::model::token::TokenKeys;

/// A position in the change log: the set of changes that a client has received.
///
/// PostgreSQL keeps transaction ids within 2^31 of one another, so a transaction in flight takes
/// 1 to 5 bytes of a token. 15,000 of them always fit into
/// [`TOKEN_MAX_LEN`](crate::model::token::TOKEN_MAX_LEN): a position has at most two for each
/// connection of the server, those of an earlier and of a later snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPosition {
    /// The cluster, the database and the timeline. The timeline changes with each failover
    /// and restore.
    origin: String,
    /// The newest change of the set; its transaction is durable. Later transactions without
    /// changes are not recorded, because PostgreSQL can assign their ids again after a crash.
    last: TransactionStamp,
    /// Transactions before `last` whose changes are not in the set, in ascending order: they
    /// were in flight, or their changes have not been read yet.
    in_flight_xids: Vec<u64>,
}

/// A transaction of the change log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransactionStamp {
    /// The transaction id.
    pub xid: u64,
    /// When the transaction began, in microseconds. It identifies the transaction if a
    /// restored copy of the database assigns the same id to another one.
    pub time_us: i64,
}

/// The state of the change log in one snapshot, without its changes.
#[derive(Debug)]
pub struct LogState {
    /// The same as [`LogPosition`]'s.
    pub origin: String,
    /// The transactions in flight, in ascending order.
    pub in_flight_xids: Vec<u64>,
    /// The newest purged change.
    pub purged: TransactionStamp,
    /// When the last transaction of the position that is checked began; `None` if the log
    /// has no change of that transaction.
    pub last_time_us: Option<i64>,
}

impl TransactionStamp {
    /// Converts the columns of a change.
    pub fn new(xid: u64, time: SystemTime) -> Self {
        Self { xid, time_us: to_micros(time) }
    }
}

impl LogPosition {
    /// The position of a snapshot in which `last` is the newest change.
    pub fn current(origin: String, in_flight_xids: &[u64], last: TransactionStamp) -> Self {
        let in_flight_xids = in_flight_xids.iter().copied().filter(|xid| *xid < last.xid).collect();
        Self { origin, last, in_flight_xids }
    }

    /// The id of the last transaction.
    pub fn last_xid(&self) -> u64 {
        self.last.xid
    }

    /// The transactions before the last one that the position does not include.
    pub fn in_flight_xids(&self) -> &[u64] {
        &self.in_flight_xids
    }

    /// Checks that the log has every change after this position.
    pub fn check(&self, log: &LogState) -> Result<(), Error> {
        if self.origin != log.origin {
            return Err(Error::ResumeTokenForeign);
        }
        let oldest_missing = self.in_flight_xids.first().copied().unwrap_or(self.last.xid + 1);
        if log.purged.xid >= oldest_missing {
            return Err(Error::ResumeTokenExpired);
        }
        // A copy of the database that was restored from an earlier backup has no such change.
        let is_known = log.last_time_us == Some(self.last.time_us) || log.purged == self.last;
        if is_known { Ok(()) } else { Err(Error::ResumeTokenForeign) }
    }

    /// The position after a read of the changes that follow this one, in transaction order.
    /// `last` is the last transaction read; `is_all` means that the read was not limited.
    pub fn after(&self, log: &LogState, last: Option<TransactionStamp>, is_all: bool) -> Self {
        let read_to = last.filter(|_| !is_all).map_or(u64::MAX, |last| last.xid);
        let last = last.filter(|last| last.xid > self.last.xid).unwrap_or(self.last);
        let in_flight = log.in_flight_xids.iter().filter(|xid| **xid <= read_to && **xid < last.xid);
        let not_read = self.in_flight_xids.iter().filter(|xid| **xid > read_to);
        let in_flight_xids = in_flight.chain(not_read).copied().collect();
        Self { origin: self.origin.clone(), last, in_flight_xids }
    }

    /// Whether this position includes every change of `other`.
    pub fn includes(&self, other: &Self) -> bool {
        let mut missing = self.in_flight_xids.iter().filter(|xid| **xid <= other.last.xid);
        self.origin == other.origin
            && self.last.xid >= other.last.xid
            && missing.all(|xid| other.in_flight_xids.contains(xid))
    }

    /// The watch token of ListUsers and ExportUsers. It is valid with every filter.
    pub fn to_token(&self, keys: &TokenKeys) -> String {
        keys.encode(WATCH_TOKEN, &self.content(None))
    }

    /// Reads a watch token; `None` if it is invalid.
    pub fn from_token(keys: &TokenKeys, token: &str) -> Option<Self> {
        Content::decode(keys.decode(WATCH_TOKEN, token)?.as_slice()).ok()?.position()
    }

    fn content(&self, last_user: Option<&Position>) -> Vec<u8> {
        let mut next = self.last.xid;
        let gaps = self.in_flight_xids.iter().rev().map(|xid| mem::replace(&mut next, *xid) - xid);
        let content = Content {
            origin: self.origin.clone(),
            last_xid: self.last.xid,
            last_time_us: self.last.time_us,
            gaps: gaps.collect(),
            last_user: last_user.map(Position::to_bytes),
        };
        content.encode_to_vec()
    }
}

/// The content of a watch token or a resume token. Protocol Buffers, so that a later release can
/// add fields.
#[derive(Clone, PartialEq, Message)]
struct Content {
    #[prost(string, tag = "1")]
    origin: String,
    #[prost(uint64, tag = "2")]
    last_xid: u64,
    #[prost(sint64, tag = "3")]
    last_time_us: i64,
    /// The distances between `last_xid` and the transactions in flight, from the newest to the
    /// oldest: the distance from the last transaction, then from the one before in this list.
    #[prost(uint64, repeated, tag = "4")]
    gaps: Vec<u64>,
    #[prost(bytes = "vec", optional, tag = "5")]
    last_user: Option<Vec<u8>>,
}

impl Content {
    /// Accepts only valid positions: another release may have made the token.
    fn position(self) -> Option<LogPosition> {
        let last = TransactionStamp { xid: self.last_xid, time_us: self.last_time_us };
        let mut xid = last.xid;
        let mut in_flight_xids = Vec::with_capacity(self.gaps.len());
        for gap in self.gaps {
            xid = xid.checked_sub(gap).filter(|_| gap > 0)?;
            in_flight_xids.push(xid);
        }
        in_flight_xids.reverse();
        (last.xid < u64::MAX).then_some(LogPosition { origin: self.origin, last, in_flight_xids })
    }
}

/// The context of watch tokens.
const WATCH_TOKEN: &[u8] = b"point";

/// The context of the resume tokens of unfiltered watches.
const RESUME_TOKEN: &[u8] = b"watch";

/// The content of a resume token: where a watch continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeToken {
    /// The changes that the client has received.
    pub position: LogPosition,
    /// The last user that the client has received, within an initial state.
    pub last_user: Option<Position>,
}

impl ResumeToken {
    /// Of a position outside an initial state.
    pub fn at(position: LogPosition) -> Self {
        Self { position, last_user: None }
    }

    /// Encodes the token of a watch with this filter.
    pub fn encode(&self, keys: &TokenKeys, filter: Option<&Selection>) -> String {
        keys.encode(&context(filter), &self.position.content(self.last_user.as_ref()))
    }

    /// Reads a token of a watch with this filter, whose initial state has this order; `None` if
    /// it is invalid.
    pub fn decode(keys: &TokenKeys, token: &str, filter: Option<&Selection>, order: Order) -> Option<Self> {
        let mut content = Content::decode(keys.decode(&context(filter), token)?.as_slice()).ok()?;
        let last_user = match content.last_user.take() {
            Some(bytes) => Some(order.position_from_bytes(&bytes)?),
            None => None,
        };
        Some(Self { position: content.position()?, last_user })
    }
}

fn context(filter: Option<&Selection>) -> Vec<u8> {
    filter.map_or_else(|| RESUME_TOKEN.to_vec(), Selection::watch_context)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::model::page::Key;
    use crate::model::token::{TOKEN_MAX_LEN, tests::keys};

    const LAST_XID: u64 = 40;

    /// A position, and the plain set of the transactions that it includes.
    fn position(last: u64, in_flight: &BTreeSet<u64>) -> (LogPosition, BTreeSet<u64>) {
        let in_flight_xids: Vec<u64> = in_flight.iter().copied().filter(|xid| *xid < last).collect();
        let included = (1..=last).filter(|xid| !in_flight_xids.contains(xid)).collect();
        let last = TransactionStamp { xid: last, time_us: 7 };
        (LogPosition { origin: "1 2 3".into(), last, in_flight_xids }, included)
    }

    fn some_xids() -> impl Strategy<Value = BTreeSet<u64>> {
        prop::collection::btree_set(1..LAST_XID, 0..10)
    }

    proptest! {
        #[test]
        fn resume_token_returns_its_position(last in 1..u64::MAX - 1, xids in some_xids(), name in prop::option::of("[a-z]{1,64}")) {
            let (mut position, _) = position(LAST_XID, &xids);
            position.last.xid = last.max(LAST_XID);
            let last_user = name.map(|name| Position { key: Key::Username(name), id: Uuid::max() });
            let token = ResumeToken { position, last_user };
            let text = token.encode(&keys(&[1]), None);
            prop_assert_eq!(ResumeToken::decode(&keys(&[1]), &text, None, Order::UsernameAsc), Some(token));
            prop_assert_eq!(LogPosition::from_token(&keys(&[1]), &text), None);
        }

        /// A token of another release can have any content.
        #[test]
        fn content_of_a_resume_token_is_a_position_or_rejected(
            origin: String, last_xid: u64, last_time_us: i64, gaps: Vec<u64>, small_gaps in prop::collection::vec(0..9_u64, 0..9), last_user: Option<Vec<u8>>, junk: Vec<u8>
        ) {
            let content = |gaps: Vec<u64>| {
                let (origin, last_user) = (origin.clone(), last_user.clone());
                Content { origin, last_xid, last_time_us, gaps, last_user }.encode_to_vec()
            };
            for content in [content(gaps), content(small_gaps), junk] {
                let token = keys(&[1]).encode(RESUME_TOKEN, &content);
                for order in [Order::CreateTimeDesc, Order::UsernameAsc] {
                    if let Some(token) = ResumeToken::decode(&keys(&[1]), &token, None, order) {
                        prop_assert!(token.position.includes(&token.position));
                        let text = token.encode(&keys(&[1]), None);
                        prop_assert_eq!(ResumeToken::decode(&keys(&[1]), &text, None, order), Some(token));
                    }
                }
            }
        }

        /// Reads of any size neither skip nor repeat a change.
        #[test]
        fn position_after_a_read_includes_what_it_had_and_what_was_read(
            from in 1..LAST_XID,
            in_flight in some_xids(),
            still_in_flight in some_xids(),
            size in 1..20_usize,
        ) {
            let (from, included) = position(from, &in_flight);
            // A transaction that the later snapshot does not see was not seen before either.
            let in_flight_xids: Vec<u64> =
                still_in_flight.into_iter().filter(|xid| !included.contains(xid)).collect();
            let unread: Vec<u64> =
                (1..=LAST_XID).filter(|xid| !included.contains(xid) && !in_flight_xids.contains(xid)).collect();
            let log = LogState {
                origin: from.origin.clone(),
                in_flight_xids,
                purged: TransactionStamp { xid: 0, time_us: 0 },
                last_time_us: Some(7),
            };
            let read: Vec<u64> = unread.iter().copied().take(size).collect();
            let last = read.last().map(|xid| TransactionStamp { xid: *xid, time_us: 7 });
            let after = from.after(&log, last, read.len() == unread.len());
            let expected: BTreeSet<u64> = included.iter().chain(&read).copied().collect();
            let has = |xid: &u64| *xid <= after.last.xid && !after.in_flight_xids.contains(xid);
            prop_assert_eq!((1..=LAST_XID).filter(has).collect::<BTreeSet<_>>(), expected);
            prop_assert!(after.includes(&from));
            prop_assert_eq!(from.includes(&after), read.is_empty());
            prop_assert!(after.in_flight_xids.is_sorted());
        }

        #[test]
        fn position_includes_another_if_its_set_is_a_superset(
            a in 1..LAST_XID, b in 1..LAST_XID, in_flight_a in some_xids(), in_flight_b in some_xids()
        ) {
            let ((a, set_a), (b, set_b)) = (position(a, &in_flight_a), position(b, &in_flight_b));
            prop_assert_eq!(a.includes(&b), set_a.is_superset(&set_b));
        }
    }

    #[test]
    fn position_with_many_transactions_in_flight_fits_into_a_token() {
        // The distances that take the most bytes, of 15,000 ids within 2^31.
        let gaps = [vec![1 << 21; 900], vec![1 << 14; 14_100]].concat();
        let last = TransactionStamp { xid: u64::MAX - 1, time_us: i64::MIN };
        let in_flight_xids = gaps.iter().rev().scan(last.xid - (1 << 31), |xid, gap| {
            *xid += gap;
            Some(*xid)
        });
        let in_flight_xids: Vec<u64> = in_flight_xids.collect();
        assert!(in_flight_xids.last().is_some_and(|newest| *newest < last.xid));
        let origin =
            [u64::MAX.to_string(), u32::MAX.to_string(), i64::MAX.to_string(), "0000000A".into()].join(" ");
        let last_user = Some(Position { key: Key::Username("\u{10000}".repeat(64)), id: Uuid::max() });
        let token = ResumeToken { position: LogPosition { origin, last, in_flight_xids }, last_user };
        let text = token.encode(&keys(&[1]), None);
        assert!((TOKEN_MAX_LEN / 2..=TOKEN_MAX_LEN).contains(&text.len()), "{}", text.len());
        assert_eq!(ResumeToken::decode(&keys(&[1]), &text, None, Order::UsernameAsc), Some(token));
    }

    #[test]
    fn position_is_rejected_unless_the_log_has_every_later_change() {
        let (position, _) = position(10, &BTreeSet::from([5]));
        let log = |origin: &str, purged: u64, last_time_us| LogState {
            origin: origin.into(),
            in_flight_xids: Vec::new(),
            purged: TransactionStamp { xid: purged, time_us: 7 },
            last_time_us,
        };
        assert_eq!(position.check(&log("1 2 3", 4, Some(7))), Ok(()));
        assert_eq!(position.check(&log("1 2 3", 5, Some(7))), Err(Error::ResumeTokenExpired));
        assert_eq!(position.check(&log("1 2 3", 11, None)), Err(Error::ResumeTokenExpired));
        assert_eq!(position.check(&log("1 2 4", 4, Some(7))), Err(Error::ResumeTokenForeign));
        assert_eq!(position.check(&log("1 2 3", 4, Some(8))), Err(Error::ResumeTokenForeign));
        assert_eq!(position.check(&log("1 2 3", 4, None)), Err(Error::ResumeTokenForeign));
        // If exactly the included changes are purged, the position is still valid.
        let idle = LogPosition { in_flight_xids: Vec::new(), ..position };
        assert_eq!(idle.check(&log("1 2 3", 10, None)), Ok(()));
    }
}

//! Positions in the change log, and the tokens that contain them.
//!
//! A transaction gets its id when it first writes, and transactions commit in another
//! order. A position is therefore a set of transactions, not a number: all transactions up
//! to an id, except those that were still in flight. No change between two positions is
//! lost, and a long transaction does not delay the feed.

use std::time::SystemTime;

use crate::error::Error;
use crate::model::page::{from_micros, to_micros};
use crate::model::token::{decode_token, encode_token};

/// A position in the change log: the set of changes that a client has received.
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
    pub fn to_token(&self) -> String {
        encode_token(WATCH_TOKEN, self.to_text().as_bytes())
    }

    /// Reads a watch token; `None` if it is invalid.
    pub fn from_token(token: &str) -> Option<Self> {
        Self::from_text(&String::from_utf8(decode_token(WATCH_TOKEN, token)?).ok()?)
    }

    fn to_text(&self) -> String {
        let Self { origin, last, in_flight_xids } = self;
        let in_flight_xids: Vec<String> = in_flight_xids.iter().map(u64::to_string).collect();
        format!("{origin}|{} {}|{}", last.xid, last.time_us, in_flight_xids.join(" "))
    }

    /// Accepts only valid positions, because tokens can be forged.
    fn from_text(text: &str) -> Option<Self> {
        let mut parts = text.split('|');
        let (origin, last, in_flight_xids) = (parts.next()?, parts.next()?, parts.next()?);
        let (xid, time_us) = last.split_once(' ')?;
        let last = TransactionStamp { xid: xid.parse().ok()?, time_us: time_us.parse().ok()? };
        from_micros(last.time_us)?;
        let in_flight_xids = in_flight_xids.split(' ').filter(|xid| !xid.is_empty());
        let in_flight_xids: Vec<u64> = in_flight_xids.map(|xid| xid.parse().ok()).collect::<Option<_>>()?;
        let is_ascending = in_flight_xids.iter().chain([&last.xid]).is_sorted_by(|a, b| a < b);
        let is_valid = parts.next().is_none() && last.xid < u64::MAX && is_ascending;
        is_valid.then(|| Self { origin: origin.to_owned(), last, in_flight_xids })
    }
}

/// The context of watch tokens.
const WATCH_TOKEN: &[u8] = b"point";

/// The context of resume tokens.
const RESUME_TOKEN: &[u8] = b"watch";

/// The content of a resume token: where a watch continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeToken {
    /// The changes that the client has received.
    pub position: LogPosition,
    /// The token of the next page, within an initial state.
    pub page_token: Option<String>,
}

impl ResumeToken {
    /// Encodes the token of an unfiltered watch.
    pub fn to_text(&self) -> String {
        let page_token = self.page_token.as_deref().unwrap_or_default();
        encode_token(RESUME_TOKEN, format!("{}|{page_token}", self.position.to_text()).as_bytes())
    }

    /// Reads a token; `None` if it is invalid.
    pub fn parse(text: &str) -> Option<Self> {
        let text = String::from_utf8(decode_token(RESUME_TOKEN, text)?).ok()?;
        let (position, page_token) = text.rsplit_once('|')?;
        let page_token = Some(page_token.to_owned()).filter(|token| !token.is_empty());
        Some(Self { position: LogPosition::from_text(position)?, page_token })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

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
        fn resume_token_returns_its_position(last in 1..u64::MAX - 1, xids in some_xids(), page_token in prop::option::of("[0-9A-Za-z_-]{1,80}")) {
            let (mut position, _) = position(LAST_XID, &xids);
            position.last.xid = last.max(LAST_XID);
            let token = ResumeToken { position, page_token };
            prop_assert_eq!(ResumeToken::parse(&token.to_text()), Some(token));
        }

        /// A forged token with a valid checksum is harmless.
        #[test]
        fn forged_resume_token_is_valid_or_rejected(text in "[0-9]{1,3} [0-9] [0-9]\\|[0-9]{1,22} -?[0-9]{1,22}\\|[0-9 ]{0,20}\\|[0-9a-f -]{0,80}") {
            if let Some(token) = ResumeToken::parse(&encode_token(RESUME_TOKEN, text.as_bytes())) {
                let _ = token.position.includes(&token.position);
                let _ = token.to_text();
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

//! Points in the history of all users, and the tokens that carry them.
//!
//! Transactions get their numbers when they begin to write, and commit in another
//! order. So a point is not a number but a set: the changes of all transactions up to
//! one of them, except those that were still under way. What lies between two points
//! is never lost, and nobody waits for a slow transaction.

use std::time::SystemTime;

use crate::error::Error;
use crate::model::page::{decode_token, encode_token, from_micros, to_micros};

/// The changes that somebody has seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPosition {
    /// Of which history: the cluster, the database in it, and the timeline, which
    /// becomes another one with each failover and restore.
    history: String,
    /// The newest change that was seen. Its transaction is known to be durable. That a
    /// snapshot saw later ones, without changes, is not kept: after a crash their
    /// numbers can be given out again.
    last: TransactionStamp,
    /// Transactions before it whose changes were not seen, in ascending order.
    unseen: Vec<u64>,
}

/// A change, as far as points know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransactionStamp {
    /// The transaction.
    pub xid: u64,
    /// When it began, in microseconds. Had history gone another way, the transaction
    /// with this number would have begun at another time.
    pub time_us: i64,
}

/// What a statement sees of the change log beside the changes.
#[derive(Debug)]
pub struct Log {
    /// Of which history: as that of a point.
    pub history: String,
    /// The transactions that are still under way, in ascending order.
    pub running: Vec<u64>,
    /// The newest change that was purged.
    pub purged: TransactionStamp,
    /// When the transaction began that is the last one of the point in question; `None`
    /// if it has no change in the log.
    pub last_time_us: Option<i64>,
}

impl TransactionStamp {
    /// A change in the log.
    pub fn new(xid: u64, time: SystemTime) -> Self {
        Self { xid, time_us: to_micros(time) }
    }
}

impl LogPosition {
    /// The point at which a statement saw this log, of which `last` is the newest change.
    pub fn now(history: String, running: &[u64], last: TransactionStamp) -> Self {
        let unseen = running.iter().copied().filter(|xid| *xid < last.xid).collect();
        Self { history, last, unseen }
    }

    /// The number of the last transaction.
    pub fn last_xid(&self) -> u64 {
        self.last.xid
    }

    /// The transactions before it that were not seen.
    pub fn unseen(&self) -> &[u64] {
        &self.unseen
    }

    /// Whether everything behind this point can be read from the log.
    pub fn check(&self, log: &Log) -> Result<(), Error> {
        if self.history != log.history {
            return Err(Error::ResumeTokenForeign);
        }
        let oldest_unseen = self.unseen.first().copied().unwrap_or(self.last.xid + 1);
        if log.purged.xid >= oldest_unseen {
            return Err(Error::ResumeTokenExpired);
        }
        // A copy of the database that went its own way has no such change.
        let is_known = log.last_time_us == Some(self.last.time_us) || log.purged == self.last;
        if is_known { Ok(()) } else { Err(Error::ResumeTokenForeign) }
    }

    /// The point after the changes behind this one were read up to `last`, in the order
    /// of their transactions: all of them, or as many as a batch holds.
    pub fn after(&self, log: &Log, last: Option<TransactionStamp>, is_all: bool) -> Self {
        let read_to = last.filter(|_| !is_all).map_or(u64::MAX, |last| last.xid);
        let last = last.filter(|last| last.xid > self.last.xid).unwrap_or(self.last);
        let running = log.running.iter().filter(|xid| **xid <= read_to && **xid < last.xid);
        let not_read = self.unseen.iter().filter(|xid| **xid > read_to);
        Self { history: self.history.clone(), last, unseen: running.chain(not_read).copied().collect() }
    }

    /// Whether whoever is here has seen all that belongs to `other`.
    pub fn includes(&self, other: &Self) -> bool {
        let mut missing = self.unseen.iter().filter(|xid| **xid <= other.last.xid);
        self.history == other.history
            && self.last.xid >= other.last.xid
            && missing.all(|xid| other.unseen.contains(xid))
    }

    /// The token of the point, for whoever begins to watch, all users or some.
    pub fn to_token(&self) -> String {
        encode_token(POINT_SEAL, self.to_text().as_bytes())
    }

    /// Reads such a token; `None` if it was not made by us.
    pub fn from_token(token: &str) -> Option<Self> {
        Self::from_text(&String::from_utf8(decode_token(POINT_SEAL, token)?).ok()?)
    }

    fn to_text(&self) -> String {
        let Self { history, last, unseen } = self;
        let unseen: Vec<String> = unseen.iter().map(u64::to_string).collect();
        format!("{history}|{} {}|{}", last.xid, last.time_us, unseen.join(" "))
    }

    fn from_text(text: &str) -> Option<Self> {
        let mut parts = text.split('|');
        let (history, last, unseen) = (parts.next()?, parts.next()?, parts.next()?);
        let (xid, time_us) = last.split_once(' ')?;
        let last = TransactionStamp { xid: xid.parse().ok()?, time_us: time_us.parse().ok()? };
        from_micros(last.time_us)?;
        // Also when it is forged, it has to be a point.
        let unseen: Vec<u64> = numbers(unseen, ' ')?;
        let is_ascending = unseen.iter().chain([&last.xid]).is_sorted_by(|a, b| a < b);
        let is_whole = parts.next().is_none() && last.xid < u64::MAX && is_ascending;
        is_whole.then(|| Self { history: history.to_owned(), last, unseen })
    }
}

const POINT_SEAL: &[u8] = b"point";

/// Where a watch goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// ChangesSince which the changes are.
    pub point: LogPosition,
    /// Within an initial state, the token of its next page.
    pub page_token: Option<String>,
}

const SEAL: &[u8] = b"watch";

impl Token {
    /// The token as callers get it, if they watch all users.
    pub fn to_text(&self) -> String {
        let page_token = self.page_token.as_deref().unwrap_or_default();
        encode_token(SEAL, format!("{}|{page_token}", self.point.to_text()).as_bytes())
    }

    /// Reads a token; `None` if it was not made by us.
    pub fn parse(text: &str) -> Option<Self> {
        let text = String::from_utf8(decode_token(SEAL, text)?).ok()?;
        let (point, page_token) = text.rsplit_once('|')?;
        let page_token = Some(page_token.to_owned()).filter(|token| !token.is_empty());
        Some(Self { point: LogPosition::from_text(point)?, page_token })
    }
}

/// The running transactions of a `pg_snapshot`, which is `xmin:xmax:` and a list.
pub fn running(snapshot: &str) -> Option<Vec<u64>> {
    numbers(snapshot.split(':').nth(2)?, ',')
}

fn numbers(list: &str, separator: char) -> Option<Vec<u64>> {
    let numbers = list.split(separator).filter(|number| !number.is_empty());
    numbers.map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const LAST_XID: u64 = 40;

    /// A point, and the same as the plain set of what was seen.
    fn point(last: u64, unseen: &BTreeSet<u64>) -> (LogPosition, BTreeSet<u64>) {
        let unseen: Vec<u64> = unseen.iter().copied().filter(|xid| *xid < last).collect();
        let seen = (1..=last).filter(|xid| !unseen.contains(xid)).collect();
        (
            LogPosition { history: "1 2 3".into(), last: TransactionStamp { xid: last, time_us: 7 }, unseen },
            seen,
        )
    }

    fn some_xids() -> impl Strategy<Value = BTreeSet<u64>> {
        prop::collection::btree_set(1..LAST_XID, 0..10)
    }

    proptest! {
        #[test]
        fn a_token_leads_back_to_its_point(last in 1..u64::MAX - 1, xids in some_xids(), page_token in prop::option::of("[0-9A-Za-z_-]{1,80}")) {
            let (mut point, _) = point(LAST_XID, &xids);
            point.last.xid = last.max(LAST_XID);
            let token = Token { point, page_token };
            prop_assert_eq!(Token::parse(&token.to_text()), Some(token));
        }

        /// Even with a good seal, which takes malice, a token is harmless.
        #[test]
        fn forged_text_is_a_token_or_nothing(text in "[0-9]{1,3} [0-9] [0-9]\\|[0-9]{1,22} -?[0-9]{1,22}\\|[0-9 ]{0,20}\\|[0-9a-f -]{0,80}") {
            if let Some(token) = Token::parse(&encode_token(SEAL, text.as_bytes())) {
                let _ = token.point.includes(&token.point);
                let _ = token.to_text();
            }
        }

        /// Whatever is read in whatever pieces, nothing is passed over or seen twice.
        #[test]
        fn a_point_after_a_batch_has_what_was_seen_and_what_was_read(
            from in 1..LAST_XID,
            unseen in some_xids(),
            still_running in some_xids(),
            size in 1..20_usize,
        ) {
            let (from, seen) = point(from, &unseen);
            // What the later statement does not see, the earlier one has not seen.
            let running: Vec<u64> = still_running.into_iter().filter(|xid| !seen.contains(xid)).collect();
            let log = Log {
                history: from.history.clone(),
                running: running.clone(),
                purged: TransactionStamp { xid: 0, time_us: 0 },
                last_time_us: Some(7),
            };
            let behind: Vec<u64> =
                (1..=LAST_XID).filter(|xid| !seen.contains(xid) && !running.contains(xid)).collect();
            let batch: Vec<u64> = behind.iter().copied().take(size).collect();
            let last = batch.last().map(|xid| TransactionStamp { xid: *xid, time_us: 7 });
            let after = from.after(&log, last, batch.len() == behind.len());
            let expected: BTreeSet<u64> = seen.iter().chain(&batch).copied().collect();
            let has = |xid: &u64| *xid <= after.last.xid && !after.unseen.contains(xid);
            prop_assert_eq!((1..=LAST_XID).filter(has).collect::<BTreeSet<_>>(), expected);
            prop_assert!(after.includes(&from));
            prop_assert_eq!(from.includes(&after), batch.is_empty());
            prop_assert!(after.unseen.is_sorted());
        }

        #[test]
        fn a_point_includes_another_as_a_set_does(
            a in 1..LAST_XID, b in 1..LAST_XID, unseen_a in some_xids(), unseen_b in some_xids()
        ) {
            let ((a, seen_a), (b, seen_b)) = (point(a, &unseen_a), point(b, &unseen_b));
            prop_assert_eq!(a.includes(&b), seen_a.is_superset(&seen_b));
        }
    }

    #[test]
    fn a_point_is_refused_unless_all_that_is_behind_it_is_in_the_log() {
        let (point, _) = point(10, &BTreeSet::from([5]));
        let log = |history: &str, purged: u64, last_time_us| Log {
            history: history.into(),
            running: Vec::new(),
            purged: TransactionStamp { xid: purged, time_us: 7 },
            last_time_us,
        };
        assert_eq!(point.check(&log("1 2 3", 4, Some(7))), Ok(()));
        assert_eq!(point.check(&log("1 2 3", 5, Some(7))), Err(Error::ResumeTokenExpired));
        assert_eq!(point.check(&log("1 2 3", 11, None)), Err(Error::ResumeTokenExpired));
        assert_eq!(point.check(&log("1 2 4", 4, Some(7))), Err(Error::ResumeTokenForeign));
        assert_eq!(point.check(&log("1 2 3", 4, Some(8))), Err(Error::ResumeTokenForeign));
        assert_eq!(point.check(&log("1 2 3", 4, None)), Err(Error::ResumeTokenForeign));
        // With all that was seen purged, and nothing else, it is still good.
        let idle = LogPosition { unseen: Vec::new(), ..point };
        assert_eq!(idle.check(&log("1 2 3", 10, None)), Ok(()));
    }
}

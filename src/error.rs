//! What can go wrong with a call, and the one place that picks a code for it.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio_postgres::error::SqlState;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// The domain of every `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "users.v1";

/// The reasons why a field is refused; those of whole calls stand in
/// `Error::parts`.
pub mod reason {
    #![allow(missing_docs)]
    pub const FIELD_REQUIRED: &str = "FIELD_REQUIRED";
    pub const FIELD_INVALID: &str = "FIELD_INVALID";
    pub const USERNAME_INVALID: &str = "USERNAME_INVALID";
    pub const USERNAME_TAKEN: &str = "USERNAME_TAKEN";
    pub const EMAIL_INVALID: &str = "EMAIL_INVALID";
    pub const UPDATE_MASK_INVALID: &str = "UPDATE_MASK_INVALID";
    pub const PAGE_TOKEN_INVALID: &str = "PAGE_TOKEN_INVALID";
    pub const FILTER_UNSUPPORTED: &str = "FILTER_UNSUPPORTED";
    pub const BATCH_TOO_LARGE: &str = "BATCH_TOO_LARGE";
    pub const REQUEST_ID_REUSED: &str = "REQUEST_ID_REUSED";
    pub const RESUME_TOKEN_INVALID: &str = "RESUME_TOKEN_INVALID";
    pub const USER_ID_TAKEN: &str = "USER_ID_TAKEN";
    pub const USER_NOT_FOUND: &str = "USER_NOT_FOUND";
    pub const USER_DELETED: &str = "USER_DELETED";
    pub const REVISION_MISMATCH: &str = "REVISION_MISMATCH";
}

/// An element of a list in a request, such as `items[17]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Element {
    /// The list's name.
    pub list: &'static str,
    /// 0 is the first.
    pub index: usize,
}

/// A field that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The element that the field is in, if it is in a list.
    pub element: Option<Element>,
    /// The path of the field in the element or in the request, as in the proto.
    pub field: String,
    /// One of [`reason`].
    pub reason: &'static str,
    /// What is wrong, for a person. Never repeats the value.
    pub description: String,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// Fields were refused: all of them, never none.
    Invalid(Vec<Violation>),
    /// Items of a batch do not go with the users that there are, or with one
    /// another: all of them, never none.
    Conflicts(Vec<Violation>),
    /// Somebody has the username that this field asks for.
    UsernameTaken {
        /// The field's path.
        field: &'static str,
    },
    /// There is a user with this id.
    UserIdTaken,
    /// There is no user with this id or username.
    UserNotFound {
        /// The id or username, as the caller wrote it.
        name: String,
    },
    /// The user is soft-deleted.
    UserDeleted,
    /// The user is not soft-deleted.
    UserNotDeleted,
    /// The deleted user has no username any more, and none was given.
    UsernameReleased,
    /// The user has another revision than the caller expects.
    RevisionMismatch {
        /// The revision that it has.
        current: i64,
    },
    /// Another transaction was in the way.
    TransactionConflict,
    /// Too many calls wait already.
    Overloaded,
    /// As many streams of this kind are under way as there may be.
    TooManyStreams {
        /// Of which kind, such as "exports".
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// Changes after the token are gone from the change log.
    ResumeTokenExpired,
    /// The token is of another database, or of a history that this one has not had.
    ResumeTokenForeign,
    /// There is no connection to the database, or it cannot write.
    DatabaseUnavailable,
    /// The connection broke while a change was being made.
    OutcomeUnknown,
    /// The server stops, and with it a stream.
    Stopping,
    /// The caller's deadline, or the server's limit, passed.
    DeadlineExceeded,
    /// A defect. The log has the cause.
    Internal,
}

/// What a statement does with the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    Read,
    /// It changes them, and is committed.
    Write,
    /// It changes them, and is rolled back.
    DryRun,
}

impl Access {
    /// A change, for real or only to see what would happen.
    pub fn write(validate_only: bool) -> Self {
        if validate_only { Self::DryRun } else { Self::Write }
    }
}

impl Violation {
    /// The path of the field in the request.
    fn path(&self) -> String {
        match self.element {
            Some(Element { list, index }) => format!("{list}[{index}].{}", self.field),
            None => self.field.clone(),
        }
    }
}

impl Error {
    /// One refused field.
    pub fn invalid(field: &str, reason: &'static str, description: impl Into<String>) -> Self {
        let (field, description) = (field.to_owned(), description.into());
        Self::Invalid(vec![Violation { element: None, field, reason, description }])
    }

    /// What a failed statement means to the caller. Constraints are known by
    /// their names, everything else by its SQLSTATE; no text of the driver or of
    /// PostgreSQL goes further than this, since both repeat values.
    pub fn from_postgres(error: &tokio_postgres::Error, access: Access) -> Self {
        let lost = match access {
            Access::Read | Access::DryRun => Self::DatabaseUnavailable,
            // Nobody knows whether it was committed.
            Access::Write => Self::OutcomeUnknown,
        };
        let Some(refusal) = error.as_db_error() else {
            return lost;
        };
        match (refusal.code(), refusal.constraint()) {
            (&SqlState::UNIQUE_VIOLATION, Some("users_username_key")) => {
                Self::UsernameTaken { field: "user.username" }
            }
            (&SqlState::UNIQUE_VIOLATION, Some("users_pkey")) => Self::UserIdTaken,
            // In a group; alone, it waits for its twin and answers as that one.
            (&SqlState::UNIQUE_VIOLATION, Some("requests_pkey")) => Self::TransactionConflict,
            (
                &SqlState::T_R_SERIALIZATION_FAILURE
                | &SqlState::T_R_DEADLOCK_DETECTED
                | &SqlState::LOCK_NOT_AVAILABLE,
                _,
            ) => Self::TransactionConflict,
            // statement_timeout: as long as the longest call may take.
            (&SqlState::QUERY_CANCELED, _) => Self::DeadlineExceeded,
            // A primary that became a standby refuses to write before it starts.
            (&SqlState::READ_ONLY_SQL_TRANSACTION, _) => Self::DatabaseUnavailable,
            (state, _) if is_connection_lost(state) => lost,
            // Insufficient resources: too many connections, disk full, no memory.
            (state, _) if state.code().starts_with("53") => Self::DatabaseUnavailable,
            _ => Self::Internal,
        }
    }

    /// A message that is refused before it is decoded.
    pub fn too_many_elements() -> Self {
        Self::invalid(
            "request",
            reason::BATCH_TOO_LARGE,
            "has too many elements: lists may have at most 1000",
        )
    }

    /// Why a message of a stream could not be read.
    pub fn of_message(status: &Status) -> Self {
        let what = match status.code() {
            Code::OutOfRange => "is too large: at most 4 MiB",
            Code::Unavailable => return Self::Stopping,
            Code::InvalidArgument => return Self::too_many_elements(),
            _ => "is not a message of this rpc",
        };
        Self::invalid("request", reason::FIELD_INVALID, what)
    }

    /// Code, reason and message of each failure.
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn parts(&self) -> (Code, &'static str, String) {
        match self {
            Self::Invalid(violations) => {
                let reason = violations.first().map_or(reason::FIELD_INVALID, |v| v.reason);
                (Code::InvalidArgument, reason, message(violations))
            }
            Self::Conflicts(violations) => {
                let (code, reason) = hardest(violations);
                (code, reason, message(violations))
            }
            Self::UsernameTaken { field } => (
                Code::AlreadyExists,
                reason::USERNAME_TAKEN,
                format!("{field}: another user has this username"),
            ),
            Self::UserIdTaken => (
                Code::AlreadyExists,
                reason::USER_ID_TAKEN,
                "user.id: there is a user with this id already".into(),
            ),
            Self::UserNotFound { .. } => {
                (Code::NotFound, reason::USER_NOT_FOUND, "there is no such user".into())
            }
            Self::UserDeleted => {
                (Code::FailedPrecondition, reason::USER_DELETED, "the user is deleted".into())
            }
            Self::UserNotDeleted => {
                (Code::FailedPrecondition, "USER_NOT_DELETED", "the user is not deleted".into())
            }
            Self::UsernameReleased => (
                Code::FailedPrecondition,
                "USERNAME_RELEASED",
                "the user's username was released: give it one in `username`".into(),
            ),
            Self::RevisionMismatch { current } => (
                Code::Aborted,
                reason::REVISION_MISMATCH,
                format!("the user has changed: its revision is {current}"),
            ),
            Self::TransactionConflict => (
                Code::Aborted,
                "TRANSACTION_CONFLICT",
                "another transaction was in the way; nothing was changed".into(),
            ),
            Self::Overloaded => (
                Code::ResourceExhausted,
                "OVERLOADED",
                "too many calls are waiting; nothing was started".into(),
            ),
            Self::TooManyStreams { what, limit } => (
                Code::ResourceExhausted,
                "OVERLOADED",
                format!("there are {limit} {what} under way, which is the limit; nothing was started"),
            ),
            Self::ResumeTokenExpired => (
                Code::OutOfRange,
                "RESUME_TOKEN_EXPIRED",
                "resume_token: it is too old, changes after it are gone: begin anew with send_initial_state"
                    .into(),
            ),
            Self::ResumeTokenForeign => (
                Code::FailedPrecondition,
                "RESUME_TOKEN_FOREIGN",
                "resume_token: it is of another database, or of one that was restored since: begin anew \
                 with send_initial_state"
                    .into(),
            ),
            Self::DatabaseUnavailable => (
                Code::Unavailable,
                "DATABASE_UNAVAILABLE",
                "the database cannot be reached; nothing was changed".into(),
            ),
            Self::OutcomeUnknown => (
                Code::Unavailable,
                "OUTCOME_UNKNOWN",
                "the connection to the database broke: retry with the same request_id".into(),
            ),
            Self::Stopping => {
                (Code::Unavailable, "STOPPING", "this replica stops: go on with another one".into())
            }
            Self::DeadlineExceeded => {
                (Code::DeadlineExceeded, "DEADLINE_EXCEEDED", "the deadline has passed".into())
            }
            Self::Internal => (Code::Internal, "INTERNAL", "internal error".into()),
        }
    }

    /// How long a caller should wait before it tries again, if it should.
    fn retry_delay(&self) -> Option<Duration> {
        match self {
            Self::TransactionConflict => Some(Duration::from_millis(50)),
            Self::Overloaded => Some(Duration::from_millis(500)),
            Self::TooManyStreams { .. } | Self::DatabaseUnavailable | Self::OutcomeUnknown => {
                Some(Duration::from_secs(1))
            }
            _ => None,
        }
    }
}

/// Whether PostgreSQL's answer means that this connection is at its end: classes
/// 08 (connection exception) and 57P (operator intervention), of which only
/// `query_canceled`, 57014, leaves it usable.
pub fn is_connection_lost(state: &SqlState) -> bool {
    state.code().starts_with("08") || state.code().starts_with("57P")
}

/// The kinds of conflicts, the one that is hardest to cure first. So ABORTED says of
/// all of them that it is enough to read the users again.
const CONFLICTS: [(Code, &str); 5] = [
    (Code::NotFound, reason::USER_NOT_FOUND),
    (Code::FailedPrecondition, reason::USER_DELETED),
    (Code::AlreadyExists, reason::USER_ID_TAKEN),
    (Code::AlreadyExists, reason::USERNAME_TAKEN),
    (Code::Aborted, reason::REVISION_MISMATCH),
];

fn hardest(violations: &[Violation]) -> (Code, &'static str) {
    let is_there = |kind: &&(Code, &str)| violations.iter().any(|v| v.reason == kind.1);
    CONFLICTS.iter().find(is_there).copied().unwrap_or((Code::Internal, "INTERNAL"))
}

/// Violations that a message names; it is for people.
const MESSAGE_VIOLATIONS: usize = 5;

fn message(violations: &[Violation]) -> String {
    let named = violations.iter().take(MESSAGE_VIOLATIONS);
    let mut list: Vec<_> = named.map(|v| format!("{}: {}", v.path(), v.description)).collect();
    let more = violations.len() - list.len();
    if more > 0 {
        list.push(format!("and {more} more"));
    }
    list.join("; ")
}

/// Octets that violations and indexes may take. They travel in the answer's
/// headers, of which many clients accept no more than 8 KiB, encoded in base64 and
/// with the message twice: a client that gets more sees no refusal, only a broken
/// stream.
const REFUSAL_MAX_OCTETS: usize = 4800;

/// As many violations as there is room for.
fn field_violations(violations: &[Violation], mut room: usize) -> Vec<FieldViolation> {
    let mut fitting = Vec::new();
    for v in violations {
        let out = violation(&v.path(), v.reason, &v.description);
        // Tags and lengths of the message and its three fields.
        let octets = out.field.len() + out.reason.len() + out.description.len() + 8;
        let Some(left) = room.checked_sub(octets) else { break };
        room = left;
        fitting.push(out);
    }
    fitting
}

/// The indexes of all elements that were refused, under the name of their list:
/// `3,17,20-25`.
fn refused_elements(violations: &[Violation]) -> Option<(String, String)> {
    let elements = || violations.iter().filter_map(|v| v.element);
    let list = elements().next()?.list.to_owned();
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for index in elements().map(|element| element.index).collect::<BTreeSet<_>>() {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == index => *last = index,
            _ => ranges.push((index, index)),
        }
    }
    let ranges = ranges.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    Some((list, ranges.collect::<Vec<_>>().join(",")))
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let (code, reason, message) = error.parts();
        let metadata: HashMap<String, String> = match &error {
            Error::RevisionMismatch { current } => [("current_revision".into(), current.to_string())].into(),
            Error::Invalid(violations) | Error::Conflicts(violations) => {
                refused_elements(violations).into_iter().collect()
            }
            _ => HashMap::new(),
        };
        let room = REFUSAL_MAX_OCTETS.saturating_sub(metadata.values().map(String::len).sum());
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
        if let Some(delay) = error.retry_delay() {
            details.set_retry_info(Some(delay));
        }
        match error {
            Error::Invalid(violations) | Error::Conflicts(violations) => {
                details.set_bad_request(field_violations(&violations, room));
            }
            Error::UsernameTaken { field } => {
                details.set_bad_request([violation(field, reason, "another user has this username")]);
            }
            Error::UserIdTaken => {
                details.set_bad_request([violation(
                    "user.id",
                    reason,
                    "there is a user with this id already",
                )]);
            }
            Error::ResumeTokenExpired | Error::ResumeTokenForeign => {
                details.set_bad_request([violation(
                    "resume_token",
                    reason,
                    "begin anew with send_initial_state",
                )]);
            }
            Error::UserNotFound { name } => {
                details.set_resource_info("users.v1.User", name, "", "there is no such user");
            }
            _ => {}
        }
        Self::with_error_details(code, message, details)
    }
}

fn violation(field: &str, reason: &str, description: &str) -> FieldViolation {
    let mut out = FieldViolation::new(field, description);
    reason.clone_into(&mut out.reason);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(indexes: impl Iterator<Item = usize>) -> Vec<Violation> {
        let violation = |index| Violation {
            element: Some(Element { list: "items", index }),
            field: "user.display_name".into(),
            reason: reason::REVISION_MISMATCH,
            description: "may have letters, digits, `.`, `_` and `-` only, or so".into(),
        };
        indexes.map(violation).collect()
    }

    #[test]
    fn every_refused_element_is_named() {
        let named = |indexes: &[usize]| refused_elements(&items(indexes.iter().copied())).unwrap().1;
        assert_eq!(named(&[0]), "0");
        assert_eq!(named(&[9, 3, 4, 5, 3, 7]), "3-5,7,9");
        assert_eq!(refused_elements(&items(0..1000)), Some(("items".into(), "0-999".into())));
        let elsewhere = items(0..1).into_iter().map(|violation| Violation { element: None, ..violation });
        assert_eq!(refused_elements(&elsewhere.collect::<Vec<_>>()), None);
    }

    #[test]
    fn no_refusal_is_larger_than_what_clients_accept() {
        // All items, every second one, and as many as are often refused.
        for indexes in [(0..1000).step_by(1), (1..1000).step_by(2), (900..937).step_by(1)] {
            let violations = items(indexes);
            let status = Status::from(Error::Conflicts(violations.clone()));
            let headers = status.clone().into_http::<()>().into_parts().0.headers;
            let octets: usize =
                headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
            // What HTTP adds: the status and the date.
            assert!(octets < 8192 - 150, "{octets}");
            let details = status.get_error_details();
            let named = details.bad_request().unwrap().field_violations.len();
            assert!(named == violations.len() || named > 20, "{named}");
        }
    }
}

//! What can go wrong with a request, and the only place that picks a gRPC code for it.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    time::Duration,
};

use tokio_postgres::error::SqlState;
use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::pb::ErrorReason as Reason;

/// The domain of every `google.rpc.ErrorInfo`: unique beyond this service (AIP-193).
pub const DOMAIN: &str = "user-service.users.v1";

/// The trailer that stock gRPC clients obey when they retry, in milliseconds.
const RETRY_PUSHBACK: &str = "grpc-retry-pushback-ms";

/// An element of a list in a request, such as `items[17]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Element {
    /// The name of the list.
    pub list: &'static str,
    /// The position in the list, from 0 on.
    pub index: usize,
}

/// A rejected field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The element that the field is in, if it is in a list.
    pub element: Option<Element>,
    /// The path of the field in the element or in the request, as in the proto.
    pub field: String,
    /// Why, for a program.
    pub reason: Reason,
    /// Why, for a person. Never repeats the value.
    pub description: String,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// All rejected fields; never empty.
    Invalid(Vec<Violation>),
    /// All items of a batch that conflict with stored users or with one another; never
    /// empty.
    Conflicts(Vec<Violation>),
    /// Another user has or holds the username.
    UsernameTaken {
        /// The path of the field that asks for it.
        field: &'static str,
    },
    /// Another user has the id.
    UserIdTaken,
    /// No user has this id, username or e-mail address.
    UserNotFound {
        /// The id or name, as the caller wrote it.
        name: String,
    },
    /// The user is soft-deleted.
    UserDeleted,
    /// The user is not soft-deleted.
    UserNotDeleted,
    /// The deleted user's username was released, and the request has no new one.
    UsernameReleased,
    /// Several users have the e-mail address.
    EmailAmbiguous,
    /// The user has another revision than the caller expects.
    RevisionMismatch {
        /// The revision that it has.
        current: i64,
    },
    /// A concurrent transaction was in the way; nothing was changed.
    TransactionConflict,
    /// The statement waited too long for a lock; nothing was changed.
    LockTimeout,
    /// Too many requests are queued.
    Overloaded,
    /// The limit of concurrent streams of a kind is reached.
    TooManyStreams {
        /// The kind, such as "exports".
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The bytes of requests and responses in memory reach a limit.
    TooManyBytes,
    /// The request was handled, but the bytes of its response reach a limit.
    ResponseDropped,
    /// The change log no longer holds all changes after the token.
    ResumeTokenExpired,
    /// The token belongs to a copy of the database, or to a history that this one does not share.
    ResumeTokenForeign,
    /// The database cannot be reached, or accepts no writes.
    DatabaseUnavailable,
    /// The connection broke during a change.
    OutcomeUnknown,
    /// The server is shutting down and ends its streams.
    ShuttingDown,
    /// The connection has reached its maximum age, and its streams end.
    ConnectionTooOld,
    /// The caller's deadline, or the server's limit, passed.
    DeadlineExceeded,
    /// A defect; the log has the cause.
    Internal,
}

/// What a statement does with the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It reads.
    Read,
    /// It changes users, and is committed.
    Write,
    /// It changes users, and is rolled back.
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
    /// One rejected field.
    pub fn invalid(field: &str, reason: Reason, description: impl Into<String>) -> Self {
        let (field, description) = (field.to_owned(), description.into());
        Self::Invalid(vec![Violation { element: None, field, reason, description }])
    }

    /// The same failure as a violation of one item of a batch. `prefix` is the path from the
    /// item to the user's fields: `user.`, or empty.
    pub fn into_item_violation(self, index: usize, prefix: &str) -> Violation {
        let reason = self.reason();
        let (field, description) = match &self {
            Self::UsernameTaken { .. } => ("username", "another user or item has this username".into()),
            Self::UserIdTaken => ("id", "another user or item has this id".into()),
            Self::RevisionMismatch { .. } => ("revision", self.message()),
            _ => ("id", self.message()),
        };
        let element = Some(Element { list: "items", index });
        Violation { element, field: format!("{prefix}{field}"), reason, description }
    }

    /// What a failed statement means to the caller. Constraints are known by their names,
    /// everything else by its SQLSTATE. No text of the driver or of PostgreSQL goes further
    /// than this, since both repeat values.
    pub fn from_postgres(error: &tokio_postgres::Error, access: Access) -> Self {
        let lost = match access {
            Access::Read | Access::DryRun => Self::DatabaseUnavailable,
            // The server may have committed before the connection broke.
            Access::Write => Self::OutcomeUnknown,
        };
        let Some(rejection) = error.as_db_error() else {
            let is_io = std::error::Error::source(error).is_some_and(|source| source.is::<io::Error>());
            // The driver rejects parameters that do not fit the statement.
            return if is_io || error.is_closed() { lost } else { Self::Internal };
        };
        match (rejection.code(), rejection.constraint()) {
            (&SqlState::UNIQUE_VIOLATION, Some("users_username_key")) => {
                Self::UsernameTaken { field: "user.username" }
            }
            (&SqlState::UNIQUE_VIOLATION, Some("users_pkey")) => Self::UserIdTaken,
            // The same request was recorded after this statement had looked for it.
            (&SqlState::UNIQUE_VIOLATION, Some("requests_pkey")) => Self::TransactionConflict,
            (&SqlState::T_R_SERIALIZATION_FAILURE | &SqlState::T_R_DEADLOCK_DETECTED, _) => {
                Self::TransactionConflict
            }
            (&SqlState::LOCK_NOT_AVAILABLE, _) => Self::LockTimeout,
            // statement_timeout: as long as the longest request may take.
            (&SqlState::QUERY_CANCELED, _) => Self::DeadlineExceeded,
            // A primary that became a standby rejects a write before it starts.
            (&SqlState::READ_ONLY_SQL_TRANSACTION, _) => Self::DatabaseUnavailable,
            (state, _) if is_connection_lost(state) => lost,
            // Insufficient resources: too many connections, disk full, no memory.
            (state, _) if state.code().starts_with("53") => Self::DatabaseUnavailable,
            _ => Self::Internal,
        }
    }

    /// A message that is rejected before it is decoded.
    pub fn too_many_elements() -> Self {
        Self::invalid("request", Reason::BatchTooLarge, "has too many elements: lists may have at most 1000")
    }

    /// Why a message of a stream could not be read.
    pub fn of_message(status: &Status) -> Self {
        let what = match status.code() {
            Code::OutOfRange => "is too large: at most 4 MiB",
            Code::Unavailable => {
                // The server has ended the request itself.
                let causes = [Self::TooManyBytes, Self::ConnectionTooOld];
                let cause = causes.into_iter().find(|cause| cause.message() == status.message());
                return cause.unwrap_or(Self::ShuttingDown);
            }
            Code::InvalidArgument => return Self::too_many_elements(),
            _ => "is not a message of this rpc",
        };
        Self::invalid("request", Reason::FieldInvalid, what)
    }

    /// The reason of each failure.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Invalid(violations) => violations.first().map_or(Reason::FieldInvalid, |v| v.reason),
            Self::Conflicts(violations) => first_conflict(violations),
            Self::UsernameTaken { .. } => Reason::UsernameTaken,
            Self::UserIdTaken => Reason::UserIdTaken,
            Self::UserNotFound { .. } => Reason::UserNotFound,
            Self::UserDeleted => Reason::UserDeleted,
            Self::UserNotDeleted => Reason::UserNotDeleted,
            Self::UsernameReleased => Reason::UsernameReleased,
            Self::EmailAmbiguous => Reason::EmailAmbiguous,
            Self::RevisionMismatch { .. } => Reason::RevisionMismatch,
            Self::TransactionConflict | Self::LockTimeout => Reason::TransactionConflict,
            Self::Overloaded | Self::TooManyStreams { .. } | Self::TooManyBytes => Reason::Overloaded,
            Self::ResumeTokenExpired => Reason::ResumeTokenExpired,
            Self::ResumeTokenForeign => Reason::ResumeTokenForeign,
            Self::DatabaseUnavailable => Reason::DatabaseUnavailable,
            Self::OutcomeUnknown | Self::ResponseDropped => Reason::OutcomeUnknown,
            Self::ShuttingDown | Self::ConnectionTooOld => Reason::ShuttingDown,
            Self::DeadlineExceeded => Reason::DeadlineExceeded,
            Self::Internal => Reason::Internal,
        }
    }

    /// The message of each failure, for a person.
    fn message(&self) -> String {
        let text = match self {
            Self::Invalid(violations) | Self::Conflicts(violations) => return message(violations),
            Self::UsernameTaken { field } => return format!("{field}: another user has this username"),
            Self::RevisionMismatch { current } => {
                return format!("the user has changed: its revision is {current}");
            }
            Self::TooManyStreams { what, limit } => {
                return format!("the limit of {limit} {what} is reached; nothing was started");
            }
            Self::UserIdTaken => "user.id: another user has this id",
            Self::UserNotFound { .. } => "there is no such user",
            Self::UserDeleted => "the user is deleted",
            Self::UserNotDeleted => "the user is not deleted",
            Self::UsernameReleased => "the user's username was released: give it one in `username`",
            Self::EmailAmbiguous => "several users have this e-mail address: use LookupUsers or ListUsers",
            Self::TransactionConflict | Self::LockTimeout => {
                "a concurrent transaction was in the way; nothing was changed"
            }
            Self::Overloaded => "too many requests are queued; nothing was started",
            Self::TooManyBytes => {
                "requests and unread responses take too much memory: send fewer at once, read faster"
            }
            Self::ResponseDropped => {
                "the request was handled, but unread responses take too much memory: retry with the same \
                 request_id"
            }
            Self::ResumeTokenExpired => {
                "resume_token: changes after it are no longer in the change log: start again with \
                 send_initial_state"
            }
            Self::ResumeTokenForeign => {
                "resume_token: it belongs to another database, or to one that was restored since: start \
                 again with send_initial_state"
            }
            Self::DatabaseUnavailable => "the database cannot be reached; nothing was changed",
            Self::OutcomeUnknown => "the connection to the database broke: retry with the same request_id",
            Self::ShuttingDown => "the server is shutting down; reconnect to another replica",
            Self::ConnectionTooOld => "the connection has reached its maximum age; reconnect",
            Self::DeadlineExceeded => "the deadline has passed",
            Self::Internal => "internal error",
        };
        text.to_owned()
    }

    /// How long a caller should wait before it retries, if it should.
    fn retry_delay(&self) -> Option<Duration> {
        match self {
            Self::TransactionConflict | Self::LockTimeout => Some(Duration::from_millis(50)),
            Self::Overloaded => Some(Duration::from_millis(500)),
            Self::TooManyStreams { .. }
            | Self::TooManyBytes
            | Self::ResponseDropped
            | Self::DatabaseUnavailable
            | Self::OutcomeUnknown => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// The fields to name in a `google.rpc.BadRequest`, as far as they fit into `room` bytes.
    fn field_violations(&self, room: usize) -> Vec<FieldViolation> {
        let one = |field: &str, description: &str| vec![violation(field, self.reason(), description)];
        match self {
            Self::Invalid(violations) | Self::Conflicts(violations) => fitting(violations, room),
            Self::UsernameTaken { field } => one(field, "another user has this username"),
            Self::UserIdTaken => one("user.id", "another user has this id"),
            Self::ResumeTokenExpired | Self::ResumeTokenForeign => {
                one("resume_token", "start again with send_initial_state")
            }
            _ => Vec::new(),
        }
    }
}

/// The gRPC code of each reason. `UNAVAILABLE` and `ABORTED` are what stock clients retry,
/// so only failures that an unchanged request can survive have them.
fn code_of(reason: Reason) -> Code {
    match reason {
        Reason::FieldRequired
        | Reason::FieldInvalid
        | Reason::UsernameInvalid
        | Reason::EmailInvalid
        | Reason::UpdateMaskInvalid
        | Reason::PageTokenInvalid
        | Reason::FilterUnsupported
        | Reason::BatchTooLarge
        | Reason::RequestIdReused
        | Reason::ResumeTokenInvalid => Code::InvalidArgument,
        Reason::ResumeTokenExpired => Code::OutOfRange,
        Reason::ResumeTokenForeign
        | Reason::UserDeleted
        | Reason::UserNotDeleted
        | Reason::UsernameReleased
        | Reason::EmailAmbiguous
        | Reason::RevisionMismatch => Code::FailedPrecondition,
        Reason::UserNotFound => Code::NotFound,
        Reason::UserIdTaken | Reason::UsernameTaken => Code::AlreadyExists,
        Reason::TransactionConflict => Code::Aborted,
        Reason::Overloaded | Reason::DatabaseUnavailable | Reason::OutcomeUnknown | Reason::ShuttingDown => {
            Code::Unavailable
        }
        Reason::DeadlineExceeded => Code::DeadlineExceeded,
        Reason::Internal | Reason::Unspecified => Code::Internal,
    }
}

/// Whether PostgreSQL's answer ends this connection: classes 08 (connection exception) and
/// 57P (operator intervention). `query_canceled`, 57014, leaves it usable.
pub fn is_connection_lost(state: &SqlState) -> bool {
    state.code().starts_with("08") || state.code().starts_with("57P")
}

/// The reasons of conflicts, in the order in which one becomes that of the whole batch: the
/// hardest to cure first. So `REVISION_MISMATCH` means that reading the users again is enough.
const CONFLICTS: [Reason; 5] = [
    Reason::UserNotFound,
    Reason::UserDeleted,
    Reason::UserIdTaken,
    Reason::UsernameTaken,
    Reason::RevisionMismatch,
];

fn first_conflict(violations: &[Violation]) -> Reason {
    let is_there = |reason: &&Reason| violations.iter().any(|v| v.reason == **reason);
    CONFLICTS.iter().find(is_there).copied().unwrap_or(Reason::Internal)
}

/// How many violations a message names; it is for people.
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

/// How many bytes violations and indexes may take. They travel in the response's headers, of
/// which many clients accept no more than 8 KiB, encoded in base64 and with the message
/// twice: a client that gets more sees no error, only a broken stream.
const DETAILS_MAX_BYTES: usize = 4800;

/// As many violations as fit into `room` bytes.
fn fitting(violations: &[Violation], mut room: usize) -> Vec<FieldViolation> {
    let mut fitting = Vec::new();
    for v in violations {
        let out = violation(&v.path(), v.reason, &v.description);
        // Tags and lengths of the message and its three fields.
        let bytes = out.field.len() + out.reason.len() + out.description.len() + 8;
        let Some(left) = room.checked_sub(bytes) else { break };
        room = left;
        fitting.push(out);
    }
    fitting
}

/// The indexes of all rejected elements, under the name of their list: `3,17,20-25`.
fn rejected_elements(violations: &[Violation]) -> Option<(String, String)> {
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
        let reason = error.reason();
        let metadata: HashMap<String, String> = match &error {
            Error::RevisionMismatch { current } => [("current_revision".into(), current.to_string())].into(),
            Error::Invalid(violations) | Error::Conflicts(violations) => {
                rejected_elements(violations).into_iter().collect()
            }
            _ => HashMap::new(),
        };
        let room = DETAILS_MAX_BYTES.saturating_sub(metadata.values().map(String::len).sum());
        let mut details = ErrorDetails::with_error_info(reason.as_str_name(), DOMAIN, metadata);
        let violations = error.field_violations(room);
        if !violations.is_empty() {
            details.set_bad_request(violations);
        }
        let mut trailers = MetadataMap::new();
        if let Some(delay) = error.retry_delay() {
            details.set_retry_info(Some(delay));
            trailers.insert(RETRY_PUSHBACK, u64::try_from(delay.as_millis()).unwrap_or(u64::MAX).into());
        }
        let message = error.message();
        if let Error::UserNotFound { name } = error {
            details.set_resource_info("users.v1.User", name, "", &message);
        }
        Self::with_error_details_and_metadata(code_of(reason), message, details, trailers)
    }
}

fn violation(field: &str, reason: Reason, description: &str) -> FieldViolation {
    let mut out = FieldViolation::new(field, description);
    reason.as_str_name().clone_into(&mut out.reason);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(indexes: impl Iterator<Item = usize>) -> Vec<Violation> {
        let violation = |index| Violation {
            element: Some(Element { list: "items", index }),
            field: "user.display_name".into(),
            reason: Reason::RevisionMismatch,
            description: "may have letters, digits, `.`, `_` and `-` only, or so".into(),
        };
        indexes.map(violation).collect()
    }

    #[test]
    fn every_rejected_element_is_named() {
        let named = |indexes: &[usize]| rejected_elements(&items(indexes.iter().copied())).unwrap().1;
        assert_eq!(named(&[0]), "0");
        assert_eq!(named(&[9, 3, 4, 5, 3, 7]), "3-5,7,9");
        assert_eq!(rejected_elements(&items(0..1000)), Some(("items".into(), "0-999".into())));
        let elsewhere = items(0..1).into_iter().map(|violation| Violation { element: None, ..violation });
        assert_eq!(rejected_elements(&elsewhere.collect::<Vec<_>>()), None);
    }

    #[test]
    fn no_error_is_larger_than_what_clients_accept() {
        // All items, every second item, and a typical number.
        for indexes in [(0..1000).step_by(1), (1..1000).step_by(2), (900..937).step_by(1)] {
            let violations = items(indexes);
            let status = Status::from(Error::Conflicts(violations.clone()));
            let headers = status.clone().into_http::<()>().into_parts().0.headers;
            let bytes: usize =
                headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
            // What HTTP adds: the status and the date.
            assert!(bytes < 8192 - 150, "{bytes}");
            let details = status.get_error_details();
            let named = details.bad_request().unwrap().field_violations.len();
            assert!(named == violations.len() || named > 20, "{named}");
        }
    }
}

//! What can go wrong with a call, and the one place that picks a code for it.

use std::{collections::HashMap, time::Duration};

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
    pub const REQUEST_ID_REUSED: &str = "REQUEST_ID_REUSED";
}

/// A field that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The path of the field in the request, as in the proto.
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
    Rehearse,
}

impl Access {
    /// A change, for real or only to see what would happen.
    pub fn write(validate_only: bool) -> Self {
        if validate_only { Self::Rehearse } else { Self::Write }
    }
}

impl Error {
    /// One refused field.
    pub fn invalid(field: &str, reason: &'static str, description: impl Into<String>) -> Self {
        let (field, description) = (field.to_owned(), description.into());
        Self::Invalid(vec![Violation { field, reason, description }])
    }

    /// What a failed statement means to the caller. Constraints are known by
    /// their names, everything else by its SQLSTATE; no text of the driver or of
    /// PostgreSQL goes further than this, since both repeat values.
    pub fn from_postgres(error: &tokio_postgres::Error, access: Access) -> Self {
        let lost = match access {
            Access::Read | Access::Rehearse => Self::DatabaseUnavailable,
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

    /// Code, reason and message of each failure.
    fn parts(&self) -> (Code, &'static str, String) {
        match self {
            Self::Invalid(violations) => {
                let reason = violations.first().map_or(reason::FIELD_INVALID, |v| v.reason);
                let list: Vec<_> =
                    violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect();
                (Code::InvalidArgument, reason, list.join("; "))
            }
            Self::UsernameTaken { field } => (
                Code::AlreadyExists,
                reason::USERNAME_TAKEN,
                format!("{field}: another user has this username"),
            ),
            Self::UserIdTaken => {
                (Code::AlreadyExists, "USER_ID_TAKEN", "user.id: there is a user with this id already".into())
            }
            Self::UserNotFound { .. } => (Code::NotFound, "USER_NOT_FOUND", "there is no such user".into()),
            Self::UserDeleted => (Code::FailedPrecondition, "USER_DELETED", "the user is deleted".into()),
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
                "REVISION_MISMATCH",
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
                (Code::Unavailable, "STOPPING", "this server stops: go on with another one".into())
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
            Self::DatabaseUnavailable | Self::OutcomeUnknown => Some(Duration::from_secs(1)),
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

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let (code, reason, message) = error.parts();
        let mut metadata = HashMap::new();
        if let Error::RevisionMismatch { current } = &error {
            metadata.insert("current_revision".to_owned(), current.to_string());
        }
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
        if let Some(delay) = error.retry_delay() {
            details.set_retry_info(Some(delay));
        }
        match error {
            Error::Invalid(violations) => {
                let list = violations.iter().map(|v| violation(&v.field, v.reason, &v.description));
                details.set_bad_request(list.collect::<Vec<_>>());
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

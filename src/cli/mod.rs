//! The command line: its parsing, and the commands that connect to a running service.
//!
//! `serve` and `migrate` run in [`crate::app`].

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use clap::{Args, builder::NonEmptyStringValueParser};
use indicatif::{ProgressBar, ProgressStyle};
use prost_types::Timestamp;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

use crate::pb::{self, user_service_client::UserServiceClient};

pub mod args;
pub mod check;
pub mod export;
pub mod files;
pub mod import;
pub mod service_addr;
pub mod watch;

/// Limit of a connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit until a response begins. It is longer than the default of `REQUEST_TIMEOUT_MS`, so
/// that the server reports its own timeout first.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval of HTTP/2 PINGs, which find a connection whose peer is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Selects the users of a command. Conditions are combined with AND.
#[derive(Debug, Args)]
pub struct Filter {
    /// Only users whose username starts with this prefix.
    #[arg(long, value_name = "PREFIX", value_parser = NonEmptyStringValueParser::new())]
    pub username_prefix: Option<String>,

    /// Only users with this e-mail address.
    #[arg(long, value_name = "ADDRESS", value_parser = NonEmptyStringValueParser::new())]
    pub email: Option<String>,

    /// Only users created after this time, in RFC 3339, such as 2026-01-31T12:00:00Z.
    #[arg(long, value_name = "TIME")]
    pub create_time_after: Option<Timestamp>,

    /// Only users created before this time, in RFC 3339.
    #[arg(long, value_name = "TIME")]
    pub create_time_before: Option<Timestamp>,
}

impl Filter {
    /// The filter of a request; `None` if there is no condition.
    fn to_pb(&self, include_deleted: Option<bool>) -> Option<pb::UserFilter> {
        let filter = pb::UserFilter {
            username_prefix: self.username_prefix.clone().unwrap_or_default(),
            email: self.email.clone().unwrap_or_default(),
            create_time_after: self.create_time_after,
            create_time_before: self.create_time_before,
            include_deleted: include_deleted.unwrap_or_default(),
        };
        (include_deleted.is_some() || filter != pb::UserFilter::default()).then_some(filter)
    }
}

/// Connects to the service at `addr`, a host and a port. If the connection breaks, the next
/// request reconnects.
async fn connect(addr: &str) -> anyhow::Result<UserServiceClient<Channel>> {
    let endpoint = Endpoint::try_from(format!("http://{addr}"))
        .context("the address must be HOST:PORT")?
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(RESPONSE_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL);
    let channel = endpoint.connect().await.with_context(|| format!("cannot reach the service at {addr}"))?;
    Ok(UserServiceClient::new(channel))
}

/// The reason and the message of a failed request, on one line.
fn explain(status: &Status) -> String {
    match status.get_error_details().error_info() {
        Some(info) => format!("{}: {}", info.reason, status.message()),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// Whether a new attempt can succeed: the service says so by its code, or the connection broke
/// before the service could respond, which leaves no `ErrorInfo`.
fn is_retryable(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::Aborted | Code::ResourceExhausted | Code::DeadlineExceeded => true,
        Code::Unknown | Code::Internal | Code::Cancelled => status.get_error_details().error_info().is_none(),
        _ => false,
    }
}

/// Whether a path means standard input or output.
fn is_standard(path: &Path) -> bool {
    path == Path::new("-")
}

/// The path with `suffix` appended to its file name.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// A progress bar, which is visible on a terminal only.
fn progress_bar(total: Option<u64>, template: &str) -> ProgressBar {
    let bar = ProgressBar::no_length();
    if let Some(total) = total {
        bar.set_length(total);
    }
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// Prints a line to standard error. A closed standard error is not a failure.
fn print_status(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn status_is_retryable_if_a_new_attempt_can_succeed() {
        for (code, reason, expected) in [
            (Code::Unavailable, Some("OVERLOADED"), true),
            (Code::Unavailable, Some("DATABASE_UNAVAILABLE"), true),
            (Code::Unavailable, None, true),
            (Code::Aborted, Some("TRANSACTION_CONFLICT"), true),
            (Code::FailedPrecondition, Some("REVISION_MISMATCH"), false),
            (Code::FailedPrecondition, Some("RESUME_TOKEN_FOREIGN"), false),
            (Code::OutOfRange, Some("RESUME_TOKEN_EXPIRED"), false),
            (Code::InvalidArgument, Some("RESUME_TOKEN_INVALID"), false),
            (Code::Internal, None, true),
            (Code::Internal, Some("INTERNAL"), false),
        ] {
            let status = match reason {
                Some(reason) => {
                    let details =
                        ErrorDetails::with_error_info(reason, "user-service.users.v1", HashMap::new());
                    Status::with_error_details(code, "", details)
                }
                None => Status::new(code, ""),
            };
            assert_eq!(is_retryable(&status), expected, "{code:?} {reason:?}");
        }
    }
}

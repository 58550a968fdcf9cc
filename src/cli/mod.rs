//! What an operator can do with a running service, from the command line.

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
    Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

use crate::pb::{self, user_service_client::UserServiceClient};

pub mod export;
pub mod files;
pub mod import;
pub mod watch;

/// How long it may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the answer to a call may take to begin: more than `REQUEST_TIMEOUT_MS` by default.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// A silent service is asked whether it is still there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Which users a command is about.
#[derive(Debug, Args)]
pub struct Filter {
    /// Only users whose username starts so.
    #[arg(long, value_name = "PREFIX", value_parser = NonEmptyStringValueParser::new())]
    pub username_prefix: Option<String>,

    /// Only users with this e-mail address.
    #[arg(long, value_name = "ADDRESS", value_parser = NonEmptyStringValueParser::new())]
    pub email: Option<String>,

    /// Only users that were created later, such as 2026-01-31T12:00:00Z.
    #[arg(long, value_name = "TIME")]
    pub create_time_after: Option<Timestamp>,

    /// Only users that were created earlier.
    #[arg(long, value_name = "TIME")]
    pub create_time_before: Option<Timestamp>,
}

impl Filter {
    /// The filter of a request; `None` if nothing was said.
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

/// A client of the service at `addr`, a host and a port. A connection that breaks
/// later is made anew by the next call.
async fn connect(addr: &str) -> anyhow::Result<UserServiceClient<Channel>> {
    let endpoint = Endpoint::try_from(format!("http://{addr}"))
        .context("the address must be HOST:PORT")?
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(ANSWER_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL);
    let channel = endpoint.connect().await.with_context(|| format!("cannot reach the service at {addr}"))?;
    Ok(UserServiceClient::new(channel))
}

/// The reason and the message of a failed call, in a line.
fn explain(status: &Status) -> String {
    match status.get_error_details().error_info() {
        Some(info) => format!("{}: {}", info.reason, status.message()),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// Whether a path stands for standard input or output.
fn is_standard(path: &Path) -> bool {
    path == Path::new("-")
}

/// A path with something behind it.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// A progress bar, which shows itself on a terminal only.
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

/// Says something to the operator. If nobody can hear it, that is no failure.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

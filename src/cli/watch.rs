//! `user-service watch`: prints every change as a line of JSON, until interrupted.
//!
//! A line is a `users.v1.UserChange` in the JSON mapping of protobuf, as grpcurl prints it. The
//! resume token is saved after the lines are printed: after a crash some lines can be printed
//! again, but none is missing.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    process,
    time::Duration,
};

use anyhow::{Context, anyhow};
use serde_json::{Map, Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time,
};
use tonic::{Code, Status};

use super::{Filter, connect, explain, is_retryable, service_addr::ServiceAddr, with_suffix};
use crate::config::Config;
use crate::pb::{self, user_change::State};
use crate::telemetry::describe;

/// A stream without a message for this long is broken: an idle service sends one every 5 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Delay between two attempts. It doubles until an attempt makes progress.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(10);

/// The arguments of `user-service watch`.
#[derive(Debug, clap::Args)]
pub struct Watch {
    /// The service to watch.
    #[command(flatten)]
    pub service: ServiceAddr,

    /// The file that keeps the resume token. If it exists, the watch resumes after that token.
    #[arg(long, value_name = "FILE")]
    pub resume_file: Option<PathBuf>,

    /// Print the existing users first. Ignored when the watch resumes.
    #[arg(long)]
    pub send_initial_state: bool,

    /// Which users.
    #[command(flatten)]
    pub filter: Filter,

    /// Whether to include soft-deleted users [default: true without other conditions, else
    /// false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub include_deleted: Option<bool>,

    /// The settings of the log; the others have their defaults.
    #[command(flatten)]
    pub config: Box<Config>,
}

/// Prints changes until SIGINT or SIGTERM, or until standard output is closed.
pub async fn run(watch: Watch) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // A separate task that exits at once: a slow reader of standard output can block the other
    // one forever.
    let mut signals = JoinSet::new();
    signals.spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        process::exit(0);
    });
    match print_changes(&watch).await {
        Err(error) if is_broken_pipe(&error) => Ok(()),
        result => result,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Prints changes. A broken stream is replaced by a new one, without a limit.
async fn print_changes(watch: &Watch) -> anyhow::Result<()> {
    let mut token = match &watch.resume_file {
        Some(file) => read_token(file)?,
        None => String::new(),
    };
    let mut delay = RETRY_DELAY_MIN;
    loop {
        let before = token.clone();
        let error = match print_stream(watch, &mut token).await {
            Ok(()) => Status::unavailable("the stream ended").into(),
            Err(error) => error,
        };
        if !can_continue(&error) {
            return match error.downcast_ref::<Status>() {
                Some(status) => Err(anyhow!("{}", explain(status))),
                None => Err(error),
            };
        }
        tracing::warn!(
            error = describe(error.as_ref()),
            delay_ms = delay.as_millis() as u64,
            "interrupted, retrying"
        );
        if token != before {
            delay = RETRY_DELAY_MIN;
        }
        time::sleep(delay).await;
        delay = (delay * 2).min(RETRY_DELAY_MAX);
    }
}

/// Whether a new stream can succeed: the output works, and the request was not rejected. A
/// watch is meant to outlive faults of the service, so it retries internal errors as well.
fn can_continue(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<Status>() {
        Some(status) => is_retryable(status) || status.code() == Code::Internal,
        None => !error.is::<io::Error>(),
    }
}

/// Prints the changes of one stream, until it ends.
async fn print_stream(watch: &Watch, token: &mut String) -> anyhow::Result<()> {
    let mut client = connect(&watch.service.addr).await?;
    let request = pb::WatchUsersRequest {
        resume_token: token.clone(),
        send_initial_state: watch.send_initial_state && token.is_empty(),
        filter: watch.filter.to_pb(watch.include_deleted),
    };
    let mut messages = client.watch_users(request).await?.into_inner();
    while let Some(message) = time::timeout(IDLE_TIMEOUT, messages.message()).await?? {
        let mut lines = String::new();
        for change in &message.changes {
            lines += &format!("{}\n", change_to_json(change));
        }
        if message.initial_state_end {
            lines += &format!("{}\n", json!({"initialStateEnd": true}));
        }
        let mut stdout = io::stdout().lock();
        stdout.write_all(lines.as_bytes())?;
        stdout.flush()?;
        *token = message.resume_token;
        if let Some(file) = &watch.resume_file {
            write_token(file, token).with_context(|| format!("cannot write {}", file.display()))?;
        }
    }
    Ok(())
}

/// The resume token in the file; empty if there is no file.
fn read_token(file: &Path) -> anyhow::Result<String> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
    }
}

/// Replaces the token atomically: after a crash the file has the old token or the new one.
fn write_token(file: &Path, token: &str) -> io::Result<()> {
    let path = with_suffix(file, ".new");
    let mut new = fs::File::create(&path)?;
    writeln!(new, "{token}")?;
    new.sync_all()?;
    fs::rename(path, file)
}

/// A change in the JSON mapping of protobuf: unset fields are omitted, 64-bit integers are
/// strings.
fn change_to_json(change: &pb::UserChange) -> Value {
    let mut json = Map::new();
    json.insert("kind".into(), change.kind().as_str_name().into());
    json.insert("id".into(), change.id.as_str().into());
    json.insert("revision".into(), change.revision.to_string().into());
    let (name, state) = match &change.state {
        Some(State::User(user)) => ("user", user_to_json(user)),
        Some(State::Removed(_)) => ("removed", json!({})),
        Some(State::Superseded(_)) => ("superseded", json!({})),
        None => return json.into(),
    };
    json.insert(name.into(), state);
    json.into()
}

fn user_to_json(user: &pb::User) -> Value {
    let mut json = Map::new();
    for (name, text) in [
        ("id", &user.id),
        ("username", &user.username),
        ("email", &user.email),
        ("displayName", &user.display_name),
    ] {
        if !text.is_empty() {
            json.insert(name.into(), text.as_str().into());
        }
    }
    for (name, time) in [
        ("createTime", user.create_time),
        ("updateTime", user.update_time),
        ("deleteTime", user.delete_time),
        ("purgeTime", user.purge_time),
    ] {
        if let Some(time) = time {
            json.insert(name.into(), time.to_string().into());
        }
    }
    json.insert("revision".into(), user.revision.to_string().into());
    json.into()
}

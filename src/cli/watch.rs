//! `user-service watch`: every change as a line of JSON, for ever.
//!
//! A line is a `users.v1.UserChange` in the JSON form of protobuf, as grpcurl prints it.
//! The token is written behind the lines: after a crash some may be printed again, but
//! none is left out.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    process,
    time::Duration,
};

use anyhow::Context;
use serde_json::{Map, Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time,
};
use tonic::{Code, Status};

use crate::cli;
use crate::pb::{self, user_change::State};

/// The service sends a bookmark every 5 seconds; without any, it is gone.
const SILENCE: Duration = Duration::from_secs(30);
/// Between two attempts to connect.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(10);

/// What to watch.
#[derive(Debug, clap::Args)]
pub struct Watch {
    /// Where the service listens [default: LISTEN_ADDR, on this machine]
    #[arg(long, value_name = "HOST:PORT")]
    pub addr: Option<String>,
    /// Go on behind the token in this file, if there is one, and keep the token there.
    #[arg(long)]
    pub resume_file: Option<PathBuf>,
    /// Without a token: print the users first.
    #[arg(long)]
    pub send_initial_state: bool,
    /// Which users.
    #[command(flatten)]
    pub filter: cli::Filter,
    /// Whether soft-deleted ones belong to them [default: true, unless there are other conditions].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub include_deleted: Option<bool>,
}

/// Prints changes until SIGINT or SIGTERM, or until nobody reads them any more.
pub async fn run(watch: Watch, default_addr: String) -> anyhow::Result<()> {
    let addr = watch.addr.clone().unwrap_or(default_addr);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // By itself, and at once: whoever reads what is printed can keep it waiting for ever.
    let mut signals = JoinSet::new();
    signals.spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        process::exit(0);
    });
    match print_changes(&addr, &watch).await {
        Err(error) if is_broken_pipe(&error) => Ok(()),
        printed => printed,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

async fn print_changes(addr: &str, watch: &Watch) -> anyhow::Result<()> {
    let mut token = match &watch.resume_file {
        Some(file) => read_token(file)?,
        None => String::new(),
    };
    let mut delay = RETRY_DELAY_MIN;
    loop {
        let before = token.clone();
        let ended = follow(addr, watch, &mut token).await;
        let error = match ended {
            Ok(()) => Status::unavailable("the stream ended").into(),
            Err(error) => error,
        };
        // What is wrong with the request, or with our output, does not pass.
        let passes = match (error.downcast_ref::<Status>(), error.downcast_ref::<io::Error>()) {
            (Some(status), _) => !matches!(
                status.code(),
                Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition | Code::Unimplemented
            ),
            (None, output) => output.is_none(),
        };
        if !passes {
            return Err(error);
        }
        tracing::warn!(error = crate::telemetry::describe(error.as_ref()), "interrupted");
        if token != before {
            delay = RETRY_DELAY_MIN;
        }
        time::sleep(delay).await;
        delay = (delay * 2).min(RETRY_DELAY_MAX);
    }
}

/// Prints what one stream brings, until it ends.
async fn follow(addr: &str, watch: &Watch, token: &mut String) -> anyhow::Result<()> {
    let mut client = cli::connect(addr).await?;
    let request = pb::WatchUsersRequest {
        resume_token: token.clone(),
        send_initial_state: watch.send_initial_state && token.is_empty(),
        filter: watch.filter.to_pb(watch.include_deleted),
    };
    let mut messages = client.watch_users(request).await?.into_inner();
    while let Some(message) = time::timeout(SILENCE, messages.message()).await?? {
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

/// The token in the file; empty if there is no file.
fn read_token(file: &Path) -> anyhow::Result<String> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
    }
}

/// The file has the old token or the new one, whatever happens in between.
fn write_token(file: &Path, token: &str) -> io::Result<()> {
    let path = cli::beside(file, ".new");
    let mut new = fs::File::create(&path)?;
    writeln!(new, "{token}")?;
    new.sync_all()?;
    fs::rename(path, file)
}

/// The JSON form of protobuf: fields without a value are left out, and 64-bit numbers
/// are strings.
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

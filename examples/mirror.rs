//! A mirror: an exact copy of all users, or of the users that match a filter, in memory.
//! It follows every change.
//!
//! ```sh
//! cargo run --example mirror -- http://localhost:50051
//! ```
//!
//! Use it as a template. A client applies the messages in order and keeps the token with the
//! copy. Whatever ends the stream, it calls again with the token. If the service rejects the
//! token, it starts with an empty copy. To survive a restart of the client, write the users
//! and the token to disk in one transaction.

#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    dead_code,
    reason = "a program, and a module of the tests"
)]

use std::{collections::HashMap, convert::Infallible, time::Duration};

use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;
use user_service::pb::{
    User, UserFilter, WatchUsersRequest, WatchUsersResponse, user_change::State,
    user_service_client::UserServiceClient,
};

/// The service sends a bookmark every 5 seconds while nothing changes. A stream without a
/// message for this long is dead.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// The delay between two attempts. It doubles while attempts fail.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(10);

/// The copy and its token.
#[derive(Debug, Default)]
pub struct Mirror {
    /// `None`: all users. It must not change.
    pub filter: Option<UserFilter>,
    /// The users by id. Soft-deleted users have a `delete_time`.
    pub users: HashMap<String, User>,
    /// Whether the initial state was received. Until then, users can be missing.
    pub is_complete: bool,
    /// Where the watch resumes. Store it together with `users`.
    pub resume_token: String,
}

impl Mirror {
    /// An empty copy.
    pub fn of(filter: Option<UserFilter>) -> Self {
        Self { filter, ..Self::default() }
    }

    /// Applies a message to the copy.
    pub fn apply(&mut self, message: WatchUsersResponse) {
        for change in message.changes {
            match change.state {
                Some(State::User(user)) => _ = self.users.insert(change.id, user),
                Some(State::Removed(_)) => _ = self.users.remove(&change.id),
                // A later change of this user follows.
                Some(State::Superseded(_)) | None => {}
            }
        }
        self.is_complete |= message.initial_state_end;
        self.resume_token = message.resume_token;
    }

    /// Follows the changes of one stream until it ends. Calls `applied` after each message.
    pub async fn follow(
        &mut self,
        client: &mut UserServiceClient<Channel>,
        mut applied: impl FnMut(&Self),
    ) -> Result<Infallible, Status> {
        let request = WatchUsersRequest {
            resume_token: self.resume_token.clone(),
            send_initial_state: self.resume_token.is_empty(),
            filter: self.filter.clone(),
        };
        let mut messages = client.watch_users(request).await?.into_inner();
        loop {
            let message = tokio::time::timeout(IDLE_TIMEOUT, messages.message()).await;
            let message = message.map_err(|_| Status::unavailable("no message in time"))??;
            self.apply(message.ok_or_else(|| Status::unavailable("the stream ended"))?);
            applied(self);
        }
    }

    /// Follows the changes and reconnects. Returns only if the request is invalid.
    pub async fn run(&mut self, service: &Endpoint, mut applied: impl FnMut(&Self)) -> Status {
        let mut delay = RETRY_DELAY_MIN;
        loop {
            let token_before = self.resume_token.clone();
            let Err(status) = match service.connect().await {
                Ok(channel) => self.follow(&mut UserServiceClient::new(channel), &mut applied).await,
                Err(error) => Err(Status::unavailable(error.to_string())),
            };
            if self.resume_token != token_before {
                delay = RETRY_DELAY_MIN;
            }
            let details = status.get_error_details();
            if details.error_info().is_some_and(|info| info.reason.starts_with("RESUME_TOKEN_")) {
                // The token is too old, or the database was restored. In the latter case the
                // copy may have changes that the database has lost.
                *self = Self::of(self.filter.take());
            } else if status.code() == Code::InvalidArgument {
                return status;
            }
            eprintln!("interrupted: {status}");
            // The jitter keeps mirrors from reconnecting all at once.
            tokio::time::sleep(delay.mul_f64(rand::random_range(0.5..1.0))).await;
            delay = (delay * 2).min(RETRY_DELAY_MAX);
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "http://localhost:50051".into());
    let service = Endpoint::try_from(address)?.connect_timeout(Duration::from_secs(5)).timeout(IDLE_TIMEOUT);
    let applied =
        |mirror: &Mirror| println!("{} users, complete: {}", mirror.users.len(), mirror.is_complete);
    Err(Mirror::default().run(&service, applied).await.into())
}

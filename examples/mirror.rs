//! A mirror: an exact copy of all users, or of some, in memory, which follows every
//! change.
//!
//! ```sh
//! cargo run --example mirror -- http://localhost:50051
//! ```
//!
//! Copy it. All that there is to it: apply the messages in their order, keep the token
//! with the copy, call again with the token whatever has ended the stream, and begin
//! anew when the service says that the token is of no use any more. To survive a restart
//! of your own, write the users and the token to your disk in one transaction.

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
    User, UserFilter, WatchUsersRequest, WatchUsersResponse, user_service_client::UserServiceClient,
};

/// The service sends a bookmark every 5 seconds when nothing changes. Without a sign of
/// life for so long, the connection is dead, or never came to life.
const SILENCE: Duration = Duration::from_secs(30);
/// Between two attempts, at most: longer each time that nothing came of it.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(10);

/// The copy.
#[derive(Debug, Default)]
pub struct Mirror {
    /// Of which users; `None`: of all. It stays the same.
    pub filter: Option<UserFilter>,
    /// By id. Soft-deleted ones have a `delete_time`.
    pub users: HashMap<String, User>,
    /// Whether all users have been there once. Until then, one that is not in the copy
    /// may exist.
    pub is_complete: bool,
    /// Where to go on. It belongs to `users`: keep them together.
    pub resume_token: String,
}

impl Mirror {
    /// A copy that is empty yet.
    pub fn of(filter: Option<UserFilter>) -> Self {
        Self { filter, ..Self::default() }
    }

    /// Brings the copy to the point behind a message.
    pub fn apply(&mut self, message: WatchUsersResponse) {
        for change in message.changes {
            match change.state {
                Some(user_service::pb::user_change::State::User(user)) => {
                    drop(self.users.insert(change.id, user))
                }
                Some(user_service::pb::user_change::State::Removed(_)) => drop(self.users.remove(&change.id)),
                Some(user_service::pb::user_change::State::Superseded(_)) | None => {}
            }
            // Otherwise, another change of this user follows.
        }
        self.is_complete |= message.initial_state_end;
        self.resume_token = message.resume_token;
    }

    /// Follows the changes until the stream ends, which it always does for some reason.
    /// `applied` is called after each message.
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
            let message = tokio::time::timeout(SILENCE, messages.message()).await;
            let message = message.map_err(|_| Status::unavailable("the service has fallen silent"))??;
            self.apply(message.ok_or_else(|| Status::unavailable("the stream ended"))?);
            applied(self);
        }
    }

    /// Follows the changes whatever happens, unless the filter is wrong.
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
                // The token is of no use any more: it is too old, or of a database that has
                // been restored, and then the copy may have what never was.
                *self = Self::of(self.filter.take());
            } else if status.code() == Code::InvalidArgument {
                return status;
            }
            eprintln!("interrupted: {status}");
            // Not all mirrors at once, when a server has stopped.
            tokio::time::sleep(delay.mul_f64(rand::random_range(0.5..1.0))).await;
            delay = (delay * 2).min(RETRY_DELAY_MAX);
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "http://localhost:50051".into());
    let service = Endpoint::try_from(address)?.connect_timeout(Duration::from_secs(5)).timeout(SILENCE);
    let applied =
        |mirror: &Mirror| println!("{} users, complete: {}", mirror.users.len(), mirror.is_complete);
    Err(Mirror::default().run(&service, applied).await.into())
}

//! The requests of the load, each with a random id or a new name.

use std::ops::Range;

use anyhow::Result;
use bytes::Bytes;
use user_service::pb::{self, get_user_request::Key};

use crate::client::frame;

/// Every id begins with the time of a UUID v7. The rest is a number whose decimal digits
/// are read as hexadecimal ones, so that SQL, pgbench and Rust can all compute the id of
/// user `n`: `(ID_PREFIX || (ID_BASE + n))::uuid`.
pub const ID_PREFIX: &str = "0190a3c0-0000-7000";
/// Makes the number 16 digits long, and the first digit the variant of a UUID.
pub const ID_BASE: u64 = 8_000_000_000_000_000;
/// New users are called `user<n>` like the loaded ones, with a random number from this
/// range, which is far above the loaded users' numbers.
pub const NEW_NAMES: Range<u64> = 1_000_000_000_000_000..8_000_000_000_000_000;
/// Users in a call that is about many.
pub const BATCH: usize = 1000;

/// What a call or statement does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// A health check, which shows what gRPC itself costs.
    Empty,
    GetById,
    GetByUsername,
    /// The newest fifty users.
    FirstPage,
    /// Fifty users from the middle of the table.
    DeepPage,
    Create,
    Update,
    /// [`BATCH`] users by id.
    Lookup,
    /// [`BATCH`] new users.
    BatchCreate,
}

impl Work {
    pub fn name(self) -> &'static str {
        self.name_and_rpc().0
    }

    /// The `:path` of the call.
    pub fn path(self) -> String {
        let service = if self == Self::Empty { "grpc.health.v1.Health" } else { "users.v1.UserService" };
        format!("/{service}/{}", self.name_and_rpc().1)
    }

    fn name_and_rpc(self) -> (&'static str, &'static str) {
        match self {
            Self::Empty => ("empty call", "Check"),
            Self::GetById => ("GetUser by id", "GetUser"),
            Self::GetByUsername => ("GetUser by username", "GetUser"),
            Self::FirstPage => ("ListUsers, first page", "ListUsers"),
            Self::DeepPage => ("ListUsers, deep page", "ListUsers"),
            Self::Create => ("CreateUser", "CreateUser"),
            Self::Update => ("UpdateUser", "UpdateUser"),
            Self::Lookup => ("LookupUsers of 1000", "LookupUsers"),
            Self::BatchCreate => ("BatchCreateUsers of 1000", "BatchCreateUsers"),
        }
    }

    /// The number of users in a call.
    pub fn users(self) -> f64 {
        if matches!(self, Self::Lookup | Self::BatchCreate) { BATCH as f64 } else { 1.0 }
    }
}

/// Makes requests.
#[derive(Debug, Clone)]
pub struct Requests {
    pub work: Work,
    /// The number of loaded users.
    users: u64,
    /// The page token of the middle of the table.
    deep_page: String,
    random: fastrand::Rng,
}

impl Requests {
    pub fn new(work: Work, users: u64, deep_page: String) -> Self {
        Self { work, users, deep_page, random: fastrand::Rng::new() }
    }

    /// A source of other requests of the same kind.
    pub fn fork(&mut self) -> Self {
        Self { random: self.random.fork(), ..self.clone() }
    }

    /// The next request in its gRPC frame.
    pub fn next(&mut self) -> Result<Bytes> {
        let list = pb::ListUsersRequest { page_size: 50, ..Default::default() };
        match self.work {
            Work::Empty => frame(&()),
            Work::GetById => get(Key::Id(self.existing_id())),
            Work::GetByUsername => get(Key::Username(format!("user{}", self.existing_number()))),
            Work::FirstPage => frame(&list),
            Work::DeepPage => frame(&pb::ListUsersRequest { page_token: self.deep_page.clone(), ..list }),
            Work::Create => {
                let (user, request_id) = (Some(self.new_user()), self.request_id());
                frame(&pb::CreateUserRequest { user, request_id, ..Default::default() })
            }
            Work::Update => {
                let display_name = format!("User {}", self.random.u64(NEW_NAMES));
                let user = Some(pb::User { id: self.existing_id(), display_name, ..Default::default() });
                let request_id = self.request_id();
                frame(&pb::UpdateUserRequest { user, request_id, ..Default::default() })
            }
            Work::Lookup => {
                let key = |_| pb::UserKey { key: Some(pb::user_key::Key::Id(self.existing_id())) };
                let keys = (0..BATCH).map(key).collect();
                frame(&pb::LookupUsersRequest { keys, ..Default::default() })
            }
            Work::BatchCreate => {
                let item = |_| pb::BatchCreateUsersItem { user: Some(self.new_user()) };
                let items = (0..BATCH).map(item).collect();
                let request_id = self.request_id();
                frame(&pb::BatchCreateUsersRequest { items, request_id, ..Default::default() })
            }
        }
    }

    pub fn new_user(&mut self) -> pb::User {
        let n = self.random.u64(NEW_NAMES);
        pb::User {
            username: format!("user{n}"),
            email: format!("user{n}@example.com"),
            display_name: format!("User {n}"),
            ..Default::default()
        }
    }

    pub fn existing_id(&mut self) -> String {
        user_id(self.existing_number())
    }

    fn existing_number(&mut self) -> u64 {
        self.random.u64(1..=self.users)
    }

    fn request_id(&mut self) -> String {
        uuid::Builder::from_random_bytes(self.random.u128(..).to_be_bytes()).into_uuid().to_string()
    }
}

fn get(key: Key) -> Result<Bytes> {
    frame(&pb::GetUserRequest { key: Some(key), ..Default::default() })
}

/// The id of user `n`.
pub fn user_id(n: u64) -> String {
    let digits = ID_BASE + n;
    format!("{ID_PREFIX}-{}-{:012}", digits / 1_000_000_000_000, digits % 1_000_000_000_000)
}

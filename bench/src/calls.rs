//! The calls that are made, each with an id or a name of its own.

use bytes::{BufMut, Bytes, BytesMut};
use clap::ValueEnum;
use prost::Message;
use user_service::pb::{self, get_user_request::Key};

/// Every id begins with the time of a UUID v7. What follows is a number whose
/// decimal digits are taken for hexadecimal ones, so that SQL, pgbench and Rust can
/// all make the id of user `n`: `(ID_PREFIX || (ID_BASE + n))::uuid`.
pub const ID_PREFIX: &str = "0190a3c0-0000-7000";
/// Makes the number 16 digits long, and the first one the variant of a UUID.
pub const ID_BASE: u64 = 8_000_000_000_000_000;
/// New users are called `user<n>` too, with a random number from here, which none
/// of the users has that are there from the beginning.
pub const NEW_NAMES: std::ops::Range<u64> = 1_000_000_000_000_000..8_000_000_000_000_000;

/// What a row of the report is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Work {
    /// A call that does nothing: what gRPC itself costs.
    Empty,
    /// One user.
    GetById,
    /// One user.
    GetByUsername,
    /// Fifty users, the newest.
    FirstPage,
    /// Fifty users, from the middle of the table.
    DeepPage,
    /// One user.
    Create,
    /// One user.
    Update,
    /// A thousand users by their ids.
    Lookup,
    /// A thousand new users.
    BatchCreate,
}

/// Users in a call that is about many.
pub const BATCH: usize = 1000;

impl Work {
    pub fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty call",
            Self::GetById => "GetUser by id",
            Self::GetByUsername => "GetUser by username",
            Self::FirstPage => "ListUsers, first page",
            Self::DeepPage => "ListUsers, deep page",
            Self::Create => "CreateUser",
            Self::Update => "UpdateUser",
            Self::Lookup => "LookupUsers of 1000",
            Self::BatchCreate => "BatchCreateUsers of 1000",
        }
    }

    /// The `:path` of the call.
    pub fn path(self) -> &'static str {
        match self {
            Self::Empty => "/grpc.health.v1.Health/Check",
            Self::GetById | Self::GetByUsername => "/users.v1.UserService/GetUser",
            Self::FirstPage | Self::DeepPage => "/users.v1.UserService/ListUsers",
            Self::Create => "/users.v1.UserService/CreateUser",
            Self::Update => "/users.v1.UserService/UpdateUser",
            Self::Lookup => "/users.v1.UserService/LookupUsers",
            Self::BatchCreate => "/users.v1.UserService/BatchCreateUsers",
        }
    }

    /// How many users a call is about.
    pub fn users(self) -> usize {
        match self {
            Self::Lookup | Self::BatchCreate => BATCH,
            _ => 1,
        }
    }
}

/// Makes requests.
#[derive(Debug, Clone)]
pub struct Requests {
    pub work: Work,
    /// How many users there are.
    users: u64,
    /// The page token that leads to the middle of the table.
    deep_page: String,
    random: fastrand::Rng,
}

impl Requests {
    pub fn new(work: Work, users: u64, deep_page: String) -> Self {
        Self { work, users, deep_page, random: fastrand::Rng::new() }
    }

    /// A maker of other requests of the same kind.
    pub fn fork(&mut self) -> Self {
        Self { random: self.random.fork(), ..self.clone() }
    }

    /// The next request, as it goes over the wire.
    pub fn next(&mut self) -> anyhow::Result<Bytes> {
        match self.work {
            Work::Empty => frame(&()),
            Work::GetById => self.get(|n| Key::Id(user_id(n))),
            Work::GetByUsername => self.get(|n| Key::Username(format!("user{n}"))),
            Work::FirstPage => frame(&pb::ListUsersRequest { page_size: 50, ..Default::default() }),
            Work::DeepPage => frame(&pb::ListUsersRequest {
                page_size: 50,
                page_token: self.deep_page.clone(),
                ..Default::default()
            }),
            Work::Create => {
                let user = self.new_user();
                let request_id = self.request_id();
                frame(&pb::CreateUserRequest { user, request_id, ..Default::default() })
            }
            Work::Update => {
                let user = pb::User {
                    id: user_id(self.number()),
                    display_name: format!("User {}", self.random.u64(NEW_NAMES)),
                    ..Default::default()
                };
                let request_id = self.request_id();
                frame(&pb::UpdateUserRequest { user: Some(user), request_id, ..Default::default() })
            }
            Work::Lookup => {
                let key = |_| Some(pb::user_key::Key::Id(user_id(self.number())));
                let keys = (0..BATCH).map(key).map(|key| pb::UserKey { key }).collect();
                frame(&pb::LookupUsersRequest { keys, ..Default::default() })
            }
            Work::BatchCreate => {
                let item = |_| pb::BatchCreateUsersItem { user: self.new_user() };
                let items = (0..BATCH).map(item).collect();
                let request_id = self.request_id();
                frame(&pb::BatchCreateUsersRequest { items, request_id, ..Default::default() })
            }
        }
    }

    fn get(&mut self, key: impl Fn(u64) -> Key) -> anyhow::Result<Bytes> {
        frame(&pb::GetUserRequest { key: Some(key(self.number())), ..Default::default() })
    }

    fn new_user(&mut self) -> Option<pb::User> {
        let n = self.random.u64(NEW_NAMES);
        Some(pb::User {
            username: format!("user{n}"),
            email: format!("user{n}@example.com"),
            display_name: format!("User {n}"),
            ..Default::default()
        })
    }

    /// The number of a user that exists.
    fn number(&mut self) -> u64 {
        self.random.u64(1..=self.users)
    }

    fn request_id(&mut self) -> String {
        uuid::Builder::from_random_bytes(self.random.u128(..).to_be_bytes()).into_uuid().to_string()
    }
}

/// The id of user `n`.
pub fn user_id(n: u64) -> String {
    let digits = ID_BASE + n;
    format!("{ID_PREFIX}-{}-{:012}", digits / 1_000_000_000_000, digits % 1_000_000_000_000)
}

/// The message behind the five octets that gRPC puts in front of it: not
/// compressed, and how long it is.
pub fn frame(message: &impl Message) -> anyhow::Result<Bytes> {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(5 + length);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length)?);
    message.encode(&mut frame)?;
    Ok(frame.freeze())
}

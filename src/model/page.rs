//! Lists, their pages and page tokens.
//!
//! A list is the users between two positions of an index. A page token contains the
//! position of the last user of a page and is valid for its list only. The server keeps no
//! state: every replica can return the next page.

use std::time::{Duration, SystemTime};

use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::model::names::{Email, Username};
use crate::model::token::TokenKeys;
use crate::pb;

/// The order of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The newest first.
    CreateTimeDesc,
    /// The oldest first.
    CreateTimeAsc,
    /// By username key.
    UsernameAsc,
}

/// A value of the column that a list is ordered by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// Of `create_time`.
    Time(SystemTime),
    /// Of `username_key`.
    Username(String),
}

/// A place between two users of an index: key, then id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The first column.
    pub key: Key,
    /// The second, which tells users with the same key apart.
    pub id: Uuid,
}

/// All users that a list contains.
#[derive(Debug, Clone)]
pub struct Selection {
    /// In which order.
    pub order: Order,
    /// Only users with this e-mail key.
    pub email_key: Option<String>,
    /// Soft-deleted ones too.
    pub include_deleted: bool,
    /// Only users after this position, in ascending order.
    pub from: Position,
    /// Only users before this position, in ascending order.
    pub to: Position,
}

/// The users of a list from one position on.
#[derive(Debug, Clone)]
pub struct Page {
    /// What is left of the list.
    pub rest: Selection,
    /// How many users at most.
    pub size: usize,
    /// Whether this is the list's beginning.
    pub is_first: bool,
    /// The context of the page tokens: the whole list.
    token_context: Vec<u8>,
}

impl Selection {
    /// The first page.
    pub fn first_page(self, size: usize) -> Page {
        Page { token_context: self.to_bytes(), rest: self, size, is_first: true }
    }

    /// The page behind the one that `token` came with; `None` if the token was
    /// not made for this selection.
    pub fn page_after(self, keys: &TokenKeys, token: &str, size: usize) -> Option<Page> {
        let first = self.first_page(size);
        let last = first.rest.order.position_from_bytes(&keys.decode(&first.token_context, token)?)?;
        Some(first.page_after(last))
    }

    /// Whether a user belongs to the list. It compares the keys that the index columns
    /// contain: a change of the rules that make them requires a change of the columns.
    pub fn contains(&self, user: &pb::User) -> bool {
        let key = match self.order {
            Order::CreateTimeDesc | Order::CreateTimeAsc => {
                user.create_time.and_then(|time| time.try_into().ok()).map(Key::Time)
            }
            Order::UsernameAsc => {
                Username::parse(&user.username).ok().map(|name| Key::Username(name.canonical().to_owned()))
            }
        };
        let position = key.zip(Uuid::try_parse(&user.id).ok()).map(|(key, id)| Position { key, id });
        let has_email = |key: &String| Email::parse(&user.email).is_ok_and(|email| email.canonical() == key);
        position.is_some_and(|position| self.from < position && position < self.to)
            && (self.include_deleted || user.delete_time.is_none())
            && self.email_key.as_ref().is_none_or(has_email)
    }

    /// The context of the resume tokens of a watch with this filter. It differs from the context
    /// of page tokens.
    pub(super) fn watch_context(&self) -> Vec<u8> {
        [b"watch of ", self.to_bytes().as_slice()].concat()
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.order as u8, u8::from(self.include_deleted)];
        // Length first, so that no two selections have the same bytes.
        for part in [
            self.email_key.clone().unwrap_or_default().into_bytes(),
            self.from.to_bytes(),
            self.to.to_bytes(),
        ] {
            bytes.extend(u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
            bytes.extend(part);
        }
        bytes
    }
}

impl Page {
    /// The token of the next page, when this one ends with the user at `last`.
    pub fn token_after(&self, keys: &TokenKeys, last: &Position) -> String {
        keys.encode(&self.token_context, &last.to_bytes())
    }

    /// The next page, when this one ends with the user at `last`.
    pub fn page_after(mut self, last: Position) -> Self {
        match self.rest.order {
            Order::CreateTimeDesc => self.rest.to = last,
            Order::CreateTimeAsc | Order::UsernameAsc => self.rest.from = last,
        }
        Self { is_first: false, ..self }
    }
}

impl Key {
    /// The key as a parameter of a statement.
    pub fn as_param(&self) -> &(dyn ToSql + Sync) {
        match self {
            Self::Time(time) => time,
            Self::Username(key) => key,
        }
    }
}

impl Position {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.id.into_bytes().to_vec();
        match &self.key {
            Key::Time(time) => bytes.extend(to_micros(*time).to_be_bytes()),
            Key::Username(key) => bytes.extend(key.as_bytes()),
        }
        bytes
    }
}

impl Order {
    pub(super) fn position_from_bytes(self, bytes: &[u8]) -> Option<Position> {
        let (id, key) = bytes.split_first_chunk::<16>()?;
        let key = match self {
            Self::UsernameAsc => {
                Key::Username(String::from_utf8(key.to_vec()).ok().filter(|key| !key.contains('\0'))?)
            }
            Self::CreateTimeAsc | Self::CreateTimeDesc => {
                Key::Time(from_micros(i64::from_be_bytes(key.try_into().ok()?))?)
            }
        };
        Some(Position { key, id: Uuid::from_bytes(*id) })
    }
}

pub(crate) fn to_micros(time: SystemTime) -> i64 {
    let micros = |d: Duration| i64::try_from(d.as_micros()).unwrap_or(i64::MAX);
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => micros(since),
        Err(before) => -micros(before.duration()),
    }
}

/// The time, unless it is out of the years 1 to 9999.
pub(crate) fn from_micros(micros: i64) -> Option<SystemTime> {
    let distance = Duration::from_micros(micros.unsigned_abs());
    match micros {
        -62_135_596_800_000_000..0 => SystemTime::UNIX_EPOCH.checked_sub(distance),
        0..253_402_300_800_000_000 => SystemTime::UNIX_EPOCH.checked_add(distance),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::token::tests::keys;

    fn selection(order: Order, from: Key, to: Key) -> Selection {
        let at = |key| Position { key, id: Uuid::nil() };
        Selection { order, email_key: None, include_deleted: false, from: at(from), to: at(to) }
    }

    proptest! {
        #[test]
        fn page_token_returns_its_position(micros in -62_135_596_800_000_000_i64..253_402_300_799_000_000, id: u128) {
            let time = Key::Time(from_micros(micros).unwrap());
            let all = selection(Order::CreateTimeAsc, time.clone(), time.clone());
            let last = Position { key: time, id: Uuid::from_u128(id) };
            let token = all.clone().first_page(1).token_after(&keys(&[1]), &last);
            prop_assert_eq!(all.page_after(&keys(&[1]), &token, 1).unwrap().rest.from, last);
        }

        #[test]
        fn page_token_returns_its_username_position(key in "[^\\x00]{0,64}", id: u128) {
            let all = selection(Order::UsernameAsc, Key::Username("a".into()), Key::Username("b".into()));
            let last = Position { key: Key::Username(key), id: Uuid::from_u128(id) };
            let token = all.clone().first_page(1).token_after(&keys(&[1]), &last);
            prop_assert_eq!(all.page_after(&keys(&[1]), &token, 1).unwrap().rest.from, last);
        }

        /// A token of another release can have any content.
        #[test]
        fn content_of_a_page_token_is_a_position_or_rejected(bytes: Vec<u8>) {
            for order in [Order::CreateTimeDesc, Order::CreateTimeAsc, Order::UsernameAsc] {
                let time = Key::Time(SystemTime::UNIX_EPOCH);
                let all = selection(order, time.clone(), time);
                let token = keys(&[1]).encode(&all.to_bytes(), &bytes);
                if let Some(page) = all.page_after(&keys(&[1]), &token, 1) {
                    let _ = page.token_after(&keys(&[1]), &page.rest.from);
                }
            }
        }
    }
}

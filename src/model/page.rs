//! Where a page of a list begins and ends, and the tokens that carry it.
//!
//! A list is the users between two positions of an index. A page token is the
//! position of the last user that was seen, sealed with the list that it belongs
//! to: nothing is kept on the server, and any replica can go on.

use std::time::{Duration, SystemTime};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::model::names::{Email, Username};
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
    /// Only those with this e-mail key.
    pub email_key: Option<String>,
    /// Soft-deleted ones too.
    pub include_deleted: bool,
    /// Only those behind this position, in ascending order.
    pub from: Position,
    /// Only those in front of this position, in ascending order.
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
    /// What [`Page::token_after`] seals tokens with.
    seal: Vec<u8>,
}

impl Selection {
    /// The first page.
    pub fn first_page(self, size: usize) -> Page {
        Page { seal: self.to_bytes(), rest: self, size, is_first: true }
    }

    /// The page behind the one that `token` came with; `None` if the token was
    /// not made for this selection.
    pub fn page_after(self, token: &str, size: usize) -> Option<Page> {
        let first = self.first_page(size);
        let last = first.rest.order.position_from_bytes(&decode_token(&first.seal, token)?)?;
        Some(first.page_after(last))
    }

    /// Whether a user belongs to it, by the keys that its columns have: a change of the rules
    /// by which these are made has to be a change of the columns too.
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

    /// The token of a watch of these users only, from that of a watch of all.
    pub fn seal_watch(&self, token: &str) -> String {
        encode_token(&self.watch_context(), token.as_bytes())
    }

    /// What [`Selection::seal_watch`] sealed for the same selection.
    pub fn open_watch(&self, token: &str) -> Option<String> {
        String::from_utf8(decode_token(&self.watch_context(), token)?).ok()
    }

    /// Not that of page tokens.
    fn watch_context(&self) -> Vec<u8> {
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
    pub fn token_after(&self, last: &Position) -> String {
        encode_token(&self.seal, &last.to_bytes())
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
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.id.into_bytes().to_vec();
        match &self.key {
            Key::Time(time) => bytes.extend(to_micros(*time).to_be_bytes()),
            Key::Username(key) => bytes.extend(key.as_bytes()),
        }
        bytes
    }
}

impl Order {
    fn position_from_bytes(self, bytes: &[u8]) -> Option<Position> {
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

/// Octets of a seal. It guards against accidents, such as a token cut short or
/// used with another list. A forged one gives away nothing: it can only point
/// at another place in a list that its owner may read anyway.
const SEAL_OCTETS: usize = 8;

fn checksum(context: &[u8], payload: &[u8]) -> [u8; SEAL_OCTETS] {
    let hash = Sha256::new().chain_update(context).chain_update([0]).chain_update(payload).finalize();
    let mut seal = [0; SEAL_OCTETS];
    seal.copy_from_slice(hash.split_at(SEAL_OCTETS).0);
    seal
}

/// A text that [`open`] can read, if it comes back whole and to the same place.
pub fn encode_token(context: &[u8], payload: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode([&checksum(context, payload), payload].concat())
}

/// What was sealed, if this is a seal of this context.
pub fn decode_token(context: &[u8], token: &str) -> Option<Vec<u8>> {
    let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
    let (seal, payload) = bytes.split_first_chunk()?;
    (*seal == checksum(context, payload)).then(|| payload.to_vec())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn selection(order: Order, from: Key, to: Key) -> Selection {
        let at = |key| Position { key, id: Uuid::nil() };
        Selection { order, email_key: None, include_deleted: false, from: at(from), to: at(to) }
    }

    proptest! {
        #[test]
        fn a_token_leads_back_to_its_position(micros in -62_135_596_800_000_000_i64..253_402_300_799_000_000, id: u128) {
            let time = Key::Time(from_micros(micros).unwrap());
            let all = selection(Order::CreateTimeAsc, time.clone(), time.clone());
            let last = Position { key: time, id: Uuid::from_u128(id) };
            let token = all.clone().first_page(1).token_after(&last);
            prop_assert_eq!(all.page_after(&token, 1).unwrap().rest.from, last);
        }

        #[test]
        fn the_same_for_usernames(key in "[^\\x00]{0,64}", id: u128) {
            let all = selection(Order::UsernameAsc, Key::Username("a".into()), Key::Username("b".into()));
            let last = Position { key: Key::Username(key), id: Uuid::from_u128(id) };
            let token = all.clone().first_page(1).token_after(&last);
            prop_assert_eq!(all.page_after(&token, 1).unwrap().rest.from, last);
        }

        /// Even with a good seal, which takes malice, a token is harmless.
        #[test]
        fn forged_bytes_are_a_position_or_nothing(bytes: Vec<u8>) {
            for order in [Order::CreateTimeDesc, Order::CreateTimeAsc, Order::UsernameAsc] {
                let time = Key::Time(SystemTime::UNIX_EPOCH);
                let all = selection(order, time.clone(), time);
                let token = encode_token(&all.to_bytes(), &bytes);
                let _ = all.page_after(&token, 1);
            }
        }
    }
}

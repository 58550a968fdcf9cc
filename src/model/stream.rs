//! The requests of streams: exports, chunks of imports, watches.

use std::collections::HashSet;

use prost::Message;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::error::{Error, Violation};
use crate::model::fields::{Fields, is_unfiltered};
use crate::model::page::{Order, Page, Selection};
use crate::model::position::{LogPosition, ResumeToken};
use crate::model::token::TokenKeys;
use crate::model::user::NewUser;
use crate::pb;
use crate::pb::ErrorReason as Reason;

impl Selection {
    /// Parses the filter of a stream. Its users come in the order of the index that serves
    /// it; users that are created meanwhile do not make it longer.
    fn parse(filter: pb::UserFilter) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let by_username = !filter.username_prefix.is_empty();
        let order = if by_username { Order::UsernameAsc } else { Order::CreateTimeDesc };
        let selection = fields.selection(order, filter);
        fields.finish(selection)
    }
}

/// [`pb::ExportUsersRequest`].
#[derive(Debug)]
pub enum Export {
    /// All users, in the order that is fastest.
    All {
        /// Soft-deleted ones too.
        include_deleted: bool,
    },
    /// The users that match a filter, in the order of the index that serves it.
    Filtered(Selection),
}

impl Export {
    /// Parses the request.
    pub fn parse(request: pb::ExportUsersRequest) -> Result<Self, Error> {
        let filter = request.filter.unwrap_or_default();
        if is_unfiltered(&filter) {
            return Ok(Self::All { include_deleted: filter.include_deleted });
        }
        Selection::parse(filter).map(Self::Filtered)
    }
}

/// The largest number of users in a chunk of an import.
pub const CHUNK_SIZE_MAX: usize = 1000;

/// [`pb::ImportUsersRequest`].
#[derive(Debug)]
pub struct Chunk {
    /// The caller's, from 1 on.
    pub number: i64,
    /// The key of its record: SHA-256 of the import's id and the number.
    pub key: Vec<u8>,
    /// SHA-256 of the import's id and the content.
    pub fingerprint: Vec<u8>,
    /// What to do with existing users.
    pub mode: pb::ImportMode,
    /// The valid users, in their order.
    pub users: Vec<NewUser>,
    /// The rejected ones.
    pub rejected: Vec<pb::ImportFailure>,
    ids: HashSet<Uuid>,
    usernames: HashSet<String>,
}

impl Chunk {
    /// Parses the request. A rejected user does not reject the chunk.
    pub fn parse(request: pb::ImportUsersRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let import_id = fields.id("import_id", &request.import_id);
        let number = match request.chunk {
            0 => fields.reject("chunk", Reason::FieldRequired, "is required"),
            ..0 => fields.reject("chunk", Reason::FieldInvalid, "must not be negative"),
            number => Some(number),
        };
        let mode = match request.mode() {
            _ if pb::ImportMode::try_from(request.mode).is_err() => {
                fields.reject("mode", Reason::FieldInvalid, "is not a mode")
            }
            pb::ImportMode::Unspecified => Some(pb::ImportMode::CreateOnly),
            mode => Some(mode),
        };
        let users = match request.users.len() {
            0 => fields.reject("users", Reason::FieldRequired, "is required"),
            1..=CHUNK_SIZE_MAX => Some(()),
            _ => {
                let what = format!("must have at most {CHUNK_SIZE_MAX} users");
                fields.reject("users", Reason::BatchTooLarge, what)
            }
        };
        let ((import_id, number), (mode, ())) = fields.finish(import_id.zip(number).zip(mode.zip(users)))?;
        let hash =
            |content: &[u8]| Sha256::new().chain_update(import_id).chain_update(content).finalize().to_vec();
        let mut chunk = Self {
            number,
            key: hash(&number.to_be_bytes()),
            fingerprint: hash(&request.encode_to_vec()),
            mode,
            users: Vec::with_capacity(request.users.len()),
            rejected: Vec::new(),
            ids: HashSet::new(),
            usernames: HashSet::new(),
        };
        for (position, user) in (0..).zip(request.users) {
            let mut fields = Fields::default();
            let user = NewUser::parse(&mut fields, user).filter(|user| chunk.is_first(&mut fields, user));
            match fields.finish(user) {
                Ok(user) => chunk.users.push(user),
                Err(error) => chunk.rejected.push(failure(position, error)),
            }
        }
        Ok(chunk)
    }

    /// Whether no earlier user of the chunk has the same id or username.
    fn is_first(&mut self, fields: &mut Fields, user: &NewUser) -> bool {
        if !self.ids.insert(user.id) {
            fields.reject::<()>("user.id", Reason::UserIdTaken, "another user of this chunk has this id");
        }
        if !self.usernames.insert(user.username.canonical().to_owned()) {
            let what = "another user of this chunk has this username";
            fields.reject::<()>("user.username", Reason::UsernameTaken, what);
        }
        fields.is_valid()
    }

    /// Whether both have the same number, or share an id or a username.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.key == other.key
            || !self.ids.is_disjoint(&other.ids)
            || !self.usernames.is_disjoint(&other.usernames)
    }
}

/// What is wrong with the user at this position of a chunk.
fn failure(position: i32, error: Error) -> pb::ImportFailure {
    let Error::Invalid(violations) = error else { return pb::ImportFailure::default() };
    let violations = violations.into_iter().map(|Violation { field, reason, description, .. }| {
        // A failure names fields of User.
        let field = field.strip_prefix("user.").unwrap_or(&field).to_owned();
        pb::ImportViolation { field, reason: reason.into(), description }
    });
    pb::ImportFailure { position, violations: violations.collect() }
}

/// [`pb::WatchUsersRequest`].
#[derive(Debug)]
pub struct Watch {
    /// Which users; `None`: all.
    pub filter: Option<Selection>,
    /// The position to resume from; `None`: now.
    pub position: Option<LogPosition>,
    /// The first page of an initial state.
    pub initial_state: Option<Page>,
}

/// How many users of an initial state are read at a time.
const INITIAL_STATE_PAGE_SIZE: usize = 500;

impl Watch {
    /// Parses the request.
    pub fn parse(keys: &TokenKeys, request: pb::WatchUsersRequest) -> Result<Self, Error> {
        let all = pb::UserFilter { include_deleted: true, ..Default::default() };
        let filter = request.filter.filter(|filter| *filter != all).map(Selection::parse).transpose()?;
        let selection = filter.clone().map_or_else(|| Selection::parse(all), Ok)?;
        match (request.resume_token.as_str(), request.send_initial_state) {
            ("", false) => Ok(Self { filter, position: None, initial_state: None }),
            ("", true) => {
                let initial_state = Some(selection.first_page(INITIAL_STATE_PAGE_SIZE));
                Ok(Self { filter, position: None, initial_state })
            }
            (_, true) => {
                let what = "goes without resume_token: the token says where to continue";
                Err(Error::invalid("send_initial_state", Reason::FieldInvalid, what))
            }
            (token, false) => Self::resume(keys, token, filter, selection).ok_or_else(|| {
                let what = "is not a whole token of ListUsers, ExportUsers, or WatchUsers with this filter: \
                            start again with send_initial_state";
                Error::invalid("resume_token", Reason::ResumeTokenInvalid, what)
            }),
        }
    }

    fn resume(
        keys: &TokenKeys,
        token: &str,
        filter: Option<Selection>,
        selection: Selection,
    ) -> Option<Self> {
        let ResumeToken { position, last_user } = match LogPosition::from_token(keys, token) {
            // A token of another rpc goes with every filter.
            Some(position) => ResumeToken::at(position),
            None => ResumeToken::decode(keys, token, filter.as_ref(), selection.order)?,
        };
        let initial_state =
            last_user.map(|last| selection.first_page(INITIAL_STATE_PAGE_SIZE).page_after(last));
        Some(Self { filter, position: Some(position), initial_state })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Often one of a few valid values, so that chunks have duplicates.
    fn some_text(valid: &'static [&'static str]) -> impl Strategy<Value = String> {
        prop_oneof![4 => prop::sample::select(valid).prop_map(str::to_owned), 1 => any::<String>()]
    }

    const IDS: &[&str] =
        &["", "6f0f7a1e-1111-4222-8333-944444444444", "6f0f7a1e-1111-4222-8333-955555555555"];

    fn some_user() -> impl Strategy<Value = pb::User> {
        let name = some_text(&["alice", "ALICE", "bob", "carol"]);
        let email = some_text(&["a@example.com", "b@example.com"]);
        (some_text(IDS), name, email, any::<String>()).prop_map(|(id, username, email, display_name)| {
            pb::User { id, username, email, display_name, ..Default::default() }
        })
    }

    proptest! {
        #[test]
        fn each_user_of_a_chunk_is_valid_or_rejected(
            import_id in some_text(&IDS[1..]),
            number in prop_oneof![Just(1_i64), any::<i64>()],
            mode in prop_oneof![0..4_i32, any::<i32>()],
            users in prop::collection::vec(some_user(), 0..6),
        ) {
            let count = users.len();
            let request = pb::ImportUsersRequest { import_id, chunk: number, mode, users };
            if let Ok(chunk) = Chunk::parse(request) {
                prop_assert!(number > 0 && count > 0);
                prop_assert_eq!(chunk.users.len() + chunk.rejected.len(), count);
                prop_assert!(chunk.rejected.iter().map(|failure| failure.position).is_sorted_by(|a, b| a < b));
                prop_assert!(chunk.rejected.iter().all(|failure| !failure.violations.is_empty()));
                let (ids, names): (HashSet<_>, HashSet<_>) =
                    chunk.users.iter().map(|user| (user.id, user.username.canonical())).unzip();
                prop_assert_eq!((ids.len(), names.len()), (chunk.users.len(), chunk.users.len()));
            }
        }

        #[test]
        fn no_bytes_make_the_parser_of_chunks_panic(bytes: Vec<u8>, user: Vec<u8>) {
            let users = [[0x22, user.len() as u8].as_slice(), &user].concat();
            for bytes in [bytes, users] {
                if let Ok(request) = pb::ImportUsersRequest::decode(bytes.as_slice()) {
                    let _ = Chunk::parse(request);
                }
            }
        }
    }
}

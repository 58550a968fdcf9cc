//! Requests, parsed into types that cannot be wrong. Pure; every violation of a
//! request is reported at once.

use std::{
    collections::HashSet,
    mem,
    time::{Duration, SystemTime},
};

use prost::Message;
use prost_types::{FieldMask, Timestamp};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::error::{Element, Error, Violation, reason};
use crate::model::names::{self, Email, KeyRange, Username};
use crate::model::page::{Key, Order, Page, Position, Selection};
use crate::model::position::{LogPosition, ResumeToken};
use crate::pb;

/// A user to create.
#[derive(Debug, Clone)]
pub struct NewUser {
    /// The caller's, or a new one.
    pub id: Uuid,
    /// Required.
    pub username: Username,
    /// Required.
    pub email: Email,
    /// May be empty.
    pub display_name: String,
    /// What fingerprints of requests about this user are made with.
    pub salt: [u8; 16],
}

/// What makes a retry safe: the caller's id for the change, and a fingerprint of
/// what the change is. Without an id, nothing is recorded.
#[derive(Debug, Clone)]
pub struct RequestId {
    /// The caller's id.
    pub id: Option<Uuid>,
    /// SHA-256 of the rpc, the id and the rest of the request.
    pub fingerprint: Vec<u8>,
}

/// [`pb::CreateUserRequest`].
#[derive(Debug)]
pub struct Create {
    /// The user.
    pub user: NewUser,
    /// For retries.
    pub request_id: RequestId,
    /// Roll back.
    pub validate_only: bool,
}

/// The key of a [`pb::GetUserRequest`].
#[derive(Debug)]
pub enum UserKey {
    /// By id.
    Id(Uuid),
    /// By username.
    Username(Username),
}

/// [`pb::UpdateUserRequest`].
#[derive(Debug)]
pub struct Update {
    /// Of whom, and what.
    pub change: UserPatch,
    /// With `allow_missing`: the user to create if there is none, or what is
    /// wrong with it.
    pub or_create: Option<Result<NewUser, Error>>,
    /// For retries.
    pub request_id: RequestId,
    /// Roll back.
    pub validate_only: bool,
}

/// What an update changes. What is `None` stays as it is.
#[derive(Debug)]
pub struct UserPatch {
    /// Whose.
    pub id: Uuid,
    /// 0 for any.
    pub expected_revision: i64,
    /// The new username.
    pub username: Option<Username>,
    /// The new e-mail address.
    pub email: Option<Email>,
    /// The new display name.
    pub display_name: Option<String>,
}

/// [`pb::DeleteUserRequest`].
#[derive(Debug)]
pub struct Delete {
    /// Whom.
    pub id: Uuid,
    /// 0 for any.
    pub expected_revision: i64,
    /// Succeed if there is nothing to delete.
    pub allow_missing: bool,
    /// Free the username.
    pub release_username: bool,
    /// For retries.
    pub request_id: RequestId,
    /// Roll back.
    pub validate_only: bool,
}

/// [`pb::UndeleteUserRequest`].
#[derive(Debug)]
pub struct Undelete {
    /// Whom.
    pub id: Uuid,
    /// The username to have, if not the old one.
    pub username: Option<Username>,
    /// For retries.
    pub request_id: RequestId,
}

/// [`pb::ExpungeUserRequest`].
#[derive(Debug)]
pub struct Expunge {
    /// Whom.
    pub id: Uuid,
    /// For retries.
    pub request_id: RequestId,
}

/// [`pb::LookupUsersRequest`].
#[derive(Debug)]
pub struct Lookup {
    /// Whom to look for.
    pub keys: Vec<LookupKey>,
    /// Also among the soft-deleted.
    pub include_deleted: bool,
}

/// A [`pb::UserKey`].
#[derive(Debug)]
pub enum LookupKey {
    /// By id.
    Id(Uuid),
    /// By username.
    Username(Username),
    /// By e-mail address.
    Email(Email),
}

/// The request of a batch: [`pb::BatchCreateUsersRequest`] with users to create,
/// [`pb::BatchUpdateUsersRequest`] with changes, [`pb::BatchDeleteUsersRequest`]
/// with removals.
#[derive(Debug)]
pub struct Batch<T> {
    /// What to do; no user is changed or removed twice.
    pub items: Vec<T>,
    /// For retries.
    pub request_id: RequestId,
    /// Roll back.
    pub validate_only: bool,
}

/// An item of a [`pb::BatchDeleteUsersRequest`].
#[derive(Debug)]
pub struct Removal {
    /// Whom.
    pub id: Uuid,
    /// 0 for any.
    pub expected_revision: i64,
}

impl Create {
    /// Parses the request.
    pub fn parse(mut request: pb::CreateUserRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let request_id = mem::take(&mut request.request_id);
        let validate_only = mem::take(&mut request.validate_only);
        let request_id = fields.request_id("CreateUser", &request_id, &request);
        let user = fields.user(request.user).and_then(|user| fields.new_user(user));
        let (request_id, user) = fields.finish(request_id.zip(user))?;
        Ok(Self { user, request_id, validate_only })
    }
}

impl UserKey {
    /// Parses the key.
    pub fn parse(key: Option<pb::get_user_request::Key>) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let key = match key {
            Some(pb::get_user_request::Key::Id(id)) => fields.id("id", &id).map(Self::Id),
            Some(pb::get_user_request::Key::Username(username)) => {
                fields.username("username", &username).map(Self::Username)
            }
            None => fields.refuse("key", reason::FIELD_REQUIRED, "give an id or a username"),
        };
        fields.finish(key)
    }
}

impl Update {
    /// Parses the request. The values of fields outside the mask are not looked
    /// at, and those that only a create needs matter only if it comes to that.
    pub fn parse(mut request: pb::UpdateUserRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let request_id = mem::take(&mut request.request_id);
        let validate_only = mem::take(&mut request.validate_only);
        let request_id = fields.request_id("UpdateUser", &request_id, &request);
        let or_create = request.allow_missing.then(|| {
            let mut fields = Fields::default();
            let user = fields.new_user(request.user.clone().unwrap_or_default());
            fields.finish(user)
        });
        let change = fields.change(request.user, request.update_mask);
        let request_id = fields.finish(request_id)?;
        Ok(Self { change, or_create, request_id, validate_only })
    }
}

impl Delete {
    /// Parses the request.
    pub fn parse(mut request: pb::DeleteUserRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let request_id = mem::take(&mut request.request_id);
        let validate_only = mem::take(&mut request.validate_only);
        let request_id = fields.request_id("DeleteUser", &request_id, &request);
        let id = fields.id("id", &request.id);
        let revision = fields.revision("revision", request.revision);
        let ((id, expected_revision), request_id) = fields.finish(id.zip(revision).zip(request_id))?;
        Ok(Self {
            id,
            expected_revision,
            allow_missing: request.allow_missing,
            release_username: request.release_username,
            request_id,
            validate_only,
        })
    }
}

impl Undelete {
    /// Parses the request.
    pub fn parse(mut request: pb::UndeleteUserRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let request_id = mem::take(&mut request.request_id);
        let request_id = fields.request_id("UndeleteUser", &request_id, &request);
        let id = fields.id("id", &request.id);
        let username = match request.username.as_str() {
            "" => None,
            username => fields.username("username", username),
        };
        let (id, request_id) = fields.finish(id.zip(request_id))?;
        Ok(Self { id, username, request_id })
    }
}

impl Expunge {
    /// Parses the request.
    pub fn parse(mut request: pb::ExpungeUserRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let request_id = mem::take(&mut request.request_id);
        let request_id = fields.request_id("ExpungeUser", &request_id, &request);
        let id = fields.id("id", &request.id);
        let (id, request_id) = fields.finish(id.zip(request_id))?;
        Ok(Self { id, request_id })
    }
}

/// Elements of a list in a request, at most.
pub const BATCH_SIZE_MAX: usize = 1000;

impl Lookup {
    /// Parses the request.
    pub fn parse(request: pb::LookupUsersRequest) -> Result<Self, Error> {
        use pb::user_key::Key;
        let mut fields = Fields::default();
        let keys = fields.each("keys", request.keys, |fields, key| match key.key {
            Some(Key::Id(id)) => fields.id("id", &id).map(LookupKey::Id),
            Some(Key::Username(username)) => fields.username("username", &username).map(LookupKey::Username),
            Some(Key::Email(email)) => fields.email("email", &email).map(LookupKey::Email),
            None => {
                fields.refuse("key", reason::FIELD_REQUIRED, "give an id, a username or an e-mail address")
            }
        });
        let keys = fields.finish(keys.into_iter().collect())?;
        Ok(Self { keys, include_deleted: request.include_deleted })
    }
}

impl Batch<NewUser> {
    /// Parses the request.
    pub fn parse(mut request: pb::BatchCreateUsersRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let request_id = mem::take(&mut request.request_id);
        let validate_only = mem::take(&mut request.validate_only);
        let request_id = fields.request_id("BatchCreateUsers", &request_id, &request);
        let items = fields.each("items", request.items, |fields, item| {
            let user = fields.user(item.user)?;
            fields.new_user(user)
        });
        let items = items.into_iter().collect::<Option<_>>();
        let (items, request_id) = fields.finish(items.zip(request_id))?;
        Ok(Self { items, request_id, validate_only })
    }
}

impl Batch<UserPatch> {
    /// Parses the request.
    pub fn parse(mut request: pb::BatchUpdateUsersRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let request_id = mem::take(&mut request.request_id);
        let validate_only = mem::take(&mut request.validate_only);
        let request_id = fields.request_id("BatchUpdateUsers", &request_id, &request);
        let items =
            fields.each("items", request.items, |fields, item| fields.change(item.user, item.update_mask));
        fields.each_once("items", "user.id", items.iter().map(|change| change.id));
        let request_id = fields.finish(request_id)?;
        Ok(Self { items, request_id, validate_only })
    }
}

impl Batch<Removal> {
    /// Parses the request.
    pub fn parse(mut request: pb::BatchDeleteUsersRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let request_id = mem::take(&mut request.request_id);
        let validate_only = mem::take(&mut request.validate_only);
        let request_id = fields.request_id("BatchDeleteUsers", &request_id, &request);
        let items = fields.each("items", request.items, |fields, item| Removal {
            id: fields.id("id", &item.id).unwrap_or_default(),
            expected_revision: fields.revision("revision", item.revision).unwrap_or_default(),
        });
        fields.each_once("items", "id", items.iter().map(|removal| removal.id));
        let request_id = fields.finish(request_id)?;
        Ok(Self { items, request_id, validate_only })
    }
}

/// Users on a page unless the request says otherwise.
pub const PAGE_SIZE_DEFAULT: usize = 50;
/// Users on a page, at most.
pub const PAGE_SIZE_MAX: usize = 1000;

impl Page {
    /// Parses a [`pb::ListUsersRequest`].
    pub fn parse(request: &pb::ListUsersRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let size = match usize::try_from(request.page_size) {
            Ok(0) => Some(PAGE_SIZE_DEFAULT),
            Ok(size) => Some(size.min(PAGE_SIZE_MAX)),
            Err(_) => fields.refuse("page_size", reason::FIELD_INVALID, "must not be negative"),
        };
        let order = fields.order_by(request);
        let filter = request.filter.clone().unwrap_or_default();
        let selection = order.and_then(|order| fields.selection(order, filter));
        let (size, selection) = fields.finish(size.zip(selection))?;
        if request.page_token.is_empty() {
            return Ok(selection.first_page(size));
        }
        selection.page_after(&request.page_token, size).ok_or_else(|| {
            Error::invalid(
                "page_token",
                reason::PAGE_TOKEN_INVALID,
                "is not a token of a list with this order and filter",
            )
        })
    }
}

impl Selection {
    /// Parses the filter of a stream, whose users come in the order in which an index
    /// serves it. New users do not make it longer.
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
    /// All users, in whatever order is fastest.
    All {
        /// Soft-deleted ones too.
        include_deleted: bool,
    },
    /// Those that a filter selects, in the order in which an index serves it.
    Filtered(Selection),
}

impl Export {
    /// Parses the request.
    pub fn parse(request: pb::ExportUsersRequest) -> Result<Self, Error> {
        let filter = request.filter.unwrap_or_default();
        let include_deleted = filter.include_deleted;
        if filter == (pb::UserFilter { include_deleted, ..Default::default() }) {
            return Ok(Self::All { include_deleted });
        }
        Selection::parse(filter).map(Self::Filtered)
    }
}

/// Users in a chunk of an import, at most.
pub const CHUNK_SIZE_MAX: usize = 1000;

/// [`pb::ImportUsersRequest`].
#[derive(Debug)]
pub struct Chunk {
    /// The caller's, from 1 on.
    pub number: i64,
    /// What it is remembered by: SHA-256 of the import's id and the number.
    pub key: Vec<u8>,
    /// SHA-256 of the import's id and the content.
    pub fingerprint: Vec<u8>,
    /// What to do with users that exist.
    pub mode: pb::ImportMode,
    /// Those that are not refused for their own sake, in their order.
    pub users: Vec<ImportedUser>,
    /// The others.
    pub refused: Vec<pb::ImportFailure>,
    ids: HashSet<Uuid>,
    usernames: HashSet<String>,
}

/// A user of a chunk.
#[derive(Debug)]
pub struct ImportedUser {
    /// The user.
    pub user: NewUser,
    /// Whether the caller gave the id.
    pub has_id: bool,
}

impl Chunk {
    /// Parses the request. A user that is refused does not refuse the chunk.
    pub fn parse(request: pb::ImportUsersRequest) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let import_id = fields.id("import_id", &request.import_id);
        let number = match request.chunk {
            0 => fields.refuse("chunk", reason::FIELD_REQUIRED, "is required"),
            ..0 => fields.refuse("chunk", reason::FIELD_INVALID, "must not be negative"),
            number => Some(number),
        };
        let mode = match request.mode() {
            _ if pb::ImportMode::try_from(request.mode).is_err() => {
                fields.refuse("mode", reason::FIELD_INVALID, "is not a mode")
            }
            pb::ImportMode::Unspecified => Some(pb::ImportMode::CreateOnly),
            mode => Some(mode),
        };
        let users = match request.users.len() {
            0 => fields.refuse("users", reason::FIELD_REQUIRED, "is required"),
            1..=CHUNK_SIZE_MAX => Some(()),
            _ => {
                let what = format!("must have at most {CHUNK_SIZE_MAX} users");
                fields.refuse("users", reason::BATCH_TOO_LARGE, what)
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
            refused: Vec::new(),
            ids: HashSet::new(),
            usernames: HashSet::new(),
        };
        for (position, user) in (0..).zip(request.users) {
            let mut fields = Fields::default();
            let has_id = !user.id.is_empty();
            let user = fields
                .new_user(user)
                .filter(|user| fields.is_first(user, &mut chunk.ids, &mut chunk.usernames));
            match fields.finish(user) {
                Ok(user) => chunk.users.push(ImportedUser { user, has_id }),
                Err(error) => chunk.refused.push(failure(position, error)),
            }
        }
        Ok(chunk)
    }

    /// Whether there is an id or a username, or the number, that both have.
    pub fn meets(&self, other: &Self) -> bool {
        self.key == other.key
            || !self.ids.is_disjoint(&other.ids)
            || !self.usernames.is_disjoint(&other.usernames)
    }
}

/// What is wrong with the user at this position of a chunk.
fn failure(position: i32, error: Error) -> pb::ImportFailure {
    let Error::Invalid(violations) = error else { return pb::ImportFailure::default() };
    let violations = violations.into_iter().map(|Violation { field, reason, description, .. }| {
        // There is nothing around the user that would have to be named.
        let field = field.strip_prefix("user.").unwrap_or(&field).to_owned();
        pb::ImportViolation { field, reason: reason.to_owned(), description }
    });
    pb::ImportFailure { position, violations: violations.collect() }
}

/// [`pb::WatchUsersRequest`].
#[derive(Debug)]
pub struct Watch {
    /// Which users; `None`: all.
    pub filter: Option<Selection>,
    /// ChangesSince which point; `None`: now.
    pub point: Option<LogPosition>,
    /// What comes first of an initial state.
    pub initial_state: Option<Page>,
}

/// Users of an initial state that are read at a time.
const INITIAL_STATE_PAGE_SIZE: usize = 500;

impl Watch {
    /// Parses the request.
    pub fn parse(request: pb::WatchUsersRequest) -> Result<Self, Error> {
        let all = pb::UserFilter { include_deleted: true, ..Default::default() };
        let filter = request.filter.filter(|filter| *filter != all).map(Selection::parse).transpose()?;
        let selection = filter.clone().map_or_else(|| Selection::parse(all), Ok)?;
        match (request.resume_token.as_str(), request.send_initial_state) {
            ("", false) => Ok(Self { filter, point: None, initial_state: None }),
            ("", true) => {
                let initial_state = Some(selection.first_page(INITIAL_STATE_PAGE_SIZE));
                Ok(Self { filter, point: None, initial_state })
            }
            (_, true) => {
                let what = "goes without resume_token: the token says where to go on";
                Err(Error::invalid("send_initial_state", reason::FIELD_INVALID, what))
            }
            (token, false) => Self::resume(token, filter, selection).ok_or_else(|| {
                let what = "is not a whole token of ListUsers, ExportUsers, or WatchUsers with this filter: \
                            begin anew with send_initial_state";
                Error::invalid("resume_token", reason::RESUME_TOKEN_INVALID, what)
            }),
        }
    }

    fn resume(token: &str, filter: Option<Selection>, selection: Selection) -> Option<Self> {
        let token = match (LogPosition::from_token(token), &filter) {
            // Of another rpc: good for every filter.
            (Some(position), _) => ResumeToken { position, page_token: None },
            (None, Some(filter)) => ResumeToken::parse(&filter.decode_watch_token(token)?)?,
            (None, None) => ResumeToken::parse(token)?,
        };
        let ResumeToken { position, page_token } = token;
        let initial_state = match page_token {
            Some(token) => Some(selection.page_after(&token, INITIAL_STATE_PAGE_SIZE)?),
            None => None,
        };
        Some(Self { filter, point: Some(position), initial_state })
    }
}

/// The fields of an update that a mask selects.
enum Mask {
    /// Those that have a value.
    Populated,
    /// All.
    All,
    /// The named ones.
    Paths(Vec<String>),
}

impl Mask {
    fn selects(&self, path: &str, value: &str) -> bool {
        match self {
            Self::Populated => !value.is_empty(),
            Self::All => true,
            Self::Paths(paths) => paths.iter().any(|p| p == path),
        }
    }
}

/// Parses field by field and collects what is refused. Each function returns
/// `None` when it has refused something.
#[derive(Default)]
struct Fields {
    /// The element of a list whose fields they are.
    element: Option<Element>,
    violations: Vec<Violation>,
}

impl Fields {
    fn finish<T>(mut self, value: Option<T>) -> Result<T, Error> {
        match value {
            Some(value) if self.violations.is_empty() => Ok(value),
            _ => {
                self.violations.sort_by_key(|violation| violation.element.map(|element| element.index));
                Err(Error::Invalid(self.violations))
            }
        }
    }

    /// Parses each element of a list; what is refused in it is named by its place.
    fn each<I, T>(
        &mut self,
        list: &'static str,
        elements: Vec<I>,
        mut parse: impl FnMut(&mut Self, I) -> T,
    ) -> Vec<T> {
        if elements.is_empty() {
            self.refuse::<()>(list, reason::FIELD_REQUIRED, "is required");
        }
        if elements.len() > BATCH_SIZE_MAX {
            self.refuse::<()>(list, reason::BATCH_TOO_LARGE, format!("may have at most {BATCH_SIZE_MAX}"));
            return Vec::new();
        }
        let mut parsed = Vec::with_capacity(elements.len());
        for (index, element) in elements.into_iter().enumerate() {
            self.element = Some(Element { list, index });
            parsed.push(parse(self, element));
        }
        self.element = None;
        parsed
    }

    /// Refuses each element with an id that another one has, too. Ids that were
    /// refused themselves are nil.
    fn each_once(&mut self, list: &'static str, field: &str, ids: impl Iterator<Item = Uuid> + Clone) {
        let (mut seen, mut repeated) = (HashSet::new(), HashSet::new());
        repeated.extend(ids.clone().filter(|id| !id.is_nil() && !seen.insert(*id)));
        for (index, _) in ids.enumerate().filter(|(_, id)| repeated.contains(id)) {
            self.element = Some(Element { list, index });
            self.refuse::<()>(field, reason::FIELD_INVALID, "another item has this id, too");
        }
        self.element = None;
    }

    fn refuse<T>(&mut self, field: &str, reason: &'static str, what: impl Into<String>) -> Option<T> {
        let (field, description) = (field.to_owned(), what.into());
        self.violations.push(Violation { element: self.element, field, reason, description });
        None
    }

    fn required<'a>(&mut self, field: &str, text: &'a str) -> Option<&'a str> {
        match text {
            "" => self.refuse(field, reason::FIELD_REQUIRED, "is required"),
            text => Some(text),
        }
    }

    fn id(&mut self, field: &str, text: &str) -> Option<Uuid> {
        let text = self.required(field, text)?;
        match Uuid::try_parse(text) {
            // The parser knows other forms too; the nil UUID is a variable that
            // somebody forgot to set.
            Ok(id) if text.len() == 36 && !id.is_nil() => Some(id),
            _ => self.refuse(
                field,
                reason::FIELD_INVALID,
                "must be a UUID, in its hyphenated form and not nil",
            ),
        }
    }

    fn request_id(&mut self, rpc: &str, text: &str, request: &impl Message) -> Option<RequestId> {
        if text.is_empty() {
            return Some(RequestId { id: None, fingerprint: Vec::new() });
        }
        let id = self.id("request_id", text)?;
        let content = Sha256::new().chain_update(rpc).chain_update(id).chain_update(request.encode_to_vec());
        Some(RequestId { id: Some(id), fingerprint: content.finalize().to_vec() })
    }

    fn user(&mut self, user: Option<pb::User>) -> Option<pb::User> {
        user.or_else(|| self.refuse("user", reason::FIELD_REQUIRED, "is required"))
    }

    fn new_user(&mut self, user: pb::User) -> Option<NewUser> {
        let id = match user.id.as_str() {
            "" => Some(Uuid::now_v7()),
            id => self.id("user.id", id),
        };
        let username = self.username("user.username", &user.username);
        let email = self.email("user.email", &user.email);
        let display_name = self.display_name("user.display_name", user.display_name);
        let salt = rand::random();
        Some(NewUser { id: id?, username: username?, email: email?, display_name: display_name?, salt })
    }

    /// What is refused has a value here all the same: it does not get past
    /// [`Fields::finish`].
    fn change(&mut self, user: Option<pb::User>, mask: Option<FieldMask>) -> UserPatch {
        let mask = self.update_mask(mask);
        let user = self.user(user).unwrap_or_default();
        let expected_revision = self.revision("user.revision", user.revision);
        let mut change = UserPatch {
            id: self.id("user.id", &user.id).unwrap_or_default(),
            expected_revision: expected_revision.unwrap_or_default(),
            username: None,
            email: None,
            display_name: None,
        };
        if mask.selects("username", &user.username) {
            change.username = self.username("user.username", &user.username);
        }
        if mask.selects("email", &user.email) {
            change.email = self.email("user.email", &user.email);
        }
        if mask.selects("display_name", &user.display_name) {
            change.display_name = self.display_name("user.display_name", user.display_name);
        }
        change
    }

    /// Whether neither its id nor its username came earlier in the same chunk.
    fn is_first(&mut self, user: &NewUser, ids: &mut HashSet<Uuid>, usernames: &mut HashSet<String>) -> bool {
        if !ids.insert(user.id) {
            self.refuse::<()>("user.id", reason::USER_ID_TAKEN, "another user of this chunk has this id");
        }
        if !usernames.insert(user.username.canonical().to_owned()) {
            let what = "another user of this chunk has this username";
            self.refuse::<()>("user.username", reason::USERNAME_TAKEN, what);
        }
        self.violations.is_empty()
    }

    fn username(&mut self, field: &str, text: &str) -> Option<Username> {
        Username::parse(self.required(field, text)?)
            .map_or_else(|what| self.refuse(field, reason::USERNAME_INVALID, what), Some)
    }

    fn email(&mut self, field: &str, text: &str) -> Option<Email> {
        Email::parse(self.required(field, text)?)
            .map_or_else(|what| self.refuse(field, reason::EMAIL_INVALID, what), Some)
    }

    fn display_name(&mut self, field: &str, text: String) -> Option<String> {
        match names::check_display_name(&text) {
            Ok(()) => Some(text),
            Err(what) => self.refuse(field, reason::FIELD_INVALID, what),
        }
    }

    fn revision(&mut self, field: &str, revision: i64) -> Option<i64> {
        if revision < 0 {
            return self.refuse(field, reason::FIELD_INVALID, "must not be negative");
        }
        Some(revision)
    }

    fn update_mask(&mut self, mask: Option<FieldMask>) -> Mask {
        let paths = mask.unwrap_or_default().paths;
        match paths.as_slice() {
            [] => return Mask::Populated,
            [star] if star == "*" => return Mask::All,
            _ => {}
        }
        let is_known = |path: &str| {
            matches!(
                path,
                "id" | "username"
                    | "email"
                    | "display_name"
                    | "create_time"
                    | "update_time"
                    | "delete_time"
                    | "purge_time"
                    | "revision"
            )
        };
        if !paths.iter().all(|path| is_known(path)) {
            self.refuse::<()>(
                "update_mask",
                reason::UPDATE_MASK_INVALID,
                "may have fields of User, or `*` alone",
            );
        }
        Mask::Paths(paths)
    }

    fn order_by(&mut self, request: &pb::ListUsersRequest) -> Option<Order> {
        match pb::OrderBy::try_from(request.order_by) {
            Ok(pb::OrderBy::Unspecified | pb::OrderBy::CreateTimeDesc) => Some(Order::CreateTimeDesc),
            Ok(pb::OrderBy::CreateTimeAsc) => Some(Order::CreateTimeAsc),
            Ok(pb::OrderBy::UsernameAsc) => Some(Order::UsernameAsc),
            Err(_) => self.refuse("order_by", reason::FIELD_INVALID, "is not an order"),
        }
    }

    fn selection(&mut self, order: Order, filter: pb::UserFilter) -> Option<Selection> {
        let after = filter.create_time_after.map(|t| self.time("filter.create_time_after", t));
        let before = filter.create_time_before.map(|t| self.time("filter.create_time_before", t));
        let email = Some(filter.email.as_str()).filter(|email| !email.is_empty());
        let email = email.map(|email| self.email("filter.email", email));
        let prefix = Some(filter.username_prefix.as_str()).filter(|prefix| !prefix.is_empty());
        let prefix = prefix.map(|prefix| {
            KeyRange::of_prefix(prefix)
                .map_or_else(|what| self.refuse("filter.username_prefix", reason::FIELD_INVALID, what), Some)
        });
        let by_username = order == Order::UsernameAsc;
        if by_username && (email.is_some() || after.is_some() || before.is_some()) {
            let what = "email and create_time go neither with username_prefix nor with the order by username";
            return self.refuse("filter", reason::FILTER_UNSUPPORTED, what);
        }
        if !by_username && prefix.is_some() {
            let what = "goes with the order by username only";
            return self.refuse("filter.username_prefix", reason::FILTER_UNSUPPORTED, what);
        }
        let email_key = match email {
            Some(email) => Some(email?.canonical().to_owned()),
            None => None,
        };
        let (from, to) = if by_username {
            let range = prefix.unwrap_or_else(|| Some(KeyRange::all()))?;
            (Key::Username(range.from), Key::Username(range.to))
        } else {
            // Columns have microseconds. Later than 1.5 µs is later than 1 µs,
            // earlier than 1.5 µs is earlier than 2 µs.
            let after = after.unwrap_or(Some(MIN_TIME)).map(|t| to_system_time(t.seconds, t.nanos / 1000));
            let before =
                before.unwrap_or(Some(MAX_TIME)).map(|t| to_system_time(t.seconds, (t.nanos + 999) / 1000));
            (Key::Time(after?), Key::Time(before?))
        };
        // Positions are exclusive: behind every user with the time `from`, but in
        // front of the first one with the username `from`.
        let first_id = if by_username { Uuid::nil() } else { Uuid::max() };
        Some(Selection {
            order,
            email_key,
            include_deleted: filter.include_deleted,
            from: Position { key: from, id: first_id },
            to: Position { key: to, id: Uuid::nil() },
        })
    }

    fn time(&mut self, field: &str, time: Timestamp) -> Option<Timestamp> {
        let in_range = (MIN_TIME.seconds..=MAX_TIME.seconds).contains(&time.seconds);
        if !in_range || !(0..1_000_000_000).contains(&time.nanos) {
            return self.refuse(field, reason::FIELD_INVALID, "must be a time in the years 1 to 9999");
        }
        Some(time)
    }
}

/// 0001-01-01T00:00:00Z, the first that a protobuf timestamp may be.
const MIN_TIME: Timestamp = Timestamp { seconds: -62_135_596_800, nanos: 0 };
/// 9999-12-31T23:59:59Z, in the last second that it may be.
const MAX_TIME: Timestamp = Timestamp { seconds: 253_402_300_799, nanos: 0 };

fn to_system_time(seconds: i64, micros: i32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let whole = if seconds < 0 { SystemTime::UNIX_EPOCH - whole } else { SystemTime::UNIX_EPOCH + whole };
    whole + Duration::from_micros(micros.unsigned_abs().into())
}

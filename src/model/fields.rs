//! Parses requests field by field and collects every violation.

use std::time::{Duration, SystemTime};

use prost::Message;
use prost_types::Timestamp;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::error::{Element, Error, Violation};
use crate::model::names::{self, Email, KeyRange, Username};
use crate::model::page::{Key, Order, Position, Selection};
use crate::model::view::View;
use crate::pb;
use crate::pb::ErrorReason as Reason;

/// The largest number of elements of a list in a request.
const BATCH_SIZE_MAX: usize = 1000;
/// The same with [`View::Full`], so that a response fits into 4 MiB however large users become.
const FULL_BATCH_SIZE_MAX: usize = 100;

/// What makes a retry safe: the caller's id for the change, and a fingerprint of the change.
/// Without an id, nothing is recorded.
#[derive(Debug, Clone)]
pub struct RequestId {
    /// The caller's id.
    pub id: Option<Uuid>,
    /// SHA-256 of the rpc, the id and the rest of the request.
    pub fingerprint: Vec<u8>,
}

/// Parses field by field and collects what is rejected. Each function returns
/// `None` when it has rejected something.
#[derive(Default)]
pub(super) struct Fields {
    /// The element of a list that is being parsed.
    pub(super) element: Option<Element>,
    violations: Vec<Violation>,
}

impl Fields {
    pub(super) fn finish<T>(mut self, value: Option<T>) -> Result<T, Error> {
        match value {
            Some(value) if self.violations.is_empty() => Ok(value),
            _ => {
                self.violations.sort_by_key(|violation| violation.element.map(|element| element.index));
                Err(Error::Invalid(self.violations))
            }
        }
    }

    /// Parses each element of a list; violations name its position.
    pub(super) fn each<I, T>(
        &mut self,
        list: &'static str,
        view: View,
        elements: Vec<I>,
        mut parse: impl FnMut(&mut Self, I) -> T,
    ) -> Vec<T> {
        if elements.is_empty() {
            self.reject::<()>(list, Reason::FieldRequired, "is required");
        }
        let max = if view == View::Full { FULL_BATCH_SIZE_MAX } else { BATCH_SIZE_MAX };
        if elements.len() > max {
            self.reject::<()>(list, Reason::BatchTooLarge, format!("may have at most {max} with this view"));
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

    /// Whether nothing was rejected so far.
    pub(super) fn is_valid(&self) -> bool {
        self.violations.is_empty()
    }

    pub(super) fn reject<T>(&mut self, field: &str, reason: Reason, what: impl Into<String>) -> Option<T> {
        let (field, description) = (field.to_owned(), what.into());
        self.violations.push(Violation { element: self.element, field, reason, description });
        None
    }

    fn required<'a>(&mut self, field: &str, text: &'a str) -> Option<&'a str> {
        match text {
            "" => self.reject(field, Reason::FieldRequired, "is required"),
            text => Some(text),
        }
    }

    pub(super) fn id(&mut self, field: &str, text: &str) -> Option<Uuid> {
        let text = self.required(field, text)?;
        match Uuid::try_parse(text) {
            // The parser accepts other forms too. The nil UUID is a variable that was not set.
            Ok(id) if text.len() == 36 && !id.is_nil() => Some(id),
            _ => {
                self.reject(field, Reason::FieldInvalid, "must be a UUID, in its hyphenated form and not nil")
            }
        }
    }

    pub(super) fn request_id(&mut self, rpc: &str, text: &str, request: &impl Message) -> Option<RequestId> {
        if text.is_empty() {
            return Some(RequestId { id: None, fingerprint: Vec::new() });
        }
        let id = self.id("request_id", text)?;
        let content = Sha256::new().chain_update(rpc).chain_update(id).chain_update(request.encode_to_vec());
        Some(RequestId { id: Some(id), fingerprint: content.finalize().to_vec() })
    }

    pub(super) fn user(&mut self, user: Option<pb::User>) -> Option<pb::User> {
        user.or_else(|| self.reject("user", Reason::FieldRequired, "is required"))
    }

    pub(super) fn username(&mut self, field: &str, text: &str) -> Option<Username> {
        Username::parse(self.required(field, text)?)
            .map_or_else(|what| self.reject(field, Reason::UsernameInvalid, what), Some)
    }

    pub(super) fn email(&mut self, field: &str, text: &str) -> Option<Email> {
        Email::parse(self.required(field, text)?)
            .map_or_else(|what| self.reject(field, Reason::EmailInvalid, what), Some)
    }

    pub(super) fn display_name(&mut self, field: &str, text: String) -> Option<String> {
        match names::check_display_name(&text) {
            Ok(()) => Some(text),
            Err(what) => self.reject(field, Reason::FieldInvalid, what),
        }
    }

    pub(super) fn revision(&mut self, field: &str, revision: i64) -> Option<i64> {
        if revision < 0 {
            return self.reject(field, Reason::FieldInvalid, "must not be negative");
        }
        Some(revision)
    }

    pub(super) fn view(&mut self, view: i32) -> View {
        match pb::UserView::try_from(view) {
            Ok(pb::UserView::Full) => View::Full,
            Ok(pb::UserView::Unspecified | pb::UserView::Basic) => View::Basic,
            Err(_) => {
                self.reject::<()>("view", Reason::FieldInvalid, "is not a view");
                View::Basic
            }
        }
    }

    pub(super) fn order_by(&mut self, request: &pb::ListUsersRequest) -> Option<Order> {
        match pb::OrderBy::try_from(request.order_by) {
            Ok(pb::OrderBy::Unspecified | pb::OrderBy::CreateTimeDesc) => Some(Order::CreateTimeDesc),
            Ok(pb::OrderBy::CreateTimeAsc) => Some(Order::CreateTimeAsc),
            Ok(pb::OrderBy::UsernameAsc) => Some(Order::UsernameAsc),
            Err(_) => self.reject("order_by", Reason::FieldInvalid, "is not an order"),
        }
    }

    pub(super) fn selection(&mut self, order: Order, filter: pb::UserFilter) -> Option<Selection> {
        let after = filter.create_time_after.map(|t| self.time("filter.create_time_after", t));
        let before = filter.create_time_before.map(|t| self.time("filter.create_time_before", t));
        let email = Some(filter.email.as_str()).filter(|email| !email.is_empty());
        let email = email.map(|email| self.email("filter.email", email));
        let prefix = Some(filter.username_prefix.as_str()).filter(|prefix| !prefix.is_empty());
        let prefix = prefix.map(|prefix| {
            KeyRange::of_prefix(prefix)
                .map_or_else(|what| self.reject("filter.username_prefix", Reason::FieldInvalid, what), Some)
        });
        let by_username = order == Order::UsernameAsc;
        if by_username && (email.is_some() || after.is_some() || before.is_some()) {
            let what = "email and create_time go neither with username_prefix nor with the order by username";
            return self.reject("filter", Reason::FilterUnsupported, what);
        }
        if !by_username && prefix.is_some() {
            let what = "goes with the order by username only";
            return self.reject("filter.username_prefix", Reason::FilterUnsupported, what);
        }
        let email_key = match email {
            Some(email) => Some(email?.canonical().to_owned()),
            None => None,
        };
        let (from, to) = if by_username {
            let range = prefix.unwrap_or_else(|| Some(KeyRange::all()))?;
            (Key::Username(range.from), Key::Username(range.to))
        } else {
            // Columns have microseconds. Later than 1.5 µs is later than 1 µs, earlier than 1.5 µs
            // is earlier than 2 µs.
            let after = after.unwrap_or(Some(MIN_TIME)).map(|t| to_system_time(t.seconds, t.nanos / 1000));
            let before =
                before.unwrap_or(Some(MAX_TIME)).map(|t| to_system_time(t.seconds, (t.nanos + 999) / 1000));
            (Key::Time(after?), Key::Time(before?))
        };
        // Positions are exclusive: behind every user with the time `from`, but before the first
        // one with the username `from`.
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
            return self.reject(field, Reason::FieldInvalid, "must be a time in the years 1 to 9999");
        }
        Some(time)
    }
}

/// Whether a filter selects all users, or all live ones.
pub(super) fn is_unfiltered(filter: &pb::UserFilter) -> bool {
    let include_deleted = filter.include_deleted;
    *filter == (pb::UserFilter { include_deleted, ..Default::default() })
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

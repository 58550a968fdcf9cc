//! What usernames, e-mail addresses and display names may look like, and the
//! keys by which they are compared.
//!
//! Each is kept as it was typed. What does not fit is refused and never
//! repaired: stripping and replacing makes two different inputs meet.

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};
use precis_profiles::{
    UsernameCaseMapped,
    precis_core::profile::{PrecisFastInvocation, Rules},
};
use unicode_normalization::UnicodeNormalization;
use unicode_properties::{GeneralCategory, GeneralCategoryGroup, UnicodeGeneralCategory};
use unicode_security::MixedScript;
use uuid::Uuid;

/// Code points of a username, at least.
pub const USERNAME_MIN_LEN: usize = 3;
/// Code points of a username, at most.
pub const USERNAME_MAX_LEN: usize = 64;
/// Octets of an e-mail address, at most (RFC 5321 with erratum 1690).
pub const EMAIL_MAX_OCTETS: usize = 254;
/// Octets before the `@`, at most (RFC 5321).
pub const EMAIL_LOCAL_MAX_OCTETS: usize = 64;
/// Code points of a display name, at most.
pub const DISPLAY_NAME_MAX_LEN: usize = 100;

/// A username that may be taken, with the key that makes it unique.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Username {
    typed: String,
    key: String,
}

impl Username {
    /// Checks a username and makes its key; the error says what is wrong.
    pub fn parse(typed: &str) -> Result<Self, String> {
        let len = typed.chars().take(USERNAME_MAX_LEN + 1).count();
        if !(USERNAME_MIN_LEN..=USERNAME_MAX_LEN).contains(&len) {
            return Err(format!("must have {USERNAME_MIN_LEN} to {USERNAME_MAX_LEN} code points"));
        }
        let key = if typed.is_ascii() { typed.to_ascii_lowercase() } else { unicode_key(typed)? };
        check_username_key(&key)?;
        Ok(Self { typed: typed.to_owned(), key })
    }

    /// The username as it was typed.
    pub fn typed(&self) -> &str {
        &self.typed
    }

    /// Its canonical form: RFC 8265, UsernameCaseMapped.
    pub fn key(&self) -> &str {
        &self.key
    }
}

/// RFC 8265, UsernameCaseMapped, for what is not ASCII. The profile is not
/// idempotent for every input; a key that would map to yet another key is
/// refused, or a user could not be found by the name that the service returns.
fn unicode_key(typed: &str) -> Result<String, String> {
    const REFUSED: &str = "has characters that usernames may not have (RFC 8265)";
    let key = UsernameCaseMapped::enforce(typed).map_err(|_| REFUSED)?;
    match UsernameCaseMapped::enforce(key.as_ref()) {
        Ok(again) if again == key => Ok(key.into_owned()),
        _ => Err(REFUSED.into()),
    }
}

fn check_username_key(key: &str) -> Result<(), String> {
    let is_inner = |c| matches!(c, '.' | '_' | '-');
    let mut has_letter = false;
    for c in key.chars() {
        match c.general_category_group() {
            GeneralCategoryGroup::Letter => has_letter = true,
            GeneralCategoryGroup::Mark => {}
            _ if c.general_category() == GeneralCategory::DecimalNumber || is_inner(c) => {}
            _ => return Err("may have letters, digits, `.`, `_` and `-` only".into()),
        }
    }
    if key.starts_with(is_inner) || key.ends_with(is_inner) {
        return Err("must not start or end with `.`, `_` or `-`".into());
    }
    if !has_letter {
        return Err("must have at least one letter".into());
    }
    if !key.is_ascii() && !key.is_single_script() {
        return Err("must have letters of one script only (UTS #39)".into());
    }
    if Uuid::try_parse(key).is_ok() {
        return Err("must not have the form of a UUID".into());
    }
    Ok(())
}

/// The key space's part that a prefix of usernames selects: from, and up to but
/// not including.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    /// The first key that can be meant.
    pub from: String,
    /// The first key behind them.
    pub to: String,
}

impl KeyRange {
    /// All keys: no text is as large as the largest code point, which no
    /// username may have.
    pub fn all() -> Self {
        Self { from: String::new(), to: char::MAX.to_string() }
    }

    /// The keys that start with that of `prefix`. A prefix is not a username:
    /// it may be short or end in `.`, so only the mappings of the profile are
    /// applied, and none of its rules.
    pub fn of_prefix(prefix: &str) -> Result<Self, String> {
        if prefix.chars().nth(USERNAME_MAX_LEN).is_some() {
            return Err(format!("must have at most {USERNAME_MAX_LEN} code points"));
        }
        if prefix.contains(char::is_control) {
            return Err("must not have control characters".into());
        }
        let profile = UsernameCaseMapped::new();
        let from = profile
            .width_mapping_rule(prefix)
            .and_then(|s| profile.case_mapping_rule(s))
            .and_then(|s| profile.normalization_rule(s))
            .map_err(|_| "has characters that usernames may not have (RFC 8265)")?
            .into_owned();
        // Code point order is byte order in UTF-8, so that the first text behind
        // all that start with `abc` is `abd`.
        let mut to = from.clone();
        let last = to.pop().map_or(char::MAX, |c| (c..=char::MAX).nth(1).unwrap_or(char::MAX));
        to.push(last);
        Ok(Self { from, to })
    }
}

/// An e-mail address, with the key by which it is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Email {
    typed: String,
    key: String,
}

impl Email {
    /// Checks an e-mail address and makes its key; the error says what is wrong.
    ///
    /// The local part is a dot-atom of RFC 5322, with the letters of RFC 6531;
    /// the domain is a host name by IDNA (UTS #46).
    pub fn parse(typed: &str) -> Result<Self, String> {
        if typed.len() > EMAIL_MAX_OCTETS {
            return Err(format!("must have at most {EMAIL_MAX_OCTETS} octets"));
        }
        let Some((local, domain)) = typed.rsplit_once('@') else {
            return Err("must have the form local@domain".into());
        };
        if local.len() > EMAIL_LOCAL_MAX_OCTETS {
            return Err(format!("must have at most {EMAIL_LOCAL_MAX_OCTETS} octets before the @"));
        }
        if !local.split('.').all(is_atom) {
            return Err("is not an address: what stands before the @ is not allowed".into());
        }
        let domain = Uts46::new()
            .to_ascii(domain.as_bytes(), AsciiDenyList::STD3, Hyphens::Check, DnsLength::Verify)
            .map_err(|_| "is not an address: what stands after the @ is not a domain")?;
        let key = if local.is_ascii() {
            format!("{}@{domain}", local.to_ascii_lowercase())
        } else {
            format!("{}@{domain}", local.to_lowercase().nfc())
        };
        Ok(Self { typed: typed.to_owned(), key })
    }

    /// The address as it was typed.
    pub fn typed(&self) -> &str {
        &self.typed
    }

    /// The local part in lower case, `@`, and the domain as IDNA has it.
    pub fn key(&self) -> &str {
        &self.key
    }
}

/// RFC 5322 `atext`, and what RFC 6531 adds to it as far as it is letters, marks
/// and numbers.
fn is_atom(text: &str) -> bool {
    let is_atext = |c: char| {
        c.is_ascii_alphanumeric()
            || "!#$%&'*+/=?^_`{|}~-".contains(c)
            || !c.is_ascii()
                && matches!(
                    c.general_category_group(),
                    GeneralCategoryGroup::Letter | GeneralCategoryGroup::Mark | GeneralCategoryGroup::Number
                )
    };
    !text.is_empty() && text.chars().all(is_atext)
}

/// Checks a display name: any printable text. Refused are control characters,
/// line and paragraph separators, and what reorders the text around it (bidi
/// embeddings, overrides and isolates); joiners and variation selectors stay,
/// as scripts and emoji need them.
pub fn check_display_name(text: &str) -> Result<(), String> {
    if text.chars().nth(DISPLAY_NAME_MAX_LEN).is_some() {
        return Err(format!("must have at most {DISPLAY_NAME_MAX_LEN} code points"));
    }
    let is_hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    if text.contains(is_hidden) {
        return Err("must not have control characters, line breaks or bidi controls".into());
    }
    Ok(())
}

//! The rules of usernames, e-mail addresses and display names, and the keys by which they are
//! compared.
//!
//! Each is stored as entered. Invalid input is rejected, never corrected: stripping and
//! replacing would make two different inputs equal.

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};
use precis_profiles::{
    UsernameCaseMapped,
    precis_core::profile::{PrecisFastInvocation, Rules},
};
use unicode_normalization::UnicodeNormalization;
use unicode_properties::{GeneralCategory, GeneralCategoryGroup, UnicodeGeneralCategory};
use unicode_security::MixedScript;
use uuid::Uuid;

/// The smallest number of code points of a username.
pub const USERNAME_MIN_LEN: usize = 3;
/// The largest number of code points of a username.
pub const USERNAME_MAX_LEN: usize = 64;
/// The largest number of bytes of an e-mail address (RFC 5321 with erratum 1690).
pub const EMAIL_MAX_BYTES: usize = 254;
/// The largest number of bytes before the `@` (RFC 5321).
pub const EMAIL_LOCAL_MAX_BYTES: usize = 64;
/// The largest number of code points of a display name.
pub const DISPLAY_NAME_MAX_LEN: usize = 100;

/// The version of the rules that make keys of usernames and e-mail addresses: these functions
/// and the Unicode tables of the crates behind them. Each row has the version that made its
/// keys, so that an upgrade can find the rows to re-key. A test fails when a table changes.
pub const NORM_VERSION: i16 = 1;

/// A valid username, with the key that makes it unique.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Username {
    entered: String,
    key: String,
}

impl Username {
    /// Checks a username and makes its key; the error says what is wrong.
    pub fn parse(entered: &str) -> Result<Self, String> {
        let len = entered.chars().take(USERNAME_MAX_LEN + 1).count();
        if !(USERNAME_MIN_LEN..=USERNAME_MAX_LEN).contains(&len) {
            return Err(format!("must have {USERNAME_MIN_LEN} to {USERNAME_MAX_LEN} code points"));
        }
        let key = if entered.is_ascii() { entered.to_ascii_lowercase() } else { unicode_key(entered)? };
        check_username_key(&key)?;
        Ok(Self { entered: entered.to_owned(), key })
    }

    /// The username as the caller entered it.
    pub fn as_entered(&self) -> &str {
        &self.entered
    }

    /// Its canonical form: RFC 8265, UsernameCaseMapped.
    pub fn canonical(&self) -> &str {
        &self.key
    }
}

/// RFC 8265, UsernameCaseMapped, for names that are not ASCII. The profile is not idempotent for
/// every input. A key that would map to yet another key is rejected, because a user could not be
/// found by the name that the service returns.
fn unicode_key(entered: &str) -> Result<String, String> {
    const REJECTED: &str = "has characters that usernames may not have (RFC 8265)";
    let key = UsernameCaseMapped::enforce(entered).map_err(|_| REJECTED)?;
    match UsernameCaseMapped::enforce(key.as_ref()) {
        Ok(again) if again == key => Ok(key.into_owned()),
        _ => Err(REJECTED.into()),
    }
}

/// Allowed inside a username only.
const INNER: [char; 3] = ['.', '_', '-'];

fn check_username_key(key: &str) -> Result<(), String> {
    let mut has_letter = false;
    for c in key.chars() {
        // ASCII first, because the Unicode tables are large.
        match c {
            'a'..='z' => has_letter = true,
            '0'..='9' => {}
            _ if INNER.contains(&c) => {}
            _ => match c.general_category_group() {
                GeneralCategoryGroup::Letter => has_letter = true,
                GeneralCategoryGroup::Mark => {}
                _ if c.general_category() == GeneralCategory::DecimalNumber => {}
                _ => return Err("may have letters, digits, `.`, `_` and `-` only".into()),
            },
        }
    }
    if key.starts_with(INNER) || key.ends_with(INNER) {
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

/// The range of keys that a prefix of usernames selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    /// The first key of the range.
    pub from: String,
    /// The first key behind the range.
    pub to: String,
}

impl KeyRange {
    /// All keys. No username may have the largest code point.
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
    entered: String,
    key: String,
}

impl Email {
    /// Checks an e-mail address and makes its key; the error says what is wrong.
    ///
    /// The local part is a dot-atom of RFC 5322, with the letters of RFC 6531;
    /// the domain is a host name by IDNA (UTS #46).
    pub fn parse(entered: &str) -> Result<Self, String> {
        if entered.len() > EMAIL_MAX_BYTES {
            return Err(format!("must have at most {EMAIL_MAX_BYTES} bytes"));
        }
        let Some((local, domain)) = entered.rsplit_once('@') else {
            return Err("must have the form local@domain".into());
        };
        if local.len() > EMAIL_LOCAL_MAX_BYTES {
            return Err(format!("must have at most {EMAIL_LOCAL_MAX_BYTES} bytes before the @"));
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
        Ok(Self { entered: entered.to_owned(), key })
    }

    /// The address as the caller entered it.
    pub fn as_entered(&self) -> &str {
        &self.entered
    }

    /// The local part in lower case, `@`, and the domain as IDNA has it.
    pub fn canonical(&self) -> &str {
        &self.key
    }
}

/// RFC 5322 `atext`, and the letters, marks and numbers that RFC 6531 adds to it.
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

/// Checks a display name: any printable text. Characters of the category "other" are rejected:
/// control and format characters, some of which reorder the text around them, private use and
/// unassigned code points. Joiners are allowed, because scripts and emoji need them.
pub fn check_display_name(text: &str) -> Result<(), String> {
    if text.chars().nth(DISPLAY_NAME_MAX_LEN).is_some() {
        return Err(format!("must have at most {DISPLAY_NAME_MAX_LEN} code points"));
    }
    let is_printable = |c: char| match c.general_category_group() {
        GeneralCategoryGroup::Other => matches!(c, '\u{200c}' | '\u{200d}'),
        GeneralCategoryGroup::Separator => c.general_category() == GeneralCategory::SpaceSeparator,
        _ => true,
    };
    // ASCII first, as in usernames.
    if !text.chars().all(|c| matches!(c, ' '..='~') || is_printable(c)) {
        return Err("must be printable text, without control characters and line breaks".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(typed: &str) -> Option<String> {
        Username::parse(typed).ok().map(|username| username.key)
    }

    #[test]
    fn usernames_have_the_keys_of_rfc_8265_or_are_rejected() {
        let valid = [
            ("abc", "abc"),
            ("ABC", "abc"),
            ("a.b_c-d", "a.b_c-d"),
            ("user1", "user1"),
            ("1st", "1st"),
            ("J\u{fc}rgen", "j\u{fc}rgen"),
            ("Ju\u{308}rgen", "j\u{fc}rgen"),
            ("\u{ff21}\u{ff22}\u{ff23}", "abc"),
            ("\u{418}\u{432}\u{430}\u{43d}", "\u{438}\u{432}\u{430}\u{43d}"),
            ("\u{5d0}\u{5d1}\u{5d2}", "\u{5d0}\u{5d1}\u{5d2}"),
            ("\u{645}\u{62d}\u{645}\u{62f}", "\u{645}\u{62d}\u{645}\u{62f}"),
            // Han, Hiragana and Katakana are one script to UTS #39, as are Hangul and Han.
            ("\u{5c71}\u{7530}\u{3055}\u{3093}\u{30bf}", "\u{5c71}\u{7530}\u{3055}\u{3093}\u{30bf}"),
            ("\u{ae40}\u{cca0}\u{5c71}", "\u{ae40}\u{cca0}\u{5c71}"),
            // Devanagari needs marks.
            ("\u{930}\u{93e}\u{91c}\u{942}", "\u{930}\u{93e}\u{91c}\u{942}"),
            ("stra\u{df}e", "stra\u{df}e"),
        ];
        for (typed, expected) in valid {
            assert_eq!(key(typed).as_deref(), Some(expected), "{typed}");
        }
        let invalid = [
            "",
            "ab",
            "a b",
            "a@b",
            "abc\0",
            "abc\n",
            ".abc",
            "abc-",
            "_ab",
            "123",
            "1.2",
            "a\u{301}",
            "---",
            "p\u{430}ypal",
            "\u{3b1}bc",
            "\u{1f600}\u{1f600}\u{1f600}",
            "a\u{200d}bc",
            "a\u{200b}bc",
            "ab\u{ad}c",
            "\u{202e}abc",
            "a\u{b7}bc",
            "\u{2160}\u{2161}\u{2162}",
            "abc\u{2126}\u{212a}",
            "abc\u{fb01}",
            "6f0f7a1e-1111-4222-8333-944444444444",
            "6F0F7A1E111142228333944444444444",
        ];
        for typed in invalid {
            assert_eq!(key(typed), None, "{typed:?}");
        }
        assert!(key(&"x".repeat(64)).is_some() && key(&"x".repeat(65)).is_none());
        assert!(key(&"\u{438}".repeat(64)).is_some() && key(&"\u{438}".repeat(65)).is_none());
    }

    #[test]
    fn emails_have_keys_or_are_rejected() {
        let valid = [
            ("a@b", "a@b"),
            ("Al.Ice+tag@Example.COM", "al.ice+tag@example.com"),
            ("o'neil@example.com", "o'neil@example.com"),
            ("J\u{dc}RGEN@b\u{fc}cher.example", "j\u{fc}rgen@xn--bcher-kva.example"),
            ("ju\u{308}rgen@xn--bcher-kva.example", "j\u{fc}rgen@xn--bcher-kva.example"),
        ];
        for (typed, expected) in valid {
            assert_eq!(Email::parse(typed).unwrap().canonical(), expected);
        }
        let invalid = [
            "",
            "a",
            "@",
            "a@",
            "@b",
            "a@b@c",
            "a b@c",
            ".a@b",
            "a.@b",
            "a..b@c",
            "\"a b\"@c",
            "a@[127.0.0.1]",
            "a@b..c",
            "a@-b.c",
            "a@b_c",
            "a@b c",
            "a@b\0",
            "a\0@b",
            "(c)a@b",
            "a@b\u{202e}c",
            "\u{202e}a@b",
        ];
        for typed in invalid {
            assert!(Email::parse(typed).is_err(), "{typed:?}");
        }
        let long = |local: usize, domain: usize| {
            let labels = vec!["d".repeat(50); domain / 51 + 1].join(".");
            format!("{}@{}", "l".repeat(local), labels.chars().take(domain).collect::<String>())
        };
        assert!(Email::parse(&long(64, 100)).is_ok() && Email::parse(&long(65, 100)).is_err());
        assert!(Email::parse(&long(64, 189)).is_ok() && Email::parse(&long(64, 190)).is_err());
    }

    #[test]
    fn prefix_selects_the_keys_that_start_with_its_key() {
        let selects = |prefix: &str, key: &str| {
            let range = KeyRange::of_prefix(prefix).unwrap();
            range.from.as_str() <= key && key < range.to.as_str()
        };
        assert!(selects("AB", "ab") && selects("ab", "abc") && selects("ab", "ab\u{10fffd}"));
        assert!(!selects("ab", "aa\u{10fffd}") && !selects("ab", "ac") && !selects("ab", "a"));
        assert!(selects("\u{d7ff}", "\u{d7ff}x") && !selects("\u{d7ff}", "\u{e000}"));
    }

    #[test]
    fn display_names_may_be_any_printable_text() {
        for text in
            ["", "Alice", "\u{1f469}\u{200d}\u{1f4bb}", "\u{5d0} a", "<b>", "' --", &"\u{1f600}".repeat(100)]
        {
            assert_eq!(check_display_name(text), Ok(()), "{text:?}");
        }
        for text in [
            "\0",
            "a\nb",
            "\u{202e}",
            "\u{2067}",
            "\u{2028}",
            "\u{feff}",
            "\u{85}",
            "\u{200b}",
            "\u{e000}",
            "\u{fffe}",
            &"x".repeat(101),
        ] {
            assert!(check_display_name(text).is_err(), "{text:?}");
        }
    }

    /// Keys change with the Unicode tables of these crates. Before a new version of them is
    /// accepted here, raise [`NORM_VERSION`] and write the migration that re-keys older rows.
    #[test]
    fn version_of_the_rules_stands_for_these_unicode_tables() {
        assert_eq!(NORM_VERSION, 1);
        assert_eq!(unicode_normalization::UNICODE_VERSION, (18, 0, 0));
        assert_eq!(unicode_properties::UNICODE_VERSION, (18, 0, 0));
        assert_eq!(unicode_security::UNICODE_VERSION, (18, 0, 0));
    }

    proptest! {
        #[test]
        fn no_input_makes_a_parser_panic(text in any::<String>()) {
            let _ = (key(&text), Email::parse(&text), KeyRange::of_prefix(&text), check_display_name(&text));
        }

        /// So a user is found by its key and by every form of its name.
        #[test]
        fn key_of_a_key_is_the_same_key(text in "[\\p{L}\\p{M}\\p{Nd}._-]{3,12}") {
            if let Some(once) = key(&text) {
                prop_assert_eq!(key(&once), (once.chars().count() <= USERNAME_MAX_LEN).then_some(once));
            }
        }

        /// So a user is found by the canonical address, too.
        #[test]
        fn canonical_email_is_its_own_canonical_form(
            local in "[\\p{L}\\p{M}\\p{N}.+_-]{1,12}", domain in "[\\p{L}\\p{M}\\p{N}.-]{1,12}|[a-zA-Z]{1,9}\\.[A-Z]{1,9}"
        ) {
            if let Ok(email) = Email::parse(&format!("{local}@{domain}")) {
                let again = Email::parse(email.canonical());
                prop_assert_eq!(again.as_ref().map(Email::canonical), Ok(email.canonical()));
            }
        }

        #[test]
        fn usernames_that_differ_in_case_have_the_same_key(text in "[a-zA-Z0-9._-]{3,64}") {
            prop_assert_eq!(key(&text), key(&text.to_uppercase()));
            prop_assert_eq!(key(&text), key(&text.to_lowercase()));
        }

        /// The loop for ASCII and the profile are the same rule.
        #[test]
        fn ascii_names_have_the_key_of_the_profile(text in "[a-zA-Z0-9._-]{3,64}") {
            prop_assert_eq!(unicode_key(&text), Ok(text.to_ascii_lowercase()));
        }

        #[test]
        fn name_is_in_the_range_of_each_of_its_prefixes(text in "[\\p{L}\\p{Nd}]{3,12}", len in 1_usize..12) {
            if let Some(key) = key(&text) {
                let prefix: String = key.chars().take(len).collect();
                let range = KeyRange::of_prefix(&prefix).unwrap();
                prop_assert!(range.from <= key && key < range.to, "{:?} {:?}", range, key);
            }
        }
    }
}

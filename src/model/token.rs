//! The encoding of every token that clients receive.
//!
//! A token is encrypted and authenticated (AES-256-GCM-SIV, RFC 8452): a client can neither read
//! nor forge one. The associated data is a context that the token does not contain, such as the
//! list that a page token belongs to; a token is valid in its own context only.
//!
//! In URL-safe Base64: the id of the key (2 bytes), the nonce (12), the ciphertext and its tag
//! (16). All replicas share the keys, which are kept in the database.

use std::{fmt, iter};

use aes_gcm_siv::{
    Aes256GcmSiv, KeyInit,
    aead::{Aead, Payload},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

/// Length of a key in bytes.
pub const KEY_SIZE: usize = 32;

/// Length of the random nonce in bytes.
const NONCE_SIZE: usize = 12;

/// The largest length of a token in bytes; a longer one is rejected before it is decoded. The
/// longest tokens that the service makes are those of a position with many transactions in
/// flight; see [`LogPosition`](crate::model::position::LogPosition).
pub const TOKEN_MAX_LEN: usize = 64 * 1024;

/// The keys of tokens, as they were at one time. One key encodes, all of them decode.
pub struct TokenKeys {
    current: Key,
    others: Vec<Key>,
}

struct Key {
    id: i16,
    cipher: Aes256GcmSiv,
}

impl TokenKeys {
    /// The keys with these ids, of which the first one encodes; `None` if there are none.
    pub fn new(keys: impl IntoIterator<Item = (i16, [u8; KEY_SIZE])>) -> Option<Self> {
        let mut keys = keys.into_iter().map(|(id, key)| Key { id, cipher: Aes256GcmSiv::new(&key.into()) });
        Some(Self { current: keys.next()?, others: keys.collect() })
    }

    /// The ids of all keys; the first one encodes.
    pub fn ids(&self) -> impl Iterator<Item = i16> {
        self.all().map(|key| key.id)
    }

    /// Encodes a payload for one context.
    pub fn encode(&self, context: &[u8], payload: &[u8]) -> String {
        let Key { id, cipher } = &self.current;
        let nonce: [u8; NONCE_SIZE] = rand::random();
        // Fails for payloads of more than 64 GiB only.
        let sealed =
            cipher.encrypt(&nonce.into(), Payload { msg: payload, aad: context }).unwrap_or_default();
        URL_SAFE_NO_PAD.encode([&id.to_be_bytes(), nonce.as_slice(), &sealed].concat())
    }

    /// Returns the payload; `None` if the token was not made with one of these keys and for this
    /// context.
    pub fn decode(&self, context: &[u8], token: &str) -> Option<Vec<u8>> {
        if token.len() > TOKEN_MAX_LEN {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (id, rest) = bytes.split_first_chunk()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_SIZE>()?;
        let id = i16::from_be_bytes(*id);
        let key = self.all().find(|key| key.id == id)?;
        key.cipher.decrypt(&(*nonce).into(), Payload { msg: sealed, aad: context }).ok()
    }

    fn all(&self) -> impl Iterator<Item = &Key> {
        iter::once(&self.current).chain(&self.others)
    }
}

/// Shows the ids and never the keys.
impl fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ids()).finish()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Some keys with these ids.
    pub(in crate::model) fn keys(ids: &[u8]) -> TokenKeys {
        TokenKeys::new(ids.iter().map(|id| (i16::from(*id), [*id; KEY_SIZE]))).unwrap()
    }

    fn decoded(token: &str) -> Vec<u8> {
        URL_SAFE_NO_PAD.decode(token).unwrap()
    }

    #[test]
    fn token_is_decoded_while_its_key_is_known() {
        let token = keys(&[1]).encode(b"context", b"payload");
        for known in [&[1][..], &[2, 1], &[1, 2]] {
            assert_eq!(keys(known).decode(b"context", &token).as_deref(), Some(b"payload".as_slice()));
        }
        assert_eq!(keys(&[2]).decode(b"context", &token), None);
        assert_eq!(decoded(&keys(&[7, 1]).encode(b"", b""))[..2], [0, 7]);
        assert!(TokenKeys::new([]).is_none());
    }

    /// Releases share tokens during an upgrade. The values are those of RFC 8452, C.2.
    #[test]
    fn layout_of_tokens_is_fixed() {
        let key: [u8; KEY_SIZE] = std::array::from_fn(|n| u8::from(n == 0));
        let nonce: [u8; NONCE_SIZE] = std::array::from_fn(|n| if n == 0 { 3 } else { 0 });
        let payload = [2, 0, 0, 0, 0, 0, 0, 0];
        let sealed = "1de22967237a813291213f267e3b452f02d01ae33e4ec854";
        let sealed: Vec<u8> = (0..sealed.len())
            .step_by(2)
            .map(|n| u8::from_str_radix(&sealed[n..n + 2], 16).unwrap())
            .collect();
        let token = URL_SAFE_NO_PAD.encode([&[0, 1], nonce.as_slice(), &sealed].concat());
        let keys = TokenKeys::new([(1, key)]).unwrap();
        assert_eq!(keys.decode(&[1], &token).as_deref(), Some(payload.as_slice()));
    }

    #[test]
    fn equal_payloads_have_different_tokens() {
        let keys = keys(&[1]);
        assert_ne!(keys.encode(b"context", b"payload"), keys.encode(b"context", b"payload"));
    }

    #[test]
    fn token_over_the_limit_is_rejected() {
        let keys = keys(&[1]);
        let longest = keys.encode(b"", &vec![0; TOKEN_MAX_LEN / 4 * 3 - 30]);
        assert_eq!(longest.len(), TOKEN_MAX_LEN);
        assert!(keys.decode(b"", &longest).is_some());
        let longer = keys.encode(b"", &vec![0; TOKEN_MAX_LEN / 4 * 3 - 29]);
        assert_eq!(keys.decode(b"", &longer), None);
    }

    #[test]
    fn debug_output_has_no_key() {
        assert_eq!(format!("{:?}", keys(&[201, 202])), "[201, 202]");
    }

    proptest! {
        #[test]
        fn payload_is_returned_in_its_context_only(context: Vec<u8>, other: Vec<u8>, payload: Vec<u8>) {
            let keys = keys(&[1]);
            let token = keys.encode(&context, &payload);
            prop_assert_eq!(keys.decode(&context, &token), Some(payload));
            prop_assert!(context == other || keys.decode(&other, &token).is_none());
        }

        /// Random bytes behind the id of a known key are rejected, too.
        #[test]
        fn forged_token_is_rejected(context: Vec<u8>, text: String, bytes: Vec<u8>) {
            let keys = keys(&[1]);
            let forged = [text, URL_SAFE_NO_PAD.encode(&bytes), URL_SAFE_NO_PAD.encode([vec![0, 1], bytes].concat())];
            for token in forged {
                prop_assert_eq!(keys.decode(&context, &token), None);
            }
        }

        /// The known keys include the one that a flipped bit of the id names.
        #[test]
        fn token_with_a_flipped_bit_is_rejected(payload: Vec<u8>, bit: prop::sample::Index) {
            let keys = keys(&[1, 0, 3, 5, 9, 17, 33, 65, 129]);
            let token = keys.encode(b"context", &payload);
            let mut bytes = decoded(&token);
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(keys.decode(b"context", &URL_SAFE_NO_PAD.encode(bytes)), None);
            let mut text = token.into_bytes();
            let character = bit % text.len();
            text[character] ^= 1;
            prop_assert_eq!(keys.decode(b"context", &String::from_utf8(text).unwrap()), None);
        }

        #[test]
        fn token_that_is_cut_or_extended_is_rejected(payload: Vec<u8>, len: prop::sample::Index, more in "[A-Za-z0-9_-]{1,9}") {
            let keys = keys(&[1]);
            let token = keys.encode(b"context", &payload);
            prop_assert_eq!(keys.decode(b"context", &token[..len.index(token.len())]), None);
            prop_assert_eq!(keys.decode(b"context", &(token + &more)), None);
        }
    }
}

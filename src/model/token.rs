//! The encoding of every token that clients receive.
//!
//! A token is a checksum and a payload in URL-safe Base64. The checksum also covers a
//! context that the token does not contain, such as the list that a page token belongs to.
//! It detects accidents: a token that is cut short or used in another context. It does not
//! prevent forgery. A forged token can only name another position in data that its sender
//! may read anyway; each type that is read from a payload validates it.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};

/// Length of the checksum in bytes.
const CHECKSUM_SIZE: usize = 8;

/// Encodes a payload for one context.
pub fn encode_token(context: &[u8], payload: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode([&checksum(context, payload), payload].concat())
}

/// Returns the payload, or `None` if the token is damaged or belongs to another context.
pub fn decode_token(context: &[u8], token: &str) -> Option<Vec<u8>> {
    let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
    let (expected, payload) = bytes.split_first_chunk()?;
    (*expected == checksum(context, payload)).then(|| payload.to_vec())
}

fn checksum(context: &[u8], payload: &[u8]) -> [u8; CHECKSUM_SIZE] {
    let hash = Sha256::new().chain_update(context).chain_update([0]).chain_update(payload).finalize();
    let mut checksum = [0; CHECKSUM_SIZE];
    checksum.copy_from_slice(hash.split_at(CHECKSUM_SIZE).0);
    checksum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_rejected_in_another_context_or_when_damaged() {
        let token = encode_token(b"context", b"payload");
        assert_eq!(decode_token(b"context", &token).as_deref(), Some(b"payload".as_slice()));
        assert_eq!(decode_token(b"another", &token), None);
        assert!((0..token.len()).all(|len| decode_token(b"context", token.split_at(len).0).is_none()));
    }
}

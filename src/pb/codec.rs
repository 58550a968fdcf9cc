//! The codec of messages: protobuf with a limit on the number of elements, and messages that
//! are encoded once for many streams.
//!
//! An element of two bytes on the wire can take two hundred in memory, so the limit on the size
//! of a message does not bound the memory that decoding takes. The lower limit of each rpc is
//! checked later, when the rejected elements can be named.

use std::marker::PhantomData;

use prost::{
    DecodeError, Message,
    bytes::{Buf, BufMut, Bytes},
    encoding::{DecodeContext, WireType, decode_key, skip_field},
};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::error::Error;

/// The largest number of fields of a message, each element of a list counted: ten times as many
/// as the largest list that an rpc takes.
const MAX_FIELDS: usize = 10_000;

/// Protobuf with bounded decoding. The generated code names it.
#[derive(Debug)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(ProstCodec::<T, U>::default().decoder())
    }
}

/// Decodes messages that do not have too many elements.
#[derive(Debug)]
pub struct BoundedDecoder<U>(ProstDecoder<U>);

impl<U: Message + Default> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        if has_too_many_fields(message.chunk()) {
            return Err(Error::too_many_elements().into());
        }
        self.0.decode(message)
    }
}

/// False for bytes that are not protobuf: the decoder reports them better.
fn has_too_many_fields(mut message: &[u8]) -> bool {
    let mut skip = || {
        let (tag, wire_type) = decode_key(&mut message).ok()?;
        skip_field(wire_type, tag, &mut message, DecodeContext::default()).ok()
    };
    (0..=MAX_FIELDS).all(|_| skip().is_some())
}

/// An encoded message; a clone shares its bytes.
#[derive(Debug, Clone)]
pub struct Encoded(Bytes);

impl Encoded {
    /// Encodes a message.
    pub fn new(message: &impl Message) -> Self {
        Self(message.encode_to_vec().into())
    }

    /// The message that was encoded.
    pub fn decode<T: Message + Default>(&self) -> Result<T, DecodeError> {
        T::decode(self.0.clone())
    }
}

impl Message for Encoded {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    /// Never used: the service only sends it.
    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        skip_field(wire_type, tag, buf, context)
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_up_to_the_limit() {
        let empty_elements = |count| [0x22, 0].repeat(count);
        assert!(!has_too_many_fields(&empty_elements(MAX_FIELDS)));
        assert!(has_too_many_fields(&empty_elements(MAX_FIELDS + 1)));
        assert!(!has_too_many_fields(&[0xff; 100_000]));
        assert!(!has_too_many_fields(&[]));
    }
}

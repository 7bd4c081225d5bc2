//! How servers read requests: understood whole, or refused.
//!
//! Protocol Buffers skip fields that the reader does not know, so part of what was asked could be lost without a word.
//! prost writes every message in its shortest form; a request that is longer than what was understood of it therefore
//! says something else as well. Clients read answers with tonic's own codec: a newer controller may say more.

use std::marker::PhantomData;

use prost::{Message, bytes::Buf};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder},
};
use tonic_prost::ProstEncoder;

use crate::error::ApiError;

/// For the side that answers: `A` are answers, `Q` requests.
pub struct ServerCodec<A, Q>(PhantomData<(A, Q)>);

impl<A, Q> Default for ServerCodec<A, Q> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<A, Q> Codec for ServerCodec<A, Q>
where
    A: Message + Send + 'static,
    Q: Message + Default + Send + 'static,
{
    type Encode = A;
    type Decode = Q;
    type Encoder = ProstEncoder<A>;
    type Decoder = WholeDecoder<Q>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        WholeDecoder(PhantomData)
    }
}

pub struct WholeDecoder<Q>(PhantomData<Q>);

impl<Q: Message + Default> Decoder for WholeDecoder<Q> {
    type Item = Q;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<Q>, Status> {
        Ok(Some(understand(bytes)?))
    }
}

fn understand<Q: Message + Default>(bytes: impl Buf) -> Result<Q, ApiError> {
    let length = bytes.remaining();
    let message = Q::decode(bytes).map_err(|error| ApiError::invalid(format!("the request is malformed: {error}")))?;
    match message.encoded_len() {
        understood if understood == length => Ok(message),
        understood => Err(ApiError::invalid(format!(
            "the request has fields that this version does not know: {understood} of its {length} bytes are understood"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proto::{ListRequest, NamedRef, SetTagRequest};

    fn tag() -> SetTagRequest {
        SetTagRequest { tenant: "acme".into(), key: "k".into(), value: "v".into(), expected_version: Some(0) }
    }

    #[test]
    fn what_is_understood_is_taken_and_anything_more_is_refused() {
        let bytes = tag().encode_to_vec();
        assert_eq!(understand::<SetTagRequest>(&*bytes).unwrap(), tag());
        // Field 99, a varint; then the same inside of a message in the message; then a field that is there already.
        let more = [&bytes[..], &[0x98, 0x06, 0x01]].concat();
        let inside = [0x22, 0x03, 0x98, 0x06, 0x01];
        let twice = [&bytes[..], &[0x0a, 0x01, b'x']].concat();
        for refused in [
            understand::<SetTagRequest>(&*more).unwrap_err(),
            understand::<ListRequest>(&inside[..]).unwrap_err(),
            understand::<SetTagRequest>(&*twice).unwrap_err(),
        ] {
            assert_eq!(refused.code, "invalid-argument", "{refused}");
            assert!(refused.message.contains("does not know"), "{refused}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_message_that_says_all_of_them_or_a_refusal(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            match understand::<NamedRef>(&*bytes) {
                Ok(message) => prop_assert_eq!(message.encoded_len(), bytes.len()),
                Err(refused) => prop_assert_eq!(refused.code, "invalid-argument"),
            }
        }
    }
}

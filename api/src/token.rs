//! Secrets as text that a person can copy: the one-time token that a machine joins with, and a user's token.
//!
//! Nothing here draws random bytes; the caller passes them in. The quorum keeps digests only.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use model::{Digest, JoinRole};
use serde::{Deserialize, Serialize};

/// So that a token says what it is, and a scanner of leaked secrets can find it.
const JOIN_PREFIX: &str = "trefoil-join-";
const USER_PREFIX: &str = "trefoil-user-";

/// A token holds a secret, at most seven addresses and one certificate: about 1 KB. Longer text is not one.
const MAX_TEXT_BYTES: usize = 16 << 10;

/// All that a machine needs to join: where, whom to trust, and the proof that it may.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    pub role: JoinRole,
    pub secret: [u8; 32],
    /// Endpoints of the controllers when it was issued; one that answers is enough.
    pub controllers: Vec<String>,
    pub ca_pem: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is not a join token of this version")]
pub struct BadToken;

impl JoinToken {
    pub fn encode(&self) -> String {
        let bytes = postcard::to_stdvec(self).expect("a token has no type that postcard refuses");
        format!("{JOIN_PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes))
    }

    /// # Errors
    /// When the text is not exactly what [`Self::encode`] writes; space around it is ignored.
    pub fn decode(text: &str) -> Result<Self, BadToken> {
        let text = text.trim();
        if text.len() > MAX_TEXT_BYTES {
            return Err(BadToken);
        }
        let encoded = text.strip_prefix(JOIN_PREFIX).ok_or(BadToken)?;
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(encoded).map_err(|_| BadToken)?;
        let (token, rest) = postcard::take_from_bytes::<Self>(&bytes).map_err(|_| BadToken)?;
        let usable = rest.is_empty() && !token.controllers.is_empty();
        if usable { Ok(token) } else { Err(BadToken) }
    }

    /// What the quorum knows it by.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.secret)
    }
}

/// A user's token from 32 random bytes.
pub fn user_token(random: [u8; 32]) -> String {
    format!("{USER_PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(random))
}

/// What the quorum knows a user's token by; `None` when the text cannot be one.
pub fn user_token_digest(text: &str) -> Option<Digest> {
    let encoded = text.strip_prefix(USER_PREFIX)?;
    let secret = BASE64_URL_SAFE_NO_PAD.decode(encoded).ok()?;
    (secret.len() == 32).then(|| Digest::of(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            role: JoinRole::Agent,
            secret: [7; 32],
            controllers: vec!["10.0.0.1:7470".into(), "unix:/run/api.sock".into()],
            ca_pem: "-----BEGIN CERTIFICATE-----\n".into(),
        }
    }

    #[test]
    fn a_join_token_reads_back_what_it_writes() {
        let text = token().encode();
        assert!(text.starts_with("trefoil-join-") && !text.contains(['+', '/', '=', '\n']));
        assert!(JoinToken::decode(&format!(" {text}\n")).unwrap() == token());
        assert!(JoinToken::decode(&text[..text.len() - 4]).is_err());
        assert!(JoinToken::decode(&format!("{text}AAAA")).is_err());
        assert!(JoinToken::decode(&user_token([1; 32])).is_err());
    }

    #[test]
    fn a_user_token_has_one_form() {
        let text = user_token([9; 32]);
        assert_eq!(user_token_digest(&text), Some(Digest::of(text.as_bytes())));
        for bad in ["", "trefoil-user-", "trefoil-user-AAAA", &format!("{text}A"), &token().encode()] {
            assert_eq!(user_token_digest(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_decoder_panic(text in ".{0,200}", bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = JoinToken::decode(&text);
            let _ = user_token_digest(&text);
            let _ = JoinToken::decode(&format!("{JOIN_PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes)));
        }
    }
}

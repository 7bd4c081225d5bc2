//! What a refusal can be about, by the word that people read.
//!
//! On disk and between controllers a noun is its word, so that adding one changes no stored reply.

use std::fmt;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Noun {
    Address,
    Cluster,
    Controller,
    Image,
    Network,
    Node,
    Setting,
    Tag,
    Template,
    Tenant,
    User,
    Vm,
}

impl Noun {
    const ALL: [Self; 12] = [
        Self::Address,
        Self::Cluster,
        Self::Controller,
        Self::Image,
        Self::Network,
        Self::Node,
        Self::Setting,
        Self::Tag,
        Self::Template,
        Self::Tenant,
        Self::User,
        Self::Vm,
    ];

    const fn word(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Cluster => "cluster",
            Self::Controller => "controller",
            Self::Image => "image",
            Self::Network => "network",
            Self::Node => "node",
            Self::Setting => "setting",
            Self::Tag => "tag",
            Self::Template => "template",
            Self::Tenant => "tenant",
            Self::User => "user",
            Self::Vm => "vm",
        }
    }

    /// Whether a command names it by a word that people choose, so that what does not exist may come to exist. The
    /// others are named by ids that the state mints: one that does not exist never will.
    pub(crate) const fn may_come_to_exist(self) -> bool {
        match self {
            Self::Address | Self::Setting | Self::Tag | Self::Template | Self::User => true,
            Self::Cluster | Self::Controller | Self::Image | Self::Network | Self::Node | Self::Tenant | Self::Vm => {
                false
            }
        }
    }
}

impl fmt::Display for Noun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl From<Noun> for String {
    fn from(noun: Noun) -> Self {
        noun.word().into()
    }
}

impl TryFrom<String> for Noun {
    type Error = String;

    fn try_from(word: String) -> Result<Self, String> {
        Self::ALL.into_iter().find(|noun| noun.word() == word).ok_or_else(|| format!("'{word}' is no noun"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_noun_is_stored_as_its_word() {
        for noun in Noun::ALL {
            let bytes = postcard::to_stdvec(&noun).unwrap();
            assert_eq!(bytes, postcard::to_stdvec(&noun.to_string()).unwrap());
            assert_eq!(postcard::from_bytes::<Noun>(&bytes).unwrap(), noun);
        }
        assert!(postcard::from_bytes::<Noun>(&postcard::to_stdvec("unicorn").unwrap()).is_err());
    }
}

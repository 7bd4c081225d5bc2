//! From a history to a verdict about one promise each. Pure: no clock, no network, no chance.

pub mod address;
pub mod capacity;
pub mod home;
pub mod image;
pub mod ledger;
pub mod log;
pub mod register;
pub mod request;
pub mod rest;
pub mod revision;
pub mod set;
#[cfg(test)]
pub mod trial;
pub mod watch;

/// What a checker says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Nothing in the history speaks against the promise.
    Holds,
    /// The promise was broken; one sentence says how.
    Broken(String),
    /// The checker gave up within its budget. Never green.
    Undecided(String),
}

impl Finding {
    /// The worse of two: broken before undecided before holds.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (&self, &other) {
            (Self::Broken(_), _) => self,
            (_, Self::Broken(_)) => other,
            (Self::Undecided(_), _) => self,
            _ => other,
        }
    }
}

//! What a controller knows of the quorum, in this crate's own words.

use model::ControllerId;
use serde::{Deserialize, Serialize};

/// Who leads, as this replica knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    pub leader: Option<ControllerId>,
    pub term: u64,
    /// This replica leads, and has applied everything of earlier terms: its `State` is fit to plan from.
    pub leading: bool,
}

/// A member of a later cluster epoch exists: the quorum was refounded without this controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fenced {
    /// Who said so.
    pub by: ControllerId,
    pub epoch: u64,
    pub own: u64,
}

impl std::fmt::Display for Fenced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { by, epoch, own } = self;
        write!(
            f,
            "{by} is of cluster epoch {epoch} and this controller of {own}: the quorum was refounded without it, and it \
             may never take part again; empty its directory and join under a new id"
        )
    }
}

/// The hash of the whole state at an index. Replicas have equal hashes at equal indexes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashAt {
    pub index: u64,
    pub hash: [u8; 16],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Leader,
    Voter,
    Learner,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    pub id: ControllerId,
    pub address: String,
    pub role: Role,
    /// It answered, or is this replica itself. In `Replica::status`: heard lately, as far as this replica knows.
    pub reachable: bool,
    /// How far its log is known to agree with the leader's.
    pub matched: Option<u64>,
    pub applied: Option<u64>,
    /// At the newest index that both it and the answering replica have a hash of; else its latest.
    pub hash: Option<HashAt>,
    /// The version of the program that it runs, and the highest feature level that it knows.
    pub version: Option<String>,
    pub knows: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuorumStatus {
    /// Who answers.
    pub id: ControllerId,
    pub leader: Option<ControllerId>,
    pub term: u64,
    pub last: u64,
    pub committed: u64,
    pub applied: u64,
    /// 0: none was made yet.
    pub snapshot: u64,
    pub members: Vec<MemberStatus>,
    /// No two members have different hashes at the same index. Always true in `Replica::status`, which asks nobody.
    pub hashes_agree: bool,
}

/// What a member tells another about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub applied: u64,
    pub hashes: Vec<HashAt>,
    /// Known by the leader only: how far each member's log agrees with its own.
    pub matched: Vec<(u64, u64)>,
    pub version: String,
    /// The highest feature level that it knows.
    pub knows: u32,
}

impl QuorumStatus {
    /// The highest feature level that every member knows.
    ///
    /// # Errors
    /// The member that did not say.
    pub fn common_level(&self) -> Result<u32, ControllerId> {
        let levels: Result<Vec<u32>, ControllerId> =
            self.members.iter().map(|member| member.knows.ok_or(member.id)).collect();
        Ok(levels?.into_iter().min().unwrap_or(model::level::OLDEST))
    }
}

/// The indexes at which two replicas have different hashes: none, unless `apply` is not deterministic or a disk lies.
pub fn differences(a: &[HashAt], b: &[HashAt]) -> Vec<u64> {
    common(a, b).filter(|(x, y)| x.hash != y.hash).map(|(x, _)| x.index).collect()
}

/// The newest hash of `theirs` at an index that `ours` has too; else their latest.
pub fn comparable(ours: &[HashAt], theirs: &[HashAt]) -> Option<HashAt> {
    common(ours, theirs).map(|(_, theirs)| theirs).last().or(theirs.last().copied())
}

fn common<'a>(a: &'a [HashAt], b: &'a [HashAt]) -> impl Iterator<Item = (HashAt, HashAt)> + 'a {
    a.iter().filter_map(|x| b.iter().find(|y| y.index == x.index).map(|y| (*x, *y)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_compared_at_equal_indexes_only() {
        let at = |index, byte| HashAt { index, hash: [byte; 16] };
        let ours = [at(256, 1), at(512, 2), at(600, 3)];
        assert!(differences(&ours, &[at(512, 2), at(700, 9)]).is_empty());
        assert_eq!(differences(&ours, &[at(256, 1), at(512, 7)]), [512]);
        assert_eq!(comparable(&ours, &[at(512, 2), at(700, 9)]), Some(at(512, 2)));
        assert_eq!(comparable(&ours, &[at(700, 9)]), Some(at(700, 9)));
    }
}

//! What a host has not been told of its assignment: a session sends the whole in pieces, each as soon as it differs. A host of a
//! hundred machines whose networks reach a thousand others would otherwise be sent all of it for each machine that any of them gets.
//!
//! The host puts the whole together again before it looks at it, so nothing else knows of pieces, and the generation numbers the
//! whole. Both ends of a session begin with nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
};

use serde::{Deserialize, Serialize};

use crate::{
    Digest, NetworkId, NodeId, State, VmId,
    assignment::{Assignment, ImageWish, NetworkWish, RehearsalWish, VmWish},
};

/// What makes one whole of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct News {
    pub cluster: String,
    pub node: NodeId,
    pub incarnation: u64,
    pub generation: u64,
    pub vms: Pieces<VmId, VmWish>,
    pub networks: Pieces<NetworkId, NetworkWish>,
    pub images: Pieces<Digest, ImageWish>,
    /// All of them: they are few, and soon over.
    pub rehearsals: Vec<RehearsalWish>,
    pub spared: Option<BTreeSet<VmId>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pieces<K, W> {
    pub gone: Vec<K>,
    /// Those that were not there, and those that were there and differ.
    pub new: Vec<W>,
}

/// What one session has sent. Two pieces of the same hash pass for the same: one in 2⁶⁴ changes would wait for the next.
#[derive(Debug, Default)]
pub struct Known {
    vms: Hashes<VmId>,
    networks: Hashes<NetworkId>,
    images: Hashes<Digest>,
}

/// In the order of keys.
#[derive(Debug)]
struct Hashes<K>(Vec<(K, u64)>);

impl<K> Default for Hashes<K> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: Ord + Copy> Hashes<K> {
    /// Puts `now` in the place of what was there, and tells what went and what is new or differs.
    fn renew(&mut self, now: Vec<(K, u64)>) -> (Vec<K>, BTreeSet<K>) {
        let before = std::mem::replace(&mut self.0, now);
        let there = |key: &K| self.0.binary_search_by_key(key, |(key, _)| *key).is_ok();
        let gone = before.iter().map(|(key, _)| *key).filter(|key| !there(key)).collect();
        let new = self.0.iter().filter(|piece| before.binary_search(piece).is_err()).map(|(key, _)| *key).collect();
        (gone, new)
    }

    fn pieces<W: Hash>(&mut self, mut wishes: Vec<W>, key: impl Fn(&W) -> K) -> Pieces<K, W> {
        let (gone, new) = self.renew(wishes.iter().map(|wish| (key(wish), hash(wish))).collect());
        wishes.retain(|wish| new.contains(&key(wish)));
        Pieces { gone, new: wishes }
    }
}

pub(crate) fn hash(piece: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    piece.hash(&mut hasher);
    hasher.finish()
}

impl State {
    /// What makes this state's assignment of what the host knows, or `None` when there is no such host; `known` is then told.
    pub fn news(&self, id: NodeId, known: &mut Known) -> Option<News> {
        let node = self.nodes().get(&id)?;
        let vms = self.wished_vms(id);
        let mut leases = self.leases(node, &vms);
        // The hundreds of tunnels of a network are not looked up to see that they are the same.
        let networks = leases.iter().map(|(network, leases)| {
            let members: Vec<NodeId> = self.members(*network).collect();
            (*network, hash((leases, self.index.underlays_hash, members)))
        });
        let (gone, new) = known.networks.renew(networks.collect());
        leases.retain(|network, _| new.contains(network));
        let networks = leases.into_iter().filter_map(|(network, leases)| self.network_wish(node, network, leases));
        Some(News {
            cluster: self.cluster().id.clone(),
            node: id,
            incarnation: node.incarnation,
            generation: node.generation,
            networks: Pieces { gone, new: networks.collect() },
            vms: known.vms.pieces(self.vm_wishes(node, &vms), |wish| wish.vm),
            images: known.images.pieces(self.replica_wishes(node), |wish| wish.digest),
            rehearsals: self.rehearsal_wishes(node),
            spared: self.spared_on(id),
        })
    }
}

impl News {
    /// Nothing has to be said when the generation is the same, too: all else changes only with it.
    pub fn is_empty(&self) -> bool {
        self.vms.is_empty() && self.networks.is_empty() && self.images.is_empty()
    }

    /// The whole that follows from the one before it in the same session, and from nothing at its beginning.
    pub fn onto(self, before: Option<&Assignment>) -> Assignment {
        Assignment {
            cluster: self.cluster,
            node: self.node,
            incarnation: self.incarnation,
            generation: self.generation,
            vms: self.vms.onto(before.map_or(&[], |before| &before.vms), |wish| wish.vm),
            networks: self.networks.onto(before.map_or(&[], |before| &before.networks), |wish| wish.network),
            images: self.images.onto(before.map_or(&[], |before| &before.images), |wish| wish.digest),
            rehearsals: self.rehearsals,
            spared: self.spared,
        }
    }
}

impl<K: Ord, W: Clone> Pieces<K, W> {
    fn is_empty(&self) -> bool {
        self.gone.is_empty() && self.new.is_empty()
    }

    fn onto(self, before: &[W], key: impl Fn(&W) -> K) -> Vec<W> {
        let mut wishes: BTreeMap<K, W> = before.iter().map(|wish| (key(wish), wish.clone())).collect();
        self.gone.iter().for_each(|key| drop(wishes.remove(key)));
        wishes.extend(self.new.into_iter().map(|wish| (key(&wish), wish)));
        wishes.into_values().collect()
    }
}

//! What one host should be: the whole of it, numbered. Never an order. (`news` is how a session sends it.)

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, iter,
    net::{IpAddr, Ipv4Addr},
};

use serde::{Deserialize, Serialize};

use crate::{
    Capacity, Cidr, Digest, Image, ImageFormat, ImageId, Mac, MigrationStage, NetworkId, Node, NodeId, Recovery,
    ReplicaState, RequestId, State, Vm, VmId, Wanted,
};

/// Everything that a host should have. The agent refuses one whose generation is lower than one it has seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// The cloud's id; a domain on the host belongs to Trefoil when it carries it.
    pub cluster: String,
    pub node: NodeId,
    pub incarnation: u64,
    pub generation: u64,
    pub vms: Vec<VmWish>,
    pub networks: Vec<NetworkWish>,
    /// The images that the host keeps as a replica; bases of machines are in `vms`.
    pub images: Vec<ImageWish>,
    /// Backups that the host boots, apart from everything, to see whether they do.
    pub rehearsals: Vec<RehearsalWish>,
    /// Set while the cloud is put together after a refounding: these guests are left as they are although nobody wishes
    /// them, and no image is dropped.
    pub spared: Option<BTreeSet<VmId>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Power {
    Running,
    Suspended,
    Stopped,
    /// It comes from another host, and does not run here before it is handed over.
    Arriving,
    /// Neither domain nor disk.
    Absent,
}

/// One machine on this host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VmWish {
    pub vm: VmId,
    /// Log index of the placement.
    pub epoch: u64,
    /// What its owner asked for last, for the host's log.
    pub request: RequestId,
    /// What failed is left alone until the epoch or this changes.
    pub attempt: u32,
    pub power: Power,
    /// A backup that should be made.
    pub backup: Option<BackupWish>,
    /// The other end of its move, when it should go from here or come to here.
    pub moves: Option<MoveEnd>,
    /// What the host does with it when its lease ends, and after it went down.
    pub recovery: Recovery,
    /// How long ACPI shutdown may take before the machine is switched off.
    pub stop_grace_millis: u64,
    /// How often its owner has asked for a reboot, in all.
    pub reboots: u32,
    pub tenant: String,
    /// Host name of the guest.
    pub name: String,
    pub size: Capacity,
    pub image: ImageWish,
    pub nics: Vec<NicWish>,
    pub ssh_keys: Vec<String>,
    pub user_data: String,
}

/// A copy of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BackupWish {
    pub number: u32,
    /// What was written since this backup is enough, where the host knows it. It need not: a full one is always right.
    pub parent: Option<Digest>,
}

/// A backup to boot: no machine, and in no network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RehearsalWish {
    pub image: ImageId,
    /// Log index of the placement.
    pub epoch: u64,
    /// The machine that the backup is of.
    pub vm: VmId,
    pub request: RequestId,
    pub size: Capacity,
    /// How long it may take to come up.
    pub limit_millis: u64,
    /// What its console says then; empty: its guest agent or a login prompt tells.
    pub expect: String,
    pub base: ImageWish,
}

/// Where a machine goes to, or comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MoveEnd {
    pub node: NodeId,
    /// `host:port` of its agent.
    pub address: String,
    /// The placement that the machine will have when it is handed over: it names the move.
    pub epoch: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NicWish {
    pub network: NetworkId,
    pub vni: u32,
    pub mac: Mac,
    pub ip: Ipv4Addr,
}

/// Bytes that the host should hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageWish {
    pub digest: Digest,
    pub format: ImageFormat,
    pub size_bytes: u64,
    pub virtual_bytes: u64,
    /// `host:port` of agents that hold a good replica, this host not among them.
    pub sources: Vec<String>,
    /// Of an increment: what it stands on, the nearest first; the last is a full copy. Without them it cannot be opened.
    pub parents: Vec<ParentWish>,
}

/// An image that another stands on. Its disk has the same length.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ParentWish {
    pub digest: Digest,
    pub size_bytes: u64,
    pub sources: Vec<String>,
}

impl ImageWish {
    /// Its bytes and those that it stands on, the nearest first.
    pub fn digests(&self) -> impl Iterator<Item = Digest> {
        iter::once(self.digest).chain(self.parents.iter().map(|parent| parent.digest))
    }

    /// What must be fetched before all else of it, when not all is `held`: a parent comes before what stands on it.
    pub fn first_missing(&self, held: impl Fn(Digest) -> bool) -> Option<Self> {
        let parents = (0..self.parents.len()).rev().find(|at| !held(self.parents[*at].digest));
        let missing = parents.map(|at| {
            let ParentWish { digest, size_bytes, sources } = self.parents[at].clone();
            Self { digest, size_bytes, sources, parents: self.parents[at + 1..].to_vec(), ..self.clone() }
        });
        missing.or_else(|| (!held(self.digest)).then(|| self.clone()))
    }
}

/// One tenant network of which a machine is on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkWish {
    pub network: NetworkId,
    pub vni: u32,
    pub range: Cidr,
    /// Underlay addresses of the other hosts with a machine in this network.
    pub peers: Vec<IpAddr>,
    /// DHCP leases of the machines on this host.
    pub leases: Vec<Lease>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lease {
    pub mac: Mac,
    pub ip: Ipv4Addr,
    pub hostname: String,
}

/// A line for the host, then one for each thing that it should have.
impl fmt::Display for Assignment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} incarnation {} generation {}", self.node, self.incarnation, self.generation)?;
        self.vms.iter().try_for_each(|vm| write!(f, "\n  {vm}"))?;
        self.networks.iter().try_for_each(|network| write!(f, "\n  {network}"))?;
        self.images.iter().try_for_each(|image| write!(f, "\n  keep {image}"))?;
        self.rehearsals.iter().try_for_each(|rehearsal| write!(f, "\n  {rehearsal}"))?;
        self.spared.iter().flatten().try_for_each(|vm| write!(f, "\n  spare {vm}"))
    }
}

impl fmt::Display for VmWish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let power = match self.power {
            Power::Running => "running",
            Power::Suspended => "suspended",
            Power::Stopped => "stopped",
            Power::Arriving => "arriving",
            Power::Absent => "absent",
        };
        write!(f, "{} {}/{} {power}, epoch {} attempt {}", self.vm, self.tenant, self.name, self.epoch, self.attempt)?;
        if self.recovery != Recovery::default() {
            write!(f, ", {}", self.recovery)?;
        }
        if let Some(end) = &self.moves {
            let way = if self.power == Power::Arriving { "from" } else { "to" };
            write!(f, ", moves {way} {} for epoch {}", end.node, end.epoch)?;
        }
        if let Some(backup) = self.backup {
            write!(f, ", backup {}", backup.number)?;
            backup.parent.map_or(Ok(()), |parent| write!(f, " since {:.8}", parent.to_string()))?;
        }
        write!(f, ", reboots {}, grace {} ms, from {}", self.reboots, self.stop_grace_millis, self.image)?;
        self.nics.iter().try_for_each(|nic| write!(f, ", {} {} in {}", nic.mac, nic.ip, nic.network))
    }
}

impl fmt::Display for NetworkWish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} vni {} {}", self.network, self.vni, self.range)?;
        self.peers.iter().try_for_each(|peer| write!(f, ", peer {peer}"))?;
        self.leases.iter().try_for_each(|lease| write!(f, ", {} {} for {}", lease.mac, lease.ip, lease.hostname))
    }
}

impl fmt::Display for RehearsalWish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rehearse {} epoch {} for {} ms, from {}", self.image, self.epoch, self.limit_millis, self.base)
    }
}

impl fmt::Display for ImageWish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {:.8}", self.digest.to_string())?;
        self.parents.iter().try_for_each(|parent| write!(f, " on {:.8}", parent.digest.to_string()))?;
        self.sources.iter().try_for_each(|source| write!(f, " source {source}"))
    }
}

impl State {
    /// What the host should be, or `None` when there is no such host.
    pub fn assignment(&self, id: NodeId) -> Option<Assignment> {
        let node = self.nodes().get(&id)?;
        let vms = self.wished_vms(id);
        let networks = self.leases(node, &vms).into_iter();
        Some(Assignment {
            cluster: self.cluster().id.clone(),
            node: id,
            incarnation: node.incarnation,
            generation: node.generation,
            networks: networks.filter_map(|(network, leases)| self.network_wish(node, network, leases)).collect(),
            vms: self.vm_wishes(node, &vms),
            images: self.replica_wishes(node),
            rehearsals: self.rehearsal_wishes(node),
            spared: self.spared_on(id),
        })
    }

    /// In the order of their ids.
    pub(crate) fn wished_vms(&self, node: NodeId) -> Vec<&Vm> {
        let mut vms: Vec<&Vm> = self.vms_on_node(node).chain(self.others_on_node(node)).collect();
        vms.sort_unstable_by_key(|vm| vm.id);
        vms
    }

    pub(crate) fn vm_wishes(&self, node: &Node, vms: &[&Vm]) -> Vec<VmWish> {
        vms.iter().filter_map(|vm| self.vm_wish(node, vm)).collect()
    }

    pub(crate) fn rehearsal_wishes(&self, node: &Node) -> Vec<RehearsalWish> {
        self.rehearsing_on(node.id).filter_map(|image| self.rehearsal_wish(node, image)).collect()
    }

    /// What nobody knows and the host shall leave alone; `None` when nothing is open after a refounding.
    pub(crate) fn spared_on(&self, node: NodeId) -> Option<BTreeSet<VmId>> {
        let open = self.quorum().refounding.as_ref()?;
        Some(open.orphans.get(&node).into_iter().flatten().map(|(vm, _)| *vm).collect())
    }

    fn vm_wish(&self, node: &Node, vm: &Vm) -> Option<VmWish> {
        let image = self.images().get(&vm.base())?;
        let placement = vm.placement?;
        let own = placement.node == node.id;
        let end = |end: NodeId, epoch: u64| {
            Some(MoveEnd { node: end, address: self.nodes().get(&end)?.address.clone(), epoch })
        };
        let (epoch, power, moves) = match vm.migration {
            Some(migration) if own && vm.is_moving() => {
                (placement.epoch, power(vm), end(migration.other.node, migration.other.epoch))
            }
            Some(migration) if !own && migration.stage == MigrationStage::Moving => {
                (migration.other.epoch, Power::Arriving, end(placement.node, migration.other.epoch))
            }
            Some(migration) if !own => (migration.other.epoch, Power::Absent, None),
            _ => (placement.epoch, power(vm), None),
        };
        let nic_wish = |nic: &crate::Nic| {
            let network = self.networks().get(&nic.network)?;
            Some(NicWish { network: nic.network, vni: network.vni, mac: nic.mac, ip: nic.ip })
        };
        Some(VmWish {
            vm: vm.id,
            epoch,
            request: vm.request,
            attempt: vm.tries,
            power,
            backup: vm
                .backups
                .pending()
                .filter(|_| own)
                .map(|number| BackupWish { number, parent: self.next_parent(vm).map(|image| image.digest) }),
            moves,
            recovery: vm.recovery,
            stop_grace_millis: vm.stop_grace_millis,
            reboots: vm.reboots,
            tenant: self.tenants().get(&vm.tenant).map_or_else(|| vm.tenant.to_string(), |tenant| tenant.name.clone()),
            name: vm.name.clone(),
            size: vm.size,
            image: self.image_wish(node, image),
            nics: vm.nics.iter().filter_map(nic_wish).collect(),
            ssh_keys: vm.ssh_keys.clone(),
            user_data: vm.user_data.clone(),
        })
    }

    fn rehearsal_wish(&self, node: &Node, image: &Image) -> Option<RehearsalWish> {
        let rehearsal = image.rehearsal.as_ref()?;
        Some(RehearsalWish {
            image: image.id,
            epoch: rehearsal.placement?.epoch,
            vm: image.backup?.vm,
            request: rehearsal.request,
            size: rehearsal.size,
            limit_millis: rehearsal.limit_millis,
            expect: rehearsal.expect.clone(),
            base: self.image_wish(node, image),
        })
    }

    fn image_wish(&self, node: &Node, image: &Image) -> ImageWish {
        let sources = |image: &Image| {
            let holders = image.replicas.iter().filter(|(id, state)| **id != node.id && **state == ReplicaState::Good);
            holders.filter_map(|(id, _)| self.nodes().get(id)).map(|holder| holder.address.clone()).collect()
        };
        let parent =
            |image: &Image| ParentWish { digest: image.digest, size_bytes: image.size_bytes, sources: sources(image) };
        ImageWish {
            digest: image.digest,
            format: image.format,
            size_bytes: image.size_bytes,
            virtual_bytes: image.virtual_bytes,
            sources: sources(image),
            parents: self.chain(image).skip(1).map(parent).collect(),
        }
    }

    /// One wish a digest, although several images may have the same bytes.
    pub(crate) fn replica_wishes(&self, node: &Node) -> Vec<ImageWish> {
        let kept = self.index.images_by_node.get(&node.id).into_iter().flatten().filter_map(|id| self.images().get(id));
        let kept = kept.filter(|image| image.keepers().any(|keeper| keeper == node.id));
        let mut by_digest: BTreeMap<Digest, ImageWish> = BTreeMap::new();
        for wish in kept.map(|image| self.image_wish(node, image)) {
            // The same bytes may have been imported again by somebody, and then stand on nothing that is known.
            if !wish.parents.is_empty() || !by_digest.contains_key(&wish.digest) {
                by_digest.insert(wish.digest, wish);
            }
        }
        by_digest.into_values().collect()
    }

    /// Of the machines here, by the networks that reach this host.
    pub(crate) fn leases(&self, node: &Node, vms: &[&Vm]) -> BTreeMap<NetworkId, Vec<Lease>> {
        let mut leases: BTreeMap<NetworkId, Vec<Lease>> = BTreeMap::new();
        for vm in vms.iter().filter(|vm| vm.wanted != Wanted::Deleted) {
            let own = vm.placement.is_some_and(|placement| placement.node == node.id);
            // One that comes is plugged in here, and has its address from the host that it comes from.
            for nic in vm.nics.iter().filter(|_| own || vm.is_moving()) {
                let lease = Lease { mac: nic.mac, ip: nic.ip, hostname: vm.name.clone() };
                leases.entry(nic.network).or_default().extend(own.then_some(lease));
            }
        }
        leases
    }

    pub(crate) fn network_wish(&self, node: &Node, id: NetworkId, leases: Vec<Lease>) -> Option<NetworkWish> {
        let network = self.networks().get(&id)?;
        // Without lost hosts: what they send is from machines that may be elsewhere by now.
        let others = self.members(id).filter(|host| *host != node.id);
        let peers = others.filter_map(|host| self.index.underlays.get(&host)).copied().collect();
        Some(NetworkWish { network: id, vni: network.vni, range: network.range, peers, leases })
    }
}

fn power(vm: &Vm) -> Power {
    match vm.wanted {
        Wanted::Running => Power::Running,
        Wanted::Suspended => Power::Suspended,
        Wanted::Stopped => Power::Stopped,
        Wanted::Deleted => Power::Absent,
    }
}

//! A look at the host: guests, networks and images as they are now. Nothing is remembered here.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use model::{
    Assignment, Digest, NetworkWish, Phase, Power, VmId, VmWish,
    steps::{FoundGuest, FoundPower, IMAGE_IDLE_MILLIS, Observed},
};
use storage::images::{ImageError, ImageStore};
use tokio::task::spawn_blocking;

use crate::{
    host::Host,
    hypervisor::{Guest, GuestPower, Hypervisor, HypervisorError, OffReason},
    view::{Machine, Stage},
};

/// What was found.
pub struct Look {
    pub guests: BTreeMap<VmId, FoundGuest>,
    /// `None`: they were not looked at.
    pub networks: Option<BTreeMap<u32, bool>>,
    pub images: BTreeMap<Digest, u64>,
    pub pinned_images: BTreeSet<Digest>,
}

/// `wanted`: `None` does not look at the networks, which would wait for the end of what is being done to one of them.
///
/// # Errors
/// When the hypervisor does not say which guests there are. Then nothing is known, and nothing may be concluded.
pub async fn look(host: &Arc<Host>, wanted: Option<&[NetworkWish]>) -> Result<Look, HypervisorError> {
    let blocking = host.clone();
    let looked = spawn_blocking(move || {
        let guests = blocking.hypervisor.guests()?;
        let images = images(&blocking.images);
        let pinned_images = pinned(&images, &*blocking.hypervisor)?;
        Ok((guests, images, pinned_images))
    });
    // Side by side: a machine that is being made waits for a look after each of its steps.
    let networks = async {
        match wanted {
            Some(wanted) => Some(host.network.found(wanted).await),
            None => None,
        }
    };
    let (looked, networks) = tokio::join!(looked, networks);
    let (guests, images, pinned_images) =
        looked.map_err(|_| HypervisorError::Transient("the look at the guests was cut short".into()))??;
    let networks = networks.map(|networks| match networks {
        Ok(found) => found.into_iter().map(|network| (network.vni, network.complete)).collect(),
        Err(error) => {
            // Taken as none: making one that is there already touches nothing, and none is removed.
            tracing::warn!(%error, "the networks of this host cannot be seen");
            BTreeMap::new()
        }
    });
    let guests = guests.into_iter().map(|guest| (guest.vm, found_guest(&guest))).collect();
    Ok(Look { guests, networks, images, pinned_images })
}

fn found_guest(guest: &Guest) -> FoundGuest {
    let power = match guest.power {
        GuestPower::Running => FoundPower::Running,
        GuestPower::Suspended => FoundPower::Suspended,
        GuestPower::Arriving => FoundPower::Arriving,
        GuestPower::Arrived => FoundPower::Arrived,
        GuestPower::Off(OffReason::Moved) => FoundPower::Moved,
        GuestPower::Off(OffReason::ByGuest) => FoundPower::OffByGuest,
        GuestPower::Off(OffReason::ByAgent) => FoundPower::OffByAgent,
        GuestPower::Off(OffReason::Crashed | OffReason::Unknown) => FoundPower::Crashed,
    };
    FoundGuest { epoch: guest.epoch, power }
}

/// Blocks. A damaged blob is removed by the look at it, and fetched again when it is wanted.
fn images(store: &ImageStore) -> BTreeMap<Digest, u64> {
    let held = store.list().unwrap_or_else(|error| {
        tracing::error!(%error, "the image store cannot be read");
        Vec::new()
    });
    let mut good = BTreeMap::new();
    for blob in held {
        match store.verified(blob.digest) {
            Ok(_) => drop(good.insert(blob.digest, u64::try_from(blob.idle.as_millis()).unwrap_or(u64::MAX))),
            Err(ImageError::Missing(_)) => {}
            Err(error) => tracing::error!(%error, "an image in the store is not good"),
        }
    }
    good
}

/// What disks on this host stand on. Asked only when a blob could be dropped: it reads every disk's header.
fn pinned(images: &BTreeMap<Digest, u64>, hypervisor: &dyn Hypervisor) -> Result<BTreeSet<Digest>, HypervisorError> {
    if images.values().all(|idle| *idle < IMAGE_IDLE_MILLIS) {
        return Ok(BTreeSet::new());
    }
    let bases = hypervisor.bases()?;
    Ok(bases.iter().filter_map(|base| base.file_name()?.to_str()?.parse().ok()).collect())
}

/// What the heartbeats say about the machines: those that were found, and those that are on their way.
pub fn machines(assignment: Option<&Assignment>, found: &Observed) -> Vec<Machine> {
    let mut machines: BTreeMap<VmId, Machine> = BTreeMap::new();
    for (vm, guest) in &found.guests {
        let phase = match guest.power {
            FoundPower::Running => Phase::Running,
            FoundPower::Suspended | FoundPower::Arriving | FoundPower::Arrived => Phase::Suspended,
            FoundPower::OffByGuest | FoundPower::OffByAgent | FoundPower::Crashed | FoundPower::Moved => Phase::Stopped,
        };
        let stage = found.leaving.contains(vm).then_some(Stage::Move(*vm));
        machines.insert(*vm, Machine { vm: *vm, epoch: guest.epoch, phase, stage });
    }
    for wish in assignment.into_iter().flat_map(|assignment| &assignment.vms) {
        if found.guests.contains_key(&wish.vm) || matches!(wish.power, Power::Stopped | Power::Absent | Power::Arriving)
        {
            continue;
        }
        let told = found.told.get(&wish.vm).map(|told| told.report.phase);
        let stage = (told != Some(Phase::Failed)).then(|| stage(wish, found));
        machines.insert(wish.vm, Machine { vm: wish.vm, epoch: wish.epoch, phase: Phase::Absent, stage });
    }
    machines.into_values().collect()
}

fn stage(wish: &VmWish, found: &Observed) -> Stage {
    if let Some(image) = wish.image.first_missing(|digest| found.images.contains_key(&digest)) {
        return Stage::FetchImage(image.digest);
    }
    if !found.memory(wish).disk_made {
        return Stage::MakeDisk;
    }
    let plugged = wish.nics.iter().all(|nic| found.networks.get(&nic.vni) == Some(&true));
    if plugged { Stage::Start } else { Stage::PlugNetwork }
}

//! The host's world in one hand: what the executor acts through and the data server serves from.

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use api::tls::Identity;
use model::NodeId;
use storage::images::ImageStore;

use crate::{hypervisor::Hypervisor, lease::Leases, network::Network, relay::Arrivals, view::View};

pub struct Host {
    pub cluster: String,
    pub node: NodeId,
    pub identity: Identity,
    /// The data directory.
    pub data: PathBuf,
    /// Where this host's tunnels end.
    pub underlay: IpAddr,
    pub hypervisor: Arc<dyn Hypervisor>,
    pub network: Arc<dyn Network>,
    pub images: ImageStore,
    pub view: Arc<View>,
    pub leases: Arc<Leases>,
    /// Guests that may come from other hosts.
    pub arrivals: Arrivals,
}

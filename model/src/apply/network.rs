//! Tenant networks: ranges, VNIs.

use super::{Applied, Moment, check};
use crate::{Cidr, Network, NetworkId, Noun, Rejection, Reply, State, TenantId};

/// VNIs below are left to operators' own networks; the field has 24 bits.
const FIRST_VNI: u32 = 4096;
const LAST_VNI: u32 = (1 << 24) - 1;

impl State {
    pub(super) fn create_network(&mut self, m: Moment, tenant: TenantId, name: &str, range: Cidr) -> Applied {
        check::label("name", name)?;
        check::not_an_id::<NetworkId>("name", name)?;
        // The type can hold what its parser refuses; what comes in by the log is parsed once more.
        if range.to_string().parse() != Ok(range) {
            return Err(check::invalid("range", range, "an aligned IPv4 range with a prefix of 8 to 29"));
        }
        let owner = self.visible_tenant(m, tenant)?;
        if self.network_named(tenant, name).is_some() {
            return Err(check::exists(Noun::Network, name));
        }
        let (limit, used) = (owner.quota.networks, self.usage(tenant).networks);
        if used >= limit {
            return Err(Rejection::Quota {
                tenant: owner.name.clone(),
                what: "networks".into(),
                limit,
                used,
                asked: 1,
            });
        }
        let own = self.index.network_by_name.range((tenant, String::new())..).take_while(|((t, _), _)| *t == tenant);
        for network in own.filter_map(|(_, id)| self.networks.get(id)) {
            if network.range.overlaps(range) {
                let allowed = format!("a range that does not overlap {} of network '{}'", network.range, network.name);
                return Err(check::invalid("range", range, allowed));
            }
        }
        let last = self.cluster().last_vni.max(FIRST_VNI - 1);
        if last >= LAST_VNI {
            return Err(Rejection::Quota {
                tenant: "the cloud".into(),
                what: "VNIs".into(),
                limit: LAST_VNI.into(),
                used: last.into(),
                asked: 1,
            });
        }
        let (id, vni) = self.cluster_mut(|cluster| {
            cluster.last_network += 1;
            cluster.last_vni = last + 1;
            (NetworkId(cluster.last_network), cluster.last_vni)
        });
        self.put_network(Network { id, tenant, name: name.into(), range, vni, created_at: m.now });
        Ok(Reply::Network(id))
    }

    pub(super) fn delete_network(&mut self, m: Moment, id: NetworkId) -> Applied {
        let network = self.networks.get(&id).filter(|network| m.may_see(network.tenant));
        let network = network.ok_or_else(|| check::missing(Noun::Network, id))?;
        let machines = self.addresses_used(id);
        if machines > 0 {
            return Err(check::in_use(Noun::Network, &network.name, format!("{machines} machines are in it")));
        }
        self.remove_network(id);
        Ok(Reply::Done)
    }
}

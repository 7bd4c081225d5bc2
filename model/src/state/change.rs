//! What a changed row is to somebody who watches the cloud: a thing of some kind that is there or gone.
//!
//! Only things that a list of the API shows. Not here: who watches, and how long changes are kept.

use serde::de::DeserializeOwned;

use super::State;
use crate::{
    ControllerId, ImageId, NetworkId, NodeId, Noun, TenantId, VmId,
    table::{self, RowChange},
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub noun: Noun,
    /// As the API names it: `vm-17`, and of what has no id its name or key.
    pub id: String,
    pub owner: Owner,
    /// False when it is gone.
    pub present: bool,
}

/// Whose a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Tenant(TenantId),
    /// Every user may list it.
    Everybody,
    Operators,
    /// A tenant's, but its row, which would say whose, is gone.
    Gone,
}

impl State {
    /// What a row that `drain_changes` gave out means; `None` for what no list shows.
    pub fn change(&self, row: &RowChange) -> Option<Change> {
        let owned = |tenant: Option<TenantId>| tenant.map_or(Owner::Gone, Owner::Tenant);
        let (noun, id, owner) = match row.table {
            n if n == self.controllers.number() => {
                (Noun::Controller, key::<ControllerId>(row)?.to_string(), Owner::Operators)
            }
            n if n == self.nodes.number() => (Noun::Node, key::<NodeId>(row)?.to_string(), Owner::Operators),
            n if n == self.templates.number() => (Noun::Template, key::<String>(row)?, Owner::Everybody),
            n if n == self.tenants.number() => {
                let id = key::<TenantId>(row)?;
                (Noun::Tenant, id.to_string(), Owner::Tenant(id))
            }
            n if n == self.users.number() => (Noun::User, key::<String>(row)?, Owner::Operators),
            n if n == self.networks.number() => {
                let id = key::<NetworkId>(row)?;
                (Noun::Network, id.to_string(), owned(self.networks.get(&id).map(|network| network.tenant)))
            }
            n if n == self.images.number() => {
                let id = key::<ImageId>(row)?;
                (Noun::Image, id.to_string(), owned(self.images.get(&id).map(|image| image.tenant)))
            }
            n if n == self.vms.number() => {
                let id = key::<VmId>(row)?;
                (Noun::Vm, id.to_string(), owned(self.vms.get(&id).map(|vm| vm.tenant)))
            }
            n if n == self.tags.number() => {
                let (tenant, name) = key::<(TenantId, String)>(row)?;
                (Noun::Tag, name, Owner::Tenant(tenant))
            }
            n if n == self.settings.number() => (Noun::Setting, key::<String>(row)?, Owner::Everybody),
            _ => return None,
        };
        Some(Change { noun, id, owner, present: row.row.is_some() })
    }
}

fn key<K: DeserializeOwned>(row: &RowChange) -> Option<K> {
    table::decode(&row.key).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tag;

    #[test]
    fn a_row_says_what_it_is_of_and_whose() {
        let mut state = State::default();
        let tenant = TenantId(3);
        state.put_tag((tenant, "k".into()), Tag { value: "v".into(), version: 1 });
        let seen = |state: &mut State| -> Vec<Change> {
            let rows = state.drain_changes();
            rows.iter().filter_map(|row| state.change(row)).collect()
        };
        let tag = |present| Change { noun: Noun::Tag, id: "k".into(), owner: Owner::Tenant(tenant), present };
        assert_eq!(seen(&mut state), [tag(true)]);
        state.drop_tag(&(tenant, "k".into()));
        assert_eq!(seen(&mut state), [tag(false)]);
        assert_eq!(seen(&mut state), []);
    }
}

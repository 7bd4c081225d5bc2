//! What a changed row is to somebody who watches the cloud: a thing of some kind that is there or gone.
//!
//! Only things that a list of the API shows. Not here: who watches, and how long changes are kept.

use super::State;
use crate::{Noun, TenantId};

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
    /// What changed since the last call. Called after each entry it tells what that entry changed, and costs no encoding of rows.
    pub fn note_changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut tell = |noun, id, owner, present| changes.push(Change { noun, id, owner, present });
        let owned = |tenant: Option<TenantId>| tenant.map_or(Owner::Gone, Owner::Tenant);
        self.controllers.note(|id, row| tell(Noun::Controller, id.to_string(), Owner::Operators, row.is_some()));
        self.nodes.note(|id, row| tell(Noun::Node, id.to_string(), Owner::Operators, row.is_some()));
        self.templates.note(|name, row| tell(Noun::Template, name.clone(), Owner::Everybody, row.is_some()));
        self.tenants.note(|id, row| tell(Noun::Tenant, id.to_string(), Owner::Tenant(*id), row.is_some()));
        self.users.note(|name, row| tell(Noun::User, name.clone(), Owner::Operators, row.is_some()));
        self.networks.note(|id, row| {
            tell(Noun::Network, id.to_string(), owned(row.map(|network| network.tenant)), row.is_some());
        });
        self.images.note(|id, row| {
            tell(Noun::Image, id.to_string(), owned(row.map(|image| image.tenant)), row.is_some());
        });
        self.vms.note(|id, row| tell(Noun::Vm, id.to_string(), owned(row.map(|vm| vm.tenant)), row.is_some()));
        self.tags.note(|(tenant, name), row| tell(Noun::Tag, name.clone(), Owner::Tenant(*tenant), row.is_some()));
        self.settings.note(|name, row| tell(Noun::Setting, name.clone(), Owner::Everybody, row.is_some()));
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tag;

    /// The number of their table.
    const TAGS: u8 = 10;

    #[test]
    fn a_row_says_what_it_is_of_and_whose() {
        let mut state = State::default();
        let tenant = TenantId(3);
        state.put_tag((tenant, "k".into()), Tag { value: "v".into(), version: 1 });
        let tag = |present| Change { noun: Noun::Tag, id: "k".into(), owner: Owner::Tenant(tenant), present };
        assert_eq!(state.note_changes(), [tag(true)]);
        state.drop_tag(&(tenant, "k".into()));
        state.put_tag((tenant, "k".into()), Tag { value: "v".into(), version: 2 });
        assert_eq!(state.note_changes(), [tag(true)], "once");
        state.drop_tag(&(tenant, "k".into()));
        assert_eq!(state.note_changes(), [tag(false)]);
        assert_eq!(state.note_changes(), []);
        let gone = state.drain_changes().into_iter().find(|row| row.table == TAGS);
        assert_eq!(gone.expect("its row is drained all the same").row, None);
        assert_eq!(state.drain_changes(), []);
    }
}

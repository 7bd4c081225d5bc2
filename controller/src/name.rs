//! From what people type to ids: a name, or an id as it is printed.

use api::error::ApiError;
use model::{Image, Network, Node, Noun, Rejection, Role, State, Tenant, Vm};

use crate::access::Caller;

pub(crate) fn missing(noun: Noun, name: &str) -> ApiError {
    Rejection::NotFound { noun, name: shown(name) }.into()
}

/// What an error message repeats of it.
pub(crate) fn shown(name: &str) -> String {
    name.chars().take(80).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A member may leave the tenant out; an operator may when there is only one.
pub(crate) fn tenant<'a>(state: &'a State, caller: &Caller, name: &str) -> Result<&'a Tenant, ApiError> {
    let named = || match name.parse() {
        Ok(id) => state.tenants().get(&id),
        Err(()) => state.tenant_named(name),
    };
    match (caller.role, name) {
        (Role::Member(own), "") => state.tenants().get(&own).ok_or_else(|| missing(Noun::Tenant, &own.to_string())),
        (Role::Member(own), _) => named().filter(|tenant| tenant.id == own).ok_or_else(|| missing(Noun::Tenant, name)),
        (Role::Operator, "") => {
            let mut all = state.tenants().values();
            match (all.next(), all.next()) {
                (Some(only), None) => Ok(only),
                _ => Err(ApiError::invalid("tenant is '', but must be named: there is not exactly one (use --tenant)")),
            }
        }
        (Role::Operator, _) => named().ok_or_else(|| missing(Noun::Tenant, name)),
    }
}

pub(crate) fn vm<'a>(state: &'a State, caller: &Caller, tenant_name: &str, name: &str) -> Result<&'a Vm, ApiError> {
    let row = match name.parse() {
        Ok(id) => state.vms().get(&id).filter(|vm| may_see(caller, vm.tenant)),
        Err(()) => state.vm_named(tenant(state, caller, tenant_name)?.id, name),
    };
    row.filter(|vm| !vm.ghost).ok_or_else(|| missing(Noun::Vm, name))
}

pub(crate) fn network<'a>(
    state: &'a State,
    caller: &Caller,
    tenant_name: &str,
    name: &str,
) -> Result<&'a Network, ApiError> {
    let row = match name.parse() {
        Ok(id) => state.networks().get(&id).filter(|network| may_see(caller, network.tenant)),
        Err(()) => state.network_named(tenant(state, caller, tenant_name)?.id, name),
    };
    row.ok_or_else(|| missing(Noun::Network, name))
}

pub(crate) fn image<'a>(
    state: &'a State,
    caller: &Caller,
    tenant_name: &str,
    name: &str,
) -> Result<&'a Image, ApiError> {
    let row = match name.parse() {
        Ok(id) => state.images().get(&id).filter(|image| may_see(caller, image.tenant)),
        Err(()) => state.image_named(tenant(state, caller, tenant_name)?.id, name),
    };
    row.ok_or_else(|| missing(Noun::Image, name))
}

pub(crate) fn node<'a>(state: &'a State, name: &str) -> Result<&'a Node, ApiError> {
    let row = match name.parse() {
        Ok(id) => state.nodes().get(&id),
        Err(()) => state.node_named(name),
    };
    row.ok_or_else(|| missing(Noun::Node, name))
}

fn may_see(caller: &Caller, tenant: model::TenantId) -> bool {
    match caller.role {
        Role::Operator => true,
        Role::Member(own) => own == tenant,
    }
}

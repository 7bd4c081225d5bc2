//! `trefoil tenant`: customers and how much they may use.

use api::{
    error::ApiError,
    proto::{CreateTenantRequest, ListTenantsReply, NamedRef, Quota, Tenant},
};
use clap::{Args, Subcommand};
use serde_json::json;

use crate::{
    context::{Context, all_pages, change, read},
    output::Rows,
    quantity::{size, size_text},
};

#[derive(Debug, Subcommand)]
pub enum TenantCommand {
    /// Creates a tenant (operators)
    #[command(after_help = "Example:\n  trefoil tenant create acme --vms 20 --memory 64GiB")]
    Create {
        /// Name
        name: String,
        #[command(flatten)]
        quota: QuotaArgs,
    },
    /// Lists tenants, with what they use and may use
    #[command(after_help = "Example:\n  trefoil tenant list")]
    List,
    /// Deletes a tenant; refused while it holds anything (operators)
    #[command(after_help = "Example:\n  trefoil tenant delete acme")]
    Delete {
        /// Name or id
        name: String,
    },
    /// Changes the given limits of a tenant and leaves the others (operators)
    #[command(after_help = "Example:\n  trefoil tenant set-quota acme --vms 40")]
    SetQuota {
        /// Name or id
        name: String,
        #[command(flatten)]
        quota: QuotaArgs,
    },
}

#[derive(Debug, Default, Args)]
pub struct QuotaArgs {
    /// Machines [default of a new tenant: 100]
    #[arg(long)]
    vms: Option<u64>,
    /// Virtual CPUs of all machines together [default of a new tenant: 400]
    #[arg(long)]
    vcpus: Option<u64>,
    /// Memory of all machines together [default of a new tenant: 1TiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Disk of all machines together [default of a new tenant: 10TiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    disk: Option<u64>,
    /// Networks [default of a new tenant: 20]
    #[arg(long)]
    networks: Option<u64>,
    /// Images of all sizes together [default of a new tenant: 1TiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    images: Option<u64>,
}

/// A middling customer; an operator who wants another says so.
const NEW: Quota =
    Quota { vms: 100, vcpus: 400, memory_bytes: 1 << 40, disk_bytes: 10 << 40, networks: 20, image_bytes: 1 << 40 };

impl QuotaArgs {
    fn over(&self, base: Quota) -> Quota {
        Quota {
            vms: self.vms.unwrap_or(base.vms),
            vcpus: self.vcpus.unwrap_or(base.vcpus),
            memory_bytes: self.memory.unwrap_or(base.memory_bytes),
            disk_bytes: self.disk.unwrap_or(base.disk_bytes),
            networks: self.networks.unwrap_or(base.networks),
            image_bytes: self.images.unwrap_or(base.image_bytes),
        }
    }
}

pub async fn run(command: TenantCommand, context: &Context) -> Result<(), ApiError> {
    match command {
        TenantCommand::Create { name, quota } => {
            let body = CreateTenantRequest { name, quota: Some(quota.over(NEW)) };
            let tenant = change!(context, create_tenant, body)?;
            context.print(&tenant, || format!("{} '{}'", tenant.id, tenant.name))
        }
        TenantCommand::List => {
            let reply = ListTenantsReply { tenants: all(context).await?, next: String::new() };
            context.print(&reply, || table(&reply.tenants).render(None))
        }
        TenantCommand::Delete { name } => {
            change!(context, delete_tenant, NamedRef { name: name.clone(), ..NamedRef::default() })?;
            context.print(&json!({ "deleted": name }), || format!("deleted {name}"))
        }
        TenantCommand::SetQuota { name, quota } => {
            let tenants = all(context).await?;
            let tenant = tenants.into_iter().find(|tenant| tenant.name == name || tenant.id == name);
            let tenant = tenant.ok_or_else(|| ApiError::not_found(format!("tenant '{name}' does not exist")))?;
            let quota = Some(quota.over(tenant.quota.unwrap_or(NEW)));
            let tenant = change!(context, set_quota, CreateTenantRequest { name, quota })?;
            context.print(&tenant, || table(std::slice::from_ref(&tenant)).render(None))
        }
    }
}

async fn all(context: &Context) -> Result<Vec<Tenant>, ApiError> {
    all_pages(async |after| {
        let page = read!(context, list_tenants, context.page(after))?;
        Ok((page.tenants, page.next))
    })
    .await
}

fn table(tenants: &[Tenant]) -> Rows {
    let row = |tenant: &Tenant| {
        let (used, quota) = (tenant.used.unwrap_or_default(), tenant.quota.unwrap_or_default());
        let sizes = |used, quota| format!("{}/{}", size_text(used), size_text(quota));
        vec![
            tenant.id.clone(),
            tenant.name.clone(),
            format!("{}/{}", used.vms, quota.vms),
            format!("{}/{}", used.vcpus, quota.vcpus),
            sizes(used.memory_bytes, quota.memory_bytes),
            sizes(used.disk_bytes, quota.disk_bytes),
            format!("{}/{}", used.networks, quota.networks),
            sizes(used.image_bytes, quota.image_bytes),
        ]
    };
    let header = &["ID", "NAME", ">VMS", ">VCPUS", ">MEMORY", ">DISK", ">NETWORKS", ">IMAGES"];
    Rows::new(header, tenants.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_given_limits_change() {
        let asked = QuotaArgs { vms: Some(1), disk: Some(0), ..QuotaArgs::default() };
        assert_eq!(asked.over(NEW), Quota { vms: 1, disk_bytes: 0, ..NEW });
    }
}

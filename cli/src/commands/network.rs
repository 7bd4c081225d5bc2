//! `trefoil network`: tenant networks.

use api::{
    error::ApiError,
    proto::{CreateNetworkRequest, ListNetworksReply, Network},
};
use clap::Subcommand;
use serde_json::json;

use crate::{
    context::{Context, all_pages, change, read},
    output::{self, Rows},
};

#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Creates a network of a tenant's own; other tenants may have the same range
    #[command(after_help = "Example:\n  trefoil network create blue --range 10.0.0.0/24")]
    Create {
        /// Name
        name: String,
        /// IPv4 range, prefix 8 to 29
        #[arg(long, value_name = "CIDR")]
        range: String,
    },
    /// Lists networks
    #[command(after_help = "Example:\n  trefoil network list")]
    List,
    /// Deletes a network; refused while a machine is in it
    #[command(after_help = "Example:\n  trefoil network delete blue")]
    Delete {
        /// Name or id
        network: String,
    },
}

pub async fn run(command: NetworkCommand, context: &Context) -> Result<(), ApiError> {
    match command {
        NetworkCommand::Create { name, range } => {
            let body = CreateNetworkRequest { tenant: context.tenant.clone(), name, range };
            let network = change!(context, create_network, body)?;
            context.print(&network, || format!("{} '{}' {}", network.id, network.name, network.range))
        }
        NetworkCommand::List => list(context).await,
        NetworkCommand::Delete { network } => {
            change!(context, delete_network, context.named(network.clone()))?;
            context.print(&json!({ "deleted": network }), || format!("deleted {network}"))
        }
    }
}

async fn list(context: &Context) -> Result<(), ApiError> {
    let mut read_at = None;
    let networks = all_pages(async |after| {
        let page = read!(context, list_networks, context.page(after))?;
        read_at = page.read_at;
        Ok((page.networks, page.next))
    })
    .await?;
    output::label(context.format, read_at.as_ref());
    let reply = ListNetworksReply { networks, next: String::new(), read_at };
    let row = |network: &Network| {
        let used = format!("{} of {}", network.addresses_used, network.addresses_total);
        vec![network.id.clone(), network.name.clone(), network.range.clone(), network.vni.to_string(), used]
    };
    context.print(&reply, || {
        Rows::new(&["ID", "NAME", "RANGE", ">VNI", ">ADDRESSES USED"], reply.networks.iter().map(row)).render(None)
    })
}

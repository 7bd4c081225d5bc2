//! `trefoil template`: the sizes that machines may have, and how they weigh on the bill.

use api::{
    error::ApiError,
    proto::{ListTemplatesReply, NamedRef, Template},
};
use clap::{Args, Subcommand};
use serde_json::json;

use crate::{
    context::{Context, change, read},
    output::Rows,
    quantity::{milli, milli_text, size, size_text},
};

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Offers a size (operators)
    #[command(
        after_help = "Example:\n  trefoil template create small --vcpus 1 --memory 512MiB --disk 5GiB --weight 1"
    )]
    Create(CreateArgs),
    /// Lists templates
    #[command(after_help = "Example:\n  trefoil template list")]
    List,
    /// Withdraws a size; machines that have it keep it (operators)
    #[command(after_help = "Example:\n  trefoil template delete small")]
    Delete {
        /// Name
        template: String,
    },
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name
    name: String,
    /// Virtual CPUs
    #[arg(long)]
    vcpus: u64,
    /// Memory
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: u64,
    /// Disk
    #[arg(long, value_name = "SIZE", value_parser = size)]
    disk: u64,
    /// How much it counts on the bill: the price book prices a weight of 1
    #[arg(long, value_name = "NUMBER", value_parser = milli, default_value = "1")]
    weight: u64,
}

pub async fn run(command: TemplateCommand, context: &Context) -> Result<(), ApiError> {
    match command {
        TemplateCommand::Create(args) => {
            let body = Template {
                name: args.name,
                vcpus: args.vcpus,
                memory_bytes: args.memory,
                disk_bytes: args.disk,
                weight_milli: args.weight,
            };
            let template = change!(context, create_template, body)?;
            context.print(&template, || format!("template '{}'", template.name))
        }
        TemplateCommand::List => {
            let reply = read!(context, list_templates, context.page(String::new()))?;
            context.print(&reply, || table(&reply).render(None))
        }
        TemplateCommand::Delete { template } => {
            change!(context, delete_template, NamedRef { name: template.clone(), ..NamedRef::default() })?;
            context.print(&json!({ "deleted": template }), || format!("deleted {template}"))
        }
    }
}

fn table(reply: &ListTemplatesReply) -> Rows {
    let row = |template: &Template| {
        vec![
            template.name.clone(),
            template.vcpus.to_string(),
            size_text(template.memory_bytes),
            size_text(template.disk_bytes),
            milli_text(template.weight_milli),
        ]
    };
    Rows::new(&["NAME", ">VCPUS", ">MEMORY", ">DISK", ">WEIGHT"], reply.templates.iter().map(row))
}

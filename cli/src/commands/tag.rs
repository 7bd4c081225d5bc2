//! `trefoil tag`: a tenant's own small values, each with a version to compare and set by.

use api::{
    error::ApiError,
    proto::{DeleteTagRequest, GetTagRequest, ListTagsReply, SetTagRequest, Tag},
};
use clap::Subcommand;
use serde_json::json;

use crate::{
    context::{Context, all_pages, change, read},
    output::{self, Rows, printable},
};

#[derive(Debug, Subcommand)]
pub enum TagCommand {
    /// Writes a tag and prints its new version
    #[command(after_help = "Example:\n  trefoil tag set release 1.4 --expected-version 0")]
    Set {
        /// Key
        key: String,
        /// Value
        value: String,
        /// Only when it has this version; 0: only when it does not exist
        #[arg(long, value_name = "VERSION")]
        expected_version: Option<u64>,
    },
    /// Prints the value of a tag
    #[command(after_help = "Example:\n  trefoil tag get release")]
    Get {
        /// Key
        key: String,
    },
    /// Lists tags
    #[command(after_help = "Example:\n  trefoil tag list")]
    List,
    /// Deletes a tag
    #[command(after_help = "Example:\n  trefoil tag delete release")]
    Delete {
        /// Key
        key: String,
        /// Only when it has this version
        #[arg(long, value_name = "VERSION")]
        expected_version: Option<u64>,
    },
}

pub async fn run(command: TagCommand, context: &Context) -> Result<(), ApiError> {
    let tenant = context.tenant.clone();
    match command {
        TagCommand::Set { key, value, expected_version } => {
            let tag = change!(context, set_tag, SetTagRequest { tenant, key, value, expected_version })?;
            context.print(&tag, || format!("version {}", tag.version))
        }
        TagCommand::Get { key } => {
            let tag = read!(context, get_tag, GetTagRequest { tenant, key, stale: context.stale })?;
            output::label(context.format, tag.read_at.as_ref());
            context.print(&tag, || printable(&tag.value).into_owned())
        }
        TagCommand::List => list(context).await,
        TagCommand::Delete { key, expected_version } => {
            change!(context, delete_tag, DeleteTagRequest { tenant, key: key.clone(), expected_version })?;
            context.print(&json!({ "deleted": key }), || format!("deleted {key}"))
        }
    }
}

async fn list(context: &Context) -> Result<(), ApiError> {
    let mut read_at = None;
    let tags = all_pages(async |after| {
        let page = read!(context, list_tags, context.page(after))?;
        read_at = page.read_at;
        Ok((page.tags, page.next))
    })
    .await?;
    output::label(context.format, read_at.as_ref());
    let reply = ListTagsReply { tags, next: String::new(), read_at };
    let row = |tag: &Tag| vec![tag.key.clone(), tag.value.clone(), tag.version.to_string()];
    context.print(&reply, || Rows::new(&["KEY", "VALUE", ">VERSION"], reply.tags.iter().map(row)).render(None))
}

//! `trefoil image`: disk images in the replicated store.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

use api::{
    error::ApiError,
    proto::{Image, ImportImageHeader, ListImagesReply},
};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::{
    context::{Context, all_pages, change, read},
    image_file::{self, ImageFormat},
    moment::moment_text,
    output::{self, Rows, details},
    quantity::size_text,
};

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Uploads an image; it is on several nodes when this returns
    #[command(after_help = "Example:\n  trefoil image import debian-12.qcow2 --name debian")]
    Import(ImportArgs),
    /// Lists images
    #[command(after_help = "Example:\n  trefoil image list")]
    List,
    /// Shows one image
    #[command(after_help = "Example:\n  trefoil image show debian")]
    Show {
        /// Name or id
        image: String,
    },
    /// Downloads an image and checks its digest
    #[command(after_help = "Example:\n  trefoil image export debian copy.qcow2")]
    Export {
        /// Name or id
        image: String,
        /// Where to; must not exist
        file: PathBuf,
    },
    /// Deletes an image; refused while a machine is made from it
    #[command(after_help = "Example:\n  trefoil image delete debian")]
    Delete {
        /// Name or id
        image: String,
    },
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// A qcow2 image, or a raw disk with --format raw
    file: PathBuf,
    /// Name in the cloud
    #[arg(long)]
    name: String,
    /// What the file is; found out for qcow2
    #[arg(long, value_enum)]
    format: Option<ImageFormat>,
}

pub async fn run(command: ImageCommand, context: &Context) -> Result<(), ApiError> {
    match command {
        ImageCommand::Import(args) => import(args, context).await,
        ImageCommand::List => list(context).await,
        ImageCommand::Show { image } => {
            let image = read!(context, get_image, context.named(image))?;
            context.print(&image, || describe(&image))
        }
        ImageCommand::Export { image, file } => export(image, &file, context).await,
        ImageCommand::Delete { image } => {
            change!(context, delete_image, context.named(image.clone()))?;
            context.print(&json!({ "deleted": image }), || format!("deleted {image}"))
        }
    }
}

async fn import(args: ImportArgs, context: &Context) -> Result<(), ApiError> {
    let found = image_file::inspect(&args.file, args.format)?;
    let bar = progress_bar(found.size_bytes);
    bar.set_message("checking");
    let digest = image_file::digest(&args.file, |done| bar.set_position(done))?;
    let header = ImportImageHeader {
        tenant: context.tenant.clone(),
        name: args.name,
        format: found.format.name().into(),
        size_bytes: found.size_bytes,
        virtual_bytes: found.virtual_bytes,
        digest: digest.to_string(),
    };
    bar.reset();
    bar.set_message("uploading");
    let sent = |done: u64| {
        bar.set_position(done);
        if done == found.size_bytes {
            bar.set_message("replicating");
        }
    };
    let imported = context.client.import_image(context.request, header, &args.file, sent).await;
    bar.finish_and_clear();
    let image = imported?;
    context.print(&image, || {
        let nodes = if image.replicas.is_empty() { "no node yet".into() } else { image.replicas.join(", ") };
        format!("{} '{}' {} on {nodes}", image.id, image.name, size_text(image.size_bytes))
    })
}

async fn export(name: String, file: &Path, context: &Context) -> Result<(), ApiError> {
    if file.exists() {
        return Err(ApiError::new("already-exists", format!("{} exists already", file.display())));
    }
    let image = read!(context, get_image, context.named(name.clone()))?;
    let bar = progress_bar(image.size_bytes);
    bar.set_message("downloading");
    let written = context.client.export_image(context.named(name), file, |done| bar.set_position(done)).await;
    bar.finish_and_clear();
    let digest = written?.to_string();
    if digest != image.digest {
        // What arrived is not the image; a file with its name would be taken for it.
        let _ = std::fs::remove_file(file);
        return Err(ApiError::new("failed", format!("received {digest}, but the image is {}", image.digest)));
    }
    let path = file.display().to_string();
    context.print(&json!({ "file": path, "digest": digest, "size_bytes": image.size_bytes }), || {
        format!("{path} {}", size_text(image.size_bytes))
    })
}

async fn list(context: &Context) -> Result<(), ApiError> {
    let mut read_at = None;
    let images = all_pages(async |after| {
        let page = read!(context, list_images, context.page(after))?;
        read_at = page.read_at;
        Ok((page.images, page.next))
    })
    .await?;
    output::label(context.format, read_at.as_ref());
    let reply = ListImagesReply { images, next: String::new(), read_at };
    context.print(&reply, || table(&reply.images).render(None))
}

fn table(images: &[Image]) -> Rows {
    let row = |image: &Image| {
        vec![
            image.id.clone(),
            image.name.clone(),
            image.format.clone(),
            size_text(image.size_bytes),
            size_text(image.virtual_bytes),
            format!("{}/{}", image.replicas.len(), image.wanted_replicas),
            image.replicas.join(" "),
            moment_text(image.created_at_millis),
        ]
    };
    let header = &["ID", "NAME", "FORMAT", ">SIZE", ">DISK", ">COPIES", "NODES", "CREATED"];
    Rows::new(header, images.iter().map(row))
}

fn describe(image: &Image) -> String {
    details(
        &[
            ("id", image.id.clone()),
            ("name", image.name.clone()),
            ("tenant", image.tenant.clone()),
            ("format", image.format.clone()),
            ("size", size_text(image.size_bytes)),
            ("disk", size_text(image.virtual_bytes)),
            ("digest", image.digest.clone()),
            ("copies", format!("{} of {}", image.replicas.len(), image.wanted_replicas)),
            ("nodes", image.replicas.join(" ")),
            ("created at", moment_text(image.created_at_millis)),
        ],
        None,
    )
}

fn progress_bar(bytes: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(bytes);
    let template = "{msg:11} [{bar:30}] {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

//! What may be typed: the nouns, and the options that every command understands. The verbs are with their nouns.

use std::{path::PathBuf, time::Duration};

use api::RequestId;
use clap::{Args, Parser, Subcommand};

use crate::{
    commands::{
        backup, bill, completion, image, network, node, price, quorum, recovery, setting, tag, template, tenant, user,
        vm, watch,
    },
    output::Format,
    quantity::duration,
};

const EXAMPLES: &str = "\
Examples:
  trefoil image import disk.qcow2 --name debian
  trefoil network create blue --range 10.0.0.0/24
  trefoil vm create web --image debian --template normal --network blue
  trefoil vm list --output json

Exit status:
  0 done   1 refused or failed   2 usage   3 not found   4 conflict, in use, other version
  5 unavailable or no quorum   6 outcome unknown (asking again with the same --request-id is safe)
  7 unauthenticated or forbidden";

/// Runs a cloud, and speaks to it.
#[derive(Debug, Parser)]
#[command(name = "trefoil", version, after_help = EXAMPLES, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Each is taken from the flag, else from the environment, else from the configuration file.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Controller to speak to, host:port or unix:/path; may be given several times [TREFOIL_ENDPOINTS, by commas]
    #[arg(long = "endpoint", global = true, value_name = "ENDPOINT")]
    pub endpoints: Vec<String>,
    /// Configuration file [TREFOIL_CONFIG; default: ~/.config/trefoil/client.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The cloud's CA certificate, a file or the PEM text [TREFOIL_CA]
    #[arg(long, global = true, value_name = "PEM")]
    pub ca: Option<String>,
    /// User's token; other users of this machine can see it in the process list [TREFOIL_TOKEN]
    #[arg(long, global = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Tenant, name or id; a member may leave it out [TREFOIL_TENANT]
    #[arg(long, global = true, value_name = "TENANT")]
    pub tenant: Option<String>,
    /// Tables for people or JSON for programs [TREFOIL_OUTPUT; default: table]
    #[arg(long, short, global = true, value_enum, value_name = "FORMAT")]
    pub output: Option<Format>,
    /// Id of the request; repeat a request under its id and it is carried out once
    #[arg(long, global = true, value_name = "UUID", value_parser = request_id)]
    pub request_id: Option<RequestId>,
    /// How long to go on asking the controllers, such as 10s or 2m
    #[arg(long, global = true, value_name = "TIME", value_parser = duration, default_value = "30s")]
    pub timeout: Duration,
    /// Read from whichever controller answers, without asking the others whether it is up to date
    #[arg(long, global = true)]
    pub stale: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Virtual machines
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Backups of machines, and what is made from them
    #[command(subcommand)]
    Backup(backup::BackupCommand),
    /// Disk images
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Tenant networks
    #[command(subcommand)]
    Network(network::NetworkCommand),
    /// Hosts that run machines
    #[command(subcommand)]
    Node(node::NodeCommand),
    /// Sizes that machines may have
    #[command(subcommand)]
    Template(template::TemplateCommand),
    /// Customers and their quotas
    #[command(subcommand)]
    Tenant(tenant::TenantCommand),
    /// People with a token
    #[command(subcommand)]
    User(user::UserCommand),
    /// A tenant's own small values, with compare and set
    #[command(subcommand)]
    Tag(tag::TagCommand),
    /// What a tenant's use costs
    #[command(subcommand)]
    Bill(bill::BillCommand),
    /// The price book
    #[command(subcommand)]
    Price(price::PriceCommand),
    /// Numbers that an operator may change
    #[command(subcommand)]
    Setting(setting::SettingCommand),
    /// What is lost, what waits, and the brake
    #[command(subcommand)]
    Recovery(recovery::RecoveryCommand),
    /// Prints one line per change until interrupted
    #[command(after_help = watch::EXAMPLE)]
    Watch(watch::WatchArgs),
    /// The controllers as one
    #[command(subcommand)]
    Quorum(quorum::QuorumCommand),
    /// Makes or runs one controller
    #[cfg(feature = "controller")]
    #[command(subcommand)]
    Controller(crate::commands::controller::ControllerCommand),
    /// Makes or runs the agent of this host
    #[cfg(feature = "agent")]
    #[command(subcommand)]
    Agent(crate::commands::agent::AgentCommand),
    /// Starts a whole cloud on this machine
    #[cfg(all(feature = "controller", feature = "agent"))]
    #[command(after_help = "Example:\n  trefoil up --hypervisor simulated")]
    Up(crate::lab::UpArgs),
    /// Ends the cloud that 'up' started and removes every trace of it
    #[cfg(all(feature = "controller", feature = "agent"))]
    #[command(after_help = "Example:\n  trefoil down")]
    Down(crate::lab::DownArgs),
    /// Breaks the cloud that 'up' started, mends it, and looks inside
    #[cfg(all(feature = "controller", feature = "agent"))]
    #[command(subcommand, after_help = "Example:\n  trefoil lab kill c1")]
    Lab(crate::lab::LabCommand),
    /// Hurts a cloud on purpose, watches it heal, and reports
    #[cfg(all(feature = "controller", feature = "agent"))]
    #[command(subcommand)]
    Drill(crate::drill::DrillCommand),
    /// Prints a completion script for a shell
    #[command(after_help = completion::EXAMPLE)]
    Completion(completion::CompletionArgs),
}

impl Command {
    /// Whether it is the service itself and not a client: it gets threads, and a log that is on.
    pub fn is_server(&self) -> bool {
        match self {
            #[cfg(feature = "controller")]
            Self::Controller(command) => command.is_server(),
            #[cfg(feature = "agent")]
            Self::Agent(command) => command.is_server(),
            _ => false,
        }
    }

    pub fn logs_json(&self) -> bool {
        match self {
            #[cfg(feature = "controller")]
            Self::Controller(command) => command.logs_json(),
            #[cfg(feature = "agent")]
            Self::Agent(command) => command.logs_json(),
            _ => false,
        }
    }
}

fn request_id(text: &str) -> Result<RequestId, &'static str> {
    text.parse().map_err(|()| "a request id is a UUID: 32 hexadecimal digits, with or without dashes")
}

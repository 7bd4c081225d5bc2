//! `trefoil user`: who may speak to the cloud.

use api::{
    error::ApiError,
    proto::{CreateUserRequest, NamedRef, User},
};
use clap::{Subcommand, ValueEnum};
use serde_json::json;

use crate::{
    context::{Context, change, read},
    output::Rows,
};

#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Creates a user and prints the token, which cannot be shown again (operators)
    #[command(after_help = "Example:\n  trefoil user create ann --role member --tenant acme")]
    Create {
        /// Name
        name: String,
        /// What the user may do: everything, or everything inside the --tenant
        #[arg(long, value_enum)]
        role: Role,
    },
    /// Lists users (operators)
    #[command(after_help = "Example:\n  trefoil user list")]
    List,
    /// Deletes a user; the token stops working at once (operators)
    #[command(after_help = "Example:\n  trefoil user delete ann")]
    Delete {
        /// Name
        name: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    Operator,
    Member,
}

pub async fn run(command: UserCommand, context: &Context) -> Result<(), ApiError> {
    match command {
        UserCommand::Create { name, role } => {
            let (role, tenant) = match role {
                Role::Operator => ("operator", String::new()),
                Role::Member => ("member", context.tenant.clone()),
            };
            let created = change!(context, create_user, CreateUserRequest { name, role: role.into(), tenant })?;
            // The token alone, so that it can be piped to where it belongs.
            context.print(&created, || created.token.clone())
        }
        UserCommand::List => {
            let reply = read!(context, list_users, context.page(String::new()))?;
            let row = |user: &User| vec![user.name.clone(), user.role.clone(), user.tenant.clone()];
            context.print(&reply, || Rows::new(&["NAME", "ROLE", "TENANT"], reply.users.iter().map(row)).render(None))
        }
        UserCommand::Delete { name } => {
            change!(context, delete_user, NamedRef { name: name.clone(), ..NamedRef::default() })?;
            context.print(&json!({ "deleted": name }), || format!("deleted {name}"))
        }
    }
}

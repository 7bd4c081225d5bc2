//! `trefoil setting`: numbers that an operator may change while the cloud runs.

use api::{error::ApiError, proto::Setting};
use clap::Subcommand;

use crate::{
    context::{Context, change, read},
    output::Rows,
};

#[derive(Debug, Subcommand)]
pub enum SettingCommand {
    /// Changes a setting (operators)
    #[command(after_help = "Example:\n  trefoil setting set weight-memory 5")]
    Set {
        /// Name, as the list shows it
        name: String,
        /// New value
        value: u64,
    },
    /// Lists settings with their ranges and what they are for
    #[command(after_help = "Example:\n  trefoil setting list")]
    List,
}

pub async fn run(command: SettingCommand, context: &Context) -> Result<(), ApiError> {
    match command {
        SettingCommand::Set { name, value } => {
            let setting = change!(context, set_setting, Setting { name, value, ..Setting::default() })?;
            context.print(&setting, || format!("{} {}", setting.name, setting.value))
        }
        SettingCommand::List => {
            let reply = read!(context, list_settings, context.page(String::new()))?;
            let row = |setting: &Setting| {
                vec![
                    setting.name.clone(),
                    setting.value.to_string(),
                    setting.default_value.to_string(),
                    format!("{} to {}", setting.min, setting.max),
                    setting.about.clone(),
                ]
            };
            let header = &["NAME", ">VALUE", ">DEFAULT", "RANGE", "ABOUT"];
            context.print(&reply, || Rows::new(header, reply.settings.iter().map(row)).render(None))
        }
    }
}

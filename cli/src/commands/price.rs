//! `trefoil price`: the price book.

use api::{
    error::ApiError,
    proto::{Price, SetPriceRequest},
};
use clap::Subcommand;
use serde_json::json;

use crate::{
    context::{Context, change, read},
    moment::{moment, moment_text},
    output::Rows,
    quantity::{nano, nano_text},
};

#[derive(Debug, Subcommand)]
pub enum PriceCommand {
    /// Sets what a weight of 1 costs an hour; the past keeps its price (operators)
    #[command(after_help = "Example:\n  trefoil price set 0.05 --from 2027-01-01")]
    Set {
        /// Amount of currency, at most nine decimals
        #[arg(value_parser = nano)]
        amount: u64,
        /// From when, UTC [default: now]
        #[arg(long, value_name = "TIME", value_parser = moment, default_value = "0", hide_default_value = true)]
        from: u64,
    },
    /// Lists prices, past and to come
    #[command(after_help = "Example:\n  trefoil price list")]
    List,
}

pub async fn run(command: PriceCommand, context: &Context) -> Result<(), ApiError> {
    match command {
        PriceCommand::Set { amount, from } => {
            change!(context, set_price, SetPriceRequest { nano_per_hour: amount, from_millis: from })?;
            context.print(&json!({ "nano_per_hour": amount, "from_millis": from }), || {
                let when = if from == 0 { "now".into() } else { moment_text(from) };
                format!("{} an hour from {when}", nano_text(amount))
            })
        }
        PriceCommand::List => {
            let reply = read!(context, list_prices, context.page(String::new()))?;
            let row = |price: &Price| vec![moment_text(price.from_millis), nano_text(price.nano_per_hour)];
            context.print(&reply, || Rows::new(&["FROM", ">AN HOUR"], reply.prices.iter().map(row)).render(None))
        }
    }
}

//! `trefoil bill`: what a tenant's use costs, line by line.

use api::{
    error::ApiError,
    proto::{Bill, BillLine, GetBillRequest},
};
use clap::Subcommand;

use crate::{
    context::{Context, read},
    moment::{moment, moment_text},
    output::{self, Rows},
    quantity::{duration_text, milli_text, nano_text},
};

#[derive(Debug, Subcommand)]
pub enum BillCommand {
    /// Shows the bill of a tenant; lines that are still running count up to now
    #[command(after_help = "Example:\n  trefoil bill show --tenant acme --from 2026-11-01 --to 2026-12-01")]
    Show {
        /// From when, UTC [default: the beginning]
        #[arg(long, value_name = "TIME", value_parser = moment, default_value = "0", hide_default_value = true)]
        from: u64,
        /// Until when, UTC [default: now]
        #[arg(long, value_name = "TIME", value_parser = moment, default_value = "0", hide_default_value = true)]
        to: u64,
    },
}

pub async fn run(command: BillCommand, context: &Context) -> Result<(), ApiError> {
    let BillCommand::Show { from, to } = command;
    let tenant = context.tenant.clone();
    let body = GetBillRequest { tenant, from_millis: from, to_millis: to, stale: context.stale };
    let bill = read!(context, get_bill, body)?;
    output::label(context.format, bill.read_at.as_ref());
    context.print(&bill, || describe(&bill))
}

fn describe(bill: &Bill) -> String {
    let row = |line: &BillLine| {
        vec![
            line.resource.clone(),
            line.name.clone(),
            line.status.clone(),
            milli_text(line.weight_milli),
            moment_text(line.from_millis),
            if line.open { "still running".into() } else { moment_text(line.to_millis) },
            duration_text(line.to_millis.saturating_sub(line.from_millis)),
            nano_text(line.nano),
        ]
    };
    let header = &["RESOURCE", "NAME", "STATUS", ">WEIGHT", "FROM", "TO", ">TIME", ">AMOUNT"];
    let lines = Rows::new(header, bill.lines.iter().map(row)).render(None);
    format!("{lines}\n\ntotal {}", nano_text(bill.total_nano))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bill_ends_with_its_total() {
        let line = BillLine {
            resource: "vm-1".into(),
            name: "web".into(),
            status: "running".into(),
            weight_milli: 1500,
            from_millis: 1_700_000_000_000,
            to_millis: 1_700_000_065_000,
            open: true,
            nano: 2_500_000,
            ..BillLine::default()
        };
        let bill = Bill { lines: vec![line], total_nano: 2_500_001, ..Bill::default() };
        let text = describe(&bill);
        assert!(
            text.contains("vm-1      web   running     1.5  2023-11-14 22:13:20  still running  1m 5s  0.0025"),
            "{text}"
        );
        assert!(text.ends_with("\n\ntotal 0.002500001"), "{text}");
    }
}

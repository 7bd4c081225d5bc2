//! What use costs: weight × price × time, in integers, rounded once.

use crate::{Resource, State, TenantId, Timestamp, table::Table};

/// Thousandths of a weight times milliseconds of an hour: what an exact amount is divided by to give nano-units.
pub const EXACT_PER_NANO: u128 = 1000 * 3_600_000;

/// One line of a bill: a resource in one state over one span of time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BillLine {
    pub resource: Resource,
    pub name: String,
    pub status: String,
    pub weight_milli: u64,
    pub from: Timestamp,
    pub to: Timestamp,
    /// It goes on.
    pub open: bool,
    /// Nano-units an hour × thousandths × milliseconds.
    pub exact: u128,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bill {
    pub from: Timestamp,
    pub to: Timestamp,
    pub lines: Vec<BillLine>,
    /// The exact sum, rounded half up, once.
    pub total_nano: u128,
}

/// What a tenant used in `from..to`, cut to that span and to `now`, the reader's time: what goes on is counted up to
/// it, because the log may have been quiet for long. Times before the last entry count as that entry's.
pub fn bill(state: &State, tenant: TenantId, from: Timestamp, to: Timestamp, now: Timestamp) -> Bill {
    let now = now.max(state.now());
    let to = to.min(now);
    let ended = state.lines().range((tenant, 0)..=(tenant, u64::MAX)).map(|(_, line)| {
        let (name, status) = (line.name.clone(), line.status.clone());
        BillLine {
            resource: line.resource,
            name,
            status,
            weight_milli: line.weight_milli,
            from: line.from,
            to: line.to,
            open: false,
            exact: 0,
        }
    });
    let open = state.meters_of_tenant(tenant).map(|meter| {
        let (name, status) = (meter.name.clone(), meter.status.clone());
        BillLine {
            resource: meter.resource,
            name,
            status,
            weight_milli: meter.weight_milli,
            from: meter.since,
            to: now,
            open: true,
            exact: 0,
        }
    });
    let mut lines: Vec<BillLine> = ended.chain(open).filter_map(|line| cut(line, from, to)).collect();
    for line in &mut lines {
        line.exact = exact(state.prices(), line.weight_milli, line.from, line.to);
    }
    lines.sort_by_key(|line| (line.resource, line.from));
    let sum = lines.iter().fold(0u128, |sum, line| sum.saturating_add(line.exact));
    Bill { from, to, lines, total_nano: sum.saturating_add(EXACT_PER_NANO / 2) / EXACT_PER_NANO }
}

fn cut(mut line: BillLine, from: Timestamp, to: Timestamp) -> Option<BillLine> {
    line.open &= line.to <= to;
    line.from = line.from.max(from);
    line.to = line.to.min(to);
    (line.from < line.to).then_some(line)
}

/// The price of each moment is the one in force at that moment, so a use that spans a change is charged by both.
fn exact(prices: &Table<Timestamp, u64>, weight_milli: u64, from: Timestamp, to: Timestamp) -> u128 {
    let mut sum = 0u128;
    let mut end = to;
    for (since, nano_per_hour) in prices.range(..to).rev() {
        let start = from.max(*since);
        // A product of the largest price and weight overflows after centuries: then the amount stays at its largest.
        let rate = u128::from(*nano_per_hour) * u128::from(weight_milli);
        sum = rate.saturating_mul(u128::from(end.millis_since(start))).saturating_add(sum);
        end = start;
        if start == from {
            break;
        }
    }
    sum
}

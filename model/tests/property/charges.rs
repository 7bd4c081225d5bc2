//! What use costs, computed a second way: from the phases as they were between one entry and the next, and the price
//! of each moment in between. It never looks at a meter or a line.

use std::collections::BTreeMap;

use model::{bill, *};

/// Nano-units an hour × thousandths × milliseconds, by tenant.
#[derive(Default)]
pub struct Ledger {
    sums: BTreeMap<TenantId, u128>,
}

impl Ledger {
    pub fn of(&self, tenant: TenantId) -> u128 {
        self.sums.get(&tenant).copied().unwrap_or_default()
    }

    /// Charges the time from the state's `now` to `until`, during which nothing changed.
    pub fn pass(&mut self, state: &State, until: Timestamp) {
        let price_millis = price_over(state, state.now(), until);
        if price_millis == 0 {
            return;
        }
        for vm in state.vms().values() {
            let permille = match vm.phase {
                _ if vm.ghost || vm.wanted == Wanted::Deleted => 0,
                Some(Phase::Running) => state.setting(setting::BILL_RUNNING),
                Some(Phase::Suspended) => state.setting(setting::BILL_SUSPENDED),
                Some(Phase::Stopped) => state.setting(setting::BILL_STOPPED),
                _ => 0,
            };
            self.charge(vm.tenant, vm.weight_milli * permille / 1000, price_millis);
        }
        for image in state.images().values() {
            // Below the tier, as all images of these tests are.
            let milli_gib = u128::from(image.size_bytes) * u128::from(state.setting(setting::BILL_IMAGE));
            self.charge(image.tenant, milli_gib.div_ceil(1 << 30) as u64, price_millis);
        }
    }

    fn charge(&mut self, tenant: TenantId, weight_milli: u64, price_millis: u128) {
        *self.sums.entry(tenant).or_default() += u128::from(weight_milli) * price_millis;
    }
}

/// The integral of the price over a span, piece by piece between the times at which it changes.
fn price_over(state: &State, from: Timestamp, to: Timestamp) -> u128 {
    let changes = state.prices().iter().map(|(at, _)| *at).filter(|at| *at > from && *at < to);
    let mut ends: Vec<Timestamp> = changes.chain([from, to]).collect();
    ends.sort();
    let price = |at: Timestamp| state.prices().iter().rfind(|(since, _)| **since <= at).map_or(0, |(_, price)| *price);
    ends.windows(2).map(|span| u128::from(price(span[0])) * u128::from(span[1].millis_since(span[0]))).sum()
}

pub fn exact(state: &State, tenant: TenantId, from: Timestamp, to: Timestamp) -> u128 {
    let bill = bill::bill(state, tenant, from, to, state.now());
    let sum = bill.lines.iter().map(|line| line.exact).sum();
    assert_eq!(bill.total_nano, (sum + bill::EXACT_PER_NANO / 2) / bill::EXACT_PER_NANO, "rounded once");
    sum
}

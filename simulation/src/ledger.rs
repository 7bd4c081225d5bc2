//! What use costs, computed a second way: from what hosts have reported, entry by entry. It never looks at a meter.

use std::collections::BTreeMap;

use model::{Phase, State, TenantId, Timestamp, Wanted, bill, setting};

/// Weight, in thousandths, times milliseconds, by tenant. The price does not change in a simulation.
#[derive(Default)]
pub struct Ledger(BTreeMap<TenantId, u128>);

impl Ledger {
    /// Charges the time from the state's `now` to `until`, in which nothing changed.
    pub fn pass(&mut self, state: &State, until: Timestamp) {
        let millis = u128::from(until.millis_since(state.now()));
        if millis == 0 {
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
            *self.0.entry(vm.tenant).or_default() += u128::from(vm.weight_milli * permille / 1000) * millis;
        }
    }

    /// # Errors
    /// When a bill differs from it.
    pub fn agrees(&self, state: &State) -> Result<(), String> {
        for tenant in state.tenants().values() {
            let bill = bill::bill(state, tenant.id, Timestamp(0), state.now(), state.now());
            let machines = bill.lines.iter().filter(|line| matches!(line.resource, model::Resource::Vm(_)));
            let billed: u128 =
                machines.map(|line| u128::from(line.weight_milli) * u128::from(line.to.millis_since(line.from))).sum();
            let used = self.0.get(&tenant.id).copied().unwrap_or_default();
            if billed != used {
                return Err(format!("{} is billed {billed} weighted milliseconds, and used {used}", tenant.name));
            }
        }
        Ok(())
    }
}

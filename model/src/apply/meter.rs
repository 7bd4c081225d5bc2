//! Meters open and close with the entries that change what is used, at the entry's time.

use crate::{Image, Line, Meter, Phase, Resource, State, Timestamp, Vm, Wanted, setting};

const GIB: u64 = 1 << 30;

impl State {
    /// Brings a machine's meter in line with its phase. What its host could not do is not charged.
    pub(super) fn meter_vm(&mut self, now: Timestamp, vm: &Vm) {
        let rate = match vm.phase {
            _ if vm.ghost || vm.wanted == Wanted::Deleted => None,
            Some(Phase::Running) => Some(("running", setting::BILL_RUNNING)),
            Some(Phase::Suspended) => Some(("suspended", setting::BILL_SUSPENDED)),
            Some(Phase::Stopped) => Some(("stopped", setting::BILL_STOPPED)),
            Some(Phase::Absent | Phase::Failed | Phase::Lost) | None => None,
        };
        let resource = Resource::Vm(vm.id);
        match rate {
            None => self.stop_meter(now, resource),
            Some((status, permille)) => {
                let weight_milli = vm.weight_milli.saturating_mul(self.setting(permille)) / 1000;
                let (tenant, name, status) = (vm.tenant, vm.name.clone(), status.to_owned());
                self.run_meter(Meter { tenant, resource, name, status, weight_milli, since: now });
            }
        }
    }

    pub(super) fn meter_image(&mut self, now: Timestamp, image: &Image) {
        let per_gib = u128::from(self.setting(setting::BILL_IMAGE));
        let tier = u128::from(self.setting(setting::BILL_IMAGE_TIER)) * u128::from(GIB);
        let above = u128::from(self.setting(setting::BILL_IMAGE_ABOVE));
        let size = u128::from(image.size_bytes);
        let weighed = size.min(tier) * 1000 + size.saturating_sub(tier) * above;
        let weight = (weighed * per_gib).div_ceil(1000 * u128::from(GIB));
        self.run_meter(Meter {
            tenant: image.tenant,
            resource: Resource::Image(image.id),
            name: image.name.clone(),
            status: "stored".into(),
            weight_milli: u64::try_from(weight).unwrap_or(u64::MAX),
            since: now,
        });
    }

    /// A setting that decides weights has changed: from now on what is used is charged by it. One entry that visits
    /// every meter, which is seldom enough to be worth an answer that an operator expects.
    pub(super) fn weigh_anew(&mut self, now: Timestamp) {
        let metered: Vec<Resource> = self.meters.iter().map(|(resource, _)| *resource).collect();
        for resource in metered {
            match resource {
                Resource::Vm(id) => {
                    if let Some(vm) = self.vms.get(&id).cloned() {
                        self.meter_vm(now, &vm);
                    }
                }
                Resource::Image(id) => {
                    if let Some(image) = self.images.get(&id).cloned() {
                        self.meter_image(now, &image);
                    }
                }
            }
        }
    }

    /// The same use goes on: nothing happens. Another one: the old ends where the new begins.
    fn run_meter(&mut self, meter: Meter) {
        if let Some(running) = self.meters.get(&meter.resource)
            && running.status == meter.status
            && running.weight_milli == meter.weight_milli
        {
            return;
        }
        self.stop_meter(meter.since, meter.resource);
        self.put_meter(meter);
    }

    pub(super) fn stop_meter(&mut self, now: Timestamp, resource: Resource) {
        let Some(meter) = self.drop_meter(resource) else { return };
        if meter.since >= now {
            return;
        }
        let number = self.cluster_mut(|cluster| {
            cluster.last_line += 1;
            cluster.last_line
        });
        let Meter { tenant, resource, name, status, weight_milli, since } = meter;
        self.lines.put((tenant, number), Line { tenant, resource, name, status, weight_milli, from: since, to: now });
    }
}

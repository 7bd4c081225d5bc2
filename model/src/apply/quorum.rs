//! The cloud's first entry, and the book of who is or was a controller. Who votes is the consensus's own matter.

use super::{Applied, Moment, check};
use crate::{
    Capacity, Controller, ControllerId, Digest, JoinRole, Noun, Rejection, Reply, Role, State, Template, Timestamp,
    User, level,
};

/// The price of weight 1 for an hour until an operator sets another: a hundredth of a unit.
const FIRST_PRICE_NANO: u64 = 10_000_000;

/// What a new cloud offers: name, vCPUs, MiB of memory, GiB of disk (0: as large as the image), weight in thousandths.
const FIRST_TEMPLATES: [(&str, u64, u64, u64, u64); 4] = [
    ("tiny", 1, 96, 0, 100),
    ("normal", 1, 1024, 10, 1000),
    ("standard", 2, 4096, 40, 2500),
    ("enhanced", 4, 16_384, 160, 6000),
];

impl State {
    /// See [`level::CAREFUL`].
    pub(super) fn is_careful(&self) -> bool {
        self.quorum().level >= level::CAREFUL
    }

    pub(super) fn found(&mut self, m: Moment, cluster: &str, first: (&str, &str), operator: (&str, Digest)) -> Applied {
        if !self.controllers.is_empty() {
            return Err(check::exists(Noun::Cluster, &self.cluster().id));
        }
        check::label("cluster", cluster)?;
        check::dotted("operator", operator.0)?;
        self.may_add_controller(first.0, first.1)?;
        self.cluster_mut(|row| {
            row.id = cluster.into();
            row.created_at = m.now;
        });
        let id = self.add_controller(m.now, first.0, first.1)?;
        let (name, token) = (operator.0.to_owned(), operator.1);
        self.put_user(User { name, role: Role::Operator, token, created_at: m.now });
        self.prices.put(Timestamp::default(), FIRST_PRICE_NANO);
        for (name, vcpus, mib, gib, weight_milli) in FIRST_TEMPLATES {
            let size = Capacity { vcpus, memory_bytes: mib << 20, disk_bytes: gib << 30 };
            self.templates.put(name.into(), Template { name: name.into(), size, weight_milli });
        }
        Ok(Reply::Controller(id))
    }

    pub(super) fn join_controller(&mut self, m: Moment, token: &Digest, name: &str, address: &str) -> Applied {
        self.usable_token(m, token, JoinRole::Controller)?;
        let id = self.add_controller(m.now, name, address)?;
        self.use_token(token, id.to_string());
        Ok(Reply::Controller(id))
    }

    fn may_add_controller(&self, name: &str, address: &str) -> Result<(), Rejection> {
        check::label("name", name)?;
        check::line("address", address, 300)?;
        match self.controllers.values().find(|c| !c.removed && c.address == address) {
            Some(other) => Err(check::in_use(Noun::Address, address, format!("{} ({}) has it", other.id, other.name))),
            None => Ok(()),
        }
    }

    fn add_controller(&mut self, now: Timestamp, name: &str, address: &str) -> Result<ControllerId, Rejection> {
        self.may_add_controller(name, address)?;
        let id = self.cluster_mut(|cluster| {
            cluster.last_controller += 1;
            ControllerId(cluster.last_controller)
        });
        let row = Controller { id, name: name.into(), address: address.into(), joined_at: now, removed: false };
        self.controllers.put(id, row);
        Ok(id)
    }

    pub(super) fn retire_controller(&mut self, id: ControllerId) -> Applied {
        let retired = self.controllers.update(&id, |controller| controller.removed = true);
        retired.map(|()| Reply::Done).ok_or_else(|| check::missing(Noun::Controller, id))
    }
}

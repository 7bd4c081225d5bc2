//! Whether a guest is on, and if not, who switched it off: libvirt's word joined with what this agent remembers.
//!
//! libvirt forgets why a domain is off when its daemon restarts, and cannot tell a button that was pressed for us from
//! a guest's own decision. So the record of a guest keeps what was asked and what was seen last:
//!
//! ```text
//!            start asked          running                   seen off, once
//!  (none) ─────────────▶ Asked ───────────▶ On ─────────────────────────────▶ Off(why)
//!                          ▲                 │ stopping: asked to go off          │
//!                          └─────────────────┴──────────── start asked ◀──────────┘
//! ```

use model::VmId;
use serde::{Deserialize, Serialize};
use virt::domain::{
    DomainPausedReason, DomainShutoffReason, DomainState, DomainStateEnum, DomainStateReason, DomainStateReasonEnum,
};

use super::{
    super::{GuestPower, GuestSpec, OffReason, Result},
    Libvirt,
    increment::Since,
    lock,
};

/// What the agent remembers about a guest, in its folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub cluster: String,
    pub vm: VmId,
    pub epoch: u64,
    pub tenant: String,
    pub macs: Vec<String>,
    pub remembered: Remembered,
    /// Somebody asked, through this agent, that it goes off.
    pub stopping: bool,
    /// It was prepared to come from another host, and was not handed over to this one yet.
    #[serde(default)]
    pub arriving: bool,
    /// Its file systems may be frozen for a backup.
    #[serde(default)]
    pub frozen: bool,
    /// What an increment can be made of.
    #[serde(default)]
    pub since: Option<Since>,
    /// The checkpoint of the last backup, while its bytes have no name yet.
    #[serde(default)]
    pub begun: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Remembered {
    /// Not known to run since it was made or asked to start.
    Asked,
    On,
    OffByGuest,
    OffByAgent,
    Crashed,
    Moved,
    /// Off when it left another host. Its disk is here, and it was not handed over to this one yet.
    Arrived,
}

/// What libvirt says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Its process is being set up.
    Starting,
    Running,
    Suspended,
    /// Off by the guest's own shutdown, or one that the power button began.
    ShutDown,
    /// Off in a way that no guest chooses.
    Died,
    /// Off because another host has all of it.
    Moved,
    /// Off since before libvirt's memory.
    Off,
}

impl Record {
    pub fn new(spec: &GuestSpec) -> Self {
        Self {
            cluster: spec.cluster.clone(),
            vm: spec.vm,
            epoch: spec.epoch,
            tenant: spec.tenant.clone(),
            macs: spec.nics.iter().map(|nic| nic.mac.to_string()).collect(),
            remembered: Remembered::Asked,
            stopping: false,
            arriving: false,
            frozen: false,
            since: None,
            begun: None,
        }
    }
}

impl Seen {
    pub fn is_on(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Suspended)
    }
}

pub fn seen(state: DomainStateEnum, reason: DomainStateReasonEnum) -> Seen {
    match (state.known(), reason) {
        (Some(DomainState::Running | DomainState::Blocked | DomainState::Shutdown), _) => Seen::Running,
        (Some(DomainState::Paused), DomainStateReasonEnum::Known(DomainStateReason::Paused(reason))) => {
            match reason.known() {
                Some(DomainPausedReason::StartingUp) => Seen::Starting,
                Some(DomainPausedReason::Crashed) => Seen::Died,
                _ => Seen::Suspended,
            }
        }
        (Some(DomainState::Paused | DomainState::PMSuspended), _) => Seen::Suspended,
        (Some(DomainState::Crashed), _) => Seen::Died,
        (Some(DomainState::Shutoff), DomainStateReasonEnum::Known(DomainStateReason::Shutoff(reason))) => {
            match reason.known() {
                Some(DomainShutoffReason::Shutdown) => Seen::ShutDown,
                Some(DomainShutoffReason::Migrated) => Seen::Moved,
                Some(
                    DomainShutoffReason::Destroyed
                    | DomainShutoffReason::Crashed
                    | DomainShutoffReason::Failed
                    | DomainShutoffReason::Daemon,
                ) => Seen::Died,
                _ => Seen::Off,
            }
        }
        (Some(DomainState::Shutoff | DomainState::NoState) | None, _) => Seen::Off,
    }
}

/// The guest's power, and what to remember from now on when that changes.
pub fn settle(record: Option<&Record>, seen: Seen) -> (GuestPower, Option<Remembered>) {
    let off = match seen {
        Seen::Starting => return (GuestPower::Running, None),
        Seen::Running | Seen::Suspended => {
            let power = if seen == Seen::Running { GuestPower::Running } else { GuestPower::Suspended };
            return (power, record.filter(|r| r.remembered != Remembered::On).map(|_| Remembered::On));
        }
        Seen::ShutDown => Remembered::OffByGuest,
        Seen::Moved => Remembered::Moved,
        Seen::Died | Seen::Off => Remembered::Crashed,
    };
    match record {
        // Made by an agent whose records are lost: libvirt's word is all there is.
        None if seen == Seen::Off => (GuestPower::Off(OffReason::Unknown), None),
        None => (power_of(off), None),
        Some(Record { remembered: Remembered::On, stopping, .. }) => {
            // One that moved while its button was pressed runs elsewhere: that is what matters.
            let why = if *stopping && off != Remembered::Moved { Remembered::OffByAgent } else { off };
            (power_of(why), Some(why))
        }
        Some(record) => (power_of(record.remembered), None),
    }
}

fn power_of(remembered: Remembered) -> GuestPower {
    match remembered {
        Remembered::Asked => GuestPower::Off(OffReason::Unknown),
        Remembered::On => GuestPower::Running,
        Remembered::OffByGuest => GuestPower::Off(OffReason::ByGuest),
        Remembered::OffByAgent => GuestPower::Off(OffReason::ByAgent),
        Remembered::Crashed => GuestPower::Off(OffReason::Crashed),
        Remembered::Moved => GuestPower::Off(OffReason::Moved),
        Remembered::Arrived => GuestPower::Arrived,
    }
}

impl Libvirt {
    /// Change what is remembered, if anything is.
    pub(super) fn amend(&self, vm: VmId, change: impl FnOnce(&mut Record)) -> Result<()> {
        let _records = lock(&self.records);
        let Some(mut record) = self.dirs.read::<Record>(vm)? else { return Ok(()) };
        let before = record.clone();
        change(&mut record);
        if record == before { Ok(()) } else { self.dirs.write(vm, &record) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(remembered: Remembered, stopping: bool) -> Option<Record> {
        let spec = GuestSpec {
            cluster: "demo".into(),
            vm: VmId(1),
            epoch: 1,
            tenant: "acme".into(),
            hostname: "web".into(),
            size: model::Capacity::default(),
            base: "base".into(),
            base_format: model::ImageFormat::Raw,
            base_parents: vec![],
            base_virtual_bytes: 1,
            nics: vec![],
            ssh_keys: vec![],
            user_data: String::new(),
        };
        Some(Record { remembered, stopping, ..Record::new(&spec) })
    }

    #[test]
    fn the_reason_for_being_off_is_ours_if_we_asked_else_the_guests_if_it_shut_down_else_a_crash() {
        use {GuestPower as P, OffReason as O, Remembered as R, Seen as S};
        let table = [
            (record(R::Asked, false), S::Starting, P::Running, None),
            (record(R::Asked, false), S::Running, P::Running, Some(R::On)),
            (record(R::Asked, false), S::Off, P::Off(O::Unknown), None),
            // Off for an earlier reason, and asked to start since: the old reason no longer counts.
            (record(R::Asked, false), S::ShutDown, P::Off(O::Unknown), None),
            (record(R::On, false), S::Running, P::Running, None),
            (record(R::On, false), S::Suspended, P::Suspended, None),
            (record(R::On, false), S::ShutDown, P::Off(O::ByGuest), Some(R::OffByGuest)),
            (record(R::On, false), S::Died, P::Off(O::Crashed), Some(R::Crashed)),
            // The host went down under it.
            (record(R::On, false), S::Off, P::Off(O::Crashed), Some(R::Crashed)),
            (record(R::On, true), S::ShutDown, P::Off(O::ByAgent), Some(R::OffByAgent)),
            (record(R::On, true), S::Died, P::Off(O::ByAgent), Some(R::OffByAgent)),
            (record(R::On, false), S::Moved, P::Off(O::Moved), Some(R::Moved)),
            (record(R::On, true), S::Moved, P::Off(O::Moved), Some(R::Moved)),
            (record(R::Moved, false), S::Off, P::Off(O::Moved), None),
            (record(R::OffByAgent, true), S::Moved, P::Off(O::ByAgent), None),
            (record(R::Arrived, false), S::Off, P::Arrived, None),
            // libvirtd restarted and forgot why.
            (record(R::OffByGuest, false), S::Off, P::Off(O::ByGuest), None),
            (record(R::OffByAgent, true), S::Off, P::Off(O::ByAgent), None),
            (record(R::OffByGuest, false), S::Running, P::Running, Some(R::On)),
            (None, S::Running, P::Running, None),
            (None, S::ShutDown, P::Off(O::ByGuest), None),
            (None, S::Died, P::Off(O::Crashed), None),
            (None, S::Off, P::Off(O::Unknown), None),
        ];
        for (record, seen, power, remembered) in table {
            assert_eq!(settle(record.as_ref(), seen), (power, remembered), "{record:?} {seen:?}");
        }
    }
}

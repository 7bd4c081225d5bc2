//! What is remembered of a step before it is carried out, or told.

use std::collections::BTreeMap;

use model::{
    Phase, VmId, VmWish,
    steps::{Observed, Step, Told},
};

use super::Executor;

impl Executor {
    pub(super) fn note_report(&mut self, wishes: &BTreeMap<VmId, &VmWish>, found: &Observed, step: &Step) {
        match step {
            Step::Report(report) => {
                let Some(wish) = wishes.get(&report.vm) else { return };
                if matches!(report.phase, Phase::Running | Phase::Suspended | Phase::Stopped) {
                    self.memory(wish, found).existed = true;
                }
                let told = Told { attempt: wish.attempt, power: wish.power, report: report.clone() };
                self.told.insert(report.vm, told);
            }
            Step::ReportImage(report) => drop(self.told_images.insert(report.digest, report.good)),
            Step::ReportBackup(report) => drop(self.told_backups.insert(report.vm, report.number)),
            Step::ReportRehearsal(report) => self.rehearsals.note_told(report),
            Step::ReportMove(report) => self.moves.note_told(report),
            _ => {}
        }
    }

    pub(super) fn note_intent(&mut self, wishes: &BTreeMap<VmId, &VmWish>, found: &Observed, step: &Step) {
        match step {
            Step::MakeDisk(vm) | Step::Start { vm, .. } => {
                let Some(wish) = wishes.get(vm) else { return };
                let memory = self.memory(wish, found);
                (memory.begun, memory.removed) = (true, false);
                if let Step::Start { reboots, .. } = step {
                    (memory.rebooted, memory.wished_off) = (*reboots, false);
                }
            }
            Step::Migrate { vm, epoch } => {
                let Some(wish) = wishes.get(vm) else { return };
                self.memory(wish, found).leaving = Some(*epoch);
            }
            Step::PressPower(vm) | Step::Reset { vm, .. } | Step::Remove(vm) => {
                // So that there is a memory to change when it is done.
                if let Some(wish) = wishes.get(vm) {
                    self.memory(wish, found);
                }
            }
            _ => {}
        }
    }
}

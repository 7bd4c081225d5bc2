//! What the executor keeps of rehearsals: the jobs that run, so that they can be ended, and what came of them.
//!
//! Nothing of it survives the agent: a rehearsal dies with it, and the next one begins anew.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use model::{Assignment, ImageId, Verdict, command::RehearsalReport, steps::Observed};

use super::act::Fault;
use crate::hypervisor::{job::Job, rehearsal::Rehearsed};

/// Beyond the time that the guest is given: making its disk, switching it on and off. The limit of a call that hangs.
const AROUND: Duration = Duration::from_secs(120);

#[derive(Default)]
pub struct Rehearsals {
    /// By backup, under the placement that asked for it.
    jobs: BTreeMap<ImageId, (u64, Arc<Job>)>,
    reports: BTreeMap<ImageId, RehearsalReport>,
    told: BTreeMap<ImageId, u64>,
}

impl Rehearsals {
    /// The job of one that begins; `None` when nobody wishes it any more.
    pub fn begin(&mut self, assignment: &Assignment, image: ImageId, epoch: u64) -> Option<Arc<Job>> {
        let wish = assignment.rehearsals.iter().find(|wish| (wish.image, wish.epoch) == (image, epoch))?;
        let job = Arc::new(Job::new(Duration::from_millis(wish.limit_millis) + AROUND));
        self.jobs.insert(image, (epoch, job.clone()));
        Some(job)
    }

    /// Ends what is wished no more, and forgets what came of it.
    pub fn keep_wished(&mut self, assignment: &Assignment) {
        let wished: BTreeMap<ImageId, u64> =
            assignment.rehearsals.iter().map(|wish| (wish.image, wish.epoch)).collect();
        for (image, (epoch, job)) in &self.jobs {
            if wished.get(image) != Some(epoch) {
                tracing::info!(%image, "a rehearsal is wished no more and is ended");
                job.cancel();
            }
        }
        self.reports.retain(|image, report| wished.get(image) == Some(&report.epoch));
        self.told.retain(|image, epoch| wished.get(image) == Some(epoch));
    }

    /// What could not be rehearsed says nothing about the backup.
    pub fn finish(&mut self, image: ImageId, epoch: u64, result: Result<Rehearsed, Fault>) {
        self.jobs.remove(&image);
        let (verdict, took, reason) = match result {
            Ok(Rehearsed { verdict, took, reason }) => (verdict, took, reason),
            Err(fault) => (Verdict::Unknown, Duration::ZERO, fault.reason),
        };
        tracing::info!(%image, %verdict, reason, "a rehearsal ended");
        let took_millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        self.reports.insert(image, RehearsalReport { image, epoch, verdict, took_millis, reason });
    }

    /// It will be tried again.
    pub fn put_off(&mut self, image: ImageId) {
        self.jobs.remove(&image);
    }

    pub fn note_told(&mut self, report: &RehearsalReport) {
        self.told.insert(report.image, report.epoch);
    }

    pub fn forget_told(&mut self) {
        self.told.clear();
    }

    pub fn lend(&self, found: &mut Observed) {
        (found.rehearsals, found.told_rehearsals) = (self.reports.clone(), self.told.clone());
    }
}

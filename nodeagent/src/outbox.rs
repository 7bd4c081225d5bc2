//! What the quorum has to be told and has not yet said that it knows.
//!
//! The newest report of a machine or an image replaces an older one, so the box never holds more than the host has
//! machines and images. A report stays until the controller has answered that it is in the log; in a new session
//! everything that is left is sent again.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use api::session::FromAgent;
use model::{
    Digest, ImageId, NodeSummary, VmId,
    command::{BackupReport, ImageReport, MoveReport, RehearsalReport, VmReport},
};
use tokio::sync::Notify;

/// Reports in one frame: far below the size that a frame may have, and one log entry that stays quick to apply.
const FRAME_REPORTS: usize = 256;
/// Summaries that wait for a session: an hour of periods. Older ones are of no use to anybody.
const WAITING_SUMMARIES: usize = 30;

#[derive(Default)]
pub struct Outbox {
    waiting: Mutex<Waiting>,
    news: Notify,
}

#[derive(Default)]
struct Waiting {
    vms: BTreeMap<VmId, Letter<VmReport>>,
    images: BTreeMap<Digest, Letter<ImageReport>>,
    backups: BTreeMap<VmId, Letter<BackupReport>>,
    rehearsals: BTreeMap<ImageId, Letter<RehearsalReport>>,
    moves: BTreeMap<VmId, Letter<MoveReport>>,
    summaries: VecDeque<NodeSummary>,
    /// The number of the last frame; rises over all sessions of this process.
    number: u64,
}

struct Letter<T> {
    report: T,
    /// The frame that carries it in this session.
    sent: Option<u64>,
}

impl Outbox {
    pub fn vm(&self, report: VmReport) {
        self.waiting().vms.insert(report.vm, Letter { report, sent: None });
        self.news.notify_one();
    }

    pub fn image(&self, report: ImageReport) {
        self.waiting().images.insert(report.digest, Letter { report, sent: None });
        self.news.notify_one();
    }

    pub fn backup(&self, report: BackupReport) {
        self.waiting().backups.insert(report.vm, Letter { report, sent: None });
        self.news.notify_one();
    }

    pub fn rehearsal(&self, report: RehearsalReport) {
        self.waiting().rehearsals.insert(report.image, Letter { report, sent: None });
        self.news.notify_one();
    }

    pub fn a_move(&self, report: MoveReport) {
        self.waiting().moves.insert(report.vm, Letter { report, sent: None });
        self.news.notify_one();
    }

    pub fn summary(&self, summary: NodeSummary) {
        let mut waiting = self.waiting();
        if waiting.summaries.len() == WAITING_SUMMARIES {
            waiting.summaries.pop_front();
        }
        waiting.summaries.push_back(summary);
        drop(waiting);
        self.news.notify_one();
    }

    /// A new session: nothing was sent in it yet.
    pub fn reopen(&self) {
        let mut waiting = self.waiting();
        waiting.vms.values_mut().for_each(|letter| letter.sent = None);
        waiting.images.values_mut().for_each(|letter| letter.sent = None);
        waiting.backups.values_mut().for_each(|letter| letter.sent = None);
        waiting.rehearsals.values_mut().for_each(|letter| letter.sent = None);
        waiting.moves.values_mut().for_each(|letter| letter.sent = None);
        drop(waiting);
        self.news.notify_one();
    }

    /// The next frame to send; waits until there is one. Cancelling it loses nothing.
    pub async fn next(&self) -> FromAgent {
        loop {
            let news = self.news.notified();
            if let Some(frame) = self.take() {
                return frame;
            }
            news.await;
        }
    }

    /// Everything in frames up to this number is in the log.
    pub fn reported(&self, number: u64) {
        let mut waiting = self.waiting();
        waiting.vms.retain(|_, letter| letter.sent.is_none_or(|sent| sent > number));
        waiting.images.retain(|_, letter| letter.sent.is_none_or(|sent| sent > number));
        waiting.backups.retain(|_, letter| letter.sent.is_none_or(|sent| sent > number));
        waiting.rehearsals.retain(|_, letter| letter.sent.is_none_or(|sent| sent > number));
        waiting.moves.retain(|_, letter| letter.sent.is_none_or(|sent| sent > number));
    }

    pub fn is_empty(&self) -> bool {
        let waiting = self.waiting();
        let told = waiting.vms.is_empty() && waiting.images.is_empty() && waiting.backups.is_empty();
        told && waiting.rehearsals.is_empty() && waiting.moves.is_empty() && waiting.summaries.is_empty()
    }

    fn take(&self) -> Option<FromAgent> {
        let mut waiting = self.waiting();
        let number = waiting.number + 1;
        let reports: Vec<VmReport> = unsent(waiting.vms.values_mut(), number);
        if !reports.is_empty() {
            waiting.number = number;
            return Some(FromAgent::VmReports { number, reports });
        }
        let reports: Vec<ImageReport> = unsent(waiting.images.values_mut(), number);
        if !reports.is_empty() {
            waiting.number = number;
            return Some(FromAgent::ImageReports { number, reports });
        }
        let reports: Vec<BackupReport> = unsent(waiting.backups.values_mut(), number);
        if !reports.is_empty() {
            waiting.number = number;
            return Some(FromAgent::BackupReports { number, reports });
        }
        let reports: Vec<RehearsalReport> = unsent(waiting.rehearsals.values_mut(), number);
        if !reports.is_empty() {
            waiting.number = number;
            return Some(FromAgent::RehearsalReports { number, reports });
        }
        let reports: Vec<MoveReport> = unsent(waiting.moves.values_mut(), number);
        if !reports.is_empty() {
            waiting.number = number;
            return Some(FromAgent::MoveReports { number, reports });
        }
        waiting.summaries.pop_front().map(FromAgent::Summary)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unsent<'a, T: Clone + 'a>(letters: impl Iterator<Item = &'a mut Letter<T>>, number: u64) -> Vec<T> {
    let unsent = letters.filter(|letter| letter.sent.is_none()).take(FRAME_REPORTS);
    unsent
        .map(|letter| {
            letter.sent = Some(number);
            letter.report.clone()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use model::Phase;

    use super::*;

    fn report(vm: u64, phase: Phase) -> VmReport {
        VmReport { vm: VmId(vm), epoch: 1, attempt: 0, phase, rebooted: 0, reason: String::new(), retry: false }
    }

    #[test]
    fn the_newest_report_wins_and_an_answer_to_an_older_one_does_not_remove_it() {
        let outbox = Outbox::default();
        outbox.vm(report(1, Phase::Running));
        let first = outbox.take();
        assert_eq!(first, Some(FromAgent::VmReports { number: 1, reports: vec![report(1, Phase::Running)] }));
        assert_eq!(outbox.take(), None);
        outbox.vm(report(1, Phase::Stopped));
        outbox.reported(1);
        let second = outbox.take();
        assert_eq!(second, Some(FromAgent::VmReports { number: 2, reports: vec![report(1, Phase::Stopped)] }));
        outbox.reported(2);
        assert!(outbox.is_empty());
    }

    #[test]
    fn what_was_not_answered_is_sent_again_in_the_next_session() {
        let outbox = Outbox::default();
        outbox.vm(report(1, Phase::Running));
        outbox.image(ImageReport { digest: Digest([1; 32]), good: true });
        assert!(matches!(outbox.take(), Some(FromAgent::VmReports { number: 1, .. })));
        assert!(matches!(outbox.take(), Some(FromAgent::ImageReports { number: 2, .. })));
        outbox.reported(1);
        outbox.reopen();
        assert!(matches!(outbox.take(), Some(FromAgent::ImageReports { number: 3, .. })));
        outbox.reported(2);
        assert!(!outbox.is_empty(), "the answer was to a frame of the earlier session");
        outbox.reported(3);
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_frame_is_bounded() {
        let outbox = Outbox::default();
        (0..FRAME_REPORTS as u64 + 1).for_each(|vm| outbox.vm(report(vm, Phase::Running)));
        let sizes: Vec<usize> = std::iter::from_fn(|| outbox.take())
            .map(|frame| match frame {
                FromAgent::VmReports { reports, .. } => reports.len(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(sizes, [FRAME_REPORTS, 1]);
    }
}

//! Work on a guest that takes its time: who works counts, who waits may look, and anyone may end it.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Shared between the thread that works and those that watch it.
#[derive(Debug)]
pub struct Job {
    deadline: Instant,
    cancelled: AtomicBool,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub done_bytes: u64,
    /// 0 while it is not known. A guest that goes on writing makes it grow.
    pub total_bytes: u64,
}

impl Job {
    /// A job that is ended when it is not done within `limit` from now.
    pub fn new(limit: Duration) -> Self {
        Self {
            deadline: Instant::now() + limit,
            cancelled: AtomicBool::new(false),
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
        }
    }

    /// Ask it to end; the one who works returns an error soon after, with everything as it was before.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub fn progress(&self) -> Progress {
        Progress {
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn note(&self, done_bytes: u64, total_bytes: u64) {
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
        self.done_bytes.store(done_bytes, Ordering::Relaxed);
    }

    /// Why it must end now, if it must.
    pub(crate) fn must_end(&self) -> Option<&'static str> {
        if self.cancelled.load(Ordering::Relaxed) {
            Some("it was cancelled")
        } else if Instant::now() >= self.deadline {
            Some("it was not done in time")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_ends_when_it_is_cancelled_or_late() {
        let job = Job::new(Duration::from_secs(3600));
        assert_eq!((job.must_end(), job.progress()), (None, Progress::default()));
        job.note(3, 7);
        assert_eq!(job.progress(), Progress { done_bytes: 3, total_bytes: 7 });
        job.cancel();
        assert_eq!(job.must_end(), Some("it was cancelled"));
        assert_eq!(Job::new(Duration::ZERO).must_end(), Some("it was not done in time"));
    }
}

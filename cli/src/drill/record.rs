//! The one place where everybody who looks writes down what was seen, and the drill's clock.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use super::timeline::{Mark, Micros, Phase, PhaseKind, Timeline};

pub struct Record {
    began: Instant,
    timeline: Mutex<Timeline>,
    over: AtomicBool,
    /// What observers found broken.
    broken: Mutex<Vec<String>>,
}

impl Record {
    pub fn begin() -> Self {
        let before = Phase { from_micros: 0, kind: PhaseKind::Before };
        let timeline = Timeline { phases: vec![before], ..Timeline::default() };
        Self {
            began: Instant::now(),
            timeline: Mutex::new(timeline),
            over: AtomicBool::new(false),
            broken: Mutex::default(),
        }
    }

    pub fn now(&self) -> Micros {
        self.at(Instant::now())
    }

    pub fn at(&self, moment: Instant) -> Micros {
        Micros::try_from(moment.saturating_duration_since(self.began).as_micros()).unwrap_or(Micros::MAX)
    }

    /// Changes are whole, so a panic elsewhere does not spoil it.
    pub fn see(&self) -> MutexGuard<'_, Timeline> {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn enter(&self, kind: PhaseKind) -> Micros {
        let from_micros = self.now();
        self.see().phases.push(Phase { from_micros, kind });
        from_micros
    }

    /// What came before is not compared with anything: connections were made.
    pub fn ready(&self) {
        let now = self.now();
        if let Some(before) = self.see().phases.first_mut() {
            before.from_micros = now;
        }
    }

    pub fn mark(&self, what: &str) {
        let at_micros = self.now();
        self.see().marks.push(Mark { at_micros, what: what.to_owned() });
    }

    /// What must always hold does not; said once.
    pub fn broke(&self, what: String) {
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        if !broken.contains(&what) {
            broken.push(what);
        }
    }

    /// Observers end when they next look.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// What was seen until now, and what was found broken.
    pub fn close(&self) -> (Timeline, Vec<String>) {
        let ended = self.now();
        let mut timeline = self.see().clone();
        timeline.ended = ended;
        timeline.answers.sort_by_key(|answer| answer.began);
        (timeline, self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

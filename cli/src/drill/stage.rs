//! What every drill works with: the cloud, the record, what is to be healed, and waiting for what was seen.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use api::{client::Client, error::ApiError};
use tokio::time::{Instant, sleep};

use super::{
    heal::Heal,
    record::Record,
    report::{Findings, LossSeen, Measure},
    timeline::{Micros, PhaseKind, Timeline},
};
use crate::lab::Cloud;

/// What was seen is looked at again so often; nothing is sent for it.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

pub struct Stage {
    /// `None` on a live cloud.
    pub cloud: Option<Cloud>,
    pub client: Client,
    pub record: Arc<Record>,
    /// How long a fault lasts after what it should cause was seen.
    pub hold: Duration,
    /// Everything but the fault.
    pub rehearsal: bool,
    /// In the order in which it was broken.
    pub heals: Vec<Heal>,
    pub target: String,
    pub fault: String,
    pub findings: Findings,
    pub measures: Vec<Measure>,
    pub losses: Vec<LossSeen>,
}

impl Stage {
    /// Tells a person, and whoever reads the report.
    pub fn say(&self, what: &str) {
        self.record.mark(what);
        eprintln!("{:7.1} s  {what}", self.record.now() as f64 / 1e6);
    }

    /// # Errors
    /// On a live cloud.
    pub fn cloud(&mut self) -> Result<&mut Cloud> {
        self.cloud.as_mut().context("only the processes of a cloud of `trefoil up` can be reached")
    }

    /// Announces the fault; it begins now. False when this is only a rehearsal: then nothing may be done.
    pub fn begin_fault(&mut self, target: &str, fault: &str) -> (Micros, bool) {
        (self.target, self.fault) = (target.to_owned(), fault.to_owned());
        let only = if self.rehearsal { "rehearsal, nothing is done: " } else { "" };
        self.say(&format!("{only}{fault}"));
        (self.record.enter(PhaseKind::Fault), !self.rehearsal)
    }

    pub fn measure(&mut self, name: &'static str, micros: Micros, of: &str, target: Option<Duration>) {
        let target_micros = target.map(|target| Micros::try_from(target.as_micros()).unwrap_or(Micros::MAX));
        self.measures.push(Measure { name, micros, of: of.to_owned(), target_micros });
    }

    /// Waits until it was seen. What was not seen in time did not recover; the drill goes on.
    pub async fn expect<T>(&mut self, what: &str, limit: Duration, look: impl Fn(&Timeline) -> Option<T>) -> Option<T> {
        let asked = Instant::now();
        loop {
            // Out of the condition, so that the record is free again when it is told.
            let seen = look(&self.record.see());
            if let Some(seen) = seen {
                self.say(what);
                return Some(seen);
            }
            if asked.elapsed() > limit {
                let sentence = format!("not within {} s: {what}", limit.as_secs());
                self.say(&sentence);
                self.findings.unrecovered.push(sentence);
                return None;
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Asks until it is so. What is not so in time did not recover.
    pub async fn reach(
        &mut self,
        what: &str,
        limit: Duration,
        mut ask: impl AsyncFnMut(&Client) -> Result<bool, ApiError>,
    ) {
        let (client, asked) = (self.client.clone().with_deadline(Duration::from_secs(2)), Instant::now());
        let mut seen = String::new();
        while asked.elapsed() < limit {
            match ask(&client).await {
                Ok(true) => return self.say(what),
                Ok(false) => {}
                Err(error) => seen = format!(" ({error})"),
            }
            sleep(LOOK_AGAIN * 10).await;
        }
        let sentence = format!("not within {} s: {what}{seen}", limit.as_secs());
        self.say(&sentence);
        self.findings.unrecovered.push(sentence);
    }

    /// Heals everything, the last broken first. What cannot be healed is told, and the rest healed all the same.
    pub async fn heal(&mut self) {
        if !self.heals.is_empty() {
            self.record.enter(PhaseKind::Healing);
        }
        while let Some(heal) = self.heals.pop() {
            self.say(&heal.to_string());
            if let Err(error) = heal.apply(self.cloud.as_mut(), &self.client).await {
                let sentence = format!("{heal}: {error:#}");
                self.say(&sentence);
                self.findings.unrecovered.push(sentence);
            }
        }
    }
}

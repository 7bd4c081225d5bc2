//! The period summary: what the host's load was, condensed from the samples that the heartbeats carry.

use model::{NodeSummary, Timestamp, telemetry::NodeStatus};

/// How long a period is. One log entry a host in this time is what the quorum is asked to bear.
pub const PERIOD_MILLIS: u64 = 120_000;

#[derive(Default)]
pub struct Period {
    begun: Option<(u64, Timestamp)>,
    summary: NodeSummary,
    cpu_permille_sum: u64,
}

impl Period {
    /// Adds a sample; gives the summary of the period that it ended, if it did. `boottime_millis` decides how long a
    /// period is, `wall` only dates it.
    pub fn add(&mut self, boottime_millis: u64, wall: Timestamp, status: &NodeStatus) -> Option<NodeSummary> {
        let (begun, from) = *self.begun.get_or_insert((boottime_millis, wall));
        let ended = (boottime_millis.saturating_sub(begun) >= PERIOD_MILLIS).then(|| {
            let finished = std::mem::take(self);
            self.begun = Some((boottime_millis, wall));
            let mean = finished.cpu_permille_sum / u64::from(finished.summary.samples.max(1));
            let cpu_permille_mean = u32::try_from(mean).unwrap_or(u32::MAX);
            NodeSummary { from, to: wall.max(from), cpu_permille_mean, ..finished.summary }
        });
        let summary = &mut self.summary;
        summary.samples += 1;
        self.cpu_permille_sum += u64::from(status.cpu_permille);
        summary.cpu_permille_max = summary.cpu_permille_max.max(status.cpu_permille);
        summary.memory_used_bytes_max = summary.memory_used_bytes_max.max(status.memory_used_bytes);
        summary.disk_used_bytes_max = summary.disk_used_bytes_max.max(status.disk_used_bytes);
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_has_the_mean_and_the_most_of_its_samples() {
        let mut period = Period::default();
        let sample =
            |cpu_permille, memory_used_bytes| NodeStatus { cpu_permille, memory_used_bytes, ..NodeStatus::default() };
        assert_eq!(period.add(1_000, Timestamp(50_000), &sample(100, 7)), None);
        assert_eq!(period.add(61_000, Timestamp(110_000), &sample(300, 3)), None);
        let summary = period.add(121_000, Timestamp(170_000), &sample(900, 9)).unwrap();
        let expected = NodeSummary {
            from: Timestamp(50_000),
            to: Timestamp(170_000),
            samples: 2,
            cpu_permille_mean: 200,
            cpu_permille_max: 300,
            memory_used_bytes_max: 7,
            disk_used_bytes_max: 0,
        };
        assert_eq!(summary, expected);
        // The sample that ended a period is the first of the next one.
        let next = period.add(241_000, Timestamp(290_000), &sample(0, 0)).unwrap();
        assert_eq!((next.samples, next.cpu_permille_mean, next.from), (1, 900, Timestamp(170_000)));
    }
}

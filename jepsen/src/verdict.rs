//! What a run means: pass, violation, or unknown. Unknown is never green.

use std::{fmt, io::Write};

use serde::Serialize;

use crate::checker::Finding;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Pass,
    /// A promise was broken.
    Violation,
    /// A checker gave up, or the run did not do what it was meant to do.
    Unknown,
}

impl Verdict {
    /// A broken promise counts whatever else happened; gaps in coverage or an undecided checker come next.
    pub fn of(findings: &[Finding], gaps: &[String]) -> Self {
        let worst = findings.iter().cloned().fold(Finding::Holds, Finding::and);
        match worst {
            Finding::Broken(_) => Self::Violation,
            Finding::Undecided(_) => Self::Unknown,
            Finding::Holds if gaps.is_empty() => Self::Pass,
            Finding::Holds => Self::Unknown,
        }
    }

    pub fn exit_status(self) -> u8 {
        match self {
            Self::Pass => 0,
            Self::Violation => 1,
            Self::Unknown => 3,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "PASS",
            Self::Violation => "VIOLATION",
            Self::Unknown => "UNKNOWN",
        })
    }
}

/// Says that a test did not run on this machine and why: on the terminal, and in the file that the test command reads.
pub fn skipped(test: &str, reason: &str) {
    eprintln!("skipped: {test}: {reason}");
    if let Some(path) = std::env::var_os("TREFOIL_SKIPPED")
        && let Ok(mut file) = std::fs::File::options().append(true).create(true).open(path)
    {
        // Counting one skip less is all that can go wrong.
        let _ = writeln!(file, "{test}: {reason}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_is_never_green_and_a_violation_always_counts() {
        let broken = Finding::Broken("x".into());
        let undecided = Finding::Undecided("y".into());
        let gap = ["no kill".to_owned()];
        assert_eq!(Verdict::of(&[Finding::Holds], &[]), Verdict::Pass);
        assert_eq!(Verdict::of(&[Finding::Holds], &gap), Verdict::Unknown);
        assert_eq!(Verdict::of(&[Finding::Holds, undecided.clone()], &[]), Verdict::Unknown);
        assert_eq!(Verdict::of(&[undecided, broken], &gap), Verdict::Violation);
    }
}

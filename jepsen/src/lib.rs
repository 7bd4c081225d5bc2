//! Jepsen-style tests: real controller processes, real faults, clients that write down what they saw, checkers that
//! decide from that alone. A black box: only the public API and the binary are used.
//!
//! Reading order: [`history`] (what is written down), [`checker`] (from a history to a finding), [`cluster`] (the
//! processes), [`effect`] (what their hosts did in truth), [`client`] (one attempt, one outcome), [`workload`] (what
//! clients do), [`nemesis`] (what is done to the cluster), [`run`] (all of it together), [`liveness`] (every state of
//! the links), [`verdict`] (what it means), [`report`] (what is told of it).

pub mod chance;
pub mod checker;
pub mod client;
pub mod cluster;
pub mod effect;
pub mod history;
pub mod interrupt;
pub mod liveness;
pub mod nemesis;
pub mod report;
pub mod run;
pub mod verdict;
pub mod workload;

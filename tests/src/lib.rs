//! What drives the real binaries: the demonstration, the measurements, and the harness of the process tests.
//!
//! The tests themselves are in `tests/`, one file a subject.

pub mod bench;
pub mod demo;
pub mod stage;
pub mod tree;

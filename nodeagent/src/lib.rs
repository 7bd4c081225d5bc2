//! A host's side of the cloud: it hears what the host should be, looks at what it is, and closes the difference.
//!
//! Reading order: `agent` (everything together), `membership` (who the host is), `session` and `beat` (its mouth and
//! ears), `lease` (until when it may run what must not run twice), `guard` (a process of its own that sees to that),
//! `outbox` and `view` (what they tell), `executor` (carries out the steps that `model::steps` decided), `journal` (what
//! survives it), `data` and `images` (bytes in and out), `relay` (guests in and out), `summary`, `clock`, `durable`.
//! `hypervisor` and `network` are the host's world, each with a real and a simulated implementation behind one trait.

pub mod agent;
pub mod beat;
pub mod clock;
pub mod data;
pub mod durable;
pub mod executor;
pub mod guard;
pub mod host;
pub mod hypervisor;
pub mod images;
pub mod journal;
pub mod lease;
pub mod membership;
pub mod network;
pub mod outbox;
pub mod relay;
pub mod session;
pub mod summary;
pub mod view;

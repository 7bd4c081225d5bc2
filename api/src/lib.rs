//! The wire: what controllers, agents and people say to each other, and a client that survives failovers.

/// Generated from `proto/trefoil.proto`.
#[allow(clippy::all)]
pub mod proto {
    tonic::include_proto!("trefoil.v1");
}

pub mod beat;
pub mod client;
pub mod error;
pub mod session;
pub mod tls;
pub mod token;

mod pem_file;

pub use model::{Capacity, Digest, JoinRole, RequestId};

//! The wire: what controllers, agents and people say to each other, and a client that survives failovers.

/// Generated from `proto/trefoil.proto`: messages and servers, then the clients, which read answers another way.
#[allow(clippy::all)]
pub mod proto {
    tonic::include_proto!("trefoil.v1");
    include!(concat!(env!("OUT_DIR"), "/clients/trefoil.v1.rs"));
}

pub mod beat;
pub mod client;
pub mod codec;
pub mod error;
pub mod probe;
pub mod quorum_backup;
pub mod session;
pub mod tls;
pub mod token;

mod pem_file;

pub use model::{Capacity, Digest, JoinRole, RequestId};

//! The contract, generated from `proto/`.

pub mod codec;

pub use generated::*;

mod generated {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
    tonic::include_proto!("users.v1");
    include!(concat!(env!("OUT_DIR"), "/server/users.v1.rs"));
}

/// The protos with their comments, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

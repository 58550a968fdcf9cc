//! Pure: protobuf messages become types that are always valid. No I/O, no SQL.

pub mod batch;
pub mod fields;
pub mod names;
pub mod page;
pub mod position;
pub mod request;
pub mod stream;
pub mod token;
pub mod user;
pub mod view;

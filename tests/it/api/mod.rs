//! The rpcs.

pub mod batch;
mod batch_model;
mod batch_races;
mod batch_retries;
mod coalescing;
mod contract;
mod create;
mod delete;
mod export;
mod fairness;
pub mod import;
mod import_streams;
mod invalid_input;
mod list;
mod lookup;
mod races;
mod read;
mod retries;
mod update;
mod usernames;

//! All SQL and every connection to PostgreSQL.

pub mod batch;
pub mod change_log;
pub mod dev_postgres;
pub mod export;
pub mod grouped;
pub mod import;
pub mod list;
pub mod lookup;
pub mod pool;
pub mod purge;
pub mod user_row;
pub mod users;

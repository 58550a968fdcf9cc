//! All SQL and every connection to PostgreSQL. Nothing here knows of gRPC.

pub mod change_log;
pub mod connect;
pub mod dev_postgres;
pub mod export;
pub mod idempotency;
pub mod import;
pub mod items;
pub mod list;
pub mod lookup;
pub mod migrate;
pub mod pool;
pub mod purge;
pub mod token_keys;
pub mod user_row;
pub mod users;

/// Every statement of the service, for preparation.
pub fn statements() -> Vec<&'static str> {
    [
        users::STATEMENTS,
        idempotency::STATEMENTS,
        lookup::STATEMENTS,
        list::STATEMENTS,
        import::STATEMENTS,
        purge::STATEMENTS,
        change_log::STATEMENTS,
        token_keys::STATEMENTS,
    ]
    .concat()
}

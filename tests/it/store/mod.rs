//! Faults, migrations, the private PostgreSQL, and what is left of expired and erased rows.

mod dev_postgres;
mod erasure;
mod faults;
mod migrations;
mod pool;
mod purge;

//! Faults, migrations and the private PostgreSQL.

mod dev_postgres;
mod faults;
mod migrations;
mod pool;

//! Statements, faults and migrations.

mod dev_postgres;
mod faults;
mod migrations;

//! Statements, faults and migrations.

mod dev_postgres;
//TMP mod faults;
mod migrations;

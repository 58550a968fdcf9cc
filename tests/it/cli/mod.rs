//! The command line.

mod import_export;
mod settings;
mod watch;

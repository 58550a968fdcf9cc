//! Log set-up, and the text of errors in the log.

use std::{
    error::Error,
    panic::{self, PanicHookInfo},
};

use anyhow::{Chain, Context};
use tokio_postgres::error::DbError;
use tracing_subscriber::{EnvFilter, fmt};

use crate::config::{Config, LogFormat};

/// Starts logging to standard error.
pub fn init(config: &Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.rust_log).context("RUST_LOG is not valid")?;
    let log = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format() {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// Logs where a panic was. Its message can have personal data: std quotes a string that is
/// sliced at a wrong place.
fn log_panic(info: &PanicHookInfo<'_>) {
    let location = info.location().map(ToString::to_string);
    tracing::error!(location, "panic");
}

/// Formats an error and its causes. An error of PostgreSQL appears with its SQLSTATE,
/// message and constraint, but without its detail, which contains column values.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let texts: Vec<String> = Chain::new(error)
        .map(|error| match error.downcast_ref::<DbError>() {
            Some(db) => match db.constraint() {
                Some(constraint) => format!("{} {} ({constraint})", db.code().code(), db.message()),
                None => format!("{} {}", db.code().code(), db.message()),
            },
            None => error.to_string(),
        })
        .collect();
    texts.join(": ")
}

//! SQL of the service that the benchmark runs without the service. It comes from the
//! library, so that both always run the same text.

use anyhow::{Context, Result};
use user_service::{grouped, users};

/// The planner settings of the service's sessions.
pub const SESSION_OPTIONS: &str =
    "-c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c enable_bitmapscan=off -c jit=off";

/// `GetUser` of one request: `$1` is the id.
pub fn get_by_id() -> Result<&'static str> {
    find(users::STATEMENTS, "from users where id = $1")
}

/// `CreateUser` of one request: request id, fingerprint, user id, username and its key,
/// e-mail address and its key, display name, salt.
pub fn create() -> Result<&'static str> {
    find(users::STATEMENTS, "select $3, $4, $5, true, $6, $7, $8")
}

/// `UpdateUser` of one request: request id, fingerprint, user id, revision, the new values
/// in the order of [`create`].
pub fn update() -> Result<&'static str> {
    find(users::STATEMENTS, "display_name = coalesce($9, u.display_name)")
}

/// `CreateUser` of a coalesced batch, whose parameters are arrays in the order of
/// [`create`]: without the change log, and with it.
pub fn create_batch() -> Result<[String; 2]> {
    let logged = find(grouped::STATEMENTS, "insert into users")?;
    let (before, log) = logged.split_once(", change as (").context("no part writes the change log")?;
    let (_, after) = log.split_once(")\nselect").context("nothing follows the change log")?;
    Ok([format!("{before}\nselect{after}"), logged.to_owned()])
}

fn find(statements: &[&'static str], part: &str) -> Result<&'static str> {
    let mut found = statements.iter().filter(|sql| sql.contains(part));
    match (found.next(), found.next()) {
        (Some(sql), None) => Ok(sql),
        _ => anyhow::bail!("not exactly one statement contains `{part}`"),
    }
}

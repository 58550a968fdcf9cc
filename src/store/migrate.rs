//! Brings the schema up to date.

use std::time::Duration;

use futures_util::future;
use tokio::time;

use crate::store::connect::{PIN_SCHEMA, connect};

/// How long a migration waits for a table lock. Requests queue behind it meanwhile, and have
/// `LOCK_TIMEOUT_MS` for that.
const MIGRATION_LOCK_TIMEOUT_MS: u32 = 500;
/// How often a replica checks whether another one has finished migrating.
const MIGRATION_POLL: Duration = Duration::from_millis(50);
/// The advisory lock of migrations: "users", in ASCII.
pub const MIGRATION_LOCK: i64 = 0x75_73_65_72_73;

mod embedded_migrations {
    refinery::embed_migrations!("migrations");
}

/// Brings the schema up to date; replicas that start together take turns.
///
/// The turn is an advisory lock on a connection that is idle in between: a session that waits
/// inside `pg_advisory_lock` holds a snapshot, which `create index concurrently` in another
/// session would wait for. A schema that is newer than this binary is accepted: that is a
/// rolling upgrade.
pub async fn migrate(postgres: &tokio_postgres::Config) -> anyhow::Result<()> {
    let (lock, lock_connection) = connect(postgres).await?;
    let (mut client, connection) = connect(postgres).await?;
    let run = async {
        while !lock.query_one("select pg_try_advisory_lock($1)", &[&MIGRATION_LOCK]).await?.try_get(0)? {
            time::sleep(MIGRATION_POLL).await;
        }
        client
            .batch_execute(&format!("set lock_timeout = {MIGRATION_LOCK_TIMEOUT_MS}; {PIN_SCHEMA}"))
            .await?;
        let report =
            embedded_migrations::migrations::runner().set_abort_missing(false).run_async(&mut client).await?;
        for migration in report.applied_migrations() {
            tracing::info!(%migration, "migrated");
        }
        anyhow::Ok(())
    };
    // Both connections are driven here, and closed with this function.
    tokio::select! {
        result = run => result,
        _ = future::join(lock_connection, connection) => anyhow::bail!("the connection to the database broke"),
    }
}

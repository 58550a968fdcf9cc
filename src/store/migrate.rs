//! Brings the schema up to date, or checks that it is.

use std::{collections::HashMap, time::Duration};

use anyhow::bail;
use refinery::{Migration, Runner, Target};
use tokio::time;
use tokio_postgres::{
    Client,
    error::{DbError, SqlState},
};

use crate::store::connect::{PIN_SCHEMA, connect, connection_lost};

/// How long a migration waits for a table lock. Requests queue behind it meanwhile, and have
/// `LOCK_TIMEOUT_MS` for that.
const MIGRATION_LOCK_TIMEOUT_MS: u32 = 500;
/// The pause before a migration asks for the lock again, in which queued requests run.
const LOCK_RETRY_DELAY: Duration = Duration::from_millis(500);
/// How often a replica checks whether another one has finished migrating.
const MIGRATION_POLL: Duration = Duration::from_millis(50);
/// The advisory lock of migrations: "users", in ASCII.
pub const MIGRATION_LOCK: i64 = 0x75_73_65_72_73;

/// The first line of a migration whose statements run one by one, outside a transaction, such
/// as `create index concurrently`. A replica that is killed leaves such a migration half done,
/// and the next one runs it from its first statement: it must be able to run again.
const OUTSIDE_TRANSACTION: &str = "-- outside a transaction\n";

mod embedded_migrations {
    refinery::embed_migrations!("migrations");
}

/// The migrations of this binary, in order.
pub fn embedded() -> Vec<Migration> {
    let mut migrations = embedded_migrations::migrations::runner().get_migrations().clone();
    migrations.sort();
    migrations
}

/// Brings the schema up to date with the migrations of this binary.
pub async fn migrate(postgres: &tokio_postgres::Config) -> anyhow::Result<()> {
    apply_all(postgres, &embedded()).await
}

/// Applies migrations; replicas that start together take turns. If there is nothing to apply,
/// no right to change the schema is needed.
///
/// The turn is an advisory lock on a connection that is idle in between: a session that waits
/// inside `pg_advisory_lock` holds a snapshot, which `create index concurrently` in another
/// session would wait for.
pub async fn apply_all(postgres: &tokio_postgres::Config, migrations: &[Migration]) -> anyhow::Result<()> {
    let (mut client, connection) = connect(postgres).await?;
    let run = async {
        client.batch_execute(PIN_SCHEMA).await?;
        if pending(&client, migrations).await?.is_empty() {
            return Ok(());
        }
        let (lock, lock_connection) = connect(postgres).await?;
        // The connection is driven here, and closed with this future.
        tokio::select! {
            result = apply_pending(&lock, &mut client, migrations) => result,
            () = lock_connection => Err(connection_lost().into()),
        }
    };
    tokio::select! {
        result = run => result,
        () = connection => Err(connection_lost().into()),
    }
}

/// Checks that every migration of this binary is applied.
pub async fn check(postgres: &tokio_postgres::Config) -> anyhow::Result<()> {
    let (client, connection) = connect(postgres).await?;
    let migrations = embedded();
    let check = async {
        client.batch_execute(PIN_SCHEMA).await?;
        pending(&client, &migrations).await
    };
    let pending = tokio::select! {
        pending = check => pending?,
        () = connection => return Err(connection_lost().into()),
    };
    match pending.first() {
        None => Ok(()),
        Some(first) => bail!(
            "the schema is older than this release: {} of {} migrations are missing, the first is {first}; \
             run `user-service migrate`, or set MIGRATE_ON_START=true",
            pending.len(),
            migrations.len(),
        ),
    }
}

/// The migrations that the database does not have. It may have more: during a rolling upgrade,
/// the schema is newer than this binary.
async fn pending<'a>(client: &Client, migrations: &'a [Migration]) -> anyhow::Result<Vec<&'a Migration>> {
    let history = "select to_regclass('refinery_schema_history') is not null";
    if !client.query_one(history, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(migrations.iter().collect());
    }
    let rows = client.query("select version, checksum from refinery_schema_history", &[]).await?;
    let applied = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
    let applied: HashMap<i32, String> = applied.collect::<Result<_, tokio_postgres::Error>>()?;
    let mut pending = Vec::new();
    for migration in migrations {
        match applied.get(&migration.version()) {
            Some(checksum) if *checksum == migration.checksum().to_string() => {}
            Some(_) => bail!("{migration} is not the migration that was applied to this database"),
            None => pending.push(migration),
        }
    }
    Ok(pending)
}

async fn apply_pending(lock: &Client, client: &mut Client, migrations: &[Migration]) -> anyhow::Result<()> {
    while !lock.query_one("select pg_try_advisory_lock($1)", &[&MIGRATION_LOCK]).await?.try_get(0)? {
        time::sleep(MIGRATION_POLL).await;
    }
    for migration in pending(client, migrations).await? {
        while let Err(error) = apply(client, migrations, migration).await {
            if !is_lock_timeout(&error) {
                return Err(error);
            }
            tracing::warn!(%migration, "waits for a table that is in use");
            time::sleep(LOCK_RETRY_DELAY).await;
        }
        tracing::info!(%migration, "migrated");
    }
    Ok(())
}

/// Applies a migration; those before it are applied.
async fn apply(client: &mut Client, migrations: &[Migration], migration: &Migration) -> anyhow::Result<()> {
    let version = migration.version();
    let runner = |target| Runner::new(migrations).set_abort_missing(false).set_target(target);
    let statements = migration.sql().unwrap_or_default().strip_prefix(OUTSIDE_TRANSACTION);
    let Some(statements) = statements else {
        client.batch_execute(&format!("set lock_timeout = {MIGRATION_LOCK_TIMEOUT_MS}")).await?;
        runner(Target::Version(version)).run_async(client).await?;
        return Ok(());
    };
    // Such a statement waits for transactions that are older, and no request waits for it.
    client.batch_execute("set lock_timeout = 0").await?;
    for statement in statements.split_inclusive(";\n") {
        client.batch_execute(statement).await?;
    }
    // Records the migration as applied.
    runner(Target::FakeVersion(version)).run_async(client).await?;
    Ok(())
}

fn is_lock_timeout(error: &anyhow::Error) -> bool {
    let errors = &mut error.chain().filter_map(|cause| cause.downcast_ref::<DbError>());
    errors.any(|error| *error.code() == SqlState::LOCK_NOT_AVAILABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_outside_a_transaction_can_run_again() {
        for migration in embedded() {
            let sql = migration.sql().unwrap_or_default();
            let Some(statements) = sql.strip_prefix(OUTSIDE_TRANSACTION) else {
                assert!(!sql.contains(" concurrently "), "{migration}");
                continue;
            };
            let lines = statements.lines().filter(|line| !line.is_empty() && !line.starts_with("--"));
            let mut dropped = Vec::new();
            for statement in lines.collect::<Vec<_>>().join("\n").split_terminator(';').map(str::trim) {
                let index = statement.replacen("create unique ", "create ", 1);
                if let Some(name) = statement.strip_prefix("drop index concurrently if exists ") {
                    dropped.push(name);
                } else if let Some(rest) = index.strip_prefix("create index concurrently ") {
                    // If the statement is killed, it leaves an invalid index.
                    let name = rest.split_whitespace().next().unwrap_or_default();
                    assert!(dropped.contains(&name), "{migration}: {name} is not dropped first");
                } else {
                    assert!(statement.contains(" validate constraint "), "{migration}: {statement}");
                }
            }
        }
    }
}

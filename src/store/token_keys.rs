//! The keys of tokens: read from the database at the start and regularly after that, so that
//! they can be rotated while the service runs.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{sync::watch, time};
use tokio_postgres::Row;

use crate::error::{Access, Error};
use crate::model::token::{KEY_SIZE, TokenKeys};
use crate::store::connect::{PIN_SCHEMA, connect, connection_lost};
use crate::store::pool::Db;

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[TOKEN_KEYS];

/// How often a replica reads the keys. The default of `use_time` leaves time for many attempts.
const POLL_INTERVAL: Duration = Duration::from_secs(5);
/// How often a replica tries again after it could not read the keys.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// All keys. The first one encodes: the newest in use, or if none is in use yet, the next.
const TOKEN_KEYS: &str =
    "select id, key from token_keys order by greatest(use_time, now()), use_time desc, id desc";

/// The keys that this process knows.
#[derive(Debug, Default)]
pub struct TokenKeyring {
    keys: watch::Sender<Option<Arc<TokenKeys>>>,
}

impl TokenKeyring {
    /// The keys as they were read last. Fails until they are loaded.
    pub fn keys(&self) -> Result<Arc<TokenKeys>, Error> {
        self.keys.borrow().clone().ok_or(Error::DatabaseUnavailable)
    }

    /// Loads the keys at the start.
    pub async fn load(&self, postgres: &tokio_postgres::Config) -> anyhow::Result<()> {
        let (client, connection) = connect(postgres).await?;
        let read = async {
            client.batch_execute(PIN_SCHEMA).await?;
            client.query(TOKEN_KEYS, &[]).await
        };
        let rows = tokio::select! {
            rows = read => rows.context("cannot read the table token_keys")?,
            () = connection => return Err(connection_lost().into()),
        };
        self.set(&rows)
    }

    /// Loads the keys whenever they change; never returns. When they cannot be loaded, the keys
    /// that are known stay.
    pub async fn poll(&self, db: &Db) {
        let mut interval = POLL_INTERVAL;
        loop {
            time::sleep(interval).await;
            interval = POLL_INTERVAL;
            match db.run(Access::Read, TOKEN_KEYS, &[]).await {
                Ok(rows) => {
                    if let Err(error) = self.set(&rows) {
                        tracing::error!(%error, "token keys not loaded");
                    }
                }
                // The pool logs the reason.
                Err(_) => interval = RETRY_INTERVAL,
            }
        }
    }

    fn set(&self, rows: &[Row]) -> anyhow::Result<()> {
        let keys = rows.iter().map(key_from_row).collect::<anyhow::Result<Vec<_>>>()?;
        let keys = TokenKeys::new(keys).context("the table token_keys has no key")?;
        let ids: Vec<i16> = keys.ids().collect();
        // Another database that is restored under the running service has other keys with the
        // same ids.
        let known = self.keys.send_replace(Some(Arc::new(keys)));
        if !known.is_some_and(|known| known.ids().eq(ids.iter().copied())) {
            tracing::info!(?ids, "token keys loaded");
        }
        Ok(())
    }
}

/// No error of this function repeats a key.
fn key_from_row(row: &Row) -> anyhow::Result<(i16, [u8; KEY_SIZE])> {
    let key: &[u8] = row.try_get(1)?;
    Ok((row.try_get(0)?, key.try_into().context("a key in the table token_keys has a wrong length")?))
}

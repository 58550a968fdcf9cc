//! Health as `grpc.health.v1` and Kubernetes know it. Every name is NOT_SERVING
//! until the opposite was seen.

use std::{convert::Infallible, time::Duration};

use tokio::time;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::pb;
use crate::store::pool;
use crate::telemetry::describe;

/// How often the database is asked.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long it may take to answer.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Whether the server accepts writes, which a standby does not.
const IS_WRITABLE: &str = "select not pg_is_in_recovery()";

/// The names that mean: send me calls.
const READINESS: [&str; 2] = ["", pb::user_service_server::SERVICE_NAME];
/// The name that means: do not restart me.
const LIVENESS: &str = "liveness";

/// A reporter that says: alive, not ready.
pub async fn reporter() -> HealthReporter {
    let reporter = HealthReporter::new();
    set_ready(&reporter, false).await;
    reporter.set_service_status(LIVENESS, ServingStatus::Serving).await;
    reporter
}

/// Says whether calls are welcome.
pub async fn set_ready(reporter: &HealthReporter, is_ready: bool) {
    let status = if is_ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in READINESS {
        reporter.set_service_status(name, status).await;
    }
}

/// Keeps readiness true to the database, for ever.
///
/// It asks on a connection of its own: that all connections of the pool are busy
/// does not mean that the database is gone.
pub async fn watch_database(postgres: &tokio_postgres::Config, reporter: &HealthReporter) {
    let mut is_ready = false;
    loop {
        let Err(error) = ask_database(postgres, reporter, &mut is_ready).await;
        if is_ready {
            tracing::warn!(error = describe(error.as_ref()), "not ready: the database does not answer");
            set_ready(reporter, false).await;
            is_ready = false;
        }
        time::sleep(INTERVAL).await;
    }
}

/// Asks again and again, until there is no good answer.
async fn ask_database(
    postgres: &tokio_postgres::Config,
    reporter: &HealthReporter,
    is_ready: &mut bool,
) -> anyhow::Result<Infallible> {
    let (client, connection) = pool::connect(postgres).await?;
    let asking = async {
        loop {
            let row = time::timeout(TIMEOUT, client.query_one(IS_WRITABLE, &[])).await??;
            anyhow::ensure!(row.try_get::<_, bool>(0)?, "it is a standby");
            if !*is_ready {
                tracing::info!("ready: the database answers");
                set_ready(reporter, true).await;
                *is_ready = true;
            }
            time::sleep(INTERVAL).await;
        }
    };
    tokio::select! {
        failed = asking => failed,
        () = connection => anyhow::bail!("the connection broke"),
    }
}

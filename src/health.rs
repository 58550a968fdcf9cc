//! Readiness and liveness, as `grpc.health.v1` and the probes of Kubernetes define them.
//! The service is NOT_SERVING until a database check has succeeded.

use std::{convert::Infallible, time::Duration};

use tokio::time;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::pb;
use crate::store::pool;
use crate::telemetry::describe;

/// The time between two database checks.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// How long a check may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// True if PostgreSQL accepts writes; a standby does not.
const IS_WRITABLE: &str = "select not pg_is_in_recovery()";

/// The health service names for readiness: the server accepts requests.
const READINESS: [&str; 2] = ["", pb::user_service_server::SERVICE_NAME];
/// The health service name for liveness: the process needs no restart.
const LIVENESS: &str = "liveness";

/// Creates a reporter whose state is: live, not ready.
pub async fn reporter() -> HealthReporter {
    let reporter = HealthReporter::new();
    set_ready(&reporter, false).await;
    reporter.set_service_status(LIVENESS, ServingStatus::Serving).await;
    reporter
}

/// Sets the readiness.
pub async fn set_ready(reporter: &HealthReporter, is_ready: bool) {
    let status = if is_ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in READINESS {
        reporter.set_service_status(name, status).await;
    }
}

/// Updates readiness from the state of the database. Never returns.
///
/// The checks have their own connection, because a busy pool does not mean that the
/// database is unavailable.
pub async fn watch_database(postgres: &tokio_postgres::Config, reporter: &HealthReporter) {
    let mut is_ready = false;
    loop {
        let Err(error) = check_database(postgres, reporter, &mut is_ready).await;
        if is_ready {
            tracing::warn!(error = describe(error.as_ref()), "not ready: the database check failed");
            set_ready(reporter, false).await;
            is_ready = false;
        }
        time::sleep(CHECK_INTERVAL).await;
    }
}

/// Checks the database on one connection, until a check fails.
async fn check_database(
    postgres: &tokio_postgres::Config,
    reporter: &HealthReporter,
    is_ready: &mut bool,
) -> anyhow::Result<Infallible> {
    let (client, connection) = pool::connect(postgres).await?;
    let checks = async {
        loop {
            let row = time::timeout(CHECK_TIMEOUT, client.query_one(IS_WRITABLE, &[])).await??;
            anyhow::ensure!(row.try_get::<_, bool>(0)?, "the database is a standby");
            if !*is_ready {
                tracing::info!("ready: the database check succeeded");
                set_ready(reporter, true).await;
                *is_ready = true;
            }
            time::sleep(CHECK_INTERVAL).await;
        }
    };
    tokio::select! {
        error = checks => error,
        () = connection => anyhow::bail!("the connection was closed"),
    }
}

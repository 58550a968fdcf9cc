//! Health as `grpc.health.v1` and Kubernetes know it. Every name is NOT_SERVING
//! until the opposite was seen.

use std::time::Duration;

use tokio::time;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{db::Db, pb};

/// How often the database is asked, unless calls have shown that it answers.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long it may take to answer.
const TIMEOUT: Duration = Duration::from_secs(1);

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

/// Ends the streams of those who watch, so that their connections can close.
pub async fn end_watches(reporter: &mut HealthReporter) {
    for name in READINESS.into_iter().chain([LIVENESS]) {
        reporter.clear_service_status(name).await;
    }
}

/// Keeps readiness true to the database, for ever.
pub async fn watch_database(db: &Db, reporter: &HealthReporter) {
    let mut was_ready = None;
    loop {
        let is_ready = db.is_answering(TIMEOUT).await;
        if was_ready != Some(is_ready) {
            if is_ready {
                tracing::info!("ready: the database answers");
            } else {
                tracing::warn!("not ready: the database does not answer");
            }
            set_ready(reporter, is_ready).await;
            was_ready = Some(is_ready);
        }
        time::sleep(INTERVAL).await;
    }
}

//! `user-service check`: the health of a running service.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{explain, service_addr::ServiceAddr};

/// Limit of the connection and, separately, of the response.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The arguments of `user-service check`.
#[derive(Debug, Args)]
pub struct Check {
    /// What to ask for: empty or `users.v1.UserService` for readiness, `liveness` for liveness
    /// [default: readiness].
    #[arg(long, default_value = "", hide_default_value = true)]
    pub service: String,

    /// The service to ask.
    #[command(flatten)]
    pub service_addr: ServiceAddr,
}

/// Succeeds if the service is SERVING.
pub async fn run(args: Check) -> anyhow::Result<()> {
    let addr = args.service_addr.addr;
    let endpoint = Endpoint::try_from(format!("http://{addr}"))?.timeout(TIMEOUT).connect_timeout(TIMEOUT);
    let channel = endpoint.connect().await.with_context(|| format!("cannot reach the service at {addr}"))?;
    let request = HealthCheckRequest { service: args.service };
    let response = HealthClient::new(channel).check(request).await;
    let response = response.map_err(|status| anyhow::anyhow!("{}", explain(&status)))?;
    match response.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        status => bail!("{addr} is {}", status.as_str_name()),
    }
}

//! The command line of user-service.

use std::process::ExitCode;

use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use user_service::app;
use user_service::cli;
use user_service::config::{Cli, Command, Config};
use user_service::telemetry;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    let Cli { command, config } = Cli::from_process();
    let result = match command.unwrap_or(Command::Serve) {
        Command::Check { service, addr } => check(&config, service, addr).await,
        Command::Import(args) => cli::import::run(args, config.local_addr().to_string()).await,
        Command::Export(args) => cli::export::run(args, config.local_addr().to_string()).await,
        Command::Serve => with_log(&config, app::serve(config.clone())).await,
        Command::Migrate => with_log(&config, app::migrate(config.clone())).await,
        Command::Watch(args) => {
            with_log(&config, cli::watch::run(args, config.local_addr().to_string())).await
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(
                clippy::print_stderr,
                reason = "the last word of the process, in whatever format the log is"
            )]
            {
                eprintln!("user-service: {}", telemetry::describe(error.as_ref()));
            }
            ExitCode::FAILURE
        }
    }
}

async fn with_log(config: &Config, work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    telemetry::init(config)?;
    work.await
}

/// Succeeds if the service that listens there says SERVING.
async fn check(config: &Config, service: String, addr: Option<String>) -> anyhow::Result<()> {
    const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
    let addr = addr.unwrap_or_else(|| config.local_addr().to_string());
    let endpoint = tonic::transport::Endpoint::try_from(format!("http://{addr}"))?
        .timeout(TIMEOUT)
        .connect_timeout(TIMEOUT);
    let mut client = HealthClient::new(endpoint.connect().await?);
    let response = client.check(HealthCheckRequest { service }).await?.into_inner();
    match response.status() {
        ServingStatus::Serving => Ok(()),
        status => anyhow::bail!("{addr} is {}", status.as_str_name()),
    }
}

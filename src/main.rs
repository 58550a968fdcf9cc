//! The binary: parses the command line, runs the command, sets the exit code.

use std::process::ExitCode;

use user_service::cli::{self, args::Command};
use user_service::{app, telemetry};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    match run(Command::from_process()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(
                clippy::print_stderr,
                reason = "the final error is for the operator, whatever the format of the log"
            )]
            {
                eprintln!("user-service: {}", telemetry::describe(error.as_ref()));
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(config) => {
            telemetry::init(&config)?;
            app::serve(*config).await
        }
        Command::Migrate(config) => {
            telemetry::init(&config)?;
            app::migrate(*config).await
        }
        Command::Check(args) => cli::check::run(args).await,
        Command::Import(args) => cli::import::run(args).await,
        Command::Export(args) => cli::export::run(args).await,
        Command::Watch(args) => {
            telemetry::init(&args.config)?;
            cli::watch::run(args).await
        }
    }
}

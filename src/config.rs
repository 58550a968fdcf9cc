//! The settings: flags and environment, read once and only here.

use std::{
    env,
    ffi::OsString,
    io::{self, IsTerminal},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use clap::{
    Args, CommandFactory, FromArgMatches, Id, Parser, Subcommand, ValueEnum,
    builder::{RangedU64ValueParser, TypedValueParser},
    error::{ContextKind, ContextValue, ErrorKind},
};
use tokio_postgres::config::SslMode;
use tracing_subscriber::EnvFilter;

use crate::cli;

/// The command line.
#[derive(Debug, Parser)]
#[command(version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How.
    #[command(flatten)]
    pub config: Config,
}

/// What the binary can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the service (the default).
    Serve,
    /// Bring the database's schema up to date, and exit.
    Migrate,
    /// Ask a running service for its health; exit 0 if it is SERVING.
    Check {
        /// The name to ask for: empty or `users.v1.UserService` for readiness, `liveness` for life.
        #[arg(long, default_value = "")]
        service: String,
        /// The service, as HOST:PORT [default: LISTEN_ADDR, on this machine]
        #[arg(long)]
        addr: Option<String>,
    },
    /// Import users from a file into a running service; exit 1 if a line was refused.
    Import(cli::import::Import),
    /// Export the users of a running service to a file.
    Export(cli::export::Export),
    /// Print every change of users as a line of JSON.
    Watch(cli::watch::Watch),
}

/// Every setting, as a flag or a variable of the environment; the flag wins.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// The PostgreSQL to use (14 or later), as a URL or `key=value` pairs. Unset:
    /// a private one is started from this machine's server binaries.
    #[arg(long, env, global = true, hide_env_values = true, value_parser = parse_database_url)]
    pub database_url: Option<tokio_postgres::Config>,

    /// Where to listen; with port 0 the system picks one, and the log has it.
    #[arg(long, env, global = true, default_value = "127.0.0.1:50051")]
    pub listen_addr: SocketAddr,

    /// Where the private PostgreSQL keeps its data [default:
    /// /var/lib/user-service for root, else user-service in $XDG_DATA_HOME or ~/.local/share].
    #[arg(long, env, global = true)]
    pub data_dir: Option<PathBuf>,

    /// Connections to PostgreSQL, at most.
    #[arg(long, env, global = true, default_value_t = 10, value_parser = range::<usize>(1, 200))]
    pub pool_size: usize,

    /// How long a statement waits for a connection before its calls are refused.
    #[arg(long, env, global = true, default_value_t = 5_000, value_parser = range::<u64>(1, 600_000))]
    pub pool_acquire_timeout_ms: u64,

    /// Calls that may wait for a connection, and for the next shared statement of each
    /// kind; more are refused at once.
    #[arg(long, env, global = true, default_value_t = 1_024, value_parser = range::<usize>(1, 1_000_000))]
    pub max_queued_requests: usize,

    /// How long a call may take, whatever its own deadline; of a stream, each statement.
    #[arg(long, env, global = true, default_value_t = 30_000, value_parser = range::<u64>(1, 600_000))]
    pub request_timeout_ms: u64,

    /// How long a statement waits for a row or a table that another transaction has locked,
    /// before its call is refused as TRANSACTION_CONFLICT. Shared statements wait for a tenth
    /// of a second, imports for a second.
    #[arg(long, env, global = true, default_value_t = 1_000, value_parser = range::<u64>(1, 600_000))]
    pub lock_timeout_ms: u64,

    /// Client connections, at most, those of probes too; more are closed at once.
    #[arg(long, env, global = true, default_value_t = 1_024, value_parser = range::<usize>(1, 100_000))]
    pub max_connections: usize,

    /// Calls under way on one client connection, at most.
    #[arg(long, env, global = true, default_value_t = 1_024, value_parser = range::<usize>(1, 100_000))]
    pub max_streams_per_connection: usize,

    /// After this time, give or take a tenth, a client is asked to connect anew,
    /// so that load spreads over new replicas.
    #[arg(long, env, global = true, default_value_t = 1_800_000, value_parser = range::<u64>(1_000, 86_400_000))]
    pub max_connection_age_ms: u64,

    /// On SIGTERM: how long to go on as NOT_SERVING, while clients and load
    /// balancers notice. A second signal skips it.
    #[arg(long, env, global = true, default_value_t = 2_000, value_parser = range::<u64>(0, 600_000))]
    pub drain_delay_ms: u64,

    /// After the drain delay: how long calls under way may take to finish.
    #[arg(long, env, global = true, default_value_t = 20_000, value_parser = range::<u64>(0, 600_000))]
    pub shutdown_grace_ms: u64,

    /// How long a username that an update replaced stays held for its former owner; 0 frees it at once.
    #[arg(long, env, global = true, default_value_t = 30, value_parser = range::<u32>(0, 3650))]
    pub username_hold_days: u32,

    /// How often to erase users and records whose time has come.
    #[arg(long, env, global = true, default_value_t = 60_000, value_parser = range::<u64>(10, 86_400_000))]
    pub purge_interval_ms: u64,

    /// Imports under way at once; more are refused.
    #[arg(long, env, global = true, default_value_t = 16, value_parser = range::<usize>(1, 1_000))]
    pub max_imports: usize,

    /// How long an import may go without a complete chunk before it is ended; it can be
    /// continued.
    #[arg(long, env, global = true, default_value_t = 300_000, value_parser = range::<u64>(1, 86_400_000))]
    pub import_idle_timeout_ms: u64,

    /// Exports under way at once; more are refused. Each has a connection to
    /// PostgreSQL beside the pool.
    #[arg(long, env, global = true, default_value_t = 4, value_parser = range::<usize>(1, 100))]
    pub max_exports: usize,

    /// How long an export may take: until then, PostgreSQL cannot remove what is changed
    /// or deleted meanwhile.
    #[arg(long, env, global = true, default_value_t = 900_000, value_parser = range::<u64>(1, 86_400_000))]
    pub export_timeout_ms: u64,

    /// How long the change log is kept: how far back a watch can be resumed.
    #[arg(long, env, global = true, default_value_t = 168, value_parser = range::<u32>(1, 87_600))]
    pub change_retention_hours: u32,

    /// WatchUsers streams, at most; more are refused.
    #[arg(long, env, global = true, default_value_t = 1_000, value_parser = range::<usize>(1, 100_000))]
    pub max_watchers: usize,

    /// Whether calls that wait for the same kind of statement share one. Off only
    /// to compare: the answers are the same.
    #[arg(long, env, global = true, default_value = "on")]
    pub request_coalescing: RequestCoalescing,

    /// What to log: a level, or `target=level` pairs. SQL is logged at debug.
    #[arg(long, env, global = true, default_value = "info", value_parser = parse_log_filter)]
    pub rust_log: String,

    /// How to log [default: text on a terminal, else json]
    #[arg(long, env, global = true)]
    pub log_format: Option<LogFormat>,
}

/// Whether calls are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RequestCoalescing {
    /// They are.
    On,
    /// Each runs alone.
    Off,
}

/// How to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

impl Config {
    /// Where the private PostgreSQL keeps its data.
    #[expect(clippy::disallowed_methods, reason = "settings are read here")]
    pub fn data_dir(&self) -> PathBuf {
        if let Some(dir) = &self.data_dir {
            return dir.clone();
        }
        if nix::unistd::geteuid().is_root() {
            return "/var/lib/user-service".into();
        }
        let home = || env::var_os("HOME").map_or_else(env::temp_dir, PathBuf::from).join(".local/share");
        env::var_os("XDG_DATA_HOME").map_or_else(home, PathBuf::from).join("user-service")
    }

    /// `LOG_FORMAT`, or what suits where the log goes.
    pub fn log_format(&self) -> LogFormat {
        let fitting = if io::stderr().is_terminal() { LogFormat::Text } else { LogFormat::Json };
        self.log_format.unwrap_or(fitting)
    }

    /// Where a service with these settings can be reached from this machine.
    pub fn local_addr(&self) -> SocketAddr {
        let mut addr = self.listen_addr;
        if addr.ip().is_unspecified() {
            addr.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        addr
    }
}

impl Cli {
    /// Reads flags and environment, or prints what is wrong and exits: every
    /// value that does not fit, not only the first.
    pub fn from_process() -> Self {
        match Self::parse_all(env::args_os().collect()) {
            Ok(cli) => cli,
            Err(error) => error.exit(),
        }
    }

    /// clap stops at the first bad value, so that argument is noted, taken as it
    /// is, and the rest is looked at again.
    fn parse_all(args: Vec<OsString>) -> Result<Self, clap::Error> {
        let mut command = Self::command();
        let mut problems = Vec::new();
        loop {
            let error = match command.clone().try_get_matches_from(&args) {
                Ok(matches) if problems.is_empty() => return Self::from_arg_matches(&matches),
                Ok(_) => {
                    return Err(Self::command().error(ErrorKind::ValueValidation, problems.join("\n       ")));
                }
                Err(error) => error,
            };
            let Some(bad) = argument_of(&error, command.clone()) else { return Err(error) };
            problems.push(problem(&bad.to_string().to_uppercase(), &error));
            command = command.mut_arg(bad, |arg| arg.value_parser(clap::builder::ValueParser::os_string()));
        }
    }
}

/// The argument whose value clap has refused.
fn argument_of(error: &clap::Error, mut command: clap::Command) -> Option<Id> {
    let Some(ContextValue::String(text)) = error.get(ContextKind::InvalidArg) else { return None };
    // An argument has a name to compare once its command is complete.
    command.build();
    let mut arguments = command.get_arguments();
    arguments.find(|arg| arg.to_string() == *text).map(|arg| arg.get_id().clone())
}

/// What is wrong with a setting. The value is not repeated: it may be a secret.
fn problem(name: &str, error: &clap::Error) -> String {
    let valid = match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) => format!("must be one of {}", values.join(", ")),
        _ => std::error::Error::source(error).map_or_else(|| "is not valid".to_owned(), ToString::to_string),
    };
    format!("{name}: {valid}")
}

fn range<T>(min: u64, max: u64) -> RangedU64ValueParser<T>
where
    T: TryFrom<u64> + Clone + Send + Sync,
    RangedU64ValueParser<T>: TypedValueParser,
{
    RangedU64ValueParser::new().range(min..=max)
}

/// Checks it; whoever logs parses it again, since a filter cannot be cloned.
fn parse_log_filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

fn parse_database_url(text: &str) -> Result<tokio_postgres::Config, String> {
    if text.is_empty() {
        return Err("is empty; unset it to use a private PostgreSQL".into());
    }
    let config: tokio_postgres::Config = text.parse().map_err(|error: tokio_postgres::Error| {
        // The cause says which part; the value stays out of it.
        std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
    })?;
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        return Err("has no host".into());
    }
    if config.get_ssl_mode() == SslMode::Require {
        return Err("sslmode=require: TLS to PostgreSQL is not built in".into());
    }
    Ok(config)
}

//! The settings of the service: their names, defaults and limits.

use std::{
    env,
    io::{self, IsTerminal},
    net::SocketAddr,
    path::PathBuf,
};

use clap::{
    ArgAction, Args, ValueEnum,
    builder::{RangedU64ValueParser, TypedValueParser},
};
use tokio_postgres::config::{SslMode, TargetSessionAttrs};
use tracing_subscriber::EnvFilter;

/// `LISTEN_ADDR`, if it is unset.
pub const DEFAULT_LISTEN_ADDR: &str = "127.0.0.1:50051";

/// Every setting. Each is a flag and an environment variable; the flag takes precedence.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// The PostgreSQL to use, 14 or later, as a URL or `key=value` pairs; several hosts are tried
    /// in their order. Unset: a private PostgreSQL is started from the server binaries of this
    /// machine.
    #[arg(long, env, hide_env_values = true, value_parser = parse_database_url)]
    pub database_url: Option<tokio_postgres::Config>,

    /// The address to listen on, as IP:PORT. With port 0 the system picks a port, and the log
    /// names it.
    #[arg(long, env, default_value = DEFAULT_LISTEN_ADDR)]
    pub listen_addr: SocketAddr,

    /// A second address, for probes: plaintext, grpc.health.v1 only, and outside all limits of
    /// clients. Unset: probes use LISTEN_ADDR.
    #[arg(long, env)]
    pub health_addr: Option<SocketAddr>,

    /// The data directory of the private PostgreSQL. Not used with DATABASE_URL [default:
    /// /var/lib/user-service for root, else user-service in $XDG_DATA_HOME or ~/.local/share].
    #[arg(long, env)]
    pub data_dir: Option<PathBuf>,

    /// Whether the start brings the schema up to date. With `false` a schema that is older than
    /// this release stops the start.
    #[arg(long, env, default_value_t = true, action = ArgAction::Set)]
    pub migrate_on_start: bool,

    /// Maximum number of pooled connections to PostgreSQL. Health checks, the change feed and
    /// exports have connections outside the pool.
    #[arg(long, env, default_value_t = 10, value_parser = range::<usize>(1, 200))]
    pub pool_size: usize,

    /// How long a statement waits for a pooled connection before its requests fail with
    /// OVERLOADED, in milliseconds.
    #[arg(long, env, default_value_t = 5_000, value_parser = range::<u64>(1, 600_000))]
    pub pool_acquire_timeout_ms: u64,

    /// Maximum number of requests that wait for a connection, and in each queue. For one more,
    /// one of the client connection with the most fails with OVERLOADED.
    #[arg(long, env, default_value_t = 1_024, value_parser = range::<usize>(1, 1_000_000))]
    pub max_queued_requests: usize,

    /// Maximum duration of a unary request until its response starts, whatever its own deadline,
    /// and again until the client has read the response, in milliseconds. It also limits each
    /// statement of a stream.
    #[arg(long, env, default_value_t = 30_000, value_parser = range::<u64>(1, 600_000))]
    pub request_timeout_ms: u64,

    /// How long a statement waits for a row or a table that another transaction has locked,
    /// before its request fails with TRANSACTION_CONFLICT, in milliseconds. Shared statements
    /// always wait 100 ms, imports 1000 ms.
    #[arg(long, env, default_value_t = 1_000, value_parser = range::<u64>(1, 600_000))]
    pub lock_timeout_ms: u64,

    /// Maximum number of client connections. For one more, the connection that has been idle
    /// longest is closed; if none is idle, the new one.
    #[arg(long, env, default_value_t = 1_024, value_parser = range::<usize>(1, 100_000))]
    pub max_connections: usize,

    /// Maximum number of concurrent requests on one client connection. More wait in the client.
    #[arg(long, env, default_value_t = 1_024, value_parser = range::<u32>(1, 100_000))]
    pub max_streams_per_connection: u32,

    /// Maximum number of concurrent requests of all connections. A connection may have as many
    /// as it leaves for all others. More fail with OVERLOADED.
    #[arg(long, env, default_value_t = 8_192, value_parser = range::<usize>(1, 1_000_000))]
    pub max_requests_in_flight: usize,

    /// Maximum number of bytes of requests that are being received or handled, and of responses
    /// that are not sent, of one connection. A request beyond it fails with OVERLOADED, or, if
    /// it has changed something, with OUTCOME_UNKNOWN.
    #[arg(long, env, default_value_t = 67_108_864, value_parser = range::<usize>(8_388_608, 17_179_869_184))]
    pub max_bytes_per_connection: usize,

    /// The same of all connections. A connection may have as many as it leaves for all others.
    #[arg(long, env, default_value_t = 536_870_912, value_parser = range::<usize>(16_777_216, 1_099_511_627_776))]
    pub max_bytes_in_flight: usize,

    /// Age, plus or minus 10 %, at which the server asks a client to reconnect, in
    /// milliseconds. It spreads load over new replicas. Watches end with SHUTTING_DOWN; other
    /// requests continue.
    #[arg(long, env, default_value_t = 1_800_000, value_parser = range::<u64>(1_000, 86_400_000))]
    pub max_connection_age_ms: u64,

    /// After that age: how long imports and exports may continue, in milliseconds, at least
    /// REQUEST_TIMEOUT_MS. Then they end with SHUTTING_DOWN, and the connection is closed.
    #[arg(long, env, default_value_t = 900_000, value_parser = range::<u64>(0, 86_400_000))]
    pub max_connection_age_grace_ms: u64,

    /// After SIGTERM or SIGINT: how long the server continues to accept requests while its
    /// health is NOT_SERVING, in milliseconds. A second signal skips the delay.
    #[arg(long, env, default_value_t = 2_000, value_parser = range::<u64>(0, 600_000))]
    pub drain_delay_ms: u64,

    /// After the drain delay: how long running requests may take to finish, in milliseconds.
    #[arg(long, env, default_value_t = 20_000, value_parser = range::<u64>(0, 600_000))]
    pub shutdown_grace_ms: u64,

    /// How long a stream may wait for its client to read, in milliseconds. It is reset within
    /// twice this time.
    #[arg(long, env, default_value_t = 300_000, value_parser = range::<u64>(1, 86_400_000))]
    pub stream_read_timeout_ms: u64,

    /// Interval between two deletions of expired rows, in milliseconds.
    #[arg(long, env, default_value_t = 60_000, value_parser = range::<u64>(10, 86_400_000))]
    pub purge_interval_ms: u64,

    /// Maximum number of concurrent imports. More fail with OVERLOADED.
    #[arg(long, env, default_value_t = 16, value_parser = range::<usize>(1, 1_000))]
    pub max_imports: usize,

    /// How long an import may go without a complete chunk before the server ends it, in
    /// milliseconds. The client can resume it.
    #[arg(long, env, default_value_t = 300_000, value_parser = range::<u64>(1, 86_400_000))]
    pub import_idle_timeout_ms: u64,

    /// Maximum number of concurrent exports. More fail with OVERLOADED. Each has its own
    /// connection to PostgreSQL, outside the pool.
    #[arg(long, env, default_value_t = 4, value_parser = range::<usize>(1, 100))]
    pub max_exports: usize,

    /// Maximum duration of an export, in milliseconds. While an export runs, PostgreSQL cannot
    /// remove the old versions of changed and deleted rows.
    #[arg(long, env, default_value_t = 900_000, value_parser = range::<u64>(1, 86_400_000))]
    pub export_timeout_ms: u64,

    /// How long the change log is kept, in hours: how far back a watch can resume.
    #[arg(long, env, default_value_t = 168, value_parser = range::<u32>(1, 87_600))]
    pub change_retention_hours: u32,

    /// How long a username that an update replaced stays held for its former owner, in days.
    /// 0 frees it at once.
    #[arg(long, env, default_value_t = 30, value_parser = range::<u32>(0, 3_650))]
    pub username_hold_days: u32,

    /// Maximum number of WatchUsers streams. More fail with OVERLOADED.
    #[arg(long, env, default_value_t = 1_000, value_parser = range::<usize>(1, 100_000))]
    pub max_watchers: usize,

    /// Whether queued requests of the same kind share a statement. The responses are the same
    /// either way; `off` exists for comparison.
    #[arg(long, env, default_value = "on")]
    pub request_coalescing: RequestCoalescing,

    /// Whether the server describes its API to tools such as grpcurl.
    #[arg(long, env, default_value = "on")]
    pub reflection: Reflection,

    /// What to log: a level, or `target=level` pairs. `debug` includes SQL statements, without
    /// their parameters.
    #[arg(long, env, default_value = "info", value_parser = parse_log_filter)]
    pub rust_log: String,

    /// The format of the log, which goes to standard error [default: text on a terminal, else
    /// json].
    #[arg(long, env)]
    pub log_format: Option<LogFormat>,
}

/// Whether queued requests of the same kind share a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RequestCoalescing {
    /// Queued requests share a statement.
    On,
    /// Each request runs alone.
    Off,
}

/// Whether the server has the services of gRPC reflection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Reflection {
    /// It has both versions.
    On,
    /// A request for them is answered with UNIMPLEMENTED.
    Off,
}

/// The format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines of text.
    Text,
    /// One JSON object per line.
    Json,
}

impl Config {
    /// The data directory of the private PostgreSQL.
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

    /// The format of the log: `LOG_FORMAT`, or text on a terminal and JSON elsewhere.
    pub fn log_format(&self) -> LogFormat {
        let default = if io::stderr().is_terminal() { LogFormat::Text } else { LogFormat::Json };
        self.log_format.unwrap_or(default)
    }
}

fn range<T>(min: u64, max: u64) -> RangedU64ValueParser<T>
where
    T: TryFrom<u64> + Clone + Send + Sync,
    RangedU64ValueParser<T>: TypedValueParser,
{
    RangedU64ValueParser::new().range(min..=max)
}

/// Validates a log filter. It stays text, because `EnvFilter` cannot be cloned.
fn parse_log_filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// What is wrong with options that ask for TLS.
const NO_TLS: &str = "asks for TLS to PostgreSQL, which is not built in: sslmode can be `disable`, or \
    `prefer`, which connects without TLS too; other options of TLS are not known";
/// What is wrong with a kind of server that the service cannot use.
const NEEDS_PRIMARY: &str = "asks for a server that may be a standby, but the service writes: \
    target_session_attrs can be `read-write`, which finds the primary of several hosts, or `any`";

fn parse_database_url(text: &str) -> Result<tokio_postgres::Config, String> {
    if text.is_empty() {
        return Err("is empty; unset it to use a private PostgreSQL".into());
    }
    let config: tokio_postgres::Config = text.parse().map_err(|error: tokio_postgres::Error| {
        // The source names the invalid part, but not its value, which can be a password.
        let what = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        match () {
            () if what.contains("`target_session_attrs`") => NEEDS_PRIMARY.into(),
            () if what.contains("`ssl") && !what.contains("`sslnegotiation`") => NO_TLS.into(),
            () => what,
        }
    })?;
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        return Err("has no host".into());
    }
    let (hosts, addresses) = (config.get_hosts().len(), config.get_hostaddrs().len());
    if hosts != 0 && addresses != 0 && hosts != addresses {
        return Err(format!("has {hosts} hosts, but {addresses} addresses in hostaddr"));
    }
    if ![0, 1, hosts.max(addresses)].contains(&config.get_ports().len()) {
        return Err("has neither one port nor a port for each host".into());
    }
    if config.get_ssl_mode() == SslMode::Require {
        return Err(NO_TLS.into());
    }
    if config.get_target_session_attrs() == TargetSessionAttrs::ReadOnly {
        return Err(NEEDS_PRIMARY.into());
    }
    Ok(config)
}

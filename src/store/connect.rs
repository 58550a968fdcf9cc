//! Opens connections to PostgreSQL: hosts and their time limits, session settings, and checks
//! of the server.

use std::{
    fmt, io,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context;
use futures_util::{
    FutureExt,
    future::{self, BoxFuture},
};
use rand::seq::SliceRandom;
use tokio::{net, time};
use tokio_postgres::{
    Client, Config, Connection, NoTls, SimpleQueryMessage, Socket,
    config::{Host, LoadBalanceHosts},
    error::{DbError, SqlState},
    tls::NoTlsStream,
};
use uuid::Uuid;

use crate::error::is_connection_lost;
use crate::telemetry::describe;

/// Limit of opening a connection up to the login, and of making its session.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The same limit for an address that another one follows. A server that does not answer must
/// not keep the service from the next one.
const HOST_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a server that has not answered is tried last.
const SILENT_TIME: Duration = Duration::from_secs(10);
/// How long the driver waits for keepalives unless the settings say so.
const KEEPALIVES_IDLE_OF_DRIVER: Duration = Duration::from_secs(2 * 60 * 60);

/// A connection outside the pool, and the future that drives it, which the caller has to poll.
pub async fn connect(postgres: &Config) -> anyhow::Result<(Client, BoxFuture<'static, ()>)> {
    let (client, connection) = open(postgres).await?;
    Ok((client, connection.map(drop).boxed()))
}

/// The error of a connection outside the pool that ended.
pub(crate) fn connection_lost() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the connection to the database broke")
}

/// Opens a connection to the first server that accepts it. Each address has a time limit of its
/// own, which includes the login.
async fn open(postgres: &Config) -> anyhow::Result<(Client, Connection<Socket, NoTlsStream>)> {
    let (mut hosts, mut failed) = (hosts(postgres), Vec::new());
    let is_random = postgres.get_load_balance_hosts() == LoadBalanceHosts::Random;
    if is_random {
        hosts.shuffle(&mut rand::rng());
    }
    // Stable: otherwise the order stays.
    hosts.sort_by_key(|host| silent().iter().any(|(name, _)| *name == host.name()));
    let limit = |is_last| {
        let default = if is_last { CONNECT_TIMEOUT } else { HOST_TIMEOUT };
        postgres.get_connect_timeout().copied().unwrap_or(default)
    };
    let mut hosts = hosts.into_iter().peekable();
    while let Some(host) = hosts.next() {
        let is_last_host = hosts.peek().is_none();
        let addresses = match time::timeout(limit(is_last_host), host.resolve()).await {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => {
                failed.push((host.name(), error.into()));
                continue;
            }
            Err(elapsed) => {
                failed.push((host.name(), anyhow::Error::new(elapsed)));
                continue;
            }
        };
        let mut addresses: Vec<Option<IpAddr>> = addresses;
        if is_random {
            addresses.shuffle(&mut rand::rng());
        }
        for (n, address) in addresses.iter().enumerate() {
            let is_last = is_last_host && n + 1 == addresses.len();
            let attempt = host.at(postgres, *address);
            match time::timeout(limit(is_last), attempt.connect(NoTls)).await {
                Ok(Ok(opened)) => return Ok(opened),
                Ok(Err(error)) => failed.push((host.name(), error.into())),
                Err(elapsed) => {
                    silent().push((host.name(), Instant::now()));
                    let error = anyhow::Error::new(elapsed).context("the server does not answer");
                    failed.push((host.name(), error));
                }
            }
        }
    }
    let (name, last) = failed.pop().context("DATABASE_URL has no host")?;
    if failed.is_empty() {
        return Err(last);
    }
    let others: Vec<_> =
        failed.iter().map(|(name, error)| format!("{name}: {}", describe(error.as_ref()))).collect();
    Err(last.context(format!("no server accepts the connection; {}; {name}", others.join("; "))))
}

/// Servers that have not answered in the last [`SILENT_TIME`], which are tried after the others:
/// without that, each connection would wait for them again.
fn silent() -> MutexGuard<'static, Vec<(String, Instant)>> {
    static SILENT: Mutex<Vec<(String, Instant)>> = Mutex::new(Vec::new());
    let mut silent = SILENT.lock().unwrap_or_else(PoisonError::into_inner);
    silent.retain(|(_, since)| since.elapsed() < SILENT_TIME);
    silent
}

/// A server of `DATABASE_URL`.
struct Server<'a> {
    host: Option<&'a Host>,
    address: Option<IpAddr>,
    port: u16,
}

/// The servers of `DATABASE_URL`, in its order.
fn hosts(postgres: &Config) -> Vec<Server<'_>> {
    let (hosts, addresses, ports) = (postgres.get_hosts(), postgres.get_hostaddrs(), postgres.get_ports());
    let server = |n| Server {
        host: hosts.get(n),
        address: addresses.get(n).copied(),
        port: ports.get(n).or(ports.first()).copied().unwrap_or(5432),
    };
    (0..hosts.len().max(addresses.len())).map(server).collect()
}

impl Server<'_> {
    fn name(&self) -> String {
        match (self.host, self.address) {
            (Some(Host::Tcp(name)), _) => format!("{name}:{}", self.port),
            (Some(Host::Unix(path)), _) => format!("{}:{}", path.display(), self.port),
            (None, address) => {
                format!("{}:{}", address.map_or_else(String::new, |a| a.to_string()), self.port)
            }
        }
    }

    /// All addresses of the host name; `None` for a socket in the file system.
    async fn resolve(&self) -> io::Result<Vec<Option<IpAddr>>> {
        match (self.host, self.address) {
            (Some(Host::Tcp(name)), None) => {
                let addresses = net::lookup_host((name.as_str(), self.port)).await?;
                Ok(addresses.map(|address| Some(address.ip())).collect())
            }
            (_, address) => Ok(vec![address]),
        }
    }

    /// The settings for one address of this server.
    fn at(&self, from: &Config, address: Option<IpAddr>) -> Config {
        let mut to = without_hosts(from);
        match self.host {
            Some(Host::Tcp(name)) => to.host(name),
            Some(Host::Unix(path)) => to.host_path(path),
            None => &mut to,
        };
        if let Some(address) = address {
            to.hostaddr(address);
        }
        to.port(self.port);
        to
    }
}

/// The settings without the servers, which the driver cannot remove.
fn without_hosts(from: &Config) -> Config {
    let mut to = Config::new();
    if let Some(user) = from.get_user() {
        to.user(user);
    }
    if let Some(password) = from.get_password() {
        to.password(password);
    }
    if let Some(dbname) = from.get_dbname() {
        to.dbname(dbname);
    }
    if let Some(options) = from.get_options() {
        to.options(options);
    }
    if let Some(name) = from.get_application_name() {
        to.application_name(name);
    }
    if let Some(timeout) = from.get_connect_timeout() {
        to.connect_timeout(*timeout);
    }
    if let Some(timeout) = from.get_tcp_user_timeout() {
        to.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = from.get_keepalives_interval() {
        to.keepalives_interval(interval);
    }
    if let Some(retries) = from.get_keepalives_retries() {
        to.keepalives_retries(retries);
    }
    to.keepalives(from.get_keepalives())
        .keepalives_idle(from.get_keepalives_idle())
        .ssl_mode(from.get_ssl_mode())
        .ssl_negotiation(from.get_ssl_negotiation())
        .target_session_attrs(from.get_target_session_attrs())
        .channel_binding(from.get_channel_binding());
    to
}

/// Sets the timeouts that the driver and `DATABASE_URL` leave unset. Without them, a server that
/// vanished from the network blocks its clients for a quarter of an hour.
pub fn with_timeouts(mut postgres: Config) -> Config {
    if postgres.get_keepalives_idle() == KEEPALIVES_IDLE_OF_DRIVER {
        postgres.keepalives_idle(Duration::from_secs(30));
    }
    if postgres.get_keepalives_interval().is_none() {
        postgres.keepalives_interval(Duration::from_secs(10));
    }
    if postgres.get_keepalives_retries().is_none() {
        postgres.keepalives_retries(3);
    }
    if postgres.get_tcp_user_timeout().is_none() {
        postgres.tcp_user_timeout(Duration::from_secs(30));
    }
    if postgres.get_application_name().is_none() {
        postgres.application_name("user-service");
    }
    postgres
}

/// The settings of each session. Generic plans are made on empty tables, so indexes are forced,
/// and cost estimates are meaningless: JIT is off for that reason. A backend whose client has
/// disconnected stops. A statement that waits for a lock keeps its connection, so it must not
/// wait long: a locked row would take the whole pool.
///
/// The isolation level is what the statements are written for, whatever the defaults of the role
/// are. `synchronous_commit = off` is honoured only in the `options` of `DATABASE_URL`: a crash
/// would lose acknowledged changes, and changes that watchers have seen.
pub(crate) fn session_settings(timeout_ms: u64, lock_timeout_ms: u64) -> String {
    format!(
        "set statement_timeout = {timeout_ms};
         set lock_timeout = {lock_timeout_ms};
         set idle_in_transaction_session_timeout = {timeout_ms};
         set idle_session_timeout = 0;
         set client_connection_check_interval = 1000;
         set plan_cache_mode = force_generic_plan;
         set enable_seqscan = off;
         set enable_bitmapscan = off;
         set jit = off;
         set default_transaction_isolation = 'read committed';
         set default_transaction_deferrable = off;
         select set_config('synchronous_commit', 'on', false)
         where current_setting('synchronous_commit') = 'off'
            and (select source from pg_settings where name = 'synchronous_commit') <> 'client';
         {PIN_SCHEMA}"
    )
}

/// Keeps the session in the schema in which the tables are, wherever the operator has put them.
/// Tables of the same names in other schemas, or temporary ones, cannot hide them. Does nothing
/// before the first migration.
pub(crate) const PIN_SCHEMA: &str = "
    select set_config('search_path', quote_ident(nspname) || ', pg_temp', false)
    from pg_class join pg_namespace on pg_namespace.oid = relnamespace
    where pg_class.oid = to_regclass('user_feed')";

/// Stores the timeline in the session, for positions in the change log. A server that has been
/// promoted keeps its timeline until it is restarted; a standby has none.
const SET_TIMELINE: &str = "select set_config('user_service.timeline',
    case when pg_is_in_recovery() then '' else left(pg_walfile_name(pg_current_wal_lsn()), 8) end, false)";

/// Stores the start of the server instead. It changes with each restart, so it distinguishes
/// timelines too.
const SET_SERVER_START: &str = "select set_config('user_service.timeline',
    case when pg_is_in_recovery() then ''
        else 'started-' || (extract(epoch from pg_postmaster_start_time()) * 1000000)::bigint
    end, false)";

/// Makes the session of a new connection. Returns whether the server tells its timeline.
pub(crate) async fn set_up(client: &Client, settings: &str) -> Result<bool, tokio_postgres::Error> {
    let timeline = async {
        match client.batch_execute(SET_TIMELINE).await {
            Err(error) if error.as_db_error().is_some_and(is_refusal) => {
                client.batch_execute(SET_SERVER_START).await.map(|()| false)
            }
            result => result.map(|()| true),
        }
    };
    // One round trip: the client sends both without waiting.
    let ((), is_told) = future::try_join(client.batch_execute(settings), timeline).await?;
    Ok(is_told)
}

/// Whether the server will not run a function, now or later. Amazon Aurora, for example, tells
/// positions in its log only with `wal_level = logical`.
fn is_refusal(error: &DbError) -> bool {
    let class = error.code().code().get(..2);
    // Not if the connection breaks, or the server is short of something or stops the query.
    !matches!(class, Some("08" | "53" | "57"))
}

/// Why the service cannot use a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unusable {
    /// It is a standby.
    Standby,
    /// It is a primary that rejects writes.
    ReadOnly,
    /// Its sessions are shared by clients.
    SharedSessions,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Standby => {
                "the server is a standby: the service waits until it is promoted; if DATABASE_URL names \
                 several servers, target_session_attrs=read-write finds the primary"
            }
            Self::ReadOnly => "the server is read-only: default_transaction_read_only is on",
            Self::SharedSessions => {
                "a session does not keep its settings between transactions: DATABASE_URL leads to a \
                 connection pooler in transaction or statement mode; use its session mode or connect to PostgreSQL itself"
            }
        })
    }
}

impl std::error::Error for Unusable {}

/// A server as one connection sees it.
#[derive(Debug, PartialEq, Eq)]
pub struct ServerState {
    /// Which server it is, and in which role: it changes when the address leads to another server,
    /// when a standby is promoted, and when a primary is made read-only.
    pub identity: String,
    /// Why it cannot be used, if it cannot.
    pub unusable: Option<Unusable>,
}

/// Asks a server for its state, in one round trip.
pub async fn server_state(client: &Client) -> anyhow::Result<ServerState> {
    const STATE: &str = "select extract(epoch from pg_postmaster_start_time()), pg_is_in_recovery(),
        current_setting('transaction_read_only')";
    let row = first_row(client, STATE).await?;
    let [start, is_standby, is_read_only] = &row[..] else { anyhow::bail!("an answer without a row") };
    let unusable = match (is_standby.as_str(), is_read_only.as_str()) {
        ("t", _) => Some(Unusable::Standby),
        (_, "on") => Some(Unusable::ReadOnly),
        _ => None,
    };
    Ok(ServerState { identity: format!("{start} {is_standby} {is_read_only}"), unusable })
}

/// Checks that the server accepts writes, and that sessions are not shared.
pub async fn verify_server(postgres: &Config) -> anyhow::Result<()> {
    let ((first, first_connection), (second, second_connection)) =
        future::try_join(connect(postgres), connect(postgres)).await?;
    let verified = async {
        if let Some(unusable) = server_state(&first).await?.unusable {
            return Err(unusable.into());
        }
        verify_sessions(&first, &second).await
    };
    tokio::select! {
        verified = time::timeout(CONNECT_TIMEOUT, verified) => verified?,
        _ = future::join(first_connection, second_connection) => {
            Err(io::Error::from(io::ErrorKind::ConnectionReset).into())
        }
    }
}

/// Checks that sessions are not shared, as they are behind a pooler in transaction mode. Such a
/// pooler gives the session that the first client has just used to the second one, and another
/// one to the first client, either at once or while the second one is in a transaction.
async fn verify_sessions(first: &Client, second: &Client) -> anyhow::Result<()> {
    const SETTING: &str = "select coalesce(current_setting('user_service.session', true), '')";
    let id = Uuid::now_v7().to_string();
    first.batch_execute(&format!("set user_service.session = '{id}'")).await?;
    let is_id = |row: Vec<String>| row.first() == Some(&id);
    let is_kept = is_id(first_row(first, SETTING).await?);
    match second.batch_execute("begin").await {
        // What a pooler in statement mode says.
        Err(error) if error.code() == Some(&SqlState::PROTOCOL_VIOLATION) => {
            return Err(Unusable::SharedSessions.into());
        }
        begun => begun?,
    }
    // The order matters: a pooler with one session would have none left for the first client.
    let is_shared =
        !is_kept || is_id(first_row(second, SETTING).await?) || !is_id(first_row(first, SETTING).await?);
    second.batch_execute("rollback").await?;
    if is_shared { Err(Unusable::SharedSessions.into()) } else { Ok(()) }
}

/// The first row of a query, as text. It prepares nothing, which a pooler could not keep.
async fn first_row(client: &Client, sql: &str) -> anyhow::Result<Vec<String>> {
    let messages = client.simple_query(sql).await?;
    let row = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let row = row.context("an answer without a row")?;
    Ok((0..row.len()).map(|n| row.get(n).unwrap_or_default().to_owned()).collect())
}

/// Whether an error at the start may pass: the server is not up yet, is busy, is becoming the
/// primary, or a lock is held. Anything else is final, such as a wrong password or a migration
/// that fails.
pub fn is_transient(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        if let Some(db) = cause.downcast_ref::<DbError>() {
            let state = db.code();
            return is_connection_lost(state)
                || state.code().starts_with("53")
                || [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED].contains(state)
                || *state == SqlState::READ_ONLY_SQL_TRANSACTION;
        }
        cause.is::<io::Error>()
            || cause.is::<time::error::Elapsed>()
            || cause.downcast_ref::<tokio_postgres::Error>().is_some_and(tokio_postgres::Error::is_closed)
            || matches!(cause.downcast_ref(), Some(Unusable::Standby | Unusable::ReadOnly))
    })
}

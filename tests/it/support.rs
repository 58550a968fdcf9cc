//! What every test needs: a real server on its own database, requests, and assertions.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use hyper_util::{client::legacy, rt::TokioExecutor};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::watch,
};
use tokio_postgres::NoTls;
use tonic::{Code, Request, Status, body::Body, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt;
use user_service::pb::{self, user_service_client::UserServiceClient};
use user_service::store::dev_postgres::Embedded;
use user_service::store::migrate;
use uuid::Uuid;

/// A part of every username, e-mail address and password in a test. Every test checks that the
/// log does not contain it.
pub const SECRET: &str = "zqzq";

/// How long [`eventually`] waits: long enough for a slow and busy machine.
const EVENTUALLY_TIMEOUT: Duration = Duration::from_secs(60);

// ---------------------------------------------------------------- PostgreSQL

/// The PostgreSQL server that all tests share.
struct Cluster {
    dir: PathBuf,
    template: String,
    databases: AtomicU32,
}

/// Starts the shared PostgreSQL server and creates a migrated database, which the databases of
/// the tests copy.
fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        let start = async {
            let dir = TempDir::with_prefix("us-").unwrap().keep();
            let postgres = Embedded::start(&dir).await.unwrap();
            guard(&dir);
            let client = connect(&postgres.config()).await;
            // The data does not have to survive a power cut.
            client.batch_execute("alter system set fsync = off").await.unwrap();
            client.batch_execute("select pg_reload_conf()").await.unwrap();
            client.batch_execute("create database template_users").await.unwrap();
            migrate::migrate(&config(&dir, "template_users")).await.unwrap();
            // The guard stops it.
            std::mem::forget(postgres);
            Cluster { dir, template: "template_users".into(), databases: AtomicU32::new(0) }
        };
        // The server needs its own runtime, because the runtime of a test ends with the test.
        std::thread::spawn(|| tokio::runtime::Runtime::new().unwrap().block_on(start)).join().unwrap()
    })
}

/// Starts a process that stops the server and deletes its data when this process ends,
/// however it ends.
fn guard(dir: &Path) {
    let script = r#"cat; kill -QUIT "$(head -n 1 "$0/data/postmaster.pid")"; sleep 1; rm -rf "$0""#;
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(dir).stdin(Stdio::piped()).stdout(Stdio::null());
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    // The write end of the pipe closes when this process ends.
    std::mem::forget(command.spawn().unwrap());
}

fn config(socket_dir: &Path, database: &str) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    config.host_path(socket_dir).user("postgres").dbname(database);
    config
}

async fn connect(config: &tokio_postgres::Config) -> tokio_postgres::Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The database of one test.
#[derive(Clone)]
pub struct Database {
    pub socket_dir: PathBuf,
    pub name: String,
}

impl Database {
    /// Creates a database with the schema of the service.
    pub async fn migrated() -> Self {
        let template = cluster().template.clone();
        Self::create(&format!("template {template}")).await
    }

    /// Creates an empty database.
    pub async fn empty() -> Self {
        Self::create("").await
    }

    async fn create(options: &str) -> Self {
        let cluster = cluster();
        let name = format!("test_{}", cluster.databases.fetch_add(1, Ordering::Relaxed));
        let admin = connect(&config(&cluster.dir, "postgres")).await;
        admin.batch_execute(&format!("create database {name} {options}")).await.unwrap();
        Self { socket_dir: cluster.dir.clone(), name }
    }

    pub fn config(&self) -> tokio_postgres::Config {
        config(&self.socket_dir, &self.name)
    }

    /// Opens a connection that the service does not use.
    pub async fn connect(&self) -> tokio_postgres::Client {
        connect(&self.config()).await
    }

    pub fn url(&self) -> String {
        let host = self.socket_dir.to_str().unwrap().replace('/', "%2F");
        format!("postgres://postgres:{SECRET}password@{host}/{}", self.name)
    }

    /// Runs a query that returns one number.
    pub async fn count(&self, sql: &str) -> i64 {
        self.connect().await.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Dumps the whole database as text.
    pub fn dump(&self) -> String {
        let program = ["/usr/lib/postgresql/15/bin/pg_dump", "pg_dump"];
        let program =
            program.into_iter().find(|p| Command::new(p).arg("--version").output().is_ok()).unwrap();
        let mut command = Command::new(program);
        command.args(["--username=postgres", "--host"]).arg(&self.socket_dir).arg(&self.name);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

// ------------------------------------------------------------------ the server

/// A running service, started from its binary.
pub struct Server {
    child: Child,
    pub addr: String,
    log: tempfile::NamedTempFile,
}

/// Starts the service on a new database and waits until it is ready.
pub async fn server() -> (Server, Database) {
    let database = Database::migrated().await;
    (Server::start(&database, &[]).await, database)
}

impl Server {
    /// Starts the service on a database and waits until it is ready.
    pub async fn start(database: &Database, settings: &[(&str, &str)]) -> Self {
        let server = Self::spawn(&[&[("DATABASE_URL", database.url().as_str())], settings].concat()).await;
        server.wait_until("", ServingStatus::Serving).await;
        // A test can then disturb the connections without disturbing the start.
        let pool_is_ready = async || server.log().contains(r#""message":"pool ready""#).then_some(());
        eventually("the pool is ready", pool_is_ready).await;
        server
    }

    /// Starts the service and waits until it listens.
    pub async fn spawn(settings: &[(&str, &str)]) -> Self {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_user-service"));
        command.env_clear().envs(std::env::var("PATH").map(|path| ("PATH", path)));
        // The check for personal data covers all log levels.
        command.env("RUST_LOG", "trace").env("LISTEN_ADDR", "127.0.0.1:0").env("DRAIN_DELAY_MS", "0");
        // Many tests keep a row locked until a statement waits for it.
        command.env("LOCK_TIMEOUT_MS", "60000").env("POOL_ACQUIRE_TIMEOUT_MS", "60000");
        // `make test` also runs all tests without coalescing.
        command.envs(std::env::var("REQUEST_COALESCING").map(|value| ("REQUEST_COALESCING", value)));
        command.envs(settings.iter().copied()).stderr(log.reopen().unwrap());
        let mut server = Self { child: command.spawn().unwrap(), addr: String::new(), log };
        server.addr = eventually("the service listens", async || {
            let ended = server.child.try_wait().unwrap();
            let log = server.log();
            let line = log.lines().find(|line| line.contains(r#""message":"listening""#));
            let addr = line.and_then(|line| line.split_once(r#""addr":""#)?.1.split_once('"'));
            assert!(addr.is_some() || ended.is_none(), "the service ended: {log}");
            Some(addr?.0.to_owned())
        })
        .await;
        server
    }

    /// The address of the listener for probes, with `HEALTH_ADDR` set to port 0.
    pub fn health_addr(&self) -> String {
        let log = self.log();
        let line = log.lines().find(|line| line.contains("listening for probes")).unwrap();
        line.split_once(r#""addr":""#).unwrap().1.split_once('"').unwrap().0.to_owned()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.log.path()).unwrap()
    }

    /// How many statements the service has run, without its regular reads of the change log and
    /// of the token keys.
    pub fn statements(&self) -> usize {
        let is_regular =
            |line: &str| line.contains("pg_current_snapshot") || line.contains("from token_keys");
        let is_statement = |line: &&str| line.contains(r#""message":"statement""#) && !is_regular(line);
        self.log().lines().filter(is_statement).count()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The resident memory of the process, in bytes.
    pub fn memory(&self) -> usize {
        self.status_bytes("VmRSS:")
    }

    /// The largest resident memory that the process has had, in bytes.
    pub fn peak_memory(&self) -> usize {
        self.status_bytes("VmHWM:")
    }

    fn status_bytes(&self, what: &str) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(what)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
    }

    pub async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.addr)).unwrap().connect().await.unwrap()
    }

    pub async fn client(&self) -> UserServiceClient<Channel> {
        UserServiceClient::new(self.channel().await)
    }

    /// A client that does not enforce its deadlines, so that only the server does.
    pub fn client_ignoring_deadlines(
        &self,
    ) -> UserServiceClient<legacy::Client<legacy::connect::HttpConnector, Body>> {
        let http = legacy::Client::builder(TokioExecutor::new()).http2_only(true).build_http();
        UserServiceClient::with_origin(http, format!("http://{}", self.addr).parse().unwrap())
    }

    /// The health of a service; `None` if the server cannot be reached.
    pub async fn health(&self, service: &str) -> Option<ServingStatus> {
        self.health_at(&self.addr, service).await
    }

    /// The same, asked at another address.
    pub async fn health_at(&self, addr: &str, service: &str) -> Option<ServingStatus> {
        let endpoint = Channel::from_shared(format!("http://{addr}")).unwrap();
        let mut client = HealthClient::new(endpoint.connect().await.ok()?);
        let request = HealthCheckRequest { service: service.into() };
        Some(client.check(request).await.ok()?.into_inner().status())
    }

    pub async fn wait_until(&self, service: &str, status: ServingStatus) {
        eventually("the health is as expected", async || {
            (self.health(service).await == Some(status)).then_some(())
        })
        .await;
    }

    /// Sends a signal by its name.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Waits for the process to end.
    pub async fn ended(&mut self) -> ExitStatus {
        eventually("the process ends", async || self.child.try_wait().unwrap()).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let own = log.lines().filter(|line| line.contains(r#""target":"user_service"#));
            let last: Vec<_> = own.filter(|line| !line.contains(r#""level":"DEBUG""#)).collect();
            let _ = writeln!(std::io::stderr(), "{}", last.join("\n"));
        } else {
            let log = self.log().to_lowercase();
            let leak = log.lines().find(|line| line.contains(SECRET));
            assert_eq!(leak, None, "the log has personal data or a password");
        }
    }
}

/// Polls until there is a value. `what` describes it in the panic after a timeout.
pub async fn eventually<T>(what: &str, mut poll: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = poll().await {
            return value;
        }
        assert!(started.elapsed() < EVENTUALLY_TIMEOUT, "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Counts the sessions of the database that wait for a lock.
pub const WAITING: &str =
    "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";

/// Ends the partition of the change log that is written, as if that had been so long ago.
pub async fn end_partition(database: &Database, age: &str) {
    let end = format!(
        "with earlier as (
            update user_changes_partitions set begin_time = begin_time - interval '{age}'
        ), begun as (
            insert into user_changes_partitions
            select (number + 1) % 9, now() - interval '{age}' from user_changes_partitions
            order by begin_time desc limit 1 returning number
        )
        select setval('user_changes_seq', number * 1000000000000000000) from begun"
    );
    database.connect().await.batch_execute(&end).await.unwrap();
}

/// Terminates all sessions of the service and returns their number.
pub async fn terminate_backends(database: &Database) -> i64 {
    let terminate = "select count(pg_terminate_backend(pid)) from pg_stat_activity
        where datname = current_database() and application_name = 'user-service'";
    database.count(terminate).await
}

// ------------------------------------------------------------------- requests

/// A client with flow-control windows that are smaller than the changes.
pub async fn narrow_client(server: &Server) -> UserServiceClient<Channel> {
    let channel = Channel::from_shared(format!("http://{}", server.addr)).unwrap();
    let channel = channel.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
    UserServiceClient::new(channel.connect().await.unwrap())
}

/// A user to create, with [`SECRET`] in its name and its address.
pub fn user(name: &str) -> pb::User {
    pb::User {
        username: format!("{SECRET}{name}"),
        email: format!("{SECRET}{name}@example.com"),
        display_name: format!("{SECRET} {name}"),
        ..Default::default()
    }
}

pub fn create(user: pb::User) -> pb::CreateUserRequest {
    pb::CreateUserRequest { user: Some(user), ..Default::default() }
}

/// Several users to create.
pub fn batch_create(users: impl IntoIterator<Item = pb::User>) -> pb::BatchCreateUsersRequest {
    let items = users.into_iter().map(|user| pb::BatchCreateUsersItem { user: Some(user) }).collect();
    pb::BatchCreateUsersRequest { items, ..Default::default() }
}

pub fn by_id(id: &str) -> pb::GetUserRequest {
    let key = Some(pb::get_user_request::Key::Id(id.into()));
    pb::GetUserRequest { key, ..Default::default() }
}

pub fn by_username(username: &str) -> pb::GetUserRequest {
    let key = Some(pb::get_user_request::Key::Username(username.into()));
    pb::GetUserRequest { key, ..Default::default() }
}

pub fn delete(id: &str) -> pb::DeleteUserRequest {
    pb::DeleteUserRequest { id: id.into(), ..Default::default() }
}

pub fn expunge(id: &str) -> pb::ExpungeUserRequest {
    pb::ExpungeUserRequest { id: id.into(), force: true, ..Default::default() }
}

/// An update of the display name.
pub fn rename(id: &str, display_name: &str) -> pb::UpdateUserRequest {
    let user = pb::User { id: id.into(), display_name: display_name.into(), ..Default::default() };
    pb::UpdateUserRequest { user: Some(user), ..Default::default() }
}

pub fn new_request_id() -> String {
    Uuid::now_v7().to_string()
}

/// A request with a `grpc-timeout`. [`Server::client_ignoring_deadlines`] leaves it to the server.
pub fn with_timeout<T>(message: T, timeout: &'static str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
    request
}

/// Creates a user and returns it.
pub async fn created(client: &mut UserServiceClient<Channel>, name: &str) -> pb::User {
    client.create_user(create(user(name))).await.unwrap().into_inner().user.unwrap()
}

// ------------------------------------------------------------------ responses

/// The reason of an error.
pub fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "user-service.users.v1");
    info.reason.clone()
}

/// The field violations of an error, each as the field and the reason.
pub fn violations(status: &Status) -> Vec<(String, String)> {
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
    violations.into_iter().map(|v| (v.field, v.reason)).collect()
}

/// The indexes of the rejected elements of a list, such as `0-1,3`.
pub fn rejected_elements(status: &Status, list: &str) -> String {
    status.get_error_details().error_info().unwrap().metadata[list].clone()
}

/// Asserts that a request failed with this code and reason, and returns its status.
#[track_caller]
pub fn assert_rejected<T: std::fmt::Debug>(
    response: Result<T, Status>,
    code: Code,
    expected: &str,
) -> Status {
    let status = response.expect_err("the request should have been rejected");
    assert_eq!((status.code(), reason(&status).as_str()), (code, expected), "{status:?}");
    status
}

// ---------------------------------------------------------------------- proxy

/// A proxy to the database that can hold responses and cut connections.
pub struct Proxy {
    dir: TempDir,
    upstream: Database,
    is_holding: watch::Sender<bool>,
    held_request: watch::Sender<Option<&'static str>>,
    cuts: watch::Sender<u32>,
    moves: watch::Sender<u32>,
}

impl Proxy {
    /// Starts a proxy that forwards everything.
    pub async fn to(upstream: &Database) -> Self {
        let dir = TempDir::with_prefix("px-").unwrap();
        let listener = UnixListener::bind(dir.path().join(".s.PGSQL.5432")).unwrap();
        let target = upstream.socket_dir.join(".s.PGSQL.5432");
        let (is_holding, holding) = watch::channel(false);
        let (held_request, held) = watch::channel(None);
        let hold = is_holding.clone();
        let (cuts, cut) = watch::channel(0);
        let (moves, moved) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = UnixStream::connect(&target).await.unwrap();
                let (hold, holding, held, mut cut, mut moved) =
                    (hold.clone(), holding.clone(), held.clone(), cut.clone(), moved.clone());
                cut.mark_unchanged();
                moved.mark_unchanged();
                tokio::spawn(async move {
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = server.into_split();
                    // A cut comes first, so that no held response gets through.
                    tokio::select! {
                        biased;
                        _ = cut.changed() => {}
                        // The sockets stay open.
                        _ = moved.changed() => std::future::pending().await,
                        () = forward_requests(&mut from_client, &mut to_server, held, hold) => {}
                        () = forward_responses(&mut from_server, &mut to_client, holding) => {}
                    }
                });
            }
        });
        Self { dir, upstream: upstream.clone(), is_holding, held_request, cuts, moves }
    }

    /// The database as seen through the proxy.
    pub fn database(&self) -> Database {
        Database { socket_dir: self.dir.path().into(), name: self.upstream.name.clone() }
    }

    /// Holds all responses of the database from now on.
    pub fn hold_responses(&self) {
        self.is_holding.send_replace(true);
    }

    /// Holds all responses of the database from the one to this request on.
    pub fn hold_responses_from(&self, request: &'static str) {
        self.held_request.send_replace(Some(request));
    }

    /// Forwards the held responses and all later ones.
    pub fn release_responses(&self) {
        self.held_request.send_replace(None);
        self.is_holding.send_replace(false);
    }

    /// Forwards nothing more on the present connections, which stay open, as if the address had
    /// moved to another server. New ones are forwarded.
    pub fn move_silently(&self) {
        self.moves.send_modify(|n| *n += 1);
    }

    /// Closes all connections. New ones are forwarded.
    pub fn cut(&self) {
        self.cuts.send_modify(|n| *n += 1);
        self.release_responses();
    }
}

async fn forward_requests(
    from: &mut tokio::net::unix::OwnedReadHalf,
    to: &mut tokio::net::unix::OwnedWriteHalf,
    held: watch::Receiver<Option<&'static str>>,
    hold: watch::Sender<bool>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        let is_held =
            |request: &str| buffer[..n].windows(request.len()).any(|text| text == request.as_bytes());
        if held.borrow().is_some_and(is_held) {
            hold.send_replace(true);
        }
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

async fn forward_responses(
    from: &mut tokio::net::unix::OwnedReadHalf,
    to: &mut tokio::net::unix::OwnedWriteHalf,
    mut holding: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        if holding.wait_for(|is_holding| !is_holding).await.is_err()
            || to.write_all(&buffer[..n]).await.is_err()
        {
            return;
        }
    }
}

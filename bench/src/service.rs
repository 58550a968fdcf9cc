//! The service under test: the release binary, as it is.

use std::{
    net::SocketAddr,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use prost::Message;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    task::JoinSet,
    time,
};
use tonic_health::pb::{HealthCheckResponse, health_check_response::ServingStatus};

use crate::{
    calls::{Work, frame},
    client::{Connection, head},
    cluster::Database,
};

/// Between two questions for the health of a service that starts.
const POLL: Duration = Duration::from_millis(1);
/// It starts a hundred times faster, or never.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running service; it ends when this is dropped.
pub struct Service {
    pub database: Database,
    pub addr: SocketAddr,
    pub pid: u32,
    /// From exec to SERVING.
    pub start: Duration,
    child: Child,
}

impl Service {
    /// Starts the service with its default settings, and returns when it serves.
    pub async fn start(binary: &Path, database: &Database, grouping: &str) -> anyhow::Result<Self> {
        let started = Instant::now();
        let mut child = Command::new(binary)
            .env_clear()
            .env("DATABASE_URL", database.url())
            .env("LISTEN_ADDR", "127.0.0.1:0")
            .env("GROUPING", grouping)
            .env("RUST_LOG", "info")
            .env("LOG_FORMAT", "json")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            // A Ctrl-C is for the benchmark, which then stops the service.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot run {}", binary.display()))?;
        let pid = child.id().context("the service has ended")?;
        let mut lines = BufReader::new(child.stderr.take().context("no log")?).lines();
        let addr = loop {
            let Some(line) = lines.next_line().await? else { bail!("the service does not start") };
            if let Some(addr) = listening_at(&line) {
                break addr.parse()?;
            }
            show_trouble(&line);
        };
        // Somebody has to read on, or the service will wait to write: to the very end,
        // even if this is given up before, for its last words tell why.
        let mut log = JoinSet::new();
        log.spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                show_trouble(&line);
            }
        });
        log.detach_all();
        let is_serving = time::timeout(START_TIMEOUT, serving(addr)).await;
        is_serving.context("it takes too long").flatten().context("the service does not get ready")?;
        let start = started.elapsed();
        Ok(Self { database: database.clone(), addr, pid, start, child })
    }

    pub async fn stop(mut self) -> anyhow::Result<()> {
        Ok(self.child.kill().await?)
    }
}

/// The address in `{…"message":"listening","addr":"127.0.0.1:40000"…}`.
fn listening_at(line: &str) -> Option<&str> {
    let (_, fields) = line.split_once(r#""message":"listening""#)?;
    let (_, addr) = fields.split_once(r#""addr":""#)?;
    Some(addr.split_once('"')?.0)
}

fn show_trouble(line: &str) {
    if !line.contains(r#""level":"INFO""#) {
        eprintln!("user-service: {line}");
    }
}

/// Asks until the answer is SERVING.
async fn serving(addr: SocketAddr) -> anyhow::Result<()> {
    let mut connection = Connection::open(addr).await?;
    let head = head(addr, Work::Empty.path())?;
    loop {
        let answer = connection.caller.call(head.clone(), frame(&())?).await?;
        if HealthCheckResponse::decode(answer)?.status() == ServingStatus::Serving {
            return Ok(());
        }
        time::sleep(POLL).await;
    }
}

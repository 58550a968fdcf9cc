//! Server processes that log the address they listen on.

use std::{net::SocketAddr, path::Path, process::Stdio, time::Duration};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time,
};

use crate::{
    client::{GrpcClient, frame},
    requests::Work,
};

/// What precedes the address in the log of the service.
const LISTENING: &str = r#""message":"listening","addr":""#;
const HEALTH_INTERVAL: Duration = Duration::from_millis(1);
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// The message of a `HealthCheckResponse` with the status SERVING.
const SERVING: [u8; 2] = [8, 1];

/// A running server process. Dropping it sends SIGTERM.
pub struct Server {
    pub addr: SocketAddr,
    pub pid: u32,
    child: Child,
}

impl Server {
    /// Starts a program and waits until its log has `announcement` and an address.
    pub async fn spawn(command: &mut Command, announcement: &str) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C is for the benchmark, which then stops its servers.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {}", command.as_std().get_program().display()))?;
        let pid = child.id().context("the server has ended")?;
        let mut lines = BufReader::new(child.stderr.take().context("no log")?).lines();
        let addr = loop {
            let line = lines.next_line().await?.context("the server does not start")?;
            if let Some((_, addr)) = line.split_once(announcement) {
                let end = addr.find(|c: char| !c.is_ascii_digit() && !".:".contains(c));
                break addr.get(..end.unwrap_or(addr.len())).unwrap_or_default().parse()?;
            }
            show_problem(&line);
        };
        // The log is read to its end, or the server would block when the pipe is full.
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                show_problem(&line);
            }
        });
        Ok(Self { addr, pid, child })
    }

    /// Ends the process at once.
    pub async fn kill(mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Asks the process to shut down and waits for it.
    pub async fn shut_down(mut self) -> Result<()> {
        self.terminate();
        let status = self.child.wait().await?;
        if !status.success() {
            bail!("the server ended with {status}");
        }
        Ok(())
    }

    fn terminate(&self) {
        // A process without id has ended already.
        if let Some(pid) = self.child.id() {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.terminate();
    }
}

fn show_problem(line: &str) {
    if !line.contains("INFO") {
        eprintln!("{line}");
    }
}

/// A command that runs the service with default settings, whatever the environment is.
pub fn command(binary: &Path) -> Command {
    let mut command = Command::new(binary);
    command.env_clear().envs([("LISTEN_ADDR", "127.0.0.1:0"), ("LOG_FORMAT", "json")]);
    command
}

/// Starts the service and waits until it is SERVING.
pub async fn serve(command: &mut Command) -> Result<Server> {
    let server = Server::spawn(command, LISTENING).await?;
    let wait = async {
        let mut health = GrpcClient::connect(server.addr, &Work::Empty.path()).await?;
        while health.call(frame(&())?).await? != SERVING[..] {
            time::sleep(HEALTH_INTERVAL).await;
        }
        anyhow::Ok(())
    };
    time::timeout(START_TIMEOUT, wait).await.context("the service does not become ready")??;
    Ok(server)
}

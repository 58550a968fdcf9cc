//! A private PostgreSQL server and its databases of users. `shared_buffers` is a quarter of
//! the machine's memory, as the PostgreSQL manual advises; the rest are defaults.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::statfs::{TMPFS_MAGIC, statfs},
    unistd::{SysconfVar, sysconf},
};
use tempfile::TempDir;
use tokio::process::Command;
use tokio_postgres::{Client, NoTls};

use crate::{
    requests::{ID_BASE, ID_PREFIX},
    server::{Server, command, serve},
};

/// A running PostgreSQL server.
pub struct Postgres {
    pub dir: TempDir,
    pub postmaster: u32,
    /// An idle service without `DATABASE_URL`, which started the server and stops it.
    host: Server,
}

/// A database with the service's schema and users 1 to `users`.
#[derive(Debug, Clone)]
pub struct Database {
    pub name: String,
    pub url: String,
    pub users: u64,
    /// The token of the page in the middle of all users.
    pub deep_page: String,
    pub postmaster: u32,
}

impl Postgres {
    pub async fn start(service: &Path) -> Result<Self> {
        let dir = TempDir::with_prefix("user-service-bench-")?;
        if statfs(dir.path())?.filesystem_type() == TMPFS_MAGIC {
            bail!("{} is in memory, where fsync costs nothing: set TMPDIR", dir.path().display());
        }
        let mut command = command(service);
        command.env("DATA_DIR", dir.path()).envs([("DRAIN_DELAY_MS", "0"), ("POOL_SIZE", "1")]);
        command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        let host = serve(&mut command).await?;
        let known = |variable| sysconf(variable)?.context("the memory size is unknown");
        let memory = known(SysconfVar::_PHYS_PAGES)? * known(SysconfVar::PAGE_SIZE)?;
        let client = connect(&url(dir.path(), "postgres"), "").await?;
        let set_buffers = format!("alter system set shared_buffers = '{}MB'", memory / (1024 * 1024) / 4);
        client.batch_execute(&set_buffers).await?;
        host.shut_down().await?;
        let host = serve(&mut command).await?;
        let pid_file = fs::read_to_string(dir.path().join("data/postmaster.pid"))?;
        let postmaster = pid_file.lines().next().context("PostgreSQL has no process id")?.parse()?;
        Ok(Self { dir, postmaster, host })
    }

    /// Stops the server and removes its data.
    pub async fn stop(self) -> Result<()> {
        let stopped = self.host.shut_down().await;
        self.dir.close()?;
        stopped
    }

    /// One of the programs of this PostgreSQL version.
    pub fn program(&self, name: &str) -> Result<Command> {
        let server: PathBuf = fs::read_link(format!("/proc/{}/exe", self.postmaster))?;
        let mut command = Command::new(server.with_file_name(name));
        command.stdin(Stdio::null()).process_group(0).kill_on_drop(true);
        Ok(command)
    }

    pub async fn version(&self) -> Result<String> {
        let client = connect(&self.url("postgres"), "").await?;
        Ok(client.query_one("show server_version", &[]).await?.try_get(0)?)
    }

    /// Creates a database in the state of one that has existed for a while: with
    /// statistics, vacuumed, and written to disk. The service binary makes its schema.
    pub async fn create_database(&self, service: &Path, name: &str, users: u64) -> Result<Database> {
        self.execute("postgres", &format!("create database {name}")).await?;
        let url = self.url(name);
        let migration = command(service).arg("migrate").env("DATABASE_URL", &url).output().await?;
        if !migration.status.success() {
            bail!("the migration failed: {}", String::from_utf8_lossy(&migration.stderr));
        }
        for sql in [&insert(users), "vacuum analyze users", "checkpoint"] {
            self.execute(name, sql).await?;
        }
        Ok(Database { name: name.into(), url, users, deep_page: String::new(), postmaster: self.postmaster })
    }

    /// Copies a database that has no open connections.
    pub async fn copy_database(&self, source: &Database, name: &str) -> Result<Database> {
        self.execute("postgres", &format!("create database {name} template {}", source.name)).await?;
        // Otherwise the copied pages would be written during the measurement.
        self.execute("postgres", "checkpoint").await?;
        Ok(Database { name: name.into(), url: self.url(name), ..source.clone() })
    }

    /// Drops a database and closes the connections to it.
    pub async fn drop_database(&self, database: Database) -> Result<()> {
        self.execute("postgres", &format!("drop database {} (force)", database.name)).await
    }

    fn url(&self, database: &str) -> String {
        url(self.dir.path(), database)
    }

    async fn execute(&self, database: &str, sql: &str) -> Result<()> {
        Ok(connect(&self.url(database), "").await?.batch_execute(sql).await?)
    }
}

fn url(dir: &Path, database: &str) -> String {
    format!("postgresql://postgres@/{database}?host={}", dir.display())
}

/// Connects without the service; `options` are settings of the session.
pub async fn connect(url: &str, options: &str) -> Result<Client> {
    let mut config: tokio_postgres::Config = url.parse()?;
    let (client, connection) = config.options(options).connect(NoTls).await?;
    // It ends when the client is dropped.
    tokio::spawn(connection);
    Ok(client)
}

/// Inserts users of three years: the higher the number, the newer, as with the ids that the
/// service makes.
fn insert(users: u64) -> String {
    format!(
        "insert into users (
            id, username, username_key, username_held, email, email_key, display_name,
            revision, create_time, update_time
        )
        select ('{ID_PREFIX}' || ({ID_BASE} + n))::uuid,
            'user' || n, 'user' || n, true,
            'user' || n || '@example.com', 'user' || n || '@example.com',
            'User ' || n, 1, time, time
        from generate_series(1, {users}) as n,
            lateral (select now() - interval '3 years' * (1 - n::float8 / {users}) as time) as created"
    )
}

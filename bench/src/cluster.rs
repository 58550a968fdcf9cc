//! The PostgreSQL that is measured, and its databases full of users. It is private,
//! has a quarter of the machine's memory for its buffers, as its manual advises, and
//! otherwise the settings that it comes with.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context, bail};
use nix::{
    sys::statfs::{TMPFS_MAGIC, statfs},
    unistd::{SysconfVar, sysconf},
};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_postgres::{Client, NoTls};
use user_service::{
    db,
    embedded::Embedded,
    page::{Key, Page, Position},
    pb,
};
use uuid::Uuid;

use crate::calls::{ID_BASE, ID_PREFIX};

/// A running PostgreSQL in a directory that goes with it.
pub struct Cluster {
    pub dir: TempDir,
    pub postmaster: u32,
    postgres: Embedded,
}

/// A database with the service's schema and users 1 to `users`.
#[derive(Debug, Clone)]
pub struct Database {
    pub name: String,
    pub users: u64,
    /// The page token that leads to the middle of all users.
    pub deep_page: String,
    pub socket_dir: PathBuf,
}

impl Cluster {
    pub async fn start() -> anyhow::Result<Self> {
        let dir = TempDir::with_prefix("user-service-bench-")?;
        if statfs(dir.path())?.filesystem_type() == TMPFS_MAGIC {
            bail!("{} is in memory, where fsync costs nothing: set TMPDIR", dir.path().display());
        }
        let postgres = Embedded::start(dir.path()).await?;
        let session = Session::open(&postgres.config()).await?;
        let set_buffers = format!("alter system set shared_buffers = '{}MB'", memory_mib()? / 4);
        session.client.batch_execute(&set_buffers).await?;
        postgres.stop().await?;
        drop(postgres);
        let postgres = Embedded::start(dir.path()).await?;
        let pid_file = fs::read_to_string(dir.path().join("data/postmaster.pid"))?;
        let postmaster = pid_file.lines().next().context("PostgreSQL has no process id")?.parse()?;
        Ok(Self { dir, postmaster, postgres })
    }

    /// Stops PostgreSQL and removes all that is left of it.
    pub async fn stop(self) -> anyhow::Result<()> {
        let stopped = self.postgres.stop().await;
        self.dir.close()?;
        stopped
    }

    /// Where the programs of this PostgreSQL are, pgbench among them.
    pub fn bin_dir(&self) -> anyhow::Result<PathBuf> {
        let program = fs::read_link(format!("/proc/{}/exe", self.postmaster))?;
        Ok(program.parent().map(Path::to_owned).unwrap_or_default())
    }

    pub async fn version(&self) -> anyhow::Result<String> {
        let session = Session::open(&self.postgres.config()).await?;
        Ok(session.client.query_one("show server_version", &[]).await?.try_get(0)?)
    }

    /// Makes a database with so many users, in the state in which one is found that
    /// has been there for a while: with statistics, vacuumed, and written to disk.
    pub async fn create_database(&self, users: u64) -> anyhow::Result<Database> {
        let name = format!("users_{users}");
        self.administer(&format!("create database {name}")).await?;
        let mut config = self.postgres.config();
        config.dbname(&name);
        db::migrate(&config).await?;
        let session = Session::open(&config).await?;
        session.client.batch_execute(&load(users)).await?;
        for maintenance in ["vacuum analyze users", "checkpoint"] {
            session.client.batch_execute(maintenance).await?;
        }
        let deep_page = if users == 0 { String::new() } else { session.deep_page(users / 2).await? };
        Ok(Database { name, users, deep_page, socket_dir: self.dir.path().to_owned() })
    }

    /// A connection to a database, beside those of the service.
    pub async fn connect(&self, database: &Database) -> anyhow::Result<Session> {
        Session::open(self.postgres.config().dbname(&database.name)).await
    }

    /// Drops a database, and ends who is still connected.
    pub async fn drop_database(&self, database: &Database) -> anyhow::Result<()> {
        self.administer(&format!("drop database {} (force)", database.name)).await
    }

    async fn administer(&self, sql: &str) -> anyhow::Result<()> {
        Ok(Session::open(&self.postgres.config()).await?.client.batch_execute(sql).await?)
    }
}

impl Database {
    pub fn url(&self) -> String {
        format!("host={} user=postgres dbname={}", self.socket_dir.display(), self.name)
    }
}

fn memory_mib() -> anyhow::Result<i64> {
    let known = |variable| sysconf(variable)?.context("the system does not tell its memory");
    Ok(known(SysconfVar::_PHYS_PAGES)? * known(SysconfVar::PAGE_SIZE)? / (1024 * 1024))
}

/// Users of three years, the higher their number the newer, as with ids that the
/// service makes.
fn load(users: u64) -> String {
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

/// A connection to PostgreSQL beside those of the service.
pub struct Session {
    pub client: Client,
    _driver: JoinSet<Result<(), tokio_postgres::Error>>,
}

impl Session {
    async fn open(config: &tokio_postgres::Config) -> anyhow::Result<Self> {
        let (client, connection) = config.connect(NoTls).await?;
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        Ok(Self { client, _driver: driver })
    }

    /// The page token that the service would give after the page that ends with
    /// user `n`; to get it from there takes as many pages as lie before.
    async fn deep_page(&self, n: u64) -> anyhow::Result<String> {
        let sql =
            format!("select create_time, id from users where id = ('{ID_PREFIX}' || {})::uuid", ID_BASE + n);
        let row = self.client.query_one(&sql, &[]).await?;
        let (time, id): (SystemTime, Uuid) = (row.try_get(0)?, row.try_get(1)?);
        let Ok(list) = Page::parse(&pb::ListUsersRequest::default()) else { bail!("no list") };
        Ok(list.token_after(&Position { key: Key::Time(time), id }))
    }
}

//! The private PostgreSQL that is used when `DATABASE_URL` is unset: the server binaries of this
//! machine, data in one directory, a socket in it.
//!
//! PostgreSQL does not run as root, so root runs it as another user. It has a process group of
//! its own, so that Ctrl-C reaches only the service, which stops PostgreSQL last. If the service
//! is killed, PostgreSQL keeps running, and the next start takes it over.

use std::{
    ffi::OsStr,
    fs,
    io::ErrorKind,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, bail};
use nix::unistd::{User, geteuid};
use tokio::process::Command;

/// The users as which root runs PostgreSQL: the first that exists.
const USERS: [&str; 2] = ["postgres", "nobody"];

/// Where server binaries are when they are not on the `PATH`, in a folder for each version.
const BIN_DIRS: [(&str, &str); 4] = [
    ("/usr/lib/postgresql", "bin"),
    ("/usr/local/lib/postgresql", "bin"),
    ("/opt/homebrew/opt", "bin"),
    ("/usr/local/opt", "bin"),
];

/// The port, which names the socket. It is fixed, so that `PGPORT` does not change it.
const PORT: u16 = 5432;

/// The oldest supported version.
const MIN_MAJOR: u32 = 14;

/// The configuration, written at each start. Only users that can enter the directory can
/// connect. The log is terse, because the details of an error repeat values.
fn settings(socket_dir: &Path) -> String {
    let socket_dir = socket_dir.to_string_lossy().replace('\'', "''");
    format!(
        "# Written at every start by user-service.
listen_addresses = ''
port = {PORT}
unix_socket_directories = '{socket_dir}'
unix_socket_permissions = 0700
max_connections = 300
log_error_verbosity = terse
log_timezone = UTC
"
    )
}

/// A running private PostgreSQL.
#[derive(Debug)]
pub struct Embedded {
    dir: PathBuf,
    bin_dir: PathBuf,
    user: Option<User>,
    /// Says, by being locked, that this directory is in use; freed by the system
    /// when the process ends, however it ends.
    _lock: fs::File,
}

impl Embedded {
    /// Starts PostgreSQL on a directory, which is made if there is none.
    pub async fn start(dir: &Path) -> anyhow::Result<Self> {
        let user = if geteuid().is_root() { Some(unprivileged_user()?) } else { None };
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        // Its owner and permissions are about to change.
        let is_ours = dir.join("lock").exists() || dir.join("data").exists();
        if !is_ours && fs::read_dir(&dir)?.next().is_some() {
            bail!(
                "{} has other things in it: set DATA_DIR to a directory for PostgreSQL alone",
                dir.display()
            );
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
        let lock = fs::File::create(dir.join("lock"))?;
        if lock.try_lock().is_err() {
            bail!("{} is in use by another user-service: stop it, or set DATA_DIR", dir.display());
        }
        if let Some(user) = &user {
            chown(&dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        }
        let version = fs::read_to_string(dir.join("data/PG_VERSION")).ok();
        let bin_dir = find_binaries(version.as_deref().map(str::trim)).await?;
        let postgres = Self { dir, bin_dir, user, _lock: lock };
        if version.is_none() {
            postgres.init().await?;
        }
        postgres.stop().await.ok();
        fs::write(postgres.dir.join("data/postgresql.conf"), settings(&postgres.dir))?;
        let log = postgres.dir.join("postgresql.log");
        postgres
            .run("pg_ctl", ["start".as_ref(), "--wait".as_ref(), "--log".as_ref(), log.as_os_str()])
            .await
            .with_context(|| format!("PostgreSQL does not start; see {}", log.display()))?;
        tracing::info!(data_dir = %postgres.dir.display(), "private PostgreSQL started");
        Ok(postgres)
    }

    /// Makes the data directory, under another name until it is whole.
    async fn init(&self) -> anyhow::Result<()> {
        let (new, data) = (self.dir.join("data.new"), self.dir.join("data"));
        match fs::remove_dir_all(&new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--pgdata"];
        self.run("initdb", options.iter().map(OsStr::new).chain([new.as_os_str()]))
            .await
            .context("cannot create the private PostgreSQL's data directory")?;
        fs::rename(new, data)?;
        Ok(())
    }

    /// Stops PostgreSQL; sessions that are still open are ended.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.run("pg_ctl", ["stop", "--wait", "--mode=fast"].map(OsStr::new)).await
    }

    /// How to connect to it.
    pub fn config(&self) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.dir).port(PORT).user("postgres").dbname("postgres");
        config
    }

    /// Runs one of PostgreSQL's programs, as the user that owns the data.
    async fn run<'a>(&self, program: &str, args: impl IntoIterator<Item = &'a OsStr>) -> anyhow::Result<()> {
        let mut command = Command::new(self.bin_dir.join(program));
        // Nothing of ours is meant for it, and it may not enter where we are.
        command.args(args).env("PGDATA", self.dir.join("data")).current_dir("/").stdin(Stdio::null());
        // pg_ctl leaves the server behind, which would keep a pipe open.
        let output = self.dir.join("output");
        command.stdout(fs::File::create(&output)?).stderr(fs::File::options().append(true).open(&output)?);
        command.process_group(0);
        if let Some(user) = &self.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        let status = command.status().await.with_context(|| format!("cannot run {program}"))?;
        if !status.success() {
            let user = self.user.as_ref().map_or("this user", |user| user.name.as_str());
            bail!("{program} failed as {user}: {}", fs::read_to_string(output)?.trim());
        }
        Ok(())
    }
}

fn unprivileged_user() -> anyhow::Result<User> {
    for name in USERS {
        if let Some(user) = User::from_name(name)? {
            return Ok(user);
        }
    }
    bail!("PostgreSQL does not run as root, and there is no other user to run it as ({})", USERS.join(", "))
}

/// Finds the directory of the server binaries: of this major version, since
/// another one cannot read the data, or of the newest.
async fn find_binaries(version: Option<&str>) -> anyhow::Result<PathBuf> {
    // No directory at all means: wherever the PATH says.
    let mut candidates = vec![PathBuf::new()];
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output().await {
        candidates.push(String::from_utf8_lossy(&output.stdout).trim().into());
    }
    for (parent, bin) in BIN_DIRS {
        candidates.extend(fs::read_dir(parent).into_iter().flatten().flatten().map(|e| e.path().join(bin)));
    }
    let mut newest: Option<(u32, PathBuf)> = None;
    for dir in candidates {
        // Client packages have some of the programs, but not this one.
        let Ok(output) = Command::new(dir.join("initdb")).arg("--version").output().await else { continue };
        let Some(major) = major_version(&String::from_utf8_lossy(&output.stdout)) else { continue };
        let is_wanted = version.map_or(major >= MIN_MAJOR, |version| version == major.to_string());
        if is_wanted && newest.as_ref().is_none_or(|(best, _)| major > *best) {
            newest = Some((major, dir));
        }
    }
    let version = version.map_or_else(|| format!("{MIN_MAJOR} or later"), str::to_owned);
    newest.map(|(_, dir)| dir).with_context(|| {
        format!(
            "no server binaries of PostgreSQL {version} on this machine: install them \
             (Debian: apt-get install postgresql; macOS: brew install postgresql), \
             or set DATABASE_URL to a PostgreSQL that runs elsewhere"
        )
    })
}

/// 15 of `initdb (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
fn major_version(text: &str) -> Option<u32> {
    let number = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

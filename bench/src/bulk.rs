//! Imports and exports beside PostgreSQL's `COPY` of the same rows, and a watcher that
//! catches up.

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use futures_util::stream;
use user_service::pb;

use crate::{
    plan::Plan,
    postgres::{Database, Postgres},
    requests::user_id,
    results::{Figure, Results},
    service::Service,
    usage::{memory, peak_memory},
};

/// Users in a chunk of an import, the most that the service accepts.
const CHUNK: u64 = 1000;

pub const IMPORT: Figure = Figure("`ImportUsers`", "users/s");
pub const COPY_IN: Figure = Figure("`psql \\copy`", "users/s");
pub const EXPORT: Figure = Figure("`ExportUsers`", "users/s");
pub const COPY_OUT: Figure = Figure("`COPY` to stdout", "users/s");
pub const IMPORT_MEMORY: Figure = Figure("growth of resident memory, import", "MiB");
pub const EXPORT_MEMORY: Figure = Figure("growth of resident memory, export", "MiB");
/// A watcher that was away while all users were imported, and an export of these users.
pub const CATCH_UP: Figure = Figure("catching up, one change per user", "users/s");
pub const EXPORT_OF_IMPORTED: Figure = Figure("`ExportUsers` of the same users", "users/s");

/// Imports into empty databases, and exports `database`.
pub async fn run(plan: &Plan, postgres: &Postgres, database: &Database, results: &mut Results) -> Result<()> {
    let users = plan.users / 5;
    let rows = postgres.dir.path().join("rows.copy");
    fs::write(&rows, copy_rows(users)?)?;
    for repetition in 1..=plan.repetitions {
        eprintln!("import and export, repetition {repetition}");
        let empty = postgres.create_database(&plan.service, "imported", 0).await?;
        let service = Service::start(&plan.service, &empty, true).await?;
        results.push_figure(IMPORT, import(&service, users).await?);
        service.stop().await?;
        postgres.drop_database(empty).await?;
        let empty = postgres.create_database(&plan.service, "copied", 0).await?;
        results.push_figure(COPY_IN, users as f64 / copy_in(postgres, &empty, &rows).await?.as_secs_f64());
        postgres.drop_database(empty).await?;
        let (exported, rate, _) = export(plan, database).await?;
        results.push_figure(EXPORT, rate);
        // The copy reads what the export has read: the loaded users and those created since.
        let took = copy_out(postgres, database).await?.as_secs_f64();
        results.push_figure(COPY_OUT, exported as f64 / took);
    }
    eprintln!("a large import and export, and a watcher that catches up");
    results.push_figure(EXPORT_MEMORY, export(plan, database).await?.2);
    let empty = postgres.create_database(&plan.service, "imported", 0).await?;
    let service = Service::start(&plan.service, &empty, true).await?;
    let at_rest = memory(service.server.pid)?;
    let bookmark = watch(&service, String::new()).await?.message().await?.context("no bookmark")?;
    import(&service, plan.users).await?;
    results.push_figure(IMPORT_MEMORY, peak_memory(service.server.pid)? - at_rest);
    for _ in 1..=plan.repetitions {
        results.push_figure(CATCH_UP, catch_up(&service, &bookmark.resume_token, plan.users).await?);
        results.push_figure(EXPORT_OF_IMPORTED, export(plan, &empty).await?.1);
    }
    service.stop().await?;
    postgres.drop_database(empty).await
}

/// Imports users and returns the number per second.
async fn import(service: &Service, users: u64) -> Result<f64> {
    let mut client = service.client().await?;
    let import_id = user_id(users);
    let chunks = (0..users.div_ceil(CHUNK)).map(move |chunk| pb::ImportUsersRequest {
        import_id: import_id.clone(),
        chunk: 1 + chunk as i64,
        mode: pb::ImportMode::CreateOnly.into(),
        users: (chunk * CHUNK..users.min((chunk + 1) * CHUNK)).map(user).collect(),
    });
    let start = Instant::now();
    let mut acks = client.import_users(stream::iter(chunks)).await?.into_inner();
    let mut created = 0;
    while let Some(ack) = acks.message().await? {
        created += u64::try_from(ack.created)?;
    }
    ensure!(created == users, "{created} of {users} users were imported");
    Ok(users as f64 / start.elapsed().as_secs_f64())
}

async fn watch(service: &Service, resume_token: String) -> Result<tonic::Streaming<pb::WatchUsersResponse>> {
    let request = pb::WatchUsersRequest { resume_token, ..Default::default() };
    Ok(service.client().await?.watch_users(request).await?.into_inner())
}

/// Watches from a token until so many changes have come, and returns changes per second.
async fn catch_up(service: &Service, token: &str, changes: u64) -> Result<f64> {
    let start = Instant::now();
    let mut messages = watch(service, token.to_owned()).await?;
    let mut count = 0;
    while count < changes {
        count += messages.message().await?.context("the watch ended")?.changes.len() as u64;
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

/// Exports all users. Returns their number, the number per second, and the growth of the
/// service's resident memory in MiB.
async fn export(plan: &Plan, database: &Database) -> Result<(u64, f64, f64)> {
    let service = Service::start(&plan.service, database, true).await?;
    let at_rest = memory(service.server.pid)?;
    let mut client = service.client().await?;
    let start = Instant::now();
    let mut messages = client.export_users(pb::ExportUsersRequest::default()).await?.into_inner();
    let mut users = 0;
    while let Some(message) = messages.message().await? {
        users += message.users.len() as u64;
    }
    let rate = users as f64 / start.elapsed().as_secs_f64();
    ensure!(users >= database.users, "only {users} users were exported");
    let growth = peak_memory(service.server.pid)? - at_rest;
    service.stop().await?;
    Ok((users, rate, growth))
}

/// An imported user.
fn user(n: u64) -> pb::User {
    let username = username(n);
    pb::User {
        id: user_id(n),
        email: format!("{username}@example.com"),
        display_name: format!("User {username}"),
        username,
        ..Default::default()
    }
}

/// A username whose order differs from that of the ids. The factor is odd, so no two
/// numbers have the same username.
fn username(n: u64) -> String {
    format!("user{:010}", (n as u32).wrapping_mul(2_654_435_761))
}

/// The imported users as `COPY` reads them.
fn copy_rows(users: u64) -> Result<String> {
    let mut rows = String::new();
    for n in 0..users {
        let (id, name) = (user_id(n), username(n));
        let email = format!("{name}@example.com");
        writeln!(rows, "{id}\t{name}\t{name}\tt\t{email}\t{email}\tUser {name}\t1\tnow\tnow")?;
    }
    Ok(rows)
}

async fn copy_in(postgres: &Postgres, database: &Database, rows: &Path) -> Result<Duration> {
    let copy = format!(
        "\\copy users (id, username, username_key, username_held, email, email_key, display_name, \
         revision, create_time, update_time) from '{}'",
        rows.display()
    );
    // An import writes the change log too, so the copy has to.
    let log = "insert into user_changes (user_id, revision, kind) select id, 1, 1 from users";
    psql(postgres, database, &["begin", &copy, log, "commit"]).await
}

async fn copy_out(postgres: &Postgres, database: &Database) -> Result<Duration> {
    let columns =
        "id, username, email, display_name, create_time, update_time, delete_time, purge_time, revision";
    let select = format!("select {columns} from users where delete_time is null");
    psql(postgres, database, &[&format!("copy ({select}) to stdout (format binary)")]).await
}

/// Runs commands in one session of psql and returns the time they took.
async fn psql(postgres: &Postgres, database: &Database, commands: &[&str]) -> Result<Duration> {
    let mut psql = postgres.program("psql")?;
    psql.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"]).arg(&database.url);
    for command in commands {
        psql.args(["--command", command]);
    }
    let start = Instant::now();
    let output = psql.stdout(Stdio::null()).output().await.context("cannot run psql")?;
    if !output.status.success() {
        bail!("psql failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(start.elapsed())
}

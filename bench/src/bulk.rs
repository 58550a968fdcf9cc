//! Many users at a time: imports and exports, beside PostgreSQL's own `COPY` of the
//! same rows.

use std::{
    fmt::Write as _,
    fs,
    ops::Range,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use futures_util::stream;
use tokio::process::Command;
use tonic::transport::Channel;
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::{
    calls::user_id,
    cluster::{Cluster, Database},
    run::Plan,
    service::Service,
    usage::Memory,
};

/// Users in a chunk of an import, as many as there may be.
const CHUNK: u64 = 1000;
/// Of the table's columns, those that an import fills.
const COLUMNS: &str = "id, username, username_key, username_held, email, email_key, display_name,
    revision, create_time, update_time";
/// What an export selects.
const EXPORTED: &str =
    "id, username, email, display_name, create_time, update_time, delete_time, purge_time, revision";

/// Users a second, one figure a repetition, and what it took.
#[derive(Debug, Default)]
pub struct Bulk {
    pub import: Vec<f64>,
    pub copy_in: Vec<f64>,
    pub export: Vec<f64>,
    pub copy_out: Vec<f64>,
    /// Changes a second that a watch gets that was away while all users were imported,
    /// and users a second of an export of the same.
    pub caught_up: Vec<f64>,
    pub exported_beside: Vec<f64>,
    /// By how many MiB the service grew.
    pub import_growth: f64,
    pub export_growth: f64,
}

/// Takes turns; `database` is the one to export.
pub async fn run(plan: &Plan, cluster: &Cluster, database: &Database) -> anyhow::Result<Bulk> {
    let mut bulk = Bulk::default();
    let few = plan.users / 5;
    let rows = cluster.dir.path().join("rows.copy");
    fs::write(&rows, copied_rows(few)?)?;
    for repetition in 1..=plan.repetitions {
        eprintln!("import and export, repetition {repetition}");
        let empty = cluster.create_database(0).await?;
        let service = Service::start(&plan.service, &empty, "on").await?;
        bulk.import.push(import(&service, few).await?);
        service.stop().await?;
        cluster.drop_database(&empty).await?;
        let empty = cluster.create_database(0).await?;
        // The change log is the price of the feed, which a copy has to pay as well.
        let copy = format!("\\copy users ({}) from '{}'", COLUMNS.replace('\n', " "), rows.display());
        let log = "insert into user_changes (user_id, revision, kind) select id, 1, 1 from users";
        let took = psql(cluster, &empty, &["begin", &copy, log, "commit"]).await?;
        bulk.copy_in.push(few as f64 / took.as_secs_f64());
        cluster.drop_database(&empty).await?;

        let exported = export(plan, database).await?;
        bulk.export.push(exported.rate);
        let copy = format!(
            "copy (select {EXPORTED} from users where delete_time is null) to stdout (format binary)"
        );
        let took = psql(cluster, database, &[&copy]).await?;
        // More than there were at first: others were created in between.
        bulk.copy_out.push(exported.users as f64 / took.as_secs_f64());
    }
    eprintln!("a large import and export, and a watch that catches up");
    bulk.export_growth = export(plan, database).await?.growth;
    let empty = cluster.create_database(0).await?;
    let service = Service::start(&plan.service, &empty, "on").await?;
    let at_rest = Memory::of(service.pid)?.now;
    let beginning = watch(&service, String::new()).await?.message().await?.context("no bookmark")?;
    import(&service, plan.users).await?;
    bulk.import_growth = Memory::of(service.pid)?.peak - at_rest;
    for _ in 1..=plan.repetitions {
        bulk.caught_up.push(catch_up(&service, &beginning.resume_token, plan.users).await?);
        bulk.exported_beside.push(export(plan, &empty).await?.rate);
    }
    service.stop().await?;
    cluster.drop_database(&empty).await?;
    Ok(bulk)
}

/// Imports users, and says how many a second.
async fn import(service: &Service, users: u64) -> anyhow::Result<f64> {
    let mut client = connect(service).await?;
    let import_id = user_id(users);
    let chunks = (0..users.div_ceil(CHUNK)).map(move |chunk| pb::ImportUsersRequest {
        import_id: import_id.clone(),
        chunk: 1 + chunk as i64,
        mode: pb::ImportMode::CreateOnly.into(),
        users: of_chunk(chunk * CHUNK..users.min((chunk + 1) * CHUNK)),
    });
    let started = Instant::now();
    let mut acks = client.import_users(stream::iter(chunks)).await?.into_inner();
    let mut created = 0;
    while let Some(ack) = acks.message().await? {
        created += u64::try_from(ack.created)?;
    }
    ensure!(created == users, "{created} of {users} users were imported");
    Ok(users as f64 / started.elapsed().as_secs_f64())
}

async fn watch(
    service: &Service,
    resume_token: String,
) -> anyhow::Result<tonic::Streaming<pb::WatchUsersResponse>> {
    let request = pb::WatchUsersRequest { resume_token, ..Default::default() };
    Ok(connect(service).await?.watch_users(request).await?.into_inner())
}

/// Watches from a token on until so many changes have come: changes a second.
async fn catch_up(service: &Service, token: &str, changes: u64) -> anyhow::Result<f64> {
    let started = Instant::now();
    let mut messages = watch(service, token.to_owned()).await?;
    let mut count = 0;
    while count < changes {
        count += messages.message().await?.context("the watch ended")?.changes.len() as u64;
    }
    Ok(count as f64 / started.elapsed().as_secs_f64())
}

/// An export of all users.
struct Exported {
    users: u64,
    /// Users a second.
    rate: f64,
    /// By how many MiB the service grew.
    growth: f64,
}

async fn export(plan: &Plan, database: &Database) -> anyhow::Result<Exported> {
    let service = Service::start(&plan.service, database, "on").await?;
    let at_rest = Memory::of(service.pid)?.now;
    let mut client = connect(&service).await?;
    let started = Instant::now();
    let mut parts = client.export_users(pb::ExportUsersRequest::default()).await?.into_inner();
    let mut users = 0;
    while let Some(part) = parts.message().await? {
        users += part.users.len() as u64;
    }
    let rate = users as f64 / started.elapsed().as_secs_f64();
    ensure!(users >= database.users, "only {users} users were exported");
    let growth = Memory::of(service.pid)?.peak - at_rest;
    service.stop().await?;
    Ok(Exported { users, rate, growth })
}

pub async fn connect(service: &Service) -> anyhow::Result<UserServiceClient<Channel>> {
    Ok(UserServiceClient::connect(format!("http://{}", service.addr)).await?)
}

fn of_chunk(numbers: Range<u64>) -> Vec<pb::User> {
    let user = |n| {
        let name = name(n);
        pb::User {
            id: user_id(n),
            email: format!("{name}@example.com"),
            display_name: format!("User {name}"),
            username: name,
            ..Default::default()
        }
    };
    numbers.map(user).collect()
}

/// The username of the user with this number. Their order is another one than that of
/// the numbers, and no two have the same: the factor is odd.
fn name(n: u64) -> String {
    format!("user{:010}", (n as u32).wrapping_mul(2_654_435_761))
}

/// The same users, as `COPY` reads them.
fn copied_rows(users: u64) -> anyhow::Result<String> {
    let mut rows = String::new();
    for n in 0..users {
        let (id, name) = (user_id(n), name(n));
        let email = format!("{name}@example.com");
        writeln!(rows, "{id}\t{name}\t{name}\tt\t{email}\t{email}\tUser {name}\t1\tnow\tnow")?;
    }
    Ok(rows)
}

/// Runs commands in one session of psql, and says how long that took.
async fn psql(cluster: &Cluster, database: &Database, commands: &[&str]) -> anyhow::Result<Duration> {
    let mut psql = Command::new(cluster.bin_dir()?.join("psql"));
    psql.args(["--no-psqlrc", "--quiet", "--username=postgres", "--set=ON_ERROR_STOP=1", "--host"])
        .arg(&database.socket_dir)
        .arg(&database.name);
    for command in commands {
        psql.args(["--command", command]);
    }
    psql.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0).kill_on_drop(true);
    let started = Instant::now();
    let output = psql.output().await.context("cannot run psql")?;
    if !output.status.success() {
        bail!("psql failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(started.elapsed())
}

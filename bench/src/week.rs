//! Two weeks of writes with compressed time: whether the tables that rows leave again stay
//! small, and writes as fast as at first.

use std::{convert::Infallible, time::Duration};

use anyhow::Result;
use tokio::time;
use tokio_postgres::Client;

use crate::{
    format::{amount, table},
    generator::Load,
    plan::Plan,
    postgres::{Database, Postgres, connect},
    requests::Work,
    server::{command, serve},
    service::Service,
};

/// Request ids are kept for a day and changes for seven, so all sizes are final on the ninth.
const DAYS: usize = 14;
/// Writes per second, in real time.
const RATE: f64 = 1000.0;
const IN_FLIGHT: usize = 32;
const USERS_MAX: u64 = 100_000;
/// The clock is moved so many times a day.
const STEPS: u32 = 24;

/// Measures, and returns the report. A day takes five times the duration of a measurement.
pub async fn run(plan: &Plan, postgres: &Postgres) -> Result<String> {
    let day = plan.duration * 5;
    let users = plan.users.min(USERS_MAX);
    let database = postgres.create_database(&plan.service, "week", users).await?;
    let client = connect(&database.url, "").await?;
    compress_time(&client, day).await?;
    let service = start(plan, &database).await?;
    let mut rows = Vec::new();
    for number in 1..=DAYS {
        eprintln!("day {number}");
        let load = Load { rate: Some(RATE), warm_up: Duration::ZERO, duration: day };
        let cell = tokio::select! {
            cell = service.measure(Work::Update, IN_FLIGHT, load) => cell?,
            Err(error) = move_clock(&client, day) => return Err(error),
        };
        let sizes = "select
            sum(pg_total_relation_size(inhrelid)) filter (where inhparent = 'user_changes'::regclass)::float8,
            pg_total_relation_size('requests')::float8,
            (select count(*) from user_changes)::float8,
            (select count(*) from requests)::float8
            from pg_inherits";
        let sizes = client.query_one(sizes, &[]).await?;
        let mebibytes = |column| Ok::<_, tokio_postgres::Error>(sizes.try_get::<_, f64>(column)? / 1048576.0);
        rows.push(vec![
            number.to_string(),
            format!("{:.0}", cell.rate),
            format!("{:.2}", cell.median),
            format!("{:.1}", cell.p99),
            format!("{:.0}", cell.cpu()),
            format!("{:.0}", sizes.try_get::<_, f64>(2)?),
            format!("{:.1}", mebibytes(0)?),
            format!("{:.0}", sizes.try_get::<_, f64>(3)?),
            format!("{:.1}", mebibytes(1)?),
        ]);
    }
    service.stop().await?;
    drop(client);
    postgres.drop_database(database).await?;
    let columns = [
        "day",
        "updates/s",
        "median, ms",
        "p99, ms",
        "CPU, µs/update",
        "changes",
        "MiB",
        "request ids",
        "MiB",
    ];
    Ok(format!(
        "# Two weeks of writes\n\nMade by `make bench-week`: {RATE} updates per second, each with a request id, on \
         {} users, {IN_FLIGHT} in flight. A day is {} s, so that rows expire {} times sooner than with the \
         default settings. Latencies are those of the whole day, purge and vacuum included.\n\n{}",
        amount(users),
        day.as_secs_f64(),
        86400.0 / day.as_secs_f64(),
        table(&columns, rows)
    ))
}

/// The service runs in real time, so a day of retention has to pass sooner: for request ids when
/// they are written, for changes with each step.
async fn compress_time(client: &Client, day: Duration) -> Result<()> {
    let compress = format!(
        "create function expire_sooner() returns trigger language plpgsql as $$
        begin
            new.expire_time = now() + interval '{} ms';
            return new;
        end
        $$;
        create trigger expire_sooner before insert on requests for each row execute function expire_sooner();
        alter table requests set (autovacuum_vacuum_threshold = 1000)",
        day.as_millis()
    );
    client.batch_execute(&compress).await?;
    // Autovacuum looks once a minute by default, which would be every six days.
    client.batch_execute("alter system set autovacuum_naptime = '1s'").await?;
    client.batch_execute("select pg_reload_conf()").await?;
    Ok(())
}

async fn start(plan: &Plan, database: &Database) -> Result<Service> {
    let mut command = command(&plan.service);
    command.envs([("DATABASE_URL", database.url.as_str()), ("PURGE_INTERVAL_MS", "250")]);
    let server = serve(&mut command).await?;
    Ok(Service { database: database.clone(), server, start: Duration::ZERO })
}

/// Lets the change log age; returns only on failure.
async fn move_clock(client: &Client, day: Duration) -> Result<Infallible> {
    let step =
        format!("update user_changes_partitions set begin_time = begin_time - interval '1 day' / {STEPS}");
    loop {
        time::sleep(day / STEPS).await;
        client.batch_execute(&step).await?;
    }
}

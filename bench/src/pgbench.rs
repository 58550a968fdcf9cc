//! PostgreSQL's own benchmark, with the service's own statements.

use std::{
    fs,
    process::Stdio,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use tokio::{process::Command, time};
use user_service::users::STATEMENTS;

use crate::{
    calls::{ID_BASE, ID_PREFIX, NEW_NAMES, Work},
    cluster::{Cluster, Database},
    results::Cell,
    usage::Meter,
};

/// As in the service's sessions.
const OPTIONS: &str =
    "-c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c enable_bitmapscan=off -c jit=off";

/// Each client's new users get ids in a row, as those that the service makes. They
/// begin with the time, in microseconds, and clients are some months apart.
const IDS_PER_CLIENT: u64 = 10_000_000_000_000;

/// Before anything counts: new sessions have cold caches, and those of the service do not.
const WARM_UP_S: u64 = 1;

/// Runs the statement of a call, in so many sessions at once.
pub async fn run(
    cluster: &Cluster,
    database: &Database,
    work: Work,
    clients: usize,
    duration: Duration,
) -> anyhow::Result<Cell> {
    let script = cluster.dir.path().join("pgbench.sql");
    fs::write(&script, script_of(work, database.users)?)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let meter = Meter { service: None, postmaster: cluster.postmaster };
    let before = meter.read()?;
    let mut command = Command::new(cluster.bin_dir()?.join("pgbench"));
    command
        .args(["--no-vacuum", "--protocol=prepared", "--jobs=2", "--username=postgres"])
        // Each second is reported by the next one.
        .args(["--progress=1".to_owned(), format!("--time={}", WARM_UP_S + duration.as_secs().max(1) + 1)])
        .arg(format!("--client={clients}"))
        .arg(format!("--define=next={}", now.as_micros()))
        .arg("--file")
        .arg(&script)
        .arg("--host")
        .arg(&database.socket_dir)
        .arg(&database.name)
        .env("PGOPTIONS", OPTIONS)
        .stdin(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    let output = command.output().await.context("cannot run pgbench")?;
    if !output.status.success() {
        bail!("pgbench failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    // Sessions take a moment to end, and then count with the first process.
    time::sleep(Duration::from_millis(100)).await;
    let used = meter.read()? - before;
    let report = String::from_utf8(output.stdout)?;
    let number = |name: &str| {
        let rest = report.lines().find_map(|line| line.strip_prefix(name));
        let number = rest.and_then(|rest| rest.split([' ', '/']).next()).and_then(|n| n.parse().ok());
        number.with_context(|| format!("no `{name}` in what pgbench says: {report}"))
    };
    if number("number of failed transactions: ")? != 0.0 {
        bail!("statements of pgbench failed: {report}");
    }
    let count = number("number of transactions actually processed: ")?;
    Ok(Cell::without_latencies(rate(&String::from_utf8(output.stderr)?)?, count, used))
}

/// Transactions a second after the warm-up, from what pgbench says as it goes.
fn rate(progress: &str) -> anyhow::Result<f64> {
    let rates = progress.lines().filter_map(|line| {
        let (_, rate) = line.strip_prefix("progress: ")?.split_once(" s, ")?;
        rate.split(' ').next()?.parse::<f64>().ok()
    });
    let rates: Vec<f64> = rates.skip(WARM_UP_S as usize).collect();
    if rates.is_empty() {
        bail!("no rate in what pgbench says: {progress}");
    }
    Ok(rates.iter().sum::<f64>() / rates.len() as f64)
}

/// The service's statement with pgbench's variables for its parameters.
fn script_of(work: Work, users: u64) -> anyhow::Result<String> {
    let existing_id = format!("\\set id random({}, {})", ID_BASE + 1, ID_BASE + users);
    let new_id = format!("\\set next :next + 1\n\\set id :next + :client_id * {IDS_PER_CLIENT}");
    let [name, request] = ["name", "request"]
        .map(|variable| format!("\\set {variable} random({}, {})", NEW_NAMES.start, NEW_NAMES.end - 1));
    let [id, request_id] =
        ["id", "request"].map(|variable| format!("('{ID_PREFIX}' || :{variable}::text)::uuid"));
    let [fingerprint, salt] = [32, 16].map(|octets| format!("'\\x{}'::bytea", "5a".repeat(octets)));
    let username = "('user' || :name::text)";
    let email = "('user' || :name::text || '@example.com')";
    let display_name = "('User ' || :name::text)";
    let unchanged = "null::text";
    let (variables, part, parameters) = match work {
        Work::GetById => (vec![existing_id], "from users where id = $1", vec![id.as_str()]),
        Work::Create => (
            vec![new_id, name, request],
            "select $3, $4, $5, true, $6, $7, $8",
            vec![&request_id, &fingerprint, &id, username, username, email, email, display_name, &salt],
        ),
        Work::Update => (
            vec![existing_id, name, request],
            "display_name = coalesce($9, u.display_name)",
            vec![
                &request_id,
                &fingerprint,
                &id,
                "0",
                unchanged,
                unchanged,
                unchanged,
                unchanged,
                display_name,
            ],
        ),
        _ => bail!("pgbench does not do {}", work.name()),
    };
    let mut found = STATEMENTS.iter().filter(|sql| sql.contains(part));
    let (Some(sql), None) = (found.next(), found.next()) else { bail!("not one statement has `{part}`") };
    let mut sql = (*sql).to_owned();
    // The last one first: `$1` is the beginning of `$10`.
    for (index, value) in parameters.iter().enumerate().rev() {
        sql = sql.replace(&format!("${}", index + 1), value);
    }
    if sql.contains('$') {
        bail!("not all parameters have a value: {sql}");
    }
    Ok(format!("{}\n{sql};\n", variables.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_second_of_pgbench_does_not_count() {
        let progress = "pgbench (15.18)
progress: 1.0 s, 100.0 tps, lat 0.320 ms stddev 0.271, 0 failed
progress: 2.0 s, 300.0 tps, lat 0.320 ms stddev 0.271, 0 failed
progress: 3.0 s, 500.5 tps, lat 0.320 ms stddev 0.271, 0 failed";
        assert_eq!(rate(progress).unwrap(), 400.25);
        assert!(rate("pgbench (15.18)").is_err());
    }

    #[test]
    fn the_statements_of_the_service_are_found_and_filled_in() {
        for work in [Work::GetById, Work::Create, Work::Update] {
            assert!(script_of(work, 1_000).unwrap().ends_with(";\n"));
        }
    }
}

//! PostgreSQL's own benchmark program with the service's statements.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};
use tokio::time;

use crate::{
    postgres::{Database, Postgres},
    requests::{ID_BASE, ID_PREFIX, NEW_NAMES, Work},
    results::Cell,
    statements::{self, SESSION_OPTIONS},
    usage::Meter,
};

/// New users get ascending ids, as those of the service are. Ids begin with the time in
/// microseconds; the sessions are some months apart.
const IDS_PER_SESSION: u64 = 10_000_000_000_000;
/// New sessions have cold caches, which those of the service do not have.
const WARM_UP_SECONDS: u64 = 1;

/// Runs the statement of a call in so many sessions.
pub async fn run(
    postgres: &Postgres,
    database: &Database,
    work: Work,
    sessions: usize,
    duration: Duration,
) -> Result<Cell> {
    let script = postgres.dir.path().join("pgbench.sql");
    fs::write(&script, script_of(work, database.users)?)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_micros();
    let meter = Meter { service: None, postmaster: postgres.postmaster };
    let before = meter.read()?;
    let mut command = postgres.program("pgbench")?;
    command.args(["--no-vacuum", "--protocol=prepared", "--jobs=2", "--username=postgres", "--progress=1"]);
    // The progress of a second is reported in the next one.
    command.arg(format!("--time={}", WARM_UP_SECONDS + duration.as_secs().max(1) + 1));
    command.arg(format!("--client={sessions}")).arg(format!("--define=next={now}"));
    command.arg("--host").arg(postgres.dir.path()).arg("--file").arg(&script).arg(&database.name);
    let output = command.env("PGOPTIONS", SESSION_OPTIONS).output().await.context("cannot run pgbench")?;
    let (report, progress) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    if !output.status.success() {
        bail!("pgbench failed: {progress}");
    }
    // The CPU time of a session counts with the postmaster after the session has ended.
    time::sleep(Duration::from_millis(100)).await;
    let used = meter.since(before)?;
    let number = |name: &str| {
        let rest = report.lines().find_map(|line| line.strip_prefix(name));
        let number = rest.and_then(|rest| rest.split([' ', '/']).next()).and_then(|n| n.parse().ok());
        number.with_context(|| format!("no `{name}` in the output of pgbench: {report}"))
    };
    if number("number of failed transactions: ")? != 0.0 {
        bail!("statements of pgbench failed: {report}");
    }
    let count = number("number of transactions actually processed: ")?;
    Ok(Cell::new(count, rate(&progress)?, [f64::NAN; 2], used))
}

/// Transactions per second after the warm-up, from pgbench's progress messages.
fn rate(progress: &str) -> Result<f64> {
    let rates = progress.lines().filter_map(|line| {
        let (_, rate) = line.strip_prefix("progress: ")?.split_once(" s, ")?;
        rate.split(' ').next()?.parse::<f64>().ok()
    });
    let rates: Vec<f64> = rates.skip(WARM_UP_SECONDS as usize).collect();
    if rates.is_empty() {
        bail!("no rate in the output of pgbench: {progress}");
    }
    Ok(rates.iter().sum::<f64>() / rates.len() as f64)
}

/// The service's statement with pgbench's variables as parameters.
fn script_of(work: Work, users: u64) -> Result<String> {
    let existing_id = format!("\\set id random({}, {})", ID_BASE + 1, ID_BASE + users);
    let new_id = format!("\\set next :next + 1\n\\set id :next + :client_id * {IDS_PER_SESSION}");
    let [name, request] = ["name", "request"]
        .map(|variable| format!("\\set {variable} random({}, {})", NEW_NAMES.start, NEW_NAMES.end - 1));
    let [id, request_id] =
        ["id", "request"].map(|variable| format!("('{ID_PREFIX}' || :{variable}::text)::uuid"));
    let [fingerprint, salt] = [32, 16].map(|length| format!("'\\x{}'::bytea", "5a".repeat(length)));
    let [username, email] = ["('user' || :name::text)", "('user' || :name::text || '@example.com')"];
    let [display_name, unchanged] = ["('User ' || :name::text)", "null::text"];
    let (variables, sql, parameters) = match work {
        Work::GetById => (vec![existing_id], statements::GET_BY_ID, vec![id.as_str()]),
        Work::Create => (
            vec![new_id, name, request],
            statements::CREATE,
            vec![&request_id, &fingerprint, &id, username, username, email, email, display_name, &salt],
        ),
        Work::Update => {
            let kept = [unchanged; 4];
            let start: [&str; 4] = [&request_id, &fingerprint, &id, "0"];
            (
                vec![existing_id, name, request],
                statements::UPDATE,
                [&start[..], &kept, &[display_name]].concat(),
            )
        }
        _ => bail!("pgbench does not do {}", work.name()),
    };
    // From the last one, because `$1` is the beginning of `$10`.
    let fill = |sql: String, (index, value): (usize, &&str)| sql.replace(&format!("${}", index + 1), value);
    let sql = parameters.iter().enumerate().rev().fold(sql.to_owned(), fill);
    if sql.contains('$') {
        bail!("not all parameters have a value: {sql}");
    }
    Ok(format!("{}\n{sql};\n", variables.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_second_of_pgbench_does_not_count() {
        let progress = "pgbench (15.18)
progress: 1.0 s, 100.0 tps, lat 0.320 ms stddev 0.271, 0 failed
progress: 2.0 s, 300.0 tps, lat 0.320 ms stddev 0.271, 0 failed
progress: 3.0 s, 500.5 tps, lat 0.320 ms stddev 0.271, 0 failed";
        assert_eq!(rate(progress).unwrap(), 400.25);
        assert!(rate("pgbench (15.18)").is_err());
    }

    #[test]
    fn statements_of_the_service_are_found_and_filled_in() {
        for work in [Work::GetById, Work::Create, Work::Update] {
            assert!(script_of(work, 1_000).unwrap().ends_with(";\n"));
        }
    }
}

//! The private PostgreSQL, which the service starts without `DATABASE_URL`.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use tempfile::TempDir;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::*;

async fn start(data_dir: &Path) -> Server {
    // `PGPORT` must have no effect.
    let server = Server::spawn(&[("DATA_DIR", data_dir.to_str().unwrap()), ("PGPORT", "5433")]).await;
    server.wait_until("", ServingStatus::Serving).await;
    server
}

/// Starts a service on this directory, which must fail, and returns its standard error.
fn failing_start(data_dir: &Path) -> String {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_user-service"));
    command.env("DATA_DIR", data_dir).env("LISTEN_ADDR", "127.0.0.1:0").env_remove("DATABASE_URL");
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

/// The process id of the private PostgreSQL, if it is running.
fn postmaster(data_dir: &Path) -> Option<String> {
    let file = fs::read_to_string(data_dir.join("data/postmaster.pid")).ok()?;
    file.lines().next().map(str::to_owned)
}

#[tokio::test]
async fn private_postgresql_starts_and_stops_with_the_service_and_keeps_its_data() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    let data_dir = dir.path().join("deep/er");
    let mut server = start(&data_dir).await;
    assert!(server.log().contains(data_dir.to_str().unwrap()));
    let user = created(&mut server.client().await, "alice").await;
    assert!(postmaster(&data_dir).is_some());
    assert_eq!(fs::metadata(&data_dir).unwrap().permissions().mode() & 0o777, 0o700);
    server.signal("TERM");
    assert!(server.ended().await.success());
    assert_eq!(postmaster(&data_dir), None);

    let mut server = start(&data_dir).await;
    let found = server.client().await.get_user(by_id(&user.id)).await.unwrap().into_inner();
    assert_eq!(found.user, Some(user));
    server.signal("INT");
    assert!(server.ended().await.success());
}

#[tokio::test]
async fn log_of_the_private_postgresql_has_no_personal_data() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    let mut server = start(dir.path()).await;
    let mut client = server.client().await;
    created(&mut client, "alice").await;
    // The service checks before it inserts, so the test causes the violation.
    let mut postgres = tokio_postgres::Config::new();
    postgres.host_path(dir.path()).user("postgres").dbname("postgres");
    let (admin, connection) = postgres.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let again = "insert into users (id, username, username_key, username_held, email, email_key, display_name,
            revision, create_time, update_time)
        select gen_random_uuid(), username, username_key, true, email, email_key, display_name, 1, now(), now()
        from users";
    admin.execute(again, &[]).await.unwrap_err();
    server.signal("TERM");
    assert!(server.ended().await.success());
    let log = fs::read_to_string(dir.path().join("postgresql.log")).unwrap();
    assert!(log.contains("users_username_key") && !log.contains(SECRET), "{log}");
}

#[tokio::test]
async fn directory_with_foreign_files_is_rejected_and_not_changed() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.path().join("letter.txt"), "Dear").unwrap();
    let error = failing_start(dir.path());
    assert!(error.contains("has other things in it"), "{error}");
    assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o755);
}

#[tokio::test]
async fn second_service_on_the_same_directory_is_rejected() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    let mut server = start(dir.path()).await;
    let error = failing_start(dir.path());
    assert!(error.contains("is in use by another user-service"), "{error}");
    created(&mut server.client().await, "alice").await;
    server.signal("TERM");
    assert!(server.ended().await.success());
}

#[tokio::test]
async fn next_start_after_a_kill_takes_over_the_directory() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    let mut server = start(dir.path()).await;
    let user = created(&mut server.client().await, "alice").await;
    let orphan = postmaster(dir.path());
    server.signal("KILL");
    server.ended().await;
    let mut server = start(dir.path()).await;
    assert_ne!(postmaster(dir.path()), orphan);
    let found = server.client().await.get_user(by_id(&user.id)).await.unwrap().into_inner();
    assert_eq!(found.user, Some(user));
    server.signal("TERM");
    assert!(server.ended().await.success());
}

#[tokio::test]
async fn missing_server_binaries_are_reported_with_instructions() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    // A version whose binaries are not installed.
    fs::create_dir(dir.path().join("data")).unwrap();
    fs::write(dir.path().join("data/PG_VERSION"), "9\n").unwrap();
    let error = failing_start(dir.path());
    assert!(
        error.contains("no server binaries of PostgreSQL 9") && error.contains("DATABASE_URL"),
        "{error}"
    );
}

/// PostgreSQL does not run as root.
#[tokio::test]
async fn private_postgresql_runs_as_the_user_of_the_service_unless_that_is_root() {
    use std::os::unix::fs::MetadataExt;
    let dir = TempDir::with_prefix("pg-").unwrap();
    let mut server = start(dir.path()).await;
    let own = fs::metadata(format!("/proc/{}", server.pid())).unwrap().uid();
    let postgres = fs::metadata(format!("/proc/{}", postmaster(dir.path()).unwrap())).unwrap().uid();
    if own == 0 {
        assert_ne!(postgres, 0);
    } else {
        assert_eq!(postgres, own);
    }
    server.signal("TERM");
    assert!(server.ended().await.success());
}

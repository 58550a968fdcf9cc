//! The settings: which command reads which, and what invalid ones print.

use std::{collections::HashMap, fs, net::TcpListener, process::Command};

use clap::Args;
use user_service::config::Config;

use crate::support::Database;

const SERVE: [&[&str]; 2] = [&[], &["serve"]];
const CLIENTS: [&str; 4] = ["check", "import", "export", "watch"];

fn run(args: &[&str], settings: &[(&str, &str)]) -> (bool, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_user-service"));
    let output = command.args(args).env_clear().envs(settings.iter().copied()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

fn help(args: &[&str]) -> String {
    let (is_ok, help, error) = run(&[args, &["--help"]].concat(), &[]);
    assert!(is_ok, "{error}");
    help
}

/// Every setting as a flag, a variable and a default, as clap knows them.
fn settings() -> Vec<(String, String, Option<String>)> {
    let command = Config::augment_args(clap::Command::new(""));
    let setting = |arg: &clap::Arg| {
        let default = arg.get_default_values().first().map(|value| value.to_str().unwrap().to_owned());
        let name = arg.get_env().unwrap().to_str().unwrap().to_owned();
        (format!("--{}", arg.get_long().unwrap()), name, default)
    };
    command.get_arguments().map(setting).collect()
}

/// The settings whose flag a help text shows.
fn shown(help: &str) -> Vec<String> {
    let shown = settings().into_iter().filter(|(flag, ..)| help.contains(&format!("{flag} <")));
    shown.map(|(_, name, _)| name).collect()
}

/// Runs the command with a `LISTEN_ADDR` that is in use, which is the first error of a start
/// with valid settings.
fn start_on_used_port(args: &[&str]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let (is_ok, _, error) = run(args, &[("LISTEN_ADDR", &addr)]);
    assert!(!is_ok);
    error
}

#[test]
fn serve_reports_all_invalid_settings_together_without_their_values() {
    let settings = [
        ("DATABASE_URL", "postgres://user:zqzqpassword@host/db?sslmode=nonsense"),
        ("LISTEN_ADDR", "zqzq"),
        ("POOL_SIZE", "0"),
        ("DRAIN_DELAY_MS", "zqzq"),
        ("USERNAME_HOLD_DAYS", "3651"),
        ("RUST_LOG", "=zqzq="),
        ("LOG_FORMAT", "zqzq"),
    ];
    for args in [SERVE[0], SERVE[1], &["--shutdown-grace-ms", "-"], &["serve", "--shutdown-grace-ms", "-"]] {
        let (is_ok, _, error) = run(args, &settings);
        assert!(!is_ok);
        let flag = args.contains(&"-").then_some("SHUTDOWN_GRACE_MS");
        for name in settings.iter().map(|(name, _)| *name).chain(flag) {
            assert_eq!(error.matches(&format!("{name}: ")).count(), 1, "{name}: {error}");
        }
        assert!(!error.contains("zqzq"), "{error}");
    }
}

#[test]
fn database_url_that_the_service_cannot_use_is_rejected_with_the_reason() {
    for (query, expected) in [
        ("sslmode=require", "TLS to PostgreSQL, which is not built in"),
        ("sslmode=verify-full", "TLS to PostgreSQL, which is not built in"),
        ("sslrootcert=/ca.pem", "TLS to PostgreSQL, which is not built in"),
        ("target_session_attrs=prefer-standby", "`read-write`"),
        ("target_session_attrs=read-only", "`read-write`"),
        ("hostaddr=127.0.0.1,127.0.0.2", "1 hosts, but 2 addresses"),
        ("connect_timeout=soon", "`connect_timeout`"),
    ] {
        for args in [SERVE[0], SERVE[1], &["migrate"]] {
            let url = format!("postgres://user@host/db?{query}");
            let (is_ok, _, error) = run(args, &[("DATABASE_URL", &url)]);
            assert!(!is_ok && error.contains("DATABASE_URL: ") && error.contains(expected), "{error}");
        }
    }
}

#[test]
fn serve_and_the_bare_command_take_settings_as_flags() {
    for args in SERVE {
        let error = start_on_used_port(&[args, &["--pool-size", "5"]].concat());
        assert!(error.contains("cannot listen on"), "{error}");
        let error = start_on_used_port(&[args, &["--pool-size", "0"]].concat());
        assert!(error.contains("POOL_SIZE: "), "{error}");
    }
}

#[test]
fn flag_takes_precedence_over_its_variable() {
    for args in SERVE {
        let (_, _, error) = run(
            &[args, &["--pool-size", "5", "--drain-delay-ms", "-"]].concat(),
            &[("POOL_SIZE", "0"), ("DRAIN_DELAY_MS", "1")],
        );
        assert!(error.contains("DRAIN_DELAY_MS: ") && !error.contains("POOL_SIZE: "), "{error}");
    }
}

#[tokio::test]
async fn migrate_takes_its_settings_as_flags_and_ignores_variables_of_others() {
    let database = Database::empty().await;
    let (is_ok, _, error) =
        run(&["migrate", "--database-url", &database.url()], &[("POOL_SIZE", "x"), ("LISTEN_ADDR", "x")]);
    assert!(is_ok, "{error}");
    assert_eq!(database.count("select count(*) from users").await, 0);
}

#[test]
fn migrate_reports_all_its_invalid_settings_together() {
    let settings = [("DATABASE_URL", ""), ("RUST_LOG", "=x="), ("LOG_FORMAT", "xml")];
    let (is_ok, _, error) = run(&["migrate"], &settings);
    assert!(!is_ok);
    for (name, _) in settings {
        assert!(error.contains(&format!("{name}: ")), "{name}: {error}");
    }
}

#[test]
fn help_of_each_command_shows_the_settings_that_it_uses() {
    let all: Vec<_> = settings().into_iter().map(|(_, name, _)| name).collect();
    for args in SERVE {
        assert_eq!(shown(&help(args)), all);
    }
    assert_eq!(shown(&help(&["migrate"])), ["DATABASE_URL", "DATA_DIR", "RUST_LOG", "LOG_FORMAT"]);
    assert_eq!(shown(&help(&["watch"])), ["RUST_LOG", "LOG_FORMAT"]);
    for command in ["check", "import", "export"] {
        assert!(shown(&help(&[command])).is_empty(), "{command}");
    }
    for command in CLIENTS {
        assert!(help(&[command]).contains("--addr <HOST:PORT>"), "{command}");
    }
}

#[test]
fn help_does_not_print_the_database_url() {
    for args in [SERVE[0], SERVE[1], &["migrate"]] {
        let url = ("DATABASE_URL", "postgres://user:zqzqpassword@host/db");
        let (is_ok, help, _) = run(&[args, &["--help"]].concat(), &[url]);
        assert!(is_ok && help.contains("DATABASE_URL") && !help.contains("zqzq"), "{help}");
    }
}

#[test]
fn commands_reject_flags_of_settings_that_they_do_not_use() {
    for args in [&["check"][..], &["import", "-"], &["export", "-"], &["watch"], &["migrate"]] {
        let (is_ok, _, error) = run(&[args, &["--pool-size", "5"]].concat(), &[]);
        assert!(!is_ok && error.contains("unexpected argument '--pool-size'"), "{args:?}: {error}");
    }
    let (is_ok, _, error) = run(&["--pool-size", "5", "migrate"], &[]);
    assert!(!is_ok && error.contains("cannot be used with '--pool-size"), "{error}");
}

#[test]
fn invalid_server_settings_do_not_stop_client_commands() {
    // All but the address and, for `watch`, the log.
    let wrong: Vec<_> = settings()
        .into_iter()
        .map(|(_, name, _)| name)
        .filter(|name| !["LISTEN_ADDR", "RUST_LOG", "LOG_FORMAT"].contains(&name.as_str()))
        .collect();
    let wrong: Vec<_> = wrong.iter().map(|name| (name.as_str(), "")).collect();
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out.csv");
    // Every command fails after it has parsed its settings, on a missing service or file.
    for (args, expected) in [
        (&["check"][..], "cannot reach the service at 127.0.0.1:1"),
        (&["export", output.to_str().unwrap()], "cannot reach the service at 127.0.0.1:1"),
        (&["import", "/missing.csv"], "cannot open /missing.csv"),
        (&["watch", "--resume-file", "/"], "cannot read /"),
    ] {
        let (is_ok, _, error) = run(args, &[&wrong[..], &[("LISTEN_ADDR", "0.0.0.0:1")]].concat());
        assert!(!is_ok && error.contains(expected), "{args:?}: {error}");
        // With --addr, LISTEN_ADDR is not used either.
        let args = [args, &["--addr", "127.0.0.1:1"]].concat();
        let (is_ok, _, error) = run(&args, &[&wrong[..], &[("LISTEN_ADDR", "nowhere")]].concat());
        assert!(!is_ok && error.contains(expected), "{args:?}: {error}");
    }
}

#[test]
fn client_commands_connect_to_the_port_of_listen_addr_on_this_machine() {
    for (listen_addr, expected) in [
        (None, "127.0.0.1:50051"),
        (Some("0.0.0.0:1"), "127.0.0.1:1"),
        (Some("[::]:1"), "[::1]:1"),
        (Some("127.0.0.2:1"), "127.0.0.2:1"),
    ] {
        let settings: Vec<_> = listen_addr.map(|addr| ("LISTEN_ADDR", addr)).into_iter().collect();
        let (is_ok, _, error) = run(&["check"], &settings);
        // `make run` may run beside, at the default address.
        let is_running = is_ok && listen_addr.is_none();
        let is_expected = error.contains(&format!("cannot reach the service at {expected}"));
        assert!(is_running || is_expected, "{error}");
    }
}

#[test]
fn address_without_a_port_is_rejected() {
    for addr in ["localhost", ":1", "localhost:", "localhost:70000", "http://localhost:1", ""] {
        for args in [&["check"][..], &["import", "-"], &["export", "-"], &["watch"]] {
            let (is_ok, _, error) = run(&[args, &["--addr", addr]].concat(), &[]);
            assert!(!is_ok && error.contains("must be HOST:PORT"), "{addr}: {error}");
        }
    }
}

#[test]
fn configuration_document_lists_every_setting_as_help_does() {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
    let document = fs::read_to_string(document).expect(document);
    let is_name = |text: &str| text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
    let mut rows: HashMap<&str, Vec<&str>> = HashMap::new();
    for line in document.lines() {
        let mut cells = line.trim_matches('|').split('|').map(|cell| cell.trim());
        let name = cells.next().and_then(|cell| cell.strip_prefix('`')?.strip_suffix('`'));
        let Some(name) = name.filter(|name| is_name(name)) else { continue };
        assert!(rows.insert(name, cells.collect()).is_none(), "{name} is listed twice");
    }
    let help = help(&[]);
    let entries: Vec<_> = help.split("\n      --").collect();
    for (flag, name, default) in settings() {
        let entry = entries.iter().find(|entry| entry.starts_with(&format!("{} <", &flag[2..])));
        let entry = entry.expect(&flag);
        assert!(entry.contains(&format!("[env: {name}")), "{entry}");
        let row = rows.remove(name.as_str()).expect(&name);
        assert!(row.contains(&format!("`{flag}`").as_str()), "{name}: {row:?}");
        if let Some(default) = default {
            assert!(entry.contains(&format!("[default: {default}]")), "{entry}");
            assert!(row.contains(&format!("`{default}`").as_str()), "{name}: {row:?}");
        }
    }
    assert!(rows.is_empty(), "docs/configuration.md lists unknown settings: {rows:?}");
}

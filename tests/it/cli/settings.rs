//! Settings are read once, and wrong ones reported together.

use std::{collections::HashMap, ffi::OsStr, process::Command};

use clap::CommandFactory;
use user_service::config::Cli;

fn run(args: &[&str], settings: &[(&str, &str)]) -> (bool, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_user-service"));
    let output = command.args(args).env_clear().envs(settings.iter().copied()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[test]
fn all_wrong_settings_are_reported_together_and_no_secret_is() {
    let settings = [
        ("DATABASE_URL", "postgres://user:zqzqpassword@host/db?sslmode=nonsense"),
        ("LISTEN_ADDR", "nowhere"),
        ("POOL_SIZE", "0"),
        ("DRAIN_DELAY_MS", "soon"),
        ("LOG_FORMAT", "xml"),
    ];
    for args in [&["serve"][..], &["migrate"], &[], &["--shutdown-grace-ms", "-"]] {
        let (is_ok, _, error) = run(args, &settings);
        assert!(!is_ok);
        for (name, _) in settings {
            assert!(error.contains(&format!("{name}: ")), "{name} is not in: {error}");
        }
        assert!(!error.contains("zqzq"), "{error}");
    }
}

#[test]
fn a_database_that_must_be_reached_by_tls_is_refused_rather_than_reached_without() {
    let (is_ok, _, error) = run(&[], &[("DATABASE_URL", "postgres://user@host/db?sslmode=require")]);
    assert!(!is_ok && error.contains("TLS"), "{error}");
}

#[test]
fn help_and_readme_have_every_setting_and_help_says_nothing_of_the_environment() {
    let (is_ok, help, _) = run(&["--help"], &[("DATABASE_URL", "postgres://user:zqzqpassword@host/db")]);
    assert!(is_ok && !help.contains("zqzq"));
    let mut rows: HashMap<_, _> = include_str!("../../../README.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .collect();
    for setting in Cli::command().get_arguments() {
        let Some(name) = setting.get_env().and_then(OsStr::to_str) else { continue };
        assert!(help.contains(&format!("[env: {name}")), "{name}");
        let row = rows.remove(name).expect(name);
        for default in setting.get_default_values() {
            let cell = row.split('|').nth(1).map(|cell| cell.trim().trim_matches('`'));
            assert_eq!(cell, default.to_str(), "{name}");
        }
    }
    assert!(rows.is_empty(), "{rows:?}");
}

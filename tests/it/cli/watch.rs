//! `user-service watch`: prints changes as JSON lines and resumes from its token.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, ChildStdout, Command, Stdio},
};

use crate::feed::watch::insert;
use crate::support::*;

/// A running `user-service watch` and its output.
struct WatchProcess {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl WatchProcess {
    fn start(server: &Server, args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_user-service"));
        command.args(["watch", "--addr", &server.addr]).args(args).env_clear();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    fn next(&mut self) -> serde_json::Value {
        tokio::task::block_in_place(|| serde_json::from_str(&self.lines.next().unwrap().unwrap()).unwrap())
    }

    /// Interrupts the process, which must exit with success.
    async fn stop(mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
        assert!(eventually("the watch ends", async || self.child.try_wait().unwrap()).await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_prints_changes_as_json_lines_and_resumes_from_its_token() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let alice = created(&mut client, "alice").await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    let args = ["--send-initial-state", "--resume-file", file.to_str().unwrap()];
    let mut watch = WatchProcess::start(&server, &args);
    let line = watch.next();
    assert_eq!(line["kind"], "CHANGE_KIND_EXISTING");
    assert_eq!((&line["id"], &line["user"]["username"]), (&alice.id.clone().into(), &alice.username.into()));
    assert_eq!(line["user"]["createTime"], alice.create_time.unwrap().to_string());
    assert_eq!((&line["revision"], &line["user"]["deleteTime"]), (&"1".into(), &serde_json::Value::Null));
    assert_eq!(watch.next()["initialStateEnd"], true);
    client.update_user(rename(&alice.id, "New")).await.unwrap();
    assert_eq!(watch.next()["user"]["displayName"], "New");
    watch.stop().await;

    client.expunge_user(expunge(&alice.id)).await.unwrap();
    // Lines that were printed just before the interruption can be printed again, because the
    // token is saved after them.
    let mut watch = WatchProcess::start(&server, &args);
    let mut line = watch.next();
    if line["kind"] == "CHANGE_KIND_UPDATED" {
        line = watch.next();
    }
    assert_eq!(
        line,
        serde_json::json!({"kind": "CHANGE_KIND_EXPUNGED", "id": alice.id, "revision": "3", "removed": {}})
    );
    drop(server);
    // Without a service, the watch retries.
    assert!(watch.child.try_wait().unwrap().is_none());
    watch.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_can_be_interrupted_while_its_output_is_blocked() {
    let (server, database) = server().await;
    insert(&database, "user", 1, 1_000).await;
    let watch = WatchProcess::start(&server, &["--send-initial-state"]);
    let pid = watch.child.id();
    eventually("the pipe is full", async || {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        let written = io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap();
        (written.parse::<u64>().unwrap() > 55_000).then_some(())
    })
    .await;
    watch.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_filters_users() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let (ann, bob) = (created(&mut client, "ann").await, created(&mut client, "bob").await);
    let mut of_ann =
        WatchProcess::start(&server, &["--send-initial-state", "--username-prefix", &ann.username]);
    assert_eq!(of_ann.next()["id"], ann.id);
    assert_eq!(of_ann.next()["initialStateEnd"], true);
    let mut of_live = WatchProcess::start(&server, &["--send-initial-state", "--include-deleted", "false"]);
    assert_eq!(of_live.next()["id"], bob.id);
    assert_eq!(of_live.next()["id"], ann.id);
    assert_eq!(of_live.next()["initialStateEnd"], true);
    client.delete_user(delete(&bob.id)).await.unwrap();
    for watch in [&mut of_ann, &mut of_live] {
        let line = watch.next();
        assert_eq!((&line["id"], &line["removed"]), (&bob.id.clone().into(), &serde_json::json!({})));
        assert_eq!(line["user"], serde_json::Value::Null);
    }
    of_ann.stop().await;
    of_live.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_exits_when_its_output_is_closed_and_reports_an_invalid_token() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let mut watch = WatchProcess::start(&server, &["--send-initial-state"]);
    assert_eq!(watch.next()["initialStateEnd"], true);
    let WatchProcess { mut child, lines } = watch;
    drop(lines);
    created(&mut client, "alice").await;
    assert!(eventually("the watch ends", async || child.try_wait().unwrap()).await.success());

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "nonsense").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_user-service"));
    command.args(["watch", "--addr", &server.addr, "--resume-file"]).arg(&file).env_clear();
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    assert!(!eventually("the watch ends", async || child.try_wait().unwrap()).await.success());
    let mut error = String::new();
    child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    assert!(error.contains("RESUME_TOKEN_INVALID: "), "{error}");
}

//! `user-service import` and `user-service export`: an exported file has the imported users,
//! even if the command, the service or the database is killed meanwhile.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tempfile::TempDir;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    sync::watch,
};
use user_service::pb;
use user_service::store::dev_postgres::Embedded;

use crate::feed::chaos::{crash, start_again};
use crate::support::*;

/// The log level of the service in tests with many users, to keep the log small.
const LOG: (&str, &str) = ("RUST_LOG", "user_service=debug");

/// Starts the binary as a client of the service at `addr`.
fn spawn(addr: &str, args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_user-service"));
    command.args(args).args(["--addr", addr]).env_clear().kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

async fn run(addr: &str, args: &[&str]) -> Output {
    spawn(addr, args).wait_with_output().await.unwrap()
}

/// Runs the binary, which must succeed, and returns its standard error.
async fn run_ok(addr: &str, args: &[&str]) -> String {
    stderr(run(addr, args).await, true)
}

/// Standard error of a process that must have succeeded or failed.
#[track_caller]
fn stderr(output: Output, is_success: bool) -> String {
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.success(), is_success, "{text}");
    text
}

/// A temporary directory.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(TempDir::with_prefix("files-").unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), content).unwrap();
        self.name(name)
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Users with names in many scripts; the same in each run.
fn many_users(count: usize) -> Vec<pb::User> {
    const SCRIPTS: [&str; 12] = [
        "abcdefghijklmnopqrstuvwxyz",
        "ABCdefghijklmnopqrst",
        "\u{e0}\u{e9}\u{ee}\u{f6}\u{f8}\u{f1}\u{e5}\u{10d}\u{17e}\u{142}",
        "\u{3b1}\u{3b2}\u{3b3}\u{3b4}\u{3b5}\u{3b6}\u{3b7}\u{3b8}",
        "\u{430}\u{431}\u{432}\u{433}\u{434}\u{436}\u{42f}\u{42e}",
        "\u{561}\u{562}\u{563}\u{564}\u{565}",
        "\u{5d0}\u{5d1}\u{5d2}\u{5d3}\u{5d4}",
        "\u{627}\u{628}\u{62a}\u{62b}\u{62c}",
        "\u{915}\u{916}\u{917}\u{918}\u{91a}",
        "\u{e01}\u{e02}\u{e04}\u{e07}\u{e08}",
        "\u{6f22}\u{5b57}\u{540d}\u{4eba}\u{5c71}",
        "\u{3042}\u{3044}\u{30ab}\u{30bf}\u{6f22}",
    ];
    const DISPLAY: &str = "ab \"',;\\{}<>&\u{e9}\u{df}\u{130}\u{3a3}\u{5d0}\u{627}\u{915}\u{e01}\u{6f22}\u{ac00}e\u{301}\u{1f600}\u{1f468}\u{200d}\u{1f469}\u{a0}=+@-#%_|`~";
    let display: Vec<char> = DISPLAY.chars().collect();
    let mut rng = StdRng::seed_from_u64(4);
    (0..count)
        .map(|n| {
            let letters: Vec<char> = SCRIPTS[n % SCRIPTS.len()].chars().collect();
            let name: String = (0..6).map(|_| letters[rng.random_range(0..letters.len())]).collect();
            let len = rng.random_range(0..40);
            let display_name = (0..len).map(|_| display[rng.random_range(0..display.len())]).collect();
            pb::User {
                username: format!("{name}{n}"),
                email: format!("{name}.{n}@example{}.com", n % 10),
                display_name,
                ..Default::default()
            }
        })
        .collect()
}

fn json_lines(users: &[pb::User]) -> String {
    let line = |user: &pb::User| {
        let fields = serde_json::json!({
            "username": user.username, "email": user.email, "display_name": user.display_name,
        });
        format!("{fields}\n")
    };
    users.iter().map(line).collect()
}

/// Id, e-mail address and display name of each username of an exported file.
type Exported = HashMap<String, [String; 3]>;

fn exported(path: &Path) -> Exported {
    let entry = |user: HashMap<String, serde_json::Value>| {
        let field = |name: &str| user[name].as_str().unwrap().to_owned();
        (field("username"), ["id", "email", "display_name"].map(field))
    };
    if path.extension().unwrap() == "csv" {
        let mut csv = csv::Reader::from_path(path).unwrap();
        let rows = csv.deserialize().map(|row: Result<HashMap<String, String>, _>| row.unwrap());
        return rows
            .map(|row| entry(row.into_iter().map(|(name, value)| (name, value.into())).collect()))
            .collect();
    }
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| entry(serde_json::from_str(line).unwrap())).collect()
}

#[track_caller]
fn assert_same(exported: &Exported, users: &[pb::User]) {
    assert_eq!(exported.len(), users.len());
    for user in users {
        let [_, email, display_name] = &exported[&user.username];
        assert_eq!((email, display_name), (&user.email, &user.display_name));
    }
}

/// Asserts that the database has exactly these users, each created once.
async fn assert_imported(database: &Database, users: &[pb::User]) {
    let sql = "select username, email, display_name, revision from users";
    let rows = database.connect().await.query(sql, &[]).await.unwrap();
    let found: HashMap<String, (String, String, i64)> =
        rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2), row.get(3)))).collect();
    assert_eq!((rows.len(), found.len()), (users.len(), users.len()));
    for user in users {
        assert_eq!(found[&user.username], (user.email.clone(), user.display_name.clone(), 1));
    }
    let changes = database.count("select count(*) from user_changes where kind = 1").await;
    assert_eq!(usize::try_from(changes).unwrap(), users.len());
    assert_eq!(database.count("select count(*) from user_changes where kind <> 1").await, 0);
}

#[tokio::test]
async fn export_returns_100_000_imported_users_in_many_scripts_unchanged() {
    let mut users = many_users(100_000);
    let files = Files::new();
    files.write("users.jsonl", json_lines(&users));
    let mut first: Option<Exported> = None;
    // From JSON Lines to CSV, then a part of the CSV into another service.
    for (input, output) in [("users.jsonl", "out.csv"), ("part.csv", "out.jsonl")] {
        let database = Database::migrated().await;
        let server = Server::start(&database, &[LOG]).await;
        let before = server.memory();
        let report = run_ok(&server.addr, &["import", &files.name(input)]).await;
        let count = users.len();
        assert!(report.contains(&format!("{count} created, 0 updated, 0 skipped, 0 rejected")), "{report}");
        let report = run_ok(&server.addr, &["export", &files.name(output)]).await;
        assert!(report.contains(&format!("{count} users exported")), "{report}");
        let growth = server.memory().saturating_sub(before);
        assert!(growth < 64 << 20, "the memory of the service has grown by {growth} bytes");
        let found = exported(&files.path(output));
        assert_same(&found, &users);
        if let Some(first) = &first {
            // The ids are equal, too.
            assert!(found.iter().all(|(username, user)| first[username] == *user));
        } else {
            users.truncate(20_000);
            let csv = fs::read_to_string(files.path(output)).unwrap();
            let names: HashSet<_> = users.iter().map(|user| user.username.as_str()).collect();
            let is_part =
                |line: &&str| line.starts_with("id,") || names.contains(line.split(',').nth(1).unwrap());
            let part: Vec<_> = csv.lines().filter(is_part).collect();
            files.write("part.csv", part.join("\n"));
            first = Some(found);
        }
    }
    assert_eq!(files.names(), ["out.csv", "out.jsonl", "part.csv", "users.jsonl"]);
}

/// A TCP proxy, whose address stays the same when the service restarts at another one.
struct Proxy {
    addr: String,
    target: watch::Sender<String>,
}

impl Proxy {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let (target, targets) = watch::channel(String::new());
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let target = targets.borrow().clone();
                tokio::spawn(async move {
                    if let Ok(mut server) = TcpStream::connect(target).await {
                        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                    }
                });
            }
        });
        Self { addr, target }
    }
}

#[tokio::test]
async fn import_survives_twenty_kills_of_the_service() {
    let users = many_users(90_000);
    let files = Files::new();
    let file = files.write("users.jsonl", json_lines(&users));
    let database = Database::migrated().await;
    let proxy = Proxy::new().await;
    let mut server = Server::start(&database, &[LOG]).await;
    proxy.target.send_replace(server.addr.clone());
    let mut import = spawn(&proxy.addr, &["import", &file]);
    let mut rng = StdRng::seed_from_u64(9);
    let rows = async || database.count("select count(*) from users").await;
    let mut last = 0;
    for _ in 0..20 {
        // The service is killed at a random moment after the import has made progress.
        last =
            eventually("the import makes progress", async || Some(rows().await).filter(|n| *n > last)).await;
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..30_000))).await;
        server.signal("KILL");
        server.ended().await;
        assert!(import.try_wait().unwrap().is_none(), "the import ended too early");
        server = Server::start(&database, &[LOG]).await;
        proxy.target.send_replace(server.addr.clone());
    }
    let report = stderr(import.wait_with_output().await.unwrap(), true);
    assert!(report.contains("90000 created, 0 updated, 0 skipped, 0 rejected"), "{report}");
    assert_imported(&database, &users).await;
}

#[tokio::test]
async fn killed_import_resumes_when_the_command_runs_again() {
    let users = many_users(50_000);
    let mut lines = json_lines(&users);
    lines.push_str("{\"username\": \"-\"}\n");
    let files = Files::new();
    let file = files.write("users.jsonl", &lines);
    let database = Database::migrated().await;
    let server = Server::start(&database, &[LOG]).await;
    let rows = async || database.count("select count(*) from users").await;
    let mut last = 0;
    for _ in 0..3 {
        let mut import = spawn(&server.addr, &["import", &file]);
        last =
            eventually("the import makes progress", async || Some(rows().await).filter(|n| *n > last)).await;
        import.kill().await.unwrap();
        assert_eq!(files.names(), ["users.jsonl", "users.jsonl.import"]);
    }
    // Another mode is another import.
    let other = run(&server.addr, &["import", &file, "--mode", "overwrite"]).await;
    assert!(stderr(other, false).contains("REQUEST_ID_REUSED"));
    let report = stderr(run(&server.addr, &["import", &file]).await, false);
    assert!(report.contains("50000 created, 0 updated, 0 skipped, 1 rejected"), "{report}");
    assert!(report.contains("line 50001: username: USERNAME_INVALID: "), "{report}");
    assert_imported(&database, &users).await;
    assert_eq!(files.names(), ["users.jsonl"]);

    // For standard input, the id names the import to resume.
    let id = new_request_id();
    for _ in 0..2 {
        let args = ["import", "-", "--format", "jsonl", "--mode", "skip-existing", "--import-id", &id];
        let mut import = spawn(&server.addr, &args);
        let line = "{\"username\": \"ann\", \"email\": \"a@example.com\"}\n";
        import.stdin.take().unwrap().write_all(line.as_bytes()).await.unwrap();
        let report = stderr(import.wait_with_output().await.unwrap(), true);
        assert!(report.contains("1 created, 0 updated, 0 skipped, 0 rejected"), "{report}");
    }
}

#[tokio::test]
async fn import_survives_a_crash_of_the_database() {
    let dir = TempDir::with_prefix("pg-").unwrap();
    let postgres = Embedded::start(dir.path()).await.unwrap();
    let database = Database { socket_dir: dir.path().into(), name: "postgres".into() };
    let server = Server::start(&database, &[LOG]).await;
    let users = many_users(50_000);
    let files = Files::new();
    let file = files.write("users.jsonl", json_lines(&users));
    let import = spawn(&server.addr, &["import", &file]);
    let rows = async || database.count("select count(*) from users").await;
    eventually("the import makes progress", async || (rows().await > 0).then_some(())).await;
    crash(dir.path()).await;
    drop(postgres);
    let postgres = start_again(dir.path()).await;
    assert!(rows().await < 50_000, "the import ended too early");
    let report = stderr(import.wait_with_output().await.unwrap(), true);
    assert!(report.contains("50000 created, 0 updated, 0 skipped, 0 rejected"), "{report}");
    assert_imported(&database, &users).await;
    drop(server);
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn import_reports_every_rejected_line_with_field_and_reason() {
    let (server, database) = server().await;
    created(&mut server.client().await, "taken").await;
    let files = Files::new();
    let long = format!("{{\"username\": \"{}\"}}", "x".repeat(100_000));
    let lines = [
        r#"{"username": "zqzqone", "email": "zqzq@example.com"}"#.as_bytes(),
        b"",
        br#"{"username": "zqzqtaken", "email": "zqzq@example.com", "display_name": null}"#,
        b"not json",
        br#"{"username": "a b", "email": "nonsense"}"#,
        br#"{"username": "zqzqtwo", "email": "zqzq@example.com", "revision": 7, "create_time": null}"#,
        br#"{"username": "zqzqthree", "mail": "zqzq@example.com"}"#,
        b"\xff\xfe",
        long.as_bytes(),
        br#"{"username": "zqzqfour", "email": "zqzq@example.com"}"#,
    ]
    .join(&b'\n');
    let expected = [
        "line 3: username: USERNAME_TAKEN: ",
        "line 4: line: FIELD_INVALID: ",
        "line 5: username: USERNAME_INVALID: ",
        "line 5: email: EMAIL_INVALID: ",
        "line 7: line: FIELD_INVALID: unknown field `mail`",
        "line 8: line: FIELD_INVALID: ",
        "line 9: line: FIELD_INVALID: is too long",
    ];
    let file = files.write("users.ndjson", lines);
    let report = stderr(run(&server.addr, &["import", &file]).await, false);
    assert!(report.contains("3 created, 0 updated, 0 skipped, 6 rejected"), "{report}");
    for line in expected {
        assert_eq!(report.matches(line).count(), 1, "{line}: {report}");
    }
    assert_eq!(database.count("select count(*) from users").await, 4);

    let csv = "\u{feff}email,username\r\na@example.com,zqzqfive\r\n\r\n\"a@example.com\",\"zqzq\"\"\"\r\nonly one\r\n\"a\r\n,,,,,,,,\r\na@example.com,zqzqsix";
    let (file, written) = (files.write("users.CSV", csv), files.name("rejected.txt"));
    let report = stderr(run(&server.addr, &["import", &file, "--report", &written]).await, false);
    assert!(report.contains("2 created, 0 updated, 0 skipped, 4 rejected"), "{report}");
    let report = fs::read_to_string(written).unwrap();
    let mut lines: Vec<_> = report.lines().collect();
    lines.sort_unstable();
    let expected = [
        "line 4: username: USERNAME_INVALID: ",
        "line 5: line: FIELD_INVALID: has 1 fields, but the header has 2",
        "line 6: line: FIELD_INVALID: has an unclosed quote",
        "line 7: line: FIELD_INVALID: has more than 7 fields",
    ];
    assert_eq!(lines.len(), expected.len(), "{report}");
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(expected), "{report}");
    }
}

#[tokio::test]
async fn invalid_files_are_rejected_before_a_request_is_sent() {
    let (server, database) = server().await;
    let files = Files::new();
    let cases = [
        (vec!["import".to_owned(), files.name("missing.csv")], "cannot open"),
        (vec!["import".into(), files.write("users", "")], "--format"),
        (vec!["import".into(), files.write("users.csv", "username,mail\n")], "\"mail\""),
        (vec!["export".into(), files.name("missing/out.csv")], "cannot write"),
    ];
    for (args, expected) in cases {
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let report = stderr(run(&server.addr, &args).await, false);
        assert!(report.contains(expected), "{report}");
    }
    assert_eq!(files.names(), ["users", "users.csv"]);
    assert_eq!(database.count("select count(*) from import_chunks").await, 0);
    let report = stderr(run("127.0.0.1:1", &["export", &files.name("out.csv")]).await, false);
    assert!(report.contains("cannot reach the service at 127.0.0.1:1"), "{report}");
}

#[tokio::test]
async fn export_to_standard_output_can_be_imported_from_standard_input() {
    for format in ["jsonl", "csv"] {
        let (source, _database) = server().await;
        let (target, _database) = server().await;
        let user = created(&mut source.client().await, "alice").await;
        let output = run(&source.addr, &["export", "-", "--format", format]).await;
        let mut import = spawn(&target.addr, &["import", "-", "--format", format]);
        import.stdin.take().unwrap().write_all(&output.stdout).await.unwrap();
        stderr(import.wait_with_output().await.unwrap(), true);
        let imported =
            target.client().await.get_user(by_id(&user.id)).await.unwrap().into_inner().user.unwrap();
        assert_eq!((imported.username, imported.email), (user.username, user.email));
        // A second import changes nothing.
        let mut import = spawn(&target.addr, &["import", "-", "--format", format, "--mode", "overwrite"]);
        import.stdin.take().unwrap().write_all(&output.stdout).await.unwrap();
        let report = stderr(import.wait_with_output().await.unwrap(), true);
        assert!(report.contains("0 created, 0 updated, 1 skipped, 0 rejected"), "{report}");
    }
}

#[tokio::test]
async fn export_filters_users() {
    let (server, _database) = server().await;
    let mut client = server.client().await;
    let mut users = Vec::new();
    for name in ["ann", "bob", "carol"] {
        users.push(created(&mut client, name).await);
    }
    client.delete_user(delete(&users[2].id)).await.unwrap();
    let time = |n: usize| users[n].create_time.unwrap().to_string();
    for (flag, value, expected) in [
        ("--username-prefix", format!("{SECRET}a"), vec!["ann"]),
        ("--email", users[1].email.clone(), vec!["bob"]),
        ("--create-time-after", time(0), vec!["bob"]),
        ("--create-time-before", time(2), vec!["ann", "bob"]),
    ] {
        let output = run(&server.addr, &["export", "-", "--format", "jsonl", flag, &value]).await;
        let mut names: Vec<_> = std::str::from_utf8(&output.stdout)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["username"].clone())
            .collect();
        names.sort_by_key(ToString::to_string);
        let expected: Vec<_> = expected.into_iter().map(|name| user(name).username).collect();
        assert_eq!(names, expected, "{flag}");
    }
    for (email, what) in [("nonsense", "filter.email"), ("", "a value is required")] {
        let output = run(&server.addr, &["export", "-", "--format", "jsonl", "--email", email]).await;
        let report = stderr(output, false);
        assert!(report.contains(what), "{report}");
    }
}

#[tokio::test]
async fn failed_export_leaves_no_new_file_and_keeps_the_old_one() {
    let database = Database::migrated().await;
    let sql = "insert into users (id, username, username_key, username_held, email, email_key, display_name,
            revision, create_time, update_time)
        select gen_random_uuid(), 'u' || n, 'u' || n, true, 'x', 'x', repeat('x', 100), 1, now(), now()
        from generate_series(1, 50000) as n";
    database.connect().await.batch_execute(sql).await.unwrap();
    let server = Server::start(&database, &[LOG]).await;
    let files = Files::new();
    let file = files.write("out.jsonl", "old content");
    let export = spawn(&server.addr, &["export", &file]);
    let has_started = async || {
        let part = files.names().into_iter().find(|name| name.ends_with(".part"))?;
        fs::metadata(files.path(&part)).is_ok_and(|part| part.len() > 0).then_some(())
    };
    eventually("the export has started", has_started).await;
    server.signal("KILL");
    stderr(export.wait_with_output().await.unwrap(), false);
    assert_eq!(files.names(), ["out.jsonl"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "old content");
}

//! The service beside Python stacks that do the same work: one after the other, on copies of
//! one database, with the same load.

use std::{net::SocketAddr, path::Path};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, process::Command};

use crate::{
    format::{table, thousands},
    generator::{self, Caller, Load},
    plan::{Plan, Variant},
    postgres::{Database, Postgres},
    requests::{Requests, Work},
    results::{Cell, Key, Results, Section},
    server::Server,
    service::{Service, callers},
    usage::{Meter, machine},
};

/// The Python programs.
const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/comparison");
const USERS: u64 = 100_000;
const WORKS: [Work; 2] = [Work::GetById, Work::Create];
/// HTTP connections, or gRPC calls in flight.
const CONNECTIONS: [usize; 3] = [1, 10, 100];

/// A row of the table. The first one is what the others are divided by.
const STACKS: [(&str, Stack); 5] = [
    ("FastAPI, asyncpg", Stack::Http("fastapi_asyncpg")),
    ("FastAPI, SQLAlchemy ORM", Stack::Http("fastapi_sqlalchemy_orm")),
    ("grpc.aio, asyncpg", Stack::Grpc("grpc_asyncpg.py")),
    ("user-service, coalescing off", Stack::Service { coalescing: false }),
    ("user-service", Stack::Service { coalescing: true }),
];

#[derive(Clone, Copy)]
enum Stack {
    /// A module with an ASGI application.
    Http(&'static str),
    /// A program that serves the service's own proto.
    Grpc(&'static str),
    Service {
        coalescing: bool,
    },
}

/// Measures all stacks in turns and returns the report.
pub async fn run(plan: &Plan, python: &Path, postgres: &Postgres) -> Result<String> {
    let loaded = postgres.create_database(&plan.service, "loaded", USERS).await?;
    let mut results = STACKS.map(|_| Results::default());
    for repetition in 1..=plan.repetitions {
        for ((name, stack), results) in STACKS.iter().zip(&mut results) {
            eprintln!("comparison, repetition {repetition}: {name}");
            let database = postgres.copy_database(&loaded, "copy").await?;
            let server = stack.start(plan, python, &database).await.context(*name)?;
            for work in WORKS {
                let mut load = Load { rate: None, warm_up: plan.warm_up, duration: plan.duration / 2 };
                // Connections are opened and statements prepared before anything counts.
                stack.measure(&server, &database, work, 10, load).await.context(*name)?;
                load.duration = plan.duration;
                for connections in CONNECTIONS {
                    let cell =
                        stack.measure(&server, &database, work, connections, load).await.context(*name)?;
                    results.push(key(work, connections), cell);
                }
            }
            server.kill().await?;
            postgres.drop_database(database).await?;
        }
    }
    let python_version = Command::new(python).arg("--version").output().await?;
    let versions = String::from_utf8(python_version.stdout)?;
    report(plan, &results, &format!("PostgreSQL {}; {}", postgres.version().await?, versions.trim()))
}

fn key(work: Work, connections: usize) -> Key {
    Section::Calls.key(work, Variant::Coalesced, connections, USERS)
}

impl Stack {
    async fn start(self, plan: &Plan, python: &Path, database: &Database) -> Result<Server> {
        let mut command = Command::new(python);
        command.env("DATABASE_URL", &database.url).env("PYTHONDONTWRITEBYTECODE", "1");
        match self {
            // One process. Without the access log, which would cost a line per request.
            Self::Http(module) => {
                let app = format!("{module}:app");
                command.args(["-m", "uvicorn", &app, "--app-dir", DIR, "--port=0", "--no-access-log"]);
                Server::spawn(&mut command, "Uvicorn running on http://").await
            }
            Self::Grpc(program) => {
                Server::spawn(command.arg(Path::new(DIR).join(program)), "listening on ").await
            }
            Self::Service { coalescing } => {
                Ok(Service::start(&plan.service, database, coalescing).await?.server)
            }
        }
    }

    async fn measure(
        self,
        server: &Server,
        database: &Database,
        work: Work,
        connections: usize,
        load: Load,
    ) -> Result<Cell> {
        let mut requests = Requests::new(work, USERS, String::new());
        let meter = Meter { service: Some(server.pid), postmaster: database.postmaster };
        if let Self::Http(_) = self {
            let mut callers = Vec::new();
            for _ in 0..connections {
                callers.push(HttpCaller::connect(server.addr, requests.fork()).await?);
            }
            return generator::run(callers, load, meter).await;
        }
        generator::run(callers(server.addr, requests, connections).await?, load, meter).await
    }
}

/// Makes calls of the JSON interface on one HTTP/1.1 connection.
struct HttpCaller {
    addr: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
    requests: Requests,
}

impl HttpCaller {
    async fn connect(addr: SocketAddr, requests: Requests) -> Result<Self> {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // It ends when the sender is dropped.
        tokio::spawn(connection);
        Ok(Self { addr, sender, requests })
    }
}

impl Caller for HttpCaller {
    type Request = Request<Full<Bytes>>;

    fn next_request(&mut self) -> Result<Self::Request> {
        let request = Request::builder().header(header::HOST, self.addr.to_string());
        let request = match self.requests.work {
            Work::Create => {
                let user = self.requests.new_user();
                let body = format!(
                    r#"{{"username": "{}", "email": "{}", "display_name": "{}"}}"#,
                    user.username, user.email, user.display_name
                );
                let request = request.method(Method::POST).uri("/users");
                request.header(header::CONTENT_TYPE, "application/json").body(body.into())
            }
            _ => request.uri(format!("/users/{}", self.requests.existing_id())).body(Full::default()),
        };
        Ok(request?)
    }

    async fn call(&mut self, request: Self::Request) -> Result<()> {
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        ensure!(response.status().is_success(), "a call failed: {}", response.status());
        response.into_body().collect().await?;
        Ok(())
    }
}

fn report(plan: &Plan, results: &[Results; STACKS.len()], versions: &str) -> Result<String> {
    let each = |results: &Results, work, connections, figure: fn(&Cell) -> f64| {
        results.each(key(work, connections), figure)
    };
    let [first, ..] = results;
    let rows = STACKS.iter().zip(results).map(|((name, _), results)| {
        let mut row = vec![(*name).to_owned()];
        for work in WORKS {
            row.extend(CONNECTIONS.map(|n| thousands(each(results, work, n, |cell| cell.rate).median())));
        }
        row.extend(WORKS.map(|work| format!("{:.1}", each(results, work, 100, |cell| cell.p99).median())));
        let rate = |results, work| each(results, work, 100, |cell| cell.rate);
        row.extend(WORKS.map(|work| format!("{:.2}", (rate(results, work) / rate(first, work)).median())));
        row
    });
    let columns = [
        "stack",
        "get/s at 1",
        "at 10",
        "at 100",
        "create/s at 1",
        "at 10",
        "at 100",
        "get p99, ms",
        "create p99, ms",
        "get ÷",
        "create ÷",
    ];
    Ok(format!(
        "# Comparison with Python stacks\n\n\
         Made by `make bench-comparison` on {}; {versions}; libraries as in `requirements.txt`.\n\n\
         Get one user by a random id, or create one with a new name, on {} users, at 1, 10 and 100 connections \
         (for gRPC: calls in flight). Calls per second are the median of {} interleaved repetitions of {} s. The \
         last four columns are at 100 connections: the 99th percentile of the latency, and the rate ÷ that of the \
         first row. [How to read it](../performance.md#comparison-with-python-stacks)\n\n{}",
        machine()?,
        thousands(USERS as f64),
        plan.repetitions,
        plan.duration.as_secs_f64(),
        table(&columns, rows),
    ))
}

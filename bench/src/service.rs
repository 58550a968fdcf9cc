//! The service under test, on a database.

use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tonic::transport::Channel;
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::{
    client::GrpcClient,
    generator::{self, GrpcCaller, Load},
    postgres::Database,
    requests::{Requests, Work},
    results::Cell,
    server::{Server, command, serve},
    usage::Meter,
};

/// The setting that turns coalescing on and off. The second name is the one before its
/// renaming, for `--baseline` binaries; a service ignores variables it does not know.
const COALESCING: [&str; 2] = ["REQUEST_COALESCING", "GROUPING"];
/// The connections that calls in flight share.
const CONNECTIONS: usize = 4;

/// The service on a database.
pub struct Service {
    pub database: Database,
    pub server: Server,
    /// Time from exec to SERVING.
    pub start: Duration,
}

impl Service {
    pub async fn start(binary: &Path, database: &Database, coalescing: bool) -> Result<Self> {
        let start = Instant::now();
        let mut command = command(binary);
        command.env("DATABASE_URL", &database.url);
        command.envs(COALESCING.map(|name| (name, if coalescing { "on" } else { "off" })));
        let server = serve(&mut command).await?;
        Ok(Self { database: database.clone(), server, start: start.elapsed() })
    }

    pub async fn stop(self) -> Result<()> {
        self.server.kill().await
    }

    /// A full client, for the streams.
    pub async fn client(&self) -> Result<UserServiceClient<Channel>> {
        Ok(UserServiceClient::connect(format!("http://{}", self.server.addr)).await?)
    }

    /// Puts the service under load.
    pub async fn measure(&self, work: Work, in_flight: usize, load: Load) -> Result<Cell> {
        let database = &self.database;
        let requests = Requests::new(work, database.users, database.deep_page.clone());
        let callers = callers(self.server.addr, requests, in_flight).await?;
        let meter = Meter { service: Some(self.server.pid), postmaster: database.postmaster };
        let cell = generator::run(callers, load, meter).await;
        cell.with_context(|| format!("{} with {in_flight} in flight", work.name()))
    }

    /// The token of the page that begins in the middle of the table.
    pub async fn deep_page(&self) -> Result<String> {
        let mut client = self.client().await?;
        let mut request = pb::ListUsersRequest { page_size: 1000, ..Default::default() };
        let mut users = 0;
        while users < self.database.users / 2 {
            let page = client.list_users(request.clone()).await?.into_inner();
            users += page.users.len() as u64;
            request.page_token = page.next_page_token;
        }
        Ok(request.page_token)
    }
}

/// Callers of a gRPC server. They share a few connections, as the clients of a service do.
pub async fn callers(addr: SocketAddr, mut requests: Requests, in_flight: usize) -> Result<Vec<GrpcCaller>> {
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS.min(in_flight) {
        clients.push(GrpcClient::connect(addr, &requests.work.path()).await?);
    }
    let clients = clients.iter().cycle().take(in_flight);
    Ok(clients.map(|client| GrpcCaller { client: client.clone(), requests: requests.fork() }).collect())
}

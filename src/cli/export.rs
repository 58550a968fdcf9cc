//! `user-service export`.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::Args;
use tokio::task;
use tonic::transport::Channel;

use super::{
    Filter, connect, explain,
    files::{Format, Writer},
    is_standard, progress_bar, say,
};
use crate::pb::{self, user_service_client::UserServiceClient};

/// What `user-service export` is told.
#[derive(Debug, Args)]
pub struct Export {
    /// Where to write the users; `-` for standard output.
    pub file: PathBuf,

    /// Which of those that are not deleted.
    #[command(flatten)]
    pub filter: Filter,

    /// How to write them [default: what the name ends with, .jsonl or .csv]
    #[arg(long)]
    pub format: Option<Format>,

    /// The service, as HOST:PORT [default: LISTEN_ADDR, on this machine]
    #[arg(long)]
    pub addr: Option<String>,
}

/// Exports users. A file gets its name when it is complete.
pub async fn run(args: Export, default_addr: String) -> anyhow::Result<()> {
    let format = Format::of(&args.file, args.format)?;
    let request = pb::ExportUsersRequest { filter: args.filter.to_pb(None) };
    let mut client = connect(args.addr.as_ref().unwrap_or(&default_addr)).await?;
    if is_standard(&args.file) {
        write(&mut client, request, format, io::stdout()).await?.flush().context("cannot write")?;
        return Ok(());
    }
    to_file(&mut client, request, format, &args.file).await
}

async fn to_file(
    client: &mut UserServiceClient<Channel>,
    request: pb::ExportUsersRequest,
    format: Format,
    path: &Path,
) -> anyhow::Result<()> {
    let cannot_write = || format!("cannot write {}", path.display());
    // Beside it, under a name that nobody else has, and for nobody else to read.
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::Builder::new().suffix(".part").tempfile_in(dir).with_context(cannot_write)?;
    let file = write(client, request, format, file).await?;
    file.as_file().sync_all().with_context(cannot_write)?;
    file.persist(path).map(drop).with_context(cannot_write)
}

/// Writes users to a file, and gives it back.
async fn write<W: Write + Send + 'static>(
    client: &mut UserServiceClient<Channel>,
    request: pb::ExportUsersRequest,
    format: Format,
    file: W,
) -> anyhow::Result<W> {
    let failed = |status: tonic::Status| anyhow::anyhow!("{}", explain(&status));
    let mut parts = client.export_users(request).await.map_err(failed)?.into_inner();
    let mut writer = Writer::new(format, file)?;
    let bar = progress_bar(None, "{spinner} {human_pos} users {per_sec}");
    let mut watch_token = String::new();
    while let Some(part) = parts.message().await.map_err(failed)? {
        // Whoever reads standard output may take its time.
        task::block_in_place(|| part.users.iter().try_for_each(|user| writer.write(user)))?;
        bar.inc(part.users.len() as u64);
        if !part.watch_token.is_empty() {
            watch_token = part.watch_token;
        }
    }
    bar.finish_and_clear();
    say(&format!("{} users exported; a watch can go on from {watch_token}", bar.position()));
    task::block_in_place(|| writer.finish())
}

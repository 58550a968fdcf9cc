//! `user-service export`: writes the users of a running service to a file.

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
    is_standard, print_status, progress_bar,
    service_addr::ServiceAddr,
};
use crate::pb::{self, user_service_client::UserServiceClient};

/// The arguments of `user-service export`.
#[derive(Debug, Args)]
pub struct Export {
    /// The file to write; `-` for standard output. An existing file is replaced when the export
    /// is complete.
    pub file: PathBuf,

    /// Which users. Soft-deleted users are never exported.
    #[command(flatten)]
    pub filter: Filter,

    /// The format of the file [default: by its extension, .jsonl, .ndjson or .csv].
    #[arg(long)]
    pub format: Option<Format>,

    /// The service to export from.
    #[command(flatten)]
    pub service: ServiceAddr,
}

/// Exports users. The file appears under its name only when it is complete.
pub async fn run(args: Export) -> anyhow::Result<()> {
    let format = Format::of(&args.file, args.format)?;
    let request = pb::ExportUsersRequest { filter: args.filter.to_pb(None) };
    let mut client = connect(&args.service.addr).await?;
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
    // A temporary file in the same directory, so that it can be renamed: its name is unique and
    // its mode is 0600.
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::Builder::new().suffix(".part").tempfile_in(dir).with_context(cannot_write)?;
    let file = write(client, request, format, file).await?;
    file.as_file().sync_all().with_context(cannot_write)?;
    file.persist(path).map(drop).with_context(cannot_write)
}

/// Writes the users to `file` and returns it.
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
        // A write to standard output blocks while its reader is slow.
        task::block_in_place(|| part.users.iter().try_for_each(|user| writer.write(user)))?;
        bar.inc(part.users.len() as u64);
        if !part.watch_token.is_empty() {
            watch_token = part.watch_token;
        }
    }
    bar.finish_and_clear();
    print_status(&format!(
        "{} users exported; a watch can continue from resume token {watch_token}",
        bar.position()
    ));
    task::block_in_place(|| writer.finish())
}

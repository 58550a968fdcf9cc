//! `user-service import`: imports the users of a file into a running service.
//!
//! The file is sent in chunks, each acknowledged by the service. A repeated chunk has no effect,
//! so an interrupted import resumes from the first unacknowledged chunk, or from the start.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use futures_util::stream;
use indicatif::ProgressBar;
use prost::Message;
use tokio::{sync::mpsc, task, time};
use tonic::{Status, transport::Channel};
use uuid::Uuid;

use super::{
    connect, explain,
    files::{self, Format, Lines},
    is_retryable, is_standard, print_status, progress_bar,
    service_addr::ServiceAddr,
    with_suffix,
};
use crate::model::stream::CHUNK_SIZE_MAX;
use crate::pb::{self, ImportMode, user_service_client::UserServiceClient};

/// A chunk ends when it has this many bytes. A message may have 4 MiB.
const CHUNK_BYTES: usize = 1024 * 1024;
/// Maximum number of unacknowledged chunks.
const WINDOW: usize = 4;
/// Delay between two attempts. It doubles until an attempt makes progress.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);
/// How long attempts without progress continue.
const RETRY_LIMIT: Duration = Duration::from_secs(5 * 60);

/// The arguments of `user-service import`.
#[derive(Debug, Args)]
pub struct Import {
    /// The file to import, JSON Lines or CSV; `-` for standard input. Fields: `username` and
    /// `email`, optionally `display_name` and `id`.
    pub file: PathBuf,

    /// The format of the file [default: by its extension, .jsonl, .ndjson or .csv].
    #[arg(long)]
    pub format: Option<Format>,

    /// What to do with a user whose username exists.
    #[arg(long, default_value = "create-only")]
    pub mode: Mode,

    /// The file for the report of rejected lines, which is overwritten [default: standard
    /// error].
    #[arg(long)]
    pub report: Option<PathBuf>,

    /// The id of the import, a UUID. The same file with the same id resumes an interrupted
    /// import [default: a new one, kept in FILE.import until the import is complete].
    #[arg(long)]
    pub import_id: Option<Uuid>,

    /// The service to import into.
    #[command(flatten)]
    pub service: ServiceAddr,
}

/// What to do with a user whose username exists.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Mode {
    /// Reject the line.
    CreateOnly,
    /// Keep the existing user unchanged.
    SkipExisting,
    /// Replace the e-mail address and the display name of the existing user.
    Overwrite,
}

/// Imports a file. A rejected line is an error, after all other lines are imported.
pub async fn run(args: Import) -> anyhow::Result<()> {
    let format = Format::of(&args.file, args.format)?;
    let file = File::open(&args.file).with_context(|| format!("cannot open {}", args.file.display()));
    let file = if is_standard(&args.file) { None } else { Some(file?) };
    let report: Box<dyn Write + Send> = match &args.report {
        Some(path) => Box::new(File::create(path).context("cannot write the report")?),
        None => Box::new(io::stderr()),
    };
    let mut client = connect(&args.service.addr).await?;
    let size = file.as_ref().and_then(|file| file.metadata().ok()).map(|metadata| metadata.len());
    let bar = progress_bar(size, "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let file: Box<dyn Read + Send> = match file {
        Some(file) => Box::new(file),
        None => Box::new(io::stdin()),
    };
    let lines = files::read(format, bar.wrap_read(file))?;
    let (import_id, record) = import_id(&args)?;
    let mut run = Run {
        import_id,
        mode: match args.mode {
            Mode::CreateOnly => ImportMode::CreateOnly,
            Mode::SkipExisting => ImportMode::SkipExisting,
            Mode::Overwrite => ImportMode::Overwrite,
        },
        lines,
        is_at_end: false,
        chunks: 0,
        pending: VecDeque::new(),
        total: Total::default(),
        report,
        bar,
    };
    let result = run.import_all(&mut client).await;
    run.bar.finish_and_clear();
    result.with_context(|| match &record {
        Some(record) => format!(
            "the import is not complete: run the same command to resume it; remove {} to start a new import",
            record.display()
        ),
        None => format!("the import is not complete: use --import-id {import_id} to resume it"),
    })?;
    if let Some(record) = record {
        fs::remove_file(&record).with_context(|| format!("cannot remove {}", record.display()))?;
    }
    let Total { created, updated, skipped, rejected } = run.total;
    print_status(&format!("{created} created, {updated} updated, {skipped} skipped, {rejected} rejected"));
    ensure!(rejected == 0, "lines were rejected: {rejected}");
    Ok(())
}

/// The id of the import, and the file that keeps it until the import is complete, if there is
/// one. The id makes a repeated import idempotent.
fn import_id(args: &Import) -> anyhow::Result<(Uuid, Option<PathBuf>)> {
    if let Some(id) = args.import_id {
        return Ok((id, None));
    }
    if is_standard(&args.file) {
        // Printed before the import, because a killed process cannot print it.
        let id = Uuid::now_v7();
        print_status(&format!("to resume after an interruption, repeat the input with --import-id {id}"));
        return Ok((id, None));
    }
    let path = with_suffix(&args.file, ".import");
    let id = match fs::read_to_string(&path) {
        Ok(text) => {
            let id = text.trim().parse();
            let id =
                id.with_context(|| format!("{} does not contain an import id: remove it", path.display()))?;
            print_status(&format!("resuming the import of {}", path.display()));
            id
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = Uuid::now_v7();
            write_id(&path, id).with_context(|| format!("cannot write {}", path.display()))?;
            id
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    Ok((id, Some(path)))
}

fn write_id(path: &Path, id: Uuid) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    writeln!(file, "{id}")?;
    file.sync_all()
}

/// A running import.
struct Run {
    import_id: Uuid,
    mode: ImportMode,
    lines: Lines,
    is_at_end: bool,
    chunks: i64,
    /// Unacknowledged chunks, in the order of the file.
    pending: VecDeque<Chunk>,
    total: Total,
    report: Box<dyn Write + Send>,
    bar: ProgressBar,
}

struct Chunk {
    request: pb::ImportUsersRequest,
    /// The line number of each user.
    lines: Vec<u64>,
}

#[derive(Default)]
struct Total {
    created: u64,
    updated: u64,
    skipped: u64,
    rejected: u64,
}

impl Run {
    /// Imports all lines. A broken stream is replaced by a new one.
    async fn import_all(&mut self, client: &mut UserServiceClient<Channel>) -> anyhow::Result<()> {
        let (mut delay, mut failing_since) = (RETRY_DELAY_MIN, None);
        loop {
            let first_pending = self.first_pending();
            let Err(error) = self.import_in_stream(client).await else { return Ok(()) };
            let Some(status) = error.downcast_ref::<Status>() else { return Err(error) };
            if self.first_pending() > first_pending {
                (delay, failing_since) = (RETRY_DELAY_MIN, None);
            }
            let since = *failing_since.get_or_insert_with(|| {
                self.bar.suspend(|| print_status(&format!("interrupted, retrying: {}", explain(status))));
                Instant::now()
            });
            if !is_retryable(status) || since.elapsed() > RETRY_LIMIT {
                bail!("{}", explain(status));
            }
            time::sleep(delay).await;
            delay = (delay * 2).min(RETRY_DELAY_MAX);
        }
    }

    fn first_pending(&self) -> i64 {
        self.pending.front().map_or(self.chunks + 1, |chunk| chunk.request.chunk)
    }

    /// Sends the unacknowledged chunks, then the rest of the file, in one stream.
    async fn import_in_stream(&mut self, client: &mut UserServiceClient<Channel>) -> anyhow::Result<()> {
        let (sender, receiver) = mpsc::channel(1);
        let requests =
            stream::unfold(receiver, async |mut receiver| receiver.recv().await.map(|c| (c, receiver)));
        let mut acks = client.import_users(requests).await?.into_inner();
        let mut sent = 0;
        while !(self.is_at_end && self.pending.is_empty()) {
            let may_read = !self.is_at_end && self.pending.len() < WINDOW;
            tokio::select! {
                biased;
                ack = acks.message() => {
                    let ack = ack?.ok_or_else(|| Status::unavailable("the stream ended early"))?;
                    self.acknowledge(&ack)?;
                    sent -= 1;
                }
                // A failure disables this branch; `acks` then has the status of the stream.
                Ok(permit) = sender.reserve(), if sent < self.pending.len() || may_read => {
                    if sent == self.pending.len() {
                        // A read from standard input can block.
                        task::block_in_place(|| self.read_chunk())?;
                    }
                    if let Some(chunk) = self.pending.get(sent) {
                        permit.send(chunk.request.clone());
                        sent += 1;
                    }
                }
            }
        }
        drop(sender);
        acks.message().await?;
        Ok(())
    }

    /// Reads the next chunk. Its end depends on the file alone, so that a resumed import has the
    /// same chunks.
    fn read_chunk(&mut self) -> anyhow::Result<()> {
        let (mut users, mut lines, mut bytes) = (Vec::new(), Vec::new(), 0);
        while users.len() < CHUNK_SIZE_MAX && bytes < CHUNK_BYTES {
            let Some(line) = self.lines.next().transpose()? else {
                self.is_at_end = true;
                break;
            };
            match line.user {
                Ok(user) => {
                    bytes += user.encoded_len();
                    users.push(user);
                    lines.push(line.number);
                }
                Err(problem) => self.reject(line.number, &[("line", "FIELD_INVALID", &problem)])?,
            }
        }
        if !users.is_empty() {
            self.chunks += 1;
            let request = pb::ImportUsersRequest {
                import_id: self.import_id.to_string(),
                chunk: self.chunks,
                mode: self.mode.into(),
                users,
            };
            self.pending.push_back(Chunk { request, lines });
        }
        Ok(())
    }

    /// Counts the outcomes of the first unacknowledged chunk and reports its rejected lines.
    fn acknowledge(&mut self, ack: &pb::ImportUsersResponse) -> anyhow::Result<()> {
        let chunk = self.pending.pop_front().filter(|chunk| chunk.request.chunk == ack.chunk);
        let chunk = chunk.context("the service acknowledged a chunk out of order")?;
        for (total, count) in [
            (&mut self.total.created, ack.created),
            (&mut self.total.updated, ack.updated),
            (&mut self.total.skipped, ack.skipped),
        ] {
            *total += u64::try_from(count)?;
        }
        for failure in &ack.failures {
            let line = usize::try_from(failure.position).ok().and_then(|position| chunk.lines.get(position));
            let line = line.context("the service rejected a line that was not sent")?;
            let violations = failure.violations.iter();
            let violations: Vec<_> = violations
                .map(|v| (v.field.as_str(), v.reason().as_str_name(), v.description.as_str()))
                .collect();
            self.reject(*line, &violations)?;
        }
        Ok(())
    }

    /// Counts a rejected line and reports each violation: field, reason, description.
    fn reject(&mut self, line: u64, violations: &[(&str, &str, &str)]) -> anyhow::Result<()> {
        self.total.rejected += 1;
        let write = || {
            for (field, reason, description) in violations {
                writeln!(self.report, "line {line}: {field}: {reason}: {description}")?;
            }
            io::Result::Ok(())
        };
        self.bar.suspend(write).context("cannot write the report")
    }
}

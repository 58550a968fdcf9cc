//! `user-service import`.

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
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;
use uuid::Uuid;

use super::{
    beside, connect, explain,
    files::{self, Format, Lines},
    is_standard, progress_bar, say,
};
use crate::model::stream::CHUNK_SIZE_MAX;
use crate::pb::{self, ImportMode, user_service_client::UserServiceClient};

/// A chunk ends when it has this many octets: far below the 4 MiB of a message.
const CHUNK_OCTETS: usize = 1024 * 1024;
/// Chunks that are sent before the first one is acknowledged.
const WINDOW: usize = 4;
/// Between two attempts to go on.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);
/// How long to try before giving up.
const RETRY_LIMIT: Duration = Duration::from_secs(5 * 60);

/// What `user-service import` is told.
#[derive(Debug, Args)]
pub struct Import {
    /// JSON Lines or CSV with `username`, `email` and, if wanted, `display_name` and
    /// `id`; `-` for standard input.
    pub file: PathBuf,

    /// How it is written [default: what the name ends with, .jsonl or .csv]
    #[arg(long)]
    pub format: Option<Format>,

    /// What to do with users whose username somebody has.
    #[arg(long, default_value = "create-only")]
    pub mode: Mode,

    /// Where to write which lines were refused [default: standard error]
    #[arg(long)]
    pub report: Option<PathBuf>,

    /// A UUID to know the import by. An import with the id of one that was
    /// interrupted goes on with it [default: kept in FILE.import until the end]
    #[arg(long)]
    pub import_id: Option<Uuid>,

    /// The service, as HOST:PORT [default: LISTEN_ADDR, on this machine]
    #[arg(long)]
    pub addr: Option<String>,
}

/// What to do with users whose username somebody has.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Mode {
    /// Refuse them.
    CreateOnly,
    /// Leave them as they are.
    SkipExisting,
    /// Replace their e-mail address and display name.
    Overwrite,
}

/// Imports a file; it is an error if a line was refused.
pub async fn run(args: Import, default_addr: String) -> anyhow::Result<()> {
    let format = Format::of(&args.file, args.format)?;
    let file = File::open(&args.file).with_context(|| format!("cannot open {}", args.file.display()));
    let file = if is_standard(&args.file) { None } else { Some(file?) };
    let report: Box<dyn Write + Send> = match &args.report {
        Some(path) => Box::new(File::create(path).context("cannot write the report")?),
        None => Box::new(io::stderr()),
    };
    let mut client = connect(args.addr.as_ref().unwrap_or(&default_addr)).await?;
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
    let result = run.finish(&mut client).await;
    run.bar.finish_and_clear();
    result.with_context(|| match &record {
        Some(record) => format!(
            "the import is not complete; the same command goes on with it, or begins anew without {}",
            record.display()
        ),
        None => format!("the import is not complete; --import-id {import_id} goes on with it"),
    })?;
    if let Some(record) = record {
        fs::remove_file(&record).with_context(|| format!("cannot remove {}", record.display()))?;
    }
    let Total { created, updated, skipped, refused } = run.total;
    say(&format!("{created} created, {updated} updated, {skipped} skipped, {refused} refused"));
    ensure!(refused == 0, "lines were refused: {refused}");
    Ok(())
}

/// The id of the import, and the file in which it is kept until the end: with it,
/// an import that is begun again does nothing twice.
fn import_id(args: &Import) -> anyhow::Result<(Uuid, Option<PathBuf>)> {
    if let Some(id) = args.import_id {
        return Ok((id, None));
    }
    if is_standard(&args.file) {
        // Now, since whoever is killed says nothing.
        let id = Uuid::now_v7();
        say(&format!("if this is cut, the same input with --import-id {id} goes on with it"));
        return Ok((id, None));
    }
    let path = beside(&args.file, ".import");
    let id = match fs::read_to_string(&path) {
        Ok(text) => {
            let id = text.trim().parse();
            let id = id.with_context(|| format!("{} has no import id: remove it", path.display()))?;
            say(&format!("going on with the import of {}", path.display()));
            id
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = Uuid::now_v7();
            keep(&path, id).with_context(|| format!("cannot write {}", path.display()))?;
            id
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    Ok((id, Some(path)))
}

fn keep(path: &Path, id: Uuid) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    writeln!(file, "{id}")?;
    file.sync_all()
}

/// An import under way.
struct Run {
    import_id: Uuid,
    mode: ImportMode,
    lines: Lines,
    is_at_end: bool,
    chunks: i64,
    /// Chunks that are not acknowledged yet, in their order.
    pending: VecDeque<Chunk>,
    total: Total,
    report: Box<dyn Write + Send>,
    bar: ProgressBar,
}

struct Chunk {
    request: pb::ImportUsersRequest,
    /// The line of each user.
    lines: Vec<u64>,
}

#[derive(Default)]
struct Total {
    created: u64,
    updated: u64,
    skipped: u64,
    refused: u64,
}

impl Run {
    /// Imports all, in as many streams as it takes.
    async fn finish(&mut self, client: &mut UserServiceClient<Channel>) -> anyhow::Result<()> {
        let (mut delay, mut failing_since) = (RETRY_DELAY_MIN, None);
        loop {
            let first_pending = self.first_pending();
            let Err(error) = self.in_one_stream(client).await else { return Ok(()) };
            let Some(status) = error.downcast_ref::<Status>() else { return Err(error) };
            if self.first_pending() > first_pending {
                (delay, failing_since) = (RETRY_DELAY_MIN, None);
            }
            let since = *failing_since.get_or_insert_with(|| {
                self.bar.suspend(|| say(&format!("interrupted, trying again: {}", explain(status))));
                Instant::now()
            });
            if !is_passing(status) || since.elapsed() > RETRY_LIMIT {
                bail!("{}", explain(status));
            }
            time::sleep(delay).await;
            delay = (delay * 2).min(RETRY_DELAY_MAX);
        }
    }

    fn first_pending(&self) -> i64 {
        self.pending.front().map_or(self.chunks + 1, |chunk| chunk.request.chunk)
    }

    /// Sends what is not acknowledged yet, and goes on from there.
    async fn in_one_stream(&mut self, client: &mut UserServiceClient<Channel>) -> anyhow::Result<()> {
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
                    self.acknowledged(&ack)?;
                    sent -= 1;
                }
                // Once it fails, the stream is about to say why.
                Ok(place) = sender.reserve(), if sent < self.pending.len() || may_read => {
                    if sent == self.pending.len() {
                        // Standard input may take its time.
                        task::block_in_place(|| self.read_chunk())?;
                    }
                    if let Some(chunk) = self.pending.get(sent) {
                        place.send(chunk.request.clone());
                        sent += 1;
                    }
                }
            }
        }
        drop(sender);
        acks.message().await?;
        Ok(())
    }

    /// Reads the next chunk. Where it ends depends on the file alone, so that an
    /// import that is begun again has the same chunks.
    fn read_chunk(&mut self) -> anyhow::Result<()> {
        let (mut users, mut lines, mut octets) = (Vec::new(), Vec::new(), 0);
        while users.len() < CHUNK_SIZE_MAX && octets < CHUNK_OCTETS {
            let Some(line) = self.lines.next().transpose()? else {
                self.is_at_end = true;
                break;
            };
            match line.user {
                Ok(user) => {
                    octets += user.encoded_len();
                    users.push(user);
                    lines.push(line.number);
                }
                Err(what) => self.refused(line.number, &[("line", "FIELD_INVALID", &what)])?,
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

    fn acknowledged(&mut self, ack: &pb::ImportUsersResponse) -> anyhow::Result<()> {
        let chunk = self.pending.pop_front().filter(|chunk| chunk.request.chunk == ack.chunk);
        let chunk = chunk.context("the service acknowledged a chunk that is not next")?;
        for (total, count) in [
            (&mut self.total.created, ack.created),
            (&mut self.total.updated, ack.updated),
            (&mut self.total.skipped, ack.skipped),
        ] {
            *total += u64::try_from(count)?;
        }
        for failure in &ack.failures {
            let line = usize::try_from(failure.position).ok().and_then(|position| chunk.lines.get(position));
            let line = line.context("the service refused a line that was not sent")?;
            let violations = failure.violations.iter();
            let violations: Vec<_> = violations
                .map(|v| (v.field.as_str(), v.reason().as_str_name(), v.description.as_str()))
                .collect();
            self.refused(*line, &violations)?;
        }
        Ok(())
    }

    /// Reports a line: what is wrong with which field.
    fn refused(&mut self, line: u64, violations: &[(&str, &str, &str)]) -> anyhow::Result<()> {
        self.total.refused += 1;
        let write = || {
            for (field, reason, description) in violations {
                writeln!(self.report, "line {line}: {field}: {reason}: {description}")?;
            }
            io::Result::Ok(())
        };
        self.bar.suspend(write).context("cannot write the report")
    }
}

/// Whether it is worth while to go on: the service said so, or did not say
/// anything because the connection broke.
fn is_passing(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::ResourceExhausted | Code::Aborted | Code::DeadlineExceeded => true,
        Code::Unknown | Code::Internal | Code::Cancelled => status.get_error_details().error_info().is_none(),
        _ => false,
    }
}

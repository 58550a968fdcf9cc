//! Imports: a stream of chunks, each written by one statement, which also
//! remembers it. A chunk is looked up before it is written, so one that was
//! written before is only acknowledged again.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures_util::{
    StreamExt,
    stream::{self, BoxStream, Fuse, FuturesOrdered},
};
use prost::Message;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time,
};
use tokio_postgres::Row;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::config::Config;
use crate::error::{Access, Error, reason};
use crate::limits::StreamLimiter;
use crate::model::request::Chunk;
use crate::pb::{self, ImportMode};
use crate::store::pool::{Db, Params};
use crate::store::user_row::NewUsers;
use crate::store::users::column;

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[RECORD, ADD, OVERWRITE];

/// How often a chunk is written anew when somebody got in its way.
const ATTEMPTS: u32 = 6;
/// Before the second attempt; twice as long before each one after that.
const PAUSE: Duration = Duration::from_millis(20);

/// Chunks of an import that are written at once, as long as none has to do with what
/// another one writes.
const IN_FLIGHT: usize = 2;

/// The imports into a database, a limited number at a time.
pub struct Imports {
    db: Arc<Db>,
    limiter: StreamLimiter,
    /// All imports together write with no more than half of the pool.
    turns: Arc<Semaphore>,
    idle_timeout: Duration,
    tasks: TaskTracker,
}

impl Imports {
    /// None yet. Their tasks end with the chunk that they write.
    pub fn new(db: Arc<Db>, config: &Config, tasks: TaskTracker) -> Self {
        let limiter = StreamLimiter::new("imports", config.max_imports);
        let turns = Arc::new(Semaphore::new(config.pool_size.div_ceil(2)));
        let idle_timeout = Duration::from_millis(config.import_idle_timeout_ms);
        Self { db, limiter, turns, idle_timeout, tasks }
    }

    /// Writes chunks and acknowledges each, in their order; the first error is the
    /// end. While chunks are being written, the next one is read, and no more.
    pub fn run(
        &self,
        chunks: BoxStream<'static, Result<Chunk, Error>>,
    ) -> Result<BoxStream<'static, Result<pb::ImportUsersResponse, Error>>, Error> {
        let import = Import {
            db: Arc::clone(&self.db),
            turns: Arc::clone(&self.turns),
            idle_timeout: self.idle_timeout,
            tasks: self.tasks.clone(),
            chunks: chunks.fuse(),
            next: None,
            writing: FuturesOrdered::new(),
            written: VecDeque::new(),
            _permit: self.limiter.acquire()?,
        };
        let acks = stream::try_unfold(import, async |mut import| {
            Ok(import.next_ack().await?.map(|ack| (ack, import)))
        });
        Ok(acks.boxed())
    }
}

/// An import under way.
struct Import {
    db: Arc<Db>,
    turns: Arc<Semaphore>,
    /// How long the client may say nothing: its permit is one of few.
    idle_timeout: Duration,
    tasks: TaskTracker,
    chunks: Fuse<BoxStream<'static, Result<Chunk, Error>>>,
    /// What is written next.
    next: Option<Result<Chunk, Error>>,
    /// Each in a task of its own, so that it ends, and gives its connection back, also
    /// while nobody asks for its acknowledgement.
    writing: FuturesOrdered<AbortOnDropHandle<Result<pb::ImportUsersResponse, Error>>>,
    /// The chunks that `writing` writes.
    written: VecDeque<Arc<Chunk>>,
    _permit: OwnedSemaphorePermit,
}

impl Import {
    async fn next_ack(&mut self) -> Result<Option<pb::ImportUsersResponse>, Error> {
        loop {
            self.write_next();
            let may_say_more = self.next.is_none() && !self.chunks.is_done();
            tokio::select! {
                // What has come counts, also if that is late.
                biased;
                Some(ack) = self.writing.next() => {
                    self.written.pop_front();
                    return ack.map_err(|_| Error::Internal)?.map(Some);
                }
                chunk = self.chunks.next(), if may_say_more => self.next = chunk,
                () = time::sleep(self.idle_timeout), if may_say_more && self.writing.is_empty() => {
                    return Err(Error::DeadlineExceeded);
                }
                else => return self.next.take().transpose().map(|_| None),
            }
        }
    }

    /// Begins with the next chunk, if it may be written beside those that are.
    fn write_next(&mut self) {
        let may_begin = |chunk: &Chunk| {
            self.written.len() < IN_FLIGHT && !self.written.iter().any(|other| other.meets(chunk))
        };
        if let Some(chunk) = self.next.take_if(|next| next.as_ref().is_ok_and(may_begin))
            && let Ok(chunk) = chunk.map(Arc::new)
        {
            self.written.push_back(Arc::clone(&chunk));
            let (db, turns) = (Arc::clone(&self.db), Arc::clone(&self.turns));
            let task = self.tasks.spawn(async move {
                let _turn = turns.acquire().await;
                import(&db, &chunk).await
            });
            self.writing.push_back(AbortOnDropHandle::new(task));
        }
    }
}

/// Writes a chunk, unless it was written before.
///
/// Whatever the statement does not see, because somebody is doing it at this
/// moment, makes it fail as a whole; the next attempt sees it.
async fn import(db: &Db, chunk: &Chunk) -> Result<pb::ImportUsersResponse, Error> {
    let mut pause = PAUSE;
    for _ in 0..ATTEMPTS {
        if let Some(ack) = recorded(db, chunk).await? {
            return Ok(ack);
        }
        match write(db, chunk).await {
            Ok(Some(ack)) => return Ok(ack),
            Ok(None) => {}
            Err(Error::UsernameTaken { .. } | Error::UserIdTaken | Error::TransactionConflict) => {
                time::sleep(pause).await;
                pause *= 2;
            }
            Err(other) => return Err(other),
        }
    }
    Err(Error::TransactionConflict)
}

const RECORD: &str = "select outcomes, refused, fingerprint = $2 from import_chunks
where key = $1 and expire_time > now()";

/// The acknowledgement of a chunk that was written before.
async fn recorded(db: &Db, chunk: &Chunk) -> Result<Option<pb::ImportUsersResponse>, Error> {
    let rows = db.run(Access::Read, RECORD, &[&chunk.key, &chunk.fingerprint]).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    if !column::<bool>(row, 2)? {
        let what = "was imported before, with other content";
        return Err(Error::invalid("chunk", reason::REQUEST_ID_REUSED, what));
    }
    ack(chunk, row).map(Some)
}

// What becomes of a user. The numbers are stored.
const CREATED: i16 = 1;
const UPDATED: i16 = 2;
const UNCHANGED: i16 = 3;
const USERNAME_TAKEN: i16 = 4;
const USER_ID_TAKEN: i16 = 5;
const USER_DELETED: i16 = 6;

/// The users of a chunk as rows, under other names than the columns of `users`. A
/// chunk that waits holds up whoever waits for it, so it gives up after a second and
/// lets them pass.
macro_rules! input {
    () => {
        "with input as materialized (
    select i.*
    from (select set_config('lock_timeout', '1s', true)) as patience,
        unnest(
            $4::uuid[], $5::boolean[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[],
            $11::bytea[]
        ) with ordinality as i (
            new_id, has_id, new_username, new_username_key, new_email, new_email_key,
            new_display_name, salt, position
        )
)"
    };
}

/// Whether another user has the id that a user brings. One without is given a new
/// id, which nobody has.
macro_rules! has_taken_id {
    () => {
        "has_id and (select true from users where id = new_id)"
    };
}

/// Records what was `decided` for each user of a chunk, and does it. Nothing comes
/// back, and nothing is done, if somebody has recorded this chunk in this moment, or
/// if a user was lost between the look and its lock.
macro_rules! carry_out {
    ($updated:literal) => {
        concat!(
            ", chunk as (
    insert into import_chunks (key, fingerprint, outcomes, refused, expire_time)
    select $1, $2, coalesce(array_agg(outcome order by position), '{}'), $3, now() + interval '7 days'
    from decided
    having count(*) = cardinality($4)
    on conflict (key) do update set
        fingerprint = excluded.fingerprint,
        outcomes = excluded.outcomes,
        refused = excluded.refused,
        expire_time = excluded.expire_time
    where import_chunks.expire_time <= now()
    returning outcomes, refused
), created as (
    insert into users (
        id, username, username_key, username_held, email, email_key, display_name,
        revision, create_time, update_time, fingerprint_salt
    )
    select new_id, new_username, new_username_key, true, new_email, new_email_key, new_display_name,
        1, now(), now(), salt
    from decided where outcome = 1 and exists (select from chunk)
    order by new_username_key
    returning id, revision
)",
            $updated,
            "
select outcomes, refused from chunk"
        )
    };
}

/// For the modes that change no user that exists.
const ADD: &str = concat!(
    input!(),
    ", decided as materialized (
    select *, case
        when (select true from users where username_key = new_username_key and username_held) then 4
        when ",
    has_taken_id!(),
    " then 5
        else 1
    end::smallint as outcome
    from input
)",
    carry_out!(
        ", change as (
    insert into user_changes (user_id, revision, kind) select id, revision, 1 from created
)"
    )
);

/// The lock in `cur` makes whoever comes second see the first one's work, in an order
/// in which groups of calls lock as well. A user whose username changed meanwhile is
/// not in `cur`, and is missed in `decided`.
const OVERWRITE: &str = concat!(
    input!(),
    ", cur as materialized (
    select i.*, u.id as cur_id, u.delete_time is not null as is_deleted,
        (u.email, u.display_name) is distinct from (new_email, new_display_name) as has_changes
    from input i join users u on u.username_key = new_username_key and u.username_held
    order by u.id for update of u
), decided as materialized (
    select *, case
        when has_id and cur_id <> new_id then 4
        when is_deleted then 6
        when has_changes then 2
        else 3
    end::smallint as outcome
    from cur
    union all
    select i.*, null, null, null, case when ",
    has_taken_id!(),
    " then 5 else 1 end::smallint
    from input i
    where (select true from users where username_key = new_username_key and username_held) is null
)",
    carry_out!(
        ", updated as (
    update users u set
        email = new_email,
        email_key = new_email_key,
        display_name = new_display_name,
        revision = u.revision + 1,
        update_time = greatest(now(), u.update_time)
    from decided where u.id = cur_id and outcome = 2 and exists (select from chunk)
    returning u.id, u.revision
), change as (
    insert into user_changes (user_id, revision, kind)
    select id, revision, 1 from created union all select id, revision, 2 from updated
)"
    )
);

/// Writes a chunk; `None` if it has to be looked at again.
async fn write(db: &Db, chunk: &Chunk) -> Result<Option<pb::ImportUsersResponse>, Error> {
    let users: NewUsers<'_> = chunk.users.iter().map(|imported| &imported.user).collect();
    let have_ids: Vec<bool> = chunk.users.iter().map(|imported| imported.has_id).collect();
    let refused = pb::ImportUsersResponse { failures: chunk.refused.clone(), ..Default::default() };
    let params: Params<'_> = &[
        &chunk.key,
        &chunk.fingerprint,
        &refused.encode_to_vec(),
        &users.ids,
        &have_ids,
        &users.usernames,
        &users.username_keys,
        &users.emails,
        &users.email_keys,
        &users.display_names,
        &users.salts,
    ];
    let sql = if chunk.mode == ImportMode::Overwrite { OVERWRITE } else { ADD };
    let rows = db.run(Access::Write, sql, params).await?;
    rows.first().map(|row| ack(chunk, row)).transpose()
}

/// The acknowledgement that the record of a chunk makes.
fn ack(chunk: &Chunk, row: &Row) -> Result<pb::ImportUsersResponse, Error> {
    let outcomes: Vec<i16> = column(row, 0)?;
    let mut ack = pb::ImportUsersResponse::decode(column::<&[u8]>(row, 1)?).map_err(|error| {
        tracing::error!(%error, "the record of a chunk cannot be read");
        Error::Internal
    })?;
    ack.chunk = chunk.number;
    let refused: Vec<i32> = ack.failures.iter().map(|failure| failure.position).collect();
    let positions = (0..).filter(|position| refused.binary_search(position).is_err());
    for (position, outcome) in positions.zip(outcomes) {
        match outcome {
            CREATED => ack.created += 1,
            UPDATED => ack.updated += 1,
            UNCHANGED => ack.skipped += 1,
            _ if chunk.mode == ImportMode::SkipExisting => ack.skipped += 1,
            _ => ack.failures.push(failure(position, outcome)),
        }
    }
    ack.failures.sort_by_key(|failure| failure.position);
    Ok(ack)
}

/// What is wrong with a user that its outcome does not let in.
fn failure(position: i32, outcome: i16) -> pb::ImportFailure {
    let (field, reason, description) = match outcome {
        USERNAME_TAKEN => ("username", reason::USERNAME_TAKEN, "another user has this username"),
        USER_ID_TAKEN => ("id", reason::USER_ID_TAKEN, "there is a user with this id already"),
        USER_DELETED => ("username", reason::USER_DELETED, "the user with this username is deleted"),
        _ => ("", reason::FIELD_INVALID, "was refused by a newer release"),
    };
    let (field, reason, description) = (field.to_owned(), reason.to_owned(), description.to_owned());
    pb::ImportFailure { position, violations: vec![pb::ImportViolation { field, reason, description }] }
}

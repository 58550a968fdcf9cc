-- Chunks of imports: what makes it safe to send one again. A row is written by
-- the statement that writes the chunk's users.
--
-- No personal data. Both hashes are made with the import's id, a random UUID that
-- only its caller knows and that is stored nowhere: whoever has this table alone
-- cannot guess from it what was imported, so erasing a user never has to look
-- here.
create table import_chunks (
    -- SHA-256 of the import's id and the chunk's number.
    key bytea not null,

    -- SHA-256 of the import's id and the chunk's content, to refuse the same
    -- chunk with other content.
    fingerprint bytea not null,

    -- What became of each user that was not refused for its own sake, in order:
    -- 1 created, 2 updated, 3 unchanged, 4 username taken, 5 id taken, 6 deleted.
    outcomes smallint[] not null,

    -- The others, as an encoded ImportUsersResponse that has failures only:
    -- positions, fields and reasons.
    refused bytea not null,

    -- 7 days after the chunk was written.
    expire_time timestamptz not null,

    constraint import_chunks_pkey primary key (key)
);

-- What the background purge looks for.
create index import_chunks_expire_time on import_chunks (expire_time);

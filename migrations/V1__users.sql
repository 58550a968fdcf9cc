-- Users. One row is one user until it is purged or expunged.
--
-- Only built-in types: enum, citext and domain types cost the driver catalogue
-- queries on each connection. Text is compared byte by byte (collation "C"):
-- what is equal is decided in Rust, where the keys are made, and a collation
-- library's upgrade cannot break an index.
--
-- The names of constraints and unique indexes are part of the contract: the
-- service turns them into error reasons (src/error.rs).
create table users (
    -- UUID v7 made by the service, or one that the caller brought.
    id uuid not null,

    -- As typed, to show. The key is its canonical form, to compare.
    username text collate "C" not null,
    username_key text collate "C" not null,
    -- False once a soft-deleted user has let go of its username.
    username_held boolean not null,

    -- As typed, to show and to write to. The key is its canonical form.
    email text collate "C" not null,
    email_key text collate "C" not null,

    -- May be empty.
    display_name text collate "C" not null,

    -- 1 on create, 1 more with every change.
    revision bigint not null,
    create_time timestamptz not null,
    update_time timestamptz not null,

    -- Set together: when the user was soft-deleted, and when the row goes.
    delete_time timestamptz,
    purge_time timestamptz,

    -- What the fingerprints of this user's requests are hashed with. It exists
    -- nowhere else: once the row is gone, nothing can be guessed from them.
    fingerprint_salt bytea not null default uuid_send(gen_random_uuid()),

    constraint users_pkey primary key (id),
    constraint users_revision_positive check (revision > 0),
    constraint users_delete_and_purge_together
        check ((delete_time is null) = (purge_time is null)),
    -- Only a soft-deleted user can be without its username.
    constraint users_username_held_while_live
        check (username_held or delete_time is not null)
)
-- Free space in each page, so that a change of a column without an index stays
-- in its page and touches no index (HOT).
with (fillfactor = 90);

-- Usernames are unique while held. It also serves GetUser by username, and the
-- list of live users by username: that one steps over the soft-deleted users who
-- still hold theirs, which is cheaper than one more index on every create.
create unique index users_username_key on users (username_key) where username_held;

-- The other lists. Live and deleted users have an index each, so that a page of
-- live users never wades through deleted ones, and a create pays for the live
-- indexes only; a list of both merges the two.
create index users_live_create_time on users (create_time, id) where delete_time is null;
create index users_live_email on users (email_key, create_time, id) where delete_time is null;
create index users_deleted_create_time on users (create_time, id) where delete_time is not null;
create index users_deleted_email on users (email_key, create_time, id) where delete_time is not null;
create index users_deleted_username on users (username_key, id) where delete_time is not null;

-- What the background purge looks for.
create index users_purge_time on users (purge_time) where purge_time is not null;

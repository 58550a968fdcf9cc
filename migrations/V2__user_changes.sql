-- The change log: one row for each change of a user, written by the statement
-- that makes the change. Ids and revisions only, no personal data: erasing a
-- user never has to look here.
create table user_changes (
    -- The writing transaction. A reader asks which transactions became visible
    -- between two snapshots; a sequence alone cannot tell, because its numbers
    -- are drawn before commit.
    xid xid8 not null default pg_current_xact_id(),
    -- The order within one transaction.
    seq bigint not null generated always as identity,

    user_id uuid not null,
    -- The revision that the change made.
    revision bigint not null,
    -- 1 created, 2 updated, 3 deleted, 4 undeleted, 5 expunged, 6 purged.
    kind smallint not null,
    time timestamptz not null default now(),

    constraint user_changes_pkey primary key (xid, seq),
    constraint user_changes_kind_known check (kind between 1 and 6)
);

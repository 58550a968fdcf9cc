-- The change log in nine partitions, which are written and emptied in turn: to truncate a
-- partition takes as long for a hundred million changes as for one, and leaves no dead rows.
-- The service, which has no right to create or drop tables, needs no new ones.
--
-- A row's number says its partition, and the sequence says which one is written: to advance is
-- to set the sequence. A partition is not bound to a time, so a purge that does not run for
-- days stops no write. What follows here only changes the catalogue.
alter table user_changes rename to user_changes_0;
alter table user_changes_0 rename constraint user_changes_pkey to user_changes_0_pkey;
alter table user_changes_0 rename constraint user_changes_kind_known to user_changes_0_kind_known;

create sequence user_changes_seq minvalue 0;
select setval('user_changes_seq', pg_sequence_last_value(pg_get_serial_sequence('user_changes_0', 'seq')))
where pg_sequence_last_value(pg_get_serial_sequence('user_changes_0', 'seq')) is not null;
alter table user_changes_0 alter column seq drop identity;

create table user_changes (
    -- The writing transaction. A reader asks which transactions became visible
    -- between two snapshots; a sequence alone cannot tell, because its numbers
    -- are drawn before commit.
    xid xid8 not null default pg_current_xact_id(),
    -- The order within one transaction. The first digit of 19 is the partition.
    seq bigint not null default nextval('user_changes_seq'),

    user_id uuid not null,
    -- The revision that the change made.
    revision bigint not null,
    -- 1 created, 2 updated, 3 deleted, 4 undeleted, 5 expunged, 6 purged.
    kind smallint not null,
    time timestamptz not null default now(),

    constraint user_changes_pkey primary key (xid, seq),
    constraint user_changes_kind_known check (kind between 1 and 6)
) partition by range (seq);
alter sequence user_changes_seq owned by user_changes.seq;

alter table user_changes_0 rename constraint user_changes_0_kind_known to user_changes_kind_known;
alter table user_changes attach partition user_changes_0 for values from (minvalue) to (1000000000000000000);
alter table user_changes_0 drop constraint user_changes_0_seq;
create table user_changes_1 partition of user_changes
    for values from (1000000000000000000) to (2000000000000000000);
create table user_changes_2 partition of user_changes
    for values from (2000000000000000000) to (3000000000000000000);
create table user_changes_3 partition of user_changes
    for values from (3000000000000000000) to (4000000000000000000);
create table user_changes_4 partition of user_changes
    for values from (4000000000000000000) to (5000000000000000000);
create table user_changes_5 partition of user_changes
    for values from (5000000000000000000) to (6000000000000000000);
create table user_changes_6 partition of user_changes
    for values from (6000000000000000000) to (7000000000000000000);
create table user_changes_7 partition of user_changes
    for values from (7000000000000000000) to (8000000000000000000);
create table user_changes_8 partition of user_changes
    for values from (8000000000000000000) to (maxvalue);

-- The partitions that have been written since they were last emptied.
create table user_changes_partitions (
    number smallint not null,
    -- Since when it has been written. The partition before it is complete since then.
    begin_time timestamptz not null,

    constraint user_changes_partitions_pkey primary key (number),
    constraint user_changes_partitions_exist check (number between 0 and 8)
);
insert into user_changes_partitions values (0, now());

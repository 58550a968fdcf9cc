-- What a reader of the change log has to know about it. One row.
create table user_feed (
    is_only_row boolean not null default true,

    -- Of which database the transaction ids in the log are: the cluster's system
    -- identifier and the database's oid. Those of a dump that was restored are of
    -- another one, and mean nothing here.
    origin text collate "C" not null,

    -- The newest change that was purged. All older ones are gone too, so whoever has
    -- not seen all of them cannot go on.
    purged_xid xid8 not null,
    purged_time timestamptz not null,

    constraint user_feed_pkey primary key (is_only_row),
    constraint user_feed_one_row check (is_only_row)
);

insert into user_feed (origin, purged_xid, purged_time)
select system_identifier || ' ' || oid, '0', 'epoch'
from pg_control_system(), pg_database where datname = current_database();

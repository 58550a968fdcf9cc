-- V11 makes the change log a partitioned table, whose first partition is this table. With this
-- constraint, once it is validated, PostgreSQL need not read the table for that.
alter table user_changes
    add constraint user_changes_0_seq check (seq < 1000000000000000000) not valid;

-- outside a transaction
-- Reads the whole change log, and blocks no write meanwhile.
alter table user_changes validate constraint user_changes_0_seq;

-- outside a transaction
-- The purge walks through the table instead: a create and an update have one index less to
-- write, and no purge reads the entries of rows that are gone.
drop index concurrently if exists requests_expire_time;

-- By default a table is vacuumed once a fifth of its rows are dead. Here rows are deleted as
-- fast as they are written, or have to be gone soon after they were erased.
alter table users set (autovacuum_vacuum_scale_factor = 0.05);
alter table username_holds set (autovacuum_vacuum_scale_factor = 0.05);
alter table requests set (autovacuum_vacuum_scale_factor = 0.05);
alter table import_chunks set (autovacuum_vacuum_scale_factor = 0.05);

-- The statistics of a column are copies of its values, which stay when the rows are erased.
-- No plan of the service needs them: its plans are generic, and prefer indexes.
alter table users
    alter column username set statistics 0,
    alter column username_key set statistics 0,
    alter column email set statistics 0,
    alter column email_key set statistics 0,
    alter column display_name set statistics 0,
    alter column fingerprint_salt set statistics 0;
alter table username_holds alter column username_key set statistics 0;

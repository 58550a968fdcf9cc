-- Removes the statistics that V13 left behind. Before PostgreSQL 18 only a superuser can do that
-- without a rewrite of indexes; docs/operations.md has the statements for other roles.
do $$
declare
    personal constant name[] :=
        '{username, username_key, email, email_key, display_name, fingerprint_salt}';
begin
    if current_setting('is_superuser')::boolean then
        delete from pg_statistic using pg_attribute
        where attrelid = starelid and attnum = staattnum and attname = any(personal)
            and attrelid in ('users'::regclass, 'username_holds'::regclass);
    elsif current_setting('server_version_num')::int >= 180000 then
        perform pg_clear_attribute_stats(schemaname, tablename, attname, false)
        from (select distinct schemaname::text, tablename::text, attname::text from pg_stats
            where (quote_ident(schemaname) || '.' || quote_ident(tablename))::regclass
                    in ('users'::regclass, 'username_holds'::regclass)
                and attname = any(personal)) as statistics;
    end if;
end
$$;

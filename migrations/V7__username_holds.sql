-- Usernames that updates replaced, held for their former owner. A user's current username is
-- in `users`; the check below keeps the two apart.
create table username_holds (
    -- Canonical, as in users.
    username_key text collate "C" not null,
    -- Personal data, so it goes with the user.
    user_id uuid not null references users (id) on delete cascade,
    -- From then on every user can take it.
    expire_time timestamptz not null,

    constraint username_holds_pkey primary key (username_key)
);

-- What the cascade and the release of a user's usernames look for.
create index username_holds_user_id on username_holds (user_id);
-- What the background purge looks for.
create index username_holds_expire_time on username_holds (expire_time);

-- A statement looks for holds in its snapshot. A rename that commits after that, and before
-- the statement takes the name that it frees, is seen by these triggers, whose queries have
-- snapshots of their own. Callers see the same violation as for a username in use.
create function reject_held_username() returns trigger language plpgsql as $$
begin
    if tg_level = 'ROW' then
        perform from username_holds h
        where h.username_key = new.username_key and h.user_id <> new.id and h.expire_time > now();
    else
        -- A subquery that returns a value is never turned into a join over the whole table.
        perform from new_users n where (
            select h.user_id <> n.id from username_holds h
            where h.username_key = n.username_key and h.expire_time > now()
        );
    end if;
    if found then
        raise unique_violation using constraint = 'users_username_key', message = 'username is held';
    end if;
    return null;
end
$$;

create trigger users_username_not_held_on_insert after insert on users
    referencing new table as new_users
    for each statement execute function reject_held_username();

create trigger users_username_not_held_on_update after update of username_key, username_held on users
    for each row
    when (new.username_held and (new.username_key <> old.username_key or not old.username_held))
    execute function reject_held_username();

-- The version of the rules that made the keys of this row (src/model/names.rs). After an
-- upgrade of the rules, rows of older versions are found by it.
alter table users add column norm_version smallint not null default 1;

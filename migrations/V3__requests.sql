-- Request ids: what makes a retry safe. A row is written by the statement that
-- makes the change, so there is no moment at which one exists without the other.
create table requests (
    request_id uuid not null,

    -- A hash of the request's content, to refuse the same id with other content.
    -- It is made with the user's fingerprint_salt, so that it says nothing about
    -- an erased user; without it only where the content is no more than ids.
    fingerprint bytea not null,
    is_salted boolean not null,

    -- The user that the request was about. Not a foreign key: the row outlives
    -- the user, so that a retry does not bring an erased user back.
    user_id uuid not null,

    -- 24 hours after the change.
    expire_time timestamptz not null,

    constraint requests_pkey primary key (request_id)
);

-- What the background purge looks for.
create index requests_expire_time on requests (expire_time);
